"""Documents with masks: what is learned, from which tokens, and how rows are packed with them."""

import collections
import json
import os
import shutil

import numpy as np
import pytest
from conftest import run, shared

import fledge.documents
from fledge import UserError, read_meta
from fledge.documents import Documents, open_split, pack
from fledge.tokenizer import byte_tokenizer, char_tokenizer
from fledge.tokens import Tokens, read_bin, split_files, write_bin

VOCAB_SIZE = byte_tokenizer().vocab_size
END = byte_tokenizer().end_of_text


def write(folder, documents, split='train', cuts=(), pairs=False, begin=()):
    """A prepared dataset: documents are lists of (token, learned) without their end of text.

    cuts: the places in the stream of all tokens at which another shard begins.
    """
    stream = [pair for document in documents for pair in [*document, (END, 0)]]
    bounds = [0, *cuts, len(stream)]
    for i in range(len(bounds) - 1):
        name = f'{split}_{i:06d}' if cuts else split
        ids, learned = zip(*stream[bounds[i] : bounds[i + 1]], strict=True)
        write_bin(str(folder / f'{name}.bin'), ids, VOCAB_SIZE)
        np.array(learned, np.uint8).tofile(folder / f'{name}.mask.bin')
    byte_tokenizer().save(str(folder / 'tokenizer.json'))
    meta = dict(vocab_size=VOCAB_SIZE, masked=True, pairs=pairs, begin=list(begin))
    (folder / 'meta.json').write_text(json.dumps(meta))
    return str(folder)


def some_documents(n, longest, seed=0):
    """Random documents with some learned stretches, some with none and some of a single token."""
    rng, documents = np.random.default_rng(seed), []
    for _ in range(n):
        length = int(rng.integers(1, longest + 1))
        ids = rng.integers(0, 256, length).tolist()
        learned = (rng.random(length) < rng.choice([0.0, 0.05, 0.5])).astype(int).tolist()
        documents.append(list(zip(ids, learned, strict=True)))
    return documents


def expected(documents, block_size):
    """How often each (tokens before it, learned target) has to occur in an epoch."""
    found = collections.Counter()
    for document in documents:
        ids = [token for token, _ in document] + [END]
        for place, (token, learned) in enumerate(document):
            if learned and place > 0:
                piece = (place - 1) // block_size * block_size  # where its piece begins
                found[tuple(ids[piece:place]), token] += 1
    return found


def predictions(batch):
    """How often each (tokens before it in its document, target) occurs in a batch."""
    found = collections.Counter()
    inputs, targets, numbers = batch['inputs'], batch['targets'], batch['documents']
    for row, place in np.argwhere(targets >= 0).tolist():
        number = numbers[row, place]
        first = int(np.flatnonzero(numbers[row] == number)[0])
        assert (numbers[row, first : place + 1] == number).all()  # in one stretch
        before = tuple(inputs[row, first : place + 1].tolist())
        found[before, int(targets[row, place])] += 1
    return found


@pytest.mark.parametrize('cuts', [(), (700, 701, 1500)])
@pytest.mark.parametrize('block_size', [16, 40, 200])
def test_each_learned_target_is_predicted_once_an_epoch_from_the_tokens_before_it(
    tmp_path, block_size, cuts, monkeypatch
):
    documents = some_documents(150, 60)
    wanted = expected(documents, block_size)
    folder = write(tmp_path, documents, cuts=cuts)
    data = Documents(folder, 'train', block_size, VOCAB_SIZE, 5)
    for epoch in (0, 1, 7):
        batch = data.rows(epoch * data.n_rows, data.n_rows)
        assert predictions(batch) == wanted
        for name in ('inputs', 'targets', 'documents'):
            assert batch[name].shape == (data.n_rows, block_size)
            assert batch[name].dtype == np.int64
    assert predictions(data.evaluation_batch(data.evaluation_rows())) == wanted
    assert data.n_learned == wanted.total() and data.n_tokens == data.n_rows * block_size
    monkeypatch.setattr(
        fledge.documents, 'TOKENS_AT_ONCE', 100
    )  # loaded bit by bit, it is the same
    in_parts = Documents(folder, 'train', block_size, VOCAB_SIZE, 5)
    assert predictions(in_parts.rows(0, in_parts.n_rows)) == wanted
    assert in_parts.n_learned == data.n_learned


