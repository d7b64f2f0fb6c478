"""Questions about Python's standard library, which its docstrings answer: a chat, no network.

python prepare/stdlib_chat.py       writes data/stdlib_chat, with the tokenizer of data/stdlib
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))  # where fledge/ is

from fledge.corpus import configure, prepare
from fledge.corpus.docstrings import VERSION, stage_of, talks_about

name = 'stdlib_chat'  # folder under data/
tokenizer = 'data/stdlib'  # the default run's; or gpt2, bytes, ...
val_fraction = 0.05  # of the functions, classes and modules
settings = configure(globals())

stage = stage_of(talks_about)
prepare(settings, f'docstrings of Python {VERSION}', [stage], masked=True)
