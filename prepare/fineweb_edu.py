"""FineWeb-Edu: web pages that a classifier found educational, streamed and shuffled.

python prepare/fineweb_edu.py --target_tokens=1000000000        writes data/fineweb_edu
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))  # where fledge/ is

from fledge.corpus import Hub, Stage, configure, prepare, text_of

name = 'fineweb_edu'  # folder under data/
repo = 'HuggingFaceFW/fineweb-edu'  # on huggingface.co
subset = 'sample-10BT'  # or sample-100BT, sample-350BT, default (all of it)
val_fraction = 0.0005  # of the documents
settings = configure(globals())

source = Hub(repo, subset, columns=['text'], shuffle=settings['seed'])
prepare(settings, f'{repo}, {subset}', [Stage(source, lambda row: [text_of(row, 'text')])])
