"""Reading goes on from any position exactly where it was; the slices of a source are the whole."""

import gzip
import json
import random
import tracemalloc
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from conftest import shared

from fledge.corpus import Stage, encoding, sources
from fledge.corpus.sources import Files, Made, Text
from fledge.tokenizer import load_tokenizer


def files_of_every_kind(folder):
    lines = [json.dumps({'text': f'line {i} ' + 'x' * (i * 7 % 60)}) for i in range(40)]
    (folder / 'a.jsonl').write_text('\n'.join(lines) + '\n\n')
    (folder / 'b.jsonl.gz').write_bytes(gzip.compress('\n'.join(lines[:20]).encode()))
    (folder / 'c.json').write_text(json.dumps([{'text': f'item {i}'} for i in range(15)]))
    (folder / 'd.json').write_text('\n'.join(lines[5:9]))
    pyarrow.parquet.write_table(
        pyarrow.table({'text': [f'row {i}' for i in range(50)], 'other': range(50)}),
        folder / 'e.parquet',
        row_group_size=12,
    )
    (folder / 'f.txt').write_bytes(b'short \xff text')
    (folder / 'g.md').write_text('\n'.join(f'a long text, part {i}' for i in range(30)))
    (folder / 'h.txt').write_text('')
    (folder / 'i.parquet').write_bytes(b'no parquet')
    return [str(folder)]


def comparable(read):
    return [(repr(record), place) for record, place, _ in read]


def test_files_go_on_from_every_position(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, 'PART_BYTES', 100)
    paths = files_of_every_kind(tmp_path)
    whole = list(Files(paths, columns=['text']).read())
    assert (
        len(whole) > 130
        and sum(isinstance(record, Text) and record.key != '' for record, _, _ in whole) > 3
    )
    for k, (_, _, position) in enumerate(whole, 1):
        assert comparable(
            Files(paths, columns=['text']).read(json.loads(json.dumps(position)))
        ) == comparable(whole[k:])


@pytest.mark.parametrize('n', [1, 2, 3, 7, 40])
def test_slices_of_files_are_the_whole_in_order(tmp_path, monkeypatch, n):
    monkeypatch.setattr(sources, 'PART_BYTES', 100)
    source = Files(files_of_every_kind(tmp_path), columns=['text'])
    assert [r for i in range(n) for r in comparable(source.read(None, i, n))] == comparable(
        source.read()
    )
    for i in range(n):
        part = list(source.read(None, i, n))
        for k in range(0, len(part), 5):
            assert comparable(source.read(part[k][2], i, n)) == comparable(part[k + 1 :])


def test_parts_are_cut_between_words_and_never_within_a_character(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, 'PART_BYTES', 50)
    for name, text in dict(
        words='one two\nthree  four\n\n five;\nsix\n' * 20, none='é中😀' * 60, lines='- é\n' * 60
    ).items():
        (tmp_path / f'{name}.txt').write_text(text, encoding='utf-8')
        parts = [record for record, _, _ in Files([str(tmp_path / f'{name}.txt')]).read()]
        assert (
            ''.join(p.text for p in parts) == text
            and [p.last for p in parts] == [False] * (len(parts) - 1) + [True]
            and len({p.key for p in parts}) == 1
        )
        if name == 'words':
            assert all(p.text[0] == '\n' and p.text[1].isalnum() for p in parts[1:])


def test_parts_have_the_tokens_of_the_whole_where_a_space_is_put_in_front(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, 'PART_BYTES', 300)
    encoder = load_tokenizer(shared('stories260k'))
    stages = [Stage(None, lambda text: [text], 'train')]
    encoding.set_job(SimpleNamespace(min_length=0), stages, encoder, False)
    for text in ('one day\nthe cat sat.\n\n  It ran \n' * 40, ' - é\n\n' * 200, 'a b中' * 200):
        (tmp_path / 'a.txt').write_text(text, encoding='utf-8')
        parts = [(record, place) for record, place, _ in Files([str(tmp_path / 'a.txt')]).read()]
        ids = [int(i) for example in encoding.tokenize(0, parts) for i in example.ids]
        assert len(parts) > 3 and encoder.decode(ids[1:-1]) == text
        if '\n' in text:  # else it is cut within a word
            assert ids == [1, *encoder.encode(text), 2]


