"""A run's checkpoints: which are kept, what a full disk does, which one a run goes on from."""

import math
import os
import resource
import signal
import time

import pytest
import torch
from conftest import ROOT, TINY, fails, metrics, run, start

from fledge import UserError, checkpoint, saving
from fledge.configurator import read_settings
from fledge.run import Clock, changes_since, check_settings
from fledge.state import RunState
from model import GPT, GPTConfig

PLAIN = [*TINY, '--sample_interval=0', '--eval_interval=5']


def a_checkpoint(step):
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=2, n_embd=8))
    return dict(
        model=model.state_dict(),
        model_args=checkpoint.model_args(model.config),
        iter_num=step,
        best_val_loss=2.5,
    )


def steps_in(folder):
    """{name: step} of the checkpoints in a folder."""
    names = [name for name in os.listdir(folder) if name.endswith('.pt')]
    return {name: checkpoint.load(os.path.join(folder, name))['iter_num'] for name in names}


def test_the_last_ones_and_the_best_stay(tmp_path):
    saver = saving.Saver(str(tmp_path), 3, None)
    for step in (10, 20, 30, 40, 50):
        saver.save(a_checkpoint(step), is_best=step == 20)
    saver.finish()
    assert (
        saver.latest is None and saver.best is None
    )  # no copy stays in memory, to be written again
    assert steps_in(tmp_path) == {
        'ckpt.pt': 50,
        'ckpt_step_000040.pt': 40,
        'ckpt_step_000030.pt': 30,
        'best.pt': 20,
    }
    only = saving.Saver(str(tmp_path), 1, 50)
    only.save(a_checkpoint(60), is_best=False)
    only.finish()
    assert steps_in(tmp_path) == {'ckpt.pt': 60, 'best.pt': 20}


def test_what_is_saved_is_what_it_was_at_that_moment(tmp_path):
    saver, saved = saving.Saver(str(tmp_path), 1, None), a_checkpoint(1)
    saved['optimizer'] = [dict(state={0: dict(momentum=torch.zeros(3_000_000))})]
    weight = saved['model']['transformer.wte.weight']
    before = weight.clone()
    saver.save(saved, is_best=False)
    weight.add_(1)
    saved['optimizer'][0]['state'][0]['momentum'].add_(1)
    saver.finish()
    loaded = checkpoint.load(str(tmp_path / 'ckpt.pt'))
    assert torch.equal(loaded['model']['transformer.wte.weight'], before)
    assert not loaded['optimizer'][0]['state'][0]['momentum'].any()
    # the head is the embedding: one tensor in the file as well
    head, embedding = loaded['model']['lm_head.weight'], loaded['model']['transformer.wte.weight']
    assert head.data_ptr() == embedding.data_ptr()


class FullDisk:
    """No file may grow beyond this, as on a full disk."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.limits[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)
        signal.signal(signal.SIGXFSZ, self.handler)


def test_what_a_full_disk_refused_is_written_later(tmp_path, monkeypatch):
    saver, said = saving.Saver(str(tmp_path), 2, None), []
    saver.save(a_checkpoint(10), is_best=True)
    saver.wait()
    with FullDisk(4000):
        saver.save(a_checkpoint(20), is_best=True)
        saver.wait()
        for _ in range(3):
            saver.tend(said.append)
        assert len(said) == 1 and 'cannot write' in said[0] and 'tries again' in said[0]
        assert steps_in(tmp_path) == {'ckpt.pt': 10, 'best.pt': 10}
        with pytest.raises(UserError, match='what was there before is as it was'):
            saver.finish()
        saver.save(a_checkpoint(30), is_best=False)  # the best is still to be written
        saver.wait()
    monkeypatch.setattr(saving, 'RETRY_SECONDS', 0)
    saver.tend(said.append)
    saver.wait()
    expected = {'ckpt.pt': 30, 'ckpt_step_000010.pt': 10, 'best.pt': 20}
    assert steps_in(tmp_path) == expected and not saver.error
    assert not [name for name in os.listdir(tmp_path) if name.endswith('.tmp')]


def test_weights_that_are_not_finite_are_not_kept(tmp_path):
    saver = saving.Saver(str(tmp_path), 2, None)
    broken = a_checkpoint(10)
    broken['model']['transformer.wte.weight'][0, 0] = float('inf')
    saver.save(broken, is_best=True)
    with pytest.raises(UserError, match='transformer.wte.weight has weights that are not finite'):
        saver.finish()
    saver.save(a_checkpoint(20), is_best=False)
    saver.finish()
    assert steps_in(tmp_path) == {'ckpt.pt': 20}


def test_the_newest_whole_one_is_taken(tmp_path):
    saver = saving.Saver(str(tmp_path), 3, None)
    for step in (10, 20, 30):
        saver.save(a_checkpoint(step), is_best=step == 10)
    saver.finish()
    skipped = []
    assert saving.newest(str(tmp_path), skipped.append)[1]['iter_num'] == 30 and not skipped
    weight = checkpoint.load(str(tmp_path / 'ckpt.pt'))['model']['lm_head.weight']
    raw = bytearray((tmp_path / 'ckpt.pt').read_bytes())
    raw[raw.index(weight.numpy().tobytes())] ^= 1  # a single bit
    (tmp_path / 'ckpt.pt').write_bytes(raw)
    path = tmp_path / 'ckpt_step_000020.pt'
    path.write_bytes(path.read_bytes()[:-1000])
    path, loaded = saving.newest(str(tmp_path), skipped.append)
    assert loaded['iter_num'] == 10 and path.endswith('ckpt_step_000010.pt') and len(skipped) == 2
    assert 'ckpt.pt is broken' in skipped[0] and 'ckpt_step_000020.pt is' in skipped[1]
    (tmp_path / 'ckpt_step_000010.pt').unlink()
    assert saving.newest(str(tmp_path), skipped.append)[0].endswith('best.pt')
    (tmp_path / 'best.pt').write_bytes(b'')
    with pytest.raises(UserError, match='no checkpoint of .* is whole: .*ckpt.pt is broken'):
        saving.newest(str(tmp_path), skipped.append)


def test_a_run_may_be_in_a_folder_called_scratch(tmp_path, monkeypatch):
    """The name is no base to begin with, even where there is such a folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'scratch').mkdir()
    settings = read_settings(f'{ROOT}/train.py') | dict(out_dir='scratch')
    check_settings(settings)
    (tmp_path / 'base').mkdir()
    with pytest.raises(UserError, match='base has the weights that are begun with'):
        check_settings(settings | dict(init_from='base', out_dir='base'))