def test_sources_and_targets_are_the_same_loaded_bit_by_bit(tmp_path, monkeypatch):
    folder = write(tmp_path, some_documents(150, 60), cuts=(700, 701, 1500))
    whole = Documents(folder, 'train', 64, VOCAB_SIZE, with_sources=True)
    monkeypatch.setattr(fledge.documents, 'TOKENS_AT_ONCE', 7)
    in_parts = Documents(folder, 'train', 64, VOCAB_SIZE, with_sources=True)
    assert in_parts.n_documents == whole.n_documents > 50
    for number in range(whole.n_documents):
        assert in_parts.source_and_target(number) == whole.source_and_target(number)


def test_a_batch_counts_its_documents_and_padding_belongs_to_none(tmp_path):
    documents = [
        [(1, 0), (2, 1), (3, 1), (4, 0), (5, 0)],  # nothing behind the 3 teaches: 2 positions
        [(6, 1), (7, 0), (8, 1)],
        [(9, 0), (10, 0), (11, 0), (12, 1)],
    ]
    data = Documents(write(tmp_path, documents), 'train', 5, VOCAB_SIZE, 0)
    batch = data.evaluation_batch([0, 1])
    inputs, targets = batch
    # the longest first: 3, then 2 beside it, and 2 in a row of their own
    assert inputs.tolist() == [[1, 2, 9, 10, 11], [6, 7, 0, 0, 0]]
    assert targets.tolist() == [[2, 3, -1, -1, 12], [-1, 8, -1, -1, -1]]
    assert batch['documents'].tolist() == [[0, 0, 1, 1, 1], [2, 2, -1, -1, -1]]
    assert data.documents_of([0, 1]).tolist() == [0, 2, 1]
    assert data.documents_of([1]).tolist() == [1]
    assert data.evaluation_batch([1])['documents'].tolist() == [[0, 0, -1, -1, -1]]
    assert (data.n_documents, data.n_learned, data.used) == (3, 4, 0.7)


def test_a_batch_carries_the_values_of_its_documents(tmp_path):
    data = Documents(write(tmp_path, some_documents(60, 30)), 'train', 32, VOCAB_SIZE, 0)
    data.of_documents['first_input'] = np.empty(data.n_documents, np.float32)
    for row in data.evaluation_rows():
        batch, numbers = data.evaluation_batch([row]), data.documents_of([row])
        for i, number in enumerate(numbers):
            first = np.flatnonzero(batch['documents'][0] == i)[0]
            data.of_documents['first_input'][number] = batch['inputs'][0, first]
    batch = data.rows(0, data.n_rows)
    numbers = batch['documents']
    assert batch['first_input'].dtype == np.float32
    assert len(batch['first_input']) == numbers.max() + 1 == data.n_documents
    for i, value in enumerate(batch['first_input'].tolist()):
        row, place = np.argwhere(numbers == i)[0]
        assert batch['inputs'][row, place] == value


def test_a_document_longer_than_a_row_is_cut_into_pieces(tmp_path):
    long = [(i, 1) for i in range(12)]
    late = [(i, int(i in (32, 36))) for i in range(20, 40)]  # its first piece teaches nothing
    short = [(i, int(i < 44)) for i in range(40, 60)]  # all that teaches fits in a row
    nothing = [(i, 0) for i in range(60, 80)]
    first_alone = [(80, 1), (81, 0)]  # nothing stands before a first token
    documents = [long, late, short, nothing, first_alone]
    data = Documents(write(tmp_path, documents), 'train', 10, VOCAB_SIZE, 0)
    assert (data.n_cut, data.n_left_out, data.n_documents) == (2, 2, 4)
    found = {}
    for row in data.evaluation_rows():
        batch = data.evaluation_batch([row])
        for number in range(batch['documents'].max() + 1):
            here = batch['documents'][0] == number
            inputs = batch['inputs'][0, here].tolist()
            found[inputs[0]] = inputs, batch['targets'][0, here].tolist()
    assert found == {
        0: (list(range(10)), list(range(1, 11))),
        10: ([10], [11]),
        30: ([30, 31, 32, 33, 34, 35], [-1, 32, -1, -1, -1, 36]),
        40: ([40, 41, 42], [41, 42, 43]),
    }
    line = data.summary()
    assert line.startswith('4 documents in 2 rows of 10, 100.0% of them used; 80.0% of their')
    assert line.endswith('2 cut (longer than a row), 2 left out (nothing to learn)')


