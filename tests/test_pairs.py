"""Sources and their targets: copy_task.py and translate.py, on files of every kind."""

import json
import os
import random

import pyarrow
import pyarrow.parquet
import pytest
from conftest import TINY, fails, run
from test_prepare import learned_of

from fledge import read_meta

END = '<|endoftext|>'


def pairs_of(folder, split, separator='\t'):
    """(source, target) of each document of a split, by its mask: what is learned is the target."""
    pairs = []
    for text, learned in learned_of(str(folder), split):
        assert text.endswith(separator + learned) and learned.endswith(END)
        source = text.removesuffix(learned).removesuffix(separator)
        pairs.append((source, learned.removesuffix(END)))
    return pairs


def translated(folder, *flags):
    """What translate.py prints, and all pairs that it makes of val and train."""
    flags = ['--name=x', '--tokenizer=bytes', '--val_fraction=0.3', *flags]
    out = run(folder, 'prepare/translate.py', *flags)
    return out, pairs_of(folder / 'data/x', 'val') + pairs_of(folder / 'data/x', 'train')


def write_pairs(path, n):
    lines = [f'source {i}\ttarget {i}\n' for i in range(n)]
    path.write_text(''.join(lines))


@pytest.mark.parametrize('task', ['copy', 'reverse', 'sort'])
def test_the_target_is_what_the_task_makes_of_the_letters(tmp_path, task):
    run(tmp_path, 'prepare/copy_task.py', f'--task={task}', '--examples=300', '--symbols=dbca')
    folder = tmp_path / 'data/copy_task'
    assert read_meta(str(folder))['separator'] == '>'
    assert read_meta(str(folder))['source'] == f'the {task} task'
    pairs = pairs_of(folder, 'train', '>') + pairs_of(folder, 'val', '>')
    assert len(pairs) > 250
    expected = dict(copy=str, reverse=lambda s: s[::-1], sort=lambda s: ''.join(sorted(s)))[task]
    assert [target for _, target in pairs] == [expected(source) for source, _ in pairs]


def test_no_sequence_of_val_is_in_train(tmp_path):
    flags = ['--examples=3000', '--min_letters=1', '--max_letters=3', '--symbols=abc']
    flags += ['--task=sort', '--val_fraction=0.3']
    run(tmp_path, 'prepare/copy_task.py', *flags)
    val = [source for source, _ in pairs_of(tmp_path / 'data/copy_task', 'val', '>')]
    train = [source for source, _ in pairs_of(tmp_path / 'data/copy_task', 'train', '>')]
    assert len(val) > 3 and len(val + train) == len(set(val + train)) == 3 + 9 + 27


def test_an_unknown_task_is_one_line(tmp_path):
    line = fails(tmp_path, 'prepare/copy_task.py', '--task=add')
    assert line == "error: task='add' is none of copy, reverse, sort\n"


def test_lines_are_a_source_a_tab_and_its_target(tmp_path):
    attribution = 'CC-BY 2.0 (France) Attribution: tatoeba.org #2877272 (CM)'
    lines = [f'\ufeffGo.\tGeh.\t{attribution}', '', ' Hi! \t Hallo! ', 'Go.\tGeh.', 'Run.\tLauf!']
    (tmp_path / 'deu.txt').write_bytes('\r\n'.join(lines).encode())
    (tmp_path / 'windows.TSV').write_bytes('Sea\tMéer 中 😀\r\n'.encode('utf-16'))
    (tmp_path / 'latin.tab').write_bytes(
        b'coffee\tcaf\xe9 ' + b'and much more text' * 99 + b'\nTea\tTee'
    )
    out, pairs = translated(tmp_path, '--input=deu.txt,windows.TSV,latin.tab')
    latin = 'caf� ' + 'and much more text' * 99
    expected = [('Go.', 'Geh.'), ('Hi!', 'Hallo!'), ('Run.', 'Lauf!'), ('Sea', 'Méer 中 😀')]
    assert sorted(pairs) == sorted([*expected, ('coffee', latin), ('Tea', 'Tee')])
    assert 'repaired: 1 x invalid UTF-8 (latin.tab:1)\n' in out
    assert read_meta(str(tmp_path / 'data/x'))['dropped'] == {
        'a duplicate': dict(count=1, first=[])
    }
    assert read_meta(str(tmp_path / 'data/x'))['separator'] == '\t'


def test_lines_without_a_pair_are_counted_named_and_left_out(tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/a.md').write_text('a\tb\n')
    lines = ['one\teins', 'no tab here', 'two\tzwei', '\tdrei', 'four\t ', '   \tfünf', 'six  6']
    lines += ['', ' \t ', 'seven\tsieben']
    (tmp_path / 'mine/b.tsv').write_text('\n'.join(lines))
    out, pairs = translated(tmp_path, '--input=mine')
    assert sorted(pairs) == [('one', 'eins'), ('seven', 'sieben'), ('two', 'zwei')]
    b = 'mine/b.tsv:'
    assert read_meta(str(tmp_path / 'data/x'))['dropped'] == {
        'a file of another kind': dict(count=1, first=['mine/a.md']),
        'a line without a tab': dict(count=2, first=[b + '2', b + '7']),
        'an empty source': dict(count=2, first=[b + '4', b + '6']),
        'an empty target': dict(count=1, first=[b + '5']),
    }
    assert f'left out: 2 x a line without a tab ({b}2, {b}7)\n' in out


def test_records_have_source_and_target_in_fields(tmp_path):
    rows = [dict(source=f'text\n{i}', target=f'tab\there {i}') for i in range(9)]
    bad = [
        dict(source='a\tb', target='c'),
        dict(source='a'),
        dict(source=' ', target='c'),
        dict(source='a', target=7),
        [1],
    ]
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in bad + rows))
    _, pairs = translated(tmp_path, '--input=a.jsonl')
    assert sorted(pairs) == [(row['source'], row['target']) for row in rows]
    dropped = read_meta(str(tmp_path / 'data/x'))['dropped']
    assert {why: n['first'] for why, n in dropped.items()} == {
        "a source with '\\t' in it, which is what ends a source": ['a.jsonl:1'],
        "no field 'target'": ['a.jsonl:2'],
        'an empty source': ['a.jsonl:3'],
        "a field 'target' that is no text": ['a.jsonl:4'],
        'no object': ['a.jsonl:5'],
    }