def test_losses_compare_with_those_of_before_unless_they_come_out_differently():
    before = dict(objective='next_token', dpo_beta=0.1, block_size=16, quantize_base='none')
    before |= dict(dataset='tiny', learning_rate=0.1)

    def resumed(of_batches, **changes):
        saved = dict(config=before | dict(batch_size=4, eval_iters=of_batches), run=dict(rows=100))
        settings = saved['config'] | changes
        state = RunState(rows=100, evaluated_step=5, best_step=5, best_val_loss=2.0)
        state.meet_changes(saved, changes_since(saved, settings), settings, 'digest')
        return state

    for changes in (dict(objective='dpo'), dict(eval_iters=3), dict(block_size=8)):
        state = resumed(2, **changes)
        assert (state.evaluated_step, state.best_step) == (-1, -1), changes
        assert state.best_val_loss == math.inf
    assert state.rows == 200  # as many tokens of the data are behind it
    assert resumed(2, learning_rate=0.2).best_val_loss == 2.0
    assert resumed(2, batch_size=8).best_val_loss == math.inf
    assert resumed(0, batch_size=8).best_val_loss == 2.0  # all of val
    del before['objective']  # as in nanoGPT's
    assert resumed(0, objective='next_token').best_val_loss == 2.0
    assert resumed(0, objective='own.py').best_val_loss == math.inf


def test_an_evaluation_is_no_time_of_training(monkeypatch):
    now = 100.0
    monkeypatch.setattr('fledge.run.time.monotonic', lambda: now)
    clock = Clock(elapsed=7.0)  # before a resume
    now += 3
    with clock.not_training():
        now += 5
    now += 2
    assert (clock.interval(), clock.aside, clock.elapsed()) == (5, 5, 17)
    clock.start_interval()
    now += 1
    assert (clock.interval(), clock.aside) == (1, 5)


