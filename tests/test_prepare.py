"""The scripts in prepare/, on real and on broken text."""

import codecs
import contextlib
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, fails, forked, run, shared, start
from test_tokenizer import random_texts

from fledge import read_meta
from fledge.corpus import Skip, conversation, pipeline, preference
from fledge.tokenizer import byte_tokenizer, char_tokenizer, gpt2_tokenizer, load_tokenizer
from fledge.tokens import Tokens, read_bin, split_files


def texts_of(folder, split):
    """The documents of a prepared split, rebuilt from its tokens."""
    tokenizer, ids = load_tokenizer(folder), read_bin(os.path.join(folder, f'{split}.bin'))
    ends = np.flatnonzero(ids == tokenizer.end_of_text)
    parts = [part[:-1] for part in np.split(ids, ends + 1)[:-1]]
    if tokenizer.hf:
        return [tokenizer.decode(part) for part in parts]
    spelled = tokenizer.token_bytes.__getitem__  # decode() takes a second for a million tokens
    return [b''.join(map(spelled, part.tolist())).decode(errors='replace') for part in parts]


@pytest.mark.slow
def test_stdlib_is_this_pythons_own_source(tmp_path):
    run(tmp_path, 'prepare/stdlib.py')
    folder = str(tmp_path / 'data' / 'stdlib')
    meta = read_meta(folder)
    assert meta['vocab_size'] == 4096 == load_tokenizer(folder).vocab_size and meta[
        'source'
    ].endswith(sys.version.split()[0])
    train, val = texts_of(folder, 'train'), texts_of(folder, 'val')
    for split, texts in (('train', train), ('val', val)):
        n = meta['splits'][split]
        assert (
            n['documents'] == len(texts)
            and n['bytes'] == sum(len(t.encode()) for t in texts)
            and n['tokens'] == len(read_bin(f'{folder}/{split}.bin'))
        )
    with open(os.__file__, encoding='utf-8') as f:
        assert f.read() in train + val


def test_shakespeare_char_is_nanogpts(tmp_path):
    path = shared('tinyshakespeare', 'input.txt')
    run(tmp_path, 'prepare/shakespeare_char.py', f'--input={path}')
    folder = str(tmp_path / 'data' / 'shakespeare_char')
    with open(path) as f:
        text = f.read()
    stoi = {c: i for i, c in enumerate(sorted(set(text)))}
    train, val = read_bin(f'{folder}/train.bin'), read_bin(f'{folder}/val.bin')
    assert (len(train), len(val), len(stoi)) == (1003854, 111540, 65)
    assert np.concatenate([train, val]).tolist() == [stoi[c] for c in text]


@pytest.mark.slow
def test_shakespeare_in_gpt2s_tokens(tmp_path):
    shared('tiktoken')
    run(
        tmp_path,
        'prepare/shakespeare_char.py',
        f'--input={shared("tinyshakespeare", "input.txt")}',
        '--tokenizer=gpt2',
        '--name=shakespeare',
    )
    meta = read_meta(str(tmp_path / 'data' / 'shakespeare'))
    assert {s: n['tokens'] for s, n in meta['splits'].items()} == {
        'train': 301967,
        'val': 36060,
    }  # nanoGPT's, and an end of text each


def test_no_network_is_one_line(tmp_path):
    assert 'cannot fetch https://' in fails(
        tmp_path, 'prepare/shakespeare_char.py', env={'https_proxy': 'http://127.0.0.1:9'}
    )


@pytest.fixture
def notes(tmp_path):
    """A folder of every kind of file, with broken records among them.

    Returns the working folder and the texts.
    """
    folder = tmp_path / 'notes'
    (folder / 'deep').mkdir(parents=True)
    texts = [f'note {i}: naïve 😀\r\n\ttext' for i in range(40)]
    (folder / 'a.txt').write_bytes(texts[0].encode())
    (folder / 'deep' / 'b.md').write_bytes(texts[1].encode())
    texts[:2] = [text.replace('\r\n', '\n') for text in texts[:2]]  # a record's stay
    (folder / 'c.jsonl').write_text(
        ''.join(json.dumps({'text': t}) + '\n' for t in texts[2:20])
        + '{"broken\n\n{"title": "no text"}\n{"text": 3}\n'
    )
    pyarrow.parquet.write_table(pyarrow.table({'text': texts[20:] + [None]}), folder / 'd.parquet')
    (folder / 'image.png').write_bytes(b'\x89PNG')
    (folder / 'empty.txt').write_text('')
    return tmp_path, texts


@pytest.mark.slow
@pytest.mark.parametrize('tokenizer', ['bytes', 'train --vocab_size=300', 'gpt2'])
def test_own_text_of_every_kind(notes, tokenizer):
    folder, texts = notes
    if tokenizer == 'gpt2':
        shared('tiktoken')
    run(
        folder,
        'prepare/text.py',
        '--input=notes/',
        '--name=notes',
        '--val_fraction=0.2',
        *f'--tokenizer={tokenizer}'.split(),
    )
    data = str(folder / 'data' / 'notes')
    train, val = texts_of(data, 'train'), texts_of(data, 'val')
    assert sorted(train + val) == sorted(texts) and 2 <= len(val) <= 16
    assert sorted(os.listdir(data)) == ['meta.json', 'tokenizer.json', 'train.bin', 'val.bin']
    assert 'prepare/text.py --input=notes/' in read_meta(data)['command']
    again = run(
        folder,
        'prepare/text.py',
        '--input=notes/',
        '--name=again',
        '--val_fraction=0.2',
        '--num_proc=1',
        f'--tokenizer={data}',
    )
    assert texts_of(str(folder / 'data' / 'again'), 'val') == val, again


@pytest.mark.parametrize('n', [1, 2, 5])
def test_a_few_documents_have_a_val_too(tmp_path, n):
    (tmp_path / 'few.jsonl').write_text(
        ''.join(json.dumps({'text': f'{i} ' * 100 + 'é\ud800'}) + '\n' for i in range(n))
    )
    run(tmp_path, 'prepare/text.py', '--input=few.jsonl', '--name=few', '--tokenizer=bytes')
    meta = read_meta(str(tmp_path / 'data' / 'few'))
    assert (
        meta['splits']['val']['tokens'] > 1
        and sum(s['bytes'] for s in meta['splits'].values()) == n * 205
    )  # half a pair becomes U+FFFD
    assert meta['repaired'] == dict(count=n, first=[f'few.jsonl:{i + 1}' for i in range(min(n, 3))])
    train, val = (
        texts_of(str(tmp_path / 'data' / 'few'), 'train'),
        texts_of(str(tmp_path / 'data' / 'few'), 'val'),
    )
    assert ''.join(train + val) == ''.join(f'{i} ' * 100 + 'é�' for i in range(n)) and val[
        -1
    ].endswith('�')


def test_one_document_is_cut_in_two(tmp_path):
    (tmp_path / 'one.txt').write_text('abcdefghij' * 10)
    run(
        tmp_path,
        'prepare/text.py',
        '--input=one.txt',
        '--name=one',
        '--tokenizer=chars',
        '--val_fraction=0.1',
    )
    assert (
        len(read_bin(str(tmp_path / 'data/one/train.bin'))) == 90
        and len(read_bin(str(tmp_path / 'data/one/val.bin'))) == 10
    )


