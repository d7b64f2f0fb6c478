"""All that bench.py measures, one part after another, as one table; and its processes."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import psutil
import torch

from fledge import UserError
from fledge.device import Machine
from fledge.plan import memory_of

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SECONDS = 570  # for all parts together
MOST_SECONDS = 240  # for one of them


def parts_of(machine: Machine, nanogpt: str) -> dict[str, list[str] | None]:
    """{title: arguments of bench.py}, the parts on a Machine; nanogpt: a checkout's folder, or ''.

    Those of the model's tests are None.
    """
    on_gpu = machine.type == 'cuda'
    n_rows = 1
    if on_gpu:
        # three models are there at once, each of about 2 GB and at most 1.5 GB a row
        n_rows = int(min(16, max(1, memory_of(machine) // 7e9)))
    gpt2 = os.path.join(ROOT, 'config', 'gpt2_124m.py')
    shakespeare = os.path.join(ROOT, 'config', 'shakespeare_char_fast.py')
    compare = f'--compare={nanogpt}'
    # on a CPU compiling takes longer than there is time for
    compiled = '--compile=True' if on_gpu else '--compile=False'
    generate = ['--only=generate', '--compare=transformers', '--new_tokens=64']
    texts = [*generate, compiled]
    training = ['--only=train', compare, compiled, f'--batch_size={n_rows}']
    return {
        "the model's tests": None,
        f'training, 124M, {n_rows} x 1,024 tokens': [gpt2, *training],
        "time to nanoGPT's val loss": [shakespeare, '--only=loss', compare, '--rounds=1'],
        'generation, 124M, one text': [gpt2, *texts],
        'generation, 124M, 16 texts': [gpt2, *texts, '--streams=16'],
        'generation, default, one text': texts,
        'generation, 124M, one text, 8-bit weights': [gpt2, *generate, '--quantize=int8'],
    }


def process_of_its_own() -> ProcessPoolExecutor:
    """A new process that runs functions one after another, and ends when this one does."""
    context = multiprocessing.get_context('spawn')
    return ProcessPoolExecutor(1, context, initializer=end_with_parent)


def ask(process: ProcessPoolExecutor, name: str, function: Callable, *arguments) -> object:
    """What function(*arguments) returns in a process; UserError, name in front, where it fails."""
    try:
        return process.submit(fail_in_a_line, function, *arguments).result()
    except BrokenProcessPool:
        raise UserError(f'{name}: its process died; is the memory too small?') from None
    except UserError as e:
        raise UserError(f'{name}: {e}') from None


def fail_in_a_line(function: Callable, *arguments) -> object:
    """Call a function; what it raises becomes a UserError, which any process can read."""
    try:
        return function(*arguments)
    except UserError:
        raise
    except Exception as e:
        why = ' '.join(str(e).split())[:200]
        raise UserError(f'{type(e).__name__}: {why}') from None


def end_with_parent() -> None:
    """From now on, end this process and all that it has started when its parent ends.

    A parent that is killed cannot end its children itself. Ctrl-C ends it at once: of that the
    parent speaks.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def wait_and_end():
        multiprocessing.parent_process().join()
        kill_all(psutil.Process().children(recursive=True))
        os._exit(1)

    threading.Thread(target=wait_and_end, daemon=True).start()


def kill_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def run_process(command: list[str], seconds: float, **options) -> tuple[int, str, str]:
    """Run a command for at most so many seconds; returns its exit code, stdout and stderr.

    options: see subprocess.Popen. UserError where that is too short.
    """
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, **pipes, **options)
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        kill_all(family)
        process.wait()
        psutil.wait_procs(family, timeout=5)  # the next part has the machine to itself
        raise UserError(f'not done after {seconds:.0f} s') from None
    return process.returncode, out, err


def run_tests(machine: Machine, seconds: float) -> dict:
    """Run test_model.py on a Machine; returns what pytest counts, as its last line says."""
    command = [sys.executable, '-m', 'pytest', 'test_model.py']
    env = os.environ | dict(FLEDGE_TEST_DEVICE=machine.device)
    code, out, err = run_process(command, seconds, cwd=ROOT, env=env)
    if code > 1:  # 1: some tests fail, as that line says; else there were none
        raise UserError(last_line(err or out))
    return dict(tests=last_line(out).strip('= '))


def run_bench(arguments: list[str], seconds: float) -> dict:
    """Run bench.py; returns its JSON object. UserError says why there is none."""
    command = [sys.executable, os.path.join(ROOT, 'bench.py'), *arguments, '--json']
    code, out, err = run_process(command, seconds)
    if code:
        raise UserError(last_line(err).removeprefix('error: '))
    return json.loads(last_line(out))


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ['it ended without a word'])[-1]


def cells(result: dict) -> tuple[str, str]:
    """Two cells of the table: what a part measured of ours, and of those beside it."""
    if 'failed' in result:
        return 'failed: ' + result['failed'].replace('|', '/'), ''
    if 'tests' in result:
        return result['tests'], ''
    if 'loss' in result:
        ours, theirs, ratio = (result[k] for k in ('fledge_seconds', 'nanogpt_seconds', 'ratio'))
        if ours is None:
            return f'{result["loss"]:.3f} was not reached', f'nanoGPT {theirs:.1f} s'
        return f'{ours:.1f} s to {result["loss"]:.3f}', f'nanoGPT {theirs:.1f} s: {ratio:.2f}x'
    if 'train_tokens_per_second' in result:
        speed, share = result['train_tokens_per_second'], result['peak_share']
        memory = result['train_peak_memory'] / 1e9
        ours = f'{speed:,.0f} tokens/s, {share:.0%} of the matmul peak, {memory:.1f} GB'
        peers = result['train_peers']
    else:
        speed, share = result['decode_tokens_per_second'], result['bandwidth_share']
        ours = f'{speed:,.0f} tokens/s, {share:.0%} of what memory gives'
        peers = result['generate_peers']
    beside = [f'{p["name"]} {p["tokens_per_second"]:,.0f}: {p["ratio"]:.2f}x' for p in peers]
    return ours, '; '.join(beside)


def run_all(machine: Machine, nanogpt: str, flags: list[str]) -> dict:
    """Measure all parts and print them as they come, then as a table; returns a dict of all.

    flags: of bench.py, for each part, such as --device=cpu. A part that fails says so, and the
    others go on; what has no time left fails.
    """
    end, results = time.monotonic() + SECONDS, {}
    for title, arguments in parts_of(machine, nanogpt).items():
        began = time.monotonic()
        seconds = max(1, min(MOST_SECONDS, end - began))
        try:
            if arguments is None:
                result = run_tests(machine, seconds)
            else:
                result = run_bench(['--rounds=3', '--seconds=1', *arguments, *flags], seconds)
        except UserError as e:
            result = dict(failed=str(e))
        result['took'] = time.monotonic() - began
        results[title] = result
        words = '; '.join(filter(None, cells(result)))
        print(f'{title}: {words} ({result["took"]:.0f} s)', flush=True)
    versions = f'torch {torch.__version__}'
    if machine.type == 'cuda':
        versions += f', CUDA {torch.version.cuda}'
    date = time.strftime('%Y-%m-%d')
    print(f'\nOn {machine.hardware()}, {torch.get_num_threads()} threads, {versions}, {date}:\n')
    print('| `bench.py --all` | fledge | beside it | took |\n|---|---|---|---|')
    for title, result in results.items():
        ours, beside = cells(result)
        print(f'| {title} | {ours} | {beside} | {result["took"]:.0f} s |')
    return dict(hardware=machine.hardware(), date=date, versions=versions, parts=results)
