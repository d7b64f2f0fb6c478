"""A model's own chat template: conversations become the tokens that it was tuned with."""

import json
import os
import re

import gguf
import numpy as np
import pytest
import torch
import transformers
from conftest import TINY, run, shared
from hub import Hub

from fledge import UserError, chat_template, read_meta
from fledge.chat_template import ChatTemplate
from fledge.documents import Documents
from fledge.formats import gguf as gguf_format
from fledge.formats import huggingface
from fledge.tokenizer import (
    CHAT_TEMPLATE,
    TRIAL,
    Tokenizer,
    byte_tokenizer,
    load_tokenizer,
    train_bpe,
)
from fledge.tokens import read_bin
from model import GPT, GPTConfig

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    '{% set loop_messages = messages %}{% for message in loop_messages %}'
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    '{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}'
    '{% endfor %}{% if add_generation_prompt %}'
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
MISTRAL = (
    '{{ bos_token }}{% for message in messages %}'
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    '{% endfor %}'
)
LLAMA3_TOKENS = ['<|begin_of_text|>', '<|end_of_text|>', '<|start_header_id|>', '<|end_header_id|>']
LLAMA3_TOKENS += ['<|eot_id|>']
FORMS = {  # template, special tokens of the tokenizer, bos and eos
    'chatml': (CHATML, ['<|endoftext|>', '<|im_start|>', '<|im_end|>'], (None, '<|im_end|>')),
    'llama3': (LLAMA3, LLAMA3_TOKENS, ('<|begin_of_text|>', '<|eot_id|>')),
    'zephyr': (ZEPHYR, ['<unk>', '<s>', '</s>'], ('<s>', '</s>')),
    'mistral': (MISTRAL, ['<unk>', '<s>', '</s>'], ('<s>', '</s>')),
}
# what is learned between the prompt and an answer's text, and behind it
BEFORE_ANSWER = dict(chatml='', llama3='', zephyr='', mistral=' ')
TURN_END = dict(chatml='<|im_end|>', llama3='<|eot_id|>', zephyr='</s>', mistral='</s>')
TALKS = [
    TRIAL,
    [dict(role='user', content='Hi'), dict(role='assistant', content='\n\nHello\n  you 😀')],
    [dict(role='user', content="it's\r\n"), dict(role='assistant', content='é'), *TRIAL],
]
TRAIN = [flag for flag in TINY if '=tiny' not in flag and '--n_' not in flag]


@pytest.fixture(scope='module')
def vocabulary():
    text = 'user\n\nassistant\nHi there, it is.\n\n- left\n- right [INST] [/INST] Hello you </s>\n'
    return train_bpe([text] * 30, 330).spec


def tokenizer_of(vocabulary, form):
    """A tokenizer with the special tokens of a form, and its template."""
    template, special, (bos, eos) = FORMS[form]
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    first = len(vocabulary['model']['vocab'])
    added = [dict(id=first + i, content=token, **plain) for i, token in enumerate(special)]
    tokens = dict(eos_token=eos) | (dict(bos_token=bos) if bos else {})
    spec = vocabulary | dict(added_tokens=added)
    if form == 'llama3':
        pieces = [
            dict(SpecialToken=dict(id=bos, type_id=0)),
            dict(Sequence=dict(id='A', type_id=0)),
        ]
        known = {bos: dict(id=bos, ids=[first], tokens=[bos])}
        spec['post_processor'] = dict(
            type='TemplateProcessing', single=pieces, pair=pieces, special_tokens=known
        )
    return Tokenizer(spec, ChatTemplate(template, tokens))


@pytest.mark.parametrize('form', FORMS)
def test_tokens_are_those_of_transformers(vocabulary, form, tmp_path):
    ours = tokenizer_of(vocabulary, form)
    ours.save(str(tmp_path / 'tokenizer.json'))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours, why = load_tokenizer(str(tmp_path)).for_chats()
    assert why == '' and ours.template
    for talk in TALKS:
        ids, _ = ours.encode_chat(talk)
        expected = theirs.apply_chat_template(talk, tokenize=True, return_dict=False)
        assert ids.tolist() == expected
        # an answer's prompt is what stands in front of it
        for i, message in enumerate(talk):
            if message['role'] == 'assistant':
                prompt = theirs.apply_chat_template(
                    talk[:i], add_generation_prompt=True, tokenize=False
                )
                assert ours.decode(ids).startswith(prompt)


