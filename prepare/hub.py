"""Any dataset of the Hugging Face hub that has text in a field, streamed.

python prepare/hub.py --repo=roneneldan/TinyStories --name=stories      writes data/stories
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from fledge import UserError
from fledge.configurator import configure
from prepare import pipeline
from prepare.pipeline import Stage, prepare
from prepare.records import text_of
from prepare.streams import Hub

name = ''  # folder under data/
repo = ''  # OWNER/NAME on huggingface.co
subset = ''  # the configuration, where the repository has several
split = 'train'  # of the repository; val is val_fraction of it
field = 'text'  # where its rows have the text
settings = configure(globals(), also=pipeline.__file__)

if not repo:
    raise UserError('--repo is needed: python prepare/hub.py --repo=OWNER/NAME --name=FOLDER')
prepare(
    [Stage(Hub(repo, subset, split, columns=[field]), lambda row: [text_of(row, field)])],
    ', '.join(filter(None, (repo, subset, split))),
    settings,
)
