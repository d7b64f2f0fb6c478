"""Dolma: AllenAI's open pretraining corpus, streamed; C4 where it cannot be had.

python prepare/dolma.py         writes data/dolma, 5 billion tokens
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))  # where fledge/ is

from fledge.corpus import Hub, OrElse, Stage, Urls, configure, prepare, text_of

name = 'dolma'  # folder under data/
repo = 'allenai/dolma'  # on huggingface.co
version = 'v1_6-sample'  # a file list of the repository, urls/VERSION.txt: 10 billion tokens
target_tokens = 5_000_000_000  # then it stops; 0: the whole list
tokenizer = 'train'  # made on this text; or gpt2, bytes, ...
vocab_size = 32000  # of --tokenizer=train; what config/dolma_75m.py takes
val_fraction = 0.0005  # of the documents
settings = configure(globals())

dolma = Urls(repo, f'urls/{version}.txt', settings['seed'])
c4 = Hub('allenai/c4', 'en', columns=['text'], shuffle=settings['seed'])
stage = Stage(OrElse(dolma, c4), lambda row: [text_of(row, 'text')])
prepare(settings, f'{repo}, {version}', [stage])
