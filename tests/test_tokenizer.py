"""Text to ids and back, over every backend."""

import itertools
import json
import os
import pickle
import random
import unicodedata

import jinja2
import pytest
import tokenizers
from conftest import shared

from fledge import UserError
from fledge.tokenizer import (
    CHAT_TEMPLATE,
    IM_END,
    PATTERNS,
    Tokenizer,
    byte_tokenizer,
    char_tokenizer,
    common_tokenizer,
    find_tokenizer,
    gpt2_tokenizer,
    is_gpt2_size,
    load_tokenizer,
    padded_vocab_size,
    train_bpe,
)


def random_texts(n, seed=0):
    """Texts that break tokenizers: any Unicode, control characters, runs of spaces and newlines.

    Special tokens are spelled out in some.
    """
    rng = random.Random(seed)
    pieces = [
        'def main():\n',
        '    return x',
        "don't",
        ' 123,456',
        '\r\n',
        '\t\t',
        '<|endoftext|>',
        '😀👩‍👩‍👧',
        'naïve',
        '中文',
        '\x00\x07',
        ' ' * 9,
        '\n\n\n',
        'aaaa',
    ]
    texts = ['', ' ', '\n', 'a' * 5000]
    while len(texts) < n:
        parts = [
            rng.choice(pieces) if rng.random() < 0.6 else chr(rng.randrange(0x110000))
            for _ in range(rng.randrange(1, 30))
        ]
        texts.append(''.join(p for p in parts if len(p) > 1 or unicodedata.category(p) != 'Cs'))
    return texts


@pytest.fixture(scope='module')
def trained():
    with open(os.__file__, encoding='utf-8') as f, open(random.__file__, encoding='utf-8') as g:
        return train_bpe([f.read(), g.read()], 1000)


def tokenizer_named(name, request):
    if name == 'gpt2':
        shared('tiktoken')
        return gpt2_tokenizer()
    return {'bytes': byte_tokenizer, 'trained': lambda: request.getfixturevalue('trained')}[name]()


@pytest.mark.slow
@pytest.mark.parametrize('name', ['trained', 'bytes', 'gpt2'])
def test_texts_come_back_and_both_backends_agree(name, request, tmp_path):
    tokenizer = tokenizer_named(name, request)
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
    for t in tokenizer.special:  # text that spells a special token is text
        assert (
            len(tokenizer.encode(t)) > 1
            and tokenizer.encode(f'a{t}b', allow_special=True).count(tokenizer.special[t]) == 1
        )
    texts = random_texts(1000)
    batch = [tokenizer.encode_array(t).tolist() for t in texts]
    for text, ids in zip(texts, batch, strict=True):
        assert ids == tokenizer.encode(text) and tokenizer.decode(ids) == text
        if '<|' not in text:  # `tokenizers` takes special tokens in text for special
            assert theirs.encode(text, add_special_tokens=False).ids == ids, repr(text)
    assert theirs.get_vocab_size() == tokenizer.vocab_size
    again = load_tokenizer(str(tmp_path))
    assert (
        again.encode(texts[7]) == batch[7]
        and again.special == tokenizer.special
        and again.vocab_size == tokenizer.vocab_size
    )


@pytest.mark.slow
@pytest.mark.parametrize('name', ['trained', 'gpt2'])
def test_both_backends_agree_on_every_character(name, request):
    """Each assigned one between letters, digits, spaces, punctuation and newlines, and doubled."""
    ours = tokenizer_named(name, request)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(ours.spec))
    characters = [
        chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ('Cn', 'Cs', 'Co')
    ]
    characters = [
        c
        for c in characters
        if not '\u4e00' < c < '\u9fff' and not '\uac00' < c < '\ud7a3' and c < '\U00020000'
    ]  # alike in all that matters
    assert len(characters) > 30_000
    for i in range(0, len(characters), 64):
        text = ''.join(f'a{c}b {c}1{c}{c} .{c}\n{c}' for c in characters[i : i + 64])
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, ascii(text)


@pytest.mark.slow
def test_runs_that_no_regex_stands(request):
    """A million spaces or newlines, at which tiktoken gives up."""
    for tokenizer in (tokenizer_named('trained', request), byte_tokenizer()):
        for text in (
            ' ' * 1_000_000,
            'a' + '\t ' * 500_000 + 'b',
            '\n' * 1_000_000,
            '\r\n' * 500_000,
            'x' * 1_000_000,
        ):
            assert tokenizer.decode(tokenizer.encode_array(text)) == text


