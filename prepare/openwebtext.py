"""OpenWebText: what GPT-2 was trained on, as far as it could be gathered again; nanoGPT's corpus.

python prepare/openwebtext.py       writes data/openwebtext
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from fledge.configurator import configure
from prepare import pipeline
from prepare.pipeline import Stage, prepare
from prepare.records import text_of
from prepare.streams import Hub

name = 'openwebtext'  # folder under data/
repo = 'Skylion007/openwebtext'
val_fraction = 0.0005  # of the documents, as in nanoGPT
settings = configure(globals(), also=pipeline.__file__)

# Its main branch is a loading script, which datasets no longer runs; its author's proposal 18 has all of it as Parquet.
prepare(
    [
        Stage(
            Hub(repo, split='train', columns=['text'], converted='refs/pr/18'),
            lambda row: [text_of(row, 'text')],
        )
    ],
    repo,
    settings,
)
