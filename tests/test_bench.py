"""bench.py: what it prints and measures, beside a stand-in for nanoGPT, on models of nearly no size
(README's commands show transformers)."""

import json
import math
import os
import signal
import subprocess
import sys

import psutil
import pytest
from conftest import ROOT, fails, metrics, python, run, start, write_tiny
from test_device import AVX2

from fledge import UserError, benchmark, cpu, time_to_loss
from fledge.configurator import read_settings
from fledge.log import read_metrics

SIZE = [
    '--n_layer=1',
    '--n_head=2',
    '--n_kv_head=1',
    '--head_dim=8',
    '--n_embd=16',
    '--block_size=32',
    '--batch_size=2',
    '--vocab_size=64',
    '--device=cpu',
    '--rounds=3',
    '--seconds=0.2',
    '--new_tokens=20',
    '--prompt_tokens=5',
    '--json',
]
NANOGPT = """
from dataclasses import dataclass
import torch
from torch import nn
@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool
class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size)
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(
            self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay
        )
    def forward(self, idx, targets):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        logits = self.head(x)
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-1
        )
        return logits, loss
    def generate(self, idx, n):
        for _ in range(n):
            idx = torch.cat((idx, self.head(self.wte(idx[:, -1:])).argmax(-1)), 1)
        return idx
"""


def result(out):
    return json.loads(out.splitlines()[-1])


@pytest.fixture
def checkout(workdir):
    """workdir with a stand-in for nanoGPT in theirs/."""
    (workdir / 'theirs').mkdir()
    (workdir / 'theirs' / 'model.py').write_text(NANOGPT)
    return workdir


@pytest.mark.slow
def test_training_and_generation_beside_a_checkout(checkout):
    out = run(
        checkout,
        'bench.py',
        '--dataset=tiny',
        '--compare=theirs',
        '--profile',
        '--quantize=int8',
        *SIZE,
    )
    r = result(out)
    assert {p['name'] for p in r['train_peers']} == {'nanoGPT, eager', 'nanoGPT, compiled'} and [
        p['name'] for p in r['generate_peers']
    ] == ['nanoGPT']
    for p in r['train_peers'] + r['generate_peers']:
        assert (
            p['tokens_per_second'] > 0
            and p['ratio_range'][0] <= p['ratio'] <= p['ratio_range'][1]
            and p['peak_memory'] > 1e8
            and p['parameters'] == (32 + 64 + 64) * 16 + 64
        )
    for ours, peers in (('train', 'train_peers'), ('decode', 'generate_peers')):
        for p in r[peers]:
            low, high = p['ratio_range']  # a ratio of medians is among the ratios of pairs
            ratio = r[f'{ours}_tokens_per_second'] / p['tokens_per_second']
            assert low * 0.999 < ratio < high * 1.001
    assert r['cpu'] == cpu.kind() and r['cpu'] in out.splitlines()[-2]
    assert (
        0 < r['peak_share'] < 1
        and 0 < r['bandwidth_share'] < 1
        and r['train_tokens_per_second'] > 0
        and r['decode_tokens_per_second'] > 0
    )
    assert (
        list(r['parts']) == ['data', 'forward', 'head and loss', 'backward', 'optimizer']
        and min(r['parts'].values()) > 0
    )
    assert (
        r['first_token_seconds'] > 0
        and r['forward_seconds'] > 0
        and r['matmul_peak'] > 1e9
        and r['memory_bandwidth'] > 1e8
    )
    for name in (
        'bench_train.json',
        'bench_generate.json',
    ):  # what Perfetto opens: Chrome's trace format
        events = json.loads((checkout / name).read_text())['traceEvents']
        assert any('mm' in e.get('name', '') for e in events)
    for word in (
        'of matmul peak',
        'of memory read',
        'peak memory',
        'head and loss',
        'nanoGPT, compiled',
    ):
        assert word in out


@pytest.mark.slow
@pytest.mark.parametrize(
    'flags, words',
    [
        (['--only=sample'], "only='sample' is none of train, generate, loss, all"),
        (['--only=loss'], 'name a checkout of it'),
        (['--compare=nowhere'], 'neither transformers nor a folder'),
        (['--compare=transformers', '--only=train'], 'for generation'),
        (['--prompt_tokens=13'], 'longer than block_size=32'),
        (['--n_head=3', '--n_kv_head=2'], 'n_head=3'),
    ],
)
def test_bad_input_is_one_line(tmp_path, flags, words):
    assert words in fails(tmp_path, 'bench.py', *SIZE, *flags)


