"""Your own conversations: .jsonl, .json or .parquet with messages [{"role": "user", "content": ...}, ...], or with Alpaca's instruction, input, output.

python prepare/chat.py --input=talks.jsonl --name=talks --tokenizer=data/stdlib         writes data/talks
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from fledge import UserError
from fledge.configurator import configure
from prepare import pipeline
from prepare.pipeline import Stage, prepare
from prepare.records import conversation
from prepare.sources import Files

name = ''  # folder under data/
input = ''  # a file or a folder; several, separated by commas
settings = configure(globals(), also=pipeline.__file__)

if not input:
    raise UserError('--input is needed: python prepare/chat.py --input=talks.jsonl --name=talks')
prepare(
    [
        Stage(
            Files(input.split(','), ('.jsonl', '.jsonl.gz', '.json', '.parquet')),
            lambda record: [conversation(record)],
        )
    ],
    input,
    settings,
    masked=True,
)
