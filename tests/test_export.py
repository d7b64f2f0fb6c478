"""Models that leave: to transformers, GGUF and ONNX, and in 8 bits; read back by who reads them."""

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import time

import gguf_reader
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, fails, forked, metrics, python, run, start, write_tiny
from safetensors.torch import load_file, save_file
from test_pretrained import FAMILIES, make
from test_tokenizer import random_texts

from fledge import UserError, adapters, checkpoint, quantize
from fledge.formats import families, gguf, huggingface, onnx
from fledge.tokenizer import (
    CHAT_TEMPLATE,
    Tokenizer,
    byte_tokenizer,
    char_tokenizer,
    find_tokenizer,
    load_tokenizer,
    train_bpe,
)
from model import GPT, GPTConfig

transformers = pytest.importorskip('transformers')
gguf_package = pytest.importorskip('gguf')
TEXT = (
    'the quick brown fox, jumps over 12 lazy dogs. It\'s\n\n  a "test" of <tokens> and naïve '
    'cafés; 東京 too! def main(x):\n\treturn x + 1\n'
)


def model_of(name, folder, vocab_size=64):
    """Ours, of a family of transformers' at random, and theirs."""
    theirs = make(name, folder, vocab_size=vocab_size)
    return checkpoint.load_model(huggingface.load(str(folder)), str(folder)).eval(), theirs


def logits(model, ids):
    with torch.no_grad():
        return model(ids, ids)[0]


FLAGS = {
    'hf': [],
    'q8_0': ['--format=gguf', '--dtype=q8_0', '--output=q8_0.gguf'],
    'gguf': ['--format=gguf'],
    'int8': ['--quantize=int8'],
    'ckpt': ['--format=ckpt', '--output=plain/model.pt'],
}


