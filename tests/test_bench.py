"""bench.py: what it prints and measures, beside a stand-in for nanoGPT, on models of nearly no size
(README's commands show transformers)."""

import json

import pytest
from conftest import fails, run

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
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size)
        assert (config.block_size, config.vocab_size) == (32, 64)
        assert (config.n_layer, config.n_embd) == (1, 16)
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(
            self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay
        )
    def forward(self, idx, targets):
        logits = self.head(self.wte(idx))
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    def generate(self, idx, n):
        for _ in range(n):
            idx = torch.cat((idx, self.head(self.wte(idx[:, -1:])).argmax(-1)), 1)
        return idx
"""


def result(out):
    return json.loads(out.splitlines()[-1])


@pytest.mark.slow
def test_training_and_generation_beside_a_checkout(workdir):
    (workdir / 'theirs').mkdir()
    (workdir / 'theirs' / 'model.py').write_text(NANOGPT)
    out = run(
        workdir,
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
        )
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
        events = json.loads((workdir / name).read_text())['traceEvents']
        assert any('mm' in e.get('name', '') for e in events)
    for word in (
        'of matmul peak',
        'of memory read',
        'peak memory',
        'head and loss',
        'nanoGPT, compiled',
    ):
        assert word in out


@pytest.mark.parametrize(
    'flags, words',
    [
        (['--only=sample'], "only='sample' is none of train, generate, all"),
        (['--compare=nowhere'], 'neither transformers nor a folder'),
        (['--compare=transformers', '--only=train'], 'for generation'),
        (['--prompt_tokens=13'], 'longer than block_size=32'),
        (['--n_head=3', '--n_kv_head=2'], 'n_head=3'),
    ],
)
def test_bad_input_is_one_line(tmp_path, flags, words):
    assert words in fails(tmp_path, 'bench.py', *SIZE, *flags)


def test_a_peer_that_is_none_is_one_line(tmp_path):
    (tmp_path / 'model.py').write_text('GPT = 3')
    assert 'is no nanoGPT checkout' in fails(
        tmp_path, 'bench.py', '--only=train', '--compare=.', *SIZE
    )
