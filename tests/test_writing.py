"""What the pipeline writes: shards that go on from a sync, and what has come before."""

import numpy as np
import pytest

from fledge.corpus.writing import Seen, SplitWriter
from fledge.tokens import read_bin, split_files


@pytest.mark.parametrize('vocab_size', [65536, 65537])
def test_shards_hold_whole_documents_and_go_on_from_a_sync(tmp_path, vocab_size):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, 60)
    lengths[20:22] = 250, 100  # longer than a shard, and as long
    ids = rng.integers(0, vocab_size, lengths.sum())
    ids[0] = vocab_size - 1
    ends = np.concatenate([[0], np.cumsum(lengths)])
    folder = tmp_path / 'x'
    folder.mkdir()
    shards = []
    for first, last in ((0, 7), (7, 8), (8, 25), (25, 60)):
        writer = SplitWriter(str(folder), 'train', vocab_size, 100, True, shards)
        assert writer.sync() == shards
        for i in range(first, last):
            document = ids[ends[i] : ends[i + 1]]
            writer.write(document, document % 2)
        shards = writer.sync()
        if last < 60:  # what comes after a sync that counts is dropped, as after a kill
            writer.write(ids[:2], ids[:2] % 2)  # in the last shard
            writer.write(ids[:300], ids[:300] % 2)  # in another one
            writer.sync()
    writer.close()
    paths = split_files(str(folder), 'train')[: len(shards)]
    parts = [read_bin(p) for p in paths]
    assert (
        [len(p) for p in parts] == shards
        and sorted(shards)[-3] <= 100 == sorted(shards)[-2]
        and max(shards) == 250
        and np.array_equal(np.concatenate(parts), ids)
    )
    assert np.array_equal(
        np.concatenate([np.fromfile(p[:-4] + '.mask.bin', np.uint8) for p in paths]), ids % 2
    )
    assert set(np.cumsum(shards)) <= set(ends)


def test_what_has_been_seen(tmp_path):
    rng = np.random.default_rng(0)
    hashes, known, fresh = rng.integers(0, 3000, 5000).astype(np.uint64) << np.uint64(40), set(), []
    for h in hashes.tolist():
        fresh.append(h not in known)
        known.add(h)
    seen, got, count = Seen(str(tmp_path / 'h'), 0), [], 0
    for i in range(0, 5000, 250):
        some = hashes[i : i + 250]
        first = seen.fresh(some)
        seen.add(some[first])
        got += first.tolist()
        if i == 2000:
            count = seen.sync()
            seen.add(np.arange(99, dtype=np.uint64))  # lost with a kill
            seen.sync()
            seen = Seen(str(tmp_path / 'h'), count)
    assert got == fresh and seen.sync() == len(known) and max(map(len, seen.levels)) > 1000