PREPARING = '--input=notes.jsonl --name=notes --tokenizer=train --vocab_size=400'
PREPARING += ' --val_fraction=0.1 --num_proc=1'
TRAINING = '--dataset=notes --eval_iters=1 --sample_interval=0 --device=cpu'
WIDE = '--batch_size=4 --n_layer=2 --n_embd=192 --n_head=3 --block_size=128'


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run of few steps on text in a tokenizer of its own, and its exports by each of FLAGS."""
    base = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:  # one test process makes it, for all
        base = base.parent
    made = base / 'exported'
    with open(f'{made}.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made / 'said.json').exists():
            made.mkdir()
            with open(made / 'notes.jsonl', 'w') as f:
                f.writelines(json.dumps(dict(text=f'{i} {TEXT}{i * i}')) + '\n' for i in range(300))
            run(made, 'prepare/text.py', *PREPARING.split())
            steps = ['--max_iters=12', '--learning_rate=0.01']
            run(made, 'train.py', *TRAINING.split(), *WIDE.split(), *steps)
            said = {}
            for name, flags in FLAGS.items():
                out = run(made, 'export.py', '--json', *flags)
                said[name] = json.loads(out.splitlines()[-1])
            (made / 'said.json').write_text(json.dumps(said))
    own = tmp_path_factory.mktemp('trained') / 'copy'
    shutil.copytree(made, own)
    return own


@pytest.fixture(scope='module')
def exported(trained):
    """What export.py said of each, as JSON."""
    return json.loads((trained / 'said.json').read_text())


def test_every_export_says_how_far_off_it_is(trained, exported):
    for name, said in exported.items():
        assert (trained / said['output']).exists(), name
        assert 0 <= said['difference'] <= said['tolerance'] < 2e-4, name
    assert exported['hf']['read_by'] == f'transformers {transformers.__version__}'
    rounding = {name: said['rounding'] for name, said in exported.items()}
    assert rounding['hf'] == 0 < rounding['gguf'] < rounding['q8_0'] and rounding['int8'] > 0
    assert exported['int8']['bytes'] < exported['ckpt']['bytes'] / 1.9
    assert not debris(trained / 'out') + debris(trained)


def debris(folder):
    names = os.listdir(folder)
    return [name for name in names if name.startswith('.export') or name.endswith('.tmp')]


@pytest.mark.parametrize('name', FAMILIES)
def test_a_family_goes_back_to_transformers_as_it_came(name, tmp_path):
    model, theirs = model_of(name, tmp_path / 'in')
    config = families.config_of(model.config)
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/config.json').write_text(json.dumps(config))
    save_file(
        {n: t.contiguous() for n, t in huggingface.their_tensors(model, config['model_type'])},
        tmp_path / 'out/model.safetensors',
        {'format': 'pt'},
    )
    original = load_file(tmp_path / 'in/model.safetensors')
    assert {
        n.removeprefix('transformer.'): t.shape
        for n, t in load_file(tmp_path / 'out/model.safetensors').items()
    } == {n.removeprefix('transformer.'): t.shape for n, t in original.items()}
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / 'out', dtype=torch.float32
    ).eval()
    ids = torch.randint(0, 64, (2, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (again(ids).logits - theirs(ids).logits).abs().max() < 1e-5
        assert (again(ids).logits - logits(model, ids)).abs().max() < 1e-4
    assert type(again) is type(theirs) and huggingface.load(str(tmp_path / 'out'))[
        'model_args'
    ] == checkpoint.model_args(model.config)


def test_gpt2_without_biases_gets_zeros(tmp_path):
    model = GPT(
        GPTConfig(block_size=32, vocab_size=50, n_layer=2, n_head=2, n_embd=16, bias=False)
    ).eval()
    config = families.config_of(model.config)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    tensors = {n: t.contiguous() for n, t in huggingface.their_tensors(model, 'gpt2')}
    save_file(tensors, tmp_path / 'model.safetensors', {'format': 'pt'})
    theirs, ids = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval(),
        torch.arange(20)[None],
    )
    assert (theirs(ids).logits - logits(model, ids)).abs().max() < 1e-5
    # transformers makes up what a file lacks, and others do not
    assert tensors.keys() == theirs.state_dict().keys() - {'lm_head.weight'}


@pytest.mark.parametrize(
    'change',
    [
        dict(activation='relu2'),
        dict(norm='layernorm'),
        dict(bias=True),
        dict(position='learned'),
        dict(qkv_bias=True),
        # a GPT-2 whose heads are not as wide as the model
        dict(
            position='learned',
            norm='layernorm',
            activation='gelu',
            qk_norm=False,
            n_head=3,
            head_dim=8,
        ),
    ],
)
def test_a_model_of_no_family_is_refused(change):
    args = (
        dict(
            block_size=32,
            vocab_size=50,
            n_layer=1,
            n_head=2,
            n_embd=16,
            bias=False,
            position='rope',
            norm='rmsnorm',
            activation='swiglu',
            qk_norm=True,
        )
        | change
    )
    with pytest.raises(UserError, match=f'none of {", ".join(families.FAMILIES)} has this model'):
        families.config_of(GPTConfig(**args))


def test_transformers_reads_the_same_model_tokens_and_chat(trained, exported):
    folder = trained / 'out/hf'
    tokenizer, ours = (
        transformers.AutoTokenizer.from_pretrained(folder),
        load_tokenizer(str(trained / 'out')),
    )
    model = checkpoint.load_model(checkpoint.load(str(trained / 'out/ckpt.pt')), 'ckpt.pt').eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(theirs).__name__ == 'Qwen3ForCausalLM' and theirs.dtype == torch.float32
    ids = torch.tensor([ours.encode(TEXT)])[:, :100]
    with torch.no_grad():
        assert (theirs(ids).logits - logits(model, ids)).abs().max() < 1e-4
    for text in random_texts(1000):
        assert tokenizer(text)['input_ids'] == ours.encode(text, allow_special=True), repr(text)
        assert tokenizer.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    talk = [
        dict(role='system', content='Be brief.'),
        dict(role='user', content='Zwei?\n\n 2 '),
        dict(role='assistant', content='二'),
        dict(role='user', content=''),
    ]
    rendered = tokenizer.apply_chat_template(talk, tokenize=True, return_dict=False)
    assert rendered == ours.encode_chat(talk)[0].tolist()
    assert tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False).endswith(
        '<|im_end|>\n<|im_start|>assistant\n'
    )
    assert (
        tokenizer.eos_token_id == tokenizer.pad_token_id == ours.end_of_text
        and theirs.generation_config.eos_token_id == [ours.end_of_text, ours.special['<|im_end|>']]
    )
    greedy = theirs.generate(
        ids[:, :20],
        attention_mask=torch.ones(1, 20),
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=None,
    )[0, 20:]
    assert greedy.tolist() == model.generate(ids[:, :20], 64, temperature=0)[0, 20:].tolist()
    assert (
        tokenizer.model_max_length == 128
        and (folder / 'model.safetensors').stat().st_mode == (folder / 'config.json').stat().st_mode
    )


@pytest.mark.slow
def test_the_model_card_tells_what_is_known(trained, exported):
    card = (trained / 'out/hf/README.md').read_text()
    assert (
        'Qwen3ForCausalLM' in card
        and '| data | notes (notes.jsonl) |' in card
        and '| steps | 12 |' in card
        and f'{12 * 4 * 128:,}' in card
        and 'nats a token' in card
    )
    code = (
        card.partition('```python\n')[2]
        .partition('```')[0]
        .replace("'.'", repr(str(trained / 'out/hf')))
    )
    done = subprocess.run(
        [python(), '-c', code.replace('=100', '=3')], capture_output=True, text=True
    )
    assert done.returncode == 0 and 'Once upon a time' in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get('TIKTOKEN_CACHE_DIR'), reason='the GPT-2 vocabulary is not at hand'
)
def test_gpt2s_tokenizer_is_the_same_there(tmp_path):
    ours = load_tokenizer('gpt2')
    ours.save(str(tmp_path / 'tokenizer.json'))
    (tmp_path / 'tokenizer_config.json').write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    (tmp_path / 'config.json').write_text('{"model_type": "gpt2"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert all(
        theirs(text)['input_ids'] == ours.encode(text, allow_special=True)
        for text in random_texts(300)
    )


@pytest.mark.slow
def test_in_trained_out_and_in_again_the_losses_are_the_same(tmp_path):
    write_tiny(tmp_path / 'data/tiny')
    make('llama', tmp_path / 'base')
    (tmp_path / 'base/tokenizer.json').write_bytes(
        (tmp_path / 'data/tiny/tokenizer.json').read_bytes()
    )
    flags = '--dataset=tiny --block_size=32 --batch_size=4 --gradient_accumulation_steps=1'
    flags += ' --max_iters=20 --max_minutes=0 --learning_rate=0.001 --dropout=0.1'
    flags += ' --eval_interval=10 --eval_iters=3 --log_interval=1 --sample_interval=0'
    flags = [*flags.split(), '--device=cpu', '--dtype=float32']
    run(tmp_path, 'train.py', '--init_from=base', '--out_dir=first', *flags)
    run(tmp_path, 'export.py', '--out_dir=first', '--output=exported')
    losses = []
    # both go on from the same weights with the same rows
    for source, out_dir in (('first/ckpt.pt', 'out-ckpt'), ('exported', 'out-hf')):
        run(tmp_path, 'train.py', f'--init_from={source}', f'--out_dir={out_dir}', *flags)
        losses.append([(m['train_loss'], m['val_loss']) for m in metrics(tmp_path / out_dir)])
    assert losses[0] == losses[1] and len(losses[0]) == 21 and losses[0][-1][1] < losses[0][0][1]
    assert abs(metrics(tmp_path / 'first')[-1]['val_loss'] - losses[1][0][1]) < 1e-6
    card = (tmp_path / 'exported/README.md').read_text()
    assert '| began from | base |' in card and 'LlamaForCausalLM' in card


REQUIRED = (
    'context_length',
    'embedding_length',
    'block_count',
    'feed_forward_length',
    'attention.head_count',
)  # by llama.cpp, of every family


@pytest.mark.parametrize('name', FAMILIES)
def test_gguf_holds_every_tensor_and_what_llama_cpp_asks_for(name, tmp_path):
    model, theirs = model_of(name, tmp_path / 'in', vocab_size=300)
    kind, path, tokenizer = theirs.config.model_type, str(tmp_path / 'm.gguf'), byte_tokenizer()
    ids = torch.randint(0, 259, (1, 60), generator=torch.Generator().manual_seed(0))
    for dtype, most in (('float16', 4e-3), ('bfloat16', 4e-2), ('float32', 1e-6)):
        gguf.write(path, model, tokenizer, dtype, 'a name')
        off = (logits(gguf_reader.read(path).eval(), ids) - logits(model, ids)).abs().max()
        assert off < (
            1e-3 if name == 'gpt2 gelu untied' and most < 1e-3 else most
        )  # llama.cpp's GELU is the other one
        assert gguf.largest_error(path, model, dtype) == 0
    reader = gguf_package.GGUFReader(path)
    value = {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith('GGUF.')
    }
    assert (
        value['general.architecture'] == kind
        and value['general.name'] == 'a name'
        and value['general.file_type'] == 0
    )
    for key in REQUIRED + (
        ('attention.layer_norm_epsilon',)
        if kind == 'gpt2'
        else (
            'attention.layer_norm_rms_epsilon',
            'attention.head_count_kv',
            'rope.freq_base',
            'rope.dimension_count',
        )
    ):
        assert f'{kind}.{key}' in value, key
    assert (
        len(value['tokenizer.ggml.tokens']) == len(value['tokenizer.ggml.token_type']) == 300
        and value['tokenizer.ggml.tokens'][299] == '[PAD299]'
    )
    assert (
        value['tokenizer.ggml.model'] == 'gpt2'
        and value['tokenizer.ggml.pre'] == 'qwen2'
        and value['tokenizer.ggml.eos_token_id'] == 256
    )
    assert (
        value['tokenizer.chat_template'] == CHAT_TEMPLATE
        and not value['tokenizer.ggml.add_bos_token']
    )
    arch = next(a for a, n in gguf_package.MODEL_ARCH_NAMES.items() if n == kind)
    names = gguf_package.get_tensor_name_map(arch, 2)
    state = {
        n: t
        for n, t in theirs.state_dict().items()
        if not (n == 'lm_head.weight' and model.config.tie_embeddings)
    }
    expected = {names.get_name(n, try_suffixes=('.weight', '.bias')): t for n, t in state.items()}
    held = {t.name: gguf_package.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    assert None not in expected and held.keys() - {'rope_freqs.weight'} == expected.keys()
    for n, tensor in expected.items():
        if kind == 'llama' and n.endswith(
            ('attn_q.weight', 'attn_k.weight')
        ):  # pairs side by side: row 2i is i, row 2i + 1 is head_dim / 2 + i
            d = model.config.head_dim
            rows = [
                h * d + half * d // 2 + i
                for h in range(len(tensor) // d)
                for i in range(d // 2)
                for half in (0, 1)
            ]
            tensor = tensor[rows]
        if kind == 'gpt2' and n.endswith(
            ('attn_qkv.weight', 'attn_output.weight', 'ffn_up.weight', 'ffn_down.weight')
        ):
            tensor = tensor.T
        assert np.array_equal(held[n], tensor.numpy()), n
    if name == 'llama 3':
        inv_freq = theirs.model.rotary_emb.inv_freq
        plain = 500000.0 ** -(torch.arange(0, 10, 2) / 10)
        assert (
            np.allclose(plain.numpy() / held['rope_freqs.weight'], inv_freq.numpy())
            and held['rope_freqs.weight'].max() == 8
        )


@pytest.mark.parametrize('kind', ['gpt2', 'llama', 'qwen2', 'qwen3'])
def test_q8_0_of_each_family(kind, tmp_path):
    torch.manual_seed(0)
    llama = dict(
        n_kv_head=2,
        position='rope',
        norm='rmsnorm',
        activation='swiglu',
        bias=False,
        n_inner=96,
        qkv_bias=kind == 'qwen2',
        qk_norm=kind == 'qwen3',
    )
    model = (
        GPT(
            GPTConfig(
                block_size=64,
                vocab_size=300,
                n_layer=2,
                n_head=4,
                n_embd=64,
                **({} if kind == 'gpt2' else llama),
            )
        )
        .eval()
        .requires_grad_(False)
    )
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))
    ids = torch.randint(0, 259, (1, 60))
    gguf.write(str(tmp_path / 'm.gguf'), model, byte_tokenizer(), 'q8_0', 'x')
    held = gguf_package.GGUFReader(str(tmp_path / 'm.gguf')).tensors
    is_matrix = [len(t.shape) > 1 and t.name != 'position_embd.weight' for t in held]
    types = {t.tensor_type.name for t, matrix in zip(held, is_matrix, strict=True) if matrix}
    others = {t.tensor_type.name for t, matrix in zip(held, is_matrix, strict=True) if not matrix}
    assert others == {'F32'}  # vectors, and learned positions
    exact = logits(model, ids)
    gguf.round_weights(model, 'q8_0')
    off = logits(gguf_reader.read(str(tmp_path / 'm.gguf')).eval(), ids) - logits(model, ids)
    assert (
        types == {'Q8_0'}
        and off.abs().max() < 1e-5
        and 1e-3 < (logits(model, ids) - exact).abs().max() < 0.2
    )


def test_q8_0_is_within_its_rounding_and_what_does_not_fit_a_block_is_float16(tmp_path):
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            block_size=32,
            vocab_size=300,
            n_layer=1,
            n_head=2,
            n_embd=64,
            n_inner=80,
            bias=False,
            position='rope',
            norm='rmsnorm',
            activation='swiglu',
        )
    ).eval()
    gguf.write(str(tmp_path / 'm.gguf'), model, byte_tokenizer(), 'q8_0', 'x')
    held = {t.name: t for t in gguf_package.GGUFReader(str(tmp_path / 'm.gguf')).tensors}
    kinds = {n: t.tensor_type.name for n, t in held.items()}
    assert (
        kinds['token_embd.weight'] == kinds['blk.0.ffn_gate.weight'] == 'Q8_0'
        and kinds['blk.0.ffn_down.weight'] == 'F16'
        and kinds['output_norm.weight'] == 'F32'
    )
    weight = model.transformer.h[0].mlp.c_fc.weight[:80].detach().numpy()
    blocks = np.abs(weight.reshape(-1, 32)).max(axis=1, keepdims=True)
    off = np.abs(
        gguf_package.quants.dequantize(
            held['blk.0.ffn_gate.weight'].data, gguf_package.GGMLQuantizationType.Q8_0
        )
        - weight
    ).reshape(-1, 32)
    assert (
        off <= blocks / 127 * 0.51 + blocks * 2**-11
    ).all() and off.max() > 0  # half a step, and the scale's own float16


def sentencepiece():
    """A tokenizer.json like TinyLlama's."""
    vocab = (
        {'<unk>': 0, '<s>': 1, '</s>': 2}
        | {f'<0x{b:02X}>': 3 + b for b in range(256)}
        | {c: 259 + i for i, c in enumerate(['▁', 'a', 'b', '▁a', 'ab', '▁ab'])}
    )
    return dict(
        version='1.0',
        added_tokens=[
            dict(
                id=i,
                content=t,
                special=True,
                single_word=False,
                lstrip=False,
                rstrip=False,
                normalized=False,
            )
            for i, t in enumerate(['<unk>', '<s>', '</s>'])
        ],
        normalizer=dict(
            type='Sequence',
            normalizers=[
                dict(type='Prepend', prepend='▁'),
                dict(type='Replace', pattern=dict(String=' '), content='▁'),
            ],
        ),
        pre_tokenizer=None,
        post_processor=None,
        decoder=None,
        model=dict(
            type='BPE',
            unk_token='<unk>',
            byte_fallback=True,
            fuse_unk=True,
            vocab=vocab,
            merges=['▁ a', 'a b', '▁a b'],
        ),
    )


