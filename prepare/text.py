"""Your own text: .txt and .md (a document each), .jsonl, .json and .parquet (many), or folders.

python prepare/text.py --input=notes/ --name=notes --tokenizer=gpt2         writes data/notes
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))  # where fledge/ is

from fledge.corpus import Files, Stage, configure, prepare, text_of

name = ''  # folder under data/
input = ''  # a file or a folder; several, separated by commas
field = 'text'  # where a .jsonl, .json or .parquet has the text
settings = configure(globals())

source = Files(input.split(','), columns=[field])
prepare(settings, input, [Stage(source, lambda record: [text_of(record, field)])])
