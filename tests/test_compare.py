"""Runs side by side: groups, losses at the same place, the verdict; --seeds; runs.tsv."""

import csv
import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY, fails, metrics, run, start
from test_attention import size_of_png
from test_train import slow, wait_for

from fledge import comparison
from fledge.configurator import read_settings
from fledge.log import RunLog, read_metrics
from fledge.state import RunState

SETTINGS = dict(dataset='tiny', _data='d1', learning_rate=0.01, eval_iters=0, batch_size=4)
SETTINGS |= dict(block_size=16, objective='next_token', seed=1337)
SHORT = [*TINY, '--max_iters=4', '--sample_interval=0', '--eval_interval=2']
# the Welch interval of R's t.test for its data set `sleep` is -3.3654832 to 0.2054832
SLEEP = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
LONGER_SLEEP = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def write_run(folder, losses, tokens=64, seconds=6.0, bpb=None, end='done at step', **settings):
    """A run that was evaluated every ten steps; tokens: of a step; seconds: of ten steps."""
    folder.mkdir(parents=True)
    (folder / 'settings.json').write_text(json.dumps(SETTINGS | settings))
    (folder / 'train.log').write_text(f'settings: ...\n{end} 10 after 0.1 minutes\n')
    with open(folder / 'metrics.jsonl', 'w') as f:
        for i, loss in enumerate(losses):
            line = dict(step=10 * i, tokens=10 * i * tokens, elapsed=i * seconds, val_loss=loss)
            line['val_bpb'] = bpb and loss * bpb
            f.write(json.dumps(line) + '\n')


def write_seeds(folder, ends, **settings):
    for seed, end in enumerate(ends):
        write_run(folder / f'seed_{seed}', [4.0, 3.0, end], seed=seed, **settings)


def compare(folder, *args):
    """What compare.py says, and the object of --json."""
    out = run(folder, 'compare.py', *args, '--json')
    *text, last = out.splitlines()
    return '\n'.join(text), json.loads(last)


def runs_tsv(folder):
    with open(folder / 'runs.tsv', newline='') as f:
        return list(csv.DictReader(f, delimiter='\t', quoting=csv.QUOTE_NONE))


# ---- the statistic


@pytest.mark.parametrize('freedom, quantile', [(1, 12.706), (2, 4.303), (4, 2.776), (120, 1.980)])
def test_quantiles_are_those_of_the_tables(freedom, quantile):
    assert comparison.t_quantile(0.975, freedom) == pytest.approx(quantile, rel=1e-3)


def test_the_interval_is_welchs():
    by, interval = comparison.difference(LONGER_SLEEP, SLEEP)
    assert by == pytest.approx(-1.58)
    assert interval == pytest.approx((-3.3654832, 0.2054832), abs=1e-3)
    wider = comparison.difference(LONGER_SLEEP, SLEEP, n_comparisons=3)[1]
    assert wider[0] < interval[0] and wider[1] > interval[1]


@pytest.mark.slow
def test_two_groups_of_the_same_kind_rarely_differ_by_more_than_chance():
    rng, claims = np.random.default_rng(0), 0
    for _ in range(300):
        before, after = rng.normal(2.0, 0.005, (2, 3)).tolist()
        low, high = comparison.difference(before, after)[1]
        claims += not low <= 0 <= high
    assert 1 <= claims <= 25  # of 5% at most


def test_one_run_or_runs_all_alike_give_no_interval():
    assert comparison.difference([2.0], [1.9, 1.8])[1] is None
    assert comparison.difference([2.0, 2.0], [1.9, 1.9])[1] is None


# ---- the verdict


