"""One dial: what follows from a depth or a time, what holds, and what is said of it."""

import json
import math
import os
import re

import pytest
from conftest import ROOT, fails, metrics, run
from test_plan import settings_of
from test_processes import torchrun

from fledge import depth, plan
from fledge.device import Machine, flops_per_token

CONFIG = os.path.join(ROOT, 'config', 'depth.py')
# small enough to take steps of in no time
SMALL = ['--dataset=tiny', '--block_size=32', '--n_embd=16', '--head_dim=8', '--device=cpu']
SMALL += ['--eval_iters=2', '--sample_interval=0', '--dtype=float32']


def follow(n_layer, **given):
    """The settings of a depth, with those that are given, where memory and data have no end."""
    settings = settings_of(vocab_size=4096, **given, n_layer=n_layer)
    names = {'n_layer', *given}
    shape = depth.shape_of(settings, names, n_layer)
    run = depth.run_of(shape, names, 10**5, (0.01, 0.01), math.inf, (10**12, 10**6), 1)
    assert all(run.settings[name] == value for name, value in given.items())
    return run.settings


def tokens_per_step(s):
    return s['batch_size'] * s['gradient_accumulation_steps'] * s['block_size']


def shown(out, pattern):
    """The numbers of the one place in an output that matches."""
    (numbers,) = re.findall(pattern, out)
    numbers = [numbers] if isinstance(numbers, str) else numbers
    return [float(number.replace(',', '')) for number in numbers]


def test_four_layers_have_the_default_runs_shape():
    settings, four = settings_of(), follow(4)
    for name in ('n_layer', 'n_embd', 'head_dim', 'n_head', 'n_kv_head'):
        assert four[name] == settings[name], name


def test_a_run_of_the_tuned_tokens_is_the_tuned_run():
    s = follow(4, target_tokens=int(depth.TUNED_TOKENS))
    assert tokens_per_step(s) == 2048
    assert s['learning_rate'] == 1.5e-2 and s['weight_decay'] == pytest.approx(0.1, rel=0.01)
    assert s['warmup_iters'] == 22


@pytest.mark.slow
def test_width_tokens_and_batch_grow_with_depth():
    runs = [follow(n) for n in depth.DEPTHS]
    for smaller, larger in zip(runs, runs[1:], strict=False):
        assert smaller['n_embd'] <= larger['n_embd']
        assert tokens_per_step(smaller) <= tokens_per_step(larger)
        assert smaller['max_iters'] < larger['max_iters']
        assert smaller['weight_decay'] > larger['weight_decay']
    assert runs[-1]['n_embd'] > 5 * runs[0]['n_embd']
    for s in runs:
        assert s['n_embd'] == 64 * s['n_head'] and s['n_head'] % s['n_kv_head'] == 0
        assert s['n_head'] >= 3 * s['n_kv_head'] or s['n_kv_head'] == 1
        assert s['learning_rate'] <= 3e-2 and s['max_minutes'] == 0


def test_the_batch_grows_with_the_tokens_to_the_0_383():
    few, many = (follow(8, target_tokens=n, block_size=8) for n in (10**7, 10**9))
    ratio = tokens_per_step(many) / tokens_per_step(few)
    assert math.log(ratio, 100) == pytest.approx(0.383, abs=0.002)


@pytest.mark.slow
def test_what_is_given_holds_and_the_rest_follows():
    assert follow(8, n_embd=512)['n_head'] == 8 and follow(8, n_embd=512)['n_kv_head'] == 2
    assert follow(8, n_head=12)['n_embd'] == 768 and follow(8, n_embd=200)['n_head'] == 2
    assert follow(8, n_embd=200, head_dim=0)['n_head'] == 2  # which 200 is divisible by
    assert follow(8, head_dim=32)['n_head'] == 8 and follow(8, n_head=4)['n_kv_head'] == 1
    whole = tokens_per_step(follow(8))
    for given in (dict(batch_size=3), dict(gradient_accumulation_steps=4), dict(block_size=1024)):
        assert tokens_per_step(follow(8, **given)) == pytest.approx(whole, rel=0.15)
    assert follow(8, batch_size=3)['gradient_accumulation_steps'] > 1
    s = follow(8, max_iters=100)
    assert tokens_per_step(s) == pytest.approx(
        2048 * (100 * tokens_per_step(s) / depth.TUNED_TOKENS) ** 0.383, abs=256
    )
    assert follow(8, learning_rate=1e-3)['weight_decay'] > follow(8)['weight_decay']
    assert follow(1, max_iters=10**6)['learning_rate'] == 3e-2
    assert follow(8, optimizer='adamw')['learning_rate'] <= 2e-3


