"""Tiny shakespeare, one token a character: nanoGPT's own split and ids; or GPT-2's tokens.

python prepare/shakespeare_char.py                                      writes data/shakespeare_char
python prepare/shakespeare_char.py --tokenizer=gpt2 --name=shakespeare  writes data/shakespeare
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))  # where fledge/ is

from fledge.corpus import Made, Stage, configure, fetch, prepare

name = 'shakespeare_char'  # folder under data/
input = ''  # the text, if it is here; else data/NAME/input.txt, fetched where it is missing
tokenizer = 'chars'  # or any other: gpt2, bytes, train, ...
val_fraction = 0.1  # the end of the text
settings = configure(globals())

url = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
text = fetch(url, input or f'data/{name}/input.txt')
cut = int(len(text) * (1 - val_fraction))
train = Stage(Made('train', 1, lambda _: text[:cut]), lambda text: [text], 'train')
val = Stage(Made('val', 1, lambda _: text[cut:]), lambda text: [text], 'val')
prepare(settings, url, [train, val])