@pytest.mark.slow
def test_a_difference_is_told_from_chance_by_the_spread_of_the_seeds(tmp_path):
    write_seeds(tmp_path / 'out-a', [2.000, 2.004, 2.002])
    write_seeds(tmp_path / 'out-b', [1.990, 1.986, 1.988], learning_rate=0.02)
    write_seeds(tmp_path / 'out-c', [2.001, 2.007, 1.999])
    text, result = compare(tmp_path, 'out-a', 'out-b')
    (verdict,) = result['verdicts']
    assert verdict['more_than_chance'] and verdict['difference'] == pytest.approx(-0.014)
    low, high = verdict['interval']
    assert low == pytest.approx(-0.014 - 2.7764 * math.sqrt(2 * 0.002**2 / 3), abs=1e-5)
    assert text.splitlines()[-1] == verdict['text']
    assert verdict['text'] == (
        'out-b is better than out-a by 0.0140 nats a token at 1,280 tokens (95% interval '
        f'{-high:.4f} to {-low:.4f}, 3 and 3 seeds): more than chance'
    )
    assert result['differences'] == {'learning_rate': [0.01, 0.02]}
    text, result = compare(tmp_path, 'out-a', 'out-c')
    assert result['verdicts'][0]['more_than_chance'] is False and not result['differences']
    assert 'no setting differs' in text and 'interval -0.0' in text
    assert text.endswith('3 and 3 seeds): no more than chance may do')
    assert size_of_png(tmp_path / 'comparison.png')[0] > 1000


def test_single_runs_do_not_tell_chance(tmp_path):
    write_run(tmp_path / 'a', [4.0, 3.0])
    write_run(tmp_path / 'b', [4.0, 2.9])  # the same settings and seed: the code may be another
    text, result = compare(tmp_path, 'a', 'b', '--picture=')
    assert result['verdicts'][0]['more_than_chance'] is None
    assert 'b is better than a by 0.1000' in text and 'a single run does not tell chance' in text
    assert not (tmp_path / 'comparison.png').exists()


@pytest.mark.slow
def test_losses_are_compared_at_equal_tokens_steps_and_minutes(tmp_path):
    write_run(tmp_path / 'a', [4.0, 3.0, 2.0])  # to step 20, 1,280 tokens, 0.2 minutes
    write_run(tmp_path / 'b', [5.0, 3.5, 2.5, 2.3], tokens=32, seconds=5.0, batch_size=2)
    text, result = compare(tmp_path, 'a', 'b')
    assert result['places'] == {'tokens': 960, 'step': 20, 'minutes': pytest.approx(0.2)}
    of_a, of_b = (result['losses'][name]['val_loss'] for name in 'ab')
    assert of_a == {'tokens': [2.5], 'step': [2.0], 'minutes': [2.0], 'end': [2.0]}
    assert of_b['tokens'] == [2.3] and of_b['step'] == [2.5] and of_b['end'] == [2.3]
    assert of_b['minutes'] == [pytest.approx(2.5 - 0.2 * 2 / 5)]
    assert '~2.5000' in text and '~2.4200' in text and text.count('~') == 3
    assert result['by'] == 'minutes'  # 12 and 15 seconds, 1,280 and 960 tokens
    assert 'b goes on to 0.25 minutes' in text
    assert compare(tmp_path, 'a', 'b', '--by=step')[1]['verdicts'][0]['difference'] == 0.5


@pytest.mark.slow
def test_a_group_has_one_folder_and_one_value_of_each_setting_but_the_seed(tmp_path):
    write_seeds(tmp_path / 'all', [2.0, 2.1], wandb_run_name='one')
    for seed in (2, 3):
        flags = dict(seed=seed, learning_rate=0.02)
        write_run(tmp_path / f'all/seed_{seed}', [4.0, 3.0, 2.2], **flags)
    write_seeds(tmp_path / 'again', [2.0, 2.1])
    groups = compare(tmp_path, 'all', 'again')[1]['groups']
    assert groups == {
        'all/seed_0 and 1 more': ['all/seed_0', 'all/seed_1'],
        'all/seed_2 and 1 more': ['all/seed_2', 'all/seed_3'],
        'again': ['again/seed_0', 'again/seed_1'],
    }
    text, result = compare(tmp_path, 'again')
    assert result['verdicts'] == [] and 'there is nothing to compare it with' in text


