"""A GPT as a folder that transformers, and all that builds on it, loads: weights, config, tokenizer, chat template, a model card."""

import importlib.util
import json
import os
import shutil

import torch

from fledge import UserError, hub, pretrained, read_json
from fledge.checkpoint import load_model
from fledge.tokenizer import CHAT_TEMPLATE, IM_END, IM_START, PATTERNS, load_tokenizer

FILES = {
    'config.json',
    'generation_config.json',
    'model.safetensors',
    'tokenizer.json',
    'tokenizer_config.json',
    'README.md',
}
TALK = [
    dict(role='system', content='Be brief.'),
    dict(role='user', content='Où est\r\n the café?'),
    dict(role='assistant', content=' 12 doors on.\n'),
]


def ends(tokenizer):
    """The ids at which generation stops: the end of a text, and that of a turn as ChatML or Llama 3 spells it."""
    found = [
        tokenizer.end_of_text,
        tokenizer.special.get(IM_END),
        tokenizer.special.get('<|eot_id|>'),
    ]
    return [i for i in found if i is not None]


def read_if_there(source, name):
    """The JSON object in the folder source, which may be '', or {}."""
    path = os.path.join(source, name)
    return read_json(path) if source and os.path.exists(path) else {}


def chat_template(tokenizer, source=''):
    """The template of the folder that a model came from, else ChatML's where the tokenizer has its tokens, else None."""
    path = os.path.join(source, 'chat_template.jinja')
    if source and os.path.exists(path):
        with open(path, encoding='utf-8') as f:
            return f.read()
    template = read_if_there(source, 'tokenizer_config.json').get('chat_template')
    if isinstance(template, list):  # of several, the one without a purpose of its own
        template = next(
            (
                t.get('template')
                for t in template
                if isinstance(t, dict) and t.get('name') == 'default'
            ),
            None,
        )
    return (
        template
        if isinstance(template, str)
        else CHAT_TEMPLATE
        if {IM_START, IM_END} <= tokenizer.special.keys()
        else None
    )


