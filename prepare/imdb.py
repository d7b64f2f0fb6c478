"""IMDB: 50,000 film reviews, each followed by the word that is learned: positive or negative.

python prepare/imdb.py          writes data/imdb, with test
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from fledge.configurator import configure
from prepare import pipeline
from prepare.pipeline import Stage, prepare
from prepare.records import text_of
from prepare.sources import Skip
from prepare.streams import Hub

name = 'imdb'  # folder under data/
repo = 'stanfordnlp/imdb'
val_fraction = 0.05  # of the 25,000 reviews to train on
settings = configure(globals(), also=pipeline.__file__)


def review(row):
    if row.get('label') not in (0, 1):
        raise Skip('no label')
    text = text_of(row, 'text').replace('<br />', '\n').strip()
    return [[(f'{text}\n\nSentiment:', 0), (' positive' if row['label'] else ' negative', 1)]]


prepare(
    [Stage(Hub(repo, split='test'), review, 'test'), Stage(Hub(repo, split='train'), review)],
    repo,
    settings,
    masked=True,
)
