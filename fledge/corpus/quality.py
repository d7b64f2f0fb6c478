"""A prepared dataset as look.py reads it, and what --quality finds in it: vocabulary, lengths,
repeated and faulty documents, val text in train, and what to be warned of.

Files may be larger than memory: they are read CHUNK tokens at a time.
"""

import codecs
import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator

import numpy as np

from fledge import read_meta, replacing
from fledge.report import new_axes
from fledge.tokenizer import find_tokenizer
from fledge.tokens import mask_path, read_bin, read_mask, split_files

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


def chunks(ids: np.ndarray, overlap: int = 0) -> Iterator[np.ndarray]:
    """ids, CHUNK at a time, each with the first `overlap` of the next."""
    for start in range(0, len(ids), CHUNK):
        yield ids[start : start + CHUNK + overlap]


class Split:
    """One split: its shards, the mask of each (None: all is learned), and where each one's
    documents end: after an end-of-text token, or with the shard."""

    def __init__(self, folder: str, name: str, end: int | None, headerless: bool):
        self.name = name
        self.shards, self.masks, self.ends, self.learned = [], [], [], 0
        lengths = []
        for path in split_files(folder, name):
            ids = np.asarray(read_bin(path, headerless))
            is_end = [part == end for part in chunks(ids)]  # an end of None equals no id
            ends = np.unique(np.append(np.flatnonzero(np.concatenate(is_end)) + 1, len(ids)))
            self.shards.append(ids)
            self.ends.append(ends)
            lengths.append(np.diff(ends, prepend=0) - (ids[ends - 1] == end))
            mask = read_mask(path, len(ids)) if os.path.exists(mask_path(path)) else None
            self.masks.append(mask)
            self.learned += len(ids) if mask is None else int(np.count_nonzero(mask))
        self.lengths = np.concatenate(lengths)  # without the end of text itself

    def documents(self, first: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """The (ids, mask) of each document, from number `first` on, counted from 0."""
        for ids, mask, ends in zip(self.shards, self.masks, self.ends, strict=True):
            for i in range(first, len(ends)):
                here = slice(ends[i - 1] if i else 0, ends[i])
                yield ids[here], None if mask is None else mask[here]
            first = max(first - len(ends), 0)


class Dataset:
    """Some splits of a dataset, its tokenizer (or None), and the bytes that each id spells."""

    def __init__(self, folder: str, names: list[str]):
        self.folder, self.tokenizer = folder, find_tokenizer(folder)
        self.end = self.tokenizer.end_of_text if self.tokenizer else None
        self.splits = [Split(folder, name, self.end, not read_meta(folder)) for name in names]
        if self.tokenizer:
            self.vocab_size, spelled = self.tokenizer.vocab_size, self.tokenizer.token_bytes
            self.sizes = np.append(self.tokenizer.text_bytes(self.vocab_size), 0)
        else:
            largest = max(int(ids.max()) for data in self.splits for ids in data.shards)
            self.vocab_size, spelled = min(largest + 1, 1 << 20), {}  # a broken file has any ids
            self.sizes = np.zeros(self.vocab_size + 1, np.int64)
        # one more than the vocabulary, as in sizes: the last stands for any id beyond it
        self.spelled = [spelled.get(i, b'') for i in range(self.vocab_size)] + [b'']

    def known(self, ids: np.ndarray | int) -> np.ndarray:
        """ids as places in `spelled`."""
        return np.minimum(ids, np.int64(self.vocab_size))

    def bytes_of(self, ids: np.ndarray) -> bytes:
        """The bytes that ids spell."""
        return b''.join([self.spelled[i] for i in self.known(ids).tolist()])

    def size_of(self, ids: np.ndarray) -> int:
        """How many bytes of text ids stand for, special tokens for none; 0 without a tokenizer."""
        return sum(int(self.sizes[self.known(part)].sum()) for part in chunks(ids))

    def text_of(self, i: int) -> str:
        """Token i as text that a terminal just prints: all else is spelled out."""
        text = self.spelled[self.known(i)].decode('utf-8', 'backslashreplace')
        text = text[:-1] + '·' if text.endswith(' ') else text  # told from the padding behind it
        if text and width_of(text[0]) == 0:
            text = '◌' + text  # what a combining character sits on
        text = text.replace('\n', '⏎').replace('\t', '→')
        return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


def width_of(text: str) -> int:
    """How many columns of a terminal text takes."""
    shown = [c for c in text if unicodedata.category(c) not in ('Mn', 'Me')]
    return len(shown) + sum(unicodedata.east_asian_width(c) in 'WF' for c in shown)


def assess(dataset: Dataset, result: dict) -> None:
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


def scan(dataset: Dataset, data: Split, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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


def window_hashes(ids: np.ndarray) -> np.ndarray:
    """A 64-bit number for each stretch of WINDOW tokens: the sum of one for each pair of neighbours
    in it, mixed so that it is not the sum of the tokens."""
    odd = np.uint64(0x9E3779B97F4A7C15)
    pairs = (ids[:-1].astype(np.uint64) << np.uint64(32) | ids[1:]) * odd
    pairs = (pairs ^ pairs >> np.uint64(32)) * odd
    sums = np.append(np.uint64(0), np.cumsum(pairs))  # modulo 2^64, and so is their difference
    return sums[WINDOW - 1 :] - sums[: 1 - WINDOW]


def windows_of(data: Split) -> np.ndarray:
    """The hashes of about WINDOWS stretches of WINDOW tokens, spread evenly over a split."""
    hashes = [np.array([], np.uint64)]
    for ids in data.shards:
        whole = len(ids) // WINDOW
        number = min(whole, -(-WINDOWS // len(data.shards)))
        for place in np.linspace(0, whole - 1, number).astype(int).tolist():
            hashes.append(window_hashes(ids[place * WINDOW : (place + 1) * WINDOW]))
    return np.concatenate(hashes)


def read_documents(dataset: Dataset, data: Split) -> tuple[np.ndarray, Counter]:
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


def faults_of(dataset: Dataset, ids: np.ndarray, patterns: dict[str, str]) -> set[str]:
    """Which faults the text of a document without its special tokens has: {fault: pattern}."""
    spelled = (dataset.bytes_of(part) for part in chunks(ids))
    found = set()
    for text in codecs.iterdecode(spelled, 'utf-8', 'surrogateescape'):
        found |= {fault for fault, pattern in patterns.items() if re.search(pattern, text)}
    return found


def frequencies(dataset: Dataset, counts: np.ndarray, tokens: int) -> dict:
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


def plot(dataset: Dataset, counts: np.ndarray) -> None:
    """quality.png: how often the token of each rank is in train."""
    seen = np.sort(counts[counts > 0])[::-1]
    axes = new_axes((8, 5))
    axes.loglog(np.arange(1, len(seen) + 1), seen, '.-')
    axes.set(xlabel='rank of the token', ylabel='times in train', ylim=(0.7, None))
    with replacing(os.path.join(dataset.folder, 'quality.png'), 'wb') as f:
        axes.figure.savefig(f, format='png', dpi=150)


def histogram(lengths: np.ndarray) -> dict[str, int]:
    """How many documents have 0, 1, 2-3, 4-7, ... tokens, up to the longest."""
    counts = np.bincount(np.frexp(lengths)[1]).tolist()  # by bits: 0 takes 0, 1 takes 1, 2 and 3 2
    names = ['0', '1'] + [f'{1 << b:,}-{(2 << b) - 1:,}' for b in range(1, len(counts))]
    return dict(zip(names, counts, strict=False))


def shares_of(name: str, f: dict) -> Iterator[tuple[bool, str]]:
    """(is it a warning, a line) for each of SHARES that is known of a split."""
    for key, text in SHARES.items():
        total = f.get('windows' if key == 'windows_in_train' else 'documents')
        if key in f and total:
            share = f[key] / total
            line = f'{f[key]:,} of {total:,} {text.format(name)} ({share:.1%})'
            yield share > (0.05 if key == 'near_empty' else 0.01), line


def warnings_of(dataset: Dataset, result: dict) -> list[str]:
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


def show_quality(dataset: Dataset, result: dict) -> None:
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
