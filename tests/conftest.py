"""What several test files need: small datasets, and the scripts run as a user runs them."""

import atexit
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor

import fork_server
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
os.environ['TORCHINDUCTOR_COMPILE_THREADS'] = '1'  # no processes that import torch to compile
# what is imported a thousand times is compiled once, even where somebody has turned that off
os.environ.pop('PYTHONDONTWRITEBYTECODE', None)
sys.dont_write_bytecode = False

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


def start(cwd, script, *args, env=None, own=False, **options):
    """Start a script of ours in cwd; returns the Popen, or what stands in for it.

    With options of subprocess.Popen, or where own is true, it is a Python of its own: of some
    variables it matters that they are there when Python begins, or torch is imported.
    """
    command = [os.path.join(ROOT, script), *args]
    if own or options:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | (env or {}),
            **options,
        )
    return Child(cwd, *command, env=env)


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


# What each server has imported before it forks: the scripts in prepare/ need no torch, and
# export.py alone opens what it wrote with transformers. datasets and huggingface_hub read the
# environment when they are imported, and so are not among the others' modules.
TORCH = (
    'numpy torch torch._dynamo torch.distributed.launcher.api tokenizers tiktoken jinja2 psutil'
    ' matplotlib.figure matplotlib.backends.backend_agg matplotlib.font_manager safetensors.torch'
    ' filelock tqdm PIL.GifImagePlugin PIL.JpegImagePlugin PIL.PngImagePlugin PIL.PpmImagePlugin'
)
MODELS = ('auto', 'gpt2', 'llama', 'qwen2', 'qwen3')
SERVERS = dict(
    prepare='numpy pyarrow.parquet pandas tokenizers tiktoken tqdm filelock jinja2 fsspec httpx'
    ' dill xxhash multiprocess psutil',
    torch=TORCH,
    export=f'{TORCH} accelerate gguf transformers.generation '
    + ' '.join(f'transformers.models.{name}.modeling_{name}' for name in MODELS),
)
# name: its folder; a process that another one started has those of that one
servers = json.loads(os.environ.get('FORK_SERVERS', '{}'))
processes = []  # of those that this one started, and that run until it ends


def start_servers(*names):
    """Start some of SERVERS, and wait until they are ready."""
    begun = len(processes)
    for name in names:
        folder = servers[name] = tempfile.mkdtemp(prefix='fork-')
        atexit.register(shutil.rmtree, folder)
        command = [sys.executable, fork_server.__file__, folder, *SERVERS[name].split()]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        processes.append(subprocess.Popen(command, **pipes))
    for process in processes[begun:]:
        assert process.stdout.readline() == b'ready\n', 'a fork server did not start'


def pytest_configure(config):
    """Where several processes test, as with -n 8, the first one starts the servers of all."""
    if config.getoption('numprocesses', None) and not servers:
        start_servers(*SERVERS)
        os.environ['FORK_SERVERS'] = json.dumps(servers)


def server(name):
    """The folder of one of SERVERS."""
    if name not in servers:
        start_servers(name)
    return servers[name]


def python():
    """What runs a script or a module as sys.executable does, without its import of torch."""
    return os.path.join(server('torch'), 'python')


class Child:
    """A script in a child of fork_server.py, with the methods and attributes of a Popen.

    Its standard output and error are pipes, or files with these numbers.
    """

    def __init__(self, cwd, *command, env=None, out=None, err=None):
        script = ' '.join(command[:3])
        kind = 'prepare' if f'{os.sep}prepare{os.sep}' in script else 'torch'
        if 'export.py' in script and not env:
            kind = 'export'
        self.args, self.returncode = command, None
        with contextlib.ExitStack() as theirs:
            streams = {0: os.open(os.devnull, os.O_RDONLY), 1: out, 2: err}
            theirs.callback(os.close, streams[0])
            for place, name in ((1, 'stdout'), (2, 'stderr')):
                if streams[place] is None:
                    ours, streams[place] = os.pipe()
                    theirs.callback(os.close, streams[place])
                    setattr(self, name, os.fdopen(ours))
            env = os.environ | (env or {})
            self.pid, self.connection = fork_server.ask(server(kind), command, cwd, env, streams)

    def wait(self, timeout=None):
        if self.returncode is None:
            self.connection.settimeout(timeout)
            try:
                self.returncode = fork_server.hear(self.connection)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout) from None
            self.connection.close()
        return self.returncode

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def communicate(self, timeout=None):
        with ThreadPoolExecutor(1) as thread:
            err = thread.submit(self.stderr.read)
            alarm = threading.Timer(timeout or 600, self.kill)  # one that hangs does not stay
            alarm.start()
            out = self.stdout.read()
            self.wait()
            alarm.cancel()
            return out, err.result()

    def send_signal(self, number):
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stdout.close()
        self.stderr.close()
        self.wait()


def forked(cwd, path, *args, env=None):
    """Run a script in cwd to its end; returns its exit code, stdout and stderr."""
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        child = Child(cwd, path, *args, env=env, out=out.fileno(), err=err.fileno())
        try:
            code = child.wait(300)
        finally:
            child.kill()  # one that hangs does not stay
        out.seek(0), err.seek(0)  # the child's places are ours
        return code, out.read().decode(), err.read().decode()


def run(cwd, script, *args, code=0, env=None):
    """Run a script of ours in cwd to its end, which must be exit code `code`; returns its stdout,
    or stderr for a failure."""
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
