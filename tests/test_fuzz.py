"""Broken files, by the thousand: each is read right, or refused in one line.

A file of each format is written, broken at random and read as the scripts read it. Nothing but a
UserError may come of it: no hang, no gigabyte taken, no code run. `python tests/test_fuzz.py FORMAT
SEED FOLDER` makes the broken file of a failure again, and reads it.
"""

import contextlib
import copy
import faulthandler
import gzip
import io
import json
import math
import os
import pickle
import random
import sys
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import conftest
import huggingface_hub.constants
import numpy as np
import pyarrow.parquet
import pytest
import safetensors.torch
import tokenizers
import torch
import torch._dynamo  # which takes a gigabyte when it is first needed

from fledge import UserError, adapters, checkpoint, configurator, conversation
from fledge.corpus import encoding, records, sources
from fledge.documents import open_split
from fledge.formats import families, huggingface, peft
from fledge.log import KEYS, read_metrics
from fledge.prompts import read_part, read_prompts
from fledge.replies import read_questions
from fledge.tasks import read_task
from fledge.tokenizer import (
    TRIAL,
    byte_tokenizer,
    char_tokenizer,
    common_tokenizer,
    load_tokenizer,
    train_bpe,
)
from fledge.tokens import write_bin
from model import GPT, GPTConfig

ROUNDS = 500  # broken files of each format; FLEDGE_FUZZ_ROUNDS=2000 breaks more
ANOTHER_WAY = ('wide_bin', 'checkpoint_pickle', 'checkpoint_values', 'adapter_checkpoint', 'shards')
ROUNDS = int(os.environ.get('FLEDGE_FUZZ_ROUNDS', ROUNDS))
MORE_ROUNDS = ROUNDS // 2  # of those, whose format is broken in one way already
SECONDS = 60  # the longest that reading one may take, whatever the machine
BYTES = 10**9  # the most that reading one may take
SIZES = dict(block_size=8, vocab_size=20, n_layer=2, n_head=2, n_embd=8)
QWEN3 = SIZES | dict(n_kv_head=1, head_dim=4, n_inner=16, position='rope', norm='rmsnorm')
QWEN3 |= dict(activation='swiglu', bias=False, qk_norm=True, tie_embeddings=False)
TEXT = 'Où est the café? 12 doors on.\n'

# ---- breaking files

NUMBERS = [0, 1, -1, 2, 127, 255, 2**15, 2**31 - 1, -(2**31), 2**32 - 1, 2**40, 2**63 - 1]
VALUES = [None, True, False, '', 'x', 'é\x00\n', '\ud800', 'x' * 100_000, '../../x', [], {}, [[]]]
VALUES += [{'a': 1}, [1, 'a', None], *NUMBERS, -(10**30), 10**9, 10**12, 10**400, 0.5, 1e308]
VALUES += [math.nan, math.inf, 'DEEP']
DEEP = '[' * 100_000 + ']' * 100_000


