"""Pairs for DPO, the chosen answer and then the rejected one: your own .jsonl, or a dataset of the hub with prompt, chosen, rejected.

python prepare/preferences.py --input=pairs.jsonl --name=pairs          writes data/pairs
python prepare/preferences.py --repo=trl-lib/ultrafeedback_binarized --name=ultrafeedback
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from fledge import UserError
from fledge.configurator import configure
from prepare import pipeline
from prepare.pipeline import Stage, prepare
from prepare.records import preference
from prepare.sources import Files
from prepare.streams import Hub

name = ''  # folder under data/
input = ''  # a file or a folder; several, separated by commas
repo = ''  # or OWNER/NAME on huggingface.co
subset = ''  # the configuration, where the repository has several
split = 'train'  # of the repository
settings = configure(globals(), also=pipeline.__file__)

if bool(input) == bool(repo):
    raise UserError(
        'one of --input and --repo is needed: python prepare/preferences.py --input=pairs.jsonl --name=pairs'
    )
source = (
    Hub(repo, subset, split)
    if repo
    else Files(input.split(','), ('.jsonl', '.jsonl.gz', '.json', '.parquet'))
)
prepare([Stage(source, preference)], input or repo, settings, masked=True)
