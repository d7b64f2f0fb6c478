"""Compare runs: what differs, their losses at the same place, and whether that is chance.

python compare.py out-a out-b                  two runs, or two folders of runs that --seeds=3 made
python compare.py out-a out-b out-c --json     the first is what the others are compared with
python compare.py                              the runs that have ended, from runs.tsv: best first

Runs in one folder that have the same settings but the seed are a group. The losses are compared
where the shortest run ends: at equal tokens, equal steps and equal minutes (which are worth
something on one machine alone, with nothing beside them). Between two evaluations a loss is on the
straight line that joins them, and marked ~; nothing is said of what lies beyond a run's end. The
verdict is at equal tokens, unless --by says otherwise or the runs were of the same length in steps
or minutes instead. Its interval is Welch's, of the difference of the groups' means: where 0 is not
in it, the difference is more than chance. Runs of different data or tokenizers are compared by bits
per byte.
"""

import json as json_
import statistics

from fledge import comparison
from fledge.comparison import AXES, UNITS, is_number
from fledge.configurator import configure, one_of
from fledge.report import aligned

# -----------------------------------------------------------------------------
by = 'auto'  # what is equal for the verdict: tokens, step, minutes; auto: what the runs have alike
picture = 'comparison.png'  # a PNG of all curves; '': none
json = False  # the last line of output is one JSON object
folders = []  # of runs, or folders that hold them
configure(globals(), others=folders)
# -----------------------------------------------------------------------------
one_of(globals(), by=('auto', *AXES))
if not folders:  # the runs that have ended
    rows = comparison.read_runs_tsv()
    names = ['folder', 'dataset', 'tokens', 'minutes', 'val_loss', 'val_bpb', 'settings']
    lines = [names]
    for row in rows:
        bpb = '' if row['val_bpb'] is None else f'{row["val_bpb"]:.4f}'
        numbers = [f'{row["tokens"]:,}', f'{row["minutes"]:.2f}', f'{row["val_loss"]:.4f}', bpb]
        lines.append([row['folder'], row['dataset'], *numbers, row['settings']])
    print(aligned(lines))
    if json:
        print(json_.dumps(dict(runs=rows)))
    raise SystemExit


def cell(values, mark=''):
    """The mean of a group's losses and, of several, their standard deviation."""
    text = f'{mark}{statistics.fmean(values):.4f}'
    return f'{text} ± {statistics.stdev(values):.4f}' if len(values) > 1 else text


runs = comparison.find_runs(folders)
groups = comparison.group_runs(runs)
first, *others = groups
measure = comparison.measure_of(groups)
if by == 'auto':
    by = comparison.likest_axis(runs, measure)

# ---- what differs
differing = comparison.differences(groups)
names = [group.name for group in groups]
if others and differing:
    print(aligned([['', *names], *([name, *map(str, v)] for name, v in differing.items())]))
elif others:
    print('no setting differs: the code may')

# ---- the losses
places = [comparison.common_end(runs, axis, measure) for axis in AXES]
has_bpb = all(is_number(line['val_bpb']) for run in runs for line in run.evaluations)
losses = {name: {} for name in names}  # of each group by measure and axis, for --json
columns = ['seeds', *(place.in_words() for place in places), 'its end']
for shown in UNITS if has_bpb else ['val_loss']:
    lines = [[f'{shown}, {UNITS[shown]}', *columns]]
    for group in groups:
        cells, by_axis = [group.name, str(len(group.runs))], {}
        for place in places:
            by_axis[place.axis] = group.losses_at(place, shown)
            was_evaluated = group.was_evaluated_at(place, shown)
            cells.append(cell(by_axis[place.axis], '' if was_evaluated else '~'))
        at_end = [run.curve('tokens', shown)[1][-1] for run in group.runs]
        lines.append([*cells, cell(at_end)])
        losses[group.name][shown] = by_axis | dict(end=at_end)
    print(f'\n{aligned(lines)}')
print('(mean ± standard deviation of the seeds; ~ is between two evaluations)\n')
if picture:
    comparison.draw(groups, measure, picture)

# ---- the verdict
[place] = [place for place in places if place.axis == by]
notes = comparison.notes_on(groups, place, measure)
if len(others) > 1 and min(len(group.runs) for group in groups) > 1:
    notes.append(f'the {len(others)} intervals hold together in 95% of cases')
for note in notes:
    print(f'note: {note}')
why_not = comparison.why_not_comparable(groups)
verdicts = []
if not others:
    print(f'all are one group, {first.name}: there is nothing to compare it with')
elif why_not:
    print(f'no verdict: {why_not}')
else:
    for other in others:
        verdicts.append(comparison.verdict(first, other, place, measure, len(others)))
        print(verdicts[-1]['text'])
if json:
    members = {group.name: [run.folder for run in group.runs] for group in groups}
    ends = {place.axis: place.position for place in places}
    result = dict(groups=members, differences=differing, places=ends, losses=losses, by=by)
    print(json_.dumps(result | dict(notes=notes, verdicts=verdicts, no_verdict=why_not)))