@pytest.mark.slow
def test_other_data_is_compared_by_bits_a_byte_or_not_at_all(tmp_path):
    write_run(tmp_path / 'a', [4.0, 3.0], bpb=1.0)
    write_run(tmp_path / 'b', [8.0, 6.0], bpb=0.4, _data='d2')
    write_run(tmp_path / 'c', [4.0, 2.0], _data='d3')
    text, result = compare(tmp_path, 'a', 'b')
    assert result['verdicts'][0]['difference'] == pytest.approx(-0.6)
    assert 'bits a byte at' in text and 'only where val is the same text' in text
    assert 'have other data' in fails(tmp_path, 'compare.py', 'a', 'c')


@pytest.mark.slow
def test_losses_that_do_not_compare_get_no_verdict(tmp_path):
    write_run(tmp_path / 'a', [4.0, 3.0])
    write_run(tmp_path / 'b', [4.0, 3.0], objective='dpo')
    write_run(tmp_path / 'c', [4.0, 3.0], eval_iters=5)
    for other, why in (('b', 'other objectives'), ('c', 'other parts of val')):
        text, result = compare(tmp_path, 'a', other)
        assert text.splitlines()[-1].startswith('no verdict: ') and why in result['no_verdict']
        assert not result['verdicts']


@pytest.mark.slow
def test_what_is_not_whole_is_said(tmp_path):
    write_run(tmp_path / 'a', [4.0, 3.0, 2.0])
    write_run(tmp_path / 'b', [4.0, None, 2.5, float('nan')], end='stopped at step', seed=7)
    with open(tmp_path / 'b/metrics.jsonl', 'a') as f:
        f.write('{"step": 40, "tokens": 2560, "elapsed": 24.0, "skipped_steps": 3}\n{"step": 4')
    text, result = compare(tmp_path, 'a', 'b')
    assert 'b has not ended: it was evaluated last at step 20' in text
    assert 'b skipped 3 steps' in text and result['places']['step'] == 20
    (tmp_path / 'empty').mkdir()
    assert 'empty is no run, and holds none' in fails(tmp_path, 'compare.py', 'a', 'empty')
    assert 'there is no folder none' in fails(tmp_path, 'compare.py', 'a', 'none')
    write_run(tmp_path / 'early', [4.0])
    for folder in ('early', 'none'):
        write_run(tmp_path / 'none', []) if folder == 'none' else None
        assert 'no val loss of a step after the first' in fails(tmp_path, 'compare.py', folder)
    os.remove(tmp_path / 'a/settings.json')
    assert 'a/settings.json: No such file' in fails(tmp_path, 'compare.py', 'a')


@pytest.mark.slow
def test_eight_groups_are_drawn(tmp_path):
    for number in range(8):
        ends = [2 + 0.01 * number, 2.02 + 0.01 * number]
        write_seeds(tmp_path / f'out-{number}', ends, learning_rate=0.01 * (number + 1))
    _, result = compare(tmp_path, *(f'out-{number}' for number in range(8)))
    assert len(result['verdicts']) == 7 and size_of_png(tmp_path / 'comparison.png')[1] > 400


# ---- several seeds


