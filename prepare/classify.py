"""Texts with labels, in .jsonl, .json or .parquet: a text is followed by the word that is learned.

The word is one token, as frequent words are in most vocabularies (--tokenizer=gpt2, or train).

python prepare/classify.py --input=train.jsonl --val=dev.jsonl --name=films --labels=bad,good
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))  # where fledge/ is

from fledge import UserError
from fledge.corpus import RECORDS, Skip, configure, labelled, own_files, prepare, text_of
from fledge.labels import report_labels

name = ''  # folder under data/
input = ''  # a file or a folder; several, separated by commas
val = ''  # the same, for val; '': val_fraction of input
field = 'text'  # where a record has the text
label = 'label'  # and where the label
labels = ''  # words for the labels 0, 1, ..., separated by commas; '': labels are words already
settings = configure(globals())

words = [word.strip() for word in labels.split(',')] if labels else []
if not all(words):
    raise UserError(f'labels={labels} has an empty word in it')


def classified(record):
    text = text_of(record, field).strip()
    value = record.get(label) if isinstance(record, dict) else None
    if words and type(value) is int and 0 <= value < len(words):
        value = words[value]
    if not isinstance(value, str) or not value.strip() or (words and value.strip() not in words):
        known = f'none of {", ".join(words)}' if words else 'no word'
        raise Skip(f'a label {str(value)[:20]!r} that is {known}')
    if not text:
        raise Skip('empty')
    return [labelled(text, value.strip())]


stages = own_files(settings, classified, extensions=RECORDS)
prepare(settings, input, stages, masked=True)
report_labels(settings)
