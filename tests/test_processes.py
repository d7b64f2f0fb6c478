"""Several processes: the same run whatever their number, and what happens where one fails.

Each test starts real processes, as a user does.
"""

import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, free_port, kill_tree, metrics, python, run, write_tiny

from fledge import checkpoint

TRAIN = os.path.join(ROOT, 'train.py')
TORCHRUN = ['-m', 'torch.distributed.run']
# four rows a step in all, and two each where there are two processes
RUN = [*TINY, '--batch_size=1', '--gradient_accumulation_steps=4', '--dtype=float32']
RUN += ['--lr_decay_iters=50', '--eval_interval=25', '--sample_interval=25', '--eval_iters=7']
WAYS = [('ddp', 2), ('ddp', 4), ('fsdp', 2), ('fsdp', 4)]

# a config file with which process 1 gets into trouble in its 20th forward pass, once in a folder
TROUBLE = """
import os, signal, time
import model as _model
from fledge import UserError as _UserError
_forward, _passes = _model.GPT.forward, []

def _troubled(self, *args, **kwargs):
    _passes.append(1)
    if len(_passes) == 20 and os.environ['RANK'] == '1' and not os.path.exists('happened'):
        open('happened', 'w').close()
        TROUBLE
    return _forward(self, *args, **kwargs)

_model.GPT.forward = _troubled
"""


def torchrun(cwd, n, *flags, env=None, launcher=None, code=0):
    """train.py in n processes, to their end; returns its output and errors as one text."""
    launcher = launcher or [*TORCHRUN, '--standalone', f'--nproc_per_node={n}']
    done = subprocess.run(
        [python(), *launcher, TRAIN, *flags],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env=os.environ | (env or {}),
    )
    assert bool(done.returncode) == bool(code), done.stdout
    return done.stdout


def assert_close(a, b, tolerance=1e-5):
    """Two runs' losses and norms are the same, line for line, to a tolerance."""
    first, second = metrics(a), metrics(b)
    assert len(first) == len(second)
    for x, y in zip(first, second, strict=True):
        for name in ('step', 'train_loss', 'val_loss', 'val_bpb', 'grad_norm', 'reward_margin'):
            if x.get(name) is not None:
                assert abs(x[name] - y[name]) <= tolerance, (name, x, y)


@pytest.fixture(scope='module')
def room(tmp_path_factory):
    """A folder with a dataset, and 50 steps of one process in `alone`, by Muon."""
    folder = tmp_path_factory.mktemp('processes')
    write_tiny(folder / 'data' / 'tiny')
    run(folder, 'train.py', *RUN, '--max_iters=50', '--out_dir=alone')
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('parallel, n', WAYS)
def test_losses_are_the_same_for_any_number_of_processes(room, parallel, n):
    out_dir = f'{parallel}-{n}'
    flags = [*RUN, f'--parallel={parallel}', '--max_iters=50', f'--out_dir={out_dir}']
    out = torchrun(room, n, *flags)
    assert out.count('step 25: val loss') == 1  # one of them speaks
    assert_close(room / 'alone', room / out_dir)
    texts = [(room / d / 'samples_step_000050.txt').read_text() for d in ('alone', out_dir)]
    assert texts[0] == texts[1]
    saved = [checkpoint.load(str(room / d / 'ckpt.pt')) for d in ('alone', out_dir)]
    for name in ('model', 'optimizer'):
        torch.testing.assert_close(saved[0][name], saved[1][name], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    'first, others', [('ddp', [('ddp', 4), ('fsdp', 2)]), ('fsdp', [('ddp', 1), ('fsdp', 4)])]
)
def test_a_checkpoint_knows_no_number_of_processes(room, first, others):
    """Saved after 25 of 50 steps by two processes, and resumed by others."""
    flags = [f'--parallel={first}', '--max_iters=25', f'--out_dir=half-{first}']
    torchrun(room, 2, *RUN, *flags)
    for parallel, n in others:
        out_dir = f'{first}-then-{parallel}-{n}'
        shutil.copytree(room / f'half-{first}', room / out_dir)
        flags = ['--init_from=resume', '--max_iters=50', f'--parallel={parallel}']
        if n == 1:
            run(room, 'train.py', *flags, f'--out_dir={out_dir}')
        else:
            torchrun(room, n, *flags, f'--out_dir={out_dir}')
        assert_close(room / 'alone', room / out_dir)


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_the_run_is_the_same(tmp_path):
    """With FSDP; tests/test_faults.py kills processes of DDP."""
    write_tiny(tmp_path / 'data' / 'tiny')
    (tmp_path / 'trouble.py').write_text(
        TROUBLE.replace('TROUBLE', 'os.kill(os.getpid(), signal.SIGKILL)')
    )
    flags = [*RUN, '--parallel=fsdp', '--max_iters=20', '--eval_interval=4']
    torchrun(tmp_path, 2, *flags, '--out_dir=whole')
    restarting = [*TORCHRUN, '--standalone', '--nproc_per_node=2', '--max-restarts=3']
    flags = ['trouble.py', *flags, '--auto_resume']
    out = torchrun(tmp_path, 2, *flags, launcher=restarting)
    # torchrun asks the other one to end, which may come first
    assert 'error: process 1 is gone' in out or 'saving and stopping' in out
    assert 'resuming at step' in out
    assert_same_run(tmp_path / 'whole', tmp_path / 'out')