def test_chats_and_the_special_tokens_they_need(trained):
    plain = Tokenizer(
        json.loads(json.dumps(trained.spec | dict(added_tokens=trained.spec['added_tokens'][:1])))
    )
    assert (
        plain.vocab_size == 998
        and plain.with_special().special == trained.special
        and trained.with_special() is trained
    )
    messages = [
        dict(role='system', content='Be kind.'),
        dict(role='user', content='Hi <|im_end|>'),
        dict(role='assistant', content='Hello!'),
    ]
    ids, learned = plain.with_special().encode_chat(messages)
    rendered = ''.join(f'<|im_start|>{m["role"]}\n{m["content"]}<|im_end|>\n' for m in messages)
    assert (
        trained.decode(ids) == rendered and (ids == 999).sum() == 3
    )  # one that is spelled out in a message is text
    assert trained.decode(ids[learned == 1]) == 'Hello!<|im_end|>'
    _, learned = trained.encode_chat([m | dict(learned=False) for m in messages])
    assert not learned.any()


@pytest.mark.parametrize('name', ['gpt2', 'trained', 'bytes', 'stories260k', 'first'])
def test_a_chat_has_the_tokens_of_its_template(name, request):
    """A token may hold the role's newline and more; SentencePiece puts a space here and there."""
    if name in ('stories260k', 'first'):
        ours = load_tokenizer(shared('stories260k'))
        if name == 'first':  # as newer Llamas do it: in front of a whole text alone
            spaces = dict(type='Metaspace', replacement='▁', prepend_scheme='first', split=False)
            ours = Tokenizer(ours.spec | dict(normalizer=None, pre_tokenizer=spaces))
    else:
        ours = tokenizer_named(name, request)
    ours = ours.with_special()
    theirs = tokenizers.Tokenizer.from_str(json.dumps(ours.spec))
    contents = ['Hi', '\n\nwhy?', '  x = 1\n\ty', '\n', ' ', "\r\n'll\n\n", 'é中😀 \n', '\t- a\n ']
    straddling = 0
    for user, said in itertools.product(contents, contents):
        messages = [dict(role='system', content=said), dict(role='user', content=user)]
        messages += [dict(role='assistant', content=said), dict(role='assistant', content=user)]
        ids, learned = ours.encode_chat(messages)
        text = jinja2.Template(CHAT_TEMPLATE, keep_trailing_newline=True).render(messages=messages)
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ids.tolist() == ours.begin + expected, repr(text)
        got = b''.join(ours.token_bytes[i] for i in ids[learned == 1].tolist()).decode()
        answers = [answer + IM_END for answer in got.split(IM_END)[:-1]]
        for answer, content in zip(answers, (said, user), strict=True):
            assert answer in (content + IM_END, f'\n{content}{IM_END}')
            straddling += answer != content + IM_END
    assert bool(straddling) == (name in ('trained', 'gpt2'))


def test_behind_which_tokens_a_text_begins_with_a_space():
    llamas = load_tokenizer(shared('stories260k')).with_special()
    # a text goes on behind a character that is unknown
    assert llamas.before_texts == set(llamas.special.values()) - {llamas.special['<unk>']}
    spaces = dict(type='Metaspace', replacement='▁', prepend_scheme='first', split=False)
    newer = llamas.changed(normalizer=None, pre_tokenizer=spaces)
    assert newer.before_texts == {newer.end_of_text, *newer.begin}
    assert byte_tokenizer().before_texts == {byte_tokenizer().end_of_text}


def test_the_digest_is_of_all_that_a_tokenizer_does(trained, tmp_path):
    trained.save(str(tmp_path / 'tokenizer.json'))
    assert load_tokenizer(str(tmp_path)).digest() == trained.digest()
    others = [trained.with_special(['<pad>']), trained.changed(normalizer=dict(type='NFC'))]
    others += [byte_tokenizer()]
    assert len({tokenizer.digest() for tokenizer in (trained, *others)}) == 4


def test_data_in_other_tokens_than_those_of_the_weights_are_refused(trained, tmp_path):
    byte_tokenizer().save(str(tmp_path / 'tokenizer.json'))
    with pytest.raises(
        UserError, match="another tokenizer than .* prepare it with --tokenizer='a b'"
    ):
        common_tokenizer(str(tmp_path), trained, 'a b')
    theirs = byte_tokenizer().with_special(['<pad>'])  # which has more, and no other ones
    assert common_tokenizer(str(tmp_path), theirs, 'a b').spec == byte_tokenizer().spec


def test_the_separator_is_that_of_the_data_or_the_model(trained, tmp_path):
    theirs = Tokenizer(trained.spec)
    theirs.separator = '>'
    assert theirs.with_special(['<pad>']).separator == '>'
    # data that have none leave the model's own as it was
    common = common_tokenizer(str(tmp_path), theirs, 'the weights')
    assert common.separator == '' and theirs.separator == '>'


