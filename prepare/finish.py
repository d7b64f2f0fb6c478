"""The end of the pipeline: val where chance gave it nothing, final names, and the report."""

import glob
import json
import math
import os
import shlex
import shutil
import sys

from fledge import UserError, replacing
from fledge.tokens import split_files
from prepare.sources import REPAIRED
from prepare.worker import SPLITS, end_of


def share(s, state, writers, encoder, masked, source):
    """Where the split left train or val empty, it gets the end of the other's last document; of masked ones the last example."""
    sides = [split for split in ('train', 'val') if state['splits'][split]['tokens']]
    if len(sides) != 1:
        return
    full, empty = sides[0], {'train': 'val', 'val': 'train'}[sides[0]]
    ids, learned = writers[full].last_shard()
    end = [] if masked else end_of(encoder).tolist()
    tokens, size, documents = state['splits'][full]['last']
    moved = tokens
    if not masked:
        fraction = s.val_fraction if empty == 'val' else 1 - s.val_fraction
        moved = min(
            tokens,
            len(ids),
            math.ceil((state['splits'][full]['tokens'] - len(end)) * fraction) + len(end),
        )
        while (
            moved < min(tokens, len(ids))
            and encoder.token_bytes.get(int(ids[-moved]), b'a')[0] & 0xC0 == 0x80
        ):  # not within a character
            moved += 1
    cut = moved < tokens
    if cut:
        size, documents = (
            sum(
                len(encoder.token_bytes.get(int(i), b''))
                for i in ids[len(ids) - moved : len(ids) - len(end)]
            ),
            1,
        )
    if moved < 2 or len(ids) - moved < 2:
        state['bytes'] *= len(writers[full].shards) > 1  # nothing worth keeping
        raise UserError(f'{source} gives no {empty} text: it is too short for its val_fraction')
    writers[empty].write(ids[-moved:], [moved], learned if learned is None else learned[-moved:])
    n = dict(
        tokens=moved,
        bytes=size,
        documents=documents,
        learned=int(learned[-moved:].sum()) if masked else moved,
    )
    state['splits'][empty].update(n)
    back = (
        dict(tokens=len(end), learned=len(end), bytes=0, documents=1)
        if cut
        else dict.fromkeys(n, 0)
    )  # the document that was cut ends in both
    for key in n:
        state['splits'][full][key] -= n[key] - back[key]
    state['cut'] = [full, len(ids) - moved, end if cut else []]


def publish(folder, source, meta):
    """Move whole files to their final names in folder, and write meta.json; done again after a kill, it ends the same.

    source: {split: the paths of its .bin files, beside which .mask.bin files lie if meta['masked']}, and 'tokenizer.json': its path.
    """
    moves = []
    for split in SPLITS:
        paths = source.get(split, [])
        names = [split] if len(paths) == 1 else [f'{split}_{i:06d}' for i in range(len(paths))]
        moves += [
            (path[:-4] + ending, f'{folder}/{name}{ending}')
            for path, name in zip(paths, names)
            for ending in ('.bin', '.mask.bin')[: 1 + meta['masked']]
        ]
        moved = [target for path, target in moves if not os.path.exists(path)]  # before a kill
        for target in moved:
            if not os.path.exists(target):
                raise UserError(f'{target} is nowhere, nor what it is made of; prepare it again')
        for path in split_files(folder, split) + glob.glob(
            f'{glob.escape(folder)}/{split}*.mask.bin'
        ):
            if path not in moved:
                os.remove(path)  # an older dataset's
    with (
        open(source['tokenizer.json'], encoding='utf-8') as old,
        replacing(f'{folder}/tokenizer.json') as new,
    ):
        shutil.copyfileobj(old, new)
    with replacing(f'{folder}/meta.json') as f:
        json.dump(meta, f, indent=1)
    for path, target in reversed(moves):  # train's first file last of all: what looks prepared is
        if os.path.exists(path):
            os.replace(path, target)


def remove(partial):
    """Remove the folder of an unfinished run, and first of all what would make another run go on from it."""
    if os.path.exists(f'{partial}/state.json'):
        os.remove(f'{partial}/state.json')
    shutil.rmtree(partial)


def meta_of(state, source, settings, masked):
    """What meta.json says of a finished run."""
    notes = {
        why: dict(count=count, first=places) for why, (count, places) in state['notes'].items()
    }
    splits = {
        split: {key: n[key] for key in ('tokens', 'bytes', 'documents', 'learned')}
        | dict(files=len(n['shards']))
        for split, n in state['splits'].items()
        if n['tokens']
    }
    return dict(
        source=source,
        vocab_size=state['vocab_size'],
        masked=masked,
        splits=splits,
        repaired=notes.pop(REPAIRED, {}),
        dropped=notes,
        instead=list(state['instead'].values()),
        settings=settings,
        command=shlex.join(['python', *sys.argv]),
    )


def note(why, count, places):
    """One reason for which records were left out, how many, and where the first of them are."""
    return f'{count:,} x {why}' + (
        f' ({", ".join(places)}{", ..." * (count > len(places))})' if places else ''
    )


def report(folder, state, stages):
    """Print what a finished run made, left out, repaired, and could not have."""
    for split, n in state['splits'].items():
        if n['tokens']:
            name = f'{folder}/{split}{"_*" * (len(n["shards"]) > 1)}.bin'
            print(
                f'{name}: {n["tokens"]:,} tokens of {n["documents"]:,} documents, {n["bytes"] / n["tokens"]:.2f} bytes a token'
            )
    for why, (count, places) in state['notes'].items():
        print(f'{"repaired" if why == REPAIRED else "left out"}: {note(why, count, places)}')
    for index, why in state['instead'].items():
        print(
            f'{stages[int(index)].instead.source.identity} took the place of {stages[int(index)].source.identity}: {why}'
        )