def test_the_same_rows_for_any_batch_geometry_and_another_order_each_epoch(tmp_path):
    folder = write(tmp_path, some_documents(300, 40))
    data = Documents(folder, 'train', 48, VOCAB_SIZE, 3)
    n = data.n_rows
    whole = Documents(folder, 'train', 48, VOCAB_SIZE, 3).rows(0, 3 * n)
    for first, count in ((2 * n - 3, 7), (0, 1), (n - 1, 2), (5, n)):  # in any order
        batch = data.rows(first, count)
        for name in ('inputs', 'targets'):
            assert np.array_equal(batch[name], whole[name][first : first + count])
        within = batch['documents'][batch['documents'] >= 0]
        assert np.array_equal(np.unique(within), np.arange(within.max() + 1))
    epochs = whole['inputs'].reshape(3, n, 48)
    assert not np.array_equal(epochs[0], epochs[1])
    for epoch in epochs:  # the same rows in another order
        assert sorted(epoch.tolist()) == sorted(epochs[0].tolist())
    other = Documents(folder, 'train', 48, VOCAB_SIZE, 4).rows(0, n)
    assert not np.array_equal(other['inputs'], epochs[0])
    order = np.random.default_rng([3, 1]).permutation(n)
    assert np.array_equal(data.evaluation_batch(order)['inputs'], epochs[1])


