"""A run is killed, starved and spoiled, again and again, and ends as one that nothing disturbed.

A few rounds of it are a test. For many:

    python tests/test_faults.py --rounds=50 --seed=1
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import conftest
import psutil
import pytest
import torch
from conftest import ROOT, TINY, free_port, kill_tree, metrics, write_tiny

from fledge import UserError, checkpoint, saving

INTERVAL = 10  # steps between checkpoints
STEPS_PER_ROUND = 20  # of the run; most rounds come further than they are let
SECONDS = 300  # that a process may take: far more than it does
FLAGS = [*TINY, 'faults.py', '--sample_interval=0', '--dropout=0.1', '--auto_resume']
FLAGS += [f'--eval_interval={INTERVAL}', '--keep_checkpoints=3', '--dtype=float32']
FLAGS += ['--log_interval=3']  # so that some steps of a checkpoint wait for their line

# The run's config file: it slows the steps down, and does to its own process what FAULT says.
FAULTS = '''
import errno, io, os, resource, signal, time
import builtins, torch
_kind, _, _count = os.environ.get('FAULT', '').partition(' ')
_count = int(_count or 0)
_calls = dict(step=0, save=0, replace=0)
_save, _replace, _open = torch.save, os.replace, builtins.open

def _is_now(name):
    """Whether this is the call that the fault is for."""
    _calls[name] += 1
    return _kind == name and _calls[name] == _count

def _die():
    os.kill(os.getpid(), signal.SIGKILL)

def _killed_save(saved, path):
    if _is_now('save'):
        buffer = io.BytesIO()
        _save(saved, buffer)
        with open(path, 'wb') as f:
            f.write(buffer.getvalue()[: _count * 997 % buffer.tell()])
        _die()
    _save(saved, path)

def _killed_replace(source, target):
    if _is_now('replace') and _count % 2:
        _die()
    _replace(source, target)
    if _kind == 'replace' and _calls['replace'] == _count:
        _die()

def _read_only(path, mode='r', *args, **options):
    if _failing() and mode[0] in 'wax' and str(path).startswith('out'):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
    return _open(path, mode, *args, **options)

def _failing():
    """Whether the disk takes nothing now: for 12 of every 30 steps."""
    return _kind in ('full', 'read-only') and _calls['step'] % 30 >= 18

torch.save, os.replace, builtins.open = _killed_save, _killed_replace, _read_only

def objective(model, batch):
    if model.training:
        _calls['step'] += 1
        time.sleep(0.01)
        if _kind == 'full':
            size = 300 if _failing() else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    documents = batch.get('documents')
    return model(batch['inputs'], batch['targets'], return_logits=False, documents=documents)[1]
'''


def start(folder, n_steps, n_processes, fault=''):
    flags, env = [*FLAGS, f'--max_iters={n_steps}'], dict(FAULT=fault)
    if n_processes == 1:
        return conftest.start(folder, 'train.py', *flags, env=env)
    torchrun = [sys.executable, '-m', 'torch.distributed.run', f'--nproc_per_node={n_processes}']
    torchrun += [f'--master_port={free_port()}', '--max_restarts=3']
    torchrun += [os.path.join(ROOT, 'train.py'), *flags]
    return subprocess.Popen(
        [*torchrun, f'--gradient_accumulation_steps={n_processes}'],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | env,
    )


def end(process):
    """Wait for a process; returns its exit code and what it said."""
    try:
        said = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        kill_tree(process)
        raise AssertionError(f'it hangs: {process.communicate()}') from None
    return process.returncode, ''.join(said)


def last_step(out_dir):
    """The last step in a run's metrics.jsonl, -1 where there is none."""
    path = out_dir / 'metrics.jsonl'
    lines = path.read_text(errors='replace').splitlines(True) if path.exists() else []
    whole = [line for line in lines if line.endswith('\n') and line.startswith('{"step": ')]
    return int(whole[-1].split(',')[0].split()[1]) if whole else -1


def wait_for_step(process, out_dir, step):
    began = time.monotonic()
    while last_step(out_dir) < step and process.poll() is None:
        if time.monotonic() - began > SECONDS:
            kill_tree(process)
            raise AssertionError(f'step {step} never came: {process.communicate()}')
        time.sleep(0.02)


