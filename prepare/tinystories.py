"""TinyStories: short stories in a child's vocabulary, from which even a model of a few million parameters learns to write.

python prepare/tinystories.py --tokenizer=train --vocab_size=8000       writes data/tinystories
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from fledge.configurator import configure
from prepare import pipeline
from prepare.pipeline import Stage, prepare
from prepare.records import text_of
from prepare.streams import Hub

name = 'tinystories'  # folder under data/
repo = 'roneneldan/TinyStories'
settings = configure(globals(), also=pipeline.__file__)

prepare(
    [
        Stage(Hub(repo, split=theirs, columns=['text']), lambda row: [text_of(row, 'text')], ours)
        for theirs, ours in (('validation', 'val'), ('train', 'train'))
    ],
    repo,
    settings,
)
