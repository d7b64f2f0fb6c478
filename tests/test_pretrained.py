"""Models of the four families, made at random by transformers in odd sizes, are the same here."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, fails, run, write_tiny
from hub import Hub
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import model as model_py
from fledge import UserError
from fledge.checkpoint import load, load_model
from fledge.formats import families, gguf, hub, huggingface
from fledge.tokenizer import byte_tokenizer, load_tokenizer

transformers = pytest.importorskip('transformers')
SHARED = dict(
    vocab_size=64,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=96,
)
LLAMA3 = dict(
    rope_type='llama3',
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
FAMILIES = {
    'gpt2': lambda: transformers.GPT2Config(
        vocab_size=64, n_positions=96, n_embd=24, n_layer=2, n_head=3, n_inner=56
    ),
    'gpt2 gelu untied': lambda: transformers.GPT2Config(
        vocab_size=64,
        n_positions=96,
        n_embd=24,
        n_layer=2,
        n_head=3,
        activation_function='gelu',
        tie_word_embeddings=False,
    ),
    'llama': lambda: transformers.LlamaConfig(
        **SHARED, head_dim=8, rope_parameters=dict(rope_type='default', rope_theta=5000.0)
    ),
    'llama tied': lambda: transformers.LlamaConfig(**SHARED, tie_word_embeddings=True),
    'llama 3': lambda: transformers.LlamaConfig(
        **SHARED, head_dim=10, rope_parameters=LLAMA3 | dict(rope_theta=500000.0)
    ),
    'llama linear': lambda: transformers.LlamaConfig(
        **SHARED | dict(intermediate_size=96),
        rope_parameters=dict(rope_type='linear', factor=4.0, rope_theta=10000.0),
    ),
    'qwen2': lambda: transformers.Qwen2Config(**SHARED, tie_word_embeddings=True),
    'qwen3': lambda: transformers.Qwen3Config(**SHARED, head_dim=10, rms_norm_eps=1e-5),
    'qwen3 one kv head': lambda: transformers.Qwen3Config(
        **SHARED | dict(num_key_value_heads=1), head_dim=16, tie_word_embeddings=True
    ),
}


def make(name, folder, vocab_size=64, **saved):
    """A random model of a family, its biases and norms moved off where they begin, in folder."""
    torch.manual_seed(0)
    config = FAMILIES[name]()
    config.vocab_size = vocab_size
    theirs = (
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation='eager')
        .float()
        .eval()
    )
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(folder, **saved)
    return theirs


@pytest.mark.slow
@pytest.mark.parametrize('name', FAMILIES)
def test_logits_and_greedy_text_are_theirs(name, tmp_path):
    theirs = make(name, tmp_path)
    ours = load_model(huggingface.load(str(tmp_path)), str(tmp_path)).eval()
    ids = torch.randint(0, 64, (2, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
        logits = torch.stack(
            [ours(ids[:, :n])[0][:, -1] for n in (1, 40, 90)], 1
        )  # ours gives the last position's
    assert (logits - expected[:, [0, 39, 89]]).abs().max() < 1e-4
    start = ids[:1, :20]
    greedy = theirs.generate(
        start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, 20:]
    assert ours.generate(start, 64, temperature=0)[0, 20:].tolist() == greedy.tolist()


@pytest.mark.parametrize('name', ['gpt2', 'qwen3', 'llama'])
def test_several_shards_are_read(name, tmp_path):
    make(name, tmp_path / 'whole')
    make(name, tmp_path / 'shards', max_shard_size='20kB')
    assert len(list((tmp_path / 'shards').glob('*.safetensors'))) > 1
    whole, shards = (
        huggingface.load(str(tmp_path / 'whole')),
        huggingface.load(str(tmp_path / 'shards')),
    )
    assert whole['model_args'] == shards['model_args'] and all(
        torch.equal(t, shards['model'][n]) for n, t in whole['model'].items()
    )
    # a shard that the index names and that is not there
    next((tmp_path / 'shards').glob('*.safetensors')).unlink()
    with pytest.raises(UserError, match='shards has no model-0.*save the model again'):
        huggingface.load(str(tmp_path / 'shards'))


def test_pickled_weights_are_not_opened(tmp_path):
    make('llama', tmp_path)

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'owned'),)

    os.remove(tmp_path / 'model.safetensors')
    torch.save({'x': Payload()}, tmp_path / 'pytorch_model.bin')
    with pytest.raises(UserError, match='has no model.safetensors: save the model again'):
        huggingface.load(str(tmp_path))
    assert not (tmp_path / 'owned').exists()


def test_both_spellings_of_rope_are_the_same(tmp_path):
    make('llama 3', tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    new = families.read_config(config, 'x')
    rope = config.pop('rope_parameters')
    old = families.read_config(
        config | dict(rope_theta=rope.pop('rope_theta'), rope_scaling=rope), 'x'
    )
    assert (
        old == new
        and new['rope_scaling']['rope_type'] == 'llama3'
        and new['rope_theta'] == 500000.0
    )


@pytest.mark.parametrize(
    'name, change',
    [
        (
            'llama',
            dict(rope_parameters=LLAMA3, rope_theta=5000.0, original_max_position_embeddings=64),
        ),
        (
            'llama',
            dict(
                rope_parameters={
                    k: v for k, v in LLAMA3.items() if k != 'original_max_position_embeddings'
                }
            ),
        ),
        (
            'llama',
            dict(
                rope_parameters=dict(rope_theta=5.0),
                rope_scaling=dict(rope_type='linear', factor=2.0),
            ),
        ),
        ('llama', dict(rope_parameters=None, rope_theta=300.0, partial_rotary_factor=None)),
        ('llama', dict(rope_parameters=None, rope_scaling=dict(type='linear', factor=2.0))),
        ('llama', dict(hidden_act='swish')),
        (
            'qwen2',
            dict(use_sliding_window=True, sliding_window=8, max_window_layers=2, layer_types=None),
        ),
        (
            'qwen2',
            dict(
                use_sliding_window=True, sliding_window=None, max_window_layers=0, layer_types=None
            ),
        ),
        ('gpt2', dict(activation_function='gelu_fast')),
        ('gpt2', dict(activation_function='gelu_python')),
    ],
)
def test_what_a_config_may_say_means_what_it_means_to_transformers(name, change, tmp_path):
    make(name, tmp_path)
    path = tmp_path / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    theirs, ids = (
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, attn_implementation='eager'
        ).eval(),
        torch.arange(90)[None] % 64,
    )
    ours = load_model(huggingface.load(str(tmp_path)), str(tmp_path)).eval()
    with torch.no_grad():
        assert (ours(ids, ids)[0] - theirs(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize('name', ['gpt2', 'llama tied', 'qwen2'])
def test_a_head_of_its_own_is_kept_whatever_the_config_says(name, tmp_path):
    make(name, tmp_path)
    tensors, ids = load_file(tmp_path / 'model.safetensors'), torch.arange(30)[None]
    embedding = next(
        t for n, t in tensors.items() if n.endswith(('wte.weight', 'embed_tokens.weight'))
    )
    save_file(
        tensors | {'lm_head.weight': embedding.clone()},
        tmp_path / 'model.safetensors',
        {'format': 'pt'},
    )
    assert huggingface.load(str(tmp_path))['model_args'].get('tie_embeddings', True)
    save_file(
        tensors | {'lm_head.weight': torch.randn(embedding.shape)},
        tmp_path / 'model.safetensors',
        {'format': 'pt'},
    )
    state = huggingface.load(str(tmp_path))
    ours, theirs = (
        load_model(state, 'x').eval(),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval(),
    )
    with torch.no_grad():
        assert (
            state['model_args']['tie_embeddings'] is False
            and (ours(ids, ids)[0] - theirs(ids).logits).abs().max() < 1e-4
        )


@pytest.mark.parametrize('name', FAMILIES)
def test_a_config_makes_the_same_shapes_in_transformers(name, tmp_path):
    make(name, tmp_path)
    ours = load_model(huggingface.load(str(tmp_path)), str(tmp_path))
    config = transformers.AutoConfig.for_model(**families.config_of(ours.config))
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    mine = dict(huggingface.their_tensors(ours, config.model_type))
    their_state = theirs.state_dict()
    if ours.config.tie_embeddings:
        del their_state['lm_head.weight']
    assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in their_state.items()}
    assert families.read_config(config.to_dict(), 'x')[
        'rope_theta' if 'gpt2' not in name else 'bias'
    ]


# Two families that are no family here, as the rows of a table.
MISTRAL = replace(families.LLAMA, architecture='MistralForCausalLM', only=dict(sliding_window=None))
PHI3 = replace(
    families.LLAMA,
    architecture='Phi3ForCausalLM',
    gguf='phi3',
    tensors=[
        row
        for row in families.LLAMA_TENSORS
        if not row[0].endswith(('c_attn', 'c_fc', 'q_norm', 'k_norm'))
    ]
    + [
        ('transformer.h.{}.attn.c_attn', 'model.layers.{}.self_attn.qkv_proj', 'blk.{}.attn_qkv'),
        ('transformer.h.{}.mlp.c_fc', 'model.layers.{}.mlp.gate_up_proj', 'blk.{}.ffn_up'),
    ],
    only=dict(attention_bias=False, sliding_window=None),
    gguf_pairs=(),
)


@pytest.mark.parametrize(
    'kind, family, settings',
    [
        ('mistral', MISTRAL, dict(head_dim=8)),
        ('phi3', PHI3, dict(pad_token_id=0)),
    ],
)
def test_a_new_family_is_rows_of_a_table(kind, family, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(families, 'FAMILIES', {kind: family} | families.FAMILIES)
    settings = SHARED | dict(vocab_size=300, sliding_window=None) | settings
    config = transformers.AutoConfig.for_model(kind, **settings)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    theirs.save_pretrained(tmp_path / 'in')
    ours = load_model(huggingface.load(str(tmp_path / 'in')), 'x').eval()
    ids = torch.arange(60)[None]
    with torch.no_grad():
        logits = ours(ids, ids)[0]
        assert (logits - theirs(ids).logits).abs().max() < 1e-4
        # out again, as the family that is the first of the table
        (tmp_path / 'out').mkdir()
        huggingface.write(str(tmp_path / 'out'), ours, byte_tokenizer(), torch.float32, 'a card')
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out').eval()
        assert type(again) is type(theirs)
        assert (again(ids).logits - logits).abs().max() < 1e-4
    gguf.write(str(tmp_path / 'm.gguf'), ours, byte_tokenizer(), 'float32', 'x')
    assert gguf.largest_error(str(tmp_path / 'm.gguf'), ours, 'float32') == 0
    wanted = dict(sliding_window=16) if kind == 'mistral' else dict(attention_bias=True)
    path = tmp_path / 'in/config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | wanted))
    with pytest.raises(UserError, match='is not supported'):
        huggingface.load(str(tmp_path / 'in'))


def test_a_single_file_goes_before_the_index_of_earlier_shards(tmp_path):
    make('llama', tmp_path, max_shard_size='20kB')
    whole = make('llama', tmp_path / 'new')
    with torch.no_grad():
        whole.model.norm.weight.add_(1.0)
    whole.save_pretrained(tmp_path / 'new')
    os.replace(tmp_path / 'new/model.safetensors', tmp_path / 'model.safetensors')
    assert torch.equal(
        huggingface.load(str(tmp_path))['model']['transformer.ln_f.weight'], whole.model.norm.weight
    )


@pytest.mark.slow
def test_a_vocabulary_of_before_tokenizer_json_is_not_taken_for_gpt2s(tmp_path):
    """Its size may be GPT-2's own, and its tokens others."""
    make('gpt2', tmp_path, vocab_size=50257)
    (tmp_path / 'merges.txt').write_text('#version: 0.2\na b\n')
    error = fails(tmp_path, 'sample.py', f'--init_from={tmp_path}', '--start=a')
    assert 'has merges.txt and no tokenizer.json' in error
    with pytest.raises(UserError, match='has merges.txt and no tokenizer.json'):
        load_tokenizer(str(tmp_path))