def assert_same_run(a, b):
    """Two runs' losses and checkpoints are equal to the last bit."""
    assert_close(a, b, tolerance=0)
    saved = [checkpoint.load(str(folder / 'ckpt.pt')) for folder in (a, b)]
    for name in ('model', 'optimizer'):
        torch.testing.assert_close(saved[0][name], saved[1][name], atol=0, rtol=0)


@pytest.mark.slow
def test_rows_that_do_not_divide_are_a_line(room):
    flags = [*RUN, '--gradient_accumulation_steps=3', '--out_dir=odd']
    assert '3 rows a step' in torchrun(room, 2, *flags, code=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    'parallel, trouble, words',
    [
        ('ddp', 'raise _UserError("the disk is on fire")', 'error: the disk is on fire'),
        ('fsdp', 'raise IndexError("a mistake")', 'IndexError: a mistake'),
        ('ddp', 'signal.pause()', 'error: process 1 did not come along in 10 s (ddp_timeout)'),
        ('fsdp', 'signal.pause()', 'error: process 1 did not come along in 10 s (ddp_timeout)'),
    ],
)
def test_the_failure_of_one_ends_all_and_is_said_once(room, parallel, trouble, words, tmp_path):
    write_tiny(tmp_path / 'data' / 'tiny')
    # torchrun asks those that are left to end, and this one does
    polite = 'signal.signal(signal.SIGTERM, signal.SIG_DFL); '
    (tmp_path / 'trouble.py').write_text(TROUBLE.replace('TROUBLE', polite + trouble))
    flags = [*RUN, f'--parallel={parallel}', '--max_iters=50', '--ddp_timeout=10']
    out = torchrun(tmp_path, 2, 'trouble.py', *flags, code=1)
    ours, _, of_torchrun = out.partition('torch.distributed.elastic')
    assert out.count(words) == 1, out
    assert out.count('gloo') == 0 and 'train.py FAILED' in of_torchrun


@pytest.mark.slow
def test_what_sharded_parameters_cannot_do_is_a_line(room):
    (room / 'decay.py').write_text(
        'def objective(model, batch):\n'
        '    loss = model(batch["inputs"], batch["targets"])[1]\n'
        '    return loss + model.blocks[0].mlp.c_fc.weight.square().sum()\n'
    )
    flags = [*RUN, '--parallel=fsdp', '--max_iters=2', '--out_dir=cannot']
    out = torchrun(room, 2, 'decay.py', *flags, code=1)
    assert out.count('error: the objective reads parameters') == 1, out


