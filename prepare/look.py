"""Look at a prepared dataset: its documents token by token, its size, and what is wrong with it.

python prepare/look.py data/notes --split=val    coloured tokens over their ids; underlined: learned
python prepare/look.py data/notes --count        tokens, documents, bytes a token, learned tokens
python prepare/look.py data/notes --quality      vocabulary, lengths, duplicates, val text in train;
                                                 a WARNING for each thing that ruins runs
"""

import json as json_
import os
import shutil
import signal
import sys
import unicodedata

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))  # where fledge/ is

from fledge import UserError, read_meta
from fledge.configurator import configure, one_of
from fledge.corpus.quality import assess, chunks, show_quality
from fledge.tokenizer import find_tokenizer
from fledge.tokens import mask_path, read_bin, split_files

split = 'train'  # whose documents are shown: train, val or test
document = 1  # the number of the first one shown
documents = 3  # how many are shown where the output is no terminal
max_tokens = 500  # of each of them
color = 'auto'  # True, False; auto: on a terminal, unless NO_COLOR is set
count = False  # show the sizes of all splits
quality = False  # show what the data is like, plot it (quality.png), warn of what ruins runs
json = False  # of --count and --quality: the last line of output is one JSON object
places = []  # the one dataset to look at
configure(globals(), others=places)


class Split:
    """One split: its shards, the mask of each (None: all is learned), and where each one's
    documents end: after an end-of-text token, or with the shard."""

    def __init__(self, folder, name, end, headerless):
        self.name = name
        self.shards, self.masks, self.ends, self.lengths, self.learned = [], [], [], [], 0
        for path in split_files(folder, name):
            ids = np.asarray(read_bin(path, headerless))
            is_end = [part == end for part in chunks(ids)]  # an end of None equals no id
            ends = np.unique(np.append(np.flatnonzero(np.concatenate(is_end)) + 1, len(ids)))
            self.shards.append(ids)
            self.ends.append(ends)
            self.lengths.append(np.diff(ends, prepend=0) - (ids[ends - 1] == end))
            path = mask_path(path)
            mask = np.fromfile(path, np.uint8) if os.path.exists(path) else None
            if mask is not None and len(mask) != len(ids):
                raise UserError(f'{path} has {len(mask):,} bytes for {len(ids):,} tokens')
            self.masks.append(mask)
            self.learned += len(ids) if mask is None else int(np.count_nonzero(mask))
        self.lengths = np.concatenate(self.lengths)  # without the end of text itself

    def documents(self, first=0):
        """The (ids, mask) of each document, from number `first` on, counted from 0."""
        for ids, mask, ends in zip(self.shards, self.masks, self.ends, strict=True):
            for i in range(first, len(ends)):
                here = slice(ends[i - 1] if i else 0, ends[i])
                yield ids[here], None if mask is None else mask[here]
            first = max(first - len(ends), 0)


class Dataset:
    """Some splits of a dataset, its tokenizer (or None), and the bytes that each id spells."""

    def __init__(self, folder, names):
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

    def known(self, ids):
        """ids as places in `spelled`."""
        return np.minimum(ids, np.int64(self.vocab_size))

    def bytes_of(self, ids):
        """The bytes that ids spell."""
        return b''.join([self.spelled[i] for i in self.known(ids).tolist()])

    def size_of(self, ids):
        """How many bytes of text ids stand for, special tokens for none; 0 without a tokenizer."""
        return sum(int(self.sizes[self.known(part)].sum()) for part in chunks(ids))

    def text_of(self, i):
        """Token i as text that a terminal just prints: all else is spelled out."""
        text = self.spelled[self.known(i)].decode('utf-8', 'backslashreplace')
        text = text[:-1] + '·' if text.endswith(' ') else text  # told from the padding behind it
        if text and width_of(text[0]) == 0:
            text = '◌' + text  # what a combining character sits on
        text = text.replace('\n', '⏎').replace('\t', '→')
        return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


def width_of(text):
    """How many columns of a terminal text takes."""
    shown = [c for c in text if unicodedata.category(c) not in ('Mn', 'Me')]
    return len(shown) + sum(unicodedata.east_asian_width(c) in 'WF' for c in shown)


def rows(dataset, ids, mask, first, columns):
    """A document from token `first` on, row by row: (the token after the row, its lines)."""
    cells, used = [], 0
    for i in range(first, len(ids)):
        number = str(ids[i])
        text = dataset.text_of(ids[i]) if dataset.tokenizer else number
        while width_of(text) >= columns:  # a token longer than a line
            text = text[:-2] + '…'
        width = max(width_of(text), len(number) + color)  # with colours no | stands between them
        newline = i > first and b'\n' in dataset.spelled[dataset.known(ids[i - 1])]
        if newline or cells and used + width >= columns:
            yield i, lines_of(cells, dataset.tokenizer)
            cells, used = [], 0
        text += ' ' * (width - width_of(text))
        cells.append((text, number.ljust(width), mask is not None and mask[i] > 0))
        used += width + 1 - color
    yield len(ids), lines_of(cells, dataset.tokenizer)


def lines_of(cells, with_ids):
    """A row of (padded text, padded id, learned) as lines: texts, ids, and marks or colours."""
    texts, ids, learned = zip(*cells, strict=True)
    if color:  # black on pastel reads well on dark and on light terminals
        lines = ['', f'\x1b[2m{"".join(ids)}\x1b[0m']
        for place, (text, _, mark) in enumerate(cells):
            style = ('1;4;' if mark else '') + f'38;5;16;48;5;{223 if place % 2 else 153}'
            lines[0] += f'\x1b[{style}m{text}\x1b[0m'
    else:
        marks = [('^' if mark else ' ') * len(i) for mark, i in zip(learned, ids, strict=True)]
        lines = ['|'.join(texts), '|'.join(ids), ' '.join(marks)]
    if not with_ids:  # no tokenizer: the ids are the texts
        del lines[1]
    return [line.rstrip() for line in lines if line.strip()]


