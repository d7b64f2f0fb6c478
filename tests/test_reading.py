"""Reading: retries, sources that give way, what a tokenizer is trained on."""

import json
import time
from types import SimpleNamespace

import pytest

from fledge import UserError
from fledge.corpus import sources
from fledge.corpus.encoding import Stage, texts
from fledge.corpus.pipeline import Run
from fledge.corpus.sources import Files, Lost, Made, OrElse, Replaced, Unavailable, read

SETTINGS = SimpleNamespace(retries=2)


class Flaky:
    """Numbers up to 9; each read ends as `ends` says, and the next goes on from there."""

    identity, size = 'numbers', 0

    def __init__(self, *ends):
        self.ends = list(ends)

    def read(self, position=None, shard=0, num_shards=1):
        for i in range(position or 0, 10):
            if self.ends and self.ends[0][0] == i:
                raise self.ends.pop(0)[1]
            yield i, ('numbers', i), i + 1


@pytest.mark.slow
def test_a_source_that_is_lost_is_tried_again_from_where_it_was(capsys):
    source = Flaky((3, Lost('gone')), (3, Lost('gone')), (7, Lost('gone')))
    begun = time.monotonic()
    assert [record for record, _, _ in read(source, None, 0, 1, retries=2)] == list(range(10))
    # 1 and 2 seconds, then, after rows that came, 1 again
    assert 3.9 < time.monotonic() - begun < 8
    assert capsys.readouterr().err == 'gone; again in 1 s\ngone; again in 2 s\ngone; again in 1 s\n'
    for ends in ([(3, Lost('gone'))] * 3, [(3, Unavailable('gone'))]):
        with pytest.raises(UserError, match='gone'):
            list(read(Flaky(*ends), None, 0, 1, retries=2))


def test_what_was_read_before_a_loss_is_handed_on():
    run = object.__new__(Run)
    run.s = SimpleNamespace(retries=0, shard=0, num_shards=1)
    run.state, run.failure = dict(stage=0, position=None), None
    run.stages = [Stage(Flaky((4, Lost('gone'))), None)]
    batches = run.batches()
    batch = next(batches)
    assert [record for record, _ in batch.records] == [0, 1, 2, 3]
    assert (batch.stage, batch.position) == (0, 4)
    assert next(batches, None) is None and str(run.failure) == 'gone'


@pytest.mark.slow
def test_another_source_takes_the_place_of_one_that_cannot_be_had(capsys):
    filler = Made('filler', 3, lambda i: f'filler {i}')
    source = OrElse(Flaky((0, Unavailable('not there'))), filler)
    (first, place, _), *rest = read(source, None, 0, 1, retries=0)
    assert isinstance(first, Replaced) and place == ('numbers', 0)
    assert str(first) == 'filler took the place of numbers: not there'
    assert [record for record, _, _ in rest] == ['filler 0', 'filler 1', 'filler 2']
    assert capsys.readouterr().err == 'not there; filler takes its place\n'
    # it goes on in the one that it has read, whether the other is back or not
    position = json.loads(json.dumps(rest[0][2]))
    again = OrElse(Flaky(), filler)
    assert [r for r, _, _ in read(again, position, 0, 1, 0)] == ['filler 1', 'filler 2']
    # it does not change its mind between two readings
    assert len(list(source.read())) == 4
    for gone in (Unavailable('gone'), Lost('gone')):  # one that goes later has no stand-in
        with pytest.raises(UserError, match='gone'):
            list(read(OrElse(Flaky((5, gone)), filler), None, 0, 1, 0))
    with pytest.raises(UserError, match='no answer'):  # nor has one that does not answer
        list(read(OrElse(Flaky((0, Lost('no answer'))), filler), None, 0, 1, 0))
    source = OrElse(Flaky((0, Lost('no answer'))), filler)
    assert [r for r, _, _ in read(source, None, 0, 1, retries=1)] == list(range(10))


def test_a_tokenizer_sees_its_budget_spread_over_the_files(tmp_path, monkeypatch):
    for name in 'abc':
        (tmp_path / f'{name}.jsonl').write_text(
            ''.join(json.dumps({'text': f'{name} {i:05d} ' + 'é' * 45}) + '\n' for i in range(5000))
        )
    stage = Stage(Files([str(tmp_path)]), lambda record: [record['text']])
    everything = list(texts(SETTINGS, [stage], 0))
    some = list(texts(SETTINGS, [stage], 100_000))
    assert len(everything) == 15000 and 80_000 < sum(len(t.encode()) for t in some) < 130_000
    assert {t[0] for t in some} == {'a', 'b', 'c'} and max(t for t in some if t[0] == 'c')[
        2:7
    ] > '04500'
    monkeypatch.setattr(sources, 'PART_BYTES', 5000)
    lines = [f'{i:06d} ' + 'é' * 45 + '\n' for i in range(10_000)]
    (tmp_path / 'one.txt').write_text(''.join(lines))
    one = Stage(Files([str(tmp_path / 'one.txt')]), lambda record: [record])
    parts = list(texts(SETTINGS, [one], 500_000))
    assert 400_000 < sum(len(t.encode()) for t in parts) < 700_000 and '\n0099' in parts[-1]
    both = [stage, stage._replace(split='val')]
    assert len(list(texts(SETTINGS, both, 100_000))) == len(some)  # val is not for training
