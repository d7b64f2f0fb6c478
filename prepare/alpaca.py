"""Alpaca, cleaned: 51,760 instructions with answers.

python prepare/alpaca.py        writes data/alpaca
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from fledge.configurator import configure
from prepare import pipeline
from prepare.pipeline import Stage, prepare
from prepare.records import conversation
from prepare.streams import Hub

name = 'alpaca'  # folder under data/
repo = 'yahma/alpaca-cleaned'
settings = configure(globals(), also=pipeline.__file__)

prepare(
    [Stage(Hub(repo, split='train'), lambda row: [conversation(row)])], repo, settings, masked=True
)
