"""nanoGPT, dropped in: its configs, its data folders and its checkpoints, both ways."""

import math
import os
import pickle

import numpy as np
import pytest
import torch
from conftest import ROOT, metrics, run
from torch.nn import functional as F

from fledge import checkpoint
from fledge.tokens import Tokens
from model import GPT, GPTConfig

NANOGPT = os.path.join(ROOT, 'config', 'nanogpt.py')
# a config file as nanoGPT's users write them: an import, a computed name, numbers of both kinds
THEIRS = """import time
out_dir = 'out-char'
eval_interval = 20
eval_iters = 3
log_interval = 1
always_save_checkpoint = False
wandb_log = False # override via command line if you like
wandb_run_name = 'mini-gpt' + str(time.time())
dataset = 'char'
gradient_accumulation_steps = 2
batch_size = 4
block_size = 16
n_layer = 2
n_head = 2
n_embd = 16
dropout = 0.0
learning_rate = 1e-2
max_iters = 40
lr_decay_iters = 40
min_lr = 1e-3
beta2 = 0.99
warmup_iters = 10
device = 'cpu'
compile = False
"""
ARGS = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, bias=False, vocab_size=12, dropout=0.0)


@pytest.fixture
def theirs(tmp_path):
    """A working folder with a nanoGPT config file and a nanoGPT data folder: headerless .bin files
    and a pickled vocabulary."""
    folder = tmp_path / 'data' / 'char'
    folder.mkdir(parents=True)
    rng, characters = np.random.default_rng(0), '\n abcdefghij'
    for split, n in (('train', 3000), ('val', 600)):
        (np.cumsum(rng.integers(0, 3, n)) % 12).astype(np.uint16).tofile(folder / f'{split}.bin')
    (folder / 'meta.pkl').write_bytes(
        pickle.dumps(
            {
                'vocab_size': 12,
                'itos': dict(enumerate(characters)),
                'stoi': {c: i for i, c in enumerate(characters)},
            }
        )
    )
    (tmp_path / 'theirs.py').write_text(THEIRS)
    return tmp_path


