"""Your own text: .txt and .md files (a document each), .jsonl (a document a line), .parquet (a document a row), or folders of them.

python prepare/text.py --input=notes/ --name=notes --tokenizer=gpt2         writes data/notes
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from fledge import UserError
from fledge.configurator import configure
from prepare import pipeline
from prepare.pipeline import Stage, prepare
from prepare.records import text_of
from prepare.sources import Files

name = ''  # folder under data/
input = ''  # a file or a folder; several, separated by commas
field = 'text'  # where a .jsonl, .json or .parquet has the text
settings = configure(globals(), also=pipeline.__file__)

if not input:
    raise UserError('--input is needed: python prepare/text.py --input=notes/ --name=notes')
prepare(
    [Stage(Files(input.split(','), columns=[field]), lambda record: [text_of(record, field)])],
    input,
    settings,
)