def test_fields_may_be_in_an_object_as_on_the_hub(tmp_path):
    rows = [dict(translation=dict(en=f'the {i}', de=f'der {i}')) for i in range(9)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'a.parquet')
    rows += [dict(translation='the'), dict(translation=None), dict(en='a', de='b'), 7]
    (tmp_path / 'b.json').write_text(json.dumps(rows))
    flags = ['--source=translation.en', '--target=translation.de']
    _, pairs = translated(tmp_path, '--input=a.parquet,b.json', *flags)
    assert sorted(pairs) == [(f'the {i}', f'der {i}') for i in range(9)]
    no_object = dict(count=4, first=['b.json:10', 'b.json:11', 'b.json:12'])
    dropped = read_meta(str(tmp_path / 'data/x'))['dropped']
    assert dropped == {"no object 'translation'": no_object, 'a duplicate': dict(count=9, first=[])}


def test_no_source_is_in_train_and_val_whatever_its_targets(tmp_path):
    lines = [f'{i // 5}\ttarget {i}\n' for i in range(500)]
    (tmp_path / 'a.tsv').write_text(''.join(lines))
    _, pairs = translated(tmp_path, '--input=a.tsv')
    assert len(pairs) == 500
    sources = {
        split: {s for s, _ in pairs_of(tmp_path / 'data/x', split)} for split in ('val', 'train')
    }
    assert len(sources['val']) > 10 and len(sources['val'] | sources['train']) == 100
    assert not sources['val'] & sources['train']


def test_val_may_be_pairs_of_its_own(tmp_path):
    write_pairs(tmp_path / 'a.tsv', 20)
    write_pairs(tmp_path / 'b.tsv', 3)
    translated(tmp_path, '--input=a.tsv', '--val=b.tsv')
    assert pairs_of(tmp_path / 'data/x', 'val') == [
        (f'source {i}', f'target {i}') for i in range(3)
    ]
    assert len(pairs_of(tmp_path / 'data/x', 'train')) == 17


@pytest.mark.slow
@pytest.mark.parametrize('codec', ['utf-8', 'utf-16'])
def test_slices_are_joined_and_are_still_pairs(tmp_path, codec):
    draw = random.Random(3)
    lines = [f'{i}\t' + 'é' * draw.randint(1, 30) + '\r\n' for i in range(400)]
    (tmp_path / 'a.tsv').write_bytes(''.join(lines).encode(codec))
    _, whole = translated(tmp_path, '--input=a.tsv')
    flags = ['--name=y', '--tokenizer=bytes', '--val_fraction=0.3', '--num_shards=3']
    for i in range(3):
        run(tmp_path, 'prepare/translate.py', '--input=a.tsv', *flags, f'--shard={i}')
    run(tmp_path, 'prepare/merge.py', '--name=y')
    assert read_meta(str(tmp_path / 'data/y'))['separator'] == '\t'
    joined = sum(
        read_meta(str(tmp_path / 'data/y'))['splits'][s]['documents'] for s in ('train', 'val')
    )
    assert joined == len(whole) == 400


@pytest.mark.slow
def test_what_is_no_pairs_is_one_line(tmp_path):
    (tmp_path / 'a.txt').write_text('prose\nand more of it\n')
    (tmp_path / 'a.pdf').write_text('x')
    flags = ['--name=x', '--tokenizer=bytes']
    prose = fails(tmp_path, 'prepare/translate.py', '--input=a.txt', *flags)
    assert 'a.txt gives no documents; 2 x a line without a tab (a.txt:1, a.txt:2)' in prose
    pdf = fails(tmp_path, 'prepare/translate.py', '--input=a.pdf', *flags)
    kinds = '.tsv, .tab, .txt, .jsonl, .jsonl.gz, .json or .parquet'
    assert f'a.pdf cannot be read: it is no {kinds} file' in pdf
    assert '--input is needed' in fails(tmp_path, 'prepare/translate.py', *flags)
    assert not os.path.exists(tmp_path / 'data/x')


@pytest.mark.slow
def test_training_makes_the_copy_task_and_names_the_script_for_pairs(tmp_path):
    flags = ['--max_iters=1', '--eval_interval=1', '--sample_interval=0']
    out = run(tmp_path, 'train.py', *TINY, '--dataset=copy_task', *flags)
    assert 'done at step 1' in out
    assert read_meta(str(tmp_path / 'data/copy_task'))['separator'] == '>'
    line = fails(tmp_path, 'train.py', *TINY, '--dataset=translate')
    assert 'prepare/text.py --input=YOUR_FILES --name=translate' in line
    assert 'pairs by translate.py' in line
