"""Your own text: .txt and .md (a document each), .jsonl, .json and .parquet (many), or folders.

python prepare/text.py --input=notes/ --name=notes --tokenizer=gpt2         writes data/notes
python prepare/text.py --input=stories.txt --name=stories --separator='<|endoftext|>'
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))  # where fledge/ is

from fledge import UserError
from fledge.corpus import configure, own_files, prepare, text_of

name = ''  # folder under data/
input = ''  # a file or a folder; several, separated by commas
val = ''  # the same, for val; '': val_fraction of input
field = 'text'  # where a .jsonl, .json or .parquet has the text
separator = ''  # what stands between the documents of a .txt or .md; \n and \t are read as such
settings = configure(globals())

separator = separator.replace(r'\n', '\n').replace(r'\t', '\t')
options = dict(columns=[field], separator=separator)
stages = own_files(settings, lambda record: [text_of(record, field)], **options)
files = [path.lower() for stage in stages for path, _ in stage.source.files]
if separator and not any(path.endswith(('.txt', '.md')) for path in files):
    raise UserError('--separator is for .txt and .md files, and none is there')
prepare(settings, input, stages)