def test_gguf_of_other_tokenizers(tmp_path):
    model = GPT(
        GPTConfig(
            block_size=32,
            vocab_size=400,
            n_layer=1,
            n_head=2,
            n_embd=16,
            bias=False,
            position='rope',
            norm='rmsnorm',
            activation='swiglu',
        )
    )

    def pre(tokenizer):
        gguf.write(str(tmp_path / 'm.gguf'), model, tokenizer, 'float32', 'x')
        return {
            key: field.contents()
            for key, field in gguf_package.GGUFReader(str(tmp_path / 'm.gguf')).fields.items()
            if key.startswith('tokenizer')
        }

    assert pre(byte_tokenizer())['tokenizer.ggml.merges'] == [
        'no merge'
    ]  # without any, llama.cpp does not open the file
    trained = train_bpe([TEXT] * 20, 300)
    assert pre(train_bpe([TEXT] * 20, 300, split='gpt2'))['tokenizer.ggml.pre'] == 'gpt-2'
    byte_level = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=True)
    digits = dict(
        type='Sequence', pretokenizers=[dict(type='Digits', individual_digits=True), byte_level]
    )
    assert (
        pre(type(trained)(trained.spec | dict(pre_tokenizer=digits)))['tokenizer.ggml.pre']
        == 'smollm'
    )  # SmolLM2's
    begin = dict(
        type='TemplateProcessing',
        single=[
            dict(SpecialToken=dict(id='<|im_start|>', type_id=0)),
            dict(Sequence=dict(id='A', type_id=0)),
        ],
        pair=[],
        special_tokens={
            '<|im_start|>': dict(id='<|im_start|>', ids=[298], tokens=['<|im_start|>'])
        },
    )
    said = pre(type(trained)(trained.spec | dict(post_processor=begin)))
    assert said['tokenizer.ggml.add_bos_token'] and said['tokenizer.ggml.bos_token_id'] == 298
    unnamed = [
        t | dict(content=t['content'].replace('endoftext', 'fin'))
        for t in trained.spec['added_tokens']
    ]  # an end of another name
    said = pre(type(trained)(trained.spec | dict(post_processor=begin, added_tokens=unnamed)))
    assert said['tokenizer.ggml.bos_token_id'] == 298 and 'tokenizer.ggml.eos_token_id' not in said
    for part, message in (
        (dict(normalizer=dict(type='Lowercase')), 'no normalizer like'),
        (dict(pre_tokenizer=byte_level | dict(add_prefix_space=True)), 'no name for the way'),
    ):
        with pytest.raises(UserError, match=message):
            pre(type(trained)(trained.spec | part))
    with pytest.raises(UserError, match='no tokenizer like this one .characters.'):
        pre(char_tokenizer('abc'))
    with pytest.raises(UserError, match='no name for the way this tokenizer splits text'):
        pre(
            type(trained)(
                trained.spec
                | dict(
                    pre_tokenizer=dict(
                        type='Sequence',
                        pretokenizers=[
                            dict(
                                type='Split',
                                pattern=dict(Regex='x'),
                                behavior='Isolated',
                                invert=False,
                            ),
                            byte_level | dict(use_regex=False),
                        ],
                    )
                )
            )
        )
    spec = sentencepiece()
    said = pre(type(trained)(spec))  # as TinyLlama's
    assert (
        said['tokenizer.ggml.model'] == 'llama'
        and said['tokenizer.ggml.add_space_prefix']
        and said['tokenizer.ggml.scores'][262] > said['tokenizer.ggml.scores'][264]
    )
    assert (
        said['tokenizer.ggml.token_type'][:4] == [2, 3, 3, 6]
        and said['tokenizer.ggml.tokens'][264] == '▁ab'
    )
    newer = spec | dict(
        normalizer=None,
        pre_tokenizer=dict(type='Metaspace', replacement='▁', prepend_scheme='first', split=False),
    )
    assert pre(type(trained)(newer))['tokenizer.ggml.add_space_prefix']
    newer['pre_tokenizer']['prepend_scheme'] = 'never'
    assert not pre(type(trained)(newer))['tokenizer.ggml.add_space_prefix']
    with pytest.raises(UserError, match='no tokenizer with Lowercase'):
        pre(type(trained)(spec | dict(normalizer=dict(type='Lowercase'))))
    spec['model']['merges'] = ['a b', '▁ a', '▁a b']
    with pytest.raises(UserError, match='merges in the order of the ids'):
        pre(type(trained)(spec))


