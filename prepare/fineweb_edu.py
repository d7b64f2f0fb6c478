"""FineWeb-Edu: web pages that a classifier found educational; the 10-billion-token sample, streamed and shuffled.

python prepare/fineweb_edu.py --target_tokens=1000000000        writes data/fineweb_edu
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from fledge.configurator import configure
from prepare import pipeline
from prepare.pipeline import Stage, prepare
from prepare.records import text_of
from prepare.streams import Hub

name = 'fineweb_edu'  # folder under data/
repo = 'HuggingFaceFW/fineweb-edu'
subset = 'sample-10BT'  # or sample-100BT, sample-350BT, default (all of it)
val_fraction = 0.0005  # of the documents
settings = configure(globals(), also=pipeline.__file__)

prepare(
    [
        Stage(
            Hub(repo, subset, 'train', columns=['text'], shuffle=seed),
            lambda row: [text_of(row, 'text')],
        )
    ],
    f'{repo}, {subset}',
    settings,
)