@pytest.mark.parametrize('option', ['lstrip', 'rstrip', 'single_word', 'normalized'])
def test_special_tokens_that_take_more_than_their_letters(trained, option):
    added = [token | {option: True} for token in trained.spec['added_tokens']]
    ours = Tokenizer(trained.spec | dict(added_tokens=added))
    theirs = tokenizers.Tokenizer.from_str(json.dumps(ours.spec))
    text = 'hello   <|im_start|>user\nhi<|im_end|>  \n next<|endoftext|>a <|endoftext|> b'
    expected = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, allow_special=True) == expected
    assert (ours.bpe is None) == (option != 'normalized')  # which says nothing without normalizer


@pytest.mark.slow
def test_gpt2_is_tiktokens(request):
    import tiktoken

    ours, theirs = tokenizer_named('gpt2', request), tiktoken.get_encoding('gpt2')
    assert ours.vocab_size == 50257 and ours.end_of_text == 50256
    for text in random_texts(300, seed=1):
        assert ours.encode(text) == theirs.encode_ordinary(text)
    assert ours.encode('a<|endoftext|>', allow_special=True) == theirs.encode(
        'a<|endoftext|>', allowed_special='all'
    )


def test_which_vocabularies_are_gpt2s(request, trained, tmp_path):
    gpt2 = tokenizer_named('gpt2', request)
    assert padded_vocab_size(gpt2) == padded_vocab_size(None) == 50304
    assert padded_vocab_size(trained) == 1000
    assert [n for n in (0, 1000, 50256, 50257, 50258, 50304) if is_gpt2_size(n)] == [50257, 50304]
    for size in (50257, 50304):
        assert find_tokenizer(str(tmp_path), vocab_size=size).spec == gpt2.spec
    assert find_tokenizer(str(tmp_path), vocab_size=1000) is None
    assert find_tokenizer(str(tmp_path)) is None
    trained.save(str(tmp_path / 'tokenizer.json'))
    assert find_tokenizer(str(tmp_path), vocab_size=50304).spec == trained.spec


def test_trained_vocabulary_has_the_size_asked_for(trained):
    assert trained.vocab_size == 1000 and trained.special == {
        '<|endoftext|>': 997,
        '<|im_start|>': 998,
        '<|im_end|>': 999,
    }
    assert (
        trained.spec['pre_tokenizer']['pretokenizers'][0]['pattern']['Regex'] == PATTERNS['qwen2']
    )
    assert len(trained.encode('    def __init__(self):\n')) < 10
    with pytest.raises(UserError, match='at least 259'):
        train_bpe(['abc'], 200)


def test_a_long_word_is_learned_from_in_pieces_of_a_thousand():
    """Whole, one of a million characters would take the trainer hours."""
    for longest, is_whole in ((999, False), (400, True)):
        tokens = train_bpe(['a' * longest + 'xy' + 'a' * longest] * 50, 300).spec['model']['vocab']
        assert any('xy' in token for token in tokens) == is_whole


def test_a_vocabulary_with_gaps_gets_no_new_tokens():
    spec = char_tokenizer('abc').spec
    spec['model']['vocab']['c'] = 7
    with pytest.raises(UserError, match='cannot be added: its ids have gaps'):
        Tokenizer(spec).with_special()
    assert char_tokenizer('abc').with_special().special['<|endoftext|>'] == 3


def test_characters(tmp_path):
    tokenizer = char_tokenizer(sorted(set('hello\n')))
    assert (
        tokenizer.encode('hello') == [2, 1, 3, 3, 4]
        and tokenizer.decode([2, 1, 3, 3, 4]) == 'hello'
    )
    assert tokenizer.end_of_text is None and tokenizer.vocab_size == 5
    with pytest.raises(UserError, match="'x' is not in this vocabulary of 5 characters"):
        tokenizer.encode('hex')
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    assert load_tokenizer(str(tmp_path)).encode('hole') == [2, 4, 3, 1]
    assert tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json')).encode(
        'hello\n'
    ).ids == [2, 1, 3, 3, 4, 0]


def test_ids_without_text_are_replacement_characters(trained):
    assert trained.decode([5000]) == '�' and byte_tokenizer().decode([0xF0, 65]) == '�A'