def test_a_character_is_never_cut_in_two(tmp_path):
    for n in (100, 101):
        (tmp_path / 'one.txt').write_text('é' * n, encoding='utf-8')
        flags = ['--input=one.txt', f'--name=x{n}', '--tokenizer=bytes', '--val_fraction=0.105']
        run(tmp_path, 'prepare/text.py', *flags)
        folder = str(tmp_path / f'data/x{n}')
        (train,), (val,) = texts_of(folder, 'train'), texts_of(folder, 'val')
        assert train + val == 'é' * n and len(val) == 11


@pytest.mark.slow
def test_a_target_within_a_long_text_ends_it_there(tmp_path):
    content = 'abcdefghij\n' * 420_000  # is read in two parts
    (tmp_path / 'one.txt').write_text(content)
    flags = ['--input=one.txt', '--name=x', '--tokenizer=bytes', '--target_tokens=1000']
    run(tmp_path, 'prepare/text.py', *flags)
    folder = str(tmp_path / 'data/x')
    (train,), (val,) = texts_of(folder, 'train'), texts_of(folder, 'val')
    assert content.startswith(train + val) and 4_190_000 < len(train + val) < 4_200_000
    assert [n['documents'] for n in read_meta(folder)['splits'].values()] == [1, 1]


def test_a_source_with_several_targets_is_in_one_split(tmp_path):
    lines = [f'source {i}\ttarget {i} {j}\n' for i in range(60) for j in range(3)]
    (tmp_path / 'x.tsv').write_text(''.join(lines))
    flags = ['--input=x.tsv', '--name=x', '--tokenizer=bytes', '--val_fraction=0.3']
    run(tmp_path, 'prepare/translate.py', *flags)
    train, val = (texts_of(str(tmp_path / 'data/x'), split) for split in ('train', 'val'))
    assert len(train) + len(val) == 180 and len(val) > 20
    assert not {t.split('\t')[0] for t in train} & {t.split('\t')[0] for t in val}


def test_slices_share_a_target(tmp_path):
    lines = [json.dumps({'text': f'{i:04d} ' + 'x' * 94}) + '\n' for i in range(400)]
    (tmp_path / 'x.jsonl').write_text(''.join(lines))
    flags = ['--input=x.jsonl', '--name=x', '--tokenizer=bytes', '--target_tokens=4000']
    for i in range(2):
        run(tmp_path, 'prepare/text.py', *flags, '--num_shards=2', f'--shard={i}')
        meta = read_meta(str(tmp_path / f'data/x/shard_{i:05d}_of_00002'))
        assert meta['splits']['train']['tokens'] == 2000


@pytest.mark.slow
def test_a_last_shard_smaller_than_val_is_shared_too(tmp_path):
    content = 'abcdefghij' * 420_000  # is read in two parts, the second of 5,697 bytes
    (tmp_path / 'one.txt').write_text(content)
    flags = ['--input=one.txt', '--name=x', '--tokenizer=bytes', '--shard_tokens=1000']
    run(tmp_path, 'prepare/text.py', *flags, '--val_fraction=0.1')
    train = [read_bin(path) for path in split_files(str(tmp_path / 'data/x'), 'train')]
    val = read_bin(str(tmp_path / 'data/x/val.bin'))
    # of the last part's tokens and their end, two stay, and are ended again
    assert [len(ids) for ids in train] == [4_194_303, 3] and len(val) == 5696
    text = byte_tokenizer().decode(np.concatenate([train[0], train[1][:-1], val[:-1]]))
    assert text == content
    assert read_meta(str(tmp_path / 'data/x'))['splits']['train'] == dict(
        tokens=4_194_306, bytes=4_194_305, documents=1, learned=4_194_306, files=2
    )


@pytest.mark.slow
def test_mistakes_are_one_line(tmp_path):
    def text(*flags):
        return fails(tmp_path, 'prepare/text.py', '--name=x', *flags)

    (tmp_path / 'empty').mkdir()
    (tmp_path / 'empty.txt').write_text('')
    (tmp_path / 'some.txt').write_text('some text ' * 100)
    (tmp_path / 'broken.parquet').write_text('PAR1')
    (tmp_path / 'broken.json').write_text('[1, ')
    (tmp_path / 'file').write_text('')
    (tmp_path / 'lines.jsonl').write_text('{"body": "x"}\n[]\n{"text": 1}\n{"text": \n')
    assert '--input is needed' in text()
    (tmp_path / 'some.csv').write_text('a,b')
    (tmp_path / 'talks.jsonl').write_text('{}')
    for script, read in (
        ('text', 'some.txt'),
        ('chat', 'talks.jsonl'),
        ('preferences', 'talks.jsonl'),
    ):
        flags = [f'--input={read},some.csv', '--name=x', '--tokenizer=bytes']
        assert 'some.csv cannot be read: it is no ' in fails(
            tmp_path, f'prepare/{script}.py', *flags
        )
    separated = text('--input=talks.jsonl', '--separator=%')
    assert '--separator is for .txt and .md files, and none is there' in separated
    assert 'name= is needed' in fails(tmp_path, 'prepare/text.py', '--input=some.txt')
    assert 'nowhere does not exist' in text('--input=nowhere')
    assert 'no .txt, .md, .jsonl, .jsonl.gz, .json or .parquet files there' in text('--input=empty')
    (tmp_path / 'empty' / 'a.pdf').write_text('')
    assert 'files there, but 1 hidden or of another kind (empty/a.pdf)' in text('--input=empty')
    assert 'empty.txt gives no documents; 1 x an empty file (empty.txt)' in text(
        '--input=empty.txt', '--tokenizer=bytes'
    )
    assert 'no tokenizer at nowhere' in text('--input=some.txt', '--tokenizer=nowhere')
    assert 'needs at least 259' in text('--input=some.txt', '--tokenizer=train', '--vocab_size=100')
    assert '1 x a file that cannot be read any further (ArrowInvalid' in text(
        '--input=broken.parquet', '--tokenizer=bytes'
    )
    assert '1 x a file that cannot be read any further (JSONDecodeError' in text(
        '--input=broken.json', '--tokenizer=bytes'
    )
    err = text('--input=lines.jsonl', '--tokenizer=bytes')
    assert all(
        why in err
        for why in (
            "no field 'text' (lines.jsonl:1)",
            'no object (lines.jsonl:2)',
            "'text' that is no text (lines.jsonl:3)",
            'no JSON (lines.jsonl:4)',
        )
    ), err
    assert 'no documents' in text('--input=lines.jsonl', '--tokenizer=train', '--vocab_size=300')
    assert 'val_fraction=0 must be 1e-09 to 0.999' in text(
        '--input=some.txt', '--tokenizer=bytes', '--val_fraction=0'
    )
    assert 'num_proc=-1' in text('--input=some.txt', '--tokenizer=bytes', '--num_proc=-1')
    assert 'val_fraction=2' in text('--input=some.txt', '--tokenizer=bytes', '--val_fraction=2')
    assert 'shard=2 is none of the 2 slices' in text(
        '--input=some.txt', '--tokenizer=bytes', '--shard=2', '--num_shards=2'
    )
    assert 'each of the 2 slices would make another one' in text(
        '--input=some.txt', '--tokenizer=train', '--num_shards=2'
    )
    assert "1 x the character 'x' is not in this vocabulary of 6 characters (some.txt:1)" in text(
        '--input=some.txt', f'--tokenizer={char_file(tmp_path)}'
    )
    (tmp_path / 'linked').mkdir()
    os.symlink('nowhere', tmp_path / 'linked' / 'link.txt')
    assert (
        'a file that cannot be read any further (No such file or directory) (linked/link.txt)'
        in text('--input=linked', '--tokenizer=bytes')
    )
    pyarrow.parquet.write_table(pyarrow.table({'body': ['a']}), tmp_path / 'body.parquet')
    assert "a .parquet without a column 'text'; it has body" in text(
        '--input=body.parquet', '--tokenizer=bytes'
    )
    assert not (tmp_path / 'data' / 'x').exists()
    for name in ('missing.txt', 'empty', 'some.txt,file'):
        err = fails(tmp_path, 'prepare/shakespeare_char.py', f'--input={name}')
        assert f'{name} cannot be read' in err and '--input is one file' in err
    (tmp_path / 'data/x').write_text('')
    assert 'data/x is no folder to write to (File exists)' in text('--input=some.txt')
    shutil.rmtree(tmp_path / 'data')
    (tmp_path / 'data').write_text('')
    assert 'data/x is no folder to write to (Not a directory)' in text('--input=some.txt')


