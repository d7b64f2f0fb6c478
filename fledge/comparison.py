"""Runs side by side: what differs, their losses at the same place, and whether that is chance."""

import contextlib
import csv
import glob
import json
import math
import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fledge import UserError, read_json
from fledge.log import GROUPED_OVER, RUNS_COLUMNS, read_metrics
from fledge.report import new_axes, save

DRAWN_FROM = 0.25  # of the common length: what comes before would hide how the runs end
# Along what runs are compared, each a key of an evaluation, and how a place on it is said.
AXES = {'tokens': '{:,.0f} tokens', 'step': 'step {:,.0f}', 'minutes': '{:.2f} minutes'}
UNITS = {'val_loss': 'nats a token', 'val_bpb': 'bits a byte'}


@dataclass
class Place:
    """So far along one of AXES: where losses are compared."""

    axis: str
    position: float

    def in_words(self) -> str:
        return AXES[self.axis].format(self.position)


@dataclass
class Run:
    """A run's folder, its settings, and the lines of metrics.jsonl that have an evaluation."""

    folder: str
    settings: dict
    evaluations: list
    skipped_steps: int  # whose loss or gradient was not finite
    has_ended: bool

    def curve(self, axis: str, measure: str) -> tuple[list[float], list[float]]:
        """Two lists: how far along the axis the evaluations are, and the losses there."""
        known = [line for line in self.evaluations if is_number(line[measure])]
        return [line[axis] for line in known], [line[measure] for line in known]

    def loss_at(self, place: Place, measure: str) -> float:
        """On the straight line between the evaluations before and after the place."""
        return float(np.interp(place.position, *self.curve(place.axis, measure)))


@dataclass
class Group:
    """Runs of the same settings but the seed."""

    name: str
    runs: list[Run]

    @property
    def settings(self) -> dict:
        """The first run's; the others' differ from them in GROUPED_OVER alone."""
        return self.runs[0].settings

    def losses_at(self, place: Place, measure: str) -> list[float]:
        return [run.loss_at(place, measure) for run in self.runs]

    def was_evaluated_at(self, place: Place, measure: str) -> bool:
        return all(place.position in run.curve(place.axis, measure)[0] for run in self.runs)


def is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def find_runs(folders: Iterable[str]) -> list[Run]:
    """The runs in folders, each of which is a run's own or holds some; UserError for others."""
    paths = []
    for folder in folders:
        folder = os.path.normpath(folder)
        inside = glob.glob(os.path.join(glob.escape(folder), '*', 'metrics.jsonl'))
        if not os.path.isdir(folder):
            raise UserError(f'there is no folder {folder}: name the out_dir of a run')
        if os.path.exists(os.path.join(folder, 'metrics.jsonl')):
            paths.append(folder)
        elif inside:
            paths += sorted(os.path.dirname(path) for path in inside)
        else:
            raise UserError(f'{folder} is no run, and holds none: there is no metrics.jsonl')
    return [read_run(path) for path in dict.fromkeys(paths)]


def read_run(folder: str) -> Run:
    """The Run in a folder; UserError where it has not come to an evaluation after a step."""
    path = os.path.join(folder, 'metrics.jsonl')
    settings = read_json(os.path.join(folder, 'settings.json'), 'object of settings')
    try:
        lines = read_metrics(path)
    except OSError as e:
        raise UserError(f'{path}: {e.strerror}') from None
    for line in lines:
        line['minutes'] = line['elapsed'] / 60
    evaluations = [line for line in lines if is_number(line['val_loss'])]
    if not evaluations or min(evaluations[-1][axis] for axis in AXES) <= 0:
        raise UserError(
            f'{path} has no val loss of a step after the first: leave {folder} out, or wait for '
            'its next evaluation'
        )
    skipped_steps = lines[-1].get('skipped_steps', 0)
    return Run(folder, settings, evaluations, skipped_steps, has_ended(folder))


