"""What draw.py draws are the model's own numbers, and each picture is made of a real checkpoint."""

import math
import os

import numpy as np
import pytest
import torch
from conftest import TINY, fails, metrics, run, start, write_tiny
from test_attention import size_of_png
from torch.nn import functional as F

from encoder_decoder import make_model
from fledge import checkpoint, optimizers
from fledge.pictures import (
    gradient_norms,
    gradient_table,
    likeness,
    position_table,
    schedule_of,
)
from fledge.tokens import Batch
from model import GPT, GPTConfig, rotate

PICTURES = ['positions', 'schedule', 'gradients']
SMALL = dict(n_layer=2, n_head=2, n_embd=16, block_size=24, vocab_size=50)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Runs in a folder: out/ with int8.pt, lora/ on it, gpt2/ with hf/, and copies/.

    Their positions are RoPE's, learned and, of the encoder-decoder in copies/, sinusoidal.
    """
    folder = tmp_path_factory.mktemp('draw')
    write_tiny(folder / 'data' / 'tiny')
    flags = [*TINY, '--max_iters=24', '--sample_interval=0']
    run(folder, 'train.py', *flags)
    adapters = ['--init_from=out/ckpt.pt', '--lora_rank=2', '--out_dir=lora']
    run(folder, 'train.py', *flags, *adapters)
    gpt2 = ['--position=learned', '--norm=layernorm', '--activation=gelu_tanh', '--qk_norm=False']
    gpt2 += ['--bias=True', '--n_kv_head=2', '--n_inner=64', '--tie_embeddings=True']
    run(folder, 'train.py', *flags, *gpt2, '--lr_schedule=noam', '--out_dir=gpt2')
    run(folder, 'export.py', '--out_dir=gpt2')
    run(folder, 'export.py', '--out_dir=out', '--quantize=int8')
    run(folder, 'prepare/copy_task.py', '--examples=300')
    pairs = ['--dataset=copy_task', '--n_encoder_layer=2', '--position=sinusoidal']
    run(folder, 'train.py', *flags, *pairs, '--norm_first=False', '--out_dir=copies')
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('out_dir', ['out', 'lora', 'gpt2', 'copies'])
def test_a_run_is_drawn(runs, out_dir):
    names = [f'{out_dir}-{picture}.png' for picture in PICTURES]
    flags = [f'--{picture}={name}' for picture, name in zip(PICTURES, names, strict=True)]
    out = run(runs, 'draw.py', f'--out_dir={out_dir}', '--device=cpu', *flags)
    for name in names:
        width, height = size_of_png(runs / name)
        assert 600 < width < 1700 and 250 < height < 800 and f'{name} shows it\n' in out


@pytest.mark.slow
def test_a_hugging_face_folder_is_drawn(runs):
    flags = ['--init_from=gpt2/hf', '--device=cpu', '--positions=p.png', '--gradients=g.png']
    run(runs, 'draw.py', *flags, '--dataset=tiny', '--split=train', '--batch_size=2')
    assert size_of_png(runs / 'p.png') and size_of_png(runs / 'g.png')


def test_sinusoids_are_the_papers():
    table = position_table(GPT(GPTConfig(position='sinusoidal', **SMALL)))
    assert table.shape == (24, 16) and table[0].tolist() == [0, 1] * 8
    for position, pair in ((1, 0), (7, 3), (23, 7)):
        angle = position / 10000 ** (2 * pair / 16)
        expected = [math.sin(angle), math.cos(angle)]
        assert table[position, 2 * pair : 2 * pair + 2].tolist() == pytest.approx(expected)


def test_ropes_cosines_and_learned_positions_are_the_models_own():
    table = position_table(GPT(GPTConfig(position='rope', rope_theta=100.0, **SMALL)))
    assert table.shape == (24, 4)
    assert table[23, 3].item() == pytest.approx(math.cos(23 / 100 ** (3 / 4)))
    model = GPT(GPTConfig(**SMALL))
    assert torch.equal(position_table(model), model.transformer.wpe.weight)
    long = GPT(GPTConfig(**SMALL | dict(block_size=2000)))
    assert len(position_table(long)) == 256


def test_how_alike_positions_are_is_their_dot_product():
    table = position_table(GPT(GPTConfig(position='sinusoidal', **SMALL)))
    alike = likeness(table, 'sinusoidal')
    for first, second in ((0, 5), (3, 8), (18, 23)):  # their distance alone counts
        assert alike[5].item() == pytest.approx((table[first] @ table[second]).item() / 8)
    model = GPT(GPTConfig(position='rope', **SMALL))
    alike = likeness(position_table(model), 'rope')
    ones, angles = torch.ones(1, 24, 1, 8), (model.rope_cos, model.rope_sin)
    turned = rotate(ones, *(table[None, :, None] for table in angles))[0, :, 0]
    torch.testing.assert_close(alike, turned @ turned[0] / 8)
    model = GPT(GPTConfig(**SMALL))
    alike = likeness(position_table(model), 'learned')
    wpe = model.transformer.wpe.weight
    assert alike.shape == (24, 24) and torch.allclose(alike.diag(), torch.ones(24))
    torch.testing.assert_close(alike[2, 9], F.cosine_similarity(wpe[2], wpe[9], dim=0))


@pytest.mark.parametrize('out_dir', ['out', 'gpt2'])
def test_the_schedule_drawn_is_the_one_that_the_run_used(runs, out_dir):
    path = str(runs / out_dir / 'ckpt.pt')
    settings, end = schedule_of(checkpoint.load(path), path)
    used = {m['step']: m['lr'] for m in metrics(runs / out_dir) if m['lr'] is not None}
    drawn = {step: optimizers.learning_rate_at(settings, step, step, end) for step in used}
    assert end == len(used) == 24 and used == pytest.approx(drawn)
    assert settings['lr_schedule'] == ('noam' if out_dir == 'gpt2' else 'linear')


def test_a_schedule_ends_where_the_run_is_expected_to():
    config = dict(learning_rate=1.0, min_lr=0.0, decay_lr=True, warmup_iters=5)
    config |= dict(lr_decay_iters=0, max_iters=1000, lr_schedule='wsd')
    cut = dict(config=config, iter_num=300, run=dict(progress=0.5))  # by time, or by tokens
    assert schedule_of(cut, 'x')[1] == 600
    assert schedule_of(cut | dict(config=config | dict(lr_decay_iters=900)), 'x')[1] == 900
    del config['lr_schedule']
    settings, end = schedule_of(dict(config=config, iter_num=300), 'x')  # nanoGPT's
    assert settings['lr_schedule'] == 'cosine' and end == 1000


def numbers(rows=3):
    ids = torch.arange(rows * 11).view(rows, 11) * 7 % 50
    targets = ids[:, 1:].clone()
    targets[0, :4] = -1
    return Batch(inputs=ids[:, :-1], targets=targets)


def test_the_gradient_is_the_one_that_is_worked_out_by_hand():
    torch.manual_seed(0)
    model, batch = GPT(GPTConfig(tie_embeddings=False, **SMALL)).eval(), numbers()
    loss, norms = gradient_norms(model, batch)
    learned = batch['targets'] >= 0
    with torch.no_grad():
        x = model.hidden(batch['inputs'])[learned]  # (N, n_embd)
        p = model.logits(x).softmax(dim=-1)
    own = F.one_hot(batch['targets'][learned], 50)
    assert loss == pytest.approx(-(p * own).sum(dim=1).log().mean().item(), rel=1e-5)
    by_hand = (p - own).T @ x / len(x)  # of the head: cross entropy's, times what the head reads
    assert norms['lm_head'] == pytest.approx(by_hand.norm().item(), rel=1e-5)
    assert all(p.grad is None for p in model.parameters())
    # what cannot reach the loss has no gradient
    with torch.no_grad():
        model.transformer.h[0].attn.c_proj.weight.zero_()
    _, norms = gradient_norms(model, batch)
    assert norms['transformer.h.0.attn.c_attn'] == 0 < norms['transformer.h.0.attn.c_proj']


def test_an_encoder_has_a_gradient_through_cross_attention():
    torch.manual_seed(0)
    model = make_model(GPTConfig(n_encoder_layer=1, position='sinusoidal', **SMALL)).eval()
    batch = numbers()
    batch['source'] = batch['inputs']
    _, norms = gradient_norms(model, batch)
    in_encoder = [norm for name, norm in norms.items() if '.encoder.0.' in name]
    assert len(in_encoder) == 4 and min(in_encoder) > 0
    with torch.no_grad():
        for block in model.transformer.h:
            block.cross_attn.c_attn.weight.zero_()
    _, norms = gradient_norms(model, batch)
    assert not any(norm for name, norm in norms.items() if '.encoder.0.' in name)


def test_the_table_names_every_matrix():
    _, norms = gradient_norms(GPT(GPTConfig(**SMALL)).eval(), numbers())
    table = gradient_table(norms, tied=True)
    assert table.layers == ['layer 0', 'layer 1']
    assert table.kinds == ['attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj']
    assert table.rows[1][2] == norms['transformer.h.1.mlp.c_fc'] and np.shape(table.rows) == (2, 4)
    assert list(table.others) == ['learned positions', 'token embedding = head']
    assert table.others['learned positions'] == norms['transformer.wpe']
    norms |= {'lm_head': 1.0, 'transformer.encoder.0.attn.c_attn': 2.0}
    norms['transformer.h.10.cross_attn.q_attn'] = 3.0
    table = gradient_table(norms, tied=False)
    assert table.layers == ['encoder 0', 'decoder 0', 'decoder 1', 'decoder 10']
    assert table.rows[3][table.kinds.index('cross_attn.q_attn')] == 3 and table.rows[0][0] == 2
    assert np.isnan(table.rows[0][1:]).all() and table.others['head'] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    'flags, words',
    [
        ([], 'nothing to draw: name a PNG with --positions, --schedule or --gradients'),
        (['--out_dir=nowhere', '--positions=a.png'], 'no checkpoint at nowhere/ckpt.pt'),
        (['--positions=nowhere/a.png'], 'cannot write nowhere/a.png: No such file'),
        (['--gradients=a.png', '--dataset=nowhere'], 'data/nowhere has no val.bin'),
        (['--gradients=a.png', '--split=best'], 'data/tiny has no best.bin'),
        (['--gradients=a.png', '--init_from=out/int8.pt'], 'has 8-bit weights'),
        (['--gradients=a.png', '--init_from=gpt2/hf'], 'name the data with --dataset'),
        (['--schedule=a.png', '--init_from=gpt2/hf'], 'no run of train.py made it'),
    ],
)
def test_bad_input_is_one_line(runs, flags, words):
    assert words in fails(runs, 'draw.py', *flags)
    assert not list(runs.rglob('*.tmp')) and not os.path.exists(runs / 'a.png')


@pytest.mark.slow
def test_a_loss_that_is_not_finite_has_no_picture(runs):
    state = checkpoint.load(str(runs / 'out' / 'ckpt.pt'))
    state['model']['transformer.ln_f.weight'].fill_(3e38)
    checkpoint.save(str(runs / 'out' / 'huge.pt'), state)
    words = 'the loss of out/huge.pt on val of tiny is nan: it has no gradient'
    assert words in fails(runs, 'draw.py', '--init_from=out/huge.pt', '--gradients=a.png')


@pytest.mark.slow
def test_what_is_missing_or_idle_is_said(runs):
    (runs / 'alone').mkdir()
    for name in ('ckpt.pt', 'tokenizer.json'):
        os.link(runs / 'out' / name, runs / 'alone' / name)
    flags = ['--init_from=alone/ckpt.pt', '--schedule=s.png', '--batch_size=2']
    process = start(runs, 'draw.py', *flags)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 and size_of_png(runs / 's.png')
    assert 'there is no alone/metrics.jsonl: what the run used is not drawn\n' in err
    assert 'without effect without --gradients: batch_size\n' in err and err.count('\n') == 2