@pytest.mark.slow
def test_modelfile(trained, exported):
    lines = (trained / 'out/Modelfile').read_text().splitlines()
    assert lines[:2] == ['FROM ./model.gguf', 'PARAMETER num_ctx 128']
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert lines[-1] == 'TEMPLATE """{{ .Prompt }}"""'  # it learned text
    meta = json.loads((trained / 'data/notes/meta.json').read_text())
    # as if it had been conversations
    (trained / 'data/notes/meta.json').write_text(json.dumps(meta | dict(masked=True)))
    (trained / 'mine').mkdir()
    (trained / 'mine/Modelfile').write_text('FROM x\n')
    flags = ['--format=gguf', '--output=mine/talks.gguf']
    assert 'Modelfile stays as it is' in run(trained, 'export.py', *flags)
    assert (trained / 'mine/Modelfile').read_text() == 'FROM x\n'
    run(trained, 'export.py', *flags, '--overwrite')
    (trained / 'data/notes/meta.json').write_text(json.dumps(meta))
    modelfile = (trained / 'mine/Modelfile').read_text()
    assert 'FROM ./talks.gguf' in modelfile
    turn = '<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n'
    assert f'{{{{ range .Messages }}}}{turn}{{{{ end }}}}<|im_start|>assistant\n"""' in modelfile


@pytest.mark.slow
@pytest.mark.parametrize(
    'name, kv_cache',
    [
        ('gpt2', False),
        ('gpt2 gelu untied', True),
        ('llama 3', True),
        ('qwen2', False),
        ('qwen3', True),
    ],
)
def test_onnx_for_any_batch_and_length(name, kv_cache, tmp_path):
    model, _ = model_of(name, tmp_path / 'in')
    path = str(tmp_path / 'm.onnx')
    onnx.write(path, model, kv_cache)
    for batch, length in ((1, 2), (1, 17), (3, 17), (2, 96)):
        ids = torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(length))
        assert (onnx.run(path, ids, kv_cache) - logits(model, ids)).abs().max() < 1e-4
    if kv_cache:  # token after token, as a runtime generates
        import onnxruntime

        session, row, fed = onnxruntime.InferenceSession(path), [1, 2, 3], [1, 2, 3]
        past = {
            i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
            for i in session.get_inputs()[1:]
        }
        for _ in range(12):
            out = session.run(None, {'input_ids': np.array([fed]), **past})
            past, fed = dict(zip(past, out[1:], strict=True)), [int(out[0][0, -1].argmax())]
            row += fed
        assert row == model.generate(torch.tensor([[1, 2, 3]]), 12, temperature=0)[0].tolist() and [
            o.name for o in session.get_outputs()[:2]
        ] == ['logits', 'present.0.key']


@pytest.mark.slow
def test_int8_checkpoint_samples_like_the_flag_and_is_not_trained(trained, exported):
    args = [
        '--start=the quick',
        '--num_samples=1',
        '--max_new_tokens=20',
        '--temperature=0',
        '--device=cpu',
        '--dtype=bfloat16',
    ]
    text = run(trained, 'sample.py', '--init_from=out/int8.pt', *args)
    assert text == run(trained, 'sample.py', '--quantize=int8', *args)
    saved, model = (
        checkpoint.load(str(trained / 'out/int8.pt')),
        checkpoint.load_model(checkpoint.load(str(trained / 'out/ckpt.pt')), 'x').eval(),
    )
    assert (
        saved['model']['lm_head.weight'].dtype == torch.int8
        and saved['model']['transformer.wte.weight'].dtype == torch.bfloat16
    )
    quantized, ids = (
        checkpoint.load_model(saved, 'x').to(torch.bfloat16).eval(),
        torch.arange(40)[None],
    )
    assert quantized.lm_head.scale.dtype == torch.float32
    expected = logits(quantize.apply(model), ids)
    assert (logits(quantized.float(), ids) - expected).abs().max() < 0.02 * expected.abs().max()
    assert '8-bit weights, which cannot be trained' in fails(
        trained,
        'train.py',
        '--init_from=out/int8.pt',
        '--dataset=notes',
        '--out_dir=no',
        '--device=cpu',
    )
    assert 'val loss' in run(
        trained,
        'train.py',
        '--init_from=out/int8.pt',
        '--dataset=notes',
        '--out_dir=no',
        '--device=cpu',
        '--eval_only',
        '--eval_iters=1',
    )
    assert 'export what it was made of' in fails(trained, 'export.py', '--init_from=out/int8.pt')


