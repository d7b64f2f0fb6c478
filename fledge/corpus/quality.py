"""The figures of look.py --quality: vocabulary, lengths, repeated and faulty documents, val text in
train, and what to be warned of.

`dataset` is look.py's Dataset, `data` one of its splits. Files may be larger than memory: they are
read CHUNK tokens at a time.
"""

import codecs
import hashlib
import os
import re
from collections import Counter

import numpy as np

from fledge import replacing

CHUNK = 1 << 18
WINDOW, WINDOWS = (
    50,
    1000,
)  # tokens in a stretch of val that is looked for in train, and how many of them
NEAR_EMPTY = 5  # a document of fewer tokens teaches nothing
FAULTS = {  # in text whose bytes that are no UTF-8 were decoded to \udc80 ... \udcff
    'replacement_characters': '\ufffd',
    'invalid_bytes': '[\udc80-\udcff]',
    'control_characters': '[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]',
}
SHARES = [  # a figure, of what it is a share, the largest that is no warning, what it says
    (
        'documents_in_train',
        'documents',
        0.01,
        'documents of {} are in train too, and flatter its loss',
    ),
    (
        'windows_in_train',
        'windows',
        0.01,
        f'windows of {WINDOW} tokens of {{}} are in train too, and flatter its loss',
    ),
    ('duplicates', 'documents', 0.01, 'documents of {} repeat another one'),
    ('near_empty', 'documents', 0.05, f'documents of {{}} have fewer than {NEAR_EMPTY} tokens'),
    (
        'documents_with_replacement_characters',
        'documents',
        0.01,
        'documents of {} hold U+FFFD: their text was decoded wrongly',
    ),
    (
        'documents_with_invalid_bytes',
        'documents',
        0.01,
        'documents of {} hold bytes that are no UTF-8',
    ),
    (
        'documents_with_control_characters',
        'documents',
        0.01,
        'documents of {} hold control characters',
    ),
]


def chunks(ids):
    """(where it begins, CHUNK ids), ..."""
    for at in range(0, len(ids), CHUNK):
        yield at, ids[at : at + CHUNK]


def assess(dataset, result):
    """Add to result what the splits are like, and the warnings that follow."""
    splits = result['splits']
    windows = {data.name: windows_of(data) for data in dataset.splits if data.name != 'train'}
    hashes = {}
    for data in dataset.splits:  # train comes first
        name, figures = data.name, splits[data.name]
        wanted = (
            [window for theirs in windows.values() for window in theirs] if name == 'train' else []
        )
        counts, found, suspects = scan(dataset, data, np.array(wanted, np.uint64))
        hashes[name] = document_hashes(data)
        faults = Counter(
            fault for number in suspects for fault in faults_of(dataset, data.document(number)[0])
        )
        figures['beyond_vocabulary'] = int(counts[-1])
        figures['duplicates'] = len(hashes[name]) - len(np.unique(hashes[name]))
        figures['near_empty'] = int((data.lengths < NEAR_EMPTY).sum())
        for fault in FAULTS:
            figures[f'documents_with_{fault}'] = faults[fault]
        if name == 'train':
            result.update(frequencies(dataset, counts[:-1], figures['tokens']))
            plot(dataset, counts[:-1])
            result['lengths'] = histogram(data.lengths)
            for other, theirs in windows.items():
                splits[other]['windows'] = len(theirs)
                splits[other]['windows_in_train'] = int(np.isin(theirs, found).sum())
        elif 'train' in hashes:  # that a short one is in train too says nothing
            figures['documents_in_train'] = int(
                np.isin(hashes[name][data.lengths >= NEAR_EMPTY], hashes['train']).sum()
            )
    result['warnings'] = warnings_of(dataset, result)


