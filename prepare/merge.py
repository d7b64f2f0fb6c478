"""Joins what --shard=0, --shard=1, ... of --num_shards=n prepared; no token is copied.

python prepare/merge.py --name=fineweb_edu      joins data/fineweb_edu/shard_00000_of_00008, ...
"""

import glob
import itertools
import os
import shlex
import shutil
import sys

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))  # where fledge/ is

from fledge import UserError, chat_template, lock_folder, read_meta
from fledge.configurator import configure
from fledge.corpus.encoding import SPLITS
from fledge.corpus.writing import publish, report

name = ''  # folder under data/ that holds the folders of the slices
configure(globals())

folder = os.path.join('data', name)
come_of = f'--name={shlex.quote(name) if name else "NAME"} --num_shards=n --shard=0, --shard=1, ...'
if not name or not os.path.isdir(folder):
    raise UserError(f'there is no {folder}; slices come of {come_of}')
lock = lock_folder(folder, wait=True)
found = sorted(glob.glob(f'{glob.escape(folder)}/shard_*_of_*'))
merged = read_meta(folder).get('shards')
if not found and not merged:
    raise UserError(f'{folder} holds no slices; they come of {come_of}')
n = int(found[0].rpartition('_')[2]) if found else merged
tokens_left = glob.glob(f'{glob.escape(folder)}/shard_*/*.bin')
if merged == n and not tokens_left:  # a merge was killed as it tidied up
    for path in found:
        shutil.rmtree(path)
    print(f'{folder} was merged before')
    raise SystemExit
slices = [f'{folder}/shard_{i:05d}_of_{n:05d}' for i in range(n)]
if set(found) - set(slices):
    raise UserError(f'{folder} holds slices of several kinds: {found[0]}, {found[-1]}')


def made_with(path):
    """What has to be the same for all slices: tokenizer and template, begin, settings but some."""
    meta, own = read_meta(path), ('shard', 'num_proc', 'retries')
    with open(f'{path}/tokenizer.json', 'rb') as f:
        tokenizer = f.read(), chat_template.read(path)
    # a slice of an older version says nothing of begin
    settings = {k: v for k, v in meta['settings'].items() if k not in own}
    return tokenizer, meta.get('begin', []), settings


for path in slices:
    if 'settings' not in read_meta(path) or glob.glob(f'{glob.escape(path)}/partial-*'):
        raise UserError(f'{path} is not prepared yet')
    if made_with(path) != made_with(slices[0]):
        different = 'were prepared with different settings or tokenizers'
        raise UserError(f'{path} and {slices[0]} {different}')

metas = [read_meta(path) for path in slices]
files, splits = {}, {}
for split in SPLITS:
    files[split] = []
    for path, meta in zip(slices, metas, strict=True):
        counts = meta['splits'].get(split, dict(files=0))
        names = [f'{split}_{i:06d}' for i in range(counts['files'])]
        if counts['files'] == 1:
            names = [split]
        files[split] += [f'{path}/{file}.bin' for file in names]
        so_far = splits.get(split, {})
        splits[split] = so_far | {key: so_far.get(key, 0) + counts[key] for key in counts}
    if not files[split]:
        del splits[split]
        if split != 'test':
            again = 'prepare them with a larger val_fraction, or all with --num_shards=1'
            raise UserError(f'the slices in {folder} have no {split} text; {again}')
notes = dict(dropped={}, spelled_out={}, lost={})
for meta, kind in itertools.product(metas, notes):
    for why, note in meta.get(kind, {}).items():
        so_far = notes[kind].setdefault(why, dict(count=0, first=[]))
        so_far['count'] += note['count']
        so_far['first'] = (so_far['first'] + note['first'])[:3]
hashes = np.concatenate([np.fromfile(f'{path}/hashes', np.uint64) for path in slices])
repeated = len(hashes) - len(np.unique(hashes))
meta = metas[0] | dict(
    **notes,
    splits=splits,
    shards=n,
    in_several_shards=repeated,
    instead=list(dict.fromkeys(sum((meta.get('instead', []) for meta in metas), []))),
    repaired=dict(count=sum(meta.get('repaired', {}).get('count', 0) for meta in metas)),
)
publish(folder, files, f'{slices[0]}/tokenizer.json', meta)
for path in slices:
    shutil.rmtree(path)
report(folder, meta)
if repeated:
    print(f'{repeated:,} documents are in several slices')