@pytest.mark.slow
def test_a_lost_node_comes_back_and_the_run_is_the_same(tmp_path):
    """Two torchruns on loopback are two nodes; the second is killed with its process."""
    write_tiny(tmp_path / 'data' / 'tiny')
    (tmp_path / 'slow.py').write_text(
        'import time, model as _model\n_forward = _model.GPT.forward\n'
        'def _slow(self, *args, **kwargs):\n'
        '    time.sleep(0.05)\n    return _forward(self, *args, **kwargs)\n'
        '_model.GPT.forward = _slow\n'
    )
    flags = [*RUN, '--max_iters=30', '--eval_interval=5', '--sample_interval=0']
    torchrun(tmp_path, 2, *flags, '--out_dir=whole')
    endpoint = f'127.0.0.1:{free_port()}'
    node = [*TORCHRUN, '--nnodes=2', '--nproc_per_node=1', '--max-restarts=3', '--rdzv_id=run']
    node += ['--rdzv_backend=c10d', f'--rdzv_endpoint={endpoint}', '--local_addr=127.0.0.1']
    script = [TRAIN, 'slow.py', *flags, '--auto_resume', '--ddp_timeout=20']
    # a node that comes back waits for an address for ever where the agents share their store
    env = os.environ | dict(TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1')
    nodes = []

    def start(is_host):  # of loopback's addresses all are everybody's, so that it has to be said
        how = f'is_host={is_host},keep_alive_interval=1,keep_alive_max_attempt=2'
        with open(tmp_path / f'node-{len(nodes)}.log', 'w') as log:
            command = [sys.executable, *node, f'--rdzv_conf={how}', *script]
            options = dict(stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path, env=env)
            nodes.append(subprocess.Popen(command, **options))

    try:
        start(is_host=1)
        start(is_host=0)
        wait_until(lambda: (tmp_path / 'out/ckpt.pt').exists())
        kill_tree(nodes[1])
        start(is_host=0)
        codes = [nodes[i].wait(timeout=300) for i in (0, 2)]
    finally:
        for each in nodes:
            kill_tree(each)
    logs = ''.join((tmp_path / f'node-{i}.log').read_text() for i in range(3))
    assert codes == [0, 0] and 'resuming at step' in logs, logs
    assert_same_run(tmp_path / 'whole', tmp_path / 'out')


def wait_until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_accelerate_launches_what_torchrun_does(room, tmp_path):
    launch = ['-m', 'accelerate.commands.launch', '--num_processes=2', '--cpu']
    env = dict(HF_HOME=str(tmp_path))  # the user's own answers to `accelerate config` play no part
    flags = [*RUN, '--max_iters=50', '--out_dir=accelerated']
    out = torchrun(room, 2, *flags, launcher=launch, env=env)
    assert out.count('done at step 50') == 1
    assert_close(room / 'alone', room / 'accelerated')


@pytest.mark.slow
@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_each_process_orthogonalizes_its_share_of_the_matrices(room, parallel):
    (room / 'count.py').write_text(
        'import atexit, os, fledge.optimizers as _optimizers\n'
        '_one, _counts = _optimizers.orthogonalize, []\n'
        'def _counted(x, dtype):\n    _counts.append(len(x))\n    return _one(x, dtype)\n'
        '_optimizers.orthogonalize = _counted\n'
        # in one piece, for the other process may write at the same time
        'atexit.register(lambda: os.write(1, b"orthogonalized %d\\n" % sum(_counts)))\n'
    )
    flags = [*RUN, f'--parallel={parallel}', '--max_iters=5', '--out_dir=counted']
    out = torchrun(room, 2, 'count.py', *flags)
    # a layer's four parameters hold seven matrices, and each process has one layer's
    assert out.count('orthogonalized 35\n') == 2
