"""The figures of look.py --quality: vocabulary, lengths, repeated and faulty documents, val text in
train, and what to be warned of. `dataset` is look.py's Dataset, `data` one of its splits.

Files may be larger than memory: they are read CHUNK tokens at a time.
"""

import codecs
import hashlib
import os
import re
from collections import Counter

import numpy as np

from fledge import replacing

CHUNK = 1 << 18
WINDOW = 50  # the tokens in a stretch of val that is looked for in train
WINDOWS = 1000  # how many of them are looked for
NEAR_EMPTY = 5  # a document of fewer tokens teaches nothing
FAULTS = {  # in text whose bytes that are no UTF-8 were decoded to \udc80 ... \udcff
    'documents_with_replacement_characters': '\ufffd',
    'documents_with_invalid_bytes': '[\udc80-\udcff]',
    'documents_with_control_characters': '[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]',
}
SPELLED_OUT = 'documents_with_special_tokens_spelled_out'
SHARES = {  # figures of a split that are shares of its documents or windows, and what they say
    'documents_in_train': 'documents of {} are in train too, and flatter its loss',
    'windows_in_train': f'windows of {WINDOW} tokens of {{}} are in train too',
    'duplicates': 'documents of {} repeat another one',
    'near_empty': f'documents of {{}} have fewer than {NEAR_EMPTY} tokens',
    'documents_with_replacement_characters': 'documents of {} hold U+FFFD: badly decoded text',
    'documents_with_invalid_bytes': 'documents of {} hold bytes that are no UTF-8',
    'documents_with_control_characters': 'documents of {} hold control characters',
    SPELLED_OUT: 'documents of {} spell out a special token, which is plain letters there',
}


def chunks(ids, overlap=0):
    """ids, CHUNK at a time, each with the first `overlap` of the next."""
    for start in range(0, len(ids), CHUNK):
        yield ids[start : start + CHUNK + overlap]


def assess(dataset, result):
    """Add to result what the splits are like, and the warnings that follow."""
    windows = {data.name: windows_of(data) for data in dataset.splits if data.name != 'train'}
    wanted = np.concatenate([np.array([], np.uint64), *windows.values()])
    found, hashes = {}, {}
    for data in dataset.splits:  # train comes first
        name, figures = data.name, result['splits'][data.name]
        counts, found[name] = scan(dataset, data, wanted)
        hashes[name], faults = read_documents(dataset, data)
        figures['beyond_vocabulary'] = int(counts[-1])
        figures['duplicates'] = len(data.lengths) - len(np.unique(hashes[name]))
        figures['near_empty'] = int((data.lengths < NEAR_EMPTY).sum())
        figures.update({fault: faults[fault] for fault in (*FAULTS, SPELLED_OUT)})
        if name == 'train':
            result.update(frequencies(dataset, counts[:-1], figures['tokens']))
            plot(dataset, counts[:-1])
            result['lengths'] = histogram(data.lengths)
        elif 'train' in hashes:
            figures['windows'] = len(windows[name])
            figures['windows_in_train'] = int(np.isin(windows[name], found['train']).sum())
            long_ones = hashes[name][data.lengths >= NEAR_EMPTY]  # short ones are alike by chance
            figures['documents_in_train'] = int(np.isin(long_ones, hashes['train']).sum())
    result['warnings'] = warnings_of(dataset, result)


def scan(dataset, data, wanted):
    """How often a split has each id (last: any beyond the vocabulary), its hashes in `wanted`."""
    likely = np.zeros(1 << 16, bool)  # the first 16 bits of a hash rule out most at once
    likely[wanted >> np.uint64(48)] = True
    counts, found = np.zeros(dataset.vocab_size + 1, np.int64), []
    for ids in data.shards:
        for part in chunks(ids, WINDOW - 1):  # a window may end in the next chunk
            counts += np.bincount(dataset.known(part[:CHUNK]), minlength=len(counts))
            hashes = window_hashes(part)
            found.append(np.intersect1d(hashes[likely[hashes >> np.uint64(48)]], wanted))
    return counts, np.concatenate(found)


