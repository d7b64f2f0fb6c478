"""A GPT out of a GGUF file's metadata and tensors alone, as llama.cpp would understand them."""

import gguf
import numpy as np
import torch

from fledge.checkpoint import empty_model, load_model
from fledge.formats import families
from model import GPTConfig, rope_frequencies

# llama.cpp's architectures of a Llama's shape, by what a model of them has beside it
SWITCHES = dict(llama={}, qwen2=dict(qkv_bias=True), qwen3=dict(qk_norm=True))


def neighbours_apart(tensor, n_head):
    """The rows of llama.cpp's 'llama', whose RoPE turns neighbours, where ours are."""
    pairs = tensor.reshape(n_head, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def read(path):
    """The GPT of a GGUF file, with GELU's tanh form, which is llama.cpp's only one."""
    reader = gguf.GGUFReader(path)
    kind = reader.get_field('general.architecture').contents()

    def value(key):
        field = reader.get_field(f'{kind}.{key}')
        return None if field is None else field.contents()

    held = {}
    for t in reader.tensors:
        numbers = gguf.quants.dequantize(t.data, t.tensor_type)
        held[t.name] = torch.from_numpy(numbers.astype(np.float32))
    args = dict(
        block_size=value('context_length'),
        vocab_size=len(reader.get_field('tokenizer.ggml.tokens').contents()),
        n_layer=value('block_count'),
        n_head=value('attention.head_count'),
        n_embd=value('embedding_length'),
        n_inner=value('feed_forward_length'),
        tie_embeddings='output.weight' not in held,
    )
    if kind == 'gpt2':
        args |= dict(activation='gelu_tanh', norm_eps=value('attention.layer_norm_epsilon'))
    else:
        args |= dict(position='rope', norm='rmsnorm', activation='swiglu', bias=False)
        args |= SWITCHES[kind] | dict(
            n_kv_head=value('attention.head_count_kv'),
            head_dim=value('attention.key_length'),
            norm_eps=value('attention.layer_norm_rms_epsilon'),
            rope_theta=value('rope.freq_base'),
        )
        assert value('attention.value_length') == value('rope.dimension_count') == args['head_dim']
    if value('rope.scaling.type') == 'linear':
        args['rope_scaling'] = dict(rope_type='linear', factor=value('rope.scaling.factor'))
    assert value('vocab_size') == args['vocab_size']
    state = {}
    for ours in empty_model(GPTConfig(**args)).state_dict():
        if ours == 'lm_head.weight' and args['tie_embeddings']:
            continue
        parts = []
        for _, name in families.names_of(kind, ours):
            part = held.pop(name)
            if kind == 'llama' and name.endswith('attn_q.weight'):
                part = neighbours_apart(part, args['n_head'])
            if kind == 'llama' and name.endswith('attn_k.weight'):
                part = neighbours_apart(part, args['n_kv_head'])
            parts.append(part)
        state[ours] = torch.cat(parts)
    if args['tie_embeddings']:
        state['lm_head.weight'] = state['transformer.wte.weight']
    model = load_model(dict(model=state, model_args=args), path).eval()
    if 'rope_freqs.weight' in held:
        frequencies = rope_frequencies(model.config) / held.pop('rope_freqs.weight')
        angles = torch.outer(torch.arange(args['block_size'], dtype=torch.float32), frequencies)
        model.rope_cos = angles.cos().repeat(1, 2)
        model.rope_sin = torch.cat((-angles.sin(), angles.sin()), dim=1)
    assert not held, held.keys()
    return model