@pytest.mark.slow
def test_seeds_are_trained_one_after_another_and_once(workdir):
    same = [*SHORT, '--seed=7', '--dtype=float32']
    flags = [*same, '--min_lr=1e-4']
    out = run(workdir, 'train.py', *flags, '--seeds=2')
    assert out.endswith('all runs are done: python compare.py out\n') and 'done at step 4' in out
    rows = runs_tsv(workdir / 'out')
    assert [row['folder'] for row in rows] == ['seed_7', 'seed_8']
    first, second = (metrics(workdir / 'out' / row['folder']) for row in rows)
    assert first[0]['val_loss'] != second[0]['val_loss']  # other weights
    run(workdir, 'train.py', *flags, '--seed=8', '--out_dir=alone')
    alone = metrics(workdir / 'alone')
    assert [m['train_loss'] for m in alone] == [m['train_loss'] for m in second]
    before = [os.stat(workdir / f'out/seed_{seed}/ckpt.pt').st_mtime_ns for seed in (7, 8)]
    run(workdir, 'train.py', *flags, '--seeds=3')
    after = [os.stat(workdir / f'out/seed_{seed}/ckpt.pt').st_mtime_ns for seed in (7, 8)]
    assert before == after and len(runs_tsv(workdir / 'out')) == 3
    _, result = compare(workdir, 'out', 'alone')
    assert result['groups'] == {'out': [f'out/seed_{n}' for n in (7, 8, 9)], 'alone': ['alone']}
    words = fails(workdir, 'train.py', *flags, '--seeds=3', '--learning_rate=0.5')
    assert 'out/seed_7 has a run with learning_rate=0.006' in words
    words = fails(workdir, 'train.py', *same, '--seeds=3')  # what was left out counts as well
    assert 'out/seed_7 has a run with min_lr=0.0001' in words


@pytest.mark.slow
def test_a_run_with_no_evaluation_in_the_others_length_is_compared(workdir):
    for n in (4, 12):
        run(
            workdir, 'train.py', *SHORT, f'--max_iters={n}', '--eval_interval=100', f'--out_dir={n}'
        )
    _, result = compare(workdir, '4', '12')
    assert len(result['verdicts']) == 1


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_run_that_goes_and_the_rest_is_not_begun(workdir, number):
    flags = [*SHORT, slow(workdir, 0.3), '--seeds=2', '--max_iters=8']
    process = start(workdir, 'train.py', *flags)
    wait_for(workdir / 'out/seed_1337/metrics.jsonl', '"step": 2,', process)
    process.send_signal(number)  # to the first process alone
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and 'stopped at step' in out and 'all runs' not in out
    assert 'not done with out/seed_1337; the same command goes on there' in err
    assert not (workdir / 'out/seed_1338').exists() and not (workdir / 'out/runs.tsv').exists()
    out = run(workdir, 'train.py', *flags)
    assert 'resuming at step' in out and out.count('done at step 8') == 2


@pytest.mark.slow
def test_a_seed_that_fails_ends_the_rest(workdir):
    flags = [*SHORT, '--seeds=2', '--dataset=none']
    assert 'data/none' in run(workdir, 'train.py', *flags, code=2)
    assert not (workdir / 'out/seed_1338').exists()


@pytest.mark.slow
def test_seeds_are_for_whole_runs_in_one_process(workdir):
    for flag in ('--dry_run', '--eval_only', '--init_from=resume'):
        assert f'not with {flag}' in fails(workdir, 'train.py', *SHORT, '--seeds=2', flag)
    # which any launcher sets
    words = run(workdir, 'train.py', *SHORT, '--seeds=2', code=2, env=dict(RANK='0'))
    assert 'not with torchrun' in words and not (workdir / 'out').exists()


# ---- runs.tsv


@pytest.mark.slow
def test_each_run_that_ends_has_a_line_that_a_spreadsheet_can_read(workdir):
    odd = '--wandb_project=x', '--sample_start=a\tb', '--min_lr=1e-4', '--out_dir=my\trun\n1'
    run(workdir, 'train.py', *SHORT, *odd)
    run(workdir, 'train.py', *SHORT, '--out_dir=other', '--lora_targets=\t"\n')
    rows = runs_tsv(workdir)
    assert [row['folder'] for row in rows] == ["$'my\\trun\\n1'", 'other']
    end = read_metrics(workdir / 'my\trun\n1' / 'metrics.jsonl')[-1]
    assert rows[0]['dataset'] == 'tiny' and rows[0]['tokens'] == '256'
    assert float(rows[0]['val_loss']) == pytest.approx(end['val_loss'], abs=1e-5)
    assert float(rows[0]['val_bpb']) == pytest.approx(end['val_bpb'], abs=1e-5)
    words = rows[0]['settings'].split(' ')
    assert {'min_lr=0.0001', 'n_embd=16', 'max_iters=4'} <= set(words)
    assert not {'out_dir', 'wandb_project', 'dataset', 'bias'} & {w.split('=')[0] for w in words}
    assert not [name for name in os.listdir(workdir) if name.endswith('.lock')]
    # stopped runs and runs that had ended before have none
    run(workdir, 'train.py', '--init_from=resume', '--out_dir=other')
    assert len(runs_tsv(workdir)) == 2