def break_bytes(data, rng):
    """Bytes with one to three things in them changed."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        if not data:
            break
        # what is at the beginning or the end says where everything else is
        region = rng.choice([min(64, len(data)), len(data), len(data)])
        at = rng.randrange(region)
        if rng.random() < 0.2:
            at = max(len(data) - 1 - rng.randrange(600), 0)
        length = rng.choice([1, 2, 8, 100, 1000])
        how = rng.randrange(9)
        if how == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            data[at] = rng.randrange(256)
        elif how == 2:
            del data[at:]
        elif how == 3:
            data += rng.randbytes(length)
        elif how == 4:
            data[at:at] = data[at : at + length]
        elif how == 5:
            del data[at : at + length]
        elif how == 6:
            data[at : at + length] = rng.randbytes(length)
        elif how == 7:
            size = rng.choice([1, 2, 4, 8])
            number = rng.choice(NUMBERS) % 256**size
            data[at : at + size] = number.to_bytes(size, 'little')
        else:
            data[at:at] = rng.choice([b'\xff\xfe', b'\x80', b'\xef\xbb\xbf', b'\0', b'\r\n', b'"'])
    return bytes(data)


def break_value(value, rng):
    """A dict, list, ... with one thing in it changed, removed or doubled."""
    value = copy.deepcopy(value)
    places = []
    pending = [value]
    while pending:
        holder = pending.pop()
        if not isinstance(holder, (dict, list)):
            continue
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        # of a vocabulary of thousands some will do
        places += [(holder, key) for key in rng.sample(list(keys), min(len(keys), 20))]
        pending += [holder[key] for key in keys]
    holder, key = rng.choice(places)
    how = rng.randrange(6)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[rng.choice(['', 'x', f'{key} ', str(key).upper()])] = holder.pop(key)
    elif how == 2:
        other, at = rng.choice(places)
        holder[key] = copy.deepcopy(other[at])
    else:
        holder[key] = rng.choice(VALUES)
    return value


def as_json(value, rng):
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5, default=str).replace('"DEEP"', DEEP)
    if text.startswith('{') and rng.random() < 0.1:  # every key twice
        text = f'{text[:-1]}, {text[1:]}'
    return text.encode('utf-8', 'surrogatepass')


def break_json(data, rng):
    """The bytes of a JSON file or of a JSONL, with a value in it changed."""
    if rng.random() < 0.3:
        return break_bytes(data, rng)
    try:
        return as_json(break_value(json.loads(data), rng), rng)
    except ValueError:
        lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = as_json(break_value([json.loads(lines[at])], rng), rng)[1:-1]
    return b'\n'.join(lines) + b'\n'


def break_safetensors(data, rng):
    """The bytes of a .safetensors, its JSON header changed."""
    if rng.random() < 0.4:
        return break_bytes(data, rng)
    size = int.from_bytes(data[:8], 'little')
    header = break_json(data[8 : 8 + size], rng)
    return len(header).to_bytes(8, 'little') + header + data[8 + size :]


def break_pickle(data, rng):
    """The bytes of a torch.save file whose pickle is changed, and its checksums right again."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, 'w') as new:
        names = old.namelist()
        chosen = rng.choice([n for n in names if n.endswith('data.pkl')] * len(names) + names)
        for name in names:
            content = old.read(name)
            if name == chosen and rng.random() < 0.05:
                continue
            content = break_bytes(content, rng) if name == chosen else content
            new.writestr(zipfile.ZipInfo(name), content)  # of no date, the same each time
    return out.getvalue()


def break_checkpoint(data, rng):
    """The bytes of a torch.save file of which a value is another one."""
    saved = torch.load(io.BytesIO(data))
    part = rng.choice(['', 'model_args', 'config'])
    if part:
        saved[part] = break_value(saved[part], rng)
    else:
        saved = break_value(saved, rng)
    model = saved.get('model')
    if isinstance(model, dict) and model and rng.random() < 0.3:
        one = torch.zeros(1)
        odd = [one.expand(10**6, 10**6), one, one.bool(), one.to(torch.int8), one.to(torch.cfloat)]
        odd += [torch.zeros(0), torch.eye(8).to_sparse(), torch.tensor(1.0)]
        model[rng.choice(list(model))] = rng.choice(odd)
    out = io.BytesIO()
    torch.save(saved, out)
    return out.getvalue()


# ---- the formats: each is written, and read as the scripts read it


def write_tokens(folder):
    conftest.write_tiny(folder, 300, 50, 64)


def write_wide_tokens(folder):
    folder.mkdir()
    (folder / 'meta.json').write_text('{"vocab_size": 100000}')
    write_bin(str(folder / 'train.bin'), np.arange(300) * 300, 100_000)


def write_headerless_tokens(folder):
    folder.mkdir()
    (np.arange(300) % 64).astype('<u2').tofile(folder / 'train.bin')


def write_documents(folder):
    folder.mkdir()
    tokenizer = byte_tokenizer()
    tokenizer.save(str(folder / 'tokenizer.json'))
    document = [*tokenizer.encode('a?b!'), tokenizer.end_of_text]
    write_bin(str(folder / 'train.bin'), document * 40, 259)
    np.array([0, 0, 1, 1, 1] * 40, np.uint8).tofile(folder / 'train.mask.bin')
    meta = dict(vocab_size=259, splits=dict(train=dict(tokens=200)), masked=True, pairs=True)
    (folder / 'meta.json').write_text(json.dumps(meta | dict(begin=[], separator='\n')))