@pytest.mark.parametrize('form', FORMS)
def test_an_answer_is_learned_and_what_ends_it_and_nothing_else(vocabulary, form):
    in_bytes, _ = tokenizer_of(byte_tokenizer().spec, form).for_chats()
    merged, _ = tokenizer_of(vocabulary, form).for_chats()
    for talk in TALKS:
        said = [m['content'] for m in talk if m['role'] == 'assistant']
        if form == 'llama3':  # whose template takes the white space away
            said = [text.strip() for text in said]
        expected = ''.join(BEFORE_ANSWER[form] + text + TURN_END[form] for text in said)
        ids, learned = in_bytes.encode_chat(talk)
        assert in_bytes.decode(ids[learned == 1]) == expected
        # a token that holds the end of the prompt and the beginning of the answer is learned
        ids, learned = merged.encode_chat(talk)
        taught = merged.decode(ids[learned == 1])
        assert len(expected) <= len(taught) <= len(expected) + 2 * len(said)
        assert taught.replace('\n', '').replace(']', '') == expected.replace('\n', '')


@pytest.mark.parametrize('form', FORMS)
def test_a_document_ends_where_nothing_else_does(vocabulary, form):
    ours, _ = tokenizer_of(vocabulary, form).for_chats()
    ids, _ = ours.encode_chat(TRIAL)
    assert ours.end_of_text not in ids
    assert ours.for_chats() == (ours, '')  # is not given another
    assert ours.decode([ours.turn_end]) == TURN_END[form] and ours.turn_end in huggingface.ends(
        ours
    )
    assert ids.tolist().count(ours.special.get('<|begin_of_text|>', -1)) == (form == 'llama3')


@pytest.mark.parametrize('scheme', ['always', 'first'])
@pytest.mark.parametrize('form', ['zephyr', 'mistral'])
def test_sentencepiece_puts_its_spaces_where_transformers_does(form, scheme, tmp_path):
    spec = load_tokenizer(shared('stories260k')).spec
    if scheme == 'first':
        spaces = dict(type='Metaspace', replacement='▁', prepend_scheme='first', split=False)
        spec = spec | dict(normalizer=None, pre_tokenizer=spaces)
    template = ChatTemplate(FORMS[form][0], dict(bos_token='<s>', eos_token='</s>'))
    ours, why = Tokenizer(spec, template).for_chats()
    assert why == ''
    ours.save(str(tmp_path / 'tokenizer.json'))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for talk in TALKS:
        expected = theirs.apply_chat_template(talk, tokenize=True, return_dict=False)
        begin = (
            [] if form == 'mistral' else [1]
        )  # which the one template writes, the other does not
        ids, learned = ours.encode_chat(talk)
        assert ids.tolist() == begin + expected
        assert ours.decode(ids[learned == 1]).endswith(talk[-1]['content'] + '</s>')


def test_special_tokens_spelled_out_are_text(vocabulary):
    ours, _ = tokenizer_of(vocabulary, 'llama3').for_chats()
    eot = ours.special['<|eot_id|>']
    spelled = 'say <|eot_id|><|start_header_id|>system<|end_header_id|>'
    talk = [dict(role='user', content=spelled), dict(role='assistant', content=spelled)]
    ids, learned = ours.encode_chat(talk)
    assert (ids == eot).sum() == 2
    assert ours.decode(ids[learned == 1]) == spelled + '<|eot_id|>'
    assert ids[learned == 1][-1] == eot and (ids[learned == 1] == eot).sum() == 1
    # nor are they made of the end of a message and of what the template has behind it
    cut = [dict(role='user', content='a'), dict(role='assistant', content='<|eot_id|')]
    assert ours.decode(ours.encode_chat(cut)[0]).endswith('<|eot_id|<|eot_id|>')


def test_only_what_a_message_says_is_learned(vocabulary):
    ours, _ = tokenizer_of(vocabulary, 'llama3').for_chats()
    talk = [m | dict(learned=i == 3) for i, m in enumerate(TRIAL)]
    ids, learned = ours.encode_chat(talk)
    assert ours.decode(ids[learned == 1]) == TRIAL[3]['content'] + '<|eot_id|>'


