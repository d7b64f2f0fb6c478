"""LoRA: added from outside, kept as checkpoints without their base, and as peft's files."""

import copy
import json
import os
import shutil

import pytest
import torch
from conftest import fails, run
from hub import Hub
from test_pretrained import make
from torch.nn import functional as F

from fledge import UserError, adapters, checkpoint, cpu, optimizers, quantize
from fledge.formats import huggingface
from fledge.tokenizer import char_tokenizer
from model import GPT, GPTConfig

QWEN3 = dict(position='rope', norm='rmsnorm', activation='swiglu', bias=False, qk_norm=True)
SHAPES = dict(gpt2={}, qwen3=QWEN3 | dict(n_kv_head=1, tie_embeddings=False))
SIZES = dict(block_size=32, vocab_size=64, n_layer=2, n_head=2, n_embd=32)
IDS = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(1))
TOKENIZER = char_tokenizer([chr(10)] + [chr(40 + i) for i in range(63)])


def random_model(shape, **sizes):
    """A model whose biases and norms are off where they begin."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES | SHAPES[shape] | sizes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@torch.no_grad()
def move_adapters(model):
    """Give adapters numbers as if they had been trained."""
    for p in adapters.tensors(model).values():
        p.add_(0.1 * torch.randn_like(p))


def adapted(shape, n_new_tokens=0, **sizes):
    model = adapters.add(random_model(shape, **sizes), 4, 8, 0.0, 'attn,mlp', n_new_tokens)
    move_adapters(model)
    return model


def train_adapters(source, path, vocab_size=0, n_new_tokens=0):
    """What a run with adapters on `source` leaves at path; returns its model."""
    start = huggingface.load(str(source))
    about = dict(source=str(source), digest=adapters.digest(start))
    start['model'] = adapters.merged(start, str(source))
    if vocab_size:
        checkpoint.grow_vocabulary(start, vocab_size - n_new_tokens, vocab_size)
    model = checkpoint.load_model(start, str(source)).eval()
    adapters.add(model, 4, 8, 0.0, 'attn,mlp', n_new_tokens)
    move_adapters(model)
    saved = dict(model=adapters.tensors(model), base=about)
    saved['model_args'] = checkpoint.model_args(model.config)
    saved['config'] = dict(lora_rank=4, lora_alpha=8, lora_dropout=0.0, lora_targets='attn,mlp')
    os.makedirs(os.path.dirname(path), exist_ok=True)
    checkpoint.save(str(path), saved)
    TOKENIZER.save(f'{os.path.dirname(path)}/tokenizer.json')
    return model


def save_base(model, path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    args = checkpoint.model_args(model.config)
    checkpoint.save(str(path), dict(model=model.state_dict(), model_args=args, config={}))
    TOKENIZER.save(f'{os.path.dirname(path)}/tokenizer.json')


def loaded(source):
    return checkpoint.load_model(huggingface.load(str(source)), str(source)).eval()


@torch.no_grad()
def largest_difference(model, other, ids=IDS):
    return (model(ids, ids)[0] - other(ids, ids)[0]).abs().max().item()


# ---- in a model


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('sped_up', [False, True])
def test_a_layer_adds_scale_times_b_a(shape, sped_up):
    model, plain = adapted(shape), random_model(shape)
    if sped_up:
        cpu.speed_up(model)
    x = torch.randn(3, 32)
    for name in adapters.LAYERS:
        layer = model.transformer.h[1].get_submodule(name)
        x = torch.randn(3, layer.in_features)
        by_hand = x @ layer.weight.T + 8 / 4 * (x @ layer.lora_A.T) @ layer.lora_B.T
        if layer.bias is not None:
            by_hand += layer.bias
        torch.testing.assert_close(layer(x), by_hand, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            layer = model.get_submodule(name.rpartition('.')[0])
            if hasattr(layer, 'lora_A') and name.endswith('weight'):
                p.add_(8 / 4 * layer.lora_B @ layer.lora_A)
    assert largest_difference(model, plain) < 1e-5 < largest_difference(model, random_model(shape))


def test_nothing_changes_before_the_first_step():
    model = adapters.add(random_model('gpt2'), 4, 8, 0.0, 'attn,mlp', 3)
    assert largest_difference(model, random_model('gpt2')) == 0
    a = model.transformer.h[0].attn.c_attn.lora_A
    assert 0.8 / 32**0.5 < a.abs().max() <= 1 / 32**0.5  # uniform within 1 / sqrt(columns)


WAYS = ['plain', 'sped up', 'sped up before', 'bfloat16', 'checkpointing', 'compiled', 'ddp']


@pytest.mark.slow
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('way', WAYS)
def test_gradients_are_the_same_in_every_way_and_of_adapters_alone(shape, way, tmp_path):
    expected = adapted(shape, 3)
    expected(IDS, IDS)[1].backward()
    model = random_model(shape)
    if way == 'sped up before':
        cpu.speed_up(model)
    adapters.add(model, 4, 8, 0.0, 'attn,mlp', 3)
    adapters.load(model, adapters.tensors(expected))
    model.gradient_checkpointing = way == 'checkpointing'
    network = model
    if way in ('sped up', 'bfloat16'):
        cpu.speed_up(model)
    if way == 'compiled':
        network = torch.compile(model, backend='eager', fullgraph=True)
    if way == 'ddp':
        store = f'file://{tmp_path}/store'
        torch.distributed.init_process_group('gloo', init_method=store, rank=0, world_size=1)
        network = torch.nn.parallel.DistributedDataParallel(model)
    try:
        with torch.autocast('cpu', torch.bfloat16, enabled=way == 'bfloat16'):
            network(IDS, IDS, return_logits=way == 'compiled')[1].backward()
    finally:
        if way == 'ddp':
            torch.distributed.destroy_process_group()
    tolerance = 0.1 if way == 'bfloat16' else 1e-4
    for name, p in model.named_parameters():
        if not adapters.is_part(name):
            assert p.grad is None, name
            continue
        assert p.dtype == torch.float32
        grad = expected.get_parameter(name).grad
        assert (p.grad - grad).abs().max() < tolerance * grad.abs().max(), name


def test_a_step_moves_adapters_alone_and_dropout_is_of_training_alone():
    model, before = adapted('qwen3'), random_model('qwen3')
    for block in model.transformer.h:
        block.mlp.c_fc.lora_dropout.p = 0.5
    assert largest_difference(model, model) == 0  # in evaluation
    first, second = (model.train()(IDS, IDS)[1] for _ in range(2))
    assert first != second
    own = copy.deepcopy(adapters.tensors(model))
    [optimizer] = optimizers.make_optimizers(model, 'adamw', 0.01, 0.1, (0.9, 0.95))
    first.backward()
    optimizer.step()
    base, moved = adapters.split(model.state_dict())
    assert all(torch.equal(base[name], t) for name, t in before.state_dict().items())
    assert len(own) == 16 and all(not torch.equal(moved[name], t) for name, t in own.items())


def test_targets_are_the_layers_that_they_name():
    for targets, names in (
        ('attn', {'attn.c_attn', 'attn.c_proj'}),
        ('mlp.c_fc, attn.c_attn,mlp.c_fc', {'attn.c_attn', 'mlp.c_fc'}),
    ):
        own = adapters.tensors(adapters.add(random_model('gpt2'), 2, 1, 0.0, targets))
        found = {n.removeprefix('transformer.h.').rpartition('.')[0].partition('.')[2] for n in own}
        assert found == names


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(targets='attn,head'), "'head', which is none of attn, mlp, attn.c_attn, attn.c_proj"),
        (dict(targets=''), "lora_targets has ''"),
        (dict(rank=33), 'lora_rank=33 is above the width of attn.c_attn, which is 32'),
    ],
)
def test_what_no_adapter_can_be_leaves_the_model_alone(change, message):
    model = random_model('gpt2')
    with pytest.raises(UserError, match=message):
        adapters.add(model, **dict(rank=4, alpha=8, dropout=0.0, targets='attn,mlp') | change)
    assert not adapters.tensors(model) and all(p.requires_grad for p in model.parameters())


def test_other_adapters_are_not_loaded():
    model = adapted('gpt2')
    own = copy.deepcopy(adapters.tensors(model))
    name = 'transformer.h.0.attn.c_attn.lora_A'
    fewer = {n: t for n, t in own.items() if n != name}
    for saved, message in (
        (fewer, f'the checkpoint lacks the adapter {name}'),
        (own | {'x.lora_A': own[name]}, 'the model lacks the adapter x.lora_A'),
        (own | {name: torch.zeros(5, 32)}, r'lora_A is \(5, 32\) in the checkpoint, and \(4, 32\)'),
    ):
        with pytest.raises(UserError, match=message):
            adapters.load(model, saved)
    assert all(torch.equal(t, own[n]) for n, t in adapters.tensors(model).items())


@pytest.mark.parametrize('shape', SHAPES)
def test_rows_of_new_tokens_are_merged_and_old_tokens_stay(shape):
    model, plain = adapters.add(random_model(shape), 4, 8, 0.0, 'attn', 3), random_model(shape)
    move_adapters(model)
    state = model.state_dict()
    own = {name for name in adapters.tensors(model) if name.endswith('lora_rows')}
    tied = model.config.tie_embeddings
    assert own == {'transformer.wte.lora_rows'} | (set() if tied else {'lm_head.lora_rows'})
    own, config = adapters.tensors(model), dict(lora_alpha=8)
    merged = adapters.merged(dict(model=plain.state_dict() | own, config=config), 'x')
    assert merged.keys() == plain.state_dict().keys()
    for name in ('transformer.wte', 'lm_head'):
        torch.testing.assert_close(
            merged[f'{name}.weight'][-3:], state[f'{name}.weight'][-3:] + state[f'{name}.lora_rows']
        )
        assert torch.equal(merged[f'{name}.weight'][:-3], state[f'{name}.weight'][:-3])
    by_merging = copy.deepcopy(plain)
    by_merging.load_state_dict(merged)
    new = torch.where(IDS % 5 == 0, 61 + IDS % 3, IDS)
    assert largest_difference(model, by_merging, new) < 1e-5
    for packed in (False, True):  # generation, through the cache
        fast = cpu.speed_up(copy.deepcopy(by_merging), packed=packed)
        greedy = fast.generate(new[:, :9], 8, temperature=0)
        assert model.generate(new[:, :9], 8, temperature=0).tolist() == greedy.tolist()
    broken = merged | {'transformer.wte.lora_rows': torch.zeros(3, 5)}
    with pytest.raises(UserError, match='rows of transformer.wte do not fit'):
        adapters.merged(dict(model=broken, config=config), 'x')


# ---- checkpoints


@pytest.mark.parametrize('shape', SHAPES)
def test_a_checkpoint_of_adapters_is_merged_into_its_base(shape, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_base(random_model(shape), 'out/ckpt.pt')
    model = train_adapters('out/ckpt.pt', 'out-lora/ckpt.pt')
    assert os.path.getsize('out-lora/ckpt.pt') < os.path.getsize('out/ckpt.pt')
    assert largest_difference(model, loaded('out-lora/ckpt.pt')) < 1e-5
    # training goes on with the base as it is, and its adapters
    start = huggingface.load('out-lora/ckpt.pt')
    base, own = adapters.split(start['model'])
    again = checkpoint.load_model(start | dict(model=base), 'x').eval()
    adapters.add(again, 4, 8, 0.0, 'attn,mlp')
    adapters.load(again, own)
    assert largest_difference(model, again) == 0
    os.makedirs('elsewhere')  # the base is found by the adapter's folder
    monkeypatch.chdir('elsewhere')
    assert largest_difference(model, loaded(tmp_path / 'out-lora/ckpt.pt')) < 1e-5


@pytest.mark.slow
def test_another_base_or_none_is_refused_in_a_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = random_model('gpt2')
    save_base(base, 'out/ckpt.pt')
    train_adapters('out/ckpt.pt', 'out-lora/ckpt.pt')
    generated = run(tmp_path, 'sample.py', '--out_dir=out-lora', '--num_samples=1', '--start=a')
    assert generated.startswith('a')
    lost = 'out-lora/ckpt.pt was trained on another out/ckpt.pt than the one that is there: put'
    with torch.no_grad():
        base.transformer.h[1].ln_2.bias[3] += 1e-3
    save_base(base, 'out/ckpt.pt')
    assert lost in fails(tmp_path, 'sample.py', '--out_dir=out-lora')
    os.remove('out/ckpt.pt')
    with pytest.raises(UserError, match='needs its base, and out/ckpt.pt is not there'):
        huggingface.load('out-lora/ckpt.pt')
    shutil.copytree('out-lora', 'out', dirs_exist_ok=True)
    with pytest.raises(UserError, match='out/ckpt.pt holds adapters alone, and replaced the base'):
        huggingface.load('out/ckpt.pt')
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir('/')
        with pytest.raises(UserError, match='out/ckpt.pt holds adapters alone, and replaced'):
            huggingface.load(str(tmp_path / 'out/ckpt.pt'))
    saved = checkpoint.load('out-lora/ckpt.pt')
    # each is the other's base: adapters of adapters took the place of the model below them
    torch.save(saved | dict(base=saved['base'] | dict(source='out-lora/ckpt.pt')), 'out/ckpt.pt')
    with pytest.raises(UserError, match='out-lora/ckpt.pt holds adapters alone, and replaced'):
        huggingface.load('out-lora/ckpt.pt')
    for broken in ('out/ckpt.pt', dict(source='out/ckpt.pt'), dict(source=1, digest='x')):
        torch.save(saved | dict(base=broken), 'broken.pt')
        with pytest.raises(UserError, match='broken.pt is no checkpoint: its base or'):
            huggingface.load('broken.pt')


def test_an_adapter_on_an_adapter_with_new_tokens_in_both(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_base(random_model('qwen3', vocab_size=59), 'out/ckpt.pt')
    train_adapters('out/ckpt.pt', 'out-a/ckpt.pt', vocab_size=61, n_new_tokens=2)
    model = train_adapters('out-a/ckpt.pt', 'out-b/ckpt.pt', vocab_size=64, n_new_tokens=3)
    state = huggingface.load('out-b/ckpt.pt')
    assert state['model_args']['vocab_size'] == 64
    assert largest_difference(model, checkpoint.load_model(state, 'x')) < 1e-5
    middle = checkpoint.load('out-a/ckpt.pt')
    checkpoint.save('out-a/ckpt.pt', middle | dict(config=middle['config'] | dict(lora_alpha=9)))
    with pytest.raises(UserError, match='trained on another out-a/ckpt.pt'):
        huggingface.load('out-b/ckpt.pt')


def test_a_context_that_was_cut_for_training_stays_cut(tmp_path):
    save_base(random_model('gpt2'), str(tmp_path / 'out/ckpt.pt'))
    model = train_adapters(tmp_path / 'out/ckpt.pt', str(tmp_path / 'lora/ckpt.pt'))
    path = str(tmp_path / 'lora/ckpt.pt')
    saved = checkpoint.load(path)
    saved['model_args']['block_size'] = 20
    checkpoint.save(path, saved)
    short = loaded(path)
    assert len(short.transformer.wpe.weight) == 20
    assert largest_difference(model, short, IDS[:, :20]) < 1e-5


def test_the_digest_is_of_the_numbers_and_not_of_the_file(tmp_path):
    make('llama tied', tmp_path / 'hf')
    state = huggingface.load(str(tmp_path / 'hf'))
    digest = adapters.digest(state)
    saved = {name: tensor.bfloat16() for name, tensor in state['model'].items()}
    rounded = {name: tensor.float() for name, tensor in saved.items()}
    assert adapters.digest(state | dict(model=saved)) == adapters.digest(dict(model=rounded))
    head = state['model'].pop('lm_head.weight')
    assert adapters.digest(state) == digest
    backwards = dict(reversed(state['model'].items())) | {'lm_head.weight': head.clone()}
    assert adapters.digest(dict(model=backwards)) == digest
    backwards['lm_head.weight'][0, 0] += 1
    assert adapters.digest(dict(model=backwards)) != digest


# ---- a base of few bits


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('shape', SHAPES)
def test_nf4_multiplies_by_bitsandbytes_own_weights(shape, dtype):
    bitsandbytes = pytest.importorskip('bitsandbytes')
    model = quantize.quantize_base(random_model(shape), 'nf4')
    adapters.add(model, 4, 8, 0.0, 'attn,mlp')
    move_adapters(model)
    for name in adapters.LAYERS:
        layer = model.transformer.h[0].get_submodule(name)
        x = torch.randn(2, 5, layer.in_features, requires_grad=True)
        other = x.detach().clone().requires_grad_()
        quantized = layer.weight.data, layer.weight.quant_state
        weight = bitsandbytes.functional.dequantize_4bit(*quantized).float()
        weight = weight + 2 * layer.lora_B @ layer.lora_A
        bias = None if layer.bias is None else layer.bias.float()
        expected = F.linear(other, weight, bias)
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = layer(x)
        assert y.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        assert (y.float() - expected).abs().max() < tolerance * expected.abs().max()
        y.float().square().sum().backward()
        own = layer.lora_A.grad.clone(), layer.lora_B.grad.clone()
        layer.lora_A.grad = layer.lora_B.grad = None
        expected.square().sum().backward()
        theirs = other.grad, layer.lora_A.grad, layer.lora_B.grad
        for grad, wanted in zip((x.grad, *own), theirs, strict=True):
            assert (grad - wanted).abs().max() < 3 * tolerance * wanted.abs().max()


@pytest.mark.parametrize('kind, bits', [('nf4', 4.6), ('int8', 9)])
@pytest.mark.parametrize('shape', SHAPES)
def test_a_quantized_base_is_small_and_trains_after_an_evaluation_too(shape, kind, bits):
    pytest.importorskip('bitsandbytes')
    model = random_model(shape, n_embd=128)
    exact = model(IDS, IDS)[1].item()
    layers = [m for m in model.transformer.h.modules() if isinstance(m, torch.nn.Linear)]
    n_weights = sum(layer.weight.numel() for layer in layers)
    del layers
    quantize.quantize_base(model, kind)
    n_bytes = 0
    for layer in model.transformer.h.modules():
        if isinstance(layer, torch.nn.Linear):
            state = layer.state_dict()
            state.pop('bias', None)
            n_bytes += sum(t.untyped_storage().nbytes() for t in state.values())
    assert n_bytes * 8 < bits * n_weights
    adapters.add(model, 4, 8, 0.0, 'attn,mlp')
    move_adapters(model)
    cpu.speed_up(model.train())
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(IDS, IDS)[1].backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        with torch.no_grad():
            model.eval()(IDS, IDS)
        model.train()
    first, second = gradients
    assert first.keys() == second.keys() == adapters.tensors(model).keys()
    for name, grad in first.items():
        assert grad.any() and torch.allclose(grad, second[name], atol=1e-3 * grad.abs().max())
    without = quantize.quantize_base(random_model(shape, n_embd=128), kind)
    assert 0 < abs(without(IDS, IDS)[1].item() - exact) < 0.1 * exact


def test_another_kind_of_base_is_refused():
    with pytest.raises(UserError, match="quantize_base='fp4' is none of nf4, int8"):
        quantize.quantize_base(random_model('gpt2'), 'fp4')


# ---- peft


def test_ten_steps_lose_as_much_as_with_peft(tmp_path):
    peft = pytest.importorskip('peft')
    theirs, ours = make('gpt2', tmp_path), loaded(tmp_path)
    adapters.add(ours, 4, 8, 0.0, 'attn,mlp')
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=['c_attn', 'c_proj', 'c_fc'], fan_in_fan_out=True
    )
    theirs = peft.get_peft_model(theirs, config).eval()
    with torch.no_grad():
        for name, a in adapters.tensors(ours).items():
            module, _, part = name.rpartition('.')
            theirs.get_parameter(f'base_model.model.{module}.{part}.default.weight').copy_(a)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    assert len(trained) == len(adapters.tensors(ours))
    own = [p for p in ours.parameters() if p.requires_grad]
    both = torch.optim.AdamW(trained, lr=0.02), torch.optim.AdamW(own, lr=0.02)
    losses = []
    for _ in range(10):
        loss, expected = ours(IDS[:, :-1], IDS[:, 1:])[1], theirs(IDS, labels=IDS).loss
        loss.backward()
        expected.backward()
        losses.append((loss.item(), expected.item()))
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1][0] < losses[0][0] - 0.5
    assert max(abs(a - b) for a, b in losses) < 1e-3


@torch.no_grad()
def by_peft(folder, base):
    """The logits of IDS by peft, of the adapter in folder on the base there."""
    peft, transformers = pytest.importorskip('peft'), pytest.importorskip('transformers')
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, folder).eval()(IDS).logits


@pytest.mark.slow
@pytest.mark.parametrize('family', ['gpt2', 'llama', 'qwen3'])
def test_an_exported_adapter_is_the_same_in_peft(family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(family, 'base')
    model = train_adapters('base', 'out-lora/ckpt.pt')
    said = run(tmp_path, 'export.py', '--out_dir=out-lora', '--format=peft')
    assert said.startswith('out-lora/peft: ') and 'read back from it on base' in said
    files = {'adapter_config.json', 'adapter_model.safetensors', 'tokenizer.json'}
    assert set(os.listdir('out-lora/peft')) == files
    with torch.no_grad():
        expected = model(IDS, IDS)[0]
    assert (by_peft('out-lora/peft', 'base') - expected).abs().max() < 1e-4
    with open('out-lora/peft/adapter_config.json') as f:
        saved = json.load(f)
    assert saved['base_model_name_or_path'] == 'base'
    assert saved['fan_in_fan_out'] == (family == 'gpt2')
    assert largest_difference(model, loaded('out-lora/peft')) < 1e-4
    assert 'is there: --overwrite' in fails(
        tmp_path, 'export.py', '--out_dir=out-lora', '--format=peft'
    )


@pytest.mark.slow
def test_an_adapter_on_a_checkpoint_is_exported_beside_its_exported_base(tmp_path, monkeypatch):
    pytest.importorskip('transformers')
    monkeypatch.chdir(tmp_path)
    save_base(random_model('qwen3'), 'out/ckpt.pt')
    model = train_adapters('out/ckpt.pt', 'out-lora/ckpt.pt')
    command = ('export.py', '--out_dir=out-lora', '--format=peft')
    assert 'python export.py --init_from=out/ckpt.pt writes out/hf first' in fails(
        tmp_path, *command
    )
    run(tmp_path, 'export.py', '--init_from=out/ckpt.pt')
    run(tmp_path, *command)
    with torch.no_grad():
        expected = model(IDS, IDS)[0]
    assert (by_peft('out-lora/peft', 'out/hf') - expected).abs().max() < 1e-4
    # an export of another base than the adapter's is noticed
    other = random_model('qwen3')
    with torch.no_grad():
        other.transformer.h[0].mlp.c_fc.weight += 0.1
    save_base(other, 'other/ckpt.pt')
    run(tmp_path, 'export.py', '--init_from=other/ckpt.pt', '--output=out/hf', '--overwrite')
    assert 'read back from it on out/hf are off by' in fails(tmp_path, *command, '--overwrite')
    run(tmp_path, 'export.py', '--out_dir=out-lora')  # the other formats merge
    assert largest_difference(model, loaded('out-lora/hf')) < 1e-4


@pytest.mark.slow
def test_what_peft_cannot_take_costs_a_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_base(random_model('qwen3', vocab_size=61), 'out/ckpt.pt')
    train_adapters('out/ckpt.pt', 'out-lora/ckpt.pt', vocab_size=64, n_new_tokens=3)
    command = ('export.py', '--format=peft')
    assert 'out/ckpt.pt is no checkpoint of adapters' in fails(
        tmp_path, *command, '--init_from=out/ckpt.pt'
    )
    os.makedirs('out/hf')
    assert 'has trained rows of new tokens' in fails(tmp_path, *command, '--out_dir=out-lora')
    assert set(os.listdir('out-lora')) == {'ckpt.pt', 'tokenizer.json'}


OF_PEFT = {
    'queries and values': ('llama', dict(target_modules=['q_proj', 'v_proj'])),
    'rslora': ('qwen3', dict(target_modules=['k_proj', 'up_proj'], use_rslora=True)),
    'all': ('qwen2', dict(target_modules='all-linear')),
    'ranks': ('llama', dict(target_modules=['q_proj', 'v_proj'], rank_pattern={'v_proj': 2})),
    'gpt2': ('gpt2', dict(fan_in_fan_out=True)),
    'one layer': ('gpt2', dict(target_modules=['mlp.c_proj'], layers_to_transform=[1])),
}


@pytest.mark.parametrize('name', OF_PEFT)
def test_an_adapter_of_peft_is_the_same_here(name, tmp_path, monkeypatch):
    peft = pytest.importorskip('peft')
    monkeypatch.chdir(tmp_path)
    family, options = OF_PEFT[name]
    config = peft.LoraConfig(r=3, lora_alpha=7, init_lora_weights=False, **options)
    theirs = make(family, 'base')
    theirs.name_or_path = 'base'
    theirs = peft.get_peft_model(theirs, config).eval()
    theirs.save_pretrained('adapter')
    TOKENIZER.save('base/tokenizer.json')
    state, _, tokenizer = huggingface.load_with_tokenizer('adapter', '')
    assert tokenizer.spec == TOKENIZER.spec
    ours = checkpoint.load_model(state, 'adapter').eval()
    with torch.no_grad():
        expected, logits = theirs(IDS).logits, ours(IDS, IDS)[0]
    assert (logits - expected).abs().max() < 1e-4 < largest_difference(ours, loaded('base'))


@pytest.mark.slow
def test_an_adapter_and_its_base_come_from_the_hub(tmp_path, monkeypatch):
    peft = pytest.importorskip('peft')
    monkeypatch.chdir(tmp_path)
    theirs = make('qwen3', 'base')
    TOKENIZER.save('base/tokenizer.json')
    theirs.name_or_path = 'someone/base'
    config = peft.LoraConfig(r=2, target_modules=['q_proj'], init_lora_weights=False)
    peft.get_peft_model(theirs, config).save_pretrained('adapter')
    flags = ('--num_samples=1', '--temperature=0', '--start=bad', '--max_new_tokens=20')
    with Hub() as hub:
        for repo in ('base', 'adapter'):
            files = {}
            for name in os.listdir(repo):
                with open(f'{repo}/{name}', 'rb') as f:
                    files[name] = f.read()
            hub.add(f'someone/{repo}', files)
        text = run(tmp_path, 'sample.py', '--init_from=someone/adapter', *flags, env=hub.env)
    with open('adapter/adapter_config.json') as f:
        saved = json.load(f)
    with open('adapter/adapter_config.json', 'w') as f:
        json.dump(saved | dict(base_model_name_or_path='base'), f)
    assert text == run(tmp_path, 'sample.py', '--init_from=adapter', *flags)
    assert text != run(tmp_path, 'sample.py', '--init_from=base', *flags)


def test_peft_adapters_of_other_kinds_are_refused_by_name(tmp_path, monkeypatch):
    peft = pytest.importorskip('peft')
    monkeypatch.chdir(tmp_path)
    theirs = make('llama', 'base')
    theirs.name_or_path = 'base'
    for options, message in (
        (dict(use_dora=True), 'use_dora=True is not supported'),
        (dict(bias='all'), "bias='all' is not supported"),
        (dict(modules_to_save=['lm_head']), 'modules_to_save=.*lm_head.* is not supported'),
        (dict(alpha_pattern={'q_proj': 2}), 'alpha_pattern=.* is not supported'),
        (dict(target_modules=['embed_tokens']), 'embed_tokens.* is no LoRA of a llama block'),
    ):
        config = peft.LoraConfig(**dict(r=2, target_modules=['q_proj']) | options)
        peft.get_peft_model(copy.deepcopy(theirs), config).save_pretrained('adapter')
        with pytest.raises(UserError, match=message):
            huggingface.load('adapter')
        shutil.rmtree('adapter')
    config = peft.LoraConfig(r=2, target_modules=['q_proj'])
    peft.get_peft_model(copy.deepcopy(theirs), config).save_pretrained('adapter')
    with open('adapter/adapter_config.json') as f:
        saved = json.load(f)
    for change, message in (
        (dict(peft_type='IA3'), "peft_type='IA3' is none that is read"),
        (dict(init_lora_weights='pissa'), "'pissa' changed the base's weights"),
        (dict(lora_alpha=0), 'lora_alpha=0 is no number above 0'),
        (dict(base_model_name_or_path=None), 'names no base'),
        (dict(base_model_name_or_path='no/such/base'), 'adapter needs its base: no/such/base'),
        (dict(base_model_name_or_path='adapter'), 'adapter holds adapters alone, and replaced'),
    ):
        with open('adapter/adapter_config.json', 'w') as f:
            json.dump(saved | change, f)
        with pytest.raises(UserError, match=message):
            huggingface.load('adapter')
    with open('adapter/adapter_config.json', 'w') as f:
        json.dump(saved, f)
    make('qwen3', 'base')  # of other heads
    with pytest.raises(UserError, match=r'q_proj is \(48, 2\) by \(2, 24\), and the layer \(60'):
        huggingface.load('adapter')
    os.remove('adapter/adapter_model.safetensors')
    with pytest.raises(UserError, match='adapter has no adapter_model.safetensors'):
        huggingface.load('adapter')