@pytest.mark.parametrize(
    'content, texts',
    [
        ('{\n "text": "a",\n "tags": []\n}', ['a']),
        ('{"text": "a"}', ['a']),
        ('{"n": 2,\n "data": [{"text": "a"},\n {"text": "b"}]}', ['a', 'b']),
        ('\ufeff{"data": [{"text": "a"}, {"text": "b"}]}\n', ['a', 'b']),
        ('{"a": [{"text": "a"}], "b": [{"text": "b"}], "text": "c"}', ['c']),
        ('{"messages": [{"role": "user"}], "text": "c"}', ['c']),
        ('\n{"text": "a"}\n\n{"text": "b"}\n', ['a', 'b']),
        ('[{"text": "a"},\n {"text": "b"}]', ['a', 'b']),
    ],
)
def test_json_of_every_form(tmp_path, content, texts):
    for codec in ('utf-8', 'utf-16'):
        (tmp_path / 'a.json').write_text(content, encoding=codec)
        source = Files([str(tmp_path / 'a.json')])
        for n in (1, 3):
            records = [record for i in range(n) for record, _, _ in source.read(None, i, n)]
            lines = [json.loads(r) if isinstance(r, bytes) else r for r in records]
            assert [line['text'] for line in lines] == texts


def test_json_of_lines_is_not_held(tmp_path):
    lines = [json.dumps(dict(text='x' * 1000)) for _ in range(5000)]
    (tmp_path / 'a.json').write_text('\n'.join([*lines, '{"broken']))
    tracemalloc.start()
    assert sum(1 for _ in Files([str(tmp_path / 'a.json')]).read()) == 5001
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize('separator', ['<|end|>', '\n\n', '\n', '%', 'aa'])
def test_separated_texts_are_those_of_the_whole_for_any_slice_and_position(
    tmp_path, monkeypatch, separator
):
    rng = random.Random(2)
    words = ['one', 'é中', '\n', ' ', 'a', '<|', separator, separator, '\r\n', 'long words\n' * 9]
    content = '\ufeff' + ''.join(rng.choices(words, k=400)) + 'x' * 300
    path = tmp_path / 'a.txt'
    path.write_bytes(content.encode())
    first, *rest = content[1:].split(separator)
    first, last = first.rstrip('\r\n'), rest.pop().lstrip('\r\n')
    expected = [text for text in (first, *(t.strip('\r\n') for t in rest), last) if text.strip()]
    expected = [text.replace('\r\n', '\n') for text in expected]
    monkeypatch.setattr(sources, 'PART_BYTES', 90)
    source = Files([str(path)], separator=separator)
    whole = list(source.read())
    assert [record.text for record, _, _ in whole] == expected
    for record, (_, line), _ in whole:
        begin = content.split('\n')[line - 1]
        assert record.text.split('\n')[0].strip('\r') in begin
    for k, (_, _, position) in enumerate(whole, 1):
        again = source.read(json.loads(json.dumps(position)))
        assert comparable(again) == comparable(whole[k:])
    for n in (2, 7, 40):
        slices = [comparable(source.read(None, i, n)) for i in range(n)]
        assert sum(slices, []) == comparable(whole) and sum(map(bool, slices)) > 1
    windows = tmp_path / 'windows.txt'
    windows.write_bytes(content.removeprefix('\ufeff').encode('utf-16'))
    records = Files([str(windows)], separator=separator).read()
    assert [record.text for record, _, _ in records] == expected
    monkeypatch.setattr(sources, 'LONGEST', 250)
    last, _, _ = list(source.read())[-1]
    assert str(last) == 'more than 0 MB without a separator'


def test_what_is_made_has_slices_too():
    source = Made('numbers', 10, lambda i: i)
    assert [r for i in range(3) for r, _, _ in source.read(None, i, 3)] == list(range(10))
    assert [r for r, _, _ in source.read(4)] == [4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize('part_bytes', range(40, 60))
def test_windows_ends_of_lines_are_newlines_wherever_a_long_text_is_cut(
    tmp_path, monkeypatch, part_bytes
):
    monkeypatch.setattr(sources, 'PART_BYTES', part_bytes)
    content = '\r\n'.join(f'line {i}!' for i in range(40))
    (tmp_path / 'a.txt').write_bytes(content.encode())
    texts = [record.text for record, _, _ in Files([str(tmp_path / 'a.txt')]).read()]
    assert len(texts) > 5 and ''.join(texts) == content.replace('\r\n', '\n')