def read_tokens(folder):
    vocab_size = 100_000
    data = open_split(str(folder), 'train', 8, vocab_size, seed=0)
    for batch in (data.rows(3, 5), data.evaluation_batch(data.evaluation_rows(4))):
        assert batch['inputs'].shape[1] == batch['targets'].shape[1] == 8
        assert batch['inputs'].min() >= 0 and batch['targets'].min() >= -1
        assert max(batch['inputs'].max(), batch['targets'].max()) < vocab_size


def read_documents(folder):
    read_tokens(folder)
    tokenizer = common_tokenizer(str(folder), None, '')
    tokenizer.encode_source('a?')


def write_nanogpts_meta(folder):
    folder.mkdir()
    letters = [chr(code) for code in range(32, 127)] + ['\n', '\r', 'ù', 'é']
    meta = dict(vocab_size=len(letters), itos=dict(enumerate(letters)))
    meta['stoi'] = {letter: i for i, letter in enumerate(letters)}
    (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))


def write_byte_level(folder):
    folder.mkdir()
    train_bpe([TEXT * 3], 280).save(str(folder / 'tokenizer.json'))


def write_letters(folder):
    folder.mkdir()
    letters = [chr(code) for code in range(32, 127)] + ['\n', '\r', 'ù', 'é']
    special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
    char_tokenizer(letters, special).save(str(folder / 'tokenizer.json'))


def write_sentencepieces(folder):
    """Pieces with a likelihood each, bytes for all else, and a space in front of a text."""
    folder.mkdir()
    pieces = [('<unk>', 0.0), ('<s>', 0.0), ('</s>', 0.0), ('▁', -2.0), ('▁the', -3.0)]
    pieces += [(f'<0x{byte:02X}>', -9.0) for byte in range(256)]
    pieces += [(letter, -5.0) for letter in 'acdefhinors']
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 0, byte_fallback=True))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.add_special_tokens(['<s>', '</s>'])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single='<s> $A', special_tokens=[('<s>', 1)]
    )
    backend.save(str(folder / 'tokenizer.json'))


def read_tokenizer(folder):
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.vocab_size > 0
    for text in ('', TEXT, '<|endoftext|>\n'):
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert isinstance(tokenizer.decode(ids), str)
        tokenizer.encode_prompt(text)
        tokenizer.encode_source(text)
    if tokenizer.has_chat_form:
        tokenizer.encode_chat(TRIAL)
        tokenizer.encode_chat_prompt(TRIAL[:1])
    tokenizer.for_chats()
    tokenizer.text_bytes(100)
    huggingface.ends(tokenizer)