def scan(dataset, data, wanted):
    """One pass over a split: how often each id occurs (the last count: all ids beyond the
    vocabulary), which of the
    window hashes `wanted` it has, and the numbers of the documents with tokens that may be
    FAULTS."""
    fault = re.compile(
        '|'.join(FAULTS.values())
    )  # of a token alone, maybe: half a character may turn out to be none
    suspicious = np.array(
        [bool(fault.search(b.decode('utf-8', 'surrogateescape'))) for b in dataset.spelled]
    )
    likely = np.zeros(
        1 << 16, bool
    )  # the first 16 bits of the wanted hashes: they rule out most windows at once
    likely[wanted >> np.uint64(48)] = True
    counts = np.zeros(dataset.vocab_size + 1, np.int64)
    found, suspects, documents_before = [wanted[:0]], [], 0
    for ids, ends in zip(data.shards, data.ends, strict=True):
        for at, part in chunks(ids):
            part = dataset.known(part)
            counts += np.bincount(part, minlength=len(counts))
            places = at + np.flatnonzero(suspicious[part])
            suspects.append(
                documents_before + np.unique(np.searchsorted(ends, places, side='right'))
            )
            if len(wanted):
                hashed = window_hashes(
                    ids[at : at + CHUNK + WINDOW - 1]
                )  # a window may end in the next chunk
                found.append(np.intersect1d(hashed[likely[hashed >> np.uint64(48)]], wanted))
        documents_before += len(ends)
    return counts, np.concatenate(found), np.unique(np.concatenate(suspects)).tolist()


def window_hashes(ids):
    """A 64-bit number for each stretch of WINDOW tokens: the sum of one for each pair of neighbours
    in it."""
    odd = np.uint64(0x9E3779B97F4A7C15)
    pairs = (ids[:-1].astype(np.uint64) << np.uint64(32) | ids[1:]) * odd
    pairs = (
        pairs ^ pairs >> np.uint64(32)
    ) * odd  # else the sum of the pairs would be that of the tokens
    sums = np.append(np.uint64(0), np.cumsum(pairs))  # modulo 2^64, and so is their difference
    return sums[WINDOW - 1 :] - sums[: 1 - WINDOW]