@pytest.mark.slow
@pytest.mark.parametrize(
    'text, words',
    [
        ('GPT = 3', 'is no nanoGPT checkout'),
        ('raise ValueError("a slip")', 'nanoGPT, eager: ValueError: a slip'),
        ('import os; os._exit(1)', 'nanoGPT, eager: its process died'),
    ],
)
def test_a_peer_that_fails_is_one_line(tmp_path, text, words):
    (tmp_path / 'model.py').write_text(text)
    assert words in fails(tmp_path, 'bench.py', '--only=train', '--compare=.', *SIZE)


@pytest.mark.slow
@pytest.mark.parametrize(
    'text, words',
    [
        ('raise ValueError("a slip")', 'nanoGPT: ValueError: a slip'),
        ('import os; os._exit(1)', 'nanoGPT: its process died'),
    ],
)
def test_a_peer_that_fails_in_the_race_to_a_loss_is_one_line(checkout, text, words):
    write_tiny(checkout / 'data' / 'tiny')
    (checkout / 'theirs' / 'model.py').write_text(text)
    assert words in fails(checkout, 'bench.py', *LOSS, '--rounds=1')


@pytest.mark.slow
def test_a_cpu_that_plays_a_smaller_one_is_named_as_that(workdir):
    out = run(workdir, 'bench.py', '--only=train', '--dataset=tiny', *SIZE, env=AVX2)
    assert result(out)['cpu'] == 'AVX2' and '(AVX2), 1 threads' in out.splitlines()[-2]


LOSS = ['--dataset=tiny', '--only=loss', '--compare=theirs', *SIZE, '--block_size=64']
LOSS += ['--batch_size=8', '--n_embd=32', '--max_minutes=0']


@pytest.mark.slow
def test_seconds_to_nanogpts_loss(checkout):
    write_tiny(checkout / 'data' / 'tiny', n_train=60_000, n_val=3000)
    slow = NANOGPT.replace('self.head(x)', 'self.head(x) / 10')
    (checkout / 'theirs' / 'model.py').write_text(slow)
    learned = ['--max_iters=200', '--learning_rate=0.01']
    out = run(checkout, 'bench.py', *LOSS, *learned, '--rounds=2', '--picture=both.png')
    r = result(out)
    for runs in r['curves'].values():
        for curve in runs:
            seconds, losses = zip(*curve, strict=True)
            assert list(seconds) == sorted(set(seconds)) and seconds[0] == 0
            assert abs(losses[0] - math.log(64)) < 0.6
    first, second = (curve[-1][1] for curve in r['curves']['nanoGPT'])
    assert first != second  # of another seed
    assert math.log(3) < first < 2  # three tokens may follow each
    assert r['loss'] == (first + second) / 2
    ours = ['--seed=1338', f'--out_dir={checkout}/out', '--eval_iters=0', '--sample_interval=0']
    known = read_settings(os.path.join(ROOT, 'train.py'))
    settings = [flag for flag in LOSS if flag[2:].partition('=')[0] in known]
    run(checkout, 'train.py', *settings, *learned, *ours)
    assert r['curves']['fledge'][1][-1][1] == metrics(checkout / 'out')[-1]['val_loss']
    low, high = r['ratio_range']
    assert 0 < low <= r['ratio'] <= high and r['fledge_seconds'] > 0
    assert (checkout / 'both.png').read_bytes().startswith(b'\x89PNG') and 'faster by' in out


@pytest.mark.slow
def test_a_loss_that_is_not_reached(checkout):
    r = result(run(checkout, 'bench.py', *LOSS, '--max_iters=3', '--rounds=1'))
    assert r['fledge_seconds'] is None and r['nanogpt_seconds'] > 0 and r['ratio'] == 0
    assert 'was not reached' in benchmark.cells(r)[0]


