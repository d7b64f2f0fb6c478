"""Hugging Face weights to ours and back: GPT-2, Llama, Qwen2 and Qwen3, by one table of names.

Tensors are read one at a time, so loading takes the memory of one model and one tensor. Nothing loaded is executed.
Sources: the modeling and configuration files of the four families in huggingface/transformers.
"""

import math
import os
import re
from dataclasses import fields

import torch

from fledge import UserError, checkpoint, hub, read_json
from fledge.tokenizer import TOKENIZER_FILES, find_tokenizer, load_tokenizer
from model import GPTConfig

# Our name: theirs. Several of theirs lie in one of ours, one below the other. {} is the layer.
LLAMA = {
    'transformer.wte.weight': ['model.embed_tokens.weight'],
    'transformer.h.{}.ln_1.weight': ['model.layers.{}.input_layernorm.weight'],
    'transformer.h.{}.attn.c_attn.weight': [
        f'model.layers.{{}}.self_attn.{p}_proj.weight' for p in 'qkv'
    ],
    'transformer.h.{}.attn.c_attn.bias': [
        f'model.layers.{{}}.self_attn.{p}_proj.bias' for p in 'qkv'
    ],
    'transformer.h.{}.attn.q_norm.weight': ['model.layers.{}.self_attn.q_norm.weight'],
    'transformer.h.{}.attn.k_norm.weight': ['model.layers.{}.self_attn.k_norm.weight'],
    'transformer.h.{}.attn.c_proj.weight': ['model.layers.{}.self_attn.o_proj.weight'],
    'transformer.h.{}.ln_2.weight': ['model.layers.{}.post_attention_layernorm.weight'],
    'transformer.h.{}.mlp.c_fc.weight': [
        'model.layers.{}.mlp.gate_proj.weight',
        'model.layers.{}.mlp.up_proj.weight',
    ],
    'transformer.h.{}.mlp.c_proj.weight': ['model.layers.{}.mlp.down_proj.weight'],
    'transformer.ln_f.weight': ['model.norm.weight'],
    'lm_head.weight': ['lm_head.weight'],
}
GPT2 = {
    name: [name]
    for name in (
        'transformer.wte.weight',
        'transformer.wpe.weight',
        'transformer.ln_f.weight',
        'transformer.ln_f.bias',
        'lm_head.weight',
        *(
            f'transformer.h.{{}}.{part}.{kind}'
            for part in ('ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj')
            for kind in ('weight', 'bias')
        ),
    )
}
NAMES = {'gpt2': GPT2, 'llama': LLAMA, 'qwen2': LLAMA, 'qwen3': LLAMA}
LAYER = r'\.h\.\d+\.', '.h.{}.'  # as in re.sub: a name without its layer
TRANSPOSED = re.compile(
    r'(c_attn|c_proj|c_fc)\.weight$'
)  # in GPT-2's files, whose layers are Conv1D
IGNORED = re.compile(
    r'(\.attn\.(masked_)?bias|rotary_emb\.inv_freq)$'
)  # buffers that older versions saved

# What a config.json may say of things that GPT cannot do: the one value it has to have, and words for what has to be off
REQUIRED = {
    'gpt2': dict(
        scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False
    ),
    'llama': dict(attention_bias=False, mlp_bias=False, sliding_window=None),
    'qwen2': dict(mlp_bias=False),
    'qwen3': dict(mlp_bias=False, attention_bias=False),
}
FOREIGN = re.compile(
    'expert|moe|multiplier|softcap|logit_scale|logits_scaling|alibi|auto_map|quantization_config'
)
FILES = [
    'config.json',
    'generation_config.json',
    'tokenizer_config.json',
    'chat_template.jinja',
    *TOKENIZER_FILES,
]  # what is fetched beside the weights
TYPES = {field.name: field.type for field in fields(GPTConfig)} | dict(
    qkv_bias=bool, rope_scaling=object, rope_type=str
)
ROPE = dict(
    default=(),
    linear=('factor',),
    llama3=('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'),
)
ACTIVATIONS = dict(
    gelu_new='gelu_tanh',
    gelu_pytorch_tanh='gelu_tanh',
    gelu_fast='gelu_tanh',
    gelu='gelu',
    gelu_python='gelu',
)


