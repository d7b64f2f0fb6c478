"""Your own conversations, in .jsonl, .json or .parquet.

A record is {"messages": [{"role": "user", "content": ...}, ...]}, ShareGPT's {"conversations":
[{"from": "human", "value": ...}, ...]}, Alpaca's instruction, input and output, prompt and
completion, or question and answer; "system" beside them comes first. Which it is, is found out by
fledge/corpus/records.py, conversation().

python prepare/chat.py --input=talks.jsonl --name=talks --tokenizer=data/stdlib
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))  # where fledge/ is

from fledge.corpus import RECORDS, configure, conversation, own_files, prepare

name = ''  # folder under data/
input = ''  # a file or a folder; several, separated by commas
val = ''  # the same, for val; '': val_fraction of input
settings = configure(globals())

stages = own_files(settings, lambda record: [conversation(record)], extensions=RECORDS)
prepare(settings, input, stages, masked=True)
