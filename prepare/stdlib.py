"""The running Python's own standard library, its source as text: about 31 MB that every machine already has.

python prepare/stdlib.py        writes data/stdlib
"""

import os
import sys
import sysconfig

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from fledge.configurator import configure
from prepare import pipeline
from prepare.pipeline import Stage, prepare
from prepare.sources import Files

name = 'stdlib'  # folder under data/
tokenizer = 'train'  # made on this text; or any other (see below)
vocab_size = 4096  # of --tokenizer=train
val_fraction = 0.02  # of the files
settings = configure(globals(), also=pipeline.__file__)

root = sysconfig.get_paths()['stdlib']
prepare(
    [
        Stage(
            Files([root], ('.py',), without=('site-packages', 'dist-packages', '__pycache__')),
            lambda text: [text],
        )
    ],
    f'the standard library of Python {sys.version.split()[0]}',
    settings,
)
