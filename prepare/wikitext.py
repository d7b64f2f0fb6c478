"""WikiText: good and featured articles of Wikipedia, raw; small enough for perplexities that others publish as well.

python prepare/wikitext.py --version=103        writes data/wikitext, with val and test
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from fledge.configurator import configure
from prepare import pipeline
from prepare.pipeline import Stage, prepare
from prepare.records import article, is_title
from prepare.streams import Hub

name = 'wikitext'  # folder under data/
repo = 'Salesforce/wikitext'
version = 2  # 2 (2 million words) or 103 (103 million)
settings = configure(globals(), also=pipeline.__file__)

prepare(
    [
        Stage(
            Hub(repo, f'wikitext-{version}-raw-v1', theirs, columns=['text'], starts=is_title),
            lambda rows: [article(rows)],
            ours,
        )
        for theirs, ours in (('validation', 'val'), ('test', 'test'), ('train', 'train'))
    ],
    f'{repo}, wikitext-{version}-raw-v1',
    settings,
)
