"""Pairs for DPO, chosen and then rejected: your own files, or a dataset of the hub.

A record has prompt, chosen and rejected, each a text or messages.

python prepare/preferences.py --input=pairs.jsonl --name=pairs          writes data/pairs
python prepare/preferences.py --repo=trl-lib/ultrafeedback_binarized --name=ultrafeedback
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))  # where fledge/ is

from fledge import UserError
from fledge.corpus import RECORDS, Hub, Stage, configure, own_files, preference, prepare

name = ''  # folder under data/
input = ''  # a file or a folder; several, separated by commas
val = ''  # the same, for val; '': val_fraction of input
repo = ''  # or OWNER/NAME on huggingface.co, with prompt, chosen and rejected
subset = ''  # the configuration, where the repository has several
split = 'train'  # of the repository
settings = configure(globals())

if bool(input) == bool(repo):
    example = 'python prepare/preferences.py --input=pairs.jsonl --name=pairs'
    raise UserError(f'one of --input and --repo is needed: {example}')
if repo:
    stages = [Stage(Hub(repo, subset, split), preference)]
else:
    stages = own_files(settings, preference, extensions=RECORDS)
prepare(settings, input or repo, stages, masked=True, pairs=True)
