"""A GPT out of a Hugging Face folder, and as a folder that transformers and its kin load.

Tensors are read one at a time, so loading takes the memory of one model and one tensor. Nothing
loaded is executed.
"""

import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Iterator

import torch

from fledge import UserError, adapters, chat_template, checkpoint, read_json
from fledge.configurator import given
from fledge.formats import families, hub, peft, save_tensors
from fledge.tokenizer import CHAT_TEMPLATE, IM_END, PATTERNS, TRIAL, Tokenizer, find_tokenizer
from model import GPT, GPTConfig

WANTED = ['*config.json', 'model*.safetensors*', peft.WEIGHTS]
WANTED += ['tokenizer.json', 'merges.txt', 'chat_*.jinja']
# Buffers that older versions of transformers saved.
BUFFERS = re.compile(r'(\.attn\.(masked_)?bias|rotary_emb\.inv_freq)$')
# Settings of a run that its model card shows.
SHOWN = ('optimizer', 'learning_rate', 'batch_size', 'gradient_accumulation_steps')
SHOWN += ('weight_decay', 'dropout', 'seed')
CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- fledge
{base}---

# {name}

{n_params:,} parameters, {architecture}: {c.n_layer} layers of {c.n_embd}, \
context {c.block_size:,}, vocabulary {c.vocab_size:,}. Made with fledge; loads without remote code.

{training}```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = '.'  # this one
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer('Once upon a time', return_tensors='pt')
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```
"""


# ---- in


def open_weights(folder: str) -> dict:
    """{name of a tensor: the open file that holds it} of a folder's .safetensors."""
    import safetensors

    names = ['model.safetensors']
    index = os.path.join(folder, 'model.safetensors.index.json')
    # an index beside a single file is of an earlier model
    if not os.path.exists(os.path.join(folder, names[0])) and os.path.exists(index):
        weight_map = read_json(index).get('weight_map')
        names = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
        if not all(hub.may_be_source(n) and n == os.path.basename(n) for n in names):
            raise UserError(f'{index} has no weight_map of files beside it')
    file_of = {}
    for name in sorted(set(names)):
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            raise UserError(f'{folder} has no {name:.60}: save the model again with transformers')
        try:
            opened = safetensors.safe_open(path, 'pt')
        except (OSError, safetensors.SafetensorError) as e:
            raise UserError(f'{path} cannot be read: {str(e).splitlines()[0][:200]}') from None
        file_of |= dict.fromkeys(opened.keys(), opened)
    return file_of


def read_tensor(file_of: dict, name: str, where: str) -> torch.Tensor:
    """One tensor of any floating-point type; GPT-2's own files name it without the first part."""
    found = name if name in file_of else name.partition('.')[2]
    if found not in file_of:
        raise UserError(f'{where} has no tensor {name}')
    try:
        tensor = file_of[found].get_tensor(found)
    except Exception as e:  # a file that is cut short
        reason = str(e).splitlines()[0][:200]
        raise UserError(f'{where}: tensor {name} cannot be read: {reason}') from None
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise UserError(
            f'{where}: tensor {name} is {str(tensor.dtype)[6:]}; '
            'only weights that are not quantized are read'
        )
    return tensor


