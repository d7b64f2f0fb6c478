"""OpenWebText: what GPT-2 was trained on, as far as it could be gathered again; nanoGPT's corpus.

python prepare/openwebtext.py       writes data/openwebtext
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))  # where fledge/ is

from fledge.corpus import Hub, Stage, configure, prepare, text_of

name = 'openwebtext'  # folder under data/
repo = 'Skylion007/openwebtext'  # on huggingface.co
val_fraction = 0.0005  # of the documents, as in nanoGPT
settings = configure(globals())

# main has but a loading script, which datasets no longer runs; proposal 18 has the data
source = Hub(repo, columns=['text'], revision='refs/pr/18')
prepare(settings, repo, [Stage(source, lambda row: [text_of(row, 'text')])])
