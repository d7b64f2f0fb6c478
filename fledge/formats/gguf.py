"""A GPT as a GGUF file, which llama.cpp and Ollama open.

Tensors are turned and written one at a time. Sources: ggml's docs/gguf.md, and what llama.cpp's
loader looks for in a file.
"""

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from fledge import UserError
from fledge.formats import families
from fledge.tokenizer import PATTERNS, Tokenizer, merges_of
from model import GPT, GPTConfig, rope_frequencies

TYPES = {'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16', 'q8_0': 'Q8_0'}  # ours: GGUF's
# What llama.cpp calls a pattern that splits text.
SPLITS = {
    PATTERNS['gpt2']: 'gpt-2',
    PATTERNS['qwen2']: 'qwen2',
    PATTERNS['qwen2'].replace(r'|\p{N}|', r'|\p{N}{1,3}|'): 'llama-bpe',
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of tokens


def refused(what: str) -> UserError:
    return UserError(f'llama.cpp {what}; --format=hf can hold it')


def split_name(spec: dict) -> str:
    """llama.cpp's name for how a byte-level tokenizer.json splits text; UserError for none."""
    pre, normalizer = spec.get('pre_tokenizer') or {}, spec.get('normalizer') or {}
    # llama.cpp leaves out NFC, for Qwen as well
    if normalizer.get('type', 'NFC') != 'NFC':
        raise refused(f"has no normalizer like this tokenizer's ({normalizer['type']})")
    steps = pre.get('pretokenizers', [pre])
    kinds, first, last = [step.get('type') for step in steps], steps[0], steps[-1]
    by_gpt2s_pattern = last.get('use_regex', True)
    pattern = first.get('pattern', {}).get('Regex') if kinds == ['Split', 'ByteLevel'] else None
    if not last.get('add_prefix_space'):
        if kinds == ['ByteLevel'] and by_gpt2s_pattern:
            return 'gpt-2'
        if kinds == ['Digits', 'ByteLevel'] and first.get('individual_digits') and by_gpt2s_pattern:
            return 'smollm'
        if pattern in SPLITS:
            return SPLITS[pattern]
    raise refused(
        f'has no name for the way this tokenizer splits text ({pattern or pre.get("type")})'
    )


def begins_with_a_space(spec: dict) -> bool:
    """Whether a SentencePiece tokenizer.json puts a space in front of a text; UserError if more."""
    normalizer, pre = spec.get('normalizer') or {}, spec.get('pre_tokenizer') or {}
    steps = normalizer.get('normalizers', [normalizer]) + pre.get('pretokenizers', [pre])
    steps = [step for step in steps if step]
    kinds = [step.get('type') for step in steps]
    if not set(kinds) <= {'Prepend', 'Replace', 'Metaspace'}:
        raise refused(f'has no tokenizer with {", ".join(map(str, kinds))}')
    schemes = [s.get('prepend_scheme', 'always') for s in steps if s['type'] == 'Metaspace']
    return 'Prepend' in kinds or any(scheme != 'never' for scheme in schemes)


def add_sentencepiece(writer: object, tokenizer: Tokenizer, tokens: list[tuple]) -> None:
    """What llama.cpp goes by in SentencePiece's BPE: what is merged first has the highest score.

    tokens: [(text, kind), ...] by id, of which bytes and the unknown token get kinds of their own.
    """
    model = tokenizer.spec['model']
    made = [model['vocab'][''.join(merge)] for merge in merges_of(model)]
    if made != sorted(made):
        raise refused('merges in the order of the ids, and this tokenizer has another')
    writer.add_tokenizer_model('llama')
    writer.add_tokenizer_pre('default')
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_add_space_prefix(begins_with_a_space(tokenizer.spec))
    for i, (token, _) in enumerate(tokens):
        if re.fullmatch('<0x[0-9A-F]{2}>', token):
            tokens[i] = token, BYTE
        if token == model.get('unk_token'):
            tokens[i] = token, UNKNOWN


def add_tokenizer(writer: object, tokenizer: Tokenizer, vocab_size: int) -> None:
    """The tokenizer's part of the metadata, padded to the vocab_size of the model's embedding.

    Raises UserError for what llama.cpp does not do: characters, WordPiece, splits it does not know,
    conversations of which it would read other tokens.
    """
    model, end = tokenizer.spec['model'], tokenizer.end_of_text
    if model['type'] != 'BPE':
        kind = 'characters' if tokenizer.chars else model['type']
        raise refused(f'has no tokenizer like this one ({kind})')
    tokens = [(f'[PAD{i}]', UNUSED) for i in range(vocab_size)]
    for token, i in model['vocab'].items():
        tokens[i] = token, NORMAL
    for added in tokenizer.spec.get('added_tokens') or []:
        tokens[added['id']] = added['content'], CONTROL if added.get('special') else USER_DEFINED
    if model.get('byte_fallback'):
        add_sentencepiece(writer, tokenizer, tokens)
    else:
        merges = [' '.join(merge) for merge in merges_of(model)]
        writer.add_tokenizer_model('gpt2')
        writer.add_tokenizer_pre(split_name(tokenizer.spec))
        # llama.cpp wants one merge at least: one of two words that are no tokens does nothing
        writer.add_token_merges(merges or ['no merge'])
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    begin = tokenizer.begin[0] if tokenizer.begin else end
    if tokenizer.template:  # which names them
        named = tokenizer.template.tokens
        begin = tokenizer.special.get(named.get('bos_token'), begin)
        end = tokenizer.special.get(named.get('eos_token'), end)
    if begin is not None:
        writer.add_bos_token_id(begin)
    if end is not None:
        writer.add_eos_token_id(end)
        writer.add_pad_token_id(end)
    writer.add_add_bos_token(bool(tokenizer.begin))
    if tokenizer.turn_end is not None:
        writer.add_eot_token_id(tokenizer.turn_end)
    if tokenizer.has_chat_form:
        if not tokenizer.template:  # one of another's making would be code to run
            tokenizer.check_chat_form()
        writer.add_chat_template(tokenizer.chat_form.text)


def add_settings(writer: object, c: GPTConfig, kind: str) -> None:
    """The model's part of the metadata, by its family's table; UserError for what is not read."""
    import gguf

    family, scaling = families.FAMILIES[kind], c.rope_scaling or {}
    if scaling.get('rope_type') == 'llama3' and family.gguf != 'llama':
        raise UserError(
            'llama.cpp reads rope_scaling of type llama3 for llama alone, '
            f'and this is a {kind} model'
        )
    if family.gguf == 'qwen2' and c.n_head * c.head_dim != c.n_embd:
        raise UserError(
            f'llama.cpp reads no qwen2 model whose heads ({c.n_head} of {c.head_dim}) '
            f'are not as wide as the model ({c.n_embd})'
        )
    for ours, _, theirs, _ in family.settings:
        value = getattr(c, ours)
        if theirs:
            add = writer.add_float32 if families.TYPES[ours] is float else writer.add_uint32
            add(f'{writer.arch}.{theirs}', value)
    if scaling.get('rope_type') == 'linear':
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling['factor'])