def their_names(model_type, name):
    """The names in a Hugging Face file of our tensor `name`."""
    layer = re.search(r'\.h\.(\d+)\.', name)
    found = NAMES[model_type][re.sub(*LAYER, name)]
    return [their.format(layer[1]) if layer else their for their in found]


def read_config(config, where, block_size=0):
    """GPTConfig of a parsed config.json, as a dict; block_size: fewer positions than it has, or with RoPE more. where names it in errors."""
    kind = config.get('model_type')
    if not isinstance(kind, str) or kind not in NAMES:
        raise UserError(f'{where}: model_type {kind!r} is none of {", ".join(NAMES)}')
    for field, value in REQUIRED[kind].items():
        if config.get(field, value) != value:
            raise UserError(f'{where}: {field}={config[field]!r} is not supported')
    for field, value in config.items():
        if (
            FOREIGN.search(field)
            and value not in (None, False, 0, {}, [])
            and (value is True or value != 1)
        ):  # a multiplier of 1, a single expert change nothing
            raise UserError(f'{where}: {field}={str(value)[:60]} is not supported')
    try:
        other = set(config.get('layer_types') or ()) - {'full_attention'}
        if other:
            raise UserError(f'{where}: layer_types has {min(other)}, which is not supported')
        args = (
            gpt2_args(config, where, block_size)
            if kind == 'gpt2'
            else llama_args(config, kind, where, block_size)
        )
        for name, value in (args | (args.get('rope_scaling') or {})).items():
            wanted = TYPES.get(name, float)  # what is no field is RoPE's
            if wanted is int:
                fits = type(value) is int and 0 <= value < 2**31
            elif wanted is float:
                fits = type(value) in (int, float) and 0 < value < math.inf
            else:
                fits = wanted is object or type(value) is wanted
            if not fits:
                raise UserError(
                    f'{where}: {name}={value!r} is no {wanted.__name__} that a model can have'
                )
        return args
    except KeyError as e:
        raise UserError(f'{where} lacks {e}') from None
    except (TypeError, ValueError, AttributeError) as e:
        raise UserError(f'{where} describes no model: {e}') from None


def gpt2_args(config, where, block_size):
    activation = ACTIVATIONS.get(config.get('activation_function', 'gelu_new'))
    if not activation:
        raise UserError(
            f'{where}: activation_function={config["activation_function"]!r} is not supported'
        )
    if block_size > config['n_positions']:
        raise UserError(
            f'{where} has {config["n_positions"]} learned positions; block_size={block_size} is more'
        )
    return dict(
        block_size=block_size or config['n_positions'],
        vocab_size=config['vocab_size'],
        n_layer=config['n_layer'],
        n_head=config['n_head'],
        n_embd=config['n_embd'],
        n_inner=config.get('n_inner') or 0,
        bias=True,
        activation=activation,
        norm_eps=config.get('layer_norm_epsilon', 1e-5),
        tie_embeddings=config.get('tie_word_embeddings', True),
    )