@pytest.mark.slow
def test_a_run_goes_on_from_the_newest_whole_one(workdir):
    run(workdir, 'train.py', *PLAIN, '--max_iters=20', '--out_dir=whole')
    run(workdir, 'train.py', *PLAIN, '--max_iters=20')
    raw = (workdir / 'out/ckpt.pt').read_bytes()
    (workdir / 'out/ckpt.pt').write_bytes(raw[: len(raw) // 2])
    out = run(workdir, 'train.py', *PLAIN, '--max_iters=20', '--auto_resume')
    assert 'skipped: out/ckpt.pt is ' in out and 'resuming at step 15' in out
    assert steps_in(workdir / 'out') == steps_in(workdir / 'whole')
    ours, theirs = (metrics(workdir / name) for name in ('out', 'whole'))
    assert [m['train_loss'] for m in ours] == [m['train_loss'] for m in theirs]
    # killed between the two renames: there is no ckpt.pt for a moment
    os.remove(workdir / 'out/ckpt.pt')
    out = run(workdir, 'train.py', *PLAIN, '--max_iters=20', '--auto_resume')
    assert 'skipped' not in out and 'resuming at step 15' in out
    assert steps_in(workdir / 'out') == steps_in(workdir / 'whole')
    # a new run moves all of them away
    run(workdir, 'train.py', *PLAIN, '--max_iters=4')
    assert 'ckpt_step_000015.pt' in os.listdir(workdir / 'out/previous-1')
    assert 'ckpt_step_000015.pt' not in os.listdir(workdir / 'out')
    for name in os.listdir(workdir / 'out'):
        if name.endswith('.pt'):
            (workdir / 'out' / name).write_bytes(b'PK')
    assert 'no checkpoint of out is whole' in fails(workdir, 'train.py', '--auto_resume')


# a config file whose objective fills the disk at some step, and frees it at another
FILLING = """
import resource, threading

def objective(model, batch):
    global calls
    calls = globals().get('calls', 0) + model.training
    if calls == 13:  # the checkpoint of step 10 is tried while the disk is full
        for thread in threading.enumerate():
            if '(write)' in thread.name:
                thread.join()
    size = 500 if FULL else resource.RLIM_INFINITY  # that a file may have
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    return model(*batch, return_logits=False)[1]
"""


@pytest.mark.slow
def test_a_run_goes_on_while_the_disk_is_full(workdir):
    flags = [*PLAIN, '--max_iters=20', '--dtype=float32', 'own.py']
    (workdir / 'own.py').write_text(FILLING.replace('FULL', 'False'))
    run(workdir, 'train.py', *flags, '--out_dir=whole')
    (workdir / 'own.py').write_text(FILLING.replace('FULL', '7 < calls < 18'))
    process = start(workdir, 'train.py', *flags)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert 'WARNING: cannot write out/best.pt' in out and 'training goes on' in out
    assert 'WARNING: cannot write out/metrics.jsonl' in err
    assert steps_in(workdir / 'out')['ckpt.pt'] == 20
    ours, theirs = (metrics(workdir / name) for name in ('out', 'whole'))
    assert [(m['step'], m['train_loss']) for m in ours] == [
        (m['step'], m['train_loss']) for m in theirs
    ]
    # one that stays full costs the last steps, and nothing else
    (workdir / 'own.py').write_text(FILLING.replace('FULL', '7 < calls'))
    process = start(workdir, 'train.py', *flags, '--out_dir=full')
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and err.splitlines()[-1].startswith('error: cannot write')
    assert steps_in(workdir / 'full')['ckpt.pt'] == 5
    (workdir / 'own.py').write_text(FILLING.replace('FULL', 'False'))
    run(workdir, 'train.py', *flags, '--out_dir=full', '--auto_resume')
    assert [m['train_loss'] for m in metrics(workdir / 'full')] == [m['train_loss'] for m in theirs]


@pytest.mark.slow
def test_a_signal_does_not_wait_for_a_long_step(workdir):
    (workdir / 'slow.py').write_text("""
import time

def objective(model, batch):
    global calls
    calls = globals().get('calls', 0) + model.training
    if model.training and calls == 7:
        print('asleep', flush=True)
        time.sleep(600)
    return model(*batch, return_logits=False)[1]
""")
    process = start(workdir, 'train.py', *PLAIN, 'slow.py', '--max_iters=20')
    for line in process.stdout:
        if line == 'asleep\n':
            break
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and 'Traceback' not in err
    assert 'stopped at step 6 after ' in out and '--init_from=resume --out_dir=out' in out
    assert time.monotonic() - began < 60  # and not the ten minutes of the step
    assert steps_in(workdir / 'out')['ckpt.pt'] == 6
    (workdir / 'slow.py').write_text(
        'def objective(model, batch):\n    return model(*batch, return_logits=False)[1]\n'
    )
    run(workdir, 'train.py', *PLAIN, 'slow.py', '--max_iters=20', '--out_dir=whole')
    run(workdir, 'train.py', *PLAIN, 'slow.py', '--max_iters=20', '--auto_resume')
    ours, theirs = (metrics(workdir / name) for name in ('out', 'whole'))
    assert [m['train_loss'] for m in ours] == [m['train_loss'] for m in theirs]


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_an_output_that_nobody_reads_ends_no_run(workdir, number):
    """As with `| tee`, which a Ctrl-C ends as well, and sooner."""
    (workdir / 'slow.py').write_text("""
import time

def objective(model, batch):
    if model.training:
        time.sleep(0.05)
    return model(*batch, return_logits=False)[1]
""")
    process = start(workdir, 'train.py', *PLAIN, 'slow.py', '--max_iters=2000')
    while not process.stdout.readline().startswith('step 6/'):
        pass
    process.stdout.close()
    process.stderr.close()
    process.send_signal(number)
    assert process.wait(timeout=120) == 0
    step = steps_in(workdir / 'out')['ckpt.pt']
    assert step > 6 and f'stopped at step {step}' in (workdir / 'out/train.log').read_text()


@pytest.mark.slow
def test_a_finished_run_that_is_begun_again_stays_as_it_is(workdir):
    flags = [*PLAIN, '--max_iters=12', '--log_interval=5', '--auto_resume']
    run(workdir, 'train.py', *flags)
    before = metrics(workdir / 'out')
    assert before[-1]['step'] == 12 and before[-1]['train_loss']
    assert 'done at step 12' in run(workdir, 'train.py', *flags)
    after = metrics(workdir / 'out')
    for name in ('step', 'train_loss', 'val_loss', 'lr', 'grad_norm', 'step_losses'):
        assert [m.get(name) for m in after] == [m.get(name) for m in before]
