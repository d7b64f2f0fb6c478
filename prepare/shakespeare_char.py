"""Tiny shakespeare, one token a character: nanoGPT's own split and ids, 1,003,854 to train on, 111,540 to validate.

python prepare/shakespeare_char.py       writes data/shakespeare_char
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from fledge.configurator import configure
from prepare import pipeline
from prepare.pipeline import Stage, prepare
from prepare.sources import tiny_shakespeare

name = 'shakespeare_char'  # folder under data/
input = ''  # the text, if it is here already; else data/NAME/input.txt, fetched where it is missing
tokenizer = 'chars'  # as below
val_fraction = 0.1  # the end of the text
settings = configure(globals(), also=pipeline.__file__)

url, sources = tiny_shakespeare(input or f'data/{name}/input.txt', val_fraction)
prepare(
    [Stage(source, lambda text: [text], split) for split, source in sources.items()], url, settings
)
