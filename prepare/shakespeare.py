"""Tiny shakespeare in GPT-2's tokens: 302,000 to train on, 36,000 to validate.

python prepare/shakespeare.py       writes data/shakespeare
"""
import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from fledge.configurator import configure
from prepare import pipeline
from prepare.pipeline import Stage, prepare
from prepare.sources import Made, fetch

name = 'shakespeare'      # folder under data/
input = ''              # the text, if it is here already; else data/NAME/input.txt, fetched where it is missing
tokenizer = 'gpt2'      # as below
val_fraction = 0.1      # the end of the text
settings = configure(globals(), also=pipeline.__file__)

url = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
with open(input or fetch(url, f'data/{name}/input.txt'), 'rb') as f:
    text = f.read().decode(errors='replace')
cut = int(len(text) * (1 - val_fraction))
parts = {'train': text[:cut], 'val': text[cut:]}
prepare([Stage(Made(url, 1, lambda _, split=split: parts[split]), lambda text: [text], split) for split in parts], url, settings)
