"""IMDB: 50,000 film reviews, each followed by the word that is learned: positive or negative.

python prepare/imdb.py          writes data/imdb, with test
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))  # where fledge/ is

from fledge.corpus import Hub, Skip, Stage, configure, labelled, prepare, text_of
from fledge.labels import report_labels

name = 'imdb'  # folder under data/
repo = 'stanfordnlp/imdb'  # on huggingface.co
val_fraction = 0.05  # of the 25,000 reviews to train on
settings = configure(globals())


def review(row):
    if row.get('label') not in (0, 1):
        raise Skip('no label')
    text = text_of(row, 'text').replace('<br />', '\n').strip()
    return [labelled(text, 'positive' if row['label'] else 'negative')]


stages = [Stage(Hub(repo, split='test'), review, 'test'), Stage(Hub(repo), review)]
prepare(settings, repo, stages, masked=True)
report_labels(settings)