# of the kind that Llama's and Qwen's are
TEMPLATE = """{{- bos_token }}{%- for message in messages %}
{%- if message['role'] not in ['user', 'assistant', 'system'] %}
{{- raise_exception('no such role: ' ~ message.role) }}{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- if loop.index0 % 2 == 0 and not loop.last %}{%- set ns = namespace(n=1 * 2) %}{%- endif %}
{%- for i in range(2) %}{%- endfor %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def write_template(folder):
    write_byte_level(folder)
    (folder / 'chat_template.jinja').write_text(TEMPLATE)
    named = [dict(name='default', template=TEMPLATE), dict(name='tool_use', template='')]
    config = dict(bos_token=dict(content='<|im_start|>'), eos_token='<|im_end|>')
    (folder / 'tokenizer_config.json').write_text(json.dumps(config | dict(chat_template=named)))


def write_checkpoint(folder, **more):
    folder.mkdir()
    torch.manual_seed(0)
    config = GPTConfig(**SIZES)
    args, model = checkpoint.model_args(config), GPT(config)
    saved = dict(model=model.state_dict(), model_args=args, iter_num=3, best_val_loss=2.5)
    saved['config'] = dict(dataset='x', learning_rate=0.1, lora_alpha=16.0)
    saved['optimizer'] = dict(state={0: dict(step=torch.tensor(3.0))}, param_groups=[dict(lr=0.1)])
    torch.save(saved | more, folder / 'ckpt.pt')


def write_checkpoint_of_adapters(folder):
    """Adapters alone, beside the base that they name by its digest."""
    write_checkpoint(folder)
    (folder / 'ckpt.pt').rename(folder / 'base.pt')
    base = huggingface.load(str(folder / 'base.pt'))
    own = {'transformer.h.0.attn.c_attn.lora_A': torch.ones(2, 8)}
    own |= {'transformer.h.0.attn.c_attn.lora_B': torch.ones(24, 2)}
    about = dict(source=f'{folder.name}/base.pt', digest=adapters.digest(base))
    saved = dict(model=own, model_args=base['model_args'], base=about)
    torch.save(saved | dict(config=dict(lora_alpha=4.0)), folder / 'ckpt.pt')


def read_checkpoint(folder):
    return read_model(folder, str(folder / 'ckpt.pt'))


def read_whole_checkpoint(folder):
    """What gets past the checksums is what was saved."""
    found = read_checkpoint(folder)
    if not (folder.parent / 'whole').exists():
        torch.save(found, folder.parent / 'whole')
    whole = torch.load(folder.parent / 'whole')
    assert found['model_args'] == whole['model_args'] and found['config'] == whole['config']
    assert found['model'].keys() == whole['model'].keys()
    for name, tensor in whole['model'].items():
        assert torch.equal(found['model'][name], tensor), name


def read_model(folder, source):
    """A model that computes, out of a source as a script takes it."""
    loaded = huggingface.load(source)
    model = checkpoint.load_model(loaded, source).eval()
    with torch.no_grad():
        logits, _ = model(torch.zeros(1, 1, dtype=torch.int64))
    assert logits.shape[-1] == model.config.vocab_size
    return loaded


def write_model(folder):
    """A Qwen3 in Hugging Face's form."""
    folder.mkdir()
    torch.manual_seed(0)
    model = GPT(GPTConfig(**QWEN3))
    (folder / 'config.json').write_text(json.dumps(families.config_of(model.config)))
    found = {name: part.clone() for _, name, _, part in families.parts_of(model, 'qwen3')}
    safetensors.torch.save_file(found, folder / 'model.safetensors')


def write_shards(folder):
    """The same in two files, and an index of them."""
    write_model(folder)
    found = safetensors.torch.load_file(folder / 'model.safetensors')
    (folder / 'model.safetensors').unlink()
    index = {}
    for number, names in enumerate((sorted(found)[::2], sorted(found)[1::2]), 1):
        file = f'model-0000{number}-of-00002.safetensors'
        safetensors.torch.save_file({name: found[name] for name in names}, folder / file)
        index |= dict.fromkeys(names, file)
    index = dict(metadata=dict(total_size=1), weight_map=index)
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))


def read_folder(folder):
    read_model(folder, str(folder))


def write_adapter(folder):
    """An adapter of peft's, and a checkpoint that is its base."""
    folder.mkdir()
    torch.manual_seed(0)
    model = GPT(GPTConfig(**QWEN3))
    base = dict(model=model.state_dict(), model_args=checkpoint.model_args(model.config))
    torch.save(base, folder / 'base.pt')
    ours = {'transformer.h.0.attn.c_attn.lora_A': torch.ones(2, 8)}
    ours |= {'transformer.h.0.attn.c_attn.lora_B': torch.ones(16, 2)}
    settings = dict(lora_alpha=4.0)
    peft.write(str(folder), ours, GPTConfig(**QWEN3), settings, f'{folder.name}/base.pt')


def write_settings(folder):
    folder.mkdir()
    settings = dict(learning_rate=0.1, n_layer=2, bias=True, dataset='x', dtype='auto', seed=5)
    (folder / 'x.json').write_text(json.dumps(settings))


DEFAULTS = dict(learning_rate=0.2, n_layer=1, bias=False, dataset='y', dtype='auto', seed=1)
DEFAULTS |= dict(compile='auto', head_dim=0)


