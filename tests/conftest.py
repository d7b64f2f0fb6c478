"""What several test files need: small datasets, and the scripts run as a user runs them."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
SHARED = os.path.join(os.path.dirname(ROOT), 'shared', 'data')  # real data, where it is at hand
if os.path.isdir(os.path.join(SHARED, 'tiktoken')):
    os.environ.setdefault('TIKTOKEN_CACHE_DIR', os.path.join(SHARED, 'tiktoken'))
# small models are fastest on one thread, and two test processes at once do not fight over the cores
os.environ.update(OMP_NUM_THREADS='1', WANDB_MODE='offline', WANDB_SILENT='true')

# a model that trains in seconds; the settings that every such run shares
TINY = ['--dataset=tiny', '--n_layer=2', '--n_head=2', '--n_kv_head=1', '--head_dim=8', '--n_embd=16', '--block_size=16', '--batch_size=4', '--device=cpu',
        '--max_minutes=0', '--warmup_iters=5', '--learning_rate=0.006', '--sample_tokens=8', '--log_interval=1', '--eval_interval=30', '--eval_iters=2', '--sample_interval=30']


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.get_closest_marker('slow'))  # first, so that no process waits for the other's at the end


def shared(*parts):
    """The path of a real data file; the test is skipped where it is not at hand."""
    path = os.path.join(SHARED, *parts)
    if not os.path.exists(path):
        pytest.skip(f'{"/".join(parts)} is not at hand')
    return path


def start(cwd, script, *args, env=None, **options):
    """Start a script of ours in cwd; returns the Popen."""
    return subprocess.Popen([sys.executable, os.path.join(ROOT, script), *args], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | (env or {}), **options)


def run(cwd, script, *args, code=0, env=None):
    """Run a script of ours in cwd to its end, which must be exit code `code`; returns its stdout, or stderr for a failure."""
    process = start(cwd, script, *args, env=env)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()  # one that hangs does not stay
    assert process.returncode == code, f'exit code {process.returncode}\n{out}\n{err}'
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
    """A dataset of `vocab_size` byte tokens with some order in it, as a prepare script leaves it."""
    from fledge.tokenizer import char_tokenizer
    from fledge.tokens import BinWriter
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for split, n in (('train', n_train), ('val', n_val)):
        with BinWriter(str(folder / f'{split}.bin'), vocab_size) as f:
            f.write(np.cumsum(rng.integers(0, 3, n)) % vocab_size)
    char_tokenizer([chr(10)] + [chr(40 + i) for i in range(vocab_size - 1)]).save(str(folder / 'tokenizer.json'))
    (folder / 'meta.json').write_text(json.dumps(dict(vocab_size=vocab_size, splits={})))


@pytest.fixture
def workdir(tmp_path):
    """A folder to run scripts in, with data/tiny."""
    write_tiny(tmp_path / 'data' / 'tiny')
    return tmp_path