def our_tensors(file_of: dict, kind: str, args: dict, where: str) -> dict[str, torch.Tensor]:
    """The state_dict, float32, of the GPT that args describe, out of files of a model_type kind.

    Raises UserError, which names `where`, for what is missing, misshaped or unknown.
    """
    try:
        config = GPTConfig(**args)
        shapes = [file.get_slice(name).get_shape() for name, file in file_of.items()]
        checkpoint.check_size(config, list(map(math.prod, shapes)))
        model = checkpoint.empty_model(config)
    except (TypeError, ValueError, KeyError) as e:
        raise UserError(f'{where} describes no model: {e}') from None
    state, used = {}, set()
    for ours, wanted in model.state_dict().items():
        names = [theirs for theirs, _ in families.names_of(kind, ours)]
        if not names:
            raise UserError(f'{where}: model.py has {ours}, which is in no {kind} model')
        used |= {*names, *(name.partition('.')[2] for name in names)}
        if ours == 'lm_head.weight' and args['tie_embeddings']:
            continue
        parts = []
        rows_of_each = families.rows_of(model.config, len(names), len(wanted))
        for name, rows in zip(names, rows_of_each, strict=True):
            part = read_tensor(file_of, name, where)
            if ours.endswith(families.FAMILIES[kind].transposed):
                part = part.t()
            if ours == 'transformer.wpe.weight':
                part = part[:rows]
            if part.shape != (rows, *wanted.shape[1:]):
                raise UserError(
                    f'{where}: tensor {name} has the shape {tuple(part.shape)}, '
                    f'and {(rows, *wanted.shape[1:])} is expected'
                )
            parts.append(part)
        state[ours] = torch.cat(parts).float() if len(parts) > 1 else part.float().contiguous()
        del part, parts
    if args['tie_embeddings']:
        state['lm_head.weight'] = state['transformer.wte.weight']
    unknown = [name for name in file_of if name not in used and not BUFFERS.search(name)]
    if unknown:
        raise UserError(f'{where}: tensor {unknown[0]} is none of a {kind} model')
    return state


def load(source: str, block_size: int = 0, needed_by: tuple[str, ...] = ()) -> dict:
    """A model to start from as a checkpoint, which checkpoint.load_model takes.

    source: a checkpoint file, a folder with config.json and the weights or with an adapter of
    peft's, or a name on the Hugging Face hub (OWNER/NAME). block_size: see families.read_config; a
    checkpoint keeps its own. Returns a dict of model (float32 tensors), model_args, config (the
    run's settings, if any) and folder, where its tokenizer is. Where there are adapters, model has
    the base's tensors and theirs, which adapters.split parts; of an adapter checkpoint, base (its
    source and digest) stays in the dict. needed_by: the paths of adapters, each on the next, that
    this is the base of.
    Raises UserError for what is missing, broken, not supported.
    """
    if source.endswith('.pt') or os.path.isfile(source):
        return with_base(checkpoint.load(source), source, needed_by)
    folder = source if os.path.isdir(source) else hub.download(source, WANTED)
    if os.path.exists(os.path.join(folder, peft.CONFIG)):
        return load_peft(folder, block_size, needed_by)
    where = os.path.join(folder, 'config.json')
    if not os.path.exists(where):
        raise UserError(
            f'{source} is a folder without a config.json; '
            'name the checkpoint file in it, or the folder of a Hugging Face model'
        )
    config = read_json(where)
    args, kind = families.read_config(config, where, block_size), config['model_type']
    file_of = open_weights(folder)
    # a head that differs from the embedding is kept, whatever config.json says, as in transformers
    [(head, _)] = families.names_of(kind, 'lm_head.weight')
    [(embedding, _)] = families.names_of(kind, 'transformer.wte.weight')
    if args['tie_embeddings'] and head in file_of:
        head, embedding = (read_tensor(file_of, n, folder).float() for n in (head, embedding))
        args['tie_embeddings'] = torch.equal(head, embedding)
    state = our_tensors(file_of, kind, args, folder)
    edited = families.edited(kind, args['activation'])
    if edited:
        print(f'{source}: {edited}: these weights were made for another model', file=sys.stderr)
    args = checkpoint.model_args(GPTConfig(**args))
    return dict(model=state, model_args=args, config={}, folder=folder)


def load_base(source: str, path: str, needed_by: tuple[str, ...], block_size: int = 0) -> dict:
    """What the adapter at path was trained on, by the source that it names: as load gives it.

    path: a checkpoint file, or a folder of peft's; needed_by: see load. A relative source counts
    from here, or else from the folder that the adapter's folder is in.
    """
    folder = path if os.path.isdir(path) else os.path.dirname(path) or '.'
    beside = os.path.join(os.path.dirname(os.path.abspath(folder)), source)
    if not os.path.exists(source) and os.path.exists(beside):
        source = beside
    needed_by = (*needed_by, path)
    for adapter in needed_by:
        if os.path.exists(source) and os.path.samefile(source, adapter):
            raise UserError(f'{adapter} holds adapters alone, and replaced the base that they need')
    if source.endswith('.pt') and not os.path.exists(source):
        raise UserError(
            f'the adapter in {folder} needs its base, and {source} is not there: put it back'
        )
    try:
        base = load(source, block_size, needed_by)
    except UserError as e:
        raise UserError(f'the adapter in {folder} needs its base: {e}') from None
    base.setdefault('folder', os.path.dirname(source) or '.')
    return base