def header(dataset, number, ids, mask, more=''):
    """The lines over a document: what it is, and the legend."""
    data = dataset.splits[0]
    title = f'document {number + 1:,} of {len(data.lengths):,} · {data.name}'
    title += f' · {len(ids):,} tokens'
    legend = 'ids alone: there is no tokenizer'
    if dataset.tokenizer:
        title += f', {dataset.size_of(ids):,} bytes'
        legend = r'⏎ newline   → tab   · space at the end   \x.. byte'
    if mask is not None:
        title += f', {np.count_nonzero(mask) / len(ids):.1%} learned'
        legend += '   underlined: learned' if color else '   ^^^ learned'
    return f'\n{title}{more}\n{legend}'


def show(dataset):
    """Some documents, for a file or a pipe."""
    data, columns = dataset.splits[0], shutil.get_terminal_size((100, 24)).columns
    last = min(document - 1 + documents, len(data.lengths))
    for number in range(document - 1, last):
        ids, mask = next(data.documents(number))
        print(header(dataset, number, ids, mask))
        for _, lines in rows(dataset, ids[:max_tokens], mask, 0, columns):
            print('\n'.join(lines))
        if len(ids) > max_tokens:
            print(f'... {len(ids) - max_tokens:,} more tokens (--max_tokens={max_tokens})')
    if last < len(data.lengths):
        print(f'\n{len(data.lengths) - last:,} more documents (--document={last + 1} goes on)')


def browse(dataset):
    """A document a page on a terminal, a long one a screenful at a time."""
    data = dataset.splits[0]
    total = len(data.lengths)
    screens = [(document - 1, 0)]  # the document and first token of each screen, for going back
    while screens[-1][0] < total:
        number, first = screens[-1]
        columns, height = shutil.get_terminal_size()
        ids, mask = next(data.documents(number))
        page, after = [], first
        for i, lines in rows(dataset, ids, mask, first, columns):
            if page and len(page) + len(lines) > height - 4:  # the header and the question
                break
            page, after = page + lines, i
        part = f' · {first + 1:,} to {after:,} of them here' if after - first < len(ids) else ''
        print('\n'.join([header(dataset, number, ids, mask, part), *page]))
        key = input(f'Enter next, b back, 1 to {total} goes there, q quits: ').strip()
        if key == 'q':
            return
        if key == '':
            screens.append((number, after) if after < len(ids) else (number + 1, 0))
        elif key == 'b':
            screens.pop()
            screens = screens or [(max(number - 1, 0), 0)]
        elif key.isdecimal() and 1 <= int(key) <= total:
            screens = [(int(key) - 1, 0)]


def sizes_of(dataset):
    """The sizes of each split and of all together."""
    sizes = {}
    for data in dataset.splits:
        sizes[data.name] = dict(
            tokens=sum(map(len, data.shards)),
            documents=len(data.lengths),
            bytes=sum(map(dataset.size_of, data.shards)),
            learned=data.learned,
            shards=len(data.shards),
        )
    keys = sizes[dataset.splits[0].name]
    sizes['total'] = {key: sum(s[key] for s in sizes.values()) for key in keys}
    for s in sizes.values():
        s['bytes_per_token'] = s['bytes'] / s['tokens']
        s['learned_share'] = s['learned'] / s['tokens']
        if not dataset.tokenizer:
            s.update(bytes=None, bytes_per_token=None)
    return sizes


def show_sizes(sizes):
    print(f'{"":6}{"tokens":>16}{"documents":>14}{"bytes/token":>13}{"learned":>9}{"shards":>8}')
    for name, s in sizes.items():
        ratio = '-' if s['bytes'] is None else f'{s["bytes_per_token"]:.3f}'
        row = f'{name:6}{s["tokens"]:16,}{s["documents"]:14,}{ratio:>13}'
        print(f'{row}{s["learned_share"]:9.1%}{s["shards"]:8,}')


# -----------------------------------------------------------------------------
one_of(globals(), color=(True, False, 'auto'))
if json and not (count or quality):
    raise UserError('--json goes with --count or --quality')
if len(places) != 1:
    raise UserError('one dataset is needed: python prepare/look.py data/NAME')
for folder in (places[0], os.path.join('data', places[0])):
    names = [name for name in ('train', 'val', 'test') if split_files(folder, name)]
    if names:
        break
else:
    raise UserError(f'neither {places[0]} nor {folder} holds train.bin, val.bin or test.bin')
if split not in names and not (count or quality):
    raise UserError(f'{folder} has no {split}.bin; it has {", ".join(names)}')
if hasattr(signal, 'SIGPIPE'):
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends this script without a word
if color == 'auto':
    color = sys.stdout.isatty() and not os.environ.get('NO_COLOR')

dataset = Dataset(folder, names if count or quality else [split])
if count or quality:
    result = dict(dataset=folder, vocab_size=dataset.vocab_size, splits=sizes_of(dataset))
    show_sizes(result['splits'])
    if quality:
        assess(dataset, result)
        show_quality(dataset, result)
    if json:
        print(json_.dumps(result))
elif document > len(dataset.splits[0].lengths):
    number = len(dataset.splits[0].lengths)
    raise UserError(f'document={document}: {split} has {number:,} documents')
elif sys.stdout.isatty():
    try:
        browse(dataset)
    except (EOFError, KeyboardInterrupt):
        print()
else:
    show(dataset)
