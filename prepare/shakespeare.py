"""Tiny shakespeare in GPT-2's tokens: 302,000 to train on, 36,000 to validate.

python prepare/shakespeare.py       writes data/shakespeare
"""
import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from fledge.configurator import configure
from fledge.tokenizer import load_tokenizer
from prepare.pipeline import read_tiny_shakespeare, split_documents, write_dataset

name = 'shakespeare'    # folder under data/
input = ''              # the text, if it is here already; else data/NAME/input.txt, downloaded where missing
tokenizer = 'gpt2'      # gpt2, bytes, a tokenizer.json or a folder that holds one
val_fraction = 0.1      # the end of the text
configure(globals())

encoder = load_tokenizer(tokenizer)
text, url = read_tiny_shakespeare(input or f'data/{name}/input.txt')
write_dataset(name, split_documents([text], val_fraction, seed=0), encoder, url)