def with_base(loaded: dict, path: str, needed_by: tuple[str, ...] = ()) -> dict:
    """The checkpoint at path; one of adapters has its base's tensors beside its own (see load).

    UserError where the base is not what it was trained on.
    """
    if 'base' not in loaded:
        return loaded
    parts = loaded['base'] if isinstance(loaded['base'], dict) else {}
    source, digest = parts.get('source'), parts.get('digest')
    vocab_size = loaded['model_args'].get('vocab_size', GPTConfig.vocab_size)
    context = loaded['model_args'].get('block_size', GPTConfig.block_size)
    has_sizes = all(type(n) is int and 0 < n < 2**31 for n in (vocab_size, context))
    if not hub.may_be_source(source) or not isinstance(digest, str) or not has_sizes:
        raise UserError(f'{path} is no checkpoint: its base or its model_args are broken')
    base = load_base(source, path, needed_by)
    if adapters.digest(base) != digest:
        raise UserError(
            f'{path} was trained on another {source} than the one that is there: '
            'put the old one back, or train the adapter again'
        )
    base['model'] = adapters.merged(base, source)
    n_new_tokens = len(loaded['model'].get('transformer.wte.lora_rows', ()))
    if n_new_tokens:
        checkpoint.grow_vocabulary(base, vocab_size - n_new_tokens, vocab_size)
    checkpoint.fit_rows(base, context, source)  # learned positions may have been cut
    return loaded | dict(model=base['model'] | loaded['model'])


def load_peft(folder: str, block_size: int, needed_by: tuple[str, ...]) -> dict:
    """The adapter of peft's in folder, on its base, as a checkpoint (see load)."""
    saved = peft.read_config(folder)
    source = saved['base_model_name_or_path']
    base = load_base(source, folder, needed_by, block_size)
    state = adapters.merged(base, source)
    try:
        config = GPTConfig(**base['model_args'])
        checkpoint.check_size(config, [tensor.numel() for tensor in state.values()])
    except (TypeError, ValueError) as e:
        raise UserError(f'{source} describes no model: {e}') from None
    state |= peft.read(folder, saved, config)
    has_tokenizer = os.path.exists(os.path.join(folder, 'tokenizer.json'))
    return dict(
        model=state,
        model_args=base['model_args'],
        config=dict(lora_alpha=saved['lora_alpha']),
        folder=folder if has_tokenizer else base['folder'],
    )


def load_with_tokenizer(
    init_from: str, out_dir: str, dataset: str = ''
) -> tuple[dict, str, Tokenizer]:
    """What scripts that use a model begin with: a checkpoint (see load), its path, its tokenizer.

    init_from: resume (out_dir's ckpt.pt), or a source as of load. The tokenizer lies beside the
    weights or, in an older run, beside its data, which is dataset if the checkpoint names none.
    """
    path = init_from
    if init_from == 'resume':
        path = os.path.join(out_dir, 'ckpt.pt')
    elif 'out_dir' in given:
        print('without effect beside --init_from: out_dir', file=sys.stderr)
    state = load(path)
    state.pop('optimizer', None)  # twice the weights, and nothing to do but train
    folders = [state.get('folder') or os.path.dirname(path) or '.']
    dataset = state['config'].get('dataset') or dataset
    if dataset:
        folders.append(os.path.join('data', dataset))
    vocab_size = state['model_args'].get('vocab_size')
    tokenizer = find_tokenizer(*folders, vocab_size=vocab_size)
    if tokenizer is None:
        raise UserError(
            f'{path} has no tokenizer.json beside it, '
            f"and its vocabulary of {vocab_size} is not GPT-2's"
        )
    tokenizer = tokenizer.as_trained(state)
    if (state.get('tokenizer') or tokenizer.digest()) != tokenizer.digest():
        raise UserError(
            f'{path} was trained with another tokenizer than the one beside it: '
            'put back the tokenizer.json of its run'
        )
    return state, path, tokenizer


