"""Joins what --shard=0, --shard=1, ... of --num_shards=n prepared, on as many machines, into one dataset; no token is copied.

python prepare/merge.py --name=fineweb_edu      data/fineweb_edu/shard_00000_of_00008, ... become data/fineweb_edu
"""

import glob
import os
import shutil
import sys

import numpy as np

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from fledge import UserError, lock_folder
from fledge.configurator import configure
from fledge.tokens import read_meta
from prepare.finish import publish
from prepare.worker import SPLITS

name = ''  # folder under data/ that holds the shards' folders
configure(globals())

folder = os.path.join('data', name)
if not name or not os.path.isdir(folder):
    raise UserError(
        f'there is no {folder}; shards come of --name={name or "NAME"} --num_shards=n --shard=0, --shard=1, ...'
    )
lock = lock_folder(folder, wait=True)
found = sorted(glob.glob(f'{glob.escape(folder)}/shard_*_of_*'))
n = int(found[0].rpartition('_')[2]) if found else 0
if (
    found
    and read_meta(folder).get('shards') == n
    and not glob.glob(f'{glob.escape(folder)}/shard_*/*.bin')
):  # all is moved: a merge was killed while it tidied up
    for shard in found:
        shutil.rmtree(shard)
    print(f'{folder} was merged before')
    raise SystemExit
if not found:
    raise UserError(
        f'{folder} holds no shards; they come of --name={name} --num_shards=n --shard=0, --shard=1, ...'
    )
shards = [f'{folder}/shard_{i:05d}_of_{n:05d}' for i in range(n)]
if set(found) - set(shards):
    raise UserError(f'{folder} holds shards of several kinds: {found[0]}, {found[-1]}')
metas = [read_meta(shard) for shard in shards]
for shard, meta in zip(shards, metas):
    if 'settings' not in meta or glob.glob(f'{glob.escape(shard)}/partial-*'):
        raise UserError(f'{shard} is not prepared yet')
    with open(f'{shard}/tokenizer.json', 'rb') as f, open(f'{shards[0]}/tokenizer.json', 'rb') as g:
        if f.read() != g.read() or any(
            meta['settings'][k] != v
            for k, v in metas[0]['settings'].items()
            if k not in ('shard', 'num_proc', 'retries')
        ):
            raise UserError(
                f'{shard} and {shards[0]} were prepared with different settings or tokenizers'
            )

files, splits = {'tokenizer.json': f'{shards[0]}/tokenizer.json'}, {}
for split in SPLITS:
    here = [
        (shard, meta['splits'][split])
        for shard, meta in zip(shards, metas)
        if split in meta['splits']
    ]
    files[split] = [
        f'{shard}/{split}.bin' if m['files'] == 1 else f'{shard}/{split}_{i:06d}.bin'
        for shard, m in here
        for i in range(m['files'])
    ]
    if here:
        splits[split] = {key: sum(m[key] for _, m in here) for key in here[0][1]}
    elif split != 'test':
        raise UserError(
            f'the shards in {folder} have no {split} text; prepare them with a larger val_fraction, or all with --num_shards=1'
        )
hashes = np.concatenate([np.fromfile(f'{shard}/hashes', np.uint64) for shard in shards])
repeated = len(hashes) - len(np.unique(hashes))
dropped = {}
for why, note in ((why, note) for meta in metas for why, note in meta['dropped'].items()):
    so_far = dropped.get(why, dict(count=0, first=[]))
    dropped[why] = dict(
        count=so_far['count'] + note['count'], first=(so_far['first'] + note['first'])[:3]
    )
publish(
    folder,
    files,
    metas[0]
    | dict(
        splits=splits,
        dropped=dropped,
        shards=n,
        in_several_shards=repeated,
        instead=sum((meta['instead'] for meta in metas), []),
        repaired=dict(count=sum(meta['repaired'].get('count', 0) for meta in metas)),
    ),
)
for shard in shards:
    shutil.rmtree(shard)
for split, m in splits.items():
    print(
        f'{folder}/{split}: {m["tokens"]:,} tokens of {m["documents"]:,} documents in {m["files"]} files'
    )
if repeated:
    print(f'{repeated:,} documents are in several shards')
