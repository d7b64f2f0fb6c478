"""The device and its precision; and all CPU paths again, as a CPU without AVX512 takes them."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, python, run

from fledge import UserError, cpu
from fledge.device import Machine, choose_device, choose_dtype, peak_flops, set_threads

AVX2 = dict(ATEN_CPU_CAPABILITY='avx2', ONEDNN_MAX_CPU_ISA='AVX2', MKL_ENABLE_INSTRUCTIONS='AVX2')
AVX2['FBGEMM_ENABLE_INSTRUCTIONS'] = 'AVX2'


@pytest.mark.slow
@pytest.mark.parametrize(
    'path',
    ['test_model.py', 'tests/test_cpu.py', 'tests/test_quantize.py', 'tests/test_optimizers.py'],
)
def test_cpu_paths_hold_on_avx2(path):
    """Most laptops are such machines; a newer one plays the part."""
    if cpu.kind() == 'AVX2':
        pytest.skip('as they were tested here already')
    command = [python(), '-m', 'pytest', '-n', '0', '-x', path]
    # what is compiled is no path of fledge/cpu.py
    command += ['--deselect=test_model.py::test_one_compiled_decode_step_serves_a_generation']
    done = subprocess.run(command, cwd=ROOT, env=os.environ | AVX2, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_a_cpu_trains_in_what_it_multiplies_in(workdir):
    out = run(workdir, 'train.py', *TINY, '--max_iters=2', env=AVX2)
    assert 'cpu in float32' in out
    native = 'bfloat16' if cpu.has_bfloat16() else 'float32'
    assert f'cpu in {native}' in run(workdir, 'train.py', *TINY, '--max_iters=2')


def test_precisions():
    assert choose_dtype('float16', 'cpu') == torch.float32  # nanoGPT's default, where it has no GPU
    assert choose_dtype('bfloat16', 'cpu') == torch.bfloat16
    with pytest.raises(UserError, match='none of auto'):
        choose_dtype('float8', 'cpu')
    muons = torch.bfloat16 if cpu.kind() == 'AMX' else torch.float32
    assert Machine('cpu', 'bfloat16').muon_dtype == muons
    assert Machine('cpu', 'float32').muon_dtype == torch.float32
    with pytest.raises(UserError, match='cannot be used here'):
        choose_device('meta')


def test_a_process_alone():
    machine = Machine('cpu', 'float32')
    assert machine.main and machine.share(12) == 12 and machine.gather(3) == [3]
    assert machine.mean(torch.tensor(2.0)) == 2.0 and machine.peak_memory() > 1e7


def test_the_first_product_is_not_the_peak(monkeypatch):
    """An accelerator's first one takes as long as all that are measured: it loads its kernels."""
    product, calls = torch.Tensor.__matmul__, []

    def slow_at_first(a, b):
        calls.append(1)
        if len(calls) == 1:
            time.sleep(0.2)
        return product(a, b)

    monkeypatch.setattr(torch.Tensor, '__matmul__', slow_at_first)
    assert peak_flops('cpu', torch.float32) > 1e9  # with the first one 1.7e8


@pytest.mark.skipif(not hasattr(os, 'sched_setaffinity'), reason='this system binds no process')
def test_processes_share_the_cores_that_a_scheduler_left_them(monkeypatch):
    cores, chosen = os.sched_getaffinity(0), []
    monkeypatch.setenv('OMP_NUM_THREADS', '1')  # as torchrun sets it
    monkeypatch.setattr(torch, 'set_num_threads', chosen.append)
    try:
        os.sched_setaffinity(0, {min(cores)})
        set_threads()
    finally:
        os.sched_setaffinity(0, cores)
    assert chosen == [1]


HUGE_PAGES = Path('/sys/kernel/mm/transparent_hugepage/enabled')
has_huge_pages = HUGE_PAGES.exists() and '[never]' not in HUGE_PAGES.read_text()


@pytest.mark.slow
@pytest.mark.skipif(not has_huge_pages or 'glibc' not in platform.libc_ver(), reason='for Linux')
def test_a_large_tensor_lies_in_large_pages():
    code = (
        'import torch\n'
        'from fledge.device import keep_memory\n'
        'keep_memory()\n'
        'x = torch.ones(16 << 20)\n'
        "print(open('/proc/self/smaps_rollup').read())"
    )
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    [line] = [line for line in found.stdout.splitlines() if line.startswith('AnonHugePages')]
    assert int(line.split()[1]) > 32 << 10  # KB, of 64 MB