def has_ended(folder: str) -> bool:
    """Whether a run came to its end, as the last line of its train.log says."""
    path = os.path.join(folder, 'train.log')
    if not os.path.exists(path):
        return False
    with open(path, encoding='utf-8', errors='replace') as f:
        lines = f.read().splitlines()
    return bool(lines) and lines[-1].startswith('done at step')


def group_runs(runs: list[Run]) -> list[Group]:
    """The Groups of runs: of those in the same folder, of the same settings but the seed.

    Two with the same seed differ in something else, such as the code, and are groups of their own.
    """
    alike = {}
    for run in runs:
        beside = os.path.dirname(run.folder)
        own = {name: v for name, v in run.settings.items() if name not in GROUPED_OVER}
        alike.setdefault((beside, json.dumps(own, sort_keys=True)), []).append(run)
    shared = [beside for beside, _ in alike]
    groups = []
    for (beside, _), members in alike.items():
        if len({run.settings.get('seed') for run in members}) < len(members):
            groups += [Group(run.folder, [run]) for run in members]
        elif len(members) == 1:
            groups.append(Group(members[0].folder, members))
        elif beside and shared.count(beside) == 1:
            groups.append(Group(beside, members))
        else:
            groups.append(Group(f'{members[0].folder} and {len(members) - 1} more', members))
    return groups


def differences(groups: list[Group]) -> dict[str, list]:
    """{setting: [its value in each group]} of the settings that matter and are not all alike."""
    names = dict.fromkeys(name for group in groups for name in group.settings)
    found = {}
    for name in names:
        values = [group.settings.get(name) for group in groups]
        if name not in GROUPED_OVER and any(value != values[0] for value in values):
            found[name] = values
    return found


def common_end(runs: list[Run], axis: str, measure: str) -> Place:
    """The Place on an axis to which all runs came; UserError: one begins behind another's end."""
    curves = [run.curve(axis, measure)[0] for run in runs]
    end, begin = min(curve[-1] for curve in curves), max(curve[0] for curve in curves)
    if begin > end:
        raise UserError(f'no {axis} is common to all: one begins at {begin:g}, one ends at {end:g}')
    return Place(axis, end)


def likest_axis(runs: list[Run], measure: str) -> str:
    """The axis along which the runs are most nearly of the same length; the first of equal ones."""

    def spread(axis):
        ends = [run.curve(axis, measure)[0][-1] for run in runs]
        return max(ends) / min(ends)

    return min(AXES, key=spread)


def measure_of(groups: list[Group]) -> str:
    """What the groups are compared by: val_loss, or val_bpb where their data or tokenizers differ.

    UserError where those differ and not all have bits per byte.
    """
    evaluations = [line for group in groups for run in group.runs for line in run.evaluations]
    settings = [group.settings for group in groups]
    knows_data = all(s.get('_data') for s in settings)  # an older run has the name alone
    if len({s.get('_data' if knows_data else 'dataset') for s in settings}) == 1:
        return 'val_loss'
    if not all(is_number(line['val_bpb']) for line in evaluations):
        raise UserError(
            'the runs have other data, whose nats a token do not compare, and not all have bits a '
            'byte'
        )
    return 'val_bpb'


def why_not_comparable(groups: list[Group]) -> str:
    """Why no verdict on the groups' losses can be given, '' where one can."""
    settings = [group.settings for group in groups]
    if len({s.get('objective', 'next_token') for s in settings}) > 1:
        return 'they learned by other objectives, whose losses do not compare'
    of_val = set()
    for s in settings:
        some_of_it = s.get('eval_iters', 0)  # else all of val is read, whatever the rows
        of_val.add(some_of_it and (some_of_it, s.get('batch_size'), s.get('block_size')))
    if len(of_val) > 1:
        return 'they were evaluated on other parts of val (--eval_iters=0 is all of it)'
    return ''


def t_quantile(share: float, freedom: float) -> float:
    """The value below which is a share of Student's t distribution, to three digits.

    freedom: its degrees of freedom. Of t = sqrt(freedom) tan(angle) the density of the angle is
    cos(angle)^(freedom - 1), which is summed here: no library of statistics is needed for it.
    """
    angles = np.linspace(-math.pi / 2, math.pi / 2, 100_001)
    density = np.cos(angles) ** (freedom - 1)
    below = np.cumsum(density) - density / 2
    return math.sqrt(freedom) * math.tan(np.interp(share, below / density.sum(), angles))