def write(folder, model, tokenizer, dtype, card, source=''):
    """Write FILES into folder: weights in dtype, a torch one. source: the folder that the model came from, whose chat template and generation settings stay.

    Raises UserError for a model of no family (see pretrained.write_config), or one whose tokenizer transformers would not read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    config = pretrained.write_config(model.config)
    splits, normalizer = (
        (tokenizer.spec.get('pre_tokenizer') or {}).get('pretokenizers', [{}]),
        tokenizer.spec.get('normalizer') or {},
    )
    if config['model_type'] == 'qwen2' and (
        splits[0].get('pattern') != {'Regex': PATTERNS['qwen2']} or normalizer.get('type') != 'NFC'
    ):
        raise UserError(
            "transformers takes the tokenizer of every qwen2 model (qkv_bias without qk_norm) for Qwen2's own, which this one is not, and would read other tokens"
        )
    text_of, stops = {i: token for token, i in tokenizer.special.items()}, ends(tokenizer)
    special = dict(
        bos_token_id=tokenizer.begin[0]
        if tokenizer.begin
        else None,  # None is written as well: transformers has defaults for what is not there
        eos_token_id=(stops if len(stops) > 1 else stops[0]) if stops else None,
        pad_token_id=stops[0] if stops else None,
    )
    names = dict(bos_token=text_of.get(tokenizer.begin[0])) if tokenizer.begin else {}
    names |= dict(eos_token=text_of[stops[0]], pad_token=text_of[stops[0]]) if stops else {}
    before = read_if_there(
        source, 'tokenizer_config.json'
    )  # Qwen's instructed models end with a turn, for example
    for key in ('bos_token', 'eos_token', 'pad_token'):
        token = before.get(key)
        token = token.get('content') if isinstance(token, dict) else token
        names |= {key: token} if isinstance(token, str) and token in tokenizer.special else {}
    special |= {
        key: value for key, value in read_if_there(source, 'config.json').items() if key in special
    }
    generation = read_if_there(source, 'generation_config.json') or special | dict(
        do_sample=True, temperature=0.8, top_k=200
    )
    template = chat_template(tokenizer, source)
    for name, content in (
        ('config.json', config | special | dict(torch_dtype=str(dtype).removeprefix('torch.'))),
        ('generation_config.json', generation),
        (
            'tokenizer_config.json',
            dict(
                tokenizer_class='PreTrainedTokenizerFast',
                model_max_length=model.config.block_size,
                clean_up_tokenization_spaces=False,
            )
            | names
            | (dict(chat_template=template) if template else {}),
        ),
    ):
        with open(f'{folder}/{name}', 'w', encoding='utf-8') as f:
            json.dump(content, f, indent=2, ensure_ascii=False)
    tokenizer.save(f'{folder}/tokenizer.json')
    with open(f'{folder}/README.md', 'w', encoding='utf-8') as f:
        f.write(card)
    try:
        save_file(
            {
                n: t.to(dtype).contiguous()
                for n, t in pretrained.their_tensors(model, config['model_type'])
            },
            f'{folder}/model.safetensors',
            {'format': 'pt', 'made_by': 'fledge'},
        )
    except SafetensorError as e:  # a full disk
        raise UserError(f'cannot write model.safetensors: {e}') from None
    shutil.copymode(
        f'{folder}/config.json', f'{folder}/model.safetensors'
    )  # safetensors keeps its files from everybody else


def read(folder, ids, text, tokenizer):
    """Load a written folder: logits (1, T, vocab_size) float32 of ids (1, T), and by what. Raises UserError where text or a talk becomes other tokens there."""
    if not importlib.util.find_spec('transformers'):
        model, same, by = (
            load_model(pretrained.load(folder), folder).eval(),
            load_tokenizer(folder).encode(text) == tokenizer.encode(text),
            'fledge, without transformers',
        )
        logits = model(ids, ids)[0]
    else:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        by = f'transformers {transformers.__version__}'
        try:
            theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            same = theirs(text, add_special_tokens=False)['input_ids'] == tokenizer.encode(text)
            if theirs.chat_template == CHAT_TEMPLATE and not tokenizer.chars:
                same = (
                    same
                    and theirs.apply_chat_template(TALK, tokenize=True, return_dict=False)
                    == tokenizer.encode_chat(TALK)[0].tolist()
                )
            logits = (
                transformers.AutoModelForCausalLM.from_pretrained(
                    folder, dtype=torch.float32, local_files_only=True
                )
                .eval()(ids)
                .logits
            )
        except (
            Exception
        ) as e:  # it refuses some sizes, such as a width that is no multiple of the heads
            raise UserError(
                f'{by} does not open this model: {" ".join(str(e).split())[:300]}'
            ) from None
    if not same:
        raise UserError(f'{by} reads other tokens than this tokenizer gives')
    return logits, by


def card(name, model, state, meta, began):
    """The model card: what is known of the model and of its training, and no more.

    state: a checkpoint, with the facts of its run where it has them; meta: of its data; began: what the weights began from.
    """
    c, run = model.config, state['config']
    named = hub.is_name(began) and not began.endswith(
        '.pt'
    )  # else a path, of which the last part says enough
    lines = [
        '---',
        'library_name: transformers',
        'pipeline_tag: text-generation',
        'tags:',
        '- fledge',
    ]
    lines += [f'base_model: {began}'] if named and '/' in began else []
    lines += [
        '---',
        '',
        f'# {name}',
        '',
        f'{model.get_num_params(non_embedding=False):,} parameters, {pretrained.write_config(c)["architectures"][0]}: {c.n_layer} layers of {c.n_embd}, '
        f'context {c.block_size:,}, vocabulary {c.vocab_size:,}. Made with fledge; loads without remote code.',
        '',
    ]
    if state.get('iter_num') is not None:
        source = meta.get('source', '')
        facts = dict(
            data=run.get('dataset', '?')
            + (
                f' ({os.path.basename(source.rstrip("/")) if os.path.exists(source) else source})'
                if source
                else ''
            )
        )
        facts['began from'] = began if named else os.path.basename(began.rstrip('/'))
        facts['steps'] = f'{state["iter_num"]:,}'
        facts['tokens seen'] = (
            f'{state["iter_num"] * run.get("gradient_accumulation_steps", 1) * run.get("batch_size", 1) * c.block_size:,}'
        )
        if state.get('evaluation'):
            step, loss, bpb = state['evaluation']
            facts['validation loss'] = (
                f'{loss:.4f} nats a token'
                + (f', {bpb:.4f} bits a byte' if bpb else '')
                + f', at step {step:,}'
            )
        facts |= {
            key.replace('_', ' '): run[key]
            for key in (
                'optimizer',
                'learning_rate',
                'batch_size',
                'gradient_accumulation_steps',
                'weight_decay',
                'dropout',
                'seed',
            )
            if key in run
        }
        lines += [
            '| training | |',
            '|---|---|',
            *(f'| {key} | {value} |' for key, value in facts.items()),
            '',
        ]
    return (
        '\n'.join(lines)
        + """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = '.'  # this one
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer('Once upon a time', return_tensors='pt')
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```
"""
    )
