"""Dolma: AllenAI's open pretraining corpus, by default its 10-billion-token sample, streamed until target_tokens; C4 where it cannot be had.

python prepare/dolma.py         writes data/dolma, 5 billion tokens
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from fledge.configurator import configure
from prepare import pipeline
from prepare.pipeline import Stage, prepare
from prepare.records import text_of
from prepare.streams import Hub, Urls

name = 'dolma'  # folder under data/
repo = 'allenai/dolma'
version = 'v1_6-sample'  # a file list of the repository: urls/VERSION.txt
target_tokens = 5_000_000_000  # then it stops; 0: the whole list
val_fraction = 0.0005  # of the documents
settings = configure(globals(), also=pipeline.__file__)


def document(row):
    return [text_of(row, 'text')]


prepare(
    [
        Stage(
            Urls(repo, f'urls/{version}.txt', seed),
            document,
            instead=Stage(
                Hub('allenai/c4', 'en', 'train', columns=['text'], shuffle=seed), document
            ),
        )
    ],
    f'{repo}, {version}',
    settings,
)