def char_file(folder):
    char_tokenizer('some te').save(str(folder / 'chars.json'))
    return folder / 'chars.json'


def test_broken_records_are_counted_named_and_left_out(tmp_path):
    folder = tmp_path / 'mixed'
    (folder / 'none').mkdir(parents=True)
    good = [json.dumps({'text': f'document {i}'}).encode() for i in range(300)]
    good[3:3] = [
        b'{"broken',
        b'',
        b'{"title": "x"}',
        b'{"text": 5}',
        b'{"text": null}',
        b'[1]',
        b'{"text": "  \\n"}',
        good[0],
        b'{"text": "caf\xe9"}',
        b'{"text": "tiny"}',
    ]
    (folder / 'a.jsonl').write_bytes(b'\xef\xbb\xbf' + b'\r\n'.join(good) + b'\r\n')
    (folder / 'b.md').write_bytes(b'fine\nnot \xff fine\n')
    (folder / 'c.txt').write_bytes(b'')
    (folder / 'd.parquet').write_bytes(b'PAR1')
    (folder / 'e.json').write_text(json.dumps([{'text': 'from a list'}, 7]))
    (folder / 'f.jsonl.gz').write_bytes(
        gzip.compress(b'{"text": "packed text"}\n' * 2)[:-9]
    )  # cut short
    out = run(
        tmp_path,
        'prepare/text.py',
        '--input=mixed,mixed/none',
        '--name=x',
        '--tokenizer=bytes',
        '--min_length=5',
        '--val_fraction=0.1',
    )
    meta = read_meta(str(tmp_path / 'data/x'))
    a = 'mixed/a.jsonl:'
    assert {why: (n['count'], n['first']) for why, n in meta['dropped'].items()} == {
        'a folder without text files': (1, ['mixed/none']),
        'no JSON': (1, [a + '4']),
        "no field 'text'": (2, [a + '6', a + '8']),
        "a field 'text' that is no text": (1, [a + '7']),
        'no object': (2, [a + '9', 'mixed/e.json:2']),
        'empty': (1, [a + '10']),
        'shorter than min_length=5': (2, [a + '12', a + '13']),
        'an empty file': (1, ['mixed/c.txt']),
        next(w for w in meta['dropped'] if 'ArrowInvalid' in w): (1, ['mixed/d.parquet']),
        next(w for w in meta['dropped'] if 'EOFError' in w): (1, ['mixed/f.jsonl.gz']),
        'a duplicate': (2, []),
    }
    assert meta['repaired'] == dict(count=2, first=[a + '12', 'mixed/b.md:2'])
    texts = texts_of(str(tmp_path / 'data/x'), 'train') + texts_of(str(tmp_path / 'data/x'), 'val')
    assert sorted(texts) == sorted(
        [f'document {i}' for i in range(300)] + ['fine\nnot � fine\n', 'from a list', 'packed text']
    )
    assert f'left out: 1 x no JSON ({a}4)' in out and 'repaired: 2 x invalid UTF-8' in out


def prepared(folder, *flags):
    """What text.py prints, and the documents that it makes, as bytes: of train, then of val."""
    out = run(folder, 'prepare/text.py', '--name=x', '--tokenizer=bytes', *flags)
    return out, texts_of(str(folder / 'data/x'), 'train') + texts_of(str(folder / 'data/x'), 'val')


def test_a_folder_is_read_whole_or_it_is_said_what_is_left_out(tmp_path):
    (tmp_path / 'notes/deep').mkdir(parents=True)
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'notes/A.TXT').write_bytes('\ufeffin capitals'.encode())
    (tmp_path / 'notes/b.Json').write_text('[{"text": "a list"}]')
    (tmp_path / 'notes/c.JSONL.GZ').write_bytes(gzip.compress(b'{"text": "packed"}\n'))
    table = pyarrow.table({'text': ['a row']})
    pyarrow.parquet.write_table(table, tmp_path / 'notes/d.PARQUET')
    for name in ('a.pdf', 'deep/b.png', 'deep/c', 'z.doc', '._A.TXT', '.git/a.txt', 'deep/.b.md'):
        (tmp_path / 'notes' / name).parent.mkdir(exist_ok=True)
        (tmp_path / 'notes' / name).write_text('x')
    os.symlink(tmp_path / 'elsewhere', tmp_path / 'notes/link')
    out, texts = prepared(tmp_path, '--input=notes', '--val_fraction=0.4')
    assert sorted(texts) == ['a list', 'a row', 'in capitals', 'packed']
    others = 'a file of another kind (notes/a.pdf, notes/deep/b.png, notes/deep/c, ...)'
    assert f'left out: 4 x {others}\n' in out
    assert 'left out: 1 x a link to a folder (notes/link)\n' in out
    hidden = 'notes/._A.TXT, notes/.git, notes/deep/.b.md'
    assert f'left out: 3 x a hidden file ({hidden})\n' in out
    dropped = read_meta(str(tmp_path / 'data/x'))['dropped']
    assert dropped['a file of another kind']['count'] == 4


def test_text_of_windows_and_what_is_no_text(tmp_path):
    (tmp_path / 'a.txt').write_bytes('naïve 中 😀\r\nend'.encode('utf-16'))
    lines = ''.join(json.dumps(dict(text=f'line {i} é'), ensure_ascii=False) + '\n' for i in (1, 2))
    (tmp_path / 'b.jsonl').write_bytes(codecs.BOM_UTF16_BE + lines.encode('utf-16-be'))
    (tmp_path / 'c.txt').write_text('café ' * 250, encoding='latin-1')
    (tmp_path / 'd.txt').write_bytes(b'good text ' * 1000 + b'\xff')
    (tmp_path / 'e.txt').write_bytes(b'PK\x03\x04\0\0')
    (tmp_path / 'f.md').write_bytes(b'long enough to be read in parts\n' * 150_000 + b'\0')
    (tmp_path / 'g.json').write_bytes(b'[{"text": "a list"},\n {"text": "caf\xe9"}]')
    out, texts = prepared(
        tmp_path, '--input=a.txt,b.jsonl,c.txt,d.txt,e.txt,f.md,g.json', '--val_fraction=0.4'
    )
    good = ['naïve 中 😀\nend', 'line 1 é', 'line 2 é', 'good text ' * 1000 + '�', 'caf� ' * 250]
    assert sorted(texts) == sorted([*good, 'a list', 'caf�'])
    assert 'repaired: 3 x invalid UTF-8 (c.txt:1, d.txt:1, g.json:2)\n' in out
    lost = '250 characters are lost of files that are not UTF-8, such as c.txt; convert them first'
    assert f'warning: {lost}\n' in out
    assert 'left out: 2 x no text, for it has NUL characters (e.txt:1, f.md)\n' in out


