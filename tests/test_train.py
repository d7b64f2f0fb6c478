"""The trainer: what it writes, how it goes on, how it stops, what it refuses."""

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, TINY, fails, metrics, python, run, start, write_tiny
from tqdm import tqdm

from fledge import checkpoint, cpu
from fledge.log import RunLog, curves_of
from fledge.state import RunState
from fledge.tokens import write_bin

LOSSY = [*TINY, '--dropout=0.2', '--lr_decay_iters=60']  # dropout and sampling on
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']


def losses(folder):
    return [
        (m['step'], m['train_loss'], m['val_loss'], m['grad_norm'], m['lr'])
        for m in metrics(folder)
    ]


def assert_same_run(a, b):
    """Two runs' metrics and final checkpoints are equal to the last bit."""
    assert losses(a) == losses(b)
    first, second = (checkpoint.load(str(f / 'ckpt.pt')) for f in (a, b))
    assert (
        first['iter_num'] == second['iter_num']
        and first['best_val_loss'] == second['best_val_loss']
    )
    assert all(torch.equal(v, second['model'][k]) for k, v in first['model'].items())
    flat = [o['state'] for c in (first, second) for o in c['optimizer']]
    for x, y in zip(flat[:2], flat[2:], strict=True):
        assert all(torch.equal(x[i][k], y[i][k]) for i in x for k in x[i])


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """60 steps in one run."""
    folder = tmp_path_factory.mktemp('whole')
    write_tiny(folder / 'data' / 'tiny')
    folder.joinpath('stdout').write_text(run(folder, 'train.py', *LOSSY, '--max_iters=60'))
    return folder


def slow(folder, seconds=0.03):
    """A config file that makes steps take their time: a signal or a kill comes between two."""
    (folder / 'slow.py').write_text(f"""
import time
import model

_forward = model.GPT.forward

def _slow_forward(self, *args, **options):
    time.sleep({seconds})
    return _forward(self, *args, **options)

model.GPT.forward = _slow_forward
""")
    return 'slow.py'


@pytest.mark.slow
def test_a_run_leaves_what_it_should(whole):
    assert sorted(os.listdir(whole / 'out')) == [
        'best.pt',
        'ckpt.pt',
        'ckpt_step_000030.pt',
        'loss.png',
        'metrics.jsonl',
        'samples_step_000030.txt',
        'samples_step_000060.txt',
        'settings.json',
        'tokenizer.json',
        'train.log',
    ]
    lines = metrics(whole / 'out')
    assert [m['step'] for m in lines] == list(range(61))
    assert list(lines[0]) == [
        'step',
        'tokens',
        'train_loss',
        'val_loss',
        'val_bpb',
        'lr',
        'grad_norm',
        'tokens_per_second',
        'mfu',
        'elapsed',
        'step_losses',
    ]
    assert [m['step'] for m in lines if m['val_loss'] is not None] == [0, 30, 60]
    assert (
        all(m['tokens'] == 64 * m['step'] for m in lines)
        and lines[-1]['val_loss'] < lines[0]['val_loss'] - 0.3
    )
    assert (
        abs(lines[0]['val_bpb'] - lines[0]['val_loss'] / np.log(2)) < 1e-6
    )  # one byte a token here
    assert 0 < lines[20]['mfu'] < 1 and lines[20]['tokens_per_second'] > 0
    assert (whole / 'out' / 'loss.png').read_bytes()[:4] == b'\x89PNG'
    assert (whole / 'out' / 'samples_step_000060.txt').read_text().count('---------------') == 2
    out = (whole / 'stdout').read_text()
    assert 'seed=1337' in out and out == (whole / 'out' / 'train.log').read_text()
    saved = json.loads((whole / 'out' / 'settings.json').read_text())
    assert saved['dropout'] == 0.2 and saved['seed'] == 1337