# ---- out


def ends(tokenizer: Tokenizer) -> list[int]:
    """The ids at which generation stops: a text's end, a turn's, and the beginning of another text.

    (Llama's models of stories, for example, were trained on texts that only begin.)
    """
    special = tokenizer.special
    found = [tokenizer.end_of_text, special.get(IM_END), special.get('<|eot_id|>')]
    found = dict.fromkeys([*found, tokenizer.turn_end, *tokenizer.begin])  # each once
    return [i for i in found if i is not None]


def read_if_there(source: str, name: str) -> dict:
    """The JSON object in the folder source, which may be '', or {}."""
    path = os.path.join(source, name)
    return read_json(path) if source and os.path.exists(path) else {}


def special_tokens(tokenizer: Tokenizer, source: str) -> tuple[dict, dict]:
    """What begins, ends and pads a text: ids for config.json, texts for tokenizer_config.json.

    What the model's source says goes before: Qwen's instructed models end with a turn, for example.
    """
    stops, begin = ends(tokenizer), tokenizer.begin[0] if tokenizer.begin else None
    end = stops[0] if stops else None
    # None is written as well: transformers has defaults for what is not there
    ids = dict(bos_token_id=begin, eos_token_id=stops if len(stops) > 1 else end, pad_token_id=end)
    text_of = {i: token for token, i in tokenizer.special.items()}
    texts = dict(bos_token=text_of.get(begin), eos_token=text_of.get(end))
    if tokenizer.template:
        texts |= tokenizer.template.tokens
    texts['pad_token'] = texts['eos_token']
    before = read_if_there(source, 'tokenizer_config.json')
    for key in texts:
        token = chat_template.special_token(before, key)
        if token in tokenizer.special:
            texts[key] = token
    before = read_if_there(source, 'config.json')
    ids |= {key: before[key] for key in ids if key in before}
    return ids, {key: text for key, text in texts.items() if text is not None}