@pytest.mark.slow
def test_adapters_are_merged_on_the_way_out(trained, exported):
    saved = checkpoint.load(str(trained / 'out/ckpt.pt'))
    torch.manual_seed(0)
    weight, expected = 'transformer.h.1.attn.c_attn.weight', {}
    for base in (weight, 'transformer.h.0.mlp.c_proj.weight'):
        rows, columns = saved['model'][base].shape
        a, b = torch.randn(4, columns), torch.randn(rows, 4)
        expected[base] = saved['model'][base] + 16 / 4 * b @ a
        saved['model'] |= {base.replace('weight', 'lora_A'): a, base.replace('weight', 'lora_B'): b}
    saved['config']['lora_alpha'] = 16
    (trained / 'lora').mkdir()
    (trained / 'lora/tokenizer.json').write_bytes((trained / 'out/tokenizer.json').read_bytes())
    checkpoint.save(str(trained / 'lora/ckpt.pt'), saved)
    run(trained, 'export.py', '--out_dir=lora', '--format=ckpt')
    merged = checkpoint.load(str(trained / 'lora/model.pt'))
    assert (
        merged['model'].keys() == checkpoint.load(str(trained / 'out/ckpt.pt'))['model'].keys()
        and 'optimizer' not in merged
    )
    assert all(torch.allclose(merged['model'][n], t, atol=1e-5) for n, t in expected.items())
    run(trained, 'export.py', '--out_dir=lora')
    query = load_file(trained / 'lora/hf/model.safetensors')[
        'model.layers.1.self_attn.q_proj.weight'
    ]
    assert torch.allclose(query, expected[weight][: len(query)], atol=1e-5)
    for broken in (dict(lora_A=torch.zeros(4, 5)), dict(lora_B=torch.zeros(7, 4))):
        state = saved['model'] | {f'transformer.h.1.attn.c_attn.{n}': t for n, t in broken.items()}
        with pytest.raises(UserError, match='c_attn does not fit'):
            adapters.merged(saved | dict(model=state), 'x')
    with pytest.raises(UserError, match='lacks lora_alpha'):
        adapters.merged(saved | dict(config={}), 'x')


@pytest.mark.slow
@pytest.mark.parametrize(
    'flags, message',
    [
        (['--format=pickle'], "format='pickle' is none of auto, hf, gguf, onnx, ckpt"),
        (['--dtype=q8_0'], "dtype='q8_0' is none of float32, float16, bfloat16"),
        (['--format=gguf', '--quantize=int8'], '8 bits in GGUF are --dtype=q8_0'),
        (['--kv_cache'], '--kv_cache is of --format=onnx'),
        (['--out_dir=nowhere'], 'no checkpoint at nowhere/ckpt.pt'),
        (['--output=occupied', '--overwrite'], 'occupied is a folder of something else'),
        (['--output=out/hf', '--init_from=out/hf'], 'the very model that is exported'),
        (['--output=out', '--overwrite'], 'out holds the very model that is exported'),
        ([], 'out/hf is there: --overwrite replaces it'),
        (
            ['--format=gguf', '--output=occupied'],
            'occupied is a folder; --format=gguf writes a file',
        ),
        (
            ['--format=ckpt', '--output=out/ckpt.pt'],
            'out/ckpt.pt holds the very model that is exported',
        ),
        (['--format=ckpt', '--output=weights.pt'], 'weights.pt is there: --overwrite replaces it'),
        (['--output=theirs'], 'theirs is there: --overwrite replaces it'),
        (['--output=readme', '--overwrite'], 'readme is a folder of something else'),
        (['--format=onnx', '--output=lonely.onnx'], 'lonely.onnx.data is there: --overwrite'),
        (['--output=out/hf/.', '--init_from=out/hf'], 'the very model that is exported'),
        (
            ['--quantize=int8', '--init_from=out/ckpt.pt', '--output=out/best.pt'],
            'out/best.pt is there: --overwrite replaces it',
        ),
        (
            ['--format=gguf', '--output=out/tokenizer.json'],
            'what --format=gguf writes is called *.gguf',
        ),
        (
            ['--format=gguf', '--output=occupied/theirs.gguf'],
            'theirs.gguf is there: --overwrite replaces it',
        ),
        (['--output=notes.jsonl/hf'], 'cannot write notes.jsonl/hf: Not a directory'),
        (['--format=onnx', '--output=/'], '/ is a folder'),
        (['--start=\udcff'], '--start or --name is no valid UTF-8'),
        (
            ['--format=onnx', '--output=occupied/m.onnx', '--overwrite'],
            'occupied has another tokenizer',
        ),
        (['--output=notes.jsonl'], 'notes.jsonl is a file'),
    ],
)
def test_mistakes_cost_a_line(flags, message, trained, exported):
    (trained / 'occupied').mkdir(exist_ok=True)
    byte_tokenizer().save(str(trained / 'occupied/tokenizer.json'))
    (trained / 'occupied/thesis.txt').write_text('mine')
    (trained / 'occupied/theirs.gguf').write_bytes(b'GGUF' + bytes(5000))
    make('llama', trained / 'theirs')
    (trained / 'readme').mkdir(exist_ok=True)
    (trained / 'readme/README.md').write_text('mine')
    (trained / 'lonely.onnx.data').write_text('mine')
    plain = checkpoint.load(str(trained / 'out/ckpt.pt'))
    checkpoint.save(str(trained / 'weights.pt'), {k: plain[k] for k in ('model', 'model_args')})
    before = {
        n: (trained / n).stat().st_mtime_ns
        for n in (
            'out/ckpt.pt',
            'out/best.pt',
            'out/tokenizer.json',
            'occupied/tokenizer.json',
            'occupied/thesis.txt',
            'notes.jsonl',
            'theirs/model.safetensors',
            'readme/README.md',
            'lonely.onnx.data',
            'weights.pt',
        )
    }
    error = fails(trained, 'export.py', *flags)
    assert message in error and len(error.strip().splitlines()) == 1
    assert before == {n: (trained / n).stat().st_mtime_ns for n in before}


@pytest.mark.slow
def test_a_model_of_characters(tmp_path):
    write_tiny(tmp_path / 'data/tiny')
    gpt2 = '--position=learned --norm=layernorm --activation=gelu --qk_norm=False --n_kv_head=0'
    run(
        tmp_path, 'train.py', *TINY, *gpt2.split(), '--bias', '--max_iters=2', '--sample_interval=0'
    )
    assert 'transformers' in run(tmp_path, 'export.py')
    text = '(' + chr(70) + chr(80)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / 'out/hf')(text)[
        'input_ids'
    ] == find_tokenizer(str(tmp_path / 'out')).encode(text)
    for output in ('out/model.gguf', 'new/folder/m.gguf'):
        assert (
            'llama.cpp has no tokenizer like this one'
            in fails(tmp_path, 'export.py', '--format=gguf', f'--output={output}')
            and not (tmp_path / output).exists()
        )
    assert not (tmp_path / 'new').exists()
    assert not debris(tmp_path / 'out')


