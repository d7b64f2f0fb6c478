"""Reading goes on from any position exactly where it was; the slices of a source are the whole."""

import gzip
import json
import random

import pyarrow
import pyarrow.parquet
import pytest

from fledge.corpus import sources
from fledge.corpus.sources import Files, Made, Text


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


@pytest.mark.parametrize('separator', ['<|end|>', '\n\n', '%', 'aa'])
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
    monkeypatch.setattr(sources, 'PART_BYTES', 90)
    source = Files([str(path)], separator=separator)
    whole = list(source.read())
    texts, parts = [''], 0
    for record, (_, line), _ in whole:
        begin = content.encode().decode().split('\n')[line - 1]
        assert record.text.split('\n')[0].strip('\r') in begin
        texts[-1] += record.text
        parts += not record.last
        if record.last:
            texts.append('')
    assert texts == [*expected, ''] and parts > 3
    for k, (_, _, position) in enumerate(whole, 1):
        again = source.read(json.loads(json.dumps(position)))
        assert comparable(again) == comparable(whole[k:])
    for n in (2, 7, 40):
        slices = [comparable(source.read(None, i, n)) for i in range(n)]
        assert sum(slices, []) == comparable(whole) and sum(map(bool, slices)) > 1


def test_what_is_made_has_slices_too():
    source = Made('numbers', 10, lambda i: i)
    assert [r for i in range(3) for r, _, _ in source.read(None, i, 3)] == list(range(10))
    assert [r for r, _, _ in source.read(4)] == [4, 5, 6, 7, 8, 9]