def their_tensors(model: GPT, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all that files of a model_type kind hold of a GPT, one at a time."""
    for ours, theirs, _, tensor in families.parts_of(model, kind):
        yield theirs, tensor.t() if ours.endswith(families.FAMILIES[kind].transposed) else tensor


def write(
    folder: str, model: GPT, tokenizer: Tokenizer, dtype: torch.dtype, card: str, source: str = ''
) -> None:
    """Write into folder what transformers loads: weights in a torch dtype, and all beside them.

    card: the text of its README.md. source: the folder that the model came from, whose special
    tokens and generation settings stay. Raises UserError for a model of no family, or one whose
    tokenizer transformers would not read.
    """
    config = families.config_of(model.config)
    kind = config['model_type']
    splits = (tokenizer.spec.get('pre_tokenizer') or {}).get('pretokenizers', [{}])
    normalizer = tokenizer.spec.get('normalizer') or {}
    qwens = splits[0].get('pattern') == {'Regex': PATTERNS['qwen2']}
    if kind == 'qwen2' and not (qwens and normalizer.get('type') == 'NFC'):
        raise UserError(
            'transformers takes the tokenizer of every qwen2 model (qkv_bias without qk_norm) '
            "for Qwen2's own, which this one is not, and would read other tokens"
        )
    ids, texts = special_tokens(tokenizer, source)
    tokenizer_config = dict(
        tokenizer_class='PreTrainedTokenizerFast',
        model_max_length=model.config.block_size,
        clean_up_tokenization_spaces=False,
    )
    tokenizer_config |= texts
    if tokenizer.has_chat_form:
        tokenizer_config['chat_template'] = tokenizer.chat_form.text
    generation = read_if_there(source, 'generation_config.json')
    generation = generation or ids | dict(do_sample=True, temperature=0.8, top_k=200)
    for saved in (ids, generation):
        pad = saved.get('pad_token_id')
        if type(pad) is int and pad >= model.config.vocab_size:
            saved['pad_token_id'] = None  # a token that was left out, as the embedding has none
    files = {
        'config.json': config | ids | dict(torch_dtype=str(dtype).removeprefix('torch.')),
        'generation_config.json': generation,
        'tokenizer_config.json': tokenizer_config,
    }
    tokenizer.save(f'{folder}/tokenizer.json')
    for name, content in files.items():
        with open(f'{folder}/{name}', 'w', encoding='utf-8') as f:
            json.dump(content, f, indent=2, ensure_ascii=False)
    with open(f'{folder}/README.md', 'w', encoding='utf-8') as f:
        f.write(card)
    tensors = {name: t.to(dtype).contiguous() for name, t in their_tensors(model, kind)}
    save_tensors(tensors, f'{folder}/model.safetensors', f'{folder}/config.json')


def read(
    folder: str, ids: torch.Tensor, text: str, tokenizer: Tokenizer
) -> tuple[torch.Tensor, str]:
    """Load a written folder: logits (1, T, vocab_size) float32 of ids (1, T), and by what.

    Raises UserError where text, or a conversation, becomes other tokens there than by tokenizer.
    """
    if not importlib.util.find_spec('transformers'):
        by = 'fledge, without transformers'
        same = find_tokenizer(folder).encode(text) == tokenizer.encode(text)
        model = checkpoint.load_model(load(folder), folder).eval()
        logits = model(ids, ids)[0]
    else:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        by = f'transformers {transformers.__version__}'
        # it refuses some sizes, such as a width that is no multiple of the heads, in many ways
        try:
            theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            same = theirs(text, add_special_tokens=False)['input_ids'] == tokenizer.encode(text)
            if (theirs.chat_template or '').endswith(CHAT_TEMPLATE) and not tokenizer.chars:
                talk = theirs.apply_chat_template(TRIAL, tokenize=True, return_dict=False)
                same = same and talk == tokenizer.encode_chat(TRIAL)[0].tolist()
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True
            )
            logits = model.eval()(ids).logits
        except Exception as e:
            reason = ' '.join(str(e).split())[:300]
            raise UserError(f'{by} does not open this model: {reason}') from None
    if not same:
        raise UserError(f'{by} reads other tokens than this tokenizer gives')
    return logits, by


def training_facts(state: dict, meta: dict, began: str) -> dict[str, object]:
    """{what: value} that a model card tells of a checkpoint's run; {} where no run made it."""
    if state.get('iter_num') is None:
        return {}
    settings, run = state['config'], state.get('run', {})
    source = meta.get('source', '')
    if os.path.exists(source):
        source = os.path.basename(source.rstrip('/'))
    facts = {'data': settings.get('dataset', '?') + (f' ({source})' if source else '')}
    facts['began from'] = began
    facts['steps'] = f'{state["iter_num"]:,}'
    if 'tokens' in run:
        facts['tokens seen'] = f'{run["tokens"]:,}'
    if run.get('evaluation'):
        loss, bits = run['evaluation']['loss'], run['evaluation'].get('bits_per_byte')
        bits = f', {bits:.4f} bits a byte' if bits else ''
        at = f'at step {run["evaluated_step"]:,}'
        facts['validation loss'] = f'{loss:.4f} nats a token{bits}, {at}'
    return facts | {key.replace('_', ' '): settings[key] for key in SHOWN if key in settings}


def card(name: str, model: GPT, state: dict, meta: dict, began: str) -> str:
    """The model card: what is known of the model and of its training, and no more.

    state: a checkpoint, with the facts of its run where it has them; meta: of its data; began: what
    the weights began from, a name or a path, of which the last part says enough.
    """
    c = model.config
    is_name = hub.is_name(began) and not began.endswith('.pt')
    base = f'base_model: {began}\n' if is_name and '/' in began else ''
    facts = training_facts(state, meta, began if is_name else os.path.basename(began.rstrip('/')))
    training = ''.join(f'| {key} | {value} |\n' for key, value in facts.items())
    if facts:
        training = f'| training | |\n|---|---|\n{training}\n'
    return CARD.format(
        name=name,
        base=base,
        n_params=model.get_num_params(non_embedding=False),
        architecture=families.config_of(c)['architectures'][0],
        c=c,
        training=training,
    )
