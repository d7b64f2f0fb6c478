"""How many threads a process takes on a CPU that other programs use as well."""

import os
import time
from collections.abc import Callable

import psutil
import torch

from fledge import usable_cores


class Threads:
    """As many of torch's threads as there are cores that other programs leave.

    OpenMP's threads wait for one another by spinning. With one more than there are free cores each
    wait takes a turn of the scheduler: beside one busy program on two cores a step takes twelve
    times as long, with a thread fewer less than twice. OMP_NUM_THREADS holds where it is set, as it
    is in each of several processes by torchrun.
    """

    INTERVAL = 2.0  # seconds between two looks at the other programs
    FIRST = 0.5  # and before the first one: a run begins with an evaluation, which takes longer

    def __init__(self):
        self.most = torch.get_num_threads()
        if 'OMP_NUM_THREADS' in os.environ:
            self.most = 1
        self.cores = usable_cores()
        self.wait = self.FIRST
        self.start_interval()

    def start_interval(self) -> None:
        self.began, self.used = time.monotonic(), time.process_time()
        psutil.cpu_percent(percpu=True)  # the next call tells what has been used since this one

    def adapt(self, say: Callable | None = None) -> None:
        """Give up threads, or take them back, now and then; say(text) is told of it."""
        seconds = time.monotonic() - self.began
        if self.most == 1 or seconds < self.wait:
            return
        busy = psutil.cpu_percent(percpu=True)
        busy = sum(busy[core] for core in self.cores if core < len(busy)) / 100
        others = max(0.0, busy - (time.process_time() - self.used) / seconds)
        self.wait = self.INTERVAL
        self.start_interval()
        n_threads = int(len(self.cores) - others + 0.4)  # less than 0.4 of a core is no program
        n_threads = min(max(n_threads, 1), self.most)
        if n_threads == torch.get_num_threads():
            return
        torch.set_num_threads(n_threads)
        if say:
            n_cores = len(self.cores)
            say(f'other programs use {others:.1f} of {n_cores} cores; threads here: {n_threads}')