def read_settings(folder):
    found = configurator.configure(dict(DEFAULTS), [str(folder / 'x.json')])
    for name, value in found.items():
        assert type(value) is type(DEFAULTS[name]) or name in ('compile', 'dtype')


def write_metrics(folder):
    folder.mkdir()
    line = dict(step=1, tokens=100, train_loss=2.5, val_loss=None, lr=0.1, tokens_per_second=5.0)
    lines = [json.dumps(line | dict(step=step)) for step in range(1, 5)]
    (folder / 'metrics.jsonl').write_text('\n'.join(lines) + '\n')


def read_curves(folder):
    for line in read_metrics(str(folder / 'metrics.jsonl')):
        assert all(type(line[key]) in (int, float, type(None)) for key in KEYS)


def write_records(folder):
    folder.mkdir()
    lines = [dict(text='It is good.\n'), dict(messages=TRIAL), dict(system='Be.', messages=TRIAL)]
    lines += [dict(conversations=[{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 'b'}])]
    lines += [dict(instruction='a', input='b', output='c'), dict(prompt='a', completion='b')]
    lines += [dict(prompt='a', chosen='b', rejected='c'), dict(chosen=TRIAL, rejected=TRIAL[:2])]
    (folder / 'x.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n')
    (folder / 'x.json').write_text(json.dumps(lines))
    (folder / 'x.jsonl.gz').write_bytes(gzip.compress((folder / 'x.jsonl').read_bytes(), mtime=0))


def write_table(folder):
    folder.mkdir()
    table = dict(text=['It is good.', 'é'] * 50, prompt=['a', None] * 50, chosen=['b', 'c'] * 50)
    pyarrow.parquet.write_table(pyarrow.table(table), folder / 'x.parquet')


def read_all_records(folder):
    """As the scripts of prepare/ do: a record that cannot be used is passed over, and counted."""
    found = sources.Files([str(folder)], ('.jsonl', '.json', '.gz', '.parquet'))
    ways = [lambda r: [records.text_of(r, 'text')], lambda r: [records.conversation(r)]]
    ways += [records.preference]
    for record, _, _ in found.read():
        for way in ways:
            with contextlib.suppress(sources.Skip):
                encoding.documents_of(SimpleNamespace(documents=way), record, [])