def test_old_files_without_a_prefix_and_with_buffers(tmp_path):
    make('gpt2', tmp_path)
    before = huggingface.load(str(tmp_path))
    tensors = {
        n.removeprefix('transformer.'): t.clone()
        for n, t in load_file(tmp_path / 'model.safetensors').items()
    }
    tensors |= {'h.0.attn.bias': torch.ones(1, 1, 4, 4), 'h.0.attn.masked_bias': torch.tensor(-1e4)}
    save_file(tensors, tmp_path / 'model.safetensors')
    after = huggingface.load(str(tmp_path))
    assert all(torch.equal(t, after['model'][n]) for n, t in before['model'].items())


def test_a_name_on_the_hub_is_no_path_into_a_folder_that_is_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.is_name('gpt2') and hub.is_name('owner/model') and not hub.is_name('a/b/c')
    (tmp_path / 'owner').mkdir()
    assert not hub.is_name('owner/model')
    with pytest.raises(UserError, match='no name on the .* hub while there is a folder owner'):
        huggingface.load('owner/model')
    with pytest.raises(UserError, match='no tokenizer at owner/model'):
        load_tokenizer('owner/model')


def test_fewer_positions_and_with_rope_more(tmp_path):
    make('gpt2', tmp_path / 'gpt2')
    make('qwen3', tmp_path / 'qwen3')
    assert huggingface.load(str(tmp_path / 'gpt2'), 32)['model'][
        'transformer.wpe.weight'
    ].shape == (
        32,
        24,
    )
    with pytest.raises(UserError, match='has 96 learned positions; block_size=200 is more'):
        huggingface.load(str(tmp_path / 'gpt2'), 200)
    assert huggingface.load(str(tmp_path / 'qwen3'), 200)['model_args']['block_size'] == 200