@pytest.mark.slow
def test_settings_json_repeats_the_run(whole, tmp_path):
    write_tiny(tmp_path / 'data' / 'tiny')
    run(tmp_path, 'train.py', str(whole / 'out' / 'settings.json'))
    assert_same_run(tmp_path / 'out', whole / 'out')


@pytest.mark.slow
def test_thirty_steps_resumed_for_thirty_more_equal_sixty(whole, workdir):
    run(workdir, 'train.py', *LOSSY, '--max_iters=30')
    run(
        workdir, 'train.py', '--max_iters=60', '--init_from=resume'
    )  # all other settings are the run's own
    assert_same_run(workdir / 'out', whole / 'out')
    assert (workdir / 'out' / 'samples_step_000060.txt').read_text() == (
        whole / 'out' / 'samples_step_000060.txt'
    ).read_text()


def wait_for(path, text, process, seconds=120):
    """Until the file at path contains text."""
    end = time.time() + seconds
    while time.time() < end and process.poll() is None:
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f'{text!r} never came: {process.communicate()}')


@pytest.mark.slow
def test_killed_between_checkpoints_goes_on_as_if_nothing_had_been(whole, workdir):
    process = start(workdir, 'train.py', *LOSSY, slow(workdir), '--max_iters=60')
    wait_for(workdir / 'out' / 'metrics.jsonl', '"step": 37,', process)
    process.kill()
    process.communicate()
    assert metrics(workdir / 'out')[-1]['step'] >= 37
    run(
        workdir,
        'train.py',
        *LOSSY,
        '--max_iters=60',
        slow(workdir),
        '--init_from=nowhere.pt',
        '--auto_resume',
    )
    assert_same_run(workdir / 'out', whole / 'out')


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(whole, workdir, number):
    process = start(workdir, 'train.py', *LOSSY, slow(workdir), '--max_iters=60')
    wait_for(workdir / 'out' / 'metrics.jsonl', '"step": 12,', process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (
        process.returncode == 0
        and 'saving and stopping' in err
        and '--init_from=resume' in out
        and 'Traceback' not in err
    )
    assert 12 < checkpoint.load(str(workdir / 'out' / 'ckpt.pt'))['iter_num'] < 60
    run(workdir, 'train.py', *LOSSY, slow(workdir), '--init_from=resume')
    assert_same_run(workdir / 'out', whole / 'out')


@pytest.mark.slow
def test_a_second_signal_stops_at_once(workdir):
    (workdir / 'disk.py').write_text("""
import time, torch

def _save(saved, path):
    print('writing', flush=True)
    time.sleep(600)

torch.save = _save
""")
    flags = [slow(workdir), 'disk.py', '--max_iters=1000', '--eval_interval=1000']
    process = start(workdir, 'train.py', *TINY, *flags)
    wait_for(workdir / 'out' / 'metrics.jsonl', '"step": 2,', process)
    process.send_signal(signal.SIGINT)
    while process.stdout.readline() != 'writing\n':
        assert process.poll() is None
    time.sleep(1.1)  # several signals within a second are one request
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert not (workdir / 'out' / 'ckpt.pt').exists()


@pytest.mark.slow
def test_a_new_run_keeps_the_one_that_was_there(workdir):
    run(workdir, 'train.py', *TINY, '--max_iters=3')
    first = (workdir / 'out' / 'ckpt.pt').read_bytes()
    out = run(workdir, 'train.py', *TINY, '--max_iters=2')
    assert 'is now in' in out and (workdir / 'out' / 'previous-1' / 'ckpt.pt').read_bytes() == first
    assert len(metrics(workdir / 'out')) == 3 and len(metrics(workdir / 'out' / 'previous-1')) == 4
    run(workdir, 'train.py', *TINY, '--max_iters=1')
    assert [len(metrics(workdir / 'out' / n)) for n in ('.', 'previous-2', 'previous-1')] == [
        2,
        3,
        4,
    ]


@pytest.mark.slow
def test_gradients_are_synchronised_once_a_step(workdir):
    """Counted from outside, by a wrapper that counts DDP's all-reduces."""
    (workdir / 'count.py').write_text(f"""
import runpy, sys
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
calls, init = [], DistributedDataParallel.__init__

def average(state, bucket):
    calls.append(1)
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0] / 2)

def counted(self, *args, **kwargs):
    init(self, *args, **kwargs)
    self.register_comm_hook(None, average)

DistributedDataParallel.__init__ = counted
sys.path.insert(0, {ROOT!r})
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print("buckets", len(calls))
""")
    out = subprocess.run(
        [
            python(),
            *TORCHRUN,
            'count.py',
            os.path.join(ROOT, 'train.py'),
            *TINY,
            '--max_iters=5',
            '--gradient_accumulation_steps=6',
            '--dtype=float32',
        ],
        cwd=workdir,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert out.returncode == 0, out.stderr
    assert set(re.findall(r'buckets (\d+)', out.stdout)) == {
        '5'
    }  # one bucket a step, for six micro-batches


@pytest.mark.slow
def test_dropout_is_another_in_each_step(workdir):
    for split in ('train', 'val'):
        path = str(workdir / 'data' / 'tiny' / f'{split}.bin')
        write_bin(path, [3] * 2000, 64)  # all rows are alike
    run(
        workdir,
        'train.py',
        *TINY,
        '--dropout=0.5',
        '--learning_rate=0',
        '--max_iters=6',
        '--dtype=float32',
    )
    assert len({m['train_loss'] for m in metrics(workdir / 'out') if m['train_loss']}) == 6


@pytest.mark.slow
def test_what_is_counted_goes_on_after_a_resume(workdir):
    flags = [*TINY, '--eval_interval=2', '--early_stopping_patience=4', '--learning_rate=0']
    run(
        workdir, 'train.py', *flags, '--max_iters=4'
    )  # evaluations at 0, 2 and 4: two without a better loss
    out = run(workdir, 'train.py', '--init_from=resume', '--max_iters=50')
    assert (
        'no better val loss in 4 evaluations' in out and metrics(workdir / 'out')[-1]['step'] == 8
    )


@pytest.mark.slow
def test_a_resumed_run_that_time_cut_goes_on_as_planned(workdir):
    flags = [
        *TINY,
        slow(workdir, 0.05),
        '--max_iters=100000',
        '--max_minutes=0.2',
        '--eval_interval=100000',
        '--log_interval=5',
    ]
    process = start(workdir, 'train.py', *flags)
    wait_for(workdir / 'out' / 'metrics.jsonl', '"step": 40,', process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    stopped = checkpoint.load(str(workdir / 'out' / 'ckpt.pt'))
    run(workdir, 'train.py', 'slow.py', '--init_from=resume')
    lines = [m for m in metrics(workdir / 'out') if m['step'] >= stopped['iter_num']]
    # what is spent of its time, but for twice the longest evaluation, is done of the schedule
    budget = 60 * 0.2 - 2 * stopped['run']['longest_evaluation']
    assert stopped['run']['elapsed'] <= lines[0]['elapsed'] < stopped['run']['elapsed'] + 1
    rest = 1 - (lines[0]['elapsed'] / budget * 100000 - 5) / (100000 - 5)
    assert lines[0]['lr'] == pytest.approx(0.006 * rest, rel=1e-6)  # no jump
    assert lines[-2]['lr'] < 0.001 and 8 < lines[-1]['elapsed'] < 16  # and to the end of its time


@pytest.mark.slow
def test_early_stopping(workdir):
    out = run(
        workdir,
        'train.py',
        *TINY,
        '--max_iters=50',
        '--eval_interval=2',
        '--early_stopping_patience=3',
        '--learning_rate=0',
    )
    assert (
        'no better val loss in 3 evaluations' in out and metrics(workdir / 'out')[-1]['step'] == 6
    )


@pytest.mark.slow
def test_only_a_better_loss_is_saved_when_asked(workdir):
    run(
        workdir,
        'train.py',
        *TINY,
        '--max_iters=6',
        '--eval_interval=2',
        '--always_save_checkpoint=False',
        '--learning_rate=0',
    )
    assert not (workdir / 'out' / 'best.pt').exists()  # step 0's loss was never beaten
    assert checkpoint.load(str(workdir / 'out' / 'ckpt.pt'))['iter_num'] == 6  # the last weights


@pytest.mark.slow
def test_max_minutes_bounds_the_run(workdir):
    t = time.time()
    run(
        workdir,
        'train.py',
        *TINY,
        '--max_iters=1000000',
        '--max_minutes=0.1',
        '--eval_interval=1000000',
        '--sample_interval=0',
        '--log_interval=20',
    )
    last = metrics(workdir / 'out')
    assert 3 < last[-1]['elapsed'] < 9 and time.time() - t < 30
    assert (
        last[-2]['lr'] < max(m['lr'] for m in last[:-1]) / 2
        and last[-1]['val_loss'] < last[0]['val_loss']
    )  # the schedule follows
    out = run(
        workdir, 'train.py', '--init_from=resume'
    )  # its time is up: nothing much is trained any more
    assert (
        last[-1]['step'] <= int(re.search(r'done at step (\d+) ', out)[1]) < last[-1]['step'] * 1.1
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    'flags, steps',
    [(['--target_tokens=640'], 10), (['--target_tokens=641'], 11), (['--target_epochs=0.5'], 32)],
)
def test_other_ways_to_say_max_iters(workdir, flags, steps):
    assert f', {steps} steps' in run(workdir, 'train.py', *TINY, *flags, '--eval_only')


@pytest.mark.slow
def test_dry_run_and_eval_only_write_nothing(workdir):
    before = sorted(os.walk(workdir))
    out = run(workdir, 'train.py', *TINY, '--dry_run', '--max_iters=1000')
    for word in ('parameters: ', 'tokens: 64,000', '(6ND)', 'memory: ', 'time: '):
        assert word in out
    n = int(re.search(r'parameters: ([\d,]+)', out)[1].replace(',', ''))
    assert f'FLOPs: {6 * n * 64000:.3g} ' in out
    assert re.search(
        r'val loss 4\.\d+, perplexity \d+\.\d+, 5\.\d+ bits per byte',
        run(workdir, 'train.py', *TINY, '--eval_only'),
    )
    assert sorted(os.walk(workdir)) == before


@pytest.mark.slow
def test_evaluation_is_the_same_whatever_the_batch(whole, workdir):
    trained = f'--init_from={whole}/out/ckpt.pt'
    first, second = (
        run(
            workdir,
            'train.py',
            *TINY,
            '--eval_only',
            '--eval_iters=0',
            f'--batch_size={b}',
            trained,
            '--dropout=0.5',
            '--dtype=float32',
        )
        for b in (4, 7)
    )  # dropout is off in it, and a short last row counts for its tokens

    def pick(out):
        return re.search(r'val loss (\S+),', out)[1]

    assert pick(first) == pick(second)


@pytest.mark.slow
def test_a_rows_length_is_not_the_context_where_positions_are_rope(whole, workdir):
    start_from = [*TINY, f'--init_from={whole}/out/ckpt.pt', '--max_iters=2']
    for length, context in ((8, 16), (24, 24)):
        out = run(workdir, 'train.py', *start_from, f'--block_size={length}')
        saved = checkpoint.load(str(workdir / 'out' / 'ckpt.pt'))
        assert saved['model_args']['block_size'] == context
        assert saved['config']['block_size'] == length
        assert f'{4 * length} tokens a step' in out
    evaluated = json.loads(run(workdir, 'evaluate.py', '--json').splitlines()[-1])
    assert evaluated['block_size'] == 24
    learned = ['--position=learned', '--max_iters=1', '--out_dir=learned']
    run(workdir, 'train.py', *TINY, *learned)
    start_from[-2] = '--init_from=learned/ckpt.pt'
    assert 'the context of 16 becomes 8' in run(workdir, 'train.py', *start_from, '--block_size=8')
    words = 'has 16 learned positions; block_size=24 is more'
    assert words in fails(workdir, 'train.py', *start_from, '--block_size=24')
    start_from = [flag for flag in start_from if not flag.startswith('--block_size')]
    out = run(workdir, 'train.py', *start_from)  # rows are no longer than the context then
    assert 'block_size=16 ' in out and '64 tokens a step' in out


@pytest.mark.slow
def test_a_setting_that_does_nothing_is_named(whole, workdir):
    start_from = [*TINY, f'--init_from={whole}/out/ckpt.pt', '--eval_only']
    out = run(workdir, 'train.py', *start_from, '--n_layer=5', '--n_inner=0')
    assert (
        'n_layer=5 is ignored: the checkpoint has 2' in out and 'n_inner' not in out.split('\n')[0]
    )
    out = run(workdir, 'train.py', *TINY, '--eval_only', '--decay_lr=False', '--min_lr=1e-4')
    assert 'without effect here: warmup_iters (decay_lr=False), min_lr (decay_lr=False)' in out


def test_the_bar_ends_where_the_run_is_expected_to(tmp_path):
    log, state = RunLog(True), RunState()
    log.bar = tqdm(total=1000, disable=True)
    expected = []
    for state.step, state.progress in ((1, 0.02), (10, 0.04), (500, 0.5)):  # evaluated at step 0
        log.advance(state, 1000)
        expected.append(log.bar.total)
    assert expected == [50, 250, 1000]


def test_the_curves_of_a_long_run_stay_small():
    of_a_step = dict(elapsed=1.0, train_loss=1.0, val_loss=None)
    curves = curves_of(dict(of_a_step, tokens=step) for step in range(20_000))
    curve = curves['train_loss']
    assert 500 < len(curve) <= 2000 and curve[0][0] == 0 and curve[-1][0] > 19_900
    gaps = [later[0] - earlier[0] for earlier, later in zip(curve, curve[1:], strict=False)]
    assert max(gaps) < 100  # no part of the run is left out
    assert not curves['val_loss']


@pytest.mark.slow
def test_two_runs_do_not_write_to_one_folder(workdir):
    process = start(workdir, 'train.py', *TINY, slow(workdir, 0.3), '--max_iters=60')
    wait_for(workdir / 'out' / 'metrics.jsonl', '"step": 1,', process)
    assert 'another process is writing to out' in fails(workdir, 'train.py', *TINY)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


@pytest.mark.slow
def test_a_run_with_its_own_loss_does_not_lose_it(workdir):
    (workdir / 'own.py').write_text(
        'def objective(model, batch):\n    return model(*batch, return_logits=False)[1]\n'
    )
    run(workdir, 'train.py', *TINY, 'own.py', '--max_iters=3')
    assert 'objective of its own' in fails(
        workdir, 'train.py', '--init_from=resume', '--max_iters=5'
    )
    with open(workdir / 'out' / 'metrics.jsonl', 'a') as f:
        f.write('\0\0\0{"step": 2')  # what a power cut leaves
    out = run(
        workdir,
        'train.py',
        'own.py',
        '--init_from=resume',
        '--max_iters=5',
        '--learning_rate=0.001',
    )
    assert json.loads((workdir / 'out' / 'settings.json').read_text())['init_from'] == 'scratch'
    assert (
        'resuming at step 3' in out
        and 'max_iters was 3, now 5' in out
        and ', now 0.001' in out
        and 'dataset was' not in out
    )
    assert [m['step'] for m in metrics(workdir / 'out')] == [0, 1, 2, 3, 4, 5]


@pytest.mark.slow
def test_an_objective_may_log_more_numbers(workdir):
    (workdir / 'two.py').write_text("""
max_iters = 4
def objective(model, batch):
    logits, loss = model(batch['inputs'], batch['targets'])
    hits = (logits.argmax(dim=-1) == batch['targets']).float()
    own = {'largest_logit': logits.max(), 'accuracy': hits.mean(), 'loss': 100 * loss}
    return loss, own | {'weight': 3.0}
""")
    out = run(workdir, 'train.py', *TINY, 'two.py')
    lines = metrics(workdir / 'out')
    assert all(m['largest_logit'] > 0 for m in lines[:-1])
    assert lines[0]['val_weight'] == lines[0]['weight'] == 3
    assert lines[0]['val_largest_logit'] > 0 and lines[0]['val_bpb'] is None
    assert 0 <= lines[0]['val_accuracy'] <= 1 and 3 < lines[0]['val_loss'] < 5
    evaluation = re.search('step 0: (.*)', out)[1]
    assert re.fullmatch(
        r'val loss 4\.\d+, largest_logit 0\.\d+, accuracy 0\.\d+, weight 3', evaluation
    )
    assert '| largest_logit 0.' in out


@pytest.mark.slow
def test_a_config_file_may_bring_its_own_loss(workdir):
    (workdir / 'mine.py').write_text(
        'max_iters = 4\ndef objective(model, batch):\n'
        '    x, y = batch\n    return model(x, y)[1] * 2\n'
    )
    run(workdir, 'train.py', *TINY, 'mine.py')
    run(workdir, 'train.py', *TINY, '--max_iters=4', '--out_dir=plain')
    assert (
        abs(metrics(workdir / 'out')[0]['val_loss'] / metrics(workdir / 'plain')[0]['val_loss'] - 2)
        < 0.01
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    'flags',
    [
        [
            '--optimizer=adamw',
            '--lr_schedule=cosine',
            '--position=learned',
            '--norm=layernorm',
            '--activation=gelu',
            '--qk_norm=False',
            '--bias',
        ],
        [
            '--lr_schedule=wsd',
            '--gradient_checkpointing',
            '--dtype=float32',
            '--tie_embeddings=False',
            '--min_lr=1e-4',
        ],
        ['--decay_lr=False', '--grad_clip=0', '--activation=relu2', '--dtype=bfloat16'],
        ['--lr_schedule=noam', '--lr_decay_iters=10', '--min_lr=0.0025'],
    ],
)
def test_settings_train(workdir, flags):
    out = run(workdir, 'train.py', *TINY, *flags, '--max_iters=40')
    lines = metrics(workdir / 'out')
    assert lines[-1]['val_loss'] < lines[0]['val_loss'] - 0.1
    lr = [m['lr'] for m in lines[:-1]]
    if '--lr_schedule=wsd' in flags:
        assert lr[5] == lr[32] == 0.006 and abs(lr[36] - (1e-4 + 0.5 * 0.0059)) < 1e-9
    if '--lr_schedule=cosine' in flags:
        assert (
            lr[:3] == pytest.approx([0.001, 0.002, 0.003])
            and lr[5] == 0.006
            and lr[22] == pytest.approx(0.003, rel=0.1)
        )
    if '--decay_lr=False' in flags:
        assert set(lr) == {0.006}
    if '--lr_schedule=noam' in flags:
        assert lr[5] == 0.006 and lr[20] == 0.003 and lr[30] == lr[39] == 0.0025
        assert 'without effect here: lr_decay_iters (lr_schedule=noam)\n' in out


@pytest.mark.slow
@pytest.mark.skipif(not cpu.has_bfloat16(), reason='this CPU does not multiply in bfloat16')
def test_bfloat16_reaches_the_loss_of_float32(workdir):
    for dtype in ('float32', 'bfloat16'):
        run(
            workdir,
            'train.py',
            *TINY,
            '--max_iters=300',
            '--eval_interval=300',
            '--eval_iters=0',
            '--sample_interval=0',
            f'--dtype={dtype}',
            f'--out_dir={dtype}',
        )
    exact, rounded = (metrics(workdir / dtype)[-1]['val_loss'] for dtype in ('float32', 'bfloat16'))
    assert exact < 2 and abs(rounded / exact - 1) < 0.005


@pytest.mark.slow
def test_nothing_is_imported_before_it_is_needed(workdir):
    (workdir / 'watch.py').write_text("""
import sys

def objective(model, batch):
    late = {'wandb', 'datasets', 'matplotlib', 'tokenizers', 'tensorboard', 'transformers'}
    assert not late & set(sys.modules), late & set(sys.modules)
    return model(*batch, return_logits=False)[1]
""")
    flags = ['--max_iters=2', '--eval_interval=100', '--sample_interval=0']
    process = start(workdir, 'train.py', *TINY, 'watch.py', *flags, own=True)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


@pytest.mark.slow
def test_a_prepared_run_starts_in_twice_the_time_of_importing_torch(workdir):
    """In seconds of the processor, which are as many on a machine that others keep busy."""

    def seconds_to_first_line(process, beginning):
        next(line for line in process.stdout if line.startswith(beginning))
        times = psutil.Process(process.pid).cpu_times()
        process.kill()
        process.communicate()
        return times.user + times.system

    code = 'import sys, torch, torch._dynamo; print("imported", flush=True); sys.stdin.read()'
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    bare = subprocess.Popen([sys.executable, '-c', code], **pipes)
    imports = seconds_to_first_line(bare, 'imported')
    run = start(workdir, 'train.py', *TINY, '--max_iters=100000', own=True)
    assert seconds_to_first_line(run, 'step 0/') < 2 * imports


@pytest.mark.slow
def test_compile_trains_the_same(workdir):
    if not shutil.which('g++'):
        pytest.skip('torch.compile needs a C++ compiler on a CPU')
    cache = {'TORCHINDUCTOR_CACHE_DIR': str(workdir / 'cache')}
    out = run(
        workdir,
        'train.py',
        *TINY,
        '--max_iters=10',
        '--compile',
        '--n_layer=1',
        '--dtype=float32',
        '--out_dir=compiled',
        env=cache,
    )
    run(workdir, 'train.py', *TINY, '--max_iters=10', '--n_layer=1', '--dtype=float32')
    assert 'torch.compile failed' not in out
    for a, b in zip(metrics(workdir / 'compiled'), metrics(workdir / 'out'), strict=True):
        assert a['train_loss'] == pytest.approx(b['train_loss'], abs=1e-3)


@pytest.mark.slow
def test_a_failure_to_compile_is_an_error_where_compiling_was_asked_for(workdir):
    env = {'CXX': '/nonexistent/g++', 'TORCHINDUCTOR_CACHE_DIR': str(workdir / 'cache')}
    process = start(workdir, 'train.py', *TINY, '--max_iters=3', '--compile', env=env, own=True)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1 and 'nonexistent' in err and 'going on' not in out


@pytest.mark.slow
def test_a_terminal_gets_a_progress_bar(workdir):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 160, 0, 0))
    process = subprocess.Popen(
        [sys.executable, os.path.join(ROOT, 'train.py'), *TINY, '--max_iters=20'],
        cwd=workdir,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    screen = b''
    while process.poll() is None or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                screen += os.read(ours, 65536)
            except OSError:
                break
    os.close(ours)
    screen = screen.decode()
    assert (
        process.wait() == 0
        and '20/20' in screen
        and '100%' in screen
        and 'step/s' in screen
        and 'step 20: val loss' in screen
    ), screen
    assert (workdir / 'out' / 'train.log').read_text().count('tok/s') == 20


@pytest.mark.slow
def test_wandb_offline_and_tensorboards_absence(workdir):
    run(workdir, 'train.py', *TINY, '--max_iters=3', '--wandb_log')
    run(workdir, 'train.py', '--init_from=resume', '--max_iters=5')
    first, second = (workdir / 'out' / 'wandb').glob('offline-run-*')
    assert first.name.split('-')[-1] == second.name.split('-')[-1]  # one run there
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        assert 'the package tensorboard is not installed: pip install tensorboard' in fails(
            workdir, 'train.py', *TINY, '--tensorboard'
        )
    else:
        run(workdir, 'train.py', *TINY, '--max_iters=3', '--tensorboard')
        assert list((workdir / 'out' / 'tensorboard').iterdir())


def broken(text=None, **arrays):
    def make(folder):
        for name, ids in arrays.items():
            write_bin(str(folder / f'{name}.bin'), ids, 65536)
        if text is not None:
            (folder / 'train.bin').write_bytes(text)

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    'make, flags, words',
    [
        (
            None,
            ['--dataset=nowhere'],
            'data/nowhere has no train.bin; make it with: python prepare/text.py',
        ),
        (None, ['--dataset=shakespeare_char'], 'make it with: python prepare/shakespeare_char.py'),
        (None, [os.path.join(ROOT, 'config/dolma_75m.py')], 'make it with: python prepare/'),
        (broken(b''), [], 'train.bin is empty'),
        (
            broken(np.array([20240520, 1, 500], '<i4').tobytes() + bytes(1012 + 998)),
            [],
            'train.bin is truncated',
        ),
        (
            broken(np.array([20240521, 1, 500], '<i4').tobytes() + bytes(1012 + 1000)),
            [],
            'wrong magic',
        ),
        (broken(train=[64] * 500), [], 'holds token 64 at position'),
        (None, ['--block_size=4000'], 'block_size=4000 is longer than the data'),
        (None, ['--head_dim=0', '--n_embd=17'], 'n_embd=17 is not divisible by n_head=2'),
        (None, ['--out_dir=data/tiny/train.bin/out'], 'cannot write to out_dir='),
        (None, ['--init_from=resume'], 'no checkpoint at out/ckpt.pt'),
        (None, ['--dataset=my notes'], "'--name=my notes' --tokenizer=gpt2"),
        (None, ['--init_from=gone.pt'], 'no checkpoint at gone.pt'),
        (None, ['--device=cuda:99'], "device='cuda:99' cannot be used here"),
        (None, ['--dtype=float8'], 'none of auto, float32'),
        (None, ['--optimizer=sgd'], 'none of auto, muon, adamw'),
        (None, ['--lr_schedule=step'], 'none of linear'),
        (None, ['--compile=yes'], 'none of auto, True, False'),
        (None, ['--device'], 'device=True cannot be used'),
        (None, ['--n_inner=-5'], 'n_inner=-5'),
        (None, ['--beta1=2'], 'beta1=2 must be'),
        (None, ['--max_minutes=1e999'], 'max_minutes=inf must be'),
        (None, ['--init_from=data'], 'is a folder'),
        (None, ['--rope_theta=0'], 'rope_theta=0 must be'),
        (None, ['--seed=99999999999999999999'], 'seed='),
        (None, ['--batch_size=0'], 'batch_size=0'),
        (None, ['--max_iters=-1'], 'max_iters=-1'),
        (None, ['--learning_rat=1'], 'learning_rate'),
        (
            None,
            ['--learning_rate=10', '--weight_decay=10', '--optimizer=adamw', '--grad_clip=0'],
            'the run diverged',
        ),
    ],
)
def test_bad_input_is_one_line(workdir, make, flags, words):
    if make:
        make(workdir / 'data' / 'tiny')
    assert words in fails(workdir, 'train.py', *TINY, *flags)
    assert not list(workdir.rglob('*.tmp'))
