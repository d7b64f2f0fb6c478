"""What several test files need: small datasets, and the scripts run as a user runs them."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile

import numpy as np
import psutil
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
SHARED = os.path.join(os.path.dirname(ROOT), 'shared', 'data')  # real data, where it is at hand
if os.path.isdir(os.path.join(SHARED, 'tiktoken')):
    os.environ.setdefault('TIKTOKEN_CACHE_DIR', os.path.join(SHARED, 'tiktoken'))
# small models are fastest on one thread, and two test processes at once do not fight over the cores
os.environ.update(OMP_NUM_THREADS='1', WANDB_MODE='offline', WANDB_SILENT='true')

# a model that trains in seconds; the settings that every such run shares
TINY = [
    '--dataset=tiny',
    '--n_layer=2',
    '--n_head=2',
    '--n_kv_head=1',
    '--head_dim=8',
    '--n_embd=16',
    '--block_size=16',
    '--batch_size=4',
    '--device=cpu',
    '--max_minutes=0',
    '--warmup_iters=5',
    '--learning_rate=0.006',
    '--sample_tokens=8',
    '--log_interval=1',
    '--eval_interval=30',
    '--eval_iters=2',
    '--sample_interval=30',
]


def pytest_collection_modifyitems(items):
    items.sort(
        key=lambda item: not item.get_closest_marker('slow')
    )  # first, so that no process waits for the other's at the end


def shared(*parts):
    """The path of a real data file; the test is skipped where it is not at hand."""
    path = os.path.join(SHARED, *parts)
    if not os.path.exists(path):
        pytest.skip(f'{"/".join(parts)} is not at hand')
    return path


def start(cwd, script, *args, env=None, **options):
    """Start a script of ours in cwd; returns the Popen."""
    return subprocess.Popen(
        [sys.executable, os.path.join(ROOT, script), *args],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | (env or {}),
        **options,
    )


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def kill_tree(process):
    """Kill a Popen and what it has started, as a power cut does."""
    if process.poll() is not None:
        return
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()  # first: torchrun would start the others again
    for child in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


# Most of a short script's time is the import of torch, and of torch._dynamo, which the first
# optimizer imports. A process that has done both forks one child a script, which then runs as by
# itself.
FORKS = """
import atexit, json, os, runpy, signal, sys
import torch._dynamo
for job in map(json.loads, sys.stdin):
    child = os.fork()
    if not child:
        signal.alarm(300)  # one that hangs does not stay
        os.chdir(job['cwd'])
        os.environ.clear()
        os.environ.update(job['env'])
        for number, path in enumerate((os.devnull, job['out'], job['err'])):
            os.dup2(os.open(path, os.O_RDWR), number)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, 'w'), open(2, 'w')
        sys.argv, sys.path[0], code = job['argv'], os.path.dirname(job['argv'][0]), 0
        try:
            try:
                runpy.run_path(sys.argv[0], run_name='__main__')
            except SystemExit:
                raise
            except BaseException:
                code = 1
                sys.excepthook(*sys.exc_info())
        except SystemExit as e:
            code = e.code or 0
        atexit._run_exitfuncs()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
forks = None


def forked(cwd, path, *args, env=None):
    """Run a script in cwd to its end; returns its exit code, stdout and stderr."""
    global forks
    forks = forks or subprocess.Popen(
        [sys.executable, '-c', FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        job = dict(
            cwd=str(cwd),
            argv=[path, *args],
            env=os.environ | (env or {}),
            out=out.name,
            err=err.name,
        )
        print(json.dumps(job), file=forks.stdin, flush=True)
        return int(forks.stdout.readline()), out.read().decode(), err.read().decode()


def run(cwd, script, *args, code=0, env=None):
    """Run a script of ours in cwd to its end, which must be exit code `code`; returns its stdout,
    or stderr for a failure."""
    if script.startswith('prepare/'):  # which import no torch
        process = start(cwd, script, *args, env=env)
        try:
            out, err = process.communicate(timeout=300)
        finally:
            process.kill()  # one that hangs does not stay
        returned = process.returncode
    else:
        returned, out, err = forked(cwd, os.path.join(ROOT, script), *args, env=env)
    assert returned == code, f'exit code {returned}\n{out}\n{err}'
    return out if code == 0 else err


def fails(cwd, script, *args, env=None):
    """Run a script that must stop with exit code 2 and one line; returns that line."""
    err = run(cwd, script, *args, code=2, env=env)
    assert err.startswith('error: ') and err.count('\n') == 1, err
    return err


def metrics(folder):
    with open(os.path.join(folder, 'metrics.jsonl')) as f:
        return [json.loads(line) for line in f]


def write_tiny(folder, n_train=4000, n_val=500, vocab_size=64):
    """A dataset of `vocab_size` byte tokens with some order, as a prepare script leaves it."""
    from fledge.tokenizer import char_tokenizer
    from fledge.tokens import write_bin

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for split, n in (('train', n_train), ('val', n_val)):
        ids = np.cumsum(rng.integers(0, 3, n)) % vocab_size
        write_bin(str(folder / f'{split}.bin'), ids, vocab_size)
    char_tokenizer([chr(10)] + [chr(40 + i) for i in range(vocab_size - 1)]).save(
        str(folder / 'tokenizer.json')
    )
    (folder / 'meta.json').write_text(json.dumps(dict(vocab_size=vocab_size, splits={})))


def write_chatterbox(folder, tokenizer, letters, block_size):
    """A run whose model says these letters at random and never ends.

    As one that was tuned on conversations it knows how an answer ends: with a full stop.
    """
    import torch

    from fledge import checkpoint
    from model import GPT, GPTConfig

    sizes = dict(n_layer=1, n_head=1, n_embd=8, block_size=block_size)
    sizes['vocab_size'] = tokenizer.vocab_size
    model = GPT(GPTConfig(position='rope', tie_embeddings=False, **sizes))
    with torch.no_grad():
        for layer in (model.transformer.h[0].attn.c_proj, model.transformer.h[0].mlp.c_proj):
            layer.weight.zero_()  # what comes next depends on the last token alone
        usual, stop = model.transformer.ln_f(torch.eye(8)[:2])
        model.transformer.wte.weight.copy_(torch.eye(8)[0])
        model.lm_head.weight.copy_(-12 * usual)
        model.lm_head.weight[tokenizer.encode(letters)] = 0
        if '<|im_end|>' in tokenizer.special:
            model.transformer.wte.weight[tokenizer.encode('.')] = torch.eye(8)[1]
            model.lm_head.weight[tokenizer.special['<|im_end|>']] = 12 * stop
    folder.mkdir()
    args = checkpoint.model_args(model.config)
    saved = dict(model=model.state_dict(), model_args=args, config={}, iter_num=1)
    checkpoint.save(str(folder / 'ckpt.pt'), saved)
    tokenizer.save(str(folder / 'tokenizer.json'))


@pytest.fixture
def workdir(tmp_path):
    """A folder to run scripts in, with data/tiny."""
    write_tiny(tmp_path / 'data' / 'tiny')
    return tmp_path
