"""The copy task for the encoder-decoder: letters, a >, and the same letters, which are learned.

Or they are learned in reverse, or sorted.

python prepare/copy_task.py     writes data/copy_task
python prepare/copy_task.py --task=reverse --name=reverse_task
"""

import os
import random
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))  # where fledge/ is

from fledge import UserError
from fledge.configurator import one_of
from fledge.corpus import Made, Stage, configure, prepare, translated

name = 'copy_task'  # folder under data/, whatever the task
task = 'copy'  # or reverse, or sort: what is done to the letters
examples = 10000  # of them; those that come twice are left out
min_letters = 4  # of the shortest
max_letters = 12  # of the longest
symbols = 'abcdefghijklmnopqrstuvwxyz'  # to draw from
tokenizer = 'chars'  # or any other: gpt2, bytes, train, ...
val_fraction = 0.05  # of the examples
settings = configure(globals())


def letters(i):
    rng = random.Random(f'{settings["seed"]} {i}')
    return ''.join(rng.choices(symbols, k=rng.randint(min_letters, max_letters)))


def answer(text):
    if task == 'reverse':
        return text[::-1]
    if task == 'sort':
        return ''.join(sorted(text))
    return text


one_of(settings, task=('copy', 'reverse', 'sort'))
if min_letters > max_letters or not symbols or '>' in symbols:
    raise UserError('max_letters from min_letters up, and symbols without > are needed')
source = Made('copy task', examples, letters)
stage = Stage(source, lambda text: [translated(text, answer(text), '>')])
prepare(settings, f'the {task} task', [stage], masked=True, separator='>')
