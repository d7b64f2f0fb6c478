"""Your own text: .txt and .md files (a document each), .jsonl (a document a line), .parquet (a document a row), or folders of them.

python prepare/text.py --input=notes/ --name=notes --tokenizer=gpt2         writes data/notes
"""
import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from fledge import UserError
from fledge.configurator import configure
from prepare.pipeline import choose_tokenizer, read_files, split_documents, write_dataset

input = ''              # a file or a folder; several, separated by commas
name = ''               # folder under data/
tokenizer = 'gpt2'      # gpt2, bytes, chars, a tokenizer.json, a folder that holds one (data/stdlib), or train
vocab_size = 32000      # of --tokenizer=train
field = 'text'          # where a .jsonl or .parquet has the text
val_fraction = 0.01     # of the documents; of the text where there is but one
num_proc = 0            # threads; 0: every core
seed = 1337             # of the split
configure(globals())

if not input or not name:
    raise UserError('--input and --name are needed: python prepare/text.py --input=notes/ --name=notes')
encoder = choose_tokenizer(tokenizer, lambda: read_files(input.split(','), field, quiet=True), vocab_size)
write_dataset(name, split_documents(read_files(input.split(','), field), val_fraction, seed), encoder, input, num_proc)
