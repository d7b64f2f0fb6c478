"""Pairs of texts for the encoder-decoder: a source, and its target, which is learned.

A line of .tsv, .tab and .txt is SOURCE tab TARGET; what stands behind another tab is not read. A
record of .jsonl, .json and .parquet has the two in fields.

python prepare/translate.py --input=deu.txt --name=deu --tokenizer=train     writes data/deu
python prepare/translate.py --input=wmt/ --name=wmt --source=translation.en --target=translation.de
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))  # where fledge/ is

from fledge.corpus import TABLES, Skip, configure, own_files, prepare, text_of, translated

name = ''  # folder under data/
input = ''  # a file or a folder; several, separated by commas
val = ''  # the same, for val; '': val_fraction of input
source = 'source'  # where a record has the source; a.b is b in the object a
target = 'target'  # and where the target
settings = configure(globals())


def text_at(record, place):
    *outer, field = place.split('.')
    for key in outer:
        if not isinstance(record, dict) or not isinstance(record.get(key), dict):
            raise Skip(f'no object {key!r}')
        record = record[key]
    return text_of(record, field)


def pair_of(record):
    if isinstance(record, str):  # a line
        columns = record.split('\t')
        if len(columns) < 2:
            raise Skip('a line without a tab')
        pair = columns[:2]
    else:
        pair = [text_at(record, source), text_at(record, target)]
    return [translated(pair[0].strip(), pair[1].strip(), '\t')]


stages = own_files(settings, pair_of, extensions=TABLES, separator='\n')
prepare(settings, input, stages, masked=True, separator='\t')
