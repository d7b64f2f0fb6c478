"""What reads the stages: retries, what a tokenizer is trained on, and which sources give way."""

import json
import time
from types import SimpleNamespace

import pytest

from fledge import UserError
from prepare.pipeline import Stage
from prepare.reading import batches, records, settle, texts
from prepare.sources import Files, Lost, Made, Unavailable

SETTINGS = SimpleNamespace(retries=2, shard=0, num_shards=1)


class Flaky:
    """Numbers up to 9; each read ends as `ends` says at the number given, and the next goes on from there."""

    identity, size = 'numbers', 0

    def __init__(self, *ends):
        self.ends = list(ends)

    def read(self, position=None, shard=0, num_shards=1):
        for i in range(position or 0, 10):
            if self.ends and self.ends[0][0] == i:
                raise self.ends.pop(0)[1]
            yield i, ('numbers', i), i + 1


def test_a_source_that_is_lost_is_tried_again_from_where_it_was(capsys):
    stage, begun = (
        Stage(Flaky((3, Lost('gone')), (3, Lost('gone')), (7, Lost('gone'))), None),
        time.monotonic(),
    )
    assert [r for r, _, _ in records(SETTINGS, [stage], 0, dict(instead={}), None, 0, 1)] == list(
        range(10)
    )
    assert (
        3.9 < time.monotonic() - begun < 8
    )  # 1 and 2 seconds, then, after rows that came, 1 again
    assert capsys.readouterr().err == 'gone; again in 1 s\ngone; again in 2 s\ngone; again in 1 s\n'
    for ends in ([(3, Lost('gone'))] * 3, [(3, Unavailable('gone'))]):
        read = records(SETTINGS, [Stage(Flaky(*ends), None)], 0, dict(instead={}), None, 0, 1)
        with pytest.raises(UserError, match='gone'):
            list(read)


def test_what_was_read_before_a_loss_is_handed_on():
    state = dict(stage=0, position=None, instead={})
    read = batches(
        SimpleNamespace(retries=0, shard=0, num_shards=1),
        [Stage(Flaky((4, Lost('gone'))), None)],
        state,
    )
    index, batch, _, position = next(read)
    assert (index, [r for r, _ in batch], position) == (0, [0, 1, 2, 3], 4)
    with pytest.raises(UserError, match='gone'):
        next(read)


def test_which_sources_give_way_is_settled_before_anything_is_read():
    filler = Stage(Made('filler', 3, lambda i: i), None)
    stages = [
        Stage(Flaky((0, Unavailable('gone'))), None, instead=filler),
        Stage(Flaky((5, Unavailable('gone'))), None, instead=filler),
    ]
    state = dict(stage=0, position=None, instead={})
    settle(SETTINGS, stages, state)
    assert state['instead'] == {'0': 'gone'}
    assert [r for r, _, _ in records(SETTINGS, stages, 0, state, None, 0, 1)] == [0, 1, 2]
    with pytest.raises(UserError, match='gone'):  # one that goes later has no stand-in
        list(records(SETTINGS, stages, 1, state, None, 0, 1))


def test_a_tokenizer_sees_its_budget_spread_over_the_files(tmp_path):
    for name in 'abc':
        (tmp_path / f'{name}.jsonl').write_text(
            ''.join(json.dumps({'text': f'{name} {i:05d} ' + 'é' * 45}) + '\n' for i in range(5000))
        )
    stage = Stage(Files([str(tmp_path)]), lambda record: [record['text']])
    everything = list(texts(SETTINGS, [stage], dict(instead={}), 0))
    some = list(texts(SETTINGS, [stage], dict(instead={}), 100_000))
    assert len(everything) == 15000 and 80_000 < sum(len(t.encode()) for t in some) < 130_000
    assert {t[0] for t in some} == {'a', 'b', 'c'} and max(t for t in some if t[0] == 'c')[
        2:7
    ] > '04500'
    both = [stage, stage._replace(split='val')]
    assert len(list(texts(SETTINGS, both, dict(instead={}), 100_000))) == len(
        some
    )  # val is not for training