def type_of(name: str, tensor: torch.Tensor, dtype: str) -> int:
    """GGUF's type of a tensor, by our name, in a file of dtype (see TYPES).

    Vectors and learned positions stay float32; q8_0 goes in blocks of 32, and float16 is the rest.
    """
    import gguf

    if tensor.dim() < 2 or name == 'transformer.wpe.weight':
        return gguf.GGMLQuantizationType.F32
    fits = dtype != 'q8_0' or tensor.shape[1] % 32 == 0
    return gguf.GGMLQuantizationType[TYPES[dtype if fits else 'float16']]


@torch.no_grad()
def round_weights(model: GPT, dtype: str) -> None:
    """Give model the weights, in place, and the GELU that llama.cpp will compute with."""
    import gguf

    for name, p in model.named_parameters():
        kind = type_of(name, p, dtype)
        with np.errstate(all='ignore'):  # what is too large becomes infinite, or NaN
            stored = gguf.quants.quantize(p.detach().numpy(), kind)
            rounded = gguf.quants.dequantize(stored, kind).astype(np.float32)
        p.copy_(torch.from_numpy(rounded))
    for block in model.transformer.h:
        if block.mlp.activation == 'gelu':
            block.mlp.activation = 'gelu_tanh'


def tensors(model: GPT, kind: str, dtype: str) -> Iterator[tuple[str, int, np.ndarray]]:
    """(GGUF's name, type, float32 array) of what a file of dtype holds of a GPT, one at a time."""
    import gguf

    c = model.config
    for ours, _, name, tensor in families.parts_of(model, kind):
        if name.endswith(families.FAMILIES[kind].gguf_pairs):
            # each head's rows are all firsts, then all seconds; pair after pair in the file
            pairs = tensor.reshape(-1, 2, c.head_dim // 2, c.n_embd)
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)
        yield name, type_of(ours, tensor, dtype), tensor.contiguous().numpy()
    if (c.rope_scaling or {}).get('rope_type') == 'llama3':
        factors = rope_frequencies(replace(c, rope_scaling=None)) / rope_frequencies(c)
        yield 'rope_freqs.weight', gguf.GGMLQuantizationType.F32, factors.numpy()


def write(path: str, model: GPT, tokenizer: Tokenizer, dtype: str, name: str) -> None:
    """Write path: model's weights in dtype (see type_of), its tokenizer, the chat template.

    name is for people. Raises UserError for a model or a tokenizer that llama.cpp has no name for.
    """
    import gguf

    kind = families.config_of(model.config)['model_type']
    file_type = ('ALL_' if dtype == 'float32' else 'MOSTLY_') + TYPES[dtype]
    writer = gguf.GGUFWriter(path, families.FAMILIES[kind].gguf)
    writer.add_type('model')
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_settings(writer, model.config, kind)
    add_tokenizer(writer, tokenizer, model.config.vocab_size)
    for tensor_name, stored, array in tensors(model, kind, dtype):
        block, size = gguf.GGML_QUANT_SIZES[stored]
        n_bytes = array.size // block * size
        writer.add_tensor_info(tensor_name, array.shape, np.float32, n_bytes, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, stored, array in tensors(model, kind, dtype):
        writer.write_tensor_data(gguf.quants.quantize(array, stored))
    writer.close()


def largest_error(path: str, model: GPT, dtype: str) -> float:
    """How far a weight in the file at path is from what write was to put there.

    Infinite where the file lacks a tensor, has one too many, or one of another type or shape.
    """
    import gguf

    kind, largest = families.config_of(model.config)['model_type'], 0.0
    held = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for name, stored, array in tensors(model, kind, dtype):
        found, block = held.pop(name, None), gguf.quants.quantize(array, stored)
        if found is None or found.tensor_type != stored or found.data.shape != block.shape:
            return float('inf')
        off = gguf.quants.dequantize(found.data, stored) - gguf.quants.dequantize(block, stored)
        largest = np.maximum(largest, np.abs(off).max())  # NaN stays NaN, unlike with max()
    return float('inf') if held else float(largest)
