"""Tokens on disk, and which of them a step sees."""

import json

import numpy as np
import pytest

from fledge import UserError
from fledge.tokens import Tokens, read_bin, write_bin


def write(path, ids, vocab_size=65536):
    write_bin(str(path), ids, vocab_size)


def dataset(folder, *shards, vocab_size=65536):
    (folder / 'meta.json').write_text(json.dumps({'vocab_size': vocab_size}))
    if len(shards) == 1:
        write(folder / 'train.bin', shards[0], vocab_size)
    for i, ids in enumerate(shards if len(shards) > 1 else ()):
        write(folder / f'train_{i:06d}.bin', ids, vocab_size)
    return str(folder)


@pytest.mark.parametrize(
    'vocab_size, magic, version, size',
    [(50257, 20240520, 1, 2), (65536, 20240520, 1, 2), (65537, 20240801, 7, 4)],
)
def test_a_bin_is_llmcs(tmp_path, vocab_size, magic, version, size):
    write(tmp_path / 'x.bin', [1, 2, vocab_size - 1], vocab_size)
    raw = (tmp_path / 'x.bin').read_bytes()
    assert len(raw) == 1024 + 3 * size and np.frombuffer(raw, '<i4', 4).tolist() == [
        magic,
        version,
        3,
        0,
    ]
    assert read_bin(str(tmp_path / 'x.bin')).tolist() == [1, 2, vocab_size - 1]
    assert np.frombuffer(raw, f'<u{size}', offset=1024).tolist() == [1, 2, vocab_size - 1]


def test_a_bin_takes_its_name_only_when_whole(tmp_path):
    with pytest.raises(ValueError):  # behind the header
        write(tmp_path / 'x.bin', ['no number'], 100)
    assert list(tmp_path.iterdir()) == []


def test_nanogpts_headerless_files_are_read(tmp_path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / 'train.bin')
    data = Tokens(str(tmp_path), 'train', 10, 100, seed=0)
    assert data.n_tokens == 100
    x, y = data.rows(0, 3)
    assert (y == x + 1).all() and x.dtype == np.int64


@pytest.mark.parametrize(
    'breakage, words',
    [
        (lambda raw: b'', 'is empty'),
        (lambda raw: raw[:1024], 'is truncated'),
        (lambda raw: raw[:700], 'is truncated'),
        (lambda raw: raw[:-1], 'is truncated'),
        (lambda raw: np.array([20240520, 1, 0], '<i4').tobytes() + raw[12:1024], 'is empty'),
        (lambda raw: np.array([20240520, 1, -5], '<i4').tobytes() + raw[12:], 'broken header'),
        (lambda raw: np.array([20240521], '<i4').tobytes() + raw[4:], 'wrong magic or version'),
        (lambda raw: raw[:4] + np.array([9], '<i4').tobytes() + raw[8:], 'wrong magic or version'),
        (lambda raw: b'PK\x03\x04' + raw[4:], 'wrong magic or version'),
    ],
)
@pytest.mark.parametrize('with_meta', [True, False])
def test_a_broken_bin_is_named(tmp_path, breakage, words, with_meta):
    folder = dataset(tmp_path, range(1000))
    (tmp_path / 'train.bin').write_bytes(breakage((tmp_path / 'train.bin').read_bytes()))
    if not with_meta:
        (tmp_path / 'meta.json').unlink()
    with pytest.raises(UserError, match=words) as e:
        Tokens(folder, 'train', 10, 65536)
    assert 'train.bin' in str(e.value)


def test_data_that_does_not_fit_is_named(tmp_path):
    folder = dataset(tmp_path, list(range(100)) + [300])
    with pytest.raises(UserError, match='block_size=101 is longer than the data'):
        Tokens(folder, 'train', 101, 1000, seed=0)
    assert len(Tokens(folder, 'train', 101, 1000).evaluation_rows()) == 1
    assert Tokens(folder, 'train', 100, 1000, seed=0).n_rows == 1
    with pytest.raises(UserError, match='token 300 at position 100, beyond the vocabulary of 256'):
        Tokens(
            folder, 'train', 10, 256
        )  # before the first step, and not when some later step comes across it
    with pytest.raises(UserError, match='no val.bin'):
        Tokens(folder, 'val', 10, 1000)


@pytest.mark.parametrize('shards', [[1003], [12], [500, 11, 300, 5, 64]])
def test_every_row_once_an_epoch_and_none_twice(tmp_path, shards):
    starts = np.cumsum([0] + shards)
    data = Tokens(
        dataset(tmp_path, *(range(a, a + n) for a, n in zip(starts[:-1], shards, strict=True))),
        'train',
        10,
        65536,
        seed=7,
    )
    assert data.n_rows >= max(1, sum(n // 10 for n in shards) - 2 * len(shards))
    epochs = [data.rows(e * data.n_rows, data.n_rows) for e in range(3)]
    for x, y in epochs:
        assert (y[:, :-1] == x[:, 1:]).all() and (
            y == x + 1
        ).all()  # nothing crosses a shard: ids there jump by design
        assert len(np.unique(x)) == x.size  # no token is an input twice
        shard_of = np.searchsorted(starts, x, side='right')
        assert (shard_of == shard_of[:, :1]).all()
    if data.n_rows > 10:
        assert not np.array_equal(epochs[0]['inputs'], epochs[1]['inputs'])
        assert len({int(x.min()) for x, _ in epochs}) > 1  # the grid shifts
        seen = np.unique(
            np.concatenate(
                [x for x, _ in (data.rows(e * data.n_rows, data.n_rows) for e in range(40))]
            )
        )
        assert len(seen) >= sum(n - 1 for n in shards if n > 10) - len(
            shards
        )  # over the epochs, no token is left out


def test_one_token_is_nothing_to_predict(tmp_path):
    dataset(tmp_path, [5])
    (tmp_path / 'train.bin').rename(tmp_path / 'val.bin')
    with pytest.raises(UserError, match='single token'):
        Tokens(str(tmp_path), 'val', 10, 65536)


def test_a_step_is_a_pure_function_of_its_number(tmp_path):
    folder = dataset(tmp_path, np.random.default_rng(0).integers(0, 500, 5000))
    whole = Tokens(folder, 'train', 16, 500, seed=3).rows(0, 24 * 50)['inputs'].reshape(50, 24, 16)
    late = Tokens(folder, 'train', 16, 500, seed=3)
    for step in (49, 3, 17):  # in any order, with no state
        for world in (1, 2, 4):
            parts = [
                late.rows(step * 24 + rank * 24 // world, 24 // world)['inputs']
                for rank in range(world)
            ]
            assert np.array_equal(np.concatenate(parts), whole[step])
    assert not np.array_equal(
        Tokens(folder, 'train', 16, 500, seed=4).rows(0, 24)['inputs'], whole[0]
    )


@pytest.mark.parametrize('n', [101, 100, 11, 7, 2])
def test_evaluation_predicts_each_token_once(tmp_path, n):
    dataset(tmp_path, range(200, 200 + n))
    (tmp_path / 'train.bin').rename(tmp_path / 'val.bin')  # which may be shorter than a row
    data = Tokens(str(tmp_path), 'val', 10, 65536)
    x, y = data.evaluation_batch(data.evaluation_rows())
    assert y[y >= 0].tolist() == list(range(201, 200 + n))
    assert (x[y >= 0] == y[y >= 0] - 1).all()
    if n == 101:
        part = data.evaluation_rows(4)
        assert (
            part == data.evaluation_rows(4)
            and len(part) == 4
            and [s for _, s in part] == [0, 20, 50, 70]
        )