def test_a_loss_of_nanogpts_that_is_not_finite_is_one_line(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    write_tiny(checkout / 'data' / 'tiny', n_train=6000, n_val=3000)
    broken = NANOGPT.replace('return logits, loss', 'return logits, loss * float("nan")')
    (checkout / 'theirs' / 'model.py').write_text(broken)
    with pytest.raises(UserError, match="nanoGPT's val loss is nan"):
        time_to_loss.nanogpts_curve('theirs', 'tiny', 64, 'cpu', 'float32', False, 1)


def test_seconds_of_training_are_those_of_its_steps(tmp_path):
    lines = [
        dict(step=0, tokens=0, elapsed=9, val_loss=4.0, tokens_per_second=10, step_losses=[4]),
        dict(step=2, tokens=40, elapsed=30, val_loss=3.0, tokens_per_second=20, step_losses=[3, 3]),
        dict(step=4, tokens=80, elapsed=70, val_loss=2.0, tokens_per_second=5, step_losses=[2]),
    ]
    text = ''.join(json.dumps(line) + '\n' for line in lines)
    (tmp_path / 'metrics.jsonl').write_text(text)
    curve = time_to_loss.curve_of(read_metrics(tmp_path / 'metrics.jsonl'), 20)
    assert curve == [(0.0, 4.0), (3.0, 3.0), (8.0, 2.0)]  # 20 tokens at 10, 40 at 20, 20 at 5
    assert time_to_loss.seconds_to(3.5, curve) == 1.5
    assert time_to_loss.seconds_to(2.0, curve) == 8.0
    assert time_to_loss.seconds_to(1.9, curve) == math.inf


@pytest.mark.slow
def test_all_of_it_as_one_table(checkout):
    flags = ['--all', '--compare=theirs', *SIZE, '--n_kv_head=2', '--rounds=1', '--seconds=0.05']
    flags += ['--dtype=float32']  # one of transformers in each part, in place of two
    env = dict(PYTEST_ADDOPTS='-n 0 -k initial_loss')
    process = start(checkout, 'bench.py', *flags, env=env)  # it takes as long as the machine does
    out, err = process.communicate()
    assert process.returncode == 0, err
    parts, lines = result(out)['parts'], out.splitlines()
    rows = [line for line in lines if line.startswith('| ')][1:]
    assert len(rows) == len(parts) == 7
    for (title, part), row in zip(parts.items(), rows, strict=True):
        assert row.startswith(f'| {title} | ') and row.endswith(f' | {part["took"]:.0f} s |')
        assert row.count('|') == 5
    tests, training, loss, *generation = parts.values()
    assert tests['tests'].startswith('6 passed')
    assert training['train_peers'][0]['name'] == 'nanoGPT, eager' and 'tokens/s' in rows[1]
    assert (
        loss['failed'].startswith('data/shakespeare_char has no train.bin') and 'failed' in rows[2]
    )
    for part, row in zip(generation, rows[3:], strict=True):
        assert part['generate_peers'][0]['name'] == 'transformers, float32' and 'float32' in row
    assert any(line.startswith('On ') and cpu.kind() in line for line in lines)


@pytest.mark.slow
def test_the_models_tests_run_on_the_device_they_are_told():
    command = [python(), '-m', 'pytest', '-n', '0', '-k', 'initial_loss', 'test_model.py']
    for device, words in (('cpu:0', '6 passed'), ('meta', '6 failed')):  # which computes nothing
        env = os.environ | dict(FLEDGE_TEST_DEVICE=device)
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert words in done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_a_part_without_time_left_ends_with_what_it_started(tmp_path):
    code = 'import subprocess, sys, time; child = subprocess.Popen([sys.executable, "-c", '
    code += '"import time; time.sleep(60)"]); open("pid", "w").write(str(child.pid)); '
    with pytest.raises(UserError, match='not done after 3 s'):
        benchmark.run_process([sys.executable, '-c', f'{code}time.sleep(60)'], 3, cwd=tmp_path)
    pid = int((tmp_path / 'pid').read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_a_killed_bench_leaves_no_process_behind():
    code = """
import subprocess, sys
from fledge import benchmark
if __name__ == '__main__':
    with benchmark.process_of_its_own() as process:
        sleeper = 'import time; print("begun", flush=True); time.sleep(60); print("late")'
        process.submit(subprocess.run, [sys.executable, '-c', sleeper]).result()
"""
    process = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b'begun\n'
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    try:
        out, _ = process.communicate(timeout=30)  # which all of them have open, until they end
        assert out == b''
    finally:
        benchmark.kill_all(family)


@pytest.mark.slow
def test_ctrl_c_is_said_by_one_process():
    code = """
import time
from fledge import benchmark
if __name__ == '__main__':
    with benchmark.process_of_its_own() as process:
        try:
            process.submit(print, 'begun', flush=True).result()
            time.sleep(60)
        except KeyboardInterrupt:
            print('interrupted')
"""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen(
        [sys.executable, '-c', code], cwd=ROOT, start_new_session=True, **pipes
    )
    assert process.stdout.readline() == b'begun\n'
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.communicate(timeout=30) == (b'interrupted\n', b'')
