"""Alpaca, cleaned: 51,760 instructions with answers.

python prepare/alpaca.py        writes data/alpaca
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))  # where fledge/ is

from fledge.corpus import Hub, Stage, configure, conversation, prepare

name = 'alpaca'  # folder under data/
repo = 'yahma/alpaca-cleaned'  # on huggingface.co
settings = configure(globals())

stage = Stage(Hub(repo), lambda row: [conversation(row)])
prepare(settings, repo, [stage], masked=True)