def llama_args(config, kind, where, block_size):
    if config.get('hidden_act', 'silu') not in ('silu', 'swish'):
        raise UserError(f'{where}: hidden_act={config["hidden_act"]!r} is not supported')
    window, from_layer = (
        config.get('use_sliding_window') and config.get('sliding_window', 4096),
        config.get('max_window_layers', 28),
    )
    if (
        kind != 'llama'
        and window
        and from_layer < config['num_hidden_layers']
        and not config.get('layer_types')
    ):
        raise UserError(f'{where}: use_sliding_window=True is not supported')
    rope = dict(
        config.get('rope_scaling') or config.get('rope_parameters') or {}
    )  # where both are there, transformers takes the older alone
    rope_type = rope.get('rope_type', rope.get('type', 'default'))
    if rope_type not in ROPE or any(
        isinstance(value, dict) for value in rope.values()
    ):  # another one, or one for each kind of layer
        raise UserError(
            f'{where}: RoPE of type {rope_type!r} is not supported'
            if rope_type not in ROPE
            else f'{where}: RoPE of several kinds ({", ".join(rope)}) is not supported'
        )
    if rope.get('partial_rotary_factor', config.get('partial_rotary_factor')) not in (None, 1.0):
        raise UserError(f'{where}: partial_rotary_factor is not supported')
    theta = rope.get('rope_theta') or config.get('rope_theta') or 10000.0
    rope.setdefault('original_max_position_embeddings', config['max_position_embeddings'])
    if (
        'original_max_position_embeddings' in config
    ):  # beside RoPE's own settings, it goes before them
        rope['original_max_position_embeddings'] = config['original_max_position_embeddings']
    scaling = (
        dict(rope_type=rope_type) | {name: rope[name] for name in ROPE[rope_type]}
        if ROPE[rope_type]
        else None
    )
    if rope_type == 'llama3' and scaling['low_freq_factor'] == scaling['high_freq_factor']:
        raise UserError(
            f'{where}: RoPE with low_freq_factor = high_freq_factor has nothing between them'
        )
    return dict(
        block_size=block_size or config['max_position_embeddings'],
        vocab_size=config['vocab_size'],
        n_layer=config['num_hidden_layers'],
        n_head=config['num_attention_heads'],
        n_kv_head=config.get('num_key_value_heads') or 0,
        head_dim=config.get('head_dim', 128 if kind == 'qwen3' else 0) or 0,
        n_embd=config['hidden_size'],
        n_inner=config['intermediate_size'] or -1,
        bias=False,
        position='rope',
        rope_theta=float(theta),
        rope_scaling=scaling,
        norm='rmsnorm',
        norm_eps=config.get('rms_norm_eps', 1e-6),
        activation='swiglu',
        qkv_bias=kind == 'qwen2',
        qk_norm=kind == 'qwen3',
        tie_embeddings=config.get('tie_word_embeddings', False),
    )


class Weights:
    """The tensors of a folder's .safetensors files, or of a pickle of plain tensors, by name; each is read when asked for."""

    def __init__(self, folder):
        self.folder, self.open, self.plain = folder, {}, None
        index, single, pickled = (
            os.path.join(folder, n)
            for n in ('model.safetensors.index.json', 'model.safetensors', 'pytorch_model.bin')
        )
        if os.path.exists(single):  # an index beside it is of an earlier model
            self.files = dict.fromkeys(self._file('model.safetensors').keys(), 'model.safetensors')
        elif os.path.exists(index):
            self.files = read_json(index).get('weight_map')
            if not isinstance(self.files, dict) or any(
                not isinstance(n, str) or n != os.path.basename(n) for n in self.files.values()
            ):
                raise UserError(f'{index} has no weight_map of files beside it')
        elif os.path.exists(pickled):
            try:
                try:
                    self.plain = torch.load(
                        pickled, map_location='cpu', weights_only=True, mmap=True
                    )
                except RuntimeError:  # a file of before torch 1.6 is read at once
                    self.plain = torch.load(pickled, map_location='cpu', weights_only=True)
                if not isinstance(self.plain, dict) or not all(
                    torch.is_tensor(t) for t in self.plain.values()
                ):
                    raise TypeError
            except Exception as e:
                raise UserError(
                    f'{pickled} holds more than plain tensors, or is broken, and is not run ({type(e).__name__})'
                ) from None
            self.files = dict.fromkeys(self.plain, 'pytorch_model.bin')
        else:
            several = (
                '; pickles in several files are not read: save it again with transformers'
                if os.path.exists(f'{pickled}.index.json')
                else ''
            )
            raise UserError(f'{folder} has no model.safetensors{several}')

    def _file(self, name):
        import safetensors

        path = os.path.join(self.folder, name)
        if name not in self.open:
            try:
                self.open[name] = safetensors.safe_open(path, 'pt')
            except (OSError, safetensors.SafetensorError) as e:
                raise UserError(f'{path} cannot be read: {str(e).splitlines()[0]}') from None
        return self.open[name]

    def names(self):
        return self.files.keys()

    def read(self, name):
        """One tensor; name may lack or have the prefix of the body, as GPT-2's own files do. UserError where it is missing."""
        found = next((n for n in (name, name.partition('.')[2]) if n in self.files), None)
        if found is None:
            raise UserError(f'{self.folder} has no tensor {name}')
        if self.plain is not None:
            return self.plain[found]
        try:
            return self._file(self.files[found]).get_tensor(found)
        except Exception as e:  # a file that does not hold what the index promises
            raise UserError(
                f'{self.folder}: tensor {found} cannot be read: {str(e).splitlines()[0]}'
            ) from None


