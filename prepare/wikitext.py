"""WikiText: good articles of Wikipedia, raw; small, and others publish perplexities of it.

python prepare/wikitext.py --version=103        writes data/wikitext, with val and test
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))  # where fledge/ is

from fledge.corpus import Hub, Stage, article, configure, is_title, prepare

name = 'wikitext'  # folder under data/
repo = 'Salesforce/wikitext'  # on huggingface.co
version = 2  # 2 (2 million words) or 103 (103 million)
settings = configure(globals())

subset = f'wikitext-{version}-raw-v1'
stages = []
for theirs, ours in (('validation', 'val'), ('test', 'test'), ('train', 'train')):
    source = Hub(repo, subset, theirs, columns=['text'], starts=is_title)
    stages.append(Stage(source, lambda rows: [article(rows)], ours))
prepare(settings, f'{repo}, {subset}', stages)