def test_a_loss_falls_with_size_and_tokens_and_less_with_repeats():
    assert depth.predicted_loss(2e6, 1e7, 10**12) < depth.predicted_loss(1e6, 1e7, 10**12)
    fresh = [depth.predicted_loss(1e6, n, 10**12) for n in (1e7, 2e7, 1e9)]
    again = [depth.predicted_loss(1e6, n, 10**7) for n in (1e7, 2e7, 1e9)]
    assert fresh[0] == again[0] and fresh[0] > again[1] > fresh[1]
    assert again[1] > again[2] > fresh[2]


@pytest.mark.slow
def test_a_depth_is_a_run_that_its_settings_make_again(workdir):
    out = run(workdir, 'train.py', CONFIG, *SMALL, '--n_layer=2', '--max_iters=60')
    settings = json.loads((workdir / 'out' / 'settings.json').read_text())
    assert settings['one_dial'] is False and set(depth.CHOSEN) < settings.keys()
    assert settings['n_layer'] == 2 and settings['n_embd'] == 16 and settings['max_minutes'] == 0
    first, second, third, why = out.splitlines()[:4]
    assert first.startswith('depth 2, width 16, query heads 2, key and value heads 1: ')
    n_tokens = 60 * tokens_per_step(settings)
    assert f'in 60 steps of {tokens_per_step(settings)} ' in second
    assert second.startswith(f'{n_tokens:,} tokens')
    assert second.endswith(f'data/tiny has 4,000, and each is seen {n_tokens / 4000:.1f} times')
    assert f'learning rate {settings["learning_rate"]:g}, weight decay' in third
    assert why.startswith('predicted loss: depth 2 ') and 'tokens/s' in why
    assert (workdir / 'out' / 'train.log').read_text().startswith(first)
    run(workdir, 'train.py', 'out/settings.json', '--out_dir=again')
    end, again = metrics(workdir / 'out')[-1], metrics(workdir / 'again')[-1]
    assert end['step'] == 60 and end['val_loss'] == again['val_loss']
    (line,) = (workdir / 'runs.tsv').read_text().splitlines()[1:2]
    assert 'one_dial' not in line and 'n_layer=2' in line
    # flags before the file count as well, and a resumed run keeps what it has
    more = ['--n_layer=2', *SMALL, CONFIG, '--auto_resume', '--max_iters=70']
    out = run(workdir, 'train.py', *more)
    assert 'a law' not in out and 'resuming at step 60; max_iters was 60, now 70' in out


@pytest.mark.slow
def test_a_time_chooses_a_depth_and_ends_the_run(workdir):
    out = run(workdir, 'train.py', CONFIG, *SMALL, '--max_minutes=0.15', '--batch_size=1')
    settings = json.loads((workdir / 'out' / 'settings.json').read_text())
    assert settings['n_layer'] in depth.DEPTHS and settings['max_minutes'] == 0.15
    assert out.startswith(f'depth {settings["n_layer"]}, width 16')
    assert f' depth {settings["n_layer"]} ' in out.splitlines()[3]
    lines = metrics(workdir / 'out')
    assert lines[-1]['val_loss'] < lines[0]['val_loss']
    assert 'all of max_minutes' in out or lines[-1]['step'] == settings['max_iters']