@pytest.mark.slow
def test_separators_make_documents(tmp_path):
    stories = ['One day.\n\n  It rained.', 'Two <b>.', '\tThree\r\nlines ', 'One day again.\n']
    ends = ['\r\n<|endoftext|>\r\n', '<|endoftext|>\n\n<|endoftext|>', '\n<|endoftext|>\n', '']
    content = '\ufeff' + ''.join(s + end for s, end in zip(stories, ends, strict=True))
    (tmp_path / 'stories.txt').write_bytes(content.encode())
    flags = ['--input=stories.txt', '--val_fraction=0.4']
    stories = [story.replace('\r\n', '\n') for story in stories]
    out, texts = prepared(tmp_path, *flags, '--separator=<|endoftext|>')
    assert sorted(texts) == sorted(stories) and 'warning' not in out and 'left out' not in out
    out, texts = prepared(tmp_path, *flags)
    assert ''.join(texts) == content[1:].replace('\r\n', '\n')
    said = "4 x '<|endoftext|>' spelled out in the text, where it is plain letters (stories.txt:1,"
    assert f'warning: {said} ...); --separator splits' in out
    spelled_out = read_meta(str(tmp_path / 'data/x'))['spelled_out']
    assert spelled_out == {'<|endoftext|>': dict(count=4, first=['stories.txt:1'])}
    (tmp_path / 'lines.txt').write_text('a\n%\nb\n%\n\n%\nc\td')
    out, texts = prepared(tmp_path, '--input=lines.txt', r'--separator=\n%\n', '--val_fraction=0.4')
    assert sorted(texts) == ['a', 'b', 'c\td']


@pytest.mark.slow
def test_a_path_may_have_commas_in_it(tmp_path):
    for name in ('Dickens, Charles.txt', 'Dickens', 'b.txt', 'c,d, e.txt'):
        (tmp_path / name).write_text(f'this is {name}')
    flag = '--input=b.txt, Dickens, Charles.txt ,c,d, e.txt'
    out, texts = prepared(tmp_path, flag, '--val_fraction=0.4')
    names = ('Dickens, Charles.txt', 'b.txt', 'c,d, e.txt')
    assert sorted(texts) == [f'this is {name}' for name in names]
    flags = ['--input=b.txt,Doyle, Arthur.txt,b.txt', '--name=x']
    assert 'error: Doyle, Arthur.txt does not exist' in fails(tmp_path, 'prepare/chat.py', *flags)


def test_a_set_of_a_single_mistake_is_no_duplicate_of_itself(tmp_path):
    """Documents that differ in nothing are one; those that differ in a space are two."""
    (tmp_path / 'x.jsonl').write_text(
        ''.join(json.dumps({'text': t}) + '\n' for t in ['a b', 'a b', 'a  b', 'a b '] * 50)
    )
    run(
        tmp_path,
        'prepare/text.py',
        '--input=x.jsonl',
        '--name=x',
        '--tokenizer=bytes',
        '--val_fraction=0.4',
    )
    meta = read_meta(str(tmp_path / 'data/x'))
    assert (
        sum(n['documents'] for n in meta['splits'].values()) in (3, 4)
        and meta['dropped']['a duplicate']['count'] == 197
    )


@pytest.mark.slow
@pytest.mark.parametrize('tokenizer', ['gpt2', 'bytes', 'chars', 'train --vocab_size=400'])
def test_documents_come_back_whatever_they_hold(tmp_path, tokenizer):
    if tokenizer == 'gpt2':
        shared('tiktoken')
    texts = [t for t in random_texts(300, seed=3) if t.strip()] + [
        'x' * 1_000_000,
        ' ' * 1_000_000 + 'y',
        '中' * 400_000,
        'a\r\nb\r\n',
        '\x00\x01',
    ]
    texts = [t for t in texts if t.encode('utf-8', errors='replace').decode() == t]
    (tmp_path / 'x.jsonl').write_text(
        ''.join(
            json.dumps({'text': t}, ensure_ascii=i % 2 == 0) + '\n' for i, t in enumerate(texts)
        ),
        encoding='utf-8',
    )
    run(
        tmp_path,
        'prepare/text.py',
        '--input=x.jsonl',
        '--name=x',
        '--val_fraction=0.2',
        *f'--tokenizer={tokenizer}'.split(),
    )
    folder = str(tmp_path / 'data/x')
    if tokenizer == 'chars':  # no end of text between them
        decoded = load_tokenizer(folder).decode(read_bin(f'{folder}/train.bin'))
        position = 0
        for text in texts:
            at = decoded.find(text, position)
            position = at + len(text) if at >= 0 else position
        assert position == len(decoded)
    else:
        assert sorted(texts_of(folder, 'train') + texts_of(folder, 'val')) == sorted(set(texts))


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['words', 'no newline', 'broken bytes'])
def test_a_long_text_is_read_in_parts_and_stays_one_document(tmp_path, kind):
    """Above 4 MB; cut between words, so its tokens are those of the whole, and nowhere within a
    character."""
    rng = random.Random(0)
    content = {
        'words': lambda: '\n'.join(
            ' '.join(rng.choices(['the', 'naïve', 'x1;', '\t', '  ', 'end.'], k=9))
            for _ in range(120_000)
        ).encode(),
        'no newline': lambda: 'é中😀'.encode() * 700_000,
        'broken bytes': lambda: bytes(rng.choices(range(128, 256), k=5_000_000)),
    }[kind]()
    (tmp_path / 'long.txt').write_bytes(content)
    (tmp_path / 'twin.txt').write_bytes(content)
    out = run(
        tmp_path,
        'prepare/text.py',
        '--input=long.txt,twin.txt',
        '--name=x',
        '--tokenizer=bytes',
        '--val_fraction=0.01',
    )
    folder = str(tmp_path / 'data/x')
    train, val = texts_of(folder, 'train'), texts_of(folder, 'val')
    text = content.decode(errors='replace')
    assert (len(train), len(val)) == (1, 1) and '1 x a duplicate' in out
    if (
        kind == 'broken bytes'
    ):  # a character cut between two reads may be two U+FFFD in place of one
        assert abs(len(train[0] + val[0]) - len(text)) < 5
    else:
        assert train[0] + val[0] == text
    if kind == 'words':
        shared('tiktoken')
        run(
            tmp_path,
            'prepare/text.py',
            '--input=long.txt',
            '--name=y',
            '--tokenizer=gpt2',
            '--shard_tokens=500000',
        )
        got = np.concatenate(
            [
                read_bin(p)
                for split in ('train', 'val')
                for p in split_files(str(tmp_path / 'data/y'), split)
            ]
        )
        assert np.array_equal(got[got != 50256], gpt2_tokenizer().encode_array(text))


def slow_tokenizer(folder):
    """One that runs on `tokenizers`, a tenth as fast as tiktoken."""
    (folder / 'slow.json').write_text(
        json.dumps(byte_tokenizer().spec | {'normalizer': {'type': 'NFC'}})
    )
    return folder / 'slow.json'


def write_many(folder, n=8000):
    """18 MB of documents, a tenth of them duplicates, a line broken here and there."""
    rng = random.Random(1)
    lines = [
        json.dumps(
            {'text': f'{i} ' + ' '.join(rng.choices(['alpha', 'béta', '\n', 'gamma'], k=400))}
        )
        for i in range(n)
    ]
    lines = [
        rng.choice(lines[: i + 1]) if rng.random() < 0.1 else line for i, line in enumerate(lines)
    ]
    (folder / 'many.jsonl').write_text(
        '\n'.join('{' if i % 997 == 5 else line for i, line in enumerate(lines)), encoding='utf-8'
    )
    return [
        'prepare/text.py',
        '--input=many.jsonl',
        '--val_fraction=0.05',
        f'--tokenizer={slow_tokenizer(folder)}',
        '--shard_tokens=3000000',
    ]