def part_rows(c, count, rows):
    """How many rows each of their `count` tensors has that lie in one of ours, of a GPTConfig c."""
    key_rows = c.n_kv_head * c.head_dim
    return {1: [rows], 2: [c.n_inner, c.n_inner], 3: [c.n_head * c.head_dim, key_rows, key_rows]}[
        count
    ]


def our_tensors(weights, kind, args, where):
    """The state_dict, float32, of the GPT that args describe, out of weights with Hugging Face's names for a model_type kind.

    weights: names() gives all of them, read(name) one tensor. Raises UserError, which names where, for what is missing, misshaped or unknown.
    """
    try:
        model = checkpoint.empty_model(GPTConfig(**args))
    except (TypeError, ValueError, KeyError) as e:
        raise UserError(f'{where} describes no model: {e}') from None
    state, used = {}, set()
    for name, wanted in model.state_dict().items():
        if name == 'lm_head.weight' and args['tie_embeddings']:
            continue
        parts = []
        for their in their_names(kind, name):
            part = weights.read(their)
            if part.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
                raise UserError(
                    f'{where}: tensor {their} is {str(part.dtype)[6:]}; only weights that are not quantized are read'
                )
            used |= {their, their.partition('.')[2]}
            parts.append(part.t() if kind == 'gpt2' and TRANSPOSED.search(their) else part)
        if name == 'transformer.wpe.weight':
            parts[0] = parts[0][: len(wanted)]
        for their, part, rows in zip(
            their_names(kind, name), parts, part_rows(model.config, len(parts), len(wanted))
        ):
            if part.shape != (rows, *wanted.shape[1:]):
                raise UserError(
                    f'{where}: tensor {their} has the shape {tuple(part.shape)}, and {(rows, *wanted.shape[1:])} is expected'
                )
        state[name] = torch.cat(parts).float() if len(parts) > 1 else parts[0].float().contiguous()
        del part, parts
    if args['tie_embeddings']:
        state['lm_head.weight'] = state['transformer.wte.weight']
    unknown = [
        n
        for n in weights.names()
        if n not in used
        and not IGNORED.search(n)
        and not (n == 'lm_head.weight' and args['tie_embeddings'])
    ]
    if unknown:
        raise UserError(f'{where}: tensor {unknown[0]} is none of a {kind} model')
    return state


def load(source, block_size=0):
    """A model to start from as a checkpoint: a dict of model (float32 tensors), model_args, config (the run's settings, if any), and folder, where its tokenizer is.

    source: a checkpoint file, a folder with config.json and the weights, or a name on the Hugging Face hub (OWNER/NAME).
    block_size: see read_config; a checkpoint keeps its own. Raises UserError for what is missing, broken or not supported.
    """
    if source.endswith('.pt') or os.path.isfile(source):
        return checkpoint.load(source)
    if os.path.isdir(source) and not os.path.exists(os.path.join(source, 'config.json')):
        raise UserError(
            f'{source} is a folder without a config.json; name the checkpoint file in it, or the folder of a Hugging Face model'
        )
    folder = (
        source
        if os.path.isdir(source)
        else hub.download(source, [*FILES, 'model*.safetensors', 'model.safetensors.index.json'])
    )
    if folder != source and not any(n.endswith('.safetensors') for n in os.listdir(folder)):
        folder = hub.download(source, [*FILES, 'pytorch_model.bin'])
    where = os.path.join(folder, 'config.json')
    config = read_json(where)
    args, weights = read_config(config, where, block_size), Weights(folder)
    embedding, head = [
        their_names(config['model_type'], name)[0]
        for name in ('transformer.wte.weight', 'lm_head.weight')
    ]
    if (
        args['tie_embeddings']
        and head in weights.names()
        and not torch.equal(weights.read(head).float(), weights.read(embedding).float())
    ):
        args['tie_embeddings'] = False  # whatever config.json says, as in transformers
    state = our_tensors(weights, config['model_type'], args, folder)
    return dict(model=state, model_args=GPTConfig(**args).model_args(), config={}, folder=folder)