def gpt2_loss(weights, args, x, y):
    """GPT-2 written out from its paper on nanoGPT's parameter names: the reference that ours has to
    match."""
    T, C, H = x.shape[1], args['n_embd'], args['n_head']

    def layer_norm(z, name):
        return (
            (z - z.mean(-1, keepdim=True))
            / (z.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
            * weights[name]
        )

    h = weights['transformer.wte.weight'][x] + weights['transformer.wpe.weight'][:T]
    for i in range(args['n_layer']):
        w = {
            k: weights[f'transformer.h.{i}.{k}.weight']
            for k in ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')
        }
        q, k, v = (layer_norm(h, f'transformer.h.{i}.ln_1.weight') @ w['attn.c_attn'].T).split(
            C, dim=-1
        )
        heads = []
        for a in range(H):
            part = slice(a * C // H, (a + 1) * C // H)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(C // H)
            heads.append(
                scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)
                @ v[..., part]
            )
        h = h + torch.cat(heads, -1) @ w['attn.c_proj'].T
        z = layer_norm(h, f'transformer.h.{i}.ln_2.weight') @ w['mlp.c_fc'].T
        h = h + (z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))) @ w['mlp.c_proj'].T
    logits = layer_norm(h, 'transformer.ln_f.weight') @ weights['transformer.wte.weight'].T
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def reference_run(folder, start, steps):
    """nanoGPT's loop on our batches: AdamW with decay on matrices, clipping, warmup and cosine.
    Returns weights and losses."""
    weights = {k: v.clone().requires_grad_() for k, v in start.items() if k != 'lm_head.weight'}
    optimizer = torch.optim.AdamW(
        [
            dict(params=[p for p in weights.values() if p.dim() >= 2], weight_decay=0.1),
            dict(params=[p for p in weights.values() if p.dim() < 2], weight_decay=0.0),
        ],
        lr=1e-2,
        betas=(0.9, 0.99),
    )
    data, losses = Tokens(str(folder / 'data' / 'char'), 'train', 16, 12, 1337), []
    for step in range(steps):
        lr = (
            1e-2 * (step + 1) / 11
            if step < 10
            else 1e-3 + 0.5 * (1 + math.cos(math.pi * (step - 10) / 30)) * 9e-3
        )
        for group in optimizer.param_groups:
            group['lr'] = lr
        x, y = (torch.tensor(a) for a in data.rows(step * 8, 8))
        loss = gpt2_loss(weights, ARGS, x, y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return weights, losses, optimizer


@pytest.mark.slow
def test_a_nanogpt_config_does_the_same_work(theirs):
    """Their config, their data, the same batches: the same loss curve as nanoGPT's loop written
    out."""
    torch.manual_seed(1337)
    start = GPT(
        GPTConfig(**ARGS)
    ).state_dict()  # the trainer begins with the same weights from the same seed
    _, losses, _ = reference_run(theirs, start, 40)
    out = run(theirs, 'train.py', NANOGPT, 'theirs.py')
    found = [m['train_loss'] for m in metrics(theirs / 'out-char') if m['train_loss'] is not None]
    assert len(found) == 40 and found[-1] < 2.0
    np.testing.assert_allclose(found, losses, atol=2e-4)
    assert 'cpu in float32' in out


@pytest.mark.slow
def test_their_flags_override(theirs):
    out = run(
        theirs,
        'train.py',
        NANOGPT,
        'theirs.py',
        '--max_iters=2',
        '--out_dir=elsewhere',
        '--wandb_log=False',
        '--dtype=float16',
        '--compile=False',
        '--eval_only=False',
        '--backend=nccl',
        '--decay_lr=True',
    )
    assert 'done at step 2' in out and (theirs / 'elsewhere' / 'metrics.jsonl').exists()


def their_checkpoint(folder, weights, optimizer, steps):
    """What nanoGPT's train.py saves, to the key."""
    model = {k: v.detach() for k, v in weights.items()} | {
        'lm_head.weight': weights['transformer.wte.weight'].detach()
    }
    (folder / 'out-char').mkdir(exist_ok=True)
    torch.save(
        {
            'model': {f'_orig_mod.{k}': v for k, v in model.items()},
            'optimizer': optimizer.state_dict(),
            'model_args': ARGS,
            'iter_num': steps,
            'best_val_loss': torch.tensor(9.0),
            'config': {'dataset': 'char', 'out_dir': 'out-char'},
        },
        folder / 'out-char' / 'ckpt.pt',
    )


@pytest.mark.slow
def test_their_checkpoint_resumes_and_samples(theirs):
    torch.manual_seed(0)
    start = GPT(GPTConfig(**ARGS)).state_dict()
    _, losses, _ = reference_run(theirs, start, 40)
    their_checkpoint(theirs, *reference_run(theirs, start, 25)[::2], 25)
    text = run(
        theirs,
        'sample.py',
        '--out_dir=out-char',
        '--start=abc',
        '--num_samples=2',
        '--max_new_tokens=20',
    )
    assert (
        text.count('abc') >= 2
        and text.count('---------------\n') == 2
        and set(text) <= set('\n abcdefghij-')
    )
    run(theirs, 'train.py', NANOGPT, 'theirs.py', '--init_from=resume')
    found = [m['train_loss'] for m in metrics(theirs / 'out-char') if m['train_loss'] is not None]
    np.testing.assert_allclose(found, losses[25:], atol=2e-4)  # momenta and step counts came along


@pytest.mark.slow
def test_our_checkpoint_is_theirs(theirs):
    run(theirs, 'train.py', NANOGPT, 'theirs.py', '--max_iters=20')
    saved = torch.load(
        theirs / 'out-char' / 'ckpt.pt', weights_only=True
    )  # what torch.load does by default
    assert {
        'model',
        'optimizer',
        'model_args',
        'iter_num',
        'best_val_loss',
        'config',
    } <= saved.keys()
    assert saved['model_args'] == ARGS  # GPTConfig(**model_args) there takes these and no others
    blocks = [
        f'transformer.h.{i}.{k}.weight'
        for i in range(2)
        for k in ('ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj')
    ]
    assert list(saved['model']) == [
        'transformer.wte.weight',
        'transformer.wpe.weight',
        *blocks,
        'transformer.ln_f.weight',
        'lm_head.weight',
    ]
    x, y = (
        torch.tensor(a)
        for a in Tokens(str(theirs / 'data' / 'char'), 'val', 16, 12).evaluation_batch(
            [(0, 0), (0, 16)]
        )
    )
    model = checkpoint.load_model(saved, 'ckpt.pt')
    torch.testing.assert_close(
        gpt2_loss(saved['model'], ARGS, x, y), model(x, y)[1], atol=1e-5, rtol=1e-5
    )
    assert (
        saved['optimizer']['param_groups'][0]['params'] == list(range(10))
        and len(saved['optimizer']['state']) == 15
    )


def test_every_setting_of_nanogpt_is_known():
    names = [
        'out_dir',
        'eval_interval',
        'log_interval',
        'eval_iters',
        'eval_only',
        'always_save_checkpoint',
        'init_from',
        'wandb_log',
        'wandb_project',
        'wandb_run_name',
        'dataset',
        'gradient_accumulation_steps',
        'batch_size',
        'block_size',
        'n_layer',
        'n_head',
        'n_embd',
        'dropout',
        'bias',
        'learning_rate',
        'max_iters',
        'weight_decay',
        'beta1',
        'beta2',
        'grad_clip',
        'decay_lr',
        'warmup_iters',
        'lr_decay_iters',
        'min_lr',
        'backend',
        'device',
        'dtype',
        'compile',
    ]
    values = {}
    with open(NANOGPT, encoding='utf-8') as f:
        exec(f.read(), values)
    assert set(names) <= set(values)
    with open(os.path.join(ROOT, 'train.py')) as f:
        settings = f.read()
    for name in values.keys() - {'__builtins__', 'torch'}:
        assert f'\n{name} = ' in settings