@pytest.mark.slow
def test_a_dry_run_says_four_lines_and_writes_nothing(workdir):
    out = run(workdir, 'train.py', CONFIG, *SMALL, '--max_minutes=60', '--n_layer=1', '--dry_run')
    assert len(out.splitlines()) == 4 and not (workdir / 'out').exists()
    (minutes,) = shown(out, r'steps take ([\d.,]+) minutes')
    assert 50 < minutes < 60
    (tokens,) = shown(out, r'\n([\d.,]+) tokens in')
    out = run(workdir, 'train.py', CONFIG, *SMALL, '--max_minutes=6000', '--n_layer=1', '--dry_run')
    assert shown(out, r'\n([\d.,]+) tokens in')[0] > 2 * tokens


def speed(shape):
    """What depth.measure would find on a machine of 1e9 FLOP/s, whatever the depth."""
    n_tokens = shape['block_size']
    return 0.01, flops_per_token(plan.shape_of_model(shape), n_tokens) * n_tokens / 1e9


@pytest.mark.slow
def test_more_time_makes_a_deeper_model():
    def best_in(seconds, n_train):
        runs = []
        for n_layer in depth.DEPTHS:
            shape = depth.shape_of(settings_of(vocab_size=4096), {'max_minutes'}, n_layer)
            arguments = 100, speed(shape), seconds, (n_train, shape['block_size']), 1
            runs.append(depth.run_of(shape, {'max_minutes'}, *arguments))
        return runs, min(runs, key=lambda run: run.loss)

    runs, short = best_in(600, 10**12)
    assert runs[-1].loss == math.inf  # 32 layers do not take 50 steps in ten minutes
    _, long = best_in(6_000_000, 10**12)
    assert short.settings['n_layer'] < long.settings['n_layer'] < 32 and short.loss > long.loss
    assert long.steps * long.step_seconds == pytest.approx(depth.TRAINING * 6_000_000, rel=0.01)
    _, repeating = best_in(6_000_000, 10**7)  # data seen often teaches less: a smaller model
    assert repeating.loss > long.loss


@pytest.mark.slow
def test_no_deeper_model_is_measured_than_need_be(monkeypatch):
    measured = []

    def measure(shape, *_):
        measured.append(shape['n_layer'])
        return speed(shape)

    monkeypatch.setattr(depth, 'measure', measure)
    monkeypatch.setattr(depth, 'with_data', lambda settings, _: (settings, 10**12, 256))
    monkeypatch.setattr(depth, 'rows_that_fit', lambda *_: 100)
    arguments = settings_of(vocab_size=4096, max_minutes=100.0), {'max_minutes'}
    machine = Machine('cpu', 'float32')
    chosen, reasons = depth.settle(*arguments, machine)
    place = depth.DEPTHS.index(chosen['n_layer'])
    assert measured == depth.DEPTHS[: place + 3]  # the two behind the best were worse
    assert 'deeper' not in reasons[-1]
    measured.clear()
    monkeypatch.setattr(depth, 'MEASURING', 0)  # of the time
    chosen, reasons = depth.settle(*arguments, machine)
    assert measured == [1] and chosen['n_layer'] == 1
    assert reasons[-1].endswith('deeper ones would take more than 0% of the time to measure')
    _, reasons = depth.settle(arguments[0], {'max_minutes', 'n_layer'}, machine)
    assert 'deeper' not in reasons[-1]  # which nobody asked for


def test_rows_fill_half_of_the_memory(monkeypatch):
    settings = settings_of(vocab_size=500)
    parts = plan.memory(plan.shape_of_model(settings), settings | dict(batch_size=1))
    of_row = 2 * parts.pop('activations')  # in float32 they have twice the bytes
    for n in (0, 7):
        bytes_there = 2 * (sum(parts.values()) + (n + 0.5) * of_row)
        monkeypatch.setattr(plan, 'memory_of', lambda machine, n=bytes_there: n)
        assert depth.rows_that_fit(settings, Machine('cpu', 'float32')) == n