@pytest.mark.slow
def test_without_folders_the_runs_are_listed_best_first(tmp_path):
    assert 'there is no runs.tsv here' in fails(tmp_path, 'compare.py')
    head = 'folder\tdataset\tdata\tsettings\ttokens\tminutes\tval_loss\tval_bpb\n'
    lines = 'a\tx\td1\tseed=1\t64\t0.10\t3.0\t1.5\nb\tx\td1\t\t64\t0.10\t2.0\t\nc\tw\td2\tn_la'
    (tmp_path / 'runs.tsv').write_text(head + lines)
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/runs.tsv').write_text(head + 'seed_1\tx\td1\t\t64\t0.10\t2.5\t1.0\n')
    text, result = compare(tmp_path)
    assert [row['folder'] for row in result['runs']] == ['b', 'out/seed_1', 'a']
    assert result['runs'][0]['val_bpb'] is None and text.splitlines()[1].startswith('b ')


MANY = """
import os, sys
from fledge.configurator import read_settings
from fledge.log import RunLog
from fledge.state import RunState
folder, name, other = sys.argv[1:]
defaults = read_settings('train.py')
state = RunState(step=1, tokens=9, evaluated_step=1, evaluation=dict(loss=1.0))
open(f'{folder}/{name}', 'w').close()
while not os.path.exists(f'{folder}/{other}'):
    pass
for i in range(300):
    os.makedirs(f'{folder}/of-{i}', exist_ok=True)
    log = RunLog(True, f'{folder}/of-{i}/{name}')
    log.data_digest = 'd'
    log.list_run(defaults | dict(seed=1), defaults, state)
"""


@pytest.mark.slow
def test_runs_that_end_at_once_each_have_a_whole_line(tmp_path):
    command = [sys.executable, '-c', MANY, str(tmp_path)]
    both = [subprocess.Popen([*command, *names], cwd=ROOT) for names in ('ab', 'ba')]
    assert [process.wait(120) for process in both] == [0, 0]
    for i in range(300):
        rows = runs_tsv(tmp_path / f'of-{i}')
        assert sorted((row['folder'], row['settings']) for row in rows) == [
            ('a', 'seed=1'),
            ('b', 'seed=1'),
        ]


def test_a_full_disk_under_runs_tsv_is_a_warning(tmp_path, capsys):
    (tmp_path / 'runs.tsv').symlink_to('/dev/full')
    log, defaults = RunLog(True, str(tmp_path / 'a')), read_settings(f'{ROOT}/train.py')
    log.data_digest = 'd'
    state = RunState(step=1, tokens=9, evaluated_step=1, evaluation=dict(loss=1.0))
    log.list_run(defaults, defaults, state)
    err = capsys.readouterr().err
    assert err.startswith('WARNING: cannot write') and 'No space left' in err
    assert os.listdir(tmp_path) == ['runs.tsv']


@pytest.mark.slow
def test_a_folder_that_takes_no_runs_tsv_is_a_warning(workdir):
    (workdir / 'runs.tsv').mkdir()  # as root, who tests, may write anywhere else
    process = start(workdir, 'train.py', *SHORT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and 'done at step 4' in out
    assert 'WARNING: cannot write' in err and err.count('\n') == 1
