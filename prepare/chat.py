"""Your own conversations, in .jsonl, .json or .parquet.

A record is {"messages": [{"role": "user", "content": ...}, ...]}, ShareGPT's {"conversations":
[{"from": "human", "value": ...}, ...]}, Alpaca's instruction, input and output, prompt and
completion, or question and answer; "system" beside them comes first. Which it is is found out.

python prepare/chat.py --input=talks.jsonl --name=talks --tokenizer=data/stdlib
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))  # where fledge/ is

from fledge.corpus import RECORDS, Files, Stage, configure, conversation, prepare, split_paths

name = ''  # folder under data/
input = ''  # a file or a folder; several, separated by commas
settings = configure(globals())

stage = Stage(Files(split_paths(input), RECORDS), lambda record: [conversation(record)])
prepare(settings, input, [stage], masked=True)