def difference(
    before: list[float], after: list[float], n_comparisons: int = 1
) -> tuple[float, tuple[float, float] | None]:
    """By how much the mean of `after` is above that of `before`, and its 95% interval or None.

    The interval is Welch's (Biometrika 34, 1947): it takes any two numbers of seeds and lets the
    two vary differently. Pairs of the same seed are not used. Of three of them a paired interval is
    narrower where the losses of a seed go together (correlation above 0.4). In runs of 40 steps
    they did (0.8), at the end of 600 steps they did not (-0.1); where they do, Welch's is on the
    safe side. With several comparisons all intervals hold together in 95% of cases (Bonferroni).
    None: one of the two is a single run, or no seed made any difference.
    """
    mean_difference = statistics.fmean(after) - statistics.fmean(before)
    if min(len(before), len(after)) < 2:
        return mean_difference, None
    parts = [statistics.variance(losses) / len(losses) for losses in (before, after)]
    if not sum(parts):
        return mean_difference, None
    freedom = sum(parts) ** 2 / (
        parts[0] ** 2 / (len(before) - 1) + parts[1] ** 2 / (len(after) - 1)
    )
    half = t_quantile(1 - 0.025 / n_comparisons, freedom) * math.sqrt(sum(parts))
    return mean_difference, (mean_difference - half, mean_difference + half)


def verdict(first: Group, other: Group, place: Place, measure: str, n_comparisons: int) -> dict:
    """Whether one group is better than another at a place, a dict; `text` says it in one line.

    difference is other - first, in UNITS of the measure; interval and more_than_chance are None
    where there is no telling.
    """
    before, after = (group.losses_at(place, measure) for group in (first, other))
    by, interval = difference(before, after, n_comparisons)
    text = f'{other.name} is {"better" if by < 0 else "worse"} than {first.name} by {abs(by):.4f} '
    text += f'{UNITS[measure]} at {place.in_words()}'
    seeds = f'{len(after)} and {len(before)} seeds'
    more_than_chance = None
    if interval:
        more_than_chance = not interval[0] <= 0 <= interval[1]
        low, high = interval if by >= 0 else (-interval[1], -interval[0])  # of abs(by)
        text += f' (95% interval {low:.4f} to {high:.4f}, {seeds}): '
        text += 'more than chance' if more_than_chance else 'no more than chance may do'
    elif min(len(before), len(after)) == 1:
        text += f' ({seeds}): a single run does not tell chance (--seeds=3 makes three)'
    else:
        text += f' ({seeds}): the seeds made no difference, so nothing tells chance'
    return dict(
        group=other.name,
        than=first.name,
        difference=by,
        interval=interval,
        more_than_chance=more_than_chance,
        text=text,
    )


def notes_on(groups: list[Group], place: Place, measure: str) -> list[str]:
    """What a reader of the comparison has to know besides, lines of text."""
    notes = []
    runs = [run for group in groups for run in group.runs]
    if measure == 'val_bpb':
        notes.append('the data differ: bits a byte compare only where val is the same text')
    for run in runs:
        last = run.evaluations[-1]
        if not run.has_ended:
            notes.append(
                f'{run.folder} has not ended: it was evaluated last at step {last["step"]}'
            )
        if run.skipped_steps:
            notes.append(f'{run.folder} skipped {run.skipped_steps} steps that were not finite')
        end = Place(place.axis, last[place.axis])
        if end.position > 1.02 * place.position:
            notes.append(
                f'{run.folder} goes on to {end.in_words()}: before its end a loss is above that of '
                'a run which ends there, for its learning rate is still high'
            )
    return notes