def test_another_kind_of_tokenizer_runs_on_tokenizers(tmp_path):
    theirs = tokenizers.Tokenizer(
        tokenizers.models.Unigram(
            [('<unk>', 0.0), ('▁a', -1.0), ('b', -2.0), ('▁', -3.0)], unk_id=0
        )
    )
    theirs.pre_tokenizer, theirs.decoder = (
        tokenizers.pre_tokenizers.Metaspace(),
        tokenizers.decoders.Metaspace(),
    )
    ours = Tokenizer(json.loads(theirs.to_str()))
    assert (
        ours.hf
        and ours.encode('ab a') == theirs.encode('ab a').ids
        and ours.decode(ours.encode('ab a')) == 'ab a'
        and ours.vocab_size == 4
    )
    assert [len(ours.token_bytes[i]) for i in ours.encode('a b')] == [
        2,
        1,
        1,
    ]  # the bytes of ' a b', spaces and all


def test_ids_out_of_merge_order_run_on_tokenizers(trained):
    spec = json.loads(json.dumps(trained.spec))
    vocab = spec['model']['vocab']
    spec['model']['vocab'] = {
        t: 996 - i for t, i in vocab.items()
    }  # as in RoBERTa's, the ids say nothing about the merges
    other = Tokenizer(spec)
    text = 'def main():\n    return 1\n'
    assert (
        other.bpe is None
        and other.encode(text) == [996 - i for i in trained.encode(text)]
        and other.decode(other.encode(text)) == text
    )
    del spec['model']['vocab']['ÿ']  # a byte
    assert Tokenizer(spec).bpe is None


@pytest.mark.parametrize('token', [' the', '東京', 'the', 'Ġzqx'])
def test_a_token_that_no_merge_makes_is_never_found(trained, token):
    spec = json.loads(json.dumps(trained.spec | dict(added_tokens=[])))
    assert token not in spec['model']['vocab'] or pytest.skip('it is one here')
    spec['model']['vocab'][token] = 997
    ours, theirs = Tokenizer(spec), tokenizers.Tokenizer.from_str(json.dumps(spec))
    for text in ('in the end the zqx', 'the 東京 zqx'):
        assert (
            ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
            and ours.decode(ours.encode(text)) == text
        )


def test_special_tokens_in_a_document_are_text_in_every_backend(trained):
    other = Tokenizer(trained.spec | {'normalizer': {'type': 'NFC'}})
    assert (
        other.hf
        and 997 not in other.encode('a<|endoftext|>')
        and 997 in other.encode('a<|endoftext|>', allow_special=True)
    )


def test_many_special_tokens_in_a_prompt(trained):
    assert trained.encode('<|im_end|>' * 5000 + 'a', allow_special=True) == [
        999
    ] * 5000 + trained.encode('a')


def test_nanogpts_meta_pkl_is_read_without_running_it(tmp_path):
    meta = {'vocab_size': 3, 'itos': {0: 'a', 1: 'b', 2: '\n'}, 'stoi': {'a': 0, 'b': 1, '\n': 2}}
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(meta))
    assert find_tokenizer(str(tmp_path / 'nowhere'), str(tmp_path)).encode('ab\n') == [0, 1, 2]

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'owned'),)

    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 3, 'itos': Payload()}))
    with pytest.raises(UserError, match='only plain dictionaries'):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / 'owned').exists()


@pytest.mark.parametrize(
    'content', ['', '{"model": ', '[]', '{}', '{"model": {"type": "BPE"}}', '\x80']
)
def test_a_broken_tokenizer_is_named(tmp_path, content):
    (tmp_path / 'tokenizer.json').write_text(content)
    with pytest.raises(UserError, match='tokenizer.json is not a readable tokenizer'):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match='no tokenizer at nowhere'):
        load_tokenizer('nowhere')


def test_no_vocabulary_and_no_network_is_one_line(tmp_path, monkeypatch):
    import tiktoken.registry

    monkeypatch.setattr(tiktoken.registry, 'ENCODINGS', {})
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')
    with pytest.raises(UserError, match='--tokenizer=train'):
        load_tokenizer('gpt2')


def test_a_vocabulary_without_common_letters_loads_and_talks():
    digits = char_tokenizer('0123\nuser', ('<|endoftext|>', '<|im_start|>', '<|im_end|>'))
    ids, learned = digits.encode_chat([dict(role='user', content='12')])
    assert digits.decode(ids) == '<|im_start|>user\n12<|im_end|>\n' and not learned.any()
    model = dict(type='WordLevel', vocab={'hello': 0, 'b': 1}, unk_token='[UNK]')
    spaces = dict(type='Whitespace')
    words = Tokenizer(dict(added_tokens=[], pre_tokenizer=spaces, model=model, version='1.0'))
    assert words.encode('hello b') == [0, 1] and words.space_in_front == 0


def test_a_conversation_without_any_form_is_refused():
    talk = [dict(role='user', content='ab')]
    for encode in (char_tokenizer('ab').encode_chat, char_tokenizer('ab').encode_chat_prompt):
        with pytest.raises(UserError, match='no form for conversations'):
            encode(talk)
