"""The plan of a run: its memory beside torch's own, its sums beside those done by hand."""

import os
import re
import shlex

import pytest
import torch
from conftest import ROOT, TINY, fails, run

from fledge import checkpoint, optimizers, plan
from fledge.configurator import read_settings, run_config
from model import GPT

GPT2 = dict(n_kv_head=0, head_dim=0, position='learned', activation='gelu', qk_norm=False)
# RMSNorm and QK-norm have a fused kernel on a GPU alone: a CPU keeps more for them
SWIGLU = dict(norm='layernorm', qk_norm=False)


def settings_of(config='', **others):
    """train.py's settings under a config file and others, for Muon where they leave it open."""
    settings = read_settings(os.path.join(ROOT, 'train.py'))
    if config:
        settings |= run_config(os.path.join(ROOT, 'config', config), settings)
    if settings['optimizer'] == 'auto':
        settings['optimizer'] = 'muon'
    return settings | others


def model_of(settings):
    return GPT(checkpoint.config_of(settings, None))


def table_rows(text):
    return [line for line in text.splitlines() if line.startswith('| ')]


def cells(text, name):
    """The cells of the one table row that begins with name."""
    (row,) = [row for row in table_rows(text) if row.startswith(f'| {name} |')]
    return [cell.strip() for cell in row.strip('|').split('|')][1:]


def test_170m_parameters_on_17b_tokens_take_an_l4_four_days():
    # 1.734e19 FLOPs at 121 TFLOP/s
    assert plan.hours_6nd(170e6, 17e9, 'L4', utilisation=1.0) == pytest.approx(39.8, abs=0.05)
    assert plan.hours_6nd(170e6, 17e9, 'L4') == pytest.approx(99.5, abs=0.05)


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_weights_gradients_and_state_are_those_of_a_real_step(optimizer):
    settings = settings_of(vocab_size=500, n_layer=2, optimizer=optimizer)
    model = model_of(settings)
    opts = optimizers.make_optimizers(model, optimizer, 1e-3, 0.1, (0.9, 0.95), torch.float32)
    ids = torch.randint(500, (2, 16))
    model(ids, ids)[1].backward()
    for opt in opts:
        opt.step()
    planned = plan.memory(plan.shape_of_model(settings), settings)
    assert planned['weights'] == sum(p.nbytes for p in model.parameters())
    assert planned['gradients'] == sum(p.grad.nbytes for p in model.parameters())
    # AdamW counts its steps in 4 bytes a tensor as well
    assert planned['optimizer'] == pytest.approx(optimizers.state_bytes(opts), rel=0.001)


@pytest.mark.slow
@pytest.mark.parametrize(
    'shape',
    [
        settings_of('dolma_75m.py', dropout=0.0, batch_size=1, n_layer=4),
        settings_of(**SWIGLU, vocab_size=500, batch_size=2),
        settings_of(**SWIGLU, vocab_size=500, batch_size=2, n_head=8, n_kv_head=2, n_inner=2048),
        settings_of(**GPT2, norm='layernorm', vocab_size=500, n_embd=384, n_head=6),
    ],
    ids=['75M', 'swiglu', 'wide', 'gpt2'],
)
def test_activations_are_what_autograd_keeps(shape):
    model = model_of(shape)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}  # by address: the tensors that share memory count once, and stay alive meanwhile

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(shape['vocab_size'], (shape['batch_size'], shape['block_size']))
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with hooks, torch.autocast('cpu', torch.bfloat16):
        model.hidden(ids)
    matrices = [p for b in model.blocks for p in b.parameters() if p.dim() == 2]
    copies = sum(2 * p.numel() for p in matrices)
    real = sum(storage.nbytes() for storage in kept.values()) - copies
    assert plan.memory(model, shape)['activations'] == pytest.approx(real, rel=0.05)


def test_gradient_checkpointing_keeps_a_blocks_input():
    shape = settings_of('gpt2_124m.py')
    model = plan.shape_of_model(shape)
    all_kept = plan.memory(model, shape)['activations']
    inputs = 12 * 4 * 768 * 16 * 1024
    less = plan.memory(model, shape | {'gradient_checkpointing': True})['activations']
    assert inputs < less < inputs + 0.15 * all_kept


