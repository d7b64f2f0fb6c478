"""The running Python's own standard library, its source as text: about 31 MB that every machine already has.

python prepare/stdlib.py        writes data/stdlib
"""
import os
import sys
import sysconfig

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from fledge.configurator import configure
from fledge.tokenizer import train_bpe
from prepare.pipeline import split_documents, write_dataset

name = 'stdlib'         # folder under data/
vocab_size = 4096       # of the byte-level BPE trained on it
val_fraction = 0.02     # of the files
num_proc = 0            # threads; 0: every core
seed = 1337
configure(globals())

root, texts = sysconfig.get_paths()['stdlib'], []
for folder, folders, files in os.walk(root):
    folders[:] = sorted(f for f in folders if f not in ('site-packages', 'dist-packages', '__pycache__'))
    for file in sorted(files):
        if file.endswith('.py'):
            try:
                with open(os.path.join(folder, file), 'rb') as f:
                    text = f.read().decode('utf-8', errors='ignore')  # a few test files are not UTF-8 on purpose
            except OSError:  # a link to nowhere
                continue
            if text:
                texts.append(text)
print(f'{len(texts):,} files, {sum(map(len, texts)) / 1e6:.1f} MB of Python source; training a tokenizer on them')
write_dataset(name, split_documents(texts, val_fraction, seed), train_bpe(texts, vocab_size),
              f'the standard library of Python {sys.version.split()[0]}', num_proc)
