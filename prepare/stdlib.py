"""The running Python's own standard library as text: about 31 MB that every machine has.

python prepare/stdlib.py        writes data/stdlib
"""

import os
import sys
import sysconfig

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))  # where fledge/ is

from fledge.corpus import Files, Stage, configure, prepare

name = 'stdlib'  # folder under data/
tokenizer = 'train'  # made on this text; or gpt2, bytes, ...
vocab_size = 4096  # of --tokenizer=train
val_fraction = 0.02  # of the files
settings = configure(globals())

without = ('site-packages', 'dist-packages', '__pycache__')
source = Files([sysconfig.get_paths()['stdlib']], ('.py',), without=without)
version = sys.version.split()[0]
prepare(settings, f'the standard library of Python {version}', [Stage(source, lambda text: [text])])