def windows_of(data):
    """The hashes of about WINDOWS stretches of WINDOW tokens, spread evenly over a split."""
    hashes = []
    for ids in data.shards:
        whole = len(ids) // WINDOW
        for place in (
            np.linspace(0, whole - 1, min(whole, -(-WINDOWS // len(data.shards))))
            .astype(int)
            .tolist()
        ):
            hashes.append(window_hashes(ids[place * WINDOW : (place + 1) * WINDOW])[0])
    return np.array(hashes, np.uint64)


def document_hashes(data):
    """A 64-bit number for each document, of its bytes in the file."""
    hashes = []
    for ids, ends in zip(data.shards, data.ends, strict=True):
        starts = [0, *ends[:-1].tolist()]
        hashes += [
            hashlib.blake2b(ids[start:end], digest_size=8).digest()
            for start, end in zip(starts, ends.tolist(), strict=True)
        ]
    return np.frombuffer(b''.join(hashes), np.uint64)


def faults_of(dataset, ids):
    """Which of FAULTS the text of a document has."""
    decoder = codecs.getincrementaldecoder('utf-8')(
        'surrogateescape'
    )  # a chunk may end within a character
    found = set()
    for at, part in chunks(ids):
        spelled = b''.join([dataset.spelled[i] for i in dataset.known(part).tolist()])
        text = decoder.decode(spelled, final=at + CHUNK >= len(ids))
        found |= {fault for fault, pattern in FAULTS.items() if re.search(pattern, text)}
    return found


def frequencies(dataset, counts, tokens):
    """Which ids of the vocabulary train has, and how often."""
    order = np.argsort(-counts, kind='stable')[: np.count_nonzero(counts)].tolist()
    most, least = [
        [
            dict(id=i, count=int(counts[i]), share=counts[i] / tokens, text=dataset.text_of(i))
            for i in ids
        ]
        for ids in (order[:20], order[:-21:-1])
    ]
    expected = set(range(len(counts)))
    if dataset.tokenizer:
        expected -= set(dataset.tokenizer.special.values())  # they may wait for fine-tuning
        if dataset.tokenizer.bpe:
            expected -= {
                i for i in expected if len(dataset.spelled[i]) == 1
            }  # such a vocabulary has every byte
    return dict(
        ids_seen=len(order),
        coverage=len(order) / len(counts),
        ids_expected=len(expected),
        ids_missing=len(expected - set(order)),
        most_frequent=most,
        least_frequent=least,
    )


def plot(dataset, counts):
    """quality.png: how often the token of each rank is in train."""
    from matplotlib.figure import Figure  # without pyplot: faster to import, and never a window

    seen = np.sort(counts[counts > 0])[::-1]
    ranks = np.arange(1, len(seen) + 1)
    title = f'{os.path.basename(dataset.folder)}: {counts.sum():,} tokens, '
    title += f'{len(seen):,} different ones of {len(counts):,}'
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    axes.loglog(ranks, seen, '.-', label='train')
    axes.loglog(ranks, seen[:1] / ranks, '--', color='gray', label="Zipf's law, 1 / rank")
    axes.set(
        xlabel='rank of the token',
        ylabel='times in train',
        ylim=(0.7, None),
        title=title.replace('$', r'\$'),
    )
    axes.legend()
    axes.grid(alpha=0.3)
    with replacing(os.path.join(dataset.folder, 'quality.png'), 'wb') as f:
        figure.savefig(f, format='png', dpi=150)


def histogram(lengths):
    """How many documents have 0, 1, 2-3, 4-7, ... tokens, up to the longest."""
    bits = np.bincount(np.frexp(lengths)[1])  # 0 takes 0 bits, 1 takes 1, 2 and 3 take 2
    return {
        f'{1 << b - 1:,}-{(1 << b) - 1:,}' if b > 1 else str(b): int(n) for b, n in enumerate(bits)
    }


def shares_of(name, f):
    """(is it a warning, a line) for each of SHARES that is known of a split."""
    for key, total, most, text in SHARES:
        if key in f and f[total]:
            share = f[key] / f[total]
            yield share > most, f'{f[key]:,} of {f[total]:,} {text.format(name)} ({share:.1%})'


def warnings_of(dataset, result):
    """A line for each thing that ruins runs."""
    warnings = []
    for data in dataset.splits:
        name, f = data.name, result['splits'][data.name]
        warnings += [line for bad, line in shares_of(name, f) if bad]
        if f['beyond_vocabulary']:
            warnings.append(
                f'{f["beyond_vocabulary"]:,} tokens of {name} are beyond the vocabulary of '
                f'{dataset.vocab_size:,}: '
                'training stops at the first of them'
            )
        if dataset.end is not None and not data.terminated:
            warnings.append(
                f'{name} has no end-of-text token: '
                'a model trained on such text never learns to stop'
            )
        if f['learned'] == 0:
            warnings.append(f'the mask of {name} lets nothing be learned')
        if name == 'val' and f['tokens'] < 10_000:
            warnings.append(f'val has {f["tokens"]:,} tokens: under 10,000 its loss is noisy')
    if result.get('most_frequent'):
        first, missing, expected = (
            result['most_frequent'][0],
            result['ids_missing'],
            result['ids_expected'],
        )
        if first['share'] > (
            0.1 if dataset.vocab_size >= 1000 else 0.3
        ):  # of characters, a space is a fifth
            warnings.append(
                f'one token is {first["share"]:.1%} of train: {first["id"]} {first["text"]}'
            )
        if missing > 0.05 * expected:
            warnings.append(
                f'{missing:,} of the {expected:,} ids of the vocabulary, single bytes and special '
                'tokens left out, '
                f'are never seen in train ({missing / expected:.1%})'
            )
    return warnings


def show_quality(dataset, result):
    """Print what assess found."""
    splits = {data.name: result['splits'][data.name] for data in dataset.splits}
    if 'train' in splits:
        print(
            f'\n{result["ids_seen"]:,} of the {dataset.vocab_size:,} ids of the vocabulary are in '
            f'train ({result["coverage"]:.1%})'
        )
        for which in ('most', 'least'):
            print(f'\nthe {which} frequent: id, times, share of train, text')
            for t in result[f'{which}_frequent']:
                print(f'{t["id"]:8} {t["count"]:13,} {t["share"]:9.4%}  {t["text"]}'.rstrip())
        print('\ntokens of a document of train, the end of text not counted:')
        for lengths, n in result['lengths'].items():
            bar = '█' * -(-40 * n // max(result['lengths'].values()))
            print(f'{lengths:>25} {n:13,} {n / splits["train"]["documents"]:6.1%} {bar}'.rstrip())
        print(f'\ntimes of each rank: {os.path.join(dataset.folder, "quality.png")}')
    for name, f in splits.items():
        print('', *[line for _, line in shares_of(name, f)], sep='\n')
    print('', *[f'WARNING: {line}' for line in result['warnings']] or ['no warnings'], sep='\n')
