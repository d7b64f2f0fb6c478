"""Tiny shakespeare, one token a character: nanoGPT's own split and ids, 1,003,854 to train on, 111,540 to validate.

python prepare/shakespeare_char.py      writes data/shakespeare_char
"""
import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from fledge.configurator import configure
from fledge.tokenizer import char_tokenizer
from prepare.pipeline import read_tiny_shakespeare, split_documents, write_dataset

name = 'shakespeare_char'   # folder under data/
input = ''                  # the text, if it is here already; else data/NAME/input.txt, downloaded where missing
val_fraction = 0.1          # the end of the text
configure(globals())

text, url = read_tiny_shakespeare(input or f'data/{name}/input.txt')
write_dataset(name, split_documents([text], val_fraction, seed=0), char_tokenizer(sorted(set(text))), url)
