"""Any dataset of the Hugging Face hub that has text in a field, streamed.

python prepare/hub.py --repo=roneneldan/TinyStories --name=stories      writes data/stories
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))  # where fledge/ is

from fledge.corpus import Hub, Stage, configure, prepare, text_of

name = ''  # folder under data/
repo = ''  # OWNER/NAME on huggingface.co
subset = ''  # the configuration, where the repository has several
split = 'train'  # of the repository; val is val_fraction of it
field = 'text'  # where its rows have the text
settings = configure(globals())

source = Hub(repo, subset, split, columns=[field])
prepare(settings, source.identity, [Stage(source, lambda row: [text_of(row, field)])])