def load_with_tokenizer(init_from, out_dir, dataset=''):
    """What the scripts that use a model begin with: a checkpoint (see load), the path it is from, and its tokenizer.

    init_from: resume (out_dir's ckpt.pt), or a source as of load. The tokenizer lies beside the weights or, in an older run, beside its data;
    dataset is the one to look at where the checkpoint names none.
    """
    path = os.path.join(out_dir, 'ckpt.pt') if init_from == 'resume' else init_from
    state = checkpoint.load(path) if init_from == 'resume' else load(init_from)
    state.pop('optimizer', None)  # twice the weights, and nothing to do but train
    dataset = state['config'].get('dataset') or dataset
    tokenizer = find_tokenizer(
        state.get('folder') or os.path.dirname(path) or '.',
        *([os.path.join('data', dataset)] if dataset else []),
    )
    if tokenizer is None and state['model_args'].get('vocab_size') not in (50257, 50304):
        raise UserError(
            f"{path} has no tokenizer.json beside it, and its vocabulary of {state['model_args'].get('vocab_size')} is not GPT-2's"
        )
    return state, path, tokenizer or load_tokenizer('gpt2')


def write_config(c):
    """The config.json, a dict, of the family that a GPTConfig belongs to; UserError where it belongs to none."""
    even = c.head_dim * c.n_head == c.n_embd
    if (
        c.position == 'learned'
        and c.norm == 'layernorm'
        and c.activation in ('gelu', 'gelu_tanh')
        and c.n_kv_head == c.n_head
        and even
        and not c.qk_norm
    ):
        return dict(
            architectures=['GPT2LMHeadModel'],
            model_type='gpt2',
            vocab_size=c.vocab_size,
            n_positions=c.block_size,
            n_embd=c.n_embd,
            n_layer=c.n_layer,
            n_head=c.n_head,
            n_inner=c.n_inner,
            activation_function={'gelu': 'gelu', 'gelu_tanh': 'gelu_new'}[c.activation],
            layer_norm_epsilon=c.norm_eps,
            resid_pdrop=c.dropout,
            embd_pdrop=c.dropout,
            attn_pdrop=c.dropout,
            tie_word_embeddings=c.tie_embeddings,
        )
    if (
        c.position != 'rope'
        or c.norm != 'rmsnorm'
        or c.activation != 'swiglu'
        or c.bias
        or (c.qkv_bias and c.qk_norm)
    ):
        odd = f'position={c.position} norm={c.norm} activation={c.activation} bias={c.bias} qkv_bias={c.qkv_bias} qk_norm={c.qk_norm} n_kv_head={c.n_kv_head} head_dim={c.head_dim}'
        raise UserError(
            f"none of {', '.join(NAMES)} has this model's {odd} together, so nothing else could load it"
        )
    kind, name = (
        ('qwen3', 'Qwen3')
        if c.qk_norm
        else ('qwen2', 'Qwen2')
        if c.qkv_bias
        else ('llama', 'Llama')
    )
    biases = {} if kind == 'qwen2' else dict(attention_bias=False)
    return dict(
        architectures=[f'{name}ForCausalLM'],
        model_type=kind,
        vocab_size=c.vocab_size,
        max_position_embeddings=c.block_size,
        hidden_size=c.n_embd,
        intermediate_size=c.n_inner,
        num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head,
        head_dim=c.head_dim,
        hidden_act='silu',
        rms_norm_eps=c.norm_eps,
        rope_theta=c.rope_theta,
        rope_scaling=c.rope_scaling,
        tie_word_embeddings=c.tie_embeddings,
        **biases,
    )


def their_tensors(model, kind):
    """(name in a Hugging Face file of model_type kind, tensor) of a GPT's weights, one at a time. What is tied is left out."""
    c, state = model.config, model.state_dict()
    for name, tensor in state.items():
        if name == 'lm_head.weight' and c.tie_embeddings:
            continue
        their = their_names(kind, name)
        parts = tensor.split(part_rows(c, len(their), len(tensor)))
        for n, part in zip(their, parts, strict=True):
            yield n, part.t() if kind == 'gpt2' and TRANSPOSED.search(n) else part
        bias = name.removesuffix('weight') + 'bias'
        if (
            kind == 'gpt2' and re.sub(*LAYER, bias) in GPT2 and bias not in state
        ):  # GPT-2 has biases throughout; a model here may do without
            yield their_names(kind, bias)[0], torch.zeros(len(tensor))