def spoil(out_dir, rng):
    """Break the newest checkpoint, or a line of the log, as a bad disk does; leave litter."""
    (out_dir / 'ckpt.pt.tmp').write_bytes(rng.randbytes(1000))
    with open(out_dir / 'metrics.jsonl', 'ab') as f:
        f.write(b'\0\0{"step": 7')
    if len(saving.files(str(out_dir))) < 3:
        return 'the log'
    path = out_dir / 'ckpt.pt'
    try:
        weight = checkpoint.load(str(path))['model']['transformer.wte.weight'].numpy()
    except UserError:
        return 'the log, for the checkpoint is broken already'
    raw = bytearray(path.read_bytes())
    how = rng.choice(['cut short', 'empty', 'zeros', 'a flipped bit'])
    if how == 'cut short':
        raw = raw[: rng.randrange(len(raw))]
    elif how == 'empty':
        raw = b''
    elif how == 'zeros':
        raw[len(raw) // 3 :] = bytes(len(raw) - len(raw) // 3)
    else:
        raw[raw.index(weight.tobytes()) + rng.randrange(weight.nbytes)] ^= 8
    path.write_bytes(raw)
    return how


def one_round(folder, n_steps, n_processes, rng):
    """Let the run go on under one fault; returns what it was, in words."""
    out_dir = folder / 'out'
    kinds = ['kill', 'kill', 'terminate', 'save', 'replace', 'full', 'read-only', 'spoil']
    if n_processes > 1:
        kinds = ['kill', 'kill a process', 'kill a process', 'terminate', 'spoil', 'save', 'full']
    kind = rng.choice(kinds)
    before = last_step(out_dir)
    if kind == 'spoil':
        if not saving.files(str(out_dir)):
            return 'nothing to spoil yet'
        return f'spoiled: {spoil(out_dir, rng)}'
    fault = ''
    if kind in ('save', 'replace'):  # the run kills itself there
        fault = f'{kind} {rng.randint(1, 6 if kind == "save" else 12)}'
    elif kind in ('full', 'read-only'):
        fault = kind
    process = start(folder, n_steps, n_processes, fault)
    target = before + rng.randint(1, 2 * STEPS_PER_ROUND)
    wait_for_step(process, out_dir, min(target, n_steps - 4))
    time.sleep(rng.random() * 0.1)
    if kind == 'kill a process':
        workers = psutil.Process(process.pid).children() if process.poll() is None else []
        if workers:
            rng.choice(workers).kill()
        wait_for_step(process, out_dir, min(target + INTERVAL, n_steps - 4))
    reached = last_step(out_dir)
    if kind == 'terminate' and process.poll() is None:
        process.send_signal(signal.SIGTERM)
        code, said = end(process)
        assert n_processes > 1 or code == 0, said
        assert n_processes > 1 or 'stopped at step' in said or 'done at step' in said, said
        assert 'Traceback' not in said or n_processes > 1, said
    elif process.poll() is None:
        kill_tree(process)
        end(process)
    else:
        code, said = end(process)
        assert code in (0, -signal.SIGKILL) or 'cannot write' in said, said
    check(out_dir, reached, kind)
    return f'{kind} at step {reached}'


def check(out_dir, reached, kind):
    """What is on the disk is whole, and not much is lost."""
    names = saving.files(str(out_dir))
    for path in names:
        if not path.endswith('ckpt.pt'):  # which may have been spoiled; no other ever is
            checkpoint.load(path)
    if not names:
        assert reached <= 2 * INTERVAL or kind in ('full', 'read-only'), reached
        return
    _, newest = saving.newest(str(out_dir), print)
    # the thread that writes may be killed while it writes the last one
    lost = reached - newest['iter_num']
    assert lost <= 2 * INTERVAL or kind in ('full', 'read-only'), f'{lost} steps are lost'


def torture(folder, rounds, n_processes, seed, say):
    """Compare a run under so many faults with an undisturbed one."""
    rng, n_steps = random.Random(seed), rounds * STEPS_PER_ROUND
    for name in ('whole', 'tortured'):
        (folder / name).mkdir()
        write_tiny(folder / name / 'data' / 'tiny')
        (folder / name / 'faults.py').write_text(FAULTS)
    code, said = end(start(folder / 'whole', n_steps, n_processes))
    assert code == 0, said
    for number in range(1, rounds + 1):
        say(f'round {number}: {one_round(folder / "tortured", n_steps, n_processes, rng)}')
    code, said = end(start(folder / 'tortured', n_steps, n_processes))
    assert code == 0, said
    compare(folder / 'whole' / 'out', folder / 'tortured' / 'out')


def compare(whole, tortured):
    """Weights, optimizers' states and metrics are equal, bit for bit."""
    keys = ('step', 'tokens', 'train_loss', 'val_loss', 'val_bpb', 'lr', 'grad_norm', 'step_losses')
    for a, b in zip(metrics(whole), metrics(tortured), strict=True):
        assert [a.get(key) for key in keys] == [b.get(key) for key in keys]
    for file in ('ckpt.pt', 'best.pt'):
        first, second = (checkpoint.load(str(out_dir / file)) for out_dir in (whole, tortured))
        assert first['iter_num'] == second['iter_num'], file
        for name, tensor in first['model'].items():
            assert torch.equal(tensor, second['model'][name]), name
        for mine, other in zip(first['optimizer'], second['optimizer'], strict=True):
            for number, entry in mine['state'].items():
                assert all(torch.equal(t, other['state'][number][k]) for k, t in entry.items())


@pytest.mark.slow
def test_a_tortured_run_ends_as_an_undisturbed_one(tmp_path):
    torture(tmp_path, 5, 1, 1, print)


@pytest.mark.slow
def test_so_does_one_of_two_processes(tmp_path):
    torture(tmp_path, 2, 2, 1, print)


def test_the_comparison_can_fail(tmp_path):
    for name in ('whole', 'tortured'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'metrics.jsonl').write_text(f'{{"step": {len(name)}}}\n')
    with pytest.raises(AssertionError):
        compare(tmp_path / 'whole', tmp_path / 'tortured')
    with pytest.raises(UserError):
        saving.newest(str(tmp_path), print)


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--rounds', type=int, default=50)
    parser.add_argument('--seed', type=int, default=1)
    arguments = parser.parse_args()
    for n_processes in (1, 2):
        rounds = arguments.rounds if n_processes == 1 else max(1, arguments.rounds // 5)
        print(f'{n_processes} process(es), {rounds} rounds')
        with tempfile.TemporaryDirectory() as folder:
            torture(Path(folder), rounds, n_processes, arguments.seed, print)
        print('it ended as the undisturbed run did, to the bit')
