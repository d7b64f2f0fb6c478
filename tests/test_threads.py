"""Threads beside other programs: real ones, that keep every core busy."""

import subprocess
import sys
import time

import psutil
import pytest
import torch

from fledge.threads import Threads

OTHERS = psutil.cpu_count()
SCRIPT = """
import os, sys, time
os.environ.pop('OMP_NUM_THREADS', None)
if sys.argv[1:]:
    os.environ['OMP_NUM_THREADS'] = sys.argv[1]
import torch
from fledge.threads import Threads

Threads.INTERVAL = 0.5
torch.set_num_threads(2)
threads = Threads()
for _ in range(200):
    threads.adapt(lambda text: print(text, flush=True))
    print(torch.get_num_threads(), flush=True)
    time.sleep(0.1)
"""


@pytest.fixture
def busy_programs():
    """As many programs that do nothing but compute as there are cores."""
    spin = [sys.executable, '-c', 'while True: pass']
    programs = [subprocess.Popen(spin) for _ in range(OTHERS)]
    yield programs
    for program in programs:
        program.kill()
        program.wait()


def start(*args):
    command = [sys.executable, '-c', SCRIPT, *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.skipif(OTHERS < 2, reason='a machine of one core has no thread to give up')
def test_threads_are_given_up_to_other_programs(busy_programs):
    process = start()
    try:
        lines = iter(process.stdout.readline, '')
        said = next(line for line in lines if 'other programs use' in line)
        assert said.endswith('threads here: 1\n')
        assert next(lines) == '1\n'
    finally:
        process.kill()
        process.wait()


def test_threads_are_taken_back_where_cores_are_free(monkeypatch):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        threads = Threads()
        threads.cores = range(1000)  # those that are not there are free, whatever else runs here
        threads.began -= Threads.INTERVAL
        torch.set_num_threads(1)
        said = []
        threads.adapt(said.append)
        assert torch.get_num_threads() == 2 and said[0].endswith('threads here: 2')
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_a_number_of_threads_that_was_asked_for_stays(busy_programs):
    process = start('2')
    began = time.monotonic()
    lines = []
    while time.monotonic() - began < 2:
        lines.append(process.stdout.readline())
    process.kill()
    process.wait()
    assert set(lines) == {'2\n'}
