"""Pairs for DPO: of answers about Python's standard library the brief ones are preferred.

python prepare/stdlib_pairs.py       writes data/stdlib_pairs, with the tokenizer of data/stdlib
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))  # where fledge/ is

from fledge.corpus import configure, prepare
from fledge.corpus.docstrings import VERSION, pair_about, stage_of

name = 'stdlib_pairs'  # folder under data/
tokenizer = 'data/stdlib'  # the default run's; or gpt2, bytes, ...
val_fraction = 0.05  # of the functions
settings = configure(globals())

stage = stage_of(pair_about)
prepare(settings, f'docstrings of Python {VERSION}', [stage], masked=True, pairs=True)
