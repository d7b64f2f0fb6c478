"""The copy task on which the paper's encoder-decoder is tried: random letters, a > and the same letters, which are learned.

python prepare/copy_task.py     writes data/copy_task
"""

import random
import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from fledge import UserError
from fledge.configurator import configure
from prepare import pipeline
from prepare.pipeline import Stage, prepare
from prepare.sources import Made

name = 'copy_task'  # folder under data/
examples = 10000  # of them; those that come twice are left out
min_letters = 4  # of the shortest
max_letters = 12  # of the longest
symbols = 'abcdefghijklmnopqrstuvwxyz'  # to draw from
tokenizer = 'chars'  # as below
val_fraction = 0.05  # of the examples
settings = configure(globals(), also=pipeline.__file__)


def letters(i):
    rng = random.Random(f'{seed} {i}')
    return ''.join(rng.choices(symbols, k=rng.randint(min_letters, max_letters)))


if not 0 < min_letters <= max_letters or not symbols or '>' in symbols or examples < 2:
    raise UserError(
        '0 < min_letters <= max_letters, symbols without >, and two examples at least are needed'
    )
prepare(
    [Stage(Made('copy task', examples, letters), lambda text: [[(f'{text}>', 0), (text, 1)]])],
    'the copy task',
    settings,
    masked=True,
)