def test_evaluation_reads_rows_spread_evenly(tmp_path):
    data = Documents(write(tmp_path, some_documents(100, 40)), 'train', 48, VOCAB_SIZE)
    assert data.evaluation_rows() == list(range(data.n_rows)) == data.evaluation_rows(9999)
    assert data.evaluation_rows(4) == [i * data.n_rows // 4 for i in range(4)]


def test_weight_is_what_a_mean_over_the_rows_is_over(tmp_path):
    data = Documents(write(tmp_path, some_documents(200, 40)), 'train', 48, VOCAB_SIZE, 0)
    for first, count in ((0, 1), (3, 8), (data.n_rows - 2, 5)):
        targets = data.rows(first, count)['targets']
        assert data.weight(first, count) == (targets >= 0).sum() > 0
    (tmp_path / 'train.mask.bin').unlink()
    stream = Tokens(str(tmp_path), 'train', 48, VOCAB_SIZE, 0)
    assert stream.weight(3, 8) == (stream.rows(3, 8)['targets'] >= 0).sum() == 8 * 48


def test_pairs_stay_together_and_a_batch_counts_them(tmp_path):
    documents = []
    for i in range(80):  # the chosen begins with its number, the rejected with 100 more
        chosen = [(i, 0), *((j, 1) for j in range(i % 7 + 1))]
        rejected = [(100 + i, 0), *((j, 1) for j in range(i % 5 + 1))]
        documents += [chosen, rejected]
    folder = write(tmp_path, documents, pairs=True, cuts=(100, 303))
    data = Documents(folder, 'train', 24, VOCAB_SIZE, 0)
    assert data.pairs and data.n_documents == 160 and data.n_left_out == 0
    seen, n = [], data.n_rows
    for first, count in ((0, 3), (3, n - 3)):
        batch = data.rows(first, count)
        numbers = batch['documents']
        assert data.weight(first, count) == (numbers.max() + 1) // 2
        for i in range(0, numbers.max() + 1, 2):
            row, place = np.argwhere(numbers == i)[0]
            other_row, other_place = np.argwhere(numbers == i + 1)[0]
            behind_chosen = np.argwhere(numbers[row] == i)[-1, 0] + 1
            assert (other_row, other_place) == (row, behind_chosen)
            chosen = batch['inputs'][row, place]
            assert batch['inputs'][row, other_place] == 100 + chosen
            seen.append(int(chosen))
    assert sorted(seen) == list(range(80))
    numbers = data.documents_of(data.evaluation_rows())
    assert (numbers[::2] % 2 == 0).all() and (numbers[1::2] == numbers[::2] + 1).all()
    assert data.summary().startswith('80 pairs in ')


def test_pairs_that_do_not_fit_or_teach_on_one_side_are_left_out(tmp_path):
    good, nothing = [(1, 0), (2, 1)], [(3, 0), (4, 0)]
    long = [(i, 1) for i in range(10)]
    documents = [good, long, good, nothing, good, good, nothing, good, nothing, nothing]
    folder = write(tmp_path, documents, pairs=True)
    data = Documents(folder, 'train', 9, VOCAB_SIZE, 0)
    assert (data.n_documents, data.n_left_out, data.n_too_long, data.n_cut) == (2, 4, 1, 0)
    line = data.summary()
    assert '3 left out (nothing to learn), 1 left out (longer than a row; a longer' in line
    data = Documents(folder, 'train', 10, VOCAB_SIZE, 0)  # 9 positions and 1
    assert (data.n_documents, data.n_left_out, data.n_too_long) == (4, 3, 0)
    with pytest.raises(UserError, match='fits in a row of block_size=1: .* --block_size=2$'):
        Documents(folder, 'train', 1, VOCAB_SIZE)
    write(tmp_path, documents[:-1], pairs=True)
    with pytest.raises(UserError, match='train.bin has 9 documents, and pairs are an even'):
        Documents(folder, 'train', 10, VOCAB_SIZE)


def test_an_end_of_text_in_front_of_a_document_ends_none(tmp_path):
    documents = [[(END, 0), (1, 0), (2, 1)], [(END, 0), (3, 0), (4, 1)]]
    data = Documents(write(tmp_path, documents, begin=[END]), 'train', 8, VOCAB_SIZE)
    assert data.n_left_out == 0
    assert data.evaluation_batch([0])['inputs'].tolist() == [[END, 1, END, 3, 0, 0, 0, 0]]


def test_the_last_document_may_lack_its_end(tmp_path):
    folder = write(tmp_path, [[(1, 0), (2, 1)], [(3, 0), (4, 1)]])
    ids = read_bin(str(tmp_path / 'train.bin'))[:-1]
    write_bin(str(tmp_path / 'train.bin'), ids, VOCAB_SIZE)
    os.truncate(tmp_path / 'train.mask.bin', len(ids))
    data = Documents(folder, 'train', 2, VOCAB_SIZE)
    assert data.evaluation_batch([0])['targets'].tolist() == [[2, 4]]


def test_a_split_is_opened_as_what_its_own_files_say(tmp_path):
    folder = write(tmp_path, some_documents(20, 20))
    assert isinstance(open_split(folder, 'train', 16, VOCAB_SIZE, 0), Documents)
    with pytest.raises(UserError, match='no val.bin'):
        open_split(folder, 'val', 16, VOCAB_SIZE)
    write(tmp_path, some_documents(20, 20), split='val')
    assert isinstance(open_split(folder, 'val', 16, VOCAB_SIZE), Documents)
    (tmp_path / 'val.mask.bin').unlink()
    with pytest.raises(UserError, match='none beside .*val.bin: prepare it again'):
        open_split(folder, 'val', 16, VOCAB_SIZE)
    (tmp_path / 'train.mask.bin').unlink()
    assert isinstance(open_split(folder, 'val', 16, VOCAB_SIZE), Tokens)


@pytest.mark.parametrize(
    'breakage, words',
    [
        (lambda folder: os.truncate(folder / 'train_000001.mask.bin', 9), '9 bytes for .* tokens'),
        (lambda folder: (folder / 'train_000001.mask.bin').unlink(), 'mask.bin is missing'),
        (lambda folder: (folder / 'tokenizer.json').unlink(), 'has no tokenizer.json'),
        (
            lambda folder: char_tokenizer('abc').save(str(folder / 'tokenizer.json')),
            'a tokenizer without end of text',
        ),
        (
            lambda folder: write_bin(str(folder / 'train_000001.bin'), [300] * 60, VOCAB_SIZE),
            'bytes for 60 tokens',
        ),
    ],
)
def test_broken_data_is_named_with_its_remedy(tmp_path, breakage, words):
    folder = write(tmp_path, some_documents(20, 20), cuts=(50,))
    breakage(tmp_path)
    with pytest.raises(UserError, match=words) as e:
        open_split(folder, 'train', 16, VOCAB_SIZE, 0)
    assert str(tmp_path) in str(e.value) and str(e.value).endswith('again')
    assert '\n' not in str(e.value)


def test_tokens_beyond_the_vocabulary_are_named(tmp_path):
    folder = write(tmp_path, [[(1, 0), (2, 1)], [(3, 0), (4, 1), (200, 0)]], cuts=(3,))
    words = 'train_000001.bin holds token 256 at position 3, beyond the vocabulary of 256'
    write_bin(str(tmp_path / 'train_000000.bin'), [1, 2, 3], VOCAB_SIZE)
    with pytest.raises(UserError, match=f'{words}: the model has no such tokens'):
        Documents(folder, 'train', 16, 256)


def test_data_with_nothing_to_learn_is_named(tmp_path):
    folder = write(tmp_path, [[(1, 1), (2, 0)], [(3, 1)]])
    with pytest.raises(UserError, match='train.bin has nothing to learn'):
        Documents(folder, 'train', 16, VOCAB_SIZE)


@pytest.fixture(scope='module')
def talks(tmp_path_factory):
    """Two real datasets of conversations, prepared as a user prepares them."""
    folder = tmp_path_factory.mktemp('talks')
    shared('tiktoken')
    instructions = shared('instructions', 'instruction-data.json')
    questions = shared('gsm8k', 'train.jsonl')
    flags = ['--tokenizer=gpt2', '--num_proc=2']
    run(folder, 'prepare/chat.py', f'--input={instructions}', '--name=instructions', *flags)
    run(folder, 'prepare/chat.py', f'--input={instructions},{questions}', '--name=both', *flags)
    return folder / 'data'


@pytest.mark.slow
@pytest.mark.parametrize(
    'name, block_size',
    [
        ('instructions', 256),
        ('instructions', 512),
        ('instructions', 1024),
        ('both', 512),
        ('both', 1024),
    ],
)
def test_rows_of_real_conversations_are_full(talks, name, block_size):
    data = open_split(str(talks / name), 'train', block_size, 50304)
    assert data.used > 0.97
    meta = read_meta(str(talks / name))['splits']['train']
    assert data.n_documents == meta['documents'] and data.n_learned == meta['learned']


def test_each_length_is_packed_into_the_fullest_row_that_it_fits_in():
    rows, n_rows = pack(np.array([2, 7, 3, 6, 2]), 10)  # 3 beside 7, so that 6 has room for both 2
    assert rows.tolist() == [1, 0, 0, 1, 1] and n_rows == 2


def test_documents_of_more_than_half_a_row_are_packed_in_hardly_more_rows_than_they_need(talks):
    data = open_split(str(talks / 'both'), 'train', 256, 50304)
    n_alone = np.count_nonzero(data.lengths > 128)  # no two of which share a row
    assert data.n_rows < 1.02 * n_alone


def test_preparing_preferences_never_separates_a_pair(tmp_path):
    """Neither shards, shorter than some pairs, nor the draw of val, nor what is left out."""
    records = []
    for i in range(150):
        question = f'question {i % 100}'  # some come again, with other answers
        answers = dict(chosen=f'yes {i} ' * (i % 9 + 1), rejected=f'no {i} ' * (i % 5 + 1))
        records.append(dict(prompt=question, **answers))
    # one side has come before, the other has not
    records.append(records[3] | dict(rejected='another no'))
    records.append(records[4] | dict(chosen='another yes'))
    wanted = sorted((r['chosen'], r['rejected']) for r in records)
    records += records[20:60]  # duplicates
    records += [dict(prompt='q', chosen='same', rejected='same')]
    (tmp_path / 'p.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
    flags = ['--name=p', '--tokenizer=bytes', '--val_fraction=0.3', '--shard_tokens=150']
    run(tmp_path, 'prepare/preferences.py', '--input=p.jsonl', *flags)
    folder = str(tmp_path / 'data/p')
    assert read_meta(folder)['pairs'] and len(split_files(folder, 'train')) > 50
    answers, decode = [], byte_tokenizer().decode
    for split in ('train', 'val'):
        data = open_split(folder, split, 512, VOCAB_SIZE)
        batch = data.evaluation_batch(data.evaluation_rows())
        numbers = batch['documents']
        assert data.n_left_out == 0 and data.n_documents > 50
        for i in range(0, numbers.max() + 1, 2):
            pair = [batch['targets'][(numbers == n) & (batch['targets'] >= 0)] for n in (i, i + 1)]
            answers.append(tuple(decode(ids).removesuffix('<|im_end|>') for ids in pair))
    assert sorted(answers) == wanted


def test_merged_slices_of_preferences_are_pairs(tmp_path):
    rows = [dict(prompt=f'q {i}', chosen=f'yes {i}', rejected=f'no {i}') for i in range(60)]
    (tmp_path / 'p.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    flags = ['--input=p.jsonl', '--name=p', '--tokenizer=bytes', '--val_fraction=0.3']
    for i in range(2):
        run(tmp_path, 'prepare/preferences.py', *flags, '--num_shards=2', f'--shard={i}')
    run(tmp_path, 'prepare/merge.py', '--name=p')
    data = [open_split(str(tmp_path / 'data/p'), s, 256, VOCAB_SIZE) for s in ('train', 'val')]
    assert all(split.pairs for split in data)
    assert sum(split.n_documents for split in data) == 120


@pytest.mark.slow
def test_other_datasets_with_masks_are_no_pairs(talks, tmp_path):
    assert read_meta(str(talks / 'both'))['pairs'] is False
    shutil.copytree(talks / 'both', tmp_path / 'older')
    meta = read_meta(str(tmp_path / 'older'))
    del meta['pairs']  # as older versions wrote it
    (tmp_path / 'older/meta.json').write_text(json.dumps(meta))
    assert not open_split(str(tmp_path / 'older'), 'val', 512, 50304).pairs