@pytest.mark.parametrize(
    'name, change, message',
    [
        (
            'llama',
            dict(model_type='mixtral'),
            "model_type 'mixtral' is none of gpt2, llama, qwen2, qwen3",
        ),
        (
            'qwen2',
            dict(use_sliding_window=True, sliding_window=16, max_window_layers=1, layer_types=None),
            'use_sliding_window=True is not supported',
        ),
        ('llama', dict(hidden_act='gelu'), "hidden_act='gelu' is not supported"),
        ('llama', dict(attention_bias=True), 'attention_bias=True is not supported'),
        ('gpt2', dict(activation_function='relu'), "activation_function='relu' is not supported"),
        (
            'llama',
            dict(rope_parameters=dict(rope_type='yarn', factor=2.0, rope_theta=1e4)),
            "RoPE of type 'yarn' is not supported",
        ),
        ('llama', dict(num_attention_heads=5), 'n_head=5 is not divisible by n_kv_head=2'),
        ('llama', dict(hidden_size=30), 'is expected'),
        ('llama', dict(num_local_experts=8), 'num_local_experts=8 is not supported'),
        ('llama', dict(residual_multiplier=0.2), 'residual_multiplier=0.2 is not supported'),
        (
            'llama',
            dict(quantization_config=dict(quant_method='fp8')),
            'quantization_config=.*fp8.* is not supported',
        ),
        (
            'qwen2',
            dict(layer_types=['full_attention', 'chunked_attention']),
            'layer_types has chunked_attention',
        ),
        ('qwen2', dict(layer_types=5), 'describes no model'),
        (
            'llama',
            dict(rope_parameters=dict(full_attention=dict(rope_type='default'))),
            'RoPE of several kinds',
        ),
        ('llama', dict(rope_parameters='x'), 'describes no model'),
        ('llama', dict(rope_scaling=[1]), 'describes no model'),
        (
            'llama',
            dict(rope_scaling=dict(rope_type='linear', factor=0)),
            'factor=0 is no float that a model can have',
        ),
        ('llama', dict(rope_scaling=dict(rope_type='linear')), "lacks 'factor'"),
        (
            'llama',
            dict(rope_scaling=LLAMA3 | dict(low_freq_factor=4.0)),
            'low_freq_factor = high_freq_factor',
        ),
        (
            'llama',
            dict(rope_parameters=None, rope_theta=float('nan')),
            'rope_theta=nan is no float',
        ),
        ('qwen3', dict(rms_norm_eps='x'), "norm_eps='x' is no float"),
        ('qwen3', dict(max_position_embeddings=1.5), 'block_size=1.5 is no int'),
        ('qwen3', dict(intermediate_size=0), 'is expected'),
        ('qwen3', dict(num_key_value_heads=True), 'n_kv_head=True is no int'),
        ('llama', dict(model_type=['llama']), "model_type .'llama'. is none of"),
        ('llama', dict(num_hidden_layers=3), 'has no tensor model.layers.2.input_layernorm.weight'),
        ('llama', dict(num_hidden_layers=1), r'tensor model.layers.1\S+ is none of a llama model'),
    ],
)
def test_what_does_not_fit_is_one_line_that_names_it(name, change, message, tmp_path):
    make(name, tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        huggingface.load(str(tmp_path))


def test_broken_folders_and_names(tmp_path):
    with pytest.raises(UserError, match='is a folder without a config.json'):
        huggingface.load(str(tmp_path))
    (tmp_path / 'config.json').write_text('{')
    with pytest.raises(UserError, match='no valid JSON'):
        huggingface.load(str(tmp_path))
    make('llama', tmp_path)
    tensors = load_file(tmp_path / 'model.safetensors')
    save_file(
        tensors | {'model.norm.weight': torch.ones(24, dtype=torch.int8)},
        tmp_path / 'model.safetensors',
    )
    with pytest.raises(
        UserError, match='tensor model.norm.weight is int8; only weights that are not quantized'
    ):
        huggingface.load(str(tmp_path))
    (tmp_path / 'model.safetensors').rename(tmp_path / 'aside')
    for weight_map in ({'model.norm.weight': '../outside.safetensors'}, ['a'], None):
        (tmp_path / 'model.safetensors.index.json').write_text(
            json.dumps(dict(weight_map=weight_map))
        )
        with pytest.raises(UserError, match='has no weight_map of files beside it'):
            huggingface.load(str(tmp_path))
    (tmp_path / 'model.safetensors.index.json').unlink()
    (tmp_path / 'aside').rename(tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').rename(tmp_path / 'kept')
    (tmp_path / 'config.json').write_text('[' * 100000)
    with pytest.raises(UserError, match='no valid JSON'):
        huggingface.load(str(tmp_path))
    (tmp_path / 'kept').rename(tmp_path / 'config.json')
    (tmp_path / 'model.safetensors').write_bytes(b'\x08\x00\x00\x00\x00\x00\x00\x00{}      ')
    with pytest.raises(UserError, match='has no tensor model.embed_tokens.weight'):
        huggingface.load(str(tmp_path))
    (tmp_path / 'model.safetensors').write_bytes(b'no')
    with pytest.raises(UserError, match='model.safetensors cannot be read'):
        huggingface.load(str(tmp_path))
    (tmp_path / 'model.safetensors').unlink()
    with pytest.raises(UserError, match='has no model.safetensors'):
        huggingface.load(str(tmp_path))
    with pytest.raises(
        UserError, match='is no file or folder, and no name on the Hugging Face hub'
    ):
        huggingface.load('no/such/place')


FLAGS = [
    '--dataset=tiny',
    '--block_size=32',
    '--batch_size=4',
    '--max_iters=3',
    '--eval_interval=3',
    '--eval_iters=1',
    '--log_interval=1',
    '--device=cpu',
    '--dtype=float32',
    '--sample_interval=0',
    '--max_minutes=0',
    '--learning_rate=0.001',
    '--gradient_accumulation_steps=1',
]


@pytest.mark.slow
def test_training_begins_with_it_and_the_tokenizer_comes_along(tmp_path):
    write_tiny(tmp_path / 'data' / 'tiny')
    make('qwen3', tmp_path / 'base')
    assert 'step 3' in run(tmp_path, 'train.py', '--init_from=base', '--dropout=0.25', *FLAGS)
    assert load(str(tmp_path / 'out/ckpt.pt'))['model_args']['dropout'] == 0.25
    (tmp_path / 'base/tokenizer.json').write_bytes(
        (tmp_path / 'data/tiny/tokenizer.json').read_bytes()
    )
    assert run(
        tmp_path,
        'sample.py',
        '--init_from=base',
        '--start=((',
        '--max_new_tokens=5',
        '--device=cpu',
    ).startswith('((')
    (
        tmp_path / 'data/tiny/tokenizer.json'
    ).unlink()  # the data says nothing: then it is the model's
    run(tmp_path, 'train.py', '--init_from=base', '--out_dir=with', *FLAGS)
    assert (
        load_tokenizer(str(tmp_path / 'with')).chars == load_tokenizer(str(tmp_path / 'base')).chars
    )
    byte_tokenizer().save(str(tmp_path / 'data/tiny/tokenizer.json'))
    assert (
        'was prepared with another tokenizer than the one of base: prepare it with --tokenizer=base'
        in fails(tmp_path, 'train.py', '--init_from=base', '--out_dir=no', *FLAGS)
    )
    assert 'is no file or folder, and no name on the Hugging Face hub' in fails(
        tmp_path, 'train.py', '--init_from=no such', *FLAGS
    )
    (tmp_path / 'base/tokenizer.json').unlink()
    assert 'has no tokenizer.json beside it' in fails(tmp_path, 'sample.py', '--init_from=base')


@pytest.mark.slow
def test_by_a_name_on_the_hub(tmp_path):
    make('llama', tmp_path / 'model', vocab_size=259, max_shard_size='20kB')
    spec = byte_tokenizer().spec
    begin = dict(
        type='TemplateProcessing',
        single=[
            dict(SpecialToken=dict(id='<|im_start|>', type_id=0)),
            dict(Sequence=dict(id='A', type_id=0)),
        ],
        pair=[],
        special_tokens={
            '<|im_start|>': dict(id='<|im_start|>', ids=[257], tokens=['<|im_start|>'])
        },
    )
    (tmp_path / 'model/tokenizer.json').write_text(json.dumps(spec | dict(post_processor=begin)))
    files = {path.name: path.read_bytes() for path in (tmp_path / 'model').iterdir()}
    (tmp_path / 'notes.txt').write_text('some words. ' * 4000)
    (tmp_path / 'many.jsonl').write_text(
        ''.join(f'{{"text": "note {i}, of some words"}}\n' for i in range(400))
    )
    with Hub() as hub:
        hub.add('someone/model', files | {'unwanted.bin': b'x' * 1000})
        pickled = {'config.json': files['config.json'], 'pytorch_model.bin': b'no pickle'}
        hub.add('someone/pickled', pickled)
        hub.add('someone/gated', files)
        hub.gated.add('someone/gated')
        greedy = [
            '--max_new_tokens=12',
            '--num_samples=1',
            '--temperature=0',
            '--start=some',
            '--device=cpu',
        ]
        text = run(tmp_path, 'sample.py', '--init_from=someone/model', *greedy, env=hub.env)
        assert not [path for _, path in hub.requests if 'unwanted' in path and '/resolve/' in path]
        theirs, model = (
            ['--init_from=model', *greedy],
            load_model(huggingface.load(str(tmp_path / 'model')), 'model').eval(),
        )
        ids = model.generate([[257, *b'some']], 12, temperature=0)[
            0
        ]  # with what the tokenizer puts in front
        assert text == run(tmp_path, 'sample.py', *theirs) and text.startswith(
            'some' + load_tokenizer(str(tmp_path / 'model')).decode(ids[5:])
        )
        run(
            tmp_path,
            'prepare/text.py',
            '--input=many.jsonl',
            '--name=tiny',
            '--tokenizer=someone/model',
            '--val_fraction=0.1',
            env=hub.env,
        )
        assert load_tokenizer(str(tmp_path / 'data/tiny')).spec['post_processor']
        assert 'step 3' in run(
            tmp_path, 'train.py', '--init_from=someone/model', *FLAGS, env=hub.env
        )
        script = """import sys
from fledge import UserError
from fledge.formats import huggingface
for name in sys.argv[1:]:
    try:
        huggingface.load(name)
    except UserError as e:
        print(e)"""
        done = subprocess.run(
            [sys.executable, '-c', script, 'someone/none', 'someone/gated', 'someone/pickled'],
            cwd=ROOT,
            env=os.environ | hub.env,
            capture_output=True,
            text=True,
        )
        none, gated, pickled = done.stdout.splitlines()
        assert (
            'the Hugging Face hub has no such model' in none
            and 'is gated on the Hugging Face hub: accept its terms' in gated
            and 'has no model.safetensors: save the model again with transformers' in pickled
        )
        hub.down = True
        assert text == run(
            tmp_path, 'sample.py', '--init_from=someone/model', *greedy, env=hub.env
        )  # from the cache
        assert 'cannot be had from the Hugging Face hub' in fails(
            tmp_path, 'sample.py', '--init_from=someone/other', env=hub.env
        )
    assert 'cannot be had from the Hugging Face hub' in fails(
        tmp_path,
        'prepare/text.py',
        '--tokenizer=someone/none',
        '--input=notes.txt',
        '--name=x',
        env=hub.env,
    )  # no network at all
    assert 'no tokenizer at data/none' in fails(
        tmp_path,
        'prepare/text.py',
        '--tokenizer=data/none',
        '--input=notes.txt',
        '--name=x',
        env=hub.env,
    )


@pytest.mark.slow
def test_loading_takes_one_model_and_one_tensor(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=20000,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    theirs = transformers.AutoModelForCausalLM.from_config(config).float()
    size = sum(p.numel() for p in theirs.parameters()) * 4
    theirs.save_pretrained(tmp_path)
    script = """import re, sys
from fledge import checkpoint
from fledge.formats import huggingface
peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]) * 1024
before = peak()
model = checkpoint.load_model(huggingface.load(sys.argv[1]), 'x')
print(peak() - before)"""
    done = subprocess.run(
        [sys.executable, '-c', script, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (
        0.9 * size < int(done.stdout) < size + 20000 * 512 * 4 * 2.5 < 1.5 * size
    )  # what is mapped of the file counts as well


def window(size):
    """CausalSelfAttention.attend that sees so many tokens."""

    def attend(attention, q, k, v, mask):
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril().triu(1 - size)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)

    return attend


def scaled(attention, q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.45, enable_gqa=True)


def parallel(block, x, context):
    return x + block.attn(block.ln_1(x), context) + block.mlp(block.ln_2(x))


def capped(model, idx, targets=None, forward=model_py.GPT.forward):
    logits, loss = forward(model, idx, targets)
    return 30 * torch.tanh(logits / 30), loss


def rms_norm(norm, x):
    return F.rms_norm(x, norm.normalized_shape, 1 + norm.weight, norm.eps)


def layer_norm(norm, x):
    return F.layer_norm(x, norm.normalized_shape, 1 + norm.weight, norm.bias, norm.eps)


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


ATTENTION = model_py.CausalSelfAttention
EDITS = {
    'a window of 12': [(ATTENTION, 'attend', window(12))],
    'a window of 500': [(ATTENTION, 'attend', window(500))],
    'the scale of attention': [(ATTENTION, 'attend', scaled)],
    'a parallel block': [(model_py.Block, 'forward', parallel)],
    'a cap on the logits': [(model_py.GPT, 'forward', capped)],
    'norms of 1 + weight': [
        (model_py.RMSNorm, 'forward', rms_norm),
        (torch.nn.LayerNorm, 'forward', layer_norm),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize('kind, activation', families.SUM_OF_LOGITS)
@torch.no_grad()
def test_what_an_edited_model_computes_is_held_against_its_family(kind, activation, monkeypatch):
    ours = families.tiny_model(kind, activation)
    config = families.config_of(ours.config) | dict(bos_token_id=None, eos_token_id=None)
    assert config['model_type'] == kind
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config)
    ).eval()
    theirs.load_state_dict(dict(huggingface.their_tensors(ours, kind)), strict=False)
    theirs.tie_weights()
    found = theirs(torch.arange(1024)[None] // 64).logits[0, -1].abs().sum().item()
    assert found == pytest.approx(families.SUM_OF_LOGITS[kind, activation], rel=2e-6)
    assert families.edited(kind, activation) == ''
    said = f'model.py was edited, and no longer computes what {kind} with {activation} does'
    for edit, changes in EDITS.items():
        with monkeypatch.context() as patch:
            for change in changes:
                patch.setattr(*change)
            assert families.edited(kind, activation) == said, edit
    other_gelu = model_py.ACTIVATIONS['gelu_tanh' if activation == 'gelu' else 'gelu'][1]
    for function in (quick_gelu, other_gelu):
        gated = activation == 'swiglu'
        monkeypatch.setitem(model_py.ACTIVATIONS, activation, (gated, function))
        assert families.edited(kind, activation) == said
    monkeypatch.undo()
    assert families.edited(kind, activation) == ''


@pytest.mark.slow
def test_every_activation_of_every_family_is_compared_on_any_cpu():
    every = {(k, a) for k, f in families.FAMILIES.items() for a in f.activations.values()}
    assert every == families.SUM_OF_LOGITS.keys()
    script = 'from fledge.formats.families import *\n'
    script += 'print([edited(*key) for key in SUM_OF_LOGITS])'
    older = dict(MKL_ENABLE_INSTRUCTIONS='AVX2', ONEDNN_MAX_CPU_ISA='AVX2')
    said = subprocess.run(
        [sys.executable, '-c', script],
        cwd=ROOT,
        env=os.environ | older | dict(ATEN_CPU_CAPABILITY='avx2'),
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == f'{[""] * len(every)}\n'


def test_weights_of_a_family_in_an_edited_model_are_loaded_with_a_line(
    tmp_path, monkeypatch, capsys
):
    make('gpt2 gelu untied', tmp_path)
    capsys.readouterr()
    state = torch.get_rng_state()
    huggingface.load(str(tmp_path))
    assert capsys.readouterr().err == '' and torch.equal(state, torch.get_rng_state())
    monkeypatch.setitem(model_py.ACTIVATIONS, 'gelu', (False, quick_gelu))
    assert load_model(huggingface.load(str(tmp_path)), str(tmp_path)).config.n_embd == 24
    assert capsys.readouterr().err == (
        f'{tmp_path}: model.py was edited, and no longer computes what gpt2 with gelu does: '
        'these weights were made for another model\n'
    )


def test_weights_of_a_family_that_lack_what_model_py_has_are_a_line(tmp_path, monkeypatch):
    make('gpt2 gelu untied', tmp_path)
    init = model_py.MLP.__init__

    def with_gain(self, config):
        init(self, config)
        self.gain = torch.nn.Parameter(torch.zeros(1))

    monkeypatch.setattr(model_py.MLP, '__init__', with_gain)
    with pytest.raises(UserError, match='model.py has transformer.h.0.mlp.gain, which is in no'):
        huggingface.load(str(tmp_path))