def write_questions(folder):
    folder.mkdir()
    prompts = [dict(prompt='a'), dict(text='b'), dict(messages=TRIAL[:1])]
    tasks = [dict(good='a', bad='b', group='x'), dict(text='the last word')]
    tasks += [dict(question='q', choices=['a', 'b'], answer=1)]
    tasks += [dict(question='q', choices=dict(text=['a', 'b'], label=['A', 'B']), answerKey='B')]
    tasks += [dict(ctx='a', endings=['b', 'c'], label='1')]
    tasks += [dict(ctx_a='a', ctx_b='b', activity_label='x', endings=['b', 'c'], label=0)]
    tasks += [dict(goal='a', sol1='b', sol2='c', label=0)]
    questions = [dict(question='1 + 1?', answer='It is 2. #### 2'), dict(question='?', answer='-1')]
    for name, lines in dict(prompts=prompts, tasks=tasks, questions=questions).items():
        (folder / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n')
    (folder / 'talk.json').write_text(json.dumps(dict(messages=TRIAL)))
    answer = dict(prompt='a', samples=['b'], tokens=[1], finish_reasons=['stop'])
    part = [HEADER, [0, answer], [1, answer]]
    (folder / 'out.part').write_text('\n'.join(map(json.dumps, part)) + '\n')


HEADER = dict(settings=dict(seed=1), prompts=['a', 'b'])


def read_questions_of_all_kinds(folder):
    read_prompts(str(folder / 'prompts.jsonl'))
    read_task(str(folder / 'tasks.jsonl'))
    read_questions(str(folder / 'questions.jsonl'))
    conversation.Conversation.load(TALK, str(folder / 'talk.json'))
    read_part(str(folder / 'out.part'), HEADER)


TALK = SimpleNamespace(reset=lambda: None)
CHECKPOINT = {'ckpt.pt': break_bytes}
# name: how it is written, which of its files are broken and how, how it is read
FORMATS = {
    'bin': (write_tokens, {'train.bin': break_bytes}, read_tokens),
    'wide_bin': (write_wide_tokens, {'train.bin': break_bytes}, read_tokens),
    'headerless_bin': (write_headerless_tokens, {'train.bin': break_bytes}, read_tokens),
    'masks': (
        write_documents,
        {'train.bin': break_bytes, 'train.mask.bin': break_bytes},
        read_documents,
    ),
    'meta_json': (write_documents, {'meta.json': break_json}, read_documents),
    'meta_pkl': (write_nanogpts_meta, {'meta.pkl': break_bytes}, read_tokenizer),
    'byte_level': (write_byte_level, {'tokenizer.json': break_json}, read_tokenizer),
    'letters': (write_letters, {'tokenizer.json': break_json}, read_tokenizer),
    'sentencepieces': (write_sentencepieces, {'tokenizer.json': break_json}, read_tokenizer),
    'template': (
        write_template,
        {'chat_template.jinja': break_bytes, 'tokenizer_config.json': break_json},
        read_tokenizer,
    ),
    'checkpoint': (write_checkpoint, CHECKPOINT, read_whole_checkpoint),
    'checkpoint_pickle': (write_checkpoint, {'ckpt.pt': break_pickle}, read_checkpoint),
    'checkpoint_values': (write_checkpoint, {'ckpt.pt': break_checkpoint}, read_checkpoint),
    'adapter_checkpoint': (
        write_checkpoint_of_adapters,
        {'ckpt.pt': break_checkpoint},
        read_checkpoint,
    ),
    'safetensors': (write_model, {'model.safetensors': break_safetensors}, read_folder),
    'shards': (
        write_shards,
        {
            'model.safetensors.index.json': break_json,
            'model-00001-of-00002.safetensors': break_safetensors,
        },
        read_folder,
    ),
    'config_json': (write_model, {'config.json': break_json}, read_folder),
    'peft': (
        write_adapter,
        {peft.CONFIG: break_json, peft.WEIGHTS: break_safetensors},
        read_folder,
    ),
    'settings': (write_settings, {'x.json': break_json}, read_settings),
    'metrics': (write_metrics, {'metrics.jsonl': break_json}, read_curves),
    'records': (
        write_records,
        {'x.jsonl': break_json, 'x.json': break_json, 'x.jsonl.gz': break_bytes},
        read_all_records,
    ),
    'parquet': (write_table, {'x.parquet': break_bytes}, read_all_records),
    'questions': (
        write_questions,
        {
            'prompts.jsonl': break_json,
            'tasks.jsonl': break_json,
            'questions.jsonl': break_json,
            'talk.json': break_json,
            'out.part': break_json,
        },
        read_questions_of_all_kinds,
    ),
}


# ---- reading them


reading = False
seen = []  # what a reader did that it never may
NEVER = ('os.', 'subprocess.', 'shutil.', 'socket.', 'ctypes.', 'webbrowser.')
HARMLESS = ('os.listdir', 'os.scandir', 'os.walk', 'os.putenv')


def watch(event, args):
    """An audit hook: nothing that is read may start a process, reach out, or change a file."""
    writes = event == 'open' and isinstance(args[1], str) and set(args[1]) & set('wax+')
    acts = event.startswith(NEVER) and event not in HARMLESS
    # answers that broke off within a line are written anew without it
    if reading and (writes or acts) and not str(args[0]).endswith('.part.tmp'):
        seen.append(f'{event}{args}')


sys.addaudithook(watch)


@contextlib.contextmanager
def limited_memory():
    """No more than BYTES beyond what the process has, where the system can be asked for that."""
    if not os.path.exists('/proc/self/statm'):
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    with open('/proc/self/statm') as f:
        held = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def break_file(kind, seed, folder):
    """Break one file in a folder of this format; returns its path and its bytes before."""
    rng = random.Random(f'{kind} {seed}')
    _, files, _ = FORMATS[kind]
    name = rng.choice(sorted(files))
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(files[name](whole, rng))
    return path, whole


def check_reading(kind, folder):
    """Read a folder of this format; returns what the UserError says, or ''."""
    global reading
    seen.clear()
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    reading = True
    try:
        FORMATS[kind][2](folder)
    except UserError as e:
        said = str(e)
        assert said and '\n' not in said, f'not one line: {said[:500]!r}'
        assert len(said) < 1000, f'{len(said):,} characters: {said[:500]!r}'
        reason = e.__context__  # what it was made of
        assert not isinstance(reason, MemoryError), f'a gigabyte was asked for: {said}'
        assert 'allocate memory' not in str(reason), f'a gigabyte was asked for: {said}'
        return said
    else:
        return ''
    finally:
        reading = False
        faulthandler.cancel_dump_traceback_later()
        assert not seen, f'reading a file came to {seen}'


@pytest.mark.slow
@pytest.mark.parametrize('kind', FORMATS)
def test_a_broken_file_is_read_right_or_refused_in_one_line(kind, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    folder = tmp_path / 'x'
    FORMATS[kind][0](folder)
    assert check_reading(kind, folder) == ''  # whole, it is read
    n_refused, rounds = 0, MORE_ROUNDS if kind in ANOTHER_WAY else ROUNDS
    with limited_memory(), warnings.catch_warnings():
        warnings.simplefilter('error')
        for seed in range(rounds):
            path, whole = break_file(kind, seed, folder)
            try:
                n_refused += check_reading(kind, folder) != ''
            except BaseException as e:
                again = f'python tests/test_fuzz.py {kind} {seed} FOLDER'
                raise AssertionError(f'{again} makes this file again: {e!r}'[:2000]) from e
            path.write_bytes(whole)
    passed_over = ('metrics', 'records', 'parquet')  # as are the broken parts of these
    assert n_refused < rounds and (n_refused or kind in passed_over)
    printed = ''.join(capfd.readouterr())
    assert 'Traceback' not in printed and 'panicked' not in printed, printed[:2000]


# ---- what is refused however whole it is


def test_a_flipped_bit_in_a_weight_is_found_by_its_checksum(tmp_path):
    write_checkpoint(tmp_path / 'x')
    path = tmp_path / 'x/ckpt.pt'
    checkpoint.check_sums(str(path))
    whole = path.read_bytes()
    weight = torch.load(path)['model']['lm_head.weight'].numpy().tobytes()
    broken = bytearray(whole)
    broken[whole.index(weight) + 5] ^= 1
    path.write_bytes(broken)
    with pytest.raises(UserError, match="checksum of 'ckpt/data/[0-9]+' does not match"):
        checkpoint.load(str(path))


def test_a_checkpoint_that_was_saved_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        write_checkpoint(tmp_path / 'x')
    finally:
        torch.serialization.set_crc32_options(True)
    assert checkpoint.load(str(tmp_path / 'x/ckpt.pt'))['iter_num'] == 3


def test_a_checkpoint_in_the_form_of_torch_before_1_6_is_refused(tmp_path):
    write_checkpoint(tmp_path / 'x')
    path = str(tmp_path / 'x/ckpt.pt')
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match='since torch 1.6'):
        checkpoint.load(path)


def test_a_huge_model_that_a_config_describes_takes_no_memory(tmp_path):
    write_model(tmp_path / 'x')
    path = tmp_path / 'x/config.json'
    whole = json.loads(path.read_text())
    for name in ('num_hidden_layers', 'hidden_size', 'vocab_size', 'intermediate_size'):
        for number in (10**6, 10**9):
            path.write_text(json.dumps(whole | {name: number}))
            with limited_memory(), pytest.raises(UserError, match='larger model than its tensors'):
                huggingface.load(str(tmp_path / 'x'))
    path.write_text(json.dumps(whole | dict(max_position_embeddings=10**9)))
    with limited_memory(), pytest.raises(UserError, match='longer than any context'):
        huggingface.load(str(tmp_path / 'x'))


if __name__ == '__main__':
    kind, seed, folder = sys.argv[1:]
    folder = Path(folder)
    FORMATS[kind][0](folder)
    check_reading(kind, folder)
    print('broken:', break_file(kind, seed, folder)[0])
    print(check_reading(kind, folder) or 'is read')