def contents(folder):
    """The bytes of every file of a dataset; of meta.json what is not its command and name."""
    out = {n: (folder / n).read_bytes() for n in sorted(os.listdir(folder)) if n != 'meta.json'}
    meta = json.loads((folder / 'meta.json').read_text())
    return out | {'meta': {k: v for k, v in meta.items() if k not in ('command', 'settings')}}


@pytest.mark.slow
def test_any_number_of_processes_and_any_interruption_give_the_same_bytes(tmp_path):
    command = write_many(tmp_path)
    run(tmp_path, *command, '--name=whole', '--num_proc=1')
    whole = contents(tmp_path / 'data/whole')
    assert {'train_000000.bin', 'train_000002.bin', 'val.bin'} <= whole.keys() and whole['meta'][
        'dropped'
    ]['a duplicate']['count'] > 300
    run(tmp_path, *command, '--name=three', '--num_proc=3')
    assert contents(tmp_path / 'data/three') == whole
    kept = 0

    def states():
        return list((tmp_path / 'data/killed').glob('partial-*/state.json'))

    for end in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM, None):
        process = start(
            tmp_path, *command, '--name=killed', f'--num_proc={1 if end else 3}', own=True
        )
        if states():
            assert 'goes on behind the' in process.stderr.readline()
            time.sleep(0.3)
        while end and not states() and process.poll() is None:
            time.sleep(0.02)
        if end:
            process.send_signal(end)
        err = process.communicate(timeout=120)[1]
        assert (
            process.returncode
            == {None: 0, signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[end]
        ), err
        if end:
            assert (
                not (tmp_path / 'data/killed/train_000000.bin').exists()
                and not (tmp_path / 'data/killed/meta.json').exists()
            )
            before, kept = kept, json.loads(states()[0].read_text())['bytes']
            assert kept > before or end == signal.SIGKILL
    assert contents(tmp_path / 'data/killed') == whole
    for _ in range(50):  # no process of a killed run stays
        left = subprocess.run(['pgrep', '-f', 'name=killed'], capture_output=True, text=True).stdout
        if not left:
            break
        time.sleep(0.1)
    assert not left


NO_FORK = """
import multiprocessing, runpy, sys
multiprocessing.get_all_start_methods = lambda: ['spawn']
multiprocessing.get_context = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.slow
def test_where_no_process_can_be_forked_threads_give_the_same_bytes(tmp_path):
    command = write_many(tmp_path, 200)
    run(tmp_path, *command, '--name=processes')
    script = os.path.join(ROOT, command[0])
    done = subprocess.run(
        [sys.executable, '-c', NO_FORK, script, *command[1:], '--name=threads', '--num_proc=2'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / 'data/threads') == contents(tmp_path / 'data/processes')


CRASH = """
import os, runpy, sys
n, script = int(sys.argv[1]), sys.argv[2]
parent, done = os.getpid(), 0
def crashing(real):
    def call(*args, **options):
        global done
        done += os.getpid() == parent
        if done > n:
            os._exit(137)
        return real(*args, **options)
    return call
for name in ('replace', 'remove', 'rename', 'unlink', 'rmdir', 'fsync', 'truncate'):
    setattr(os, name, crashing(getattr(os, name)))
sys.argv = sys.argv[2:]
runpy.run_path(script, run_name='__main__')
"""


def crash(cwd, n, script, *args):
    """Run a script until its n-th change of a file's name or wish that it be on the disk, and end
    it there; whether it got so far."""
    (cwd / 'crash.py').write_text(CRASH)
    code, _, err = forked(cwd, str(cwd / 'crash.py'), str(n), os.path.join(ROOT, script), *args)
    assert code in (0, 137), err
    return code == 137


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['masked shards', 'one text'])
def test_killed_at_any_step_it_ends_the_same(tmp_path, kind):
    """At each step of the commits, of giving val the end of a text, of taking the final names and
    of tidying up."""
    (tmp_path / 'one.txt').write_text('some words. ' * 500)
    command = {
        'masked shards': [
            'prepare/copy_task.py',
            '--examples=60',
            '--shard_tokens=400',
            '--num_proc=1',
        ],
        'one text': [
            'prepare/text.py',
            '--input=one.txt',
            '--tokenizer=bytes',
            '--num_proc=1',
            '--val_fraction=0.1',
        ],
    }[kind]
    run(tmp_path, *command, '--name=whole')
    run(
        tmp_path, command[0], *command[1:], '--name=x', '--seed=5'
    )  # an older dataset of the same name
    whole, n = contents(tmp_path / 'data/whole'), 0
    while crash(tmp_path, n, *command, '--name=x'):
        assert n < 90
        folder = tmp_path / 'data/x'
        if (folder / 'train.bin').exists() or (
            folder / 'train_000000.bin'
        ).exists():  # it looks prepared: then it is, the old one or the new
            Tokens(str(folder), 'train', 8, 300)
            masks = [
                p
                for p in split_files(str(folder), 'train')
                if kind == 'masked shards' and not os.path.exists(p[:-4] + '.mask.bin')
            ]
            assert not masks
        run(tmp_path, *command, '--name=x')
        assert contents(folder) == whole, n
        n += 1 if n < 12 else 3
    assert n > 15 and contents(tmp_path / 'data/x') == whole


@pytest.mark.slow
def test_a_merge_killed_at_any_step_ends_the_same(tmp_path):
    (tmp_path / 'x.jsonl').write_text(
        ''.join(json.dumps({'text': f'document {i} of many words'}) + '\n' for i in range(60))
    )
    for i in range(2):
        run(
            tmp_path,
            'prepare/text.py',
            '--input=x.jsonl',
            '--name=shards',
            '--tokenizer=bytes',
            '--val_fraction=0.2',
            '--num_shards=2',
            f'--shard={i}',
            '--shard_tokens=400',
        )
    shutil.copytree(tmp_path / 'data/shards', tmp_path / 'data/whole')
    run(tmp_path, 'prepare/merge.py', '--name=whole')
    whole, n, more = contents(tmp_path / 'data/whole'), 0, True
    while more:
        assert n < 90
        shutil.rmtree(tmp_path / 'data/x', ignore_errors=True)
        shutil.copytree(tmp_path / 'data/shards', tmp_path / 'data/x')
        more = crash(tmp_path, n, 'prepare/merge.py', '--name=x')
        if more:
            run(tmp_path, 'prepare/merge.py', '--name=x')
        assert contents(tmp_path / 'data/x') == whole
        n += 1
    assert n > 10
    shutil.copytree(tmp_path / 'data/shards', tmp_path / 'data/y')
    (tmp_path / 'data/y/shard_00001_of_00002/train_000000.bin').unlink()
    assert 'is nowhere' in fails(tmp_path, 'prepare/merge.py', '--name=y')


@pytest.mark.slow
def test_a_full_disk_costs_a_line_and_nothing_else(tmp_path):
    import resource

    command = write_many(tmp_path, 3000) + ['--shard_tokens=50000000']
    run(tmp_path, *command, '--name=whole')
    process = start(
        tmp_path,
        *command,
        '--name=full',
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000)),
    )
    err = process.communicate(timeout=120)[1]
    kept = bool(
        list((tmp_path / 'data/full').glob('partial-*/state.json'))
    )  # not where the first seconds were the last
    assert (
        process.returncode == 2
        and err.count('\n') == 1
        and f'File too large{"; what is prepared is kept, and the same command goes on" * kept}\n'
        in err
    )
    run(tmp_path, *command, '--name=full')
    assert contents(tmp_path / 'data/full') == contents(tmp_path / 'data/whole')


@pytest.mark.slow
def test_a_terminal_shows_progress(tmp_path):
    import fcntl
    import pty
    import struct
    import termios

    command = write_many(tmp_path, 800)
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 120, 0, 0))
    process = subprocess.Popen(
        [sys.executable, os.path.join(ROOT, command[0]), *command[1:], '--name=x'],
        cwd=tmp_path,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    shown = b''
    with contextlib.suppress(OSError):  # the other end is closed when it ends
        while part := os.read(master, 4096):
            shown += part
    os.close(master)
    assert process.wait() == 0 and re.search(
        r'\d+%\|.*\[\d\d:\d\d<\d\d:\d\d, +[\d.]+[kM]B/s, [\d,]+ tokens\]', shown.decode()
    ), shown[-500:]


@pytest.mark.slow
def test_other_settings_start_again_and_an_old_dataset_stays_until_the_new_one_is_whole(tmp_path):
    command = write_many(tmp_path, 300)
    run(tmp_path, *command, '--name=x', '--shard_tokens=100000')
    old = contents(tmp_path / 'data/x')
    assert 'train_000001.bin' in old
    assert (
        'tokenizer' in fails(tmp_path, *command, '--name=x', '--tokenizer=nowhere')
        and contents(tmp_path / 'data/x') == old
    )
    run(tmp_path, *command, '--name=x', '--seed=7')
    new = contents(tmp_path / 'data/x')
    assert (
        sorted(new) == ['meta', 'tokenizer.json', 'train.bin', 'val.bin']
        and new['val.bin'] != old['val.bin']
    )
    run(tmp_path, *command, '--name=x', '--target_tokens=50000')
    assert 50_000 <= read_meta(str(tmp_path / 'data/x'))['splits']['train']['tokens'] < 55_000


@pytest.mark.slow
def test_shards_of_several_machines_are_joined(tmp_path):
    command = write_many(tmp_path, 600)
    run(tmp_path, *command, '--name=whole')
    for i in (2, 0):
        run(tmp_path, *command, '--name=x', '--num_shards=3', f'--shard={i}')
    assert 'shard_00001_of_00003 is not prepared yet' in fails(
        tmp_path, 'prepare/merge.py', '--name=x'
    )
    run(tmp_path, *command, '--name=x', '--num_shards=3', '--shard=1', '--seed=8')
    assert 'different settings or tokenizers' in fails(tmp_path, 'prepare/merge.py', '--name=x')
    run(tmp_path, *command, '--name=x', '--num_shards=3', '--shard=1')
    path = tmp_path / 'data/x/shard_00001_of_00003/meta.json'
    meta = json.loads(path.read_text())
    newer = ('begin', 'repaired', 'lost', 'spelled_out', 'instead')  # than a slice may be
    path.write_text(json.dumps({key: value for key, value in meta.items() if key not in newer}))
    out = run(tmp_path, 'prepare/merge.py', '--name=x')
    whole, folder = str(tmp_path / 'data/whole'), str(tmp_path / 'data/x')
    assert (
        not list((tmp_path / 'data/x').glob('shard_*')) and 'documents are in several slices' in out
    )
    n, m = read_meta(folder)['splits'], read_meta(whole)['splits']
    repeated = read_meta(folder)['in_several_shards']
    assert sum(n[s]['documents'] for s in n) == sum(m[s]['documents'] for s in m) + repeated
    for split in ('train', 'val'):
        assert (
            sum(len(read_bin(p)) for p in split_files(folder, split)) == n[split]['tokens']
            and len(split_files(folder, split)) == n[split]['files']
        )
        joined, one = (
            {t for p in split_files(f, split) for t in documents_of(f, p)} for f in (folder, whole)
        )
        assert (
            joined == one
        )  # a duplicate falls into the same split everywhere, so val is never in train
    assert 'was merged before' in run(tmp_path, 'prepare/merge.py', '--name=x')
    assert 'holds no slices' in fails(tmp_path, 'prepare/merge.py', '--name=whole')


def test_an_unfinished_run_of_another_version_is_begun_anew(tmp_path, capsys):
    partial = str(tmp_path / 'partial-1')
    state = pipeline._begin(partial)
    path = tmp_path / 'partial-1/state.json'
    path.write_text(json.dumps(state))
    assert pipeline._saved_state(partial) == state
    assert 'goes on behind the 0 documents' in capsys.readouterr().err
    del state['spelled_out']
    path.write_text(json.dumps(state))
    assert pipeline._saved_state(partial) is None
    assert f'{partial} is of another version' in capsys.readouterr().err


def documents_of(folder, path):
    tokenizer, ids = load_tokenizer(folder), read_bin(path)
    return [
        tokenizer.decode(part[:-1])
        for part in np.split(ids, np.flatnonzero(ids == tokenizer.end_of_text) + 1)[:-1]
    ]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(tmp_path):
    """All processes together, shared pages counted once, stay far below the input."""
    line = json.dumps({'text': 'some words of a document that is long enough ' * 40})
    with open(tmp_path / 'large.jsonl', 'w') as f:
        for i in range(100_000):
            f.write(line.replace('document', f'document {i}') + '\n')
    process = start(
        tmp_path,
        'prepare/text.py',
        '--input=large.jsonl',
        '--name=x',
        '--tokenizer=bytes',
        '--num_proc=2',
        start_new_session=True,
    )
    peak = 0
    while process.poll() is None:
        total = 0
        for entry in os.listdir('/proc'):
            try:
                if entry.isdigit() and os.getsid(int(entry)) == process.pid:
                    with open(f'/proc/{entry}/smaps_rollup') as f:
                        total += int(re.search(r'Pss:\s+(\d+) kB', f.read())[1]) * 1024
            except (OSError, TypeError):  # it has ended
                continue
        peak = max(peak, total)
        time.sleep(0.1)
    assert process.returncode == 0 and os.path.getsize(tmp_path / 'large.jsonl') > 180e6
    assert 20e6 < peak < 170e6, f'{peak / 1e6:.0f} MB'


@pytest.mark.slow
def test_wikitext_2_and_gsm8k_as_published(tmp_path):
    shared('tiktoken')
    run(
        tmp_path,
        'prepare/text.py',
        f'--input={shared("wikitext-2", "valid.txt")},{shared("wikitext-2", "test.txt")}',
        '--name=wt',
        '--val_fraction=0.1',
    )
    texts = texts_of(str(tmp_path / 'data/wt'), 'train') + texts_of(
        str(tmp_path / 'data/wt'), 'val'
    )
    with (
        open(shared('wikitext-2', 'valid.txt'), encoding='utf-8', newline='') as f,
        open(shared('wikitext-2', 'test.txt'), encoding='utf-8', newline='') as g,
    ):
        valid, test = f.read(), g.read()
    assert ''.join(texts) in (valid + test, test + valid)
    run(
        tmp_path,
        'prepare/text.py',
        f'--input={shared("gsm8k", "train.jsonl")}',
        '--name=gsm',
        '--field=question',
        '--tokenizer=train',
        '--vocab_size=1000',
    )
    with open(shared('gsm8k', 'train.jsonl'), encoding='utf-8') as f:
        questions = {json.loads(line)['question'] for line in f}
    assert (
        set(
            texts_of(str(tmp_path / 'data/gsm'), 'train')
            + texts_of(str(tmp_path / 'data/gsm'), 'val')
        )
        == questions
    )


def learned_of(folder, split):
    """For each document of a split: its text, and the text of what is learned of it."""
    tokenizer, ids = load_tokenizer(folder), read_bin(f'{folder}/{split}.bin')
    mask = np.fromfile(f'{folder}/{split}.mask.bin', np.uint8)
    assert len(mask) == len(ids) and set(mask) <= {0, 1}
    ends = np.flatnonzero(ids == tokenizer.end_of_text) + 1
    return [
        (tokenizer.decode(part), tokenizer.decode(part[kept == 1]))
        for part, kept in zip(np.split(ids, ends)[:-1], np.split(mask, ends)[:-1], strict=True)
    ]


@pytest.mark.slow
def test_instructions_become_chats_of_which_the_answer_is_learned(tmp_path):
    shared('tiktoken')
    path = shared('instructions', 'instruction-data.json')
    run(tmp_path, 'prepare/chat.py', f'--input={path}', '--name=talks', '--val_fraction=0.05')
    tokenizer = load_tokenizer(str(tmp_path / 'data/talks'))
    assert tokenizer.vocab_size == 50259 and tokenizer.special == {
        '<|endoftext|>': 50256,
        '<|im_start|>': 50257,
        '<|im_end|>': 50258,
    }
    pairs = dict(
        learned_of(str(tmp_path / 'data/talks'), 'train')
        + learned_of(str(tmp_path / 'data/talks'), 'val')
    )
    with open(path, encoding='utf-8') as f:
        rows = json.load(f)
    for row in rows:
        question = '\n\n'.join(filter(str.strip, (row['instruction'], row['input'])))
        answer = row['output']
        text = (
            f'<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n'
        )
        if answer.strip():
            assert pairs.pop(text + '<|endoftext|>', None) in (answer + '<|im_end|>', None)
    assert not pairs


@pytest.mark.slow
def test_labels_are_learned_and_val_may_be_files_of_its_own(tmp_path):
    def write(path, n):
        rows = [dict(text=f'Film {i} of {path} ', label=i % 2) for i in range(n)]
        rows += [dict(text='Film 0 of dev.jsonl ', label=0), dict(text='odd', label=2)]
        (tmp_path / path).write_text(''.join(json.dumps(row) + '\n' for row in rows))

    write('train.jsonl', 40)
    write('dev.jsonl', 10)
    flags = ['--input=train.jsonl', '--val=dev.jsonl', '--name=x', '--tokenizer=bytes']
    out = run(tmp_path, 'prepare/classify.py', *flags, '--labels=bad,good')
    folder = str(tmp_path / 'data/x')
    assert len(learned_of(folder, 'train')) == 40
    val = learned_of(folder, 'val')
    assert len(val) == 10  # what is in both stays in val
    first = 'Film 1 of dev.jsonl\n\nLabel: good'
    assert (f'{first}<|endoftext|>', ' good<|endoftext|>') in val or (first, ' good') in val
    assert "2 x a label '2' that is none of bad, good (dev.jsonl:12, train.jsonl:42)" in out
    words = fails(tmp_path, 'prepare/classify.py', *flags[:2], '--name=y', '--tokenizer=bytes')
    assert "a label '0' that is no word" in words
    assert 'nowhere.txt does not exist' in fails(
        tmp_path, 'prepare/text.py', '--input=dev.jsonl', '--val=nowhere.txt', '--name=z'
    )


@pytest.mark.slow
def test_the_standard_librarys_docstrings_become_a_chat(tmp_path):
    run(tmp_path, 'prepare/stdlib_chat.py', '--tokenizer=bytes')
    talks = texts_of(str(tmp_path / 'data/stdlib_chat'), 'train')
    talks += texts_of(str(tmp_path / 'data/stdlib_chat'), 'val')
    assert len(talks) > 3000
    question = '<|im_start|>user\nHow do I call os.path.join?<|im_end|>\n'
    answer = '<|im_start|>assistant\nIt is called as os.path.join(a, *p).<|im_end|>\n'
    assert any(talk.startswith(question + answer) for talk in talks)
    assert any('\nWhich function is this: Split a pathname' in talk for talk in talks)


def test_conversations_of_every_form_are_read():
    talk = [dict(role='user', content='why?'), dict(role='assistant', content='so')]
    system = dict(role='system', content='Be brief.')
    sharegpt = [{'from': 'human', 'value': 'why?'}, {'from': 'gpt', 'value': 'so'}]
    for record in (
        dict(messages=talk),
        dict(conversations=sharegpt),
        dict(conversations=talk, id='7'),
        dict(instruction='why?', input='', output='so'),
        dict(prompt='why?', completion='so'),
        dict(prompt='why?', response='so', completion_id=3),
        dict(prompt=talk[:1], completion=talk[1:]),
        dict(question='why?', answer='so'),
    ):
        assert conversation(record) == talk
        assert conversation(record | dict(system='Be brief.')) == [system, *talk]
        assert conversation(record | dict(system='')) == talk
    assert (
        conversation(dict(conversations=[{'from': 'system', 'value': 'Be brief.'}, *sharegpt]))[0]
        == system
    )
    for record, words in (
        (dict(messages='why?'), 'no list of objects'),
        (dict(conversations=[{'from': 'dog', 'value': 'x'}]), "a role 'dog'"),
        (dict(conversations=sharegpt[:1]), 'no message of the assistant'),
        (dict(question='why?', answer=None), "no field 'answer'"),
        (dict(prompt='why?', completion=5), "a field 'content' that is no text"),
        (dict(text='why?', label=1), 'no conversation; it has text, label'),
    ):
        with pytest.raises(Skip, match=words):
            conversation(record)


def test_messages_are_what_was_written():
    messages = [dict(role='user', content='\nwhy? '), dict(role='assistant', content='  x\n')]
    assert conversation(dict(messages=messages)) == messages
    record = dict(instruction='\nwhy? ', input=' \n', output='  x\n')
    assert conversation(record) == messages
    assert conversation(record | dict(input=' 1'))[0]['content'] == '\nwhy? \n\n 1'
    chosen, rejected = preference(dict(prompt='\nwhy? ', chosen='  x\n', rejected='x'))
    assert [m['content'] for m in chosen + rejected] == ['\nwhy? ', '  x\n', '\nwhy? ', 'x']
    with pytest.raises(Skip, match='an empty message'):
        conversation(record | dict(output=' \n'))


def test_a_pair_needs_an_answer_on_each_side():
    def say(*texts):
        roles = ('user', 'assistant') * len(texts)
        return [dict(role=r, content=c) for r, c in zip(roles, texts, strict=False)]

    for chosen, rejected in (
        (say('Q', 'A'), say('Q', 'A', 'more')),
        (say('Q', 'A', 'R', 'B'), say('Q', 'A')),
        (say('Q', 'A', 'why?'), say('Q', 'A', 'how?')),
    ):
        with pytest.raises(Skip, match='without an answer of its own'):
            preference(dict(chosen=chosen, rejected=rejected))
    assert preference(dict(chosen=say('P', 'A'), rejected=say('Q', 'A')))
    # in ShareGPT's form, too
    chosen, rejected = (
        [{'from': 'human', 'value': 'Q'}, {'from': 'gpt', 'value': answer}] for answer in 'AB'
    )
    pair = preference(dict(chosen=chosen, rejected=rejected))
    assert pair == preference(dict(prompt='Q', chosen='A', rejected='B'))


def test_conversations_of_many_turns_and_those_that_are_none(tmp_path):
    def say(*turns):
        return {'messages': [{'role': r, 'content': c} for r, c in turns]}

    good = [
        say(
            ('system', 'Be brief.'),
            ('user', f'{i}? <|im_end|> <|endoftext|>'),
            ('assistant', ' Yes. '),
            ('user', 'Why?'),
            ('assistant', f'Because {i}.'),
        )
        for i in range(30)
    ]
    bad = [
        say(('user', 'alone')),
        say(('robot', 'x')),
        {'messages': 'x'},
        say(('user', ''), ('assistant', 'y')),
        {'text': 'x'},
        {'messages': [{'role': 'user', 'content': ['x']}]},
    ]
    (tmp_path / 'talks.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in good + bad))
    run(
        tmp_path,
        'prepare/chat.py',
        '--input=talks.jsonl',
        '--name=talks',
        '--tokenizer=bytes',
        '--val_fraction=0.2',
    )
    meta, got = (
        read_meta(str(tmp_path / 'data/talks')),
        learned_of(str(tmp_path / 'data/talks'), 'train')
        + learned_of(str(tmp_path / 'data/talks'), 'val'),
    )
    assert sorted(learned for _, learned in got) == sorted(
        f' Yes. <|im_end|>Because {i}.<|im_end|>' for i in range(30)
    ) and sum(n['count'] for n in meta['dropped'].values()) == len(bad)
    ids = read_bin(str(tmp_path / 'data/talks/train.bin'))
    assert (ids == 256).sum() == meta['splits']['train'][
        'documents'
    ]  # an end of text spelled out in a message is text
    assert (
        meta['splits']['train']['learned']
        == np.fromfile(tmp_path / 'data/talks/train.mask.bin', np.uint8).sum()
    )


@pytest.mark.slow
def test_preferences_are_pairs_that_stay_together(tmp_path):
    path = shared('instructions', 'instruction-data-with-preference.json')
    run(
        tmp_path,
        'prepare/preferences.py',
        f'--input={path}',
        '--name=pairs',
        '--tokenizer=bytes',
        '--val_fraction=0.1',
    )
    with open(path, encoding='utf-8') as f:
        rows = {(r['chosen'] + '<|im_end|>', r['rejected'] + '<|im_end|>') for r in json.load(f)}
    for split in ('train', 'val'):
        got = learned_of(str(tmp_path / 'data/pairs'), split)
        assert len(got) % 2 == 0 and got
        for chosen, rejected in zip(got[::2], got[1::2], strict=True):
            assert (chosen[1], rejected[1]) in rows and chosen[0].split('<|im_start|>assistant')[
                0
            ] == rejected[0].split('<|im_start|>assistant')[0]
    turns = [
        {'role': 'user', 'content': 'q'},
        {'role': 'assistant', 'content': 'a'},
        {'role': 'user', 'content': 'r'},
    ]

    def say(text):
        return [{'role': 'assistant', 'content': text}]

    rows = [dict(prompt=turns, chosen=say(f'good {i}'), rejected=say('bad')) for i in range(9)] + [
        dict(chosen=turns + say(f'good {i}'), rejected=turns + say('bad')) for i in range(9, 18)
    ]
    rows += [
        dict(prompt='q', chosen='same', rejected='same'),
        dict(chosen='x', rejected='y'),
        dict(prompt='q', chosen='x'),
    ]
    (tmp_path / 'p.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    out = run(
        tmp_path,
        'prepare/preferences.py',
        '--input=p.jsonl',
        '--name=p',
        '--tokenizer=bytes',
        '--val_fraction=0.3',
    )
    got = learned_of(str(tmp_path / 'data/p'), 'train') + learned_of(
        str(tmp_path / 'data/p'), 'val'
    )
    assert sorted(x for _, x in got) == sorted(
        [f'good {i}<|im_end|>' for i in range(18)] + ['bad<|im_end|>'] * 18
    )
    assert (
        'chosen and rejected are the same' in out
        and "no field 'prompt'" in out
        and "no field 'rejected'" in out
    )


@pytest.mark.slow
def test_the_copy_task_learns_the_copy(tmp_path):
    run(tmp_path, 'prepare/copy_task.py', '--examples=500', '--max_letters=6', '--symbols=abc')
    folder = str(tmp_path / 'data/copy_task')
    got = learned_of(folder, 'train') + learned_of(folder, 'val')
    assert len({text for text, _ in got}) == len(got) > 300
    for text, learned in got:
        assert (
            text == learned.removesuffix('<|endoftext|>') + '>' + learned
            and 4 <= len(learned) - 13 <= 6
        )
    assert 'symbols without >' in fails(tmp_path, 'prepare/copy_task.py', '--symbols=a>')


def test_a_dataset_without_masks_takes_the_place_of_one_with_them(tmp_path):
    run(tmp_path, 'prepare/copy_task.py', '--examples=200', '--name=x', '--shard_tokens=1000')
    assert (tmp_path / 'data/x/train_000001.mask.bin').exists() and read_meta(
        str(tmp_path / 'data/x')
    )['masked']
    run(tmp_path, 'prepare/copy_task.py', '--examples=200', '--name=x')
    assert (tmp_path / 'data/x/train.mask.bin').exists() and not (
        tmp_path / 'data/x/train_000001.mask.bin'
    ).exists()
    (tmp_path / 'x.txt').write_text('some text ' * 100)
    run(tmp_path, 'prepare/text.py', '--input=x.txt', '--name=x', '--tokenizer=bytes')
    assert sorted(os.listdir(tmp_path / 'data/x')) == [
        'meta.json',
        'tokenizer.json',
        'train.bin',
        'val.bin',
    ]


@pytest.mark.slow
def test_a_tokenizer_is_made_first_for_shards(tmp_path):
    (tmp_path / 'x.jsonl').write_text(
        ''.join(json.dumps({'text': f'document {i} of many <|im_end|>'}) + '\n' for i in range(200))
    )
    run(
        tmp_path,
        'prepare/text.py',
        '--input=x.jsonl',
        '--name=mine',
        '--tokenizer=train',
        '--vocab_size=280',
        '--target_tokens=1',
    )
    for i in range(2):
        run(
            tmp_path,
            'prepare/text.py',
            '--input=x.jsonl',
            '--name=x',
            '--tokenizer=data/mine',
            '--val_fraction=0.1',
            '--num_shards=2',
            f'--shard={i}',
        )
    run(tmp_path, 'prepare/merge.py', '--name=x')
    assert (tmp_path / 'data/x/tokenizer.json').read_bytes() == (
        tmp_path / 'data/mine/tokenizer.json'
    ).read_bytes()
    spelled_out = read_meta(str(tmp_path / 'data/x'))['spelled_out']['<|im_end|>']
    assert spelled_out == dict(count=200, first=[f'x.jsonl:{i}' for i in (1, 2, 3)])


def test_one_conversation_alone_cannot_be_split(tmp_path):
    (tmp_path / 'one.json').write_text(json.dumps([{'instruction': 'hi', 'output': 'ho'}]))
    assert 'gives no val text' in fails(
        tmp_path, 'prepare/chat.py', '--input=one.json', '--name=x', '--tokenizer=bytes'
    )
    assert not (tmp_path / 'data/x').exists()
    (tmp_path / 'two.json').write_text(
        json.dumps([{'instruction': 'hi', 'output': 'ho'}, {'instruction': 'hu', 'output': 'he'}])
    )
    run(tmp_path, 'prepare/chat.py', '--input=two.json', '--name=x', '--tokenizer=bytes')
    assert [x for s in ('train', 'val') for _, x in learned_of(str(tmp_path / 'data/x'), s)] == [
        'ho<|im_end|>',
        'he<|im_end|>',
    ]
