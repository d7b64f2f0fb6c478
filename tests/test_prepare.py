"""The scripts in prepare/, on real and on broken text."""
import json
import os
import sys

import numpy as np
import pytest
from conftest import fails, run, shared

from fledge.tokenizer import load_tokenizer
from fledge.tokens import read_bin, read_meta


def texts_of(folder, split):
    """The documents of a prepared split, rebuilt from its tokens."""
    tokenizer, ids = load_tokenizer(folder), read_bin(os.path.join(folder, f'{split}.bin'))
    ends = np.flatnonzero(ids == tokenizer.end_of_text)
    return [tokenizer.decode(part[part != tokenizer.end_of_text]) for part in np.split(ids, ends + 1)[:-1]]


@pytest.mark.slow
def test_stdlib_is_this_pythons_own_source(tmp_path):
    run(tmp_path, 'prepare/stdlib.py')
    folder = str(tmp_path / 'data' / 'stdlib')
    meta = read_meta(folder)
    assert meta['vocab_size'] == 4096 == load_tokenizer(folder).vocab_size and meta['source'].endswith(sys.version.split()[0])
    train, val = texts_of(folder, 'train'), texts_of(folder, 'val')
    for split, texts in (('train', train), ('val', val)):
        n = meta['splits'][split]
        assert n['documents'] == len(texts) and n['bytes'] == sum(len(t.encode()) for t in texts) and n['tokens'] == len(read_bin(f'{folder}/{split}.bin'))
    with open(os.__file__, encoding='utf-8') as f:
        assert f.read() in train + val
    first = {n: (tmp_path / 'data' / 'stdlib' / n).read_bytes() for n in ('train.bin', 'val.bin', 'tokenizer.json')}
    run(tmp_path, 'prepare/stdlib.py', '--num_proc=1')
    assert first == {n: (tmp_path / 'data' / 'stdlib' / n).read_bytes() for n in first}  # the same bytes again


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


def test_shakespeare_in_gpt2s_tokens(tmp_path):
    shared('tiktoken')
    run(tmp_path, 'prepare/shakespeare.py', f'--input={shared("tinyshakespeare", "input.txt")}')
    meta = read_meta(str(tmp_path / 'data' / 'shakespeare'))
    assert {s: n['tokens'] for s, n in meta['splits'].items()} == {'train': 301967, 'val': 36060}  # nanoGPT's, and an end of text each


@pytest.mark.parametrize('script', ['shakespeare', 'shakespeare_char'])
def test_no_network_is_one_line(tmp_path, script):
    if script == 'shakespeare':
        shared('tiktoken')
    assert 'cannot fetch https://' in fails(tmp_path, f'prepare/{script}.py', env={'https_proxy': 'http://127.0.0.1:9'})


@pytest.fixture
def notes(tmp_path):
    """A folder of every kind of file, with broken records among them. Returns the working folder and the texts."""
    import pyarrow
    import pyarrow.parquet
    folder = tmp_path / 'notes'
    (folder / 'deep').mkdir(parents=True)
    texts = [f'note {i}: naïve 😀\r\n\ttext' for i in range(40)]
    (folder / 'a.txt').write_bytes(texts[0].encode())
    (folder / 'deep' / 'b.md').write_bytes(texts[1].encode())
    (folder / 'c.jsonl').write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts[2:20]) + '{"broken\n\n{"title": "no text"}\n{"text": 3}\n')
    pyarrow.parquet.write_table(pyarrow.table({'text': texts[20:] + [None]}), folder / 'd.parquet')
    (folder / 'image.png').write_bytes(b'\x89PNG')
    (folder / 'empty.txt').write_text('')
    return tmp_path, texts


@pytest.mark.parametrize('tokenizer', ['bytes', 'train --vocab_size=300', 'gpt2'])
def test_own_text_of_every_kind(notes, tokenizer):
    folder, texts = notes
    if tokenizer == 'gpt2':
        shared('tiktoken')
    run(folder, 'prepare/text.py', '--input=notes/', '--name=notes', '--val_fraction=0.2', *f'--tokenizer={tokenizer}'.split())
    data = str(folder / 'data' / 'notes')
    train, val = texts_of(data, 'train'), texts_of(data, 'val')
    assert sorted(train + val) == sorted(texts) and 2 <= len(val) <= 16
    assert sorted(os.listdir(data)) == ['meta.json', 'tokenizer.json', 'train.bin', 'val.bin']
    assert 'prepare/text.py --input=notes/' in read_meta(data)['command']
    again = run(folder, 'prepare/text.py', '--input=notes/', '--name=again', '--val_fraction=0.2', '--num_proc=1', f'--tokenizer={data}')
    assert texts_of(str(folder / 'data' / 'again'), 'val') == val, again


@pytest.mark.parametrize('n', [1, 2, 5])
def test_a_few_documents_have_a_val_too(tmp_path, n):
    (tmp_path / 'few.jsonl').write_text(''.join(json.dumps({'text': f'{i} ' * 100 + '\ud800'}) + '\n' for i in range(n)))
    run(tmp_path, 'prepare/text.py', '--input=few.jsonl', '--name=few', '--tokenizer=bytes')
    splits = read_meta(str(tmp_path / 'data' / 'few'))['splits']
    assert splits['val']['tokens'] > 1 and sum(s['bytes'] for s in splits.values()) == n * 201


def test_one_document_is_cut_in_two(tmp_path):
    (tmp_path / 'one.txt').write_text('abcdefghij' * 10)
    run(tmp_path, 'prepare/text.py', '--input=one.txt', '--name=one', '--tokenizer=chars', '--val_fraction=0.1')
    assert len(read_bin(str(tmp_path / 'data/one/train.bin'))) == 90 and len(read_bin(str(tmp_path / 'data/one/val.bin'))) == 10


def test_mistakes_are_one_line(tmp_path):
    text = lambda *flags: fails(tmp_path, 'prepare/text.py', '--name=x', *flags)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'empty.txt').write_text('')
    (tmp_path / 'some.txt').write_text('some text ' * 100)
    (tmp_path / 'broken.parquet').write_text('PAR1')
    (tmp_path / 'file').write_text('')
    assert '--input and --name are needed' in text()
    assert 'nowhere does not exist' in text('--input=nowhere')
    assert 'no .txt, .md, .jsonl or .parquet files there' in text('--input=empty')
    assert 'gives no train and no val text' in text('--input=empty.txt', '--tokenizer=bytes')
    assert 'no tokenizer at nowhere' in text('--input=some.txt', '--tokenizer=nowhere')
    assert 'needs at least 259' in text('--input=some.txt', '--tokenizer=train', '--vocab_size=100')
    assert 'broken.parquet is not readable' in text('--input=broken.parquet', '--tokenizer=bytes')
    assert 'val_fraction=0.0 is not between 0 and 1' in text('--input=some.txt', '--tokenizer=bytes', '--val_fraction=0')
    assert 'num_proc=-1' in text('--input=some.txt', '--tokenizer=bytes', '--num_proc=-1')
    assert 'val_fraction=2' in text('--input=some.txt', '--tokenizer=bytes', '--val_fraction=2')
    (tmp_path / 'linked').mkdir()
    os.symlink('nowhere', tmp_path / 'linked' / 'link.txt')
    assert 'cannot read linked/link.txt' in text('--input=linked', '--tokenizer=bytes')
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table({'body': ['a']}), tmp_path / 'body.parquet')
    assert "no column 'text'; it has body" in text('--input=body.parquet', '--tokenizer=bytes')
    assert not list(tmp_path.glob('data/x/*'))