@pytest.mark.slow
def test_all_seeds_have_what_the_first_one_chose(workdir):
    command = [CONFIG, *SMALL, '--n_layer=1', '--max_iters=20', '--seeds=2']
    out = run(workdir, 'train.py', *command)
    assert out.count('predicted loss') == 1 and 'without effect' not in out
    first, second = (
        json.loads((workdir / 'out' / f'seed_{n}' / 'settings.json').read_text())
        for n in (1337, 1338)
    )
    assert {n for n in first if first[n] != second[n]} == {'out_dir', 'seed'}
    assert 'a law' not in run(workdir, 'train.py', *command)  # all is done


@pytest.mark.slow
def test_processes_choose_the_same(workdir):
    out = torchrun(workdir, 2, CONFIG, *SMALL, '--n_layer=2', '--max_iters=10')
    assert out.count('predicted loss') == 1 and 'done at step 10' in out
    settings = json.loads((workdir / 'out' / 'settings.json').read_text())
    assert settings['gradient_accumulation_steps'] == 2


@pytest.mark.parametrize('n_batches, n_processes', [(1, 2), (3, 2), (2, 4), (6, 4)])
def test_processes_have_rows_alike(n_batches, n_processes):
    s = settings_of(gradient_accumulation_steps=n_batches)
    for tokens in (10**5, 10**6, 10**7):
        given = {'gradient_accumulation_steps'}
        s = depth.with_batch(s, given, tokens, 100, n_processes)
        assert plan.rows_per_step(s) % n_processes == 0


def test_a_step_costs_something_beside_its_rows_on_a_slow_machine_too(monkeypatch):
    monkeypatch.setattr(depth, 'MEASURED_SECONDS', 1e-9)
    machine = Machine('cpu', 'float32')
    settings = settings_of(vocab_size=32, n_embd=16, n_head=2, head_dim=8, optimizer='muon')
    assert any(depth.measure(settings, 8, 1e-12, machine)[0] > 0 for _ in range(5))


def test_evaluations_are_in_the_time():
    settings = settings_of(vocab_size=32, n_embd=16, n_head=2, head_dim=8, optimizer='muon')

    def steps(eval_interval):
        own = settings | dict(eval_interval=eval_interval)
        return depth.run_of(own, set(), 8, (0.001, 0.001), 60, (10**6, 10**6), 1).steps

    assert steps(1) < 0.2 * steps(10**6)


@pytest.mark.slow
def test_bench_takes_the_shape_and_measures_that_alone(workdir):
    flags = ['--only=train', '--rounds=1', '--seconds=0.05', '--json']
    out = run(workdir, 'bench.py', CONFIG, *SMALL, '--n_layer=3', *flags)
    assert json.loads(out.splitlines()[-1])['train_tokens_per_second'] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    'flags, words',
    [
        ([], 'takes a depth (--n_layer=8) or a time'),
        (['--max_minutes=0'], 'takes a depth (--n_layer=8) or a time'),
        (['--max_minutes=0.001'], 'max_minutes=0.001 is too short for depth 1:'),
        (['--max_minutes=0.001', '--n_layer=8'], 'too short for depth 8:'),
        (['--n_layer=2', '--init_from=out/ckpt.pt'], 'makes a new GPT here: leave out init_from='),
        (
            ['--n_layer=2', '--n_encoder_layer=1'],
            'makes a new GPT here: leave out n_encoder_layer=1',
        ),
        (['--n_layer=2', '--n_embd=20', '--head_dim=0', '--n_head=3'], 'n_head'),
        (
            ['--n_layer=2', '--lora_rank=2', '--dry_run'],
            'makes a new GPT here: leave out lora_rank=2',
        ),
        (['--n_layer=2', '--world_size=8', '--dry_run'], 'leave out world_size=8'),
        (['--n_layer=64', '--n_embd=65536', '--dry_run'], 'depth 64 does not fit'),
        (['--n_layer=2', '--dataset=nothing'], 'data/nothing has no train.bin'),
    ],
)
def test_what_has_no_depth_is_one_line(workdir, flags, words):
    if '--init_from=out/ckpt.pt' in flags:
        run(workdir, 'train.py', CONFIG, *SMALL, '--n_layer=1', '--max_iters=2')
        flags = [*flags, '--out_dir=other']
    assert words in fails(workdir, 'train.py', CONFIG, *SMALL, *flags)