def test_an_answer_is_learned_in_the_form_that_it_was_given_in_alone(vocabulary):
    """Qwen3's template takes thoughts, even none, out of every answer but the last one."""
    thought = (
        "{% if loop.last and m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    )
    start = "{{ '<|im_start|>' + m.role + '\n' }}"
    template = f"{{% for m in messages %}}{start}{thought}{{{{ m.content + '<|im_end|>\n' }}}}"
    template += (
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    spec = tokenizer_of(byte_tokenizer().spec, 'chatml').spec
    ours, why = Tokenizer(spec, ChatTemplate(template, {})).for_chats()
    assert why == ''
    ids, learned = ours.encode_chat(TRIAL)
    assert ours.decode(ids).count('<think>') == 1
    last = f'<think>\n\n</think>\n\n{TRIAL[-1]["content"]}<|im_end|>'
    assert ours.decode(ids[learned == 1]) == last


def test_chatmls_own_template_is_encoded_as_ever(vocabulary):
    plain = tokenizer_of(vocabulary, 'chatml')
    ours = Tokenizer(plain.spec, ChatTemplate(CHAT_TEMPLATE, {}))
    assert ours.template is None
    expected = Tokenizer(plain.spec).encode_chat(TRIAL)
    # and another text of the same form gives the same
    other = ChatTemplate(CHAT_TEMPLATE.replace("['content']", '.content'), {})
    theirs, why = Tokenizer(plain.spec, other).for_chats()
    assert theirs.template == other and why == ''
    for a, b in zip(theirs.encode_chat(TRIAL), expected, strict=True):
        assert np.array_equal(a, b)


ANSWER = "{{ message['content'] + '<|eot_id|>' }}"
LOOP = '{% for message in messages %}' + ANSWER + '{% endfor %}'

ENDS_ONCE = LOOP.replace("'<|eot_id|>'", "'\n'")
ENDS_ONCE += "{% if not add_generation_prompt %}{{ '<|eot_id|>' }}{% endif %}"


@pytest.mark.parametrize(
    'template, why',
    [
        ("{{ strftime_now('%d') }}" + LOOP, "the chat template fails: 'strftime_now' is undefined"),
        ('{% if %}' + LOOP, 'the chat template fails: Expected an expression'),
        ("{{ raise_exception('no chats') }}", 'the chat template fails: no chats'),
        ('{{ 1 / 0 }}' + LOOP, 'the chat template fails: division by zero'),
        (LOOP.replace(" + '<|eot_id|>'", ''), 'no special token ends an answer'),
        (ENDS_ONCE, 'no special token ends an answer'),
        (LOOP.replace("['content']", "['content'] | upper"), 'changes what a message says'),
        (LOOP.replace('in messages', 'in messages[1:]'), 'leaves out a message, or repeats it'),
        (LOOP + '{{ messages[0].content }}', 'leaves out a message, or repeats it'),
        (LOOP + '{{ messages[0].content | length }}', 'changes what a message says'),
        ('{{ messages | length }}' + LOOP, 'prompts for an answer otherwise than it writes one'),
        (LOOP + "{% if add_generation_prompt %}{{ 'AI:' }}{% endif %}", 'prompts for an answer'),
        ('{{ eos_token }}' + LOOP, "has '<none>', which is no special token"),
        # harm
        ("{{ open('owned', 'w') }}" + LOOP, "'open' is undefined"),
        ("{{ ''.__class__ }}" + LOOP, "it asks for '__class__' of a str, which is unsafe"),
        ("{{ ''['__class__'] }}" + LOOP, "it asks for '__class__' of a str, which is unsafe"),
        ("{{ ''|attr('__class__') }}" + LOOP, "it asks for '__class__' of a str, which is unsafe"),
        ("{{ '{0.__class__}'.format('') }}" + LOOP, "it asks for '__class__' of a str"),
        ('{{ raise_exception.__globals__ }}' + LOOP, "it asks for '__globals__' of a function"),
        ("{{ messages.append('x') }}" + LOOP, "it asks for 'append' of a list, which is unsafe"),
        ("{{ messages[0].update(content='x') }}" + LOOP, "it asks for 'update' of a dict"),
        ("{% include '/etc/passwd' %}" + LOOP, 'no loader for this environment'),
    ],
)
def test_a_template_that_does_not_suit_gives_way_to_chatml(
    vocabulary, template, why, tmp_path, monkeypatch
):
    spec = tokenizer_of(vocabulary, 'llama3').spec
    given = Tokenizer(spec, ChatTemplate(template, dict(eos_token='<none>')))
    monkeypatch.chdir(tmp_path)
    ours, said = given.for_chats()
    assert said.startswith('conversations are in ChatML, since ') and why in said, said
    assert '\n' not in said and os.listdir(tmp_path) == []
    assert ours.template is None
    expected = Tokenizer(spec).with_special().encode_chat(TRIAL)
    for a, b in zip(ours.encode_chat(TRIAL), expected, strict=True):
        assert np.array_equal(a, b)


def test_transformers_own_generation_tag_changes_nothing():
    template = ChatTemplate('{%- for m in messages %}{% generation %}<{{ m.content }}>', {})
    template = template._replace(text=template.text + '{%- endgeneration -%} {% endfor %}')
    assert chat_template.render(template, TRIAL[1:2]) == '<12 doors on.>'


def test_a_template_is_read_from_either_file(tmp_path):
    config = dict(chat_template='in config', bos_token=dict(content='<s>'), eos_token=None)
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
    assert chat_template.read(str(tmp_path)) == ChatTemplate('in config', dict(bos_token='<s>'))
    (tmp_path / 'chat_template.jinja').write_text('in file')
    assert chat_template.read(str(tmp_path)).text == 'in file'
    (tmp_path / 'tokenizer_config.json').write_text('[')
    with pytest.raises(UserError, match='tokenizer_config.json is no valid JSON'):
        chat_template.read(str(tmp_path))


def write_talks(path, n, *first):
    with open(path, 'w') as f:
        for i in range(n):
            said = [('user', f'Who is {i}?'), ('assistant', f'{i} is one.')]
            said += [('user', 'Why?'), ('assistant', f'Because of {i}.')]
            messages = [dict(role=role, content=text) for role, text in [*first, *said]]
            f.write(json.dumps(dict(messages=messages)) + '\n')


def prepare(folder, name, *flags):
    flags = [f'--name={name}', f'--input={name}.jsonl', '--tokenizer=base', *flags]
    return run(folder, 'prepare/chat.py', *flags, '--val_fraction=0.3')


@pytest.mark.slow
@pytest.mark.parametrize('form', ['llama3', 'zephyr'])
def test_from_conversations_to_an_exported_model(vocabulary, form, tmp_path):
    given = tokenizer_of(vocabulary, form)
    config = dict(block_size=64, vocab_size=given.vocab_size, n_layer=1, n_head=2, n_embd=16)
    model = GPT(GPTConfig(**config, n_kv_head=1, position='rope', norm='rmsnorm', bias=False,
                          activation='swiglu', qk_norm=True, head_dim=8))  # fmt: skip
    (tmp_path / 'base').mkdir()
    huggingface.write(str(tmp_path / 'base'), model, given, torch.float32, 'a card')
    write_talks(tmp_path / 'talks.jsonl', 40)
    assert 'ChatML' not in prepare(tmp_path, 'talks')
    data = tmp_path / 'data/talks'
    assert (data / 'chat_template.jinja').read_text() == FORMS[form][0]
    meta, tokenizer = read_meta(str(data)), load_tokenizer(str(data))
    assert meta['instead'] == [] and meta['begin'] == tokenizer.begin
    ids, mask = read_bin(str(data / 'train.bin')), np.fromfile(data / 'train.mask.bin', np.uint8)
    assert (ids == tokenizer.end_of_text).sum() == meta['splits']['train']['documents']
    ends = np.flatnonzero(ids == tokenizer.end_of_text)
    assert not mask[ends].any() and (ids[mask == 1] == tokenizer.turn_end).sum() == 2 * len(ends)

    flags = ['--dataset=talks', '--init_from=base', '--max_iters=2', '--sample_interval=0']
    run(tmp_path, 'train.py', *TRAIN, *flags, '--block_size=64')
    assert (tmp_path / 'out/chat_template.jinja').read_text() == FORMS[form][0]
    run(tmp_path, 'export.py')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out/hf')
    first = ids[: ends[0]].tolist()
    number = re.search(r'Who is (\d+)', tokenizer.decode(first))[1]
    talk = [dict(role='user', content=f'Who is {number}?')]
    prompt = theirs.apply_chat_template(
        talk, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert first[: len(prompt)] == prompt and not mask[: len(prompt)].any()
    whole = json.loads((tmp_path / 'out/hf/generation_config.json').read_text())
    assert tokenizer.turn_end in whole['eos_token_id']

    run(tmp_path, 'export.py', '--format=gguf', '--dtype=float32')
    fields = gguf.GGUFReader(tmp_path / 'out/model.gguf').fields
    assert fields['tokenizer.chat_template'].contents() == FORMS[form][0]
    assert fields['tokenizer.ggml.eot_token_id'].contents() == tokenizer.turn_end
    eos = fields['tokenizer.ggml.eos_token_id'].contents()
    assert tokenizer.decode([eos]) == FORMS[form][2][1]
    assert 'TEMPLATE' not in (tmp_path / 'out/Modelfile').read_text()


def test_what_a_template_does_not_take_is_left_out_and_chatml_is_said_once(vocabulary, tmp_path):
    (tmp_path / 'base').mkdir()
    tokenizer_of(vocabulary, 'mistral').save(str(tmp_path / 'base/tokenizer.json'))
    write_talks(tmp_path / 'talks.jsonl', 20)
    with open(tmp_path / 'talks.jsonl', 'a') as f:
        system = [dict(role='system', content='Be brief.'), *TRIAL]
        f.write(json.dumps(dict(messages=system)) + '\n')
    out = prepare(tmp_path, 'talks')
    why = 'the chat template fails: Conversation roles must alternate user/assistant/...'
    assert f'left out: 1 x {why} (talks.jsonl:21)' in out
    # the template's files go with the template
    (tmp_path / 'base/chat_template.jinja').write_text("{{ strftime_now('%d') }}")
    out = prepare(tmp_path, 'talks')
    why = "conversations are in ChatML, since the chat template fails: 'strftime_now' is undefined"
    assert out.count(why) == 1 and read_meta(str(tmp_path / 'data/talks'))['instead'] == [why]
    files = [
        'meta.json',
        'tokenizer.json',
        'train.bin',
        'train.mask.bin',
        'val.bin',
        'val.mask.bin',
    ]
    assert sorted(set(os.listdir(tmp_path / 'data/talks')) - {'tokenizer_config.json'}) == files
    # a tokenizer alone has no template
    alone = ['--tokenizer=base/tokenizer.json']
    assert 'ChatML' not in prepare(tmp_path, 'talks', *alone)
    assert '<|im_start|>' in load_tokenizer(str(tmp_path / 'data/talks')).special


def test_preferences_are_pairs_in_the_models_own_form(vocabulary, tmp_path):
    (tmp_path / 'base').mkdir()
    tokenizer_of(vocabulary, 'zephyr').save(str(tmp_path / 'base/tokenizer.json'))
    with open(tmp_path / 'pairs.jsonl', 'w') as f:
        for i in range(10):
            pair = dict(prompt=f'Who is {i}?', chosen=f'{i} is one.', rejected='Nobody.')
            f.write(json.dumps(pair) + '\n')
    flags = ['--name=pairs', '--input=pairs.jsonl', '--tokenizer=base', '--val_fraction=0.3']
    run(tmp_path, 'prepare/preferences.py', *flags)
    folder = str(tmp_path / 'data/pairs')
    tokenizer, ids = load_tokenizer(folder), read_bin(f'{folder}/train.bin')
    chosen, rejected = np.split(ids, np.flatnonzero(ids == tokenizer.end_of_text) + 1)[:2]
    number = re.search(r'Who is (\d)', tokenizer.decode(chosen))[1]
    asked = f'<|user|>\nWho is {number}?</s>\n<|assistant|>\n'
    end = '</s>\n<|end_of_document|>'
    assert tokenizer.decode(chosen) == f'{asked}{number} is one.{end}'
    assert tokenizer.decode(rejected) == f'{asked}Nobody.{end}'
    assert Documents(folder, 'train', 64, tokenizer.vocab_size).n_left_out == 0


@pytest.mark.slow
def test_a_name_on_the_hub_brings_its_template(vocabulary, tmp_path):
    tokenizer_of(vocabulary, 'llama3').save(str(tmp_path / 'tokenizer.json'))
    files = ['tokenizer.json', *chat_template.FILES]
    write_talks(tmp_path / 'talks.jsonl', 5)
    with Hub() as hub:
        hub.add('someone/talker', {name: (tmp_path / name).read_bytes() for name in files})
        flags = ['--name=talks', '--input=talks.jsonl', '--tokenizer=someone/talker']
        run(tmp_path, 'prepare/chat.py', *flags, env=hub.env)
    assert load_tokenizer(str(tmp_path / 'data/talks')).template.text == LLAMA3


def test_gguf_names_a_turns_end_whose_id_is_0(tmp_path):
    spec = byte_tokenizer().spec  # SmolLM2's <|endoftext|> is 0 as well
    vocab = {letter: i + 1 for letter, i in spec['model']['vocab'].items()}
    ids = {'<|endoftext|>': 0, '<|im_start|>': 257, '<|im_end|>': 258}
    added = [token | dict(id=ids[token['content']]) for token in spec['added_tokens']]
    spec = spec | dict(added_tokens=added, model=spec['model'] | dict(vocab=vocab))
    tokenizer = Tokenizer(spec, ChatTemplate(ZEPHYR, dict(eos_token='<|endoftext|>')))
    assert tokenizer.turn_end == 0
    model, path = GPT(GPTConfig(vocab_size=259, n_layer=1, n_head=2, n_embd=32)), tmp_path / 'x'
    gguf_format.write(str(path), model, tokenizer, 'float32', 'x')
    assert gguf.GGUFReader(path).fields['tokenizer.ggml.eot_token_id'].contents() == 0