def test_fsdp_divides_what_ddp_repeats():
    shape = settings_of('gpt2_xl.py')
    model = plan.shape_of_model(shape)
    one, ddp = plan.memory(model, shape), plan.memory(model, shape, 8, 'DDP')
    fsdp = plan.memory(model, shape, 8, 'FSDP')
    assert ddp['weights'] == one['weights'] == 8 * fsdp['weights']
    assert ddp['optimizer'] == 8 * fsdp['optimizer'] == 2 * one['weights']
    assert ddp['gradients'] == one['gradients']
    assert fsdp['gradients'] == one['gradients'] * 9 / 8  # the sum of the micro-batches is whole
    at_once = shape | {'gradient_accumulation_steps': 8}
    assert plan.memory(model, at_once, 8, 'FSDP')['gradients'] == one['gradients'] / 8
    block = 12 * 1600**2 + 2 * 1600
    root = 50304 * 1600 + 1024 * 1600 + 1600
    assert fsdp['copies'] == 4 * (block + root)


def test_bytes_on_the_links_of_a_ring():
    shape = settings_of(batch_size=4, gradient_accumulation_steps=4)
    assert plan.bytes_sent(1000, shape, 1, '') == 0
    assert plan.bytes_sent(1000, shape, 4, 'DDP') == 6000  # 3/4, twice, in 4 bytes
    assert plan.bytes_sent(1000, shape, 2, 'FSDP') == 6000  # 1/2, of two micro-batches 4 + 4 + 4


@pytest.mark.slow
def test_readmes_plans_are_what_its_commands_print(tmp_path):
    with open(os.path.join(ROOT, 'README.md'), encoding='utf-8') as f:
        section = f.read().partition('\n### What it will take\n')[2].partition('\n## ')[0]
    commands = re.findall(r'^python (train\.py .*--world_size.*)$', section, re.M)
    assert len(commands) == 3  # 75M, 124M, 1.5B
    printed = []
    for command in commands:
        words = shlex.split(command)
        words[1] = os.path.join(ROOT, words[1])
        out = run(tmp_path, *words)
        assert 'no step was measured here: data/' in out  # none is there
        printed += [row for row in table_rows(out) if ' x ' not in row or ' x H100' in row]
    shown = table_rows(section)
    assert set(shown) == set(printed) and len(shown) == 2 + 9 + 9  # two heads
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_a_step_measured_here_is_divided_among_machines(workdir):
    flags = ['--dry_run', '--max_iters=864000', '--batch_size=4', '--gradient_accumulation_steps=2']
    out = run(workdir, 'train.py', *TINY, *flags, '--world_size=2', '--price_per_hour=2')
    assert cells(out, '0M, 2 DDP')[-1] == '8 GB' and '(6ND); all of it is computed' in out
    measured = float(re.search(r'\(([\d,]+) tokens/s\)', out)[1].replace(',', ''))
    (line,) = re.findall(r'2 x cpu, from the step measured here: .*', out)
    speed, days, price = re.search(
        r'([\d,]+) tokens/s, .* ([\d.]+) days, price (.*)', line
    ).groups()
    speed, price = float(speed.replace(',', '')), float(price.replace(',', ''))
    assert measured < speed <= 2 * measured + 1
    tokens = 864000 * 8 * 16
    assert float(days) == pytest.approx(tokens / speed / 86400, abs=0.006)
    assert price == pytest.approx(2 * 2 * tokens / speed / 3600, rel=0.01, abs=0.006)
    assert not (workdir / 'out').exists()


@pytest.mark.slow
def test_a_model_too_large_for_this_machine_is_planned_and_not_made(workdir):
    shape = ['--n_layer=100', '--n_embd=20480', '--n_head=160', '--head_dim=128', '--n_inner=81920']
    out = run(workdir, 'train.py', *TINY, *shape, '--dry_run', '--world_size=4')
    assert re.search(r'no step was measured here: it takes [\d.]+ GB, and there are', out)
    assert cells(out, '587.73B, 4 FSDP')[-1] == 'none'
    assert cells(out, '587.73B, 4 x H100 FSDP')[0] == 'does not fit'


@pytest.mark.slow
@pytest.mark.parametrize(
    'flag, words',
    [
        ('--world_size=3', '4 rows a step'),
        ('--target_epochs=2', 'give target_tokens or max_iters'),
        ('--n_encoder_layer=1', 'leave out n_encoder_layer=1'),
        ('--lora_rank=2', 'leave out lora_rank=2'),
        ('--world_size=-1', 'must be 0 to'),
    ],
)
def test_what_has_no_plan_is_one_line(workdir, flag, words):
    assert words in fails(workdir, 'train.py', *TINY, '--dry_run', '--world_size=2', flag)


@pytest.mark.slow
def test_a_plan_without_a_dry_run_is_said_to_have_no_effect(workdir):
    out = run(workdir, 'train.py', *TINY, '--eval_only', '--world_size=2')
    assert 'without effect here: world_size (dry_run=False)' in out
    out = run(workdir, 'train.py', *TINY, '--dry_run', '--price_per_hour=2')
    assert 'without effect here: price_per_hour (world_size=0)' in out