def window_hashes(ids):
    """A 64-bit number for each stretch of WINDOW tokens: the sum of one for each pair of neighbours
    in it, mixed so that it is not the sum of the tokens."""
    odd = np.uint64(0x9E3779B97F4A7C15)
    pairs = (ids[:-1].astype(np.uint64) << np.uint64(32) | ids[1:]) * odd
    pairs = (pairs ^ pairs >> np.uint64(32)) * odd
    sums = np.append(np.uint64(0), np.cumsum(pairs))  # modulo 2^64, and so is their difference
    return sums[WINDOW - 1 :] - sums[: 1 - WINDOW]


def windows_of(data):
    """The hashes of about WINDOWS stretches of WINDOW tokens, spread evenly over a split."""
    hashes = [np.array([], np.uint64)]
    for ids in data.shards:
        whole = len(ids) // WINDOW
        number = min(whole, -(-WINDOWS // len(data.shards)))
        for place in np.linspace(0, whole - 1, number).astype(int).tolist():
            hashes.append(window_hashes(ids[place * WINDOW : (place + 1) * WINDOW]))
    return np.concatenate(hashes)


def read_documents(dataset, data):
    """A 64-bit number for each document of a split, and how many have each fault."""
    special = dataset.tokenizer.special if dataset.tokenizer else {}
    patterns = FAULTS | {SPELLED_OUT: '|'.join(map(re.escape, special)) or '(?!)'}
    firsts = [re.escape(token[0]) for token in special]  # of what may be one spelled out
    pattern = re.compile('|'.join([*FAULTS.values(), *firsts]))
    # by itself a token may hold half a character, which turns out to be none of FAULTS
    texts = [spelled.decode('utf-8', 'surrogateescape') for spelled in dataset.spelled]
    suspicious = np.array([bool(pattern.search(text)) for text in texts])
    suspicious[list(special.values())] = False
    hashes, faults = [], Counter()
    for ids, _ in data.documents():
        hashes.append(hashlib.blake2b(ids, digest_size=8).digest())
        if any(suspicious[dataset.known(part)].any() for part in chunks(ids)):
            plain = ids[~np.isin(ids, list(special.values()))]
            faults.update(faults_of(dataset, plain, patterns))
    return np.frombuffer(b''.join(hashes), np.uint64), faults


def faults_of(dataset, ids, patterns):
    """Which faults the text of a document without its special tokens has: {fault: pattern}."""
    spelled = (dataset.bytes_of(part) for part in chunks(ids))
    found = set()
    for text in codecs.iterdecode(spelled, 'utf-8', 'surrogateescape'):
        found |= {fault for fault, pattern in patterns.items() if re.search(pattern, text)}
    return found


def frequencies(dataset, counts, tokens):
    """Which ids of the vocabulary train has, and how often."""
    order = np.argsort(-counts, kind='stable')[: np.count_nonzero(counts)].tolist()
    expected = set(range(len(counts)))
    if dataset.tokenizer:
        expected -= set(dataset.tokenizer.special.values())  # they may wait for fine-tuning
        if dataset.tokenizer.bpe:  # such a vocabulary has every byte
            expected -= {i for i in expected if len(dataset.spelled[i]) == 1}
    times = [(i, int(counts[i])) for i in order]
    table = [dict(id=i, count=n, share=n / tokens, text=dataset.text_of(i)) for i, n in times]
    return dict(
        ids_seen=len(order),
        coverage=len(order) / len(counts),
        ids_expected=len(expected),
        ids_missing=len(expected - set(order)),
        most_frequent=table[:20],
        least_frequent=table[:-21:-1],
    )


def plot(dataset, counts):
    """quality.png: how often the token of each rank is in train."""
    from matplotlib.figure import Figure  # without pyplot: faster to import, and never a window

    seen = np.sort(counts[counts > 0])[::-1]
    axes = Figure(figsize=(8, 5)).subplots()
    axes.loglog(np.arange(1, len(seen) + 1), seen, '.-')
    axes.set(xlabel='rank of the token', ylabel='times in train', ylim=(0.7, None))
    with replacing(os.path.join(dataset.folder, 'quality.png'), 'wb') as f:
        axes.figure.savefig(f, format='png', dpi=150)


def histogram(lengths):
    """How many documents have 0, 1, 2-3, 4-7, ... tokens, up to the longest."""
    counts = np.bincount(np.frexp(lengths)[1]).tolist()  # by bits: 0 takes 0, 1 takes 1, 2 and 3 2
    names = ['0', '1'] + [f'{1 << b:,}-{(2 << b) - 1:,}' for b in range(1, len(counts))]
    return dict(zip(names, counts, strict=False))


def shares_of(name, f):
    """(is it a warning, a line) for each of SHARES that is known of a split."""
    for key, text in SHARES.items():
        total = f.get('windows' if key == 'windows_in_train' else 'documents')
        if key in f and total:
            share = f[key] / total
            line = f'{f[key]:,} of {total:,} {text.format(name)} ({share:.1%})'
            yield share > (0.05 if key == 'near_empty' else 0.01), line


def warnings_of(dataset, result):
    """A line for each thing that ruins runs."""
    warnings = []
    for data in dataset.splits:
        name, f = data.name, result['splits'][data.name]
        warnings += [line for bad, line in shares_of(name, f) if bad]
        beyond, size = f['beyond_vocabulary'], dataset.vocab_size
        if beyond:
            warnings.append(f'{beyond:,} tokens of {name} are beyond the vocabulary of {size:,}')
        if dataset.end is not None and data.lengths.sum() == f['tokens']:
            warnings.append(f'{name} has no end-of-text token: a model never learns to stop by it')
        if f['learned'] == 0:
            warnings.append(f'the mask of {name} lets nothing be learned')
        if name == 'val' and f['tokens'] < 10_000:
            warnings.append(f'val has {f["tokens"]:,} tokens: under 10,000 its loss is noisy')
    if result.get('most_frequent'):
        first = result['most_frequent'][0]
        most = 0.1 if dataset.vocab_size >= 1000 else 0.3  # of characters, a space is a fifth
        if first['share'] > most:
            warnings.append('one token is {share:.1%} of train: {id} {text}'.format(**first))
        missing, expected = result['ids_missing'], result['ids_expected']
        if missing > 0.05 * expected:
            what = f'{missing:,} of the {expected:,} ids of the vocabulary, bytes and special ones'
            warnings.append(f'{what} left out, are never seen in train ({missing / expected:.1%})')
    return warnings


def show_quality(dataset, result):
    """Print what assess found."""
    if 'lengths' in result:  # there is a train
        seen = f'{result["ids_seen"]:,} of the {dataset.vocab_size:,} ids of the vocabulary'
        print(f'\n{seen} are in train ({result["coverage"]:.1%})')
        for which in ('most', 'least'):
            print(f'\nthe {which} frequent: id, times, share of train, text')
            for t in result[f'{which}_frequent']:
                print(f'{t["id"]:8} {t["count"]:13,} {t["share"]:9.4%}  {t["text"]}'.rstrip())
        print('\ntokens of a document of train, the end of text not counted:')
        for lengths, n in result['lengths'].items():
            print(f'{lengths:>25} {n:13,} {n / result["splits"]["train"]["documents"]:6.1%}')
        print(f'\ntimes of each rank: {os.path.join(dataset.folder, "quality.png")}')
    for name, f in result['splits'].items():  # of the total there is an empty line alone
        print('', *[line for _, line in shares_of(name, f)], sep='\n')
    print(*[f'WARNING: {line}' for line in result['warnings']] or ['no warnings'], sep='\n')