WRONG = {
    'k and v trade places': """
whole = huggingface.their_tensors
def wrong(model, kind):
    for name, tensor in whole(model, kind):
        name = name.replace('k_proj', 'X').replace('v_proj', 'k_proj').replace('X', 'v_proj')
        yield name, tensor
huggingface.their_tensors = wrong""",
    'weights that are no numbers': """
whole = huggingface.their_tensors
huggingface.their_tensors = lambda *of: ((n, t * math.nan) for n, t in whole(*of))""",
    'another rope_theta': """
whole = families.config_of
families.config_of = lambda c: whole(c) | dict(rope_theta=1.2 * c.rope_theta)""",
    'weights of another tensor': """
import gguf
write = gguf.GGUFWriter.write_tensor_data
gguf.GGUFWriter.write_tensor_data = lambda self, tensor: write(self, tensor[::-1].copy())""",
    'a tensor less': """
import gguf
whole = gguf.GGUFReader._build_tensors
def fewer(self, start, fields):
    whole(self, start, fields)
    self.tensors.pop()
gguf.GGUFReader._build_tensors = fewer""",
}


@pytest.mark.slow
@pytest.mark.parametrize('error', WRONG)
def test_what_came_out_wrong_is_not_left_behind(error, trained, exported, tmp_path):
    before = (trained / 'out/hf/model.safetensors').read_bytes()
    (tmp_path / 'broken.py').write_text(
        f'import math, runpy, sys\nsys.path.insert(0, {ROOT!r})\n'
        f'from fledge.formats import families, huggingface\n{WRONG[error]}\n'
        f'sys.argv[0] = {os.path.join(ROOT, "export.py")!r}\n'
        f'runpy.run_path(sys.argv[0], run_name="__main__")\n'
    )
    flags = ['--overwrite', '--dtype=bfloat16']
    if 'gguf' in WRONG[error]:
        flags = ['--overwrite', '--format=gguf', '--dtype=q8_0']
    done = subprocess.run(
        [python(), str(tmp_path / 'broken.py'), *flags],
        cwd=trained,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and 'nothing is left of the export' in done.stderr, (
        done.stdout + done.stderr
    )
    assert (trained / 'out/hf/model.safetensors').read_bytes() == before and not debris(
        trained / 'out'
    )


@pytest.mark.slow
def test_an_interruption_as_it_takes_its_name_leaves_the_old_one(trained, exported, tmp_path):
    shutil.copytree(trained / 'out/hf', trained / 'kept')
    flags = ['--output=kept', '--dtype=bfloat16', '--overwrite']
    before = (trained / 'kept/model.safetensors').read_bytes()
    (tmp_path / 'cut.py').write_text(f"""import os, runpy, sys
sys.path.insert(0, {ROOT!r})
rename = os.rename
def cut(a, b):
    if '.export-kept/new' in a:
        raise KeyboardInterrupt
    rename(a, b)
os.rename, sys.argv[0] = cut, {os.path.join(ROOT, 'export.py')!r}
runpy.run_path(sys.argv[0], run_name='__main__')""")
    done = subprocess.run(
        [python(), str(tmp_path / 'cut.py'), *flags],
        cwd=trained,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 130, done.stderr
    assert (trained / 'kept/model.safetensors').read_bytes() == before and not debris(trained)
    # of a process that was killed between the two renames, the next one puts the old one back
    shutil.copytree(trained / 'kept', trained / '.export-kept/new')
    (trained / 'kept').rename(trained / '.export-kept/replaced')
    done = subprocess.run([python(), str(tmp_path / 'cut.py'), *flags], cwd=trained)
    assert done.returncode == 130
    assert (trained / 'kept/model.safetensors').read_bytes() == before and not debris(trained)
    run(trained, 'export.py', *flags)
    assert (trained / 'kept/model.safetensors').stat().st_size < 0.6 * len(before)
    assert not debris(trained)


@pytest.mark.slow
def test_what_is_there_is_replaced_where_that_is_asked_for(trained, exported, tmp_path):
    trained = shutil.copytree(trained, tmp_path / 'own')
    small = ['--init_from=small/ckpt.pt']
    shape = ['--n_layer=1', '--block_size=64']
    run(trained, 'train.py', *TRAINING.split(), *shape, '--max_iters=1', '--out_dir=small')
    # of a larger model
    (trained / 'out/model.onnx').write_bytes(bytes(10_000_000))
    (trained / 'out/model.onnx.data').write_text('weights')
    flags = FLAGS | dict(onnx=['--format=onnx', '--kv_cache'])
    for name, path in dict(hf='hf', onnx='model.onnx', int8='int8.pt', gguf='model.gguf').items():
        output = trained / 'out' / path
        weights = output / 'model.safetensors' if output.is_dir() else output
        before = weights.read_bytes()
        said = [*small, *flags[name], f'--output=out/{path}', '--json']
        assert 'is there: --overwrite replaces it' in fails(trained, 'export.py', *said)
        assert weights.read_bytes() == before
        made = json.loads(run(trained, 'export.py', *said, '--overwrite').splitlines()[-1])
        assert weights.stat().st_size < 0.9 * len(before), name
        assert 0 <= made['difference'] <= made['tolerance'] < 2e-4
    assert not (trained / 'out/model.onnx.data').exists()
    assert not debris(trained / 'out') + debris(trained)


@pytest.mark.slow
def test_a_link_stays_a_link(trained, exported):
    (trained / 'linked').symlink_to('real/hf')
    (trained / 'real/deeper').mkdir(parents=True)
    (trained / 'inside').symlink_to('real/deeper')
    run(trained, 'export.py', '--format=gguf', '--output=inside/../m.gguf')
    assert (trained / 'real/m.gguf').exists() and not (trained / 'm.gguf').exists()
    for dtype, most in (('float32', 1.0), ('bfloat16', 0.6)):
        run(trained, 'export.py', '--output=linked/', f'--dtype={dtype}', '--overwrite')
        assert (
            (trained / 'linked').is_symlink()
            and (trained / 'real/hf/model.safetensors').stat().st_size
            < most * exported['hf']['bytes']
            and not debris(trained) + debris(trained / 'real')
        )


@pytest.mark.slow
def test_a_type_that_ruins_the_model_is_refused(trained, exported):
    """One column is a million times the others, as 8 bits cannot hold; a norm makes up for it."""
    saved = checkpoint.load(str(trained / 'out/ckpt.pt'))
    for layer in range(2):
        for norm, matrix in (('ln_1', 'attn.c_attn'), ('ln_2', 'mlp.c_fc')):
            saved['model'][f'transformer.h.{layer}.{norm}.weight'][0] /= 1e6
            saved['model'][f'transformer.h.{layer}.{matrix}.weight'][:, 0] *= 1e6
    (trained / 'ruined').mkdir()
    shutil.copy(trained / 'out/tokenizer.json', trained / 'ruined')
    checkpoint.save(str(trained / 'ruined/ckpt.pt'), saved)
    assert 'take a larger type' in fails(
        trained, 'export.py', '--out_dir=ruined', '--quantize=int8'
    ) and not debris(trained / 'ruined')
    run(trained, 'export.py', '--out_dir=ruined', '--format=ckpt')


def with_pad(folder, **changes):
    """Put byte_tokenizer's tokenizer.json into folder, with a <pad> as added token 259."""
    spec = byte_tokenizer().spec
    added = spec['added_tokens']
    added = [*added, added[-1] | dict(id=259, content='<pad>') | changes.pop('pad', {})]
    (folder / 'tokenizer.json').write_text(json.dumps(spec | dict(added_tokens=added) | changes))


@pytest.mark.slow
@pytest.mark.parametrize('flags', FLAGS.values(), ids=FLAGS)
def test_special_tokens_beyond_the_embedding_are_left_out(flags, tmp_path):
    make('llama', tmp_path / 'in', vocab_size=259)
    with_pad(tmp_path / 'in')
    (tmp_path / 'in/tokenizer_config.json').write_text('{"pad_token": "<pad>"}')
    for name in ('config.json', 'generation_config.json'):
        config = json.loads((tmp_path / 'in' / name).read_text())
        (tmp_path / 'in' / name).write_text(json.dumps(config | dict(pad_token_id=259)))
    said = run(tmp_path, 'export.py', '--init_from=in', *flags)
    assert said.startswith('the embedding has no <pad>: left out of the tokenizer\n')
    if not flags:
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
        assert len(theirs) == 259 and theirs.pad_token == '<|endoftext|>'
    if '--format=ckpt' in flags:
        assert load_tokenizer(str(tmp_path / 'plain')).vocab_size == 259
        sample = ['--init_from=plain/model.pt', '--num_samples=1', '--max_new_tokens=3']
        run(tmp_path, 'sample.py', *sample)


@pytest.mark.slow
def test_other_tokens_beyond_the_embedding_are_of_another_tokenizer(tmp_path):
    make('llama', tmp_path / 'in', vocab_size=259)
    words = 'the tokenizer has 260 tokens, and the model of in 259: it was trained with another'
    with_pad(tmp_path / 'in', pad=dict(special=False))
    assert words in fails(tmp_path, 'export.py', '--init_from=in')
    # in front of every text
    pad = dict(SpecialToken=dict(id='<pad>', type_id=0))
    template = dict(type='TemplateProcessing', pair=[])
    template['single'] = [pad, dict(Sequence=dict(id='A', type_id=0))]
    template['special_tokens'] = {'<pad>': dict(id='<pad>', ids=[259], tokens=['<pad>'])}
    with_pad(tmp_path / 'in', post_processor=template)
    assert words in fails(tmp_path, 'export.py', '--init_from=in')


@pytest.mark.slow
@pytest.mark.parametrize('flags', [['--dtype=float16'], FLAGS['gguf'], FLAGS['q8_0']])
def test_weights_beyond_a_type_are_refused_in_a_line(flags, trained):
    saved = checkpoint.load(str(trained / 'out/ckpt.pt'))
    name = 'transformer.h.0.mlp.c_proj.weight'
    saved['model'][name][5, 7] = 1e8
    (trained / 'large').mkdir(exist_ok=True)
    shutil.copy(trained / 'out/tokenizer.json', trained / 'large')
    checkpoint.save(str(trained / 'large/ckpt.pt'), saved)
    dtype = 'q8_0' if '--dtype=q8_0' in flags else 'float16'
    words = f'{name} of large/ckpt.pt has weights that are not finite in {dtype}'
    assert fails(trained, 'export.py', '--out_dir=large', '--overwrite', *flags) == (
        f'error: {words}; take a larger type\n'
    )
    saved['model'][name][5, 7] = float('nan')
    torch.save(saved, trained / 'large/nan.pt')
    words = words.replace('ckpt', 'nan').replace(dtype, 'float32')
    assert fails(trained, 'export.py', '--init_from=large/nan.pt') == f'error: {words}\n'
    assert not debris(trained / 'large')


def test_a_weight_that_is_nan_in_a_file_is_far_off(tmp_path):
    path = str(tmp_path / 'm.gguf')
    model = GPT(GPTConfig(block_size=8, vocab_size=300, n_layer=1, n_head=2, n_embd=16)).eval()
    with torch.no_grad():
        exact = model.transformer.ln_f.weight[3].item()
        model.transformer.ln_f.weight[3] = float('nan')
        gguf.write(path, model, byte_tokenizer(), 'float32', 'x')
        model.transformer.ln_f.weight[3] = exact
    assert np.isnan(gguf.largest_error(path, model, 'float32'))


@pytest.mark.parametrize(
    'flags, said',
    [
        (['--name=foo'], 'without effect with --format=ckpt: name\n'),
        (['--quantize=int8', '--dtype=f32'], 'without effect with --format=ckpt: dtype\n'),
        (['--out_dir=nowhere'], 'without effect beside --init_from: out_dir\n'),
    ],
)
def test_what_does_nothing_is_said(flags, said, trained):
    flags = [*flags, '--init_from=out/ckpt.pt', '--format=ckpt', '--output=idle.pt', '--overwrite']
    code, _, err = forked(trained, os.path.join(ROOT, 'export.py'), *flags)
    assert (code, err) == (0, said)


EDITS = {
    'a window': (
        'attn_mask=mask, dropout_p=dropout, is_causal=causal',
        'attn_mask=torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril().triu(-499)',
    ),
    'quick GELU': (
        "'gelu': (False, F.gelu)",
        "'gelu': (False, lambda x: x * (1.702 * x).sigmoid())",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize('edit', EDITS)
def test_an_edited_model_is_not_handed_to_others(edit, tmp_path):
    """The prompt and the model's context show nothing of a window of 500 tokens."""
    shutil.copytree(os.path.join(ROOT, 'fledge'), tmp_path / 'fledge')
    for name in ('model.py', 'encoder_decoder.py', 'export.py'):
        shutil.copy(os.path.join(ROOT, name), tmp_path)
    config = GPTConfig(block_size=64, vocab_size=259, n_layer=1, n_head=2, n_embd=16)
    state = dict(model=GPT(config).state_dict(), model_args=checkpoint.model_args(config))
    checkpoint.save(str(tmp_path / 'ckpt.pt'), state)
    byte_tokenizer().save(str(tmp_path / 'tokenizer.json'))
    # as where transformers is not installed, which would notice the other GELU
    source = (tmp_path / 'export.py').read_text()
    (tmp_path / 'export.py').write_text(f"import sys\nsys.modules['transformers'] = None\n{source}")
    flags = ['--init_from=ckpt.pt', '--json', '--overwrite']
    code, out, err = forked(tmp_path, str(tmp_path / 'export.py'), *flags)
    assert code == 0 and 'fledge, without transformers' in out, err
    before, after = EDITS[edit]
    source = (tmp_path / 'model.py').read_text()
    assert source.count(before) == 1
    (tmp_path / 'model.py').write_text(source.replace(before, after))
    for kind in ('hf', 'f16', 'f32', 'q8_0'):
        of_kind = ['--format=hf'] if kind == 'hf' else ['--format=gguf', f'--dtype={kind}']
        code, out, err = forked(tmp_path, str(tmp_path / 'export.py'), *flags, *of_kind)
        assert (code, err) == (
            2,
            'error: model.py was edited, and no longer computes what gpt2 with gelu does: others '
            'would load another model than this one; --format=onnx holds it as it is\n',
        ), kind
    assert not (tmp_path / 'model.gguf').exists()


@pytest.mark.slow
def test_gguf_takes_no_chat_template_that_gives_other_tokens(tmp_path):
    """Such as where the token that ends a turn takes the space in front of it, as Phi's do."""
    byte_tokenizer().check_chat_form()
    begin = dict(
        type='TemplateProcessing',
        single=[
            dict(SpecialToken=dict(id='<s>', type_id=0)),
            dict(Sequence=dict(id='A', type_id=0)),
        ],
        pair=[],
        special_tokens={'<s>': dict(id='<s>', ids=[1], tokens=['<s>'])},
    )
    for post_processor in (begin, None):
        spec = sentencepiece() | dict(post_processor=post_processor)
        ours = Tokenizer(spec).with_special()
        ours.check_chat_form()
        tokens = [t | dict(lstrip=t['content'] == '<|im_end|>') for t in ours.spec['added_tokens']]
        tokenizer = ours.changed(added_tokens=tokens)
        with pytest.raises(UserError, match='other tokens than message by message'):
            tokenizer.check_chat_form()
    config = GPTConfig(vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=16)
    state = dict(model=GPT(config).state_dict(), model_args=checkpoint.model_args(config))
    checkpoint.save(str(tmp_path / 'ckpt.pt'), state)
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    flags = ['--init_from=ckpt.pt', '--format=gguf']
    assert 'other tokens than message by message' in fails(tmp_path, 'export.py', *flags)


@pytest.mark.parametrize(
    'began, base, said',
    [
        ('HuggingFaceTB/SmolLM2-135M', True, 'HuggingFaceTB/SmolLM2-135M'),
        ('gpt2', False, 'gpt2'),
        ('scratch', False, 'scratch'),
        ('somebody/secret/out/ckpt.pt', False, 'ckpt.pt'),
        ('/home/me/models/mine/', False, 'mine'),
    ],
)
def test_the_card_says_what_it_began_from(began, base, said):
    model = GPT(GPTConfig(block_size=64, vocab_size=64, n_layer=1, n_head=2, n_embd=16))
    card = huggingface.card(
        'a name', model, dict(config=dict(dataset='notes'), iter_num=7), {}, began
    )
    assert f'| began from | {said} |' in card and (f'base_model: {began}\n' in card) == base


@pytest.mark.slow
def test_two_at_once(trained, exported):
    first = start(trained, 'export.py', '--output=both')
    while not (trained / '.export-both/new').exists():
        assert first.poll() is None
        time.sleep(0.001)
    first.send_signal(signal.SIGSTOP)  # in the middle, for as long as the other one takes
    assert 'another process is writing to' in fails(trained, 'export.py', '--output=both')
    first.send_signal(signal.SIGCONT)
    out, err = first.communicate(timeout=120)
    assert first.returncode == 0, err


@pytest.mark.slow
def test_exports_do_not_meet_in_one_workplace(trained, exported, tmp_path):
    # what another one was killed over, of the same name in another folder
    (trained / '.export-new/replaced').mkdir(parents=True)
    run(trained, 'export.py', '--output=folder/new')
    assert (trained / 'folder/new/config.json').exists()
    (trained / '.export-new/replaced').rmdir()
    # one that begins as soon as the folder is let go of
    (tmp_path / 'late.py').write_text(f"""import os, runpy, sys
sys.path.insert(0, {ROOT!r})
import fledge
release = fledge.release_folder
def release_and_begin(lock):
    release(lock)
    os.makedirs('.export-new/new', exist_ok=True)
fledge.release_folder, sys.argv[0] = release_and_begin, {os.path.join(ROOT, 'export.py')!r}
runpy.run_path(sys.argv[0], run_name='__main__')""")
    subprocess.run([python(), str(tmp_path / 'late.py'), '--output=new'], cwd=trained, check=True)
    assert (trained / '.export-new/new').exists()
    shutil.rmtree(trained / '.export-new')


@pytest.mark.parametrize('kind', ['gpt2', 'llama', 'qwen3'])
@pytest.mark.parametrize('split', ['gpt2', 'qwen2'])
def test_transformers_takes_any_tokenizer_as_it_is(kind, split, tmp_path):
    """Its AutoTokenizer has ideas of its own for some model types."""
    rope = dict(
        position='rope', norm='rmsnorm', activation='swiglu', bias=False, qk_norm=kind == 'qwen3'
    )
    model, ours = (
        GPT(
            GPTConfig(
                block_size=64,
                vocab_size=400,
                n_layer=1,
                n_head=2,
                n_embd=16,
                **({} if kind == 'gpt2' else rope),
            )
        ).eval(),
        train_bpe([TEXT] * 30, 400, split=split),
    )
    huggingface.write(str(tmp_path), model, ours, torch.float32, 'a card')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert all(
        theirs(text)['input_ids'] == ours.encode(text, allow_special=True)
        for text in random_texts(300)
    )


def test_qwen2_has_qwens_tokenizer_or_none(tmp_path):
    args = dict(
        block_size=64,
        vocab_size=400,
        n_layer=1,
        n_head=2,
        n_embd=16,
        position='rope',
        norm='rmsnorm',
        activation='swiglu',
        bias=False,
        qkv_bias=True,
    )
    model, ours = GPT(GPTConfig(**args)).eval(), train_bpe([TEXT] * 30, 400)
    with pytest.raises(UserError, match="for Qwen2's own, which this one is not"):
        huggingface.write(str(tmp_path), model, ours, torch.float32, 'a card')
    qwens = type(ours)(ours.spec | dict(normalizer=dict(type='NFC')))
    huggingface.write(str(tmp_path), model, qwens, torch.float32, 'a card')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert all(
        theirs(text)['input_ids'] == qwens.encode(text, allow_special=True)
        for text in random_texts(300)
    )


OWN = '{{ messages[0].content }}!'


@pytest.mark.slow
@pytest.mark.parametrize(
    'template', [OWN, [dict(name='tool_use', template='no'), dict(name='default', template=OWN)]]
)
def test_a_template_and_settings_of_its_own_go_along(template, tmp_path):
    make('llama', tmp_path / 'in', vocab_size=300)
    byte_tokenizer().save(str(tmp_path / 'in/tokenizer.json'))
    (tmp_path / 'in/tokenizer_config.json').write_text(
        json.dumps(
            dict(chat_template=template, eos_token=dict(content='<|im_end|>'), pad_token=['odd'])
        )
    )
    (tmp_path / 'in/generation_config.json').write_text(
        '{"eos_token_id": [256, 7], "temperature": 0.1}'
    )
    run(tmp_path, 'export.py', '--init_from=in', '--output=hf')
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    assert (
        again.apply_chat_template([dict(role='user', content='hi')], tokenize=False) == 'hi!'
        and again.eos_token_id == 258
    )
    assert json.loads((tmp_path / 'hf/generation_config.json').read_text())['eos_token_id'] == [
        256,
        7,
    ]


@pytest.mark.slow
def test_a_full_disk_and_a_kill_leave_what_was_there(trained, exported):
    before = (trained / 'out/model.gguf').read_bytes()
    for flags in (['--format=gguf', '--dtype=f32'], [], ['--format=ckpt']):
        process = start(
            trained,
            'export.py',
            '--overwrite',
            *flags,
            preexec_fn=lambda: (
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
                resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
            ),
        )
        _, err = process.communicate(timeout=120)
        assert (
            process.returncode == 2
            and len(err.strip().splitlines()) == 1
            and not debris(trained / 'out')
        ), err
    process = start(trained, 'export.py', '--overwrite', '--format=gguf', '--dtype=f32')
    while not (trained / 'out/.export-model.gguf').exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert (trained / 'out/model.gguf').read_bytes() == before
    run(trained, 'export.py', '--overwrite', '--format=gguf')
    assert (trained / 'out/model.gguf').read_bytes() == before and not debris(trained / 'out')