def draw(groups: list[Group], measure: str, path: str) -> None:
    """Draw the losses by tokens and by minutes, and by how much the first group's differ, as a PNG.

    Seeds are thin lines, their mean is a thick one. What lies above the losses at a quarter of the
    shortest run is cut off, so that the ends show. The bands are 95% intervals.
    """
    by_tokens, by_minutes, apart = new_axes((19, 5), ncols=3)
    every_run = [run for group in groups for run in group.runs]
    end = common_end(every_run, 'tokens', measure).position
    begin = Place('tokens', DRAWN_FROM * end)
    for number, group in enumerate(groups):
        draw_group(by_tokens, group, 'tokens', measure, f'C{number}')
        draw_group(by_minutes, group, 'minutes', measure, f'C{number}')
        if number:
            draw_difference(apart, groups[0], group, end, measure, f'C{number}', len(groups) - 1)
    lowest = min(min(run.curve('tokens', measure)[1]) for run in every_run)
    highest = max(run.loss_at(begin, measure) for run in every_run)
    margin = 0.04 * (highest - lowest)
    for axes in (by_tokens, by_minutes):
        axes.set(ylim=(lowest - margin, highest + margin), ylabel=f'val loss ({UNITS[measure]})')
    by_tokens.legend()
    apart.axhline(0, color='C0')
    apart.set(xlabel='tokens', ylabel=f'above {groups[0].name} ({UNITS[measure]})')
    for axes in (by_tokens, by_minutes, apart):
        axes.grid(alpha=0.3)
    save(by_tokens.figure, path)


def draw_group(axes: object, group: Group, axis: str, measure: str, color: str) -> None:
    curves = [run.curve(axis, measure) for run in group.runs]
    end = min(positions[-1] for positions, _ in curves)
    shown = sorted({p for positions, _ in curves for p in positions if p <= end})
    means = [statistics.fmean(group.losses_at(Place(axis, p), measure)) for p in shown]
    for curve in curves:
        axes.plot(*curve, marker='.', linewidth=0.6, color=color)
    axes.plot(shown, means, linewidth=1.8, color=color, label=group.name)
    axes.set(xlabel=axis)


def draw_difference(
    axes: object,
    first: Group,
    other: Group,
    end: float,
    measure: str,
    color: str,
    n_comparisons: int,
) -> None:
    """From a quarter of the common length on, at the evaluations of a run of the other group."""
    positions, _ = other.runs[0].curve('tokens', measure)
    shown = [p for p in positions if DRAWN_FROM * end <= p <= end]
    found = []
    for position in shown:
        both = (group.losses_at(Place('tokens', position), measure) for group in (first, other))
        found.append(difference(*both, n_comparisons))
    axes.plot(shown, [by for by, _ in found], marker='.', color=color)
    if found and all(interval for _, interval in found):
        lows, highs = zip(*(interval for _, interval in found), strict=True)
        axes.fill_between(shown, lows, highs, color=color, alpha=0.12)


def read_runs_tsv() -> list[dict]:
    """The lines of the runs.tsv here and in the folders here, dicts, the best of each data first.

    UserError where there is none.
    """
    rows = []
    for path in ['runs.tsv', *sorted(glob.glob(os.path.join('*', 'runs.tsv')))]:
        if not os.path.exists(path):
            continue
        with open(path, encoding='utf-8', newline='') as f:
            for row in csv.DictReader(f, delimiter='\t', quoting=csv.QUOTE_NONE):
                with contextlib.suppress(KeyError, TypeError, ValueError):  # a line that is cut
                    row['folder'] = os.path.join(os.path.dirname(path), row['folder'])
                    row['tokens'] = int(row['tokens'])
                    row['minutes'] = float(row['minutes'])
                    row['val_loss'] = float(row['val_loss'])
                    row['val_bpb'] = float(row['val_bpb']) if row['val_bpb'] else None
                    rows.append({name: row[name] for name in RUNS_COLUMNS})
    if not rows:
        raise UserError(
            'name the folders of runs, or folders that hold runs (there is no runs.tsv here)'
        )
    return sorted(rows, key=lambda row: (row['dataset'], row['data'], row['val_loss']))
