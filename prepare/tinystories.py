"""TinyStories: short stories in a child's vocabulary, for models of a few million parameters.

python prepare/tinystories.py --tokenizer=train --vocab_size=8000       writes data/tinystories
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))  # where fledge/ is

from fledge.corpus import Hub, Stage, configure, prepare, text_of

name = 'tinystories'  # folder under data/
repo = 'roneneldan/TinyStories'  # on huggingface.co
settings = configure(globals())


def story(row):
    return [text_of(row, 'text')]


val = Stage(Hub(repo, split='validation', columns=['text']), story, 'val')
train = Stage(Hub(repo, split='train', columns=['text']), story, 'train')
prepare(settings, repo, [val, train])
