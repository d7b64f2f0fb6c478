"""A GPT as a GGUF file, which llama.cpp and Ollama open, and back.

Tensors are turned and written one at a time. Sources: ggml's docs/gguf.md, and what llama.cpp's loader looks for in a file.
"""

import re
from dataclasses import replace

import numpy as np
import torch

from fledge import UserError, pretrained
from fledge.checkpoint import empty_model, load_model
from fledge.tokenizer import IM_END, PATTERNS
from model import GPTConfig, rope_frequencies, rope_tables

TYPES = {'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16', 'q8_0': 'Q8_0'}  # ours: GGUF's
# How llama.cpp calls a way to split text: by the pattern, or by how tokenizer.json spells it
SPLITS = {
    PATTERNS['gpt2']: 'gpt-2',
    PATTERNS['qwen2']: 'qwen2',
    PATTERNS['qwen2'].replace(r'|\p{N}|', r'|\p{N}{1,3}|'): 'llama-bpe',
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of tokens


def split_name(spec):
    """llama.cpp's name for how a tokenizer.json splits text; UserError where it has none."""
    pre, normalizer = spec.get('pre_tokenizer') or {}, spec.get('normalizer') or {}
    if (
        normalizer and normalizer.get('type') != 'NFC'
    ):  # which llama.cpp leaves out, for Qwen as well
        raise UserError(
            f"llama.cpp has no normalizer like this tokenizer's ({normalizer.get('type')}); --format=hf can hold it"
        )
    steps = pre.get('pretokenizers', [pre])
    kinds = [step.get('type') for step in steps]
    whole = steps[-1].get('use_regex', True) and not steps[-1].get('add_prefix_space')
    if kinds == ['ByteLevel'] and whole:
        return 'gpt-2'
    if kinds == ['Digits', 'ByteLevel'] and steps[0].get('individual_digits') and whole:
        return 'smollm'
    pattern = steps[0].get('pattern', {}).get('Regex') if kinds == ['Split', 'ByteLevel'] else None
    if pattern not in SPLITS or steps[-1].get('add_prefix_space'):
        raise UserError(
            f'llama.cpp has no name for the way this tokenizer splits text ({pattern or pre.get("type")}); --format=hf can hold it'
        )
    return SPLITS[pattern]


def begins_with_a_space(spec):
    """Whether a SentencePiece tokenizer.json puts a space in front of a text, in either of its spellings; UserError where it does more to it."""
    normalizer, pre = spec.get('normalizer') or {}, spec.get('pre_tokenizer') or {}
    steps = [
        s
        for s in (*normalizer.get('normalizers', [normalizer]), *pre.get('pretokenizers', [pre]))
        if s
    ]
    if any(s.get('type') not in ('Prepend', 'Replace', 'Metaspace') for s in steps):
        raise UserError(
            f'llama.cpp has no tokenizer with {", ".join(str(s.get("type")) for s in steps)}; --format=hf can hold it'
        )
    return any(
        s.get('type') == 'Prepend'
        or (s.get('type') == 'Metaspace' and s.get('prepend_scheme', 'always') != 'never')
        for s in steps
    )


def add_tokenizer(writer, tokenizer, vocab_size, chat_template):
    """The tokenizer's part of the metadata, padded to the vocab_size of the model's embedding.

    Raises UserError for what llama.cpp does not do: characters, WordPiece, splits that it does not know.
    """
    model, added = tokenizer.spec['model'], tokenizer.spec.get('added_tokens') or []
    if model['type'] != 'BPE':
        raise UserError(
            f'llama.cpp has no tokenizer like this one ({"characters" if tokenizer.chars else model["type"]}); --format=hf can hold it'
        )
    tokens = {i: (token, NORMAL) for token, i in model['vocab'].items()}
    tokens |= {
        t['id']: (t['content'], CONTROL if t.get('special') else USER_DEFINED) for t in added
    }
    if model.get(
        'byte_fallback'
    ):  # SentencePiece's: what is merged first has the highest score, and ids are in that order
        made = [
            model['vocab'][merge.replace(' ', '') if isinstance(merge, str) else ''.join(merge)]
            for merge in model['merges']
        ]
        if made != sorted(made):
            raise UserError(
                'llama.cpp merges in the order of the ids, and this tokenizer has another; --format=hf can hold it'
            )
        writer.add_tokenizer_model('llama')
        writer.add_tokenizer_pre('default')
        writer.add_token_scores([-float(i) for i in range(vocab_size)])
        writer.add_add_space_prefix(begins_with_a_space(tokenizer.spec))
        tokens |= {
            i: (token, BYTE)
            for i, (token, _) in tokens.items()
            if re.fullmatch('<0x[0-9A-F]{2}>', token)
        }
        tokens |= {
            i: (token, UNKNOWN)
            for i, (token, _) in tokens.items()
            if token == model.get('unk_token')
        }
    else:
        writer.add_tokenizer_model('gpt2')
        writer.add_tokenizer_pre(split_name(tokenizer.spec))
        merges = [merge if isinstance(merge, str) else ' '.join(merge) for merge in model['merges']]
        writer.add_token_merges(
            merges or ['no merge']
        )  # llama.cpp wants one: of two words that are no tokens
    # the embedding may have rows beyond the vocabulary
    every = [tokens.get(i, (f'[PAD{i}]', UNUSED)) for i in range(vocab_size)]
    writer.add_token_list([token for token, _ in every])
    writer.add_token_types([kind for _, kind in every])
    begin = tokenizer.begin[0] if tokenizer.begin else tokenizer.end_of_text
    if begin is not None:
        writer.add_bos_token_id(begin)
    if tokenizer.end_of_text is not None:
        writer.add_eos_token_id(tokenizer.end_of_text)
        writer.add_pad_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(bool(tokenizer.begin))
    if IM_END in tokenizer.special:
        writer.add_eot_token_id(tokenizer.special[IM_END])
    if chat_template:
        writer.add_chat_template(chat_template)


def interleave(tensor, heads, back=False):
    """The rows of llama.cpp's 'llama', whose RoPE turns neighbours: where ours are (all firsts, all seconds) in each head, its are pair after pair."""
    shape = (heads, -1, 2) if back else (heads, 2, -1)
    return tensor.reshape(*shape, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def type_of(name, tensor, dtype):
    """GGUF's type of a tensor, by our name or GGUF's, in a file of dtype (see TYPES): vectors and learned positions stay float32, and q8_0 goes in blocks of 32."""
    import gguf

    if tensor.dim() < 2 or name in ('transformer.wpe.weight', 'position_embd.weight'):
        return gguf.GGMLQuantizationType.F32
    return gguf.GGMLQuantizationType[
        TYPES['float16' if dtype == 'q8_0' and tensor.shape[1] % 32 else dtype]
    ]


@torch.no_grad()
def round_weights(model, dtype):
    """Give model the weights, in place, and the GELU that llama.cpp will compute with."""
    import gguf

    for name, p in model.named_parameters():
        kind = type_of(name, p, dtype)
        p.copy_(
            torch.from_numpy(
                gguf.quants.dequantize(gguf.quants.quantize(p.detach().numpy(), kind), kind).astype(
                    np.float32
                )
            )
        )
    for block in model.transformer.h:
        if block.mlp.activation == 'gelu':
            block.mlp.activation = 'gelu_tanh'


def tensors(model, kind):
    """(name, Hugging Face's name, float32 tensor) of all that a GGUF file holds of a GPT, one at a time."""
    import gguf

    c = model.config
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(arch, c.n_layer)
    for their, tensor in pretrained.their_tensors(model, kind):
        if kind == 'gpt2' and pretrained.TRANSPOSED.search(their):
            tensor = tensor.t()  # as a linear layer has it
        if kind == 'llama' and re.search(r'\.[qk]_proj\.', their):
            tensor = interleave(tensor, c.n_head if '.q_proj.' in their else c.n_kv_head)
        yield names.get_name(their, try_suffixes=('.weight', '.bias')), their, tensor
    if (c.rope_scaling or {}).get('rope_type') == 'llama3':
        yield (
            'rope_freqs.weight',
            None,
            rope_frequencies(replace(c, rope_scaling=None)) / rope_frequencies(c),
        )


def write(path, model, tokenizer, dtype, name, chat_template=None):
    """Write path: model's weights in dtype (see type_of), its tokenizer, the chat template. name is for people.

    Raises UserError for a model or a tokenizer that llama.cpp has no name for.
    """
    import gguf

    c, config = model.config, pretrained.write_config(model.config)
    kind, scaling = config['model_type'], (c.rope_scaling or {}).get('rope_type')
    if scaling == 'llama3' and kind != 'llama':
        raise UserError(
            f'llama.cpp reads rope_scaling of type llama3 for llama alone, and this is a {kind} model'
        )
    if kind == 'qwen2' and c.n_head * c.head_dim != c.n_embd:
        raise UserError(
            f'llama.cpp reads no qwen2 model whose heads ({c.n_head} of {c.head_dim}) are not as wide as the model ({c.n_embd})'
        )
    writer = gguf.GGUFWriter(path, kind)
    writer.add_type('model')
    writer.add_description('made with fledge')  # export.py replaces no other file
    writer.add_name(name)
    writer.add_file_type(
        gguf.LlamaFileType[('ALL_' if dtype == 'float32' else 'MOSTLY_') + TYPES[dtype]]
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(c.n_inner)
    writer.add_head_count(c.n_head)
    writer.add_vocab_size(c.vocab_size)
    if kind == 'gpt2':
        writer.add_layer_norm_eps(c.norm_eps)
    else:
        writer.add_head_count_kv(c.n_kv_head)
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
        writer.add_layer_norm_rms_eps(c.norm_eps)
        writer.add_rope_freq_base(c.rope_theta)
        writer.add_rope_dimension_count(c.head_dim)
        if scaling == 'linear':
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(c.rope_scaling['factor'])
    add_tokenizer(writer, tokenizer, c.vocab_size, chat_template)
    for tensor_name, _, tensor in tensors(model, kind):
        stored = type_of(tensor_name, tensor, dtype)
        block, size = gguf.GGML_QUANT_SIZES[stored]
        writer.add_tensor_info(
            tensor_name, tensor.shape, np.float32, tensor.numel() // block * size, stored
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor_name, _, tensor in tensors(model, kind):
        writer.write_tensor_data(
            gguf.quants.quantize(tensor.contiguous().numpy(), type_of(tensor_name, tensor, dtype))
        )
    writer.close()


class Weights:
    """The tensors of a GGUF file by Hugging Face's names, as pretrained.our_tensors asks for them."""

    def __init__(self, reader, model, kind):
        self.tensors, self.config, self.kind = (
            {t.name: t for t in reader.tensors},
            model.config,
            kind,
        )
        self.name_of = {their: name for name, their, _ in tensors(model, kind) if their}

    def names(self):
        known = {name: their for their, name in self.name_of.items()}
        return [known.get(name, name) for name in self.tensors if name != 'rope_freqs.weight']

    def read(self, their):
        import gguf

        found = self.tensors.get(self.name_of[their])
        if found is None:
            raise UserError(f'no tensor {self.name_of[their]}')
        tensor = torch.from_numpy(
            gguf.quants.dequantize(found.data, found.tensor_type).astype(np.float32)
        )
        if self.kind == 'llama' and re.search(r'\.[qk]_proj\.', their):
            tensor = interleave(
                tensor,
                self.config.n_head if '.q_proj.' in their else self.config.n_kv_head,
                back=True,
            )
        return tensor.t() if self.kind == 'gpt2' and pretrained.TRANSPOSED.search(their) else tensor


def read(path):
    """The GPT of a GGUF file that write made, out of its metadata and tensors alone; with GELU's tanh form, which is llama.cpp's only one."""
    import gguf

    reader = gguf.GGUFReader(path)
    kind = reader.get_field('general.architecture').contents()

    def value(key):
        field = reader.get_field(f'{kind}.{key}')
        return None if field is None else field.contents()

    names = {t.name for t in reader.tensors}
    args = dict(
        block_size=value('context_length'),
        vocab_size=len(reader.get_field('tokenizer.ggml.tokens').contents()),
        n_layer=value('block_count'),
        n_head=value('attention.head_count'),
        n_embd=value('embedding_length'),
        n_inner=value('feed_forward_length'),
        tie_embeddings='output.weight' not in names,
    )
    if kind == 'gpt2':
        args |= dict(activation='gelu_tanh', norm_eps=value('attention.layer_norm_epsilon'))
    else:
        args |= dict(
            n_kv_head=value('attention.head_count_kv'),
            head_dim=value('attention.key_length'),
            norm_eps=value('attention.layer_norm_rms_epsilon'),
            bias=False,
            position='rope',
            norm='rmsnorm',
            activation='swiglu',
            qkv_bias=kind == 'qwen2',
            qk_norm=kind == 'qwen3',
            rope_theta=value('rope.freq_base'),
        )
        if value('rope.scaling.type') == 'linear':
            args['rope_scaling'] = dict(rope_type='linear', factor=value('rope.scaling.factor'))
    shapes = empty_model(GPTConfig(**args))
    model = load_model(
        dict(
            model=pretrained.our_tensors(Weights(reader, shapes, kind), kind, args, path),
            model_args=args,
        ),
        path,
    )
    if 'rope_freqs.weight' in names:
        factors = torch.from_numpy(
            next(t.data for t in reader.tensors if t.name == 'rope_freqs.weight').copy()
        )
        model.rope_cos, model.rope_sin = rope_tables(
            model.config, rope_frequencies(model.config) / factors
        )
    return model
