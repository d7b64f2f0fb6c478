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

from fledge import UserError
from fledge.configurator import at_least, configure, one_of
from fledge.corpus.quality import assess, chunks, show_quality
from fledge.tokenizer import find_tokenizer
from fledge.tokens import read_bin, read_meta, split_files

split = 'train'  # whose documents are shown: train, val or test
document = 1  # the number of the first one shown
documents = 3  # how many are shown where the output is no terminal
max_tokens = 500  # of each of them
color = 'auto'  # True, False; auto: on a terminal, unless NO_COLOR is set
count = False  # show the sizes of all splits
# show what the data is like, plot it (quality.png in its folder), warn of what ruins runs
quality = False
json = False  # of --count and --quality: the last line of output is one JSON object
configure(globals(), argv=[a for a in sys.argv[1:] if a.startswith('-')])

MAX_VOCAB = (
    1 << 20
)  # nobody trains a larger vocabulary: beyond it a file is broken, and no reason to count that far


class Split:
    """One split: its shards, the mask of each (None: all is learned), and where each one's
    documents end.

    A document ends after an end-of-text token, or with its shard.
    """

    def __init__(self, folder, name, end, headerless):
        paths = split_files(folder, name)
        self.name = name
        self.shards = [np.asarray(read_bin(path, headerless)) for path in paths]
        self.masks = [
            read_mask(path.removesuffix('.bin') + '.mask.bin', len(ids))
            for path, ids in zip(paths, self.shards, strict=True)
        ]
        self.ends, self.lengths, self.terminated = [], [], 0
        for ids in self.shards:
            ends = [
                at + 1 + np.flatnonzero(part == end) for at, part in chunks(ids)
            ]  # an end of None equals no id
            ends = np.unique(np.append(np.concatenate(ends), len(ids)))
            terminated = ids[ends - 1] == end
            self.ends.append(ends)
            self.lengths.append(np.diff(ends, prepend=0) - terminated)
            self.terminated += np.count_nonzero(terminated)
        self.lengths = np.concatenate(self.lengths)  # without the end of text itself

    def document(self, number):
        """Document `number`, counted from 0: its ids and its mask."""
        for ids, mask, ends in zip(self.shards, self.masks, self.ends, strict=True):
            if number < len(ends):
                here = slice(ends[number - 1] if number else 0, ends[number])
                return ids[here], None if mask is None else mask[here]
            number -= len(ends)


class Dataset:
    """A dataset: some of its splits, its tokenizer (or None), and the bytes that each id of its
    vocabulary spells."""

    def __init__(self, folder, names):
        self.folder, self.meta, self.tokenizer = folder, read_meta(folder), find_tokenizer(folder)
        self.end = self.tokenizer.end_of_text if self.tokenizer else None
        self.splits = [Split(folder, name, self.end, headerless=not self.meta) for name in names]
        size = (
            self.tokenizer.vocab_size if self.tokenizer else self.meta.get('vocab_size')
        )  # anything, in a broken meta.json
        if type(size) is not int or not 0 < size <= MAX_VOCAB:
            size = min(
                MAX_VOCAB, 1 + max(int(ids.max()) for data in self.splits for ids in data.shards)
            )
        self.vocab_size = size
        spelled = self.tokenizer.token_bytes if self.tokenizer else {}
        self.spelled = [spelled.get(i, b'') for i in range(size)] + [
            b''
        ]  # the last: any id beyond the vocabulary
        self.n_bytes = np.array(
            [0 if i == self.end else len(b) for i, b in enumerate(self.spelled)]
        )

    def known(self, ids):
        """ids as places in `spelled`."""
        return np.minimum(ids, np.int64(self.vocab_size))

    def bytes_of(self, ids):
        """The bytes of the text of ids, without ends of text."""
        return sum(int(self.n_bytes[self.known(part)].sum()) for _, part in chunks(ids))

    def text_of(self, i):
        """Token i as text that a terminal just prints: all else is spelled out."""
        text = self.spelled[self.known(i)].decode(
            'utf-8', 'backslashreplace'
        )  # what is no UTF-8 by itself becomes \x..
        spaces = len(text) - len(text.rstrip(' '))
        text = text.rstrip(' ') + '·' * spaces  # told from the padding behind them
        if text and width_of(text[0]) == 0:
            text = '◌' + text  # what a combining character sits on
        shown = ''
        for c in text:
            if c.isprintable():
                shown += c
            elif c in '\n\t':
                shown += '⏎' if c == '\n' else '→'
            else:
                shown += f'\\x{ord(c):02x}' if c < '\x80' else f'\\u{ord(c):04x}'
        return shown


def read_mask(path, n):
    if not os.path.exists(path):
        return None
    if os.path.getsize(path) != n:
        raise UserError(
            f'{path} has {os.path.getsize(path):,} bytes for {n:,} tokens: '
            'a mask is one byte a token'
        )
    return np.asarray(np.memmap(path, np.uint8, mode='r'))


def width_of(text):
    """How many columns of a terminal text takes."""
    return sum(
        0
        if unicodedata.category(c) in ('Mn', 'Me')
        else 2
        if unicodedata.east_asian_width(c) in 'WF'
        else 1
        for c in text
    )


# ----------------------------------------------------------------------------- documents, token by
# token
def rows(dataset, ids, mask, first, columns):
    """A document from token `first` on, row by row: (the token after the row, its lines)."""
    cells, used = [], 0
    for i in range(first, len(ids)):
        text, name = (
            (dataset.text_of(ids[i]), str(ids[i])) if dataset.tokenizer else (str(ids[i]), '')
        )
        if width_of(text) >= columns:  # a token longer than a line
            while width_of(text) > columns - 2:
                text = text[:-1]
            text += '…'
        width = max(width_of(text), len(name) + color)  # with colours no | stands between the ids
        if cells and used + width >= columns:
            yield i, lines_of(cells)
            cells, used = [], 0
        cells.append((text, name, width, i % 2, mask is not None and bool(mask[i])))
        used += width + 1 - color
        if b'\n' in dataset.spelled[dataset.known(ids[i])] or i + 1 == len(ids):
            yield i + 1, lines_of(cells)
            cells, used = [], 0


def lines_of(cells):
    """A row of (text, id, width, odd place, learned) as lines: texts, ids, and marks where there
    are no colours."""
    if not color:
        lines = [
            '|'.join(text + ' ' * (width - width_of(text)) for text, _, width, _, _ in cells),
            '|'.join(name.ljust(width) for _, name, width, _, _ in cells),
            ' '.join('^ '[not learned] * width for _, _, width, _, learned in cells),
        ]
        if not cells[0][1]:  # no tokenizer: the ids are the texts
            del lines[1]
        return [line.rstrip() for line in lines if line.strip()]
    texts = ''
    for text, _, width, odd, learned in cells:
        style = (
            ('1;4;' if learned else '') + '38;5;16;48;5;' + ('223' if odd else '153')
        )  # black on pastel reads well on dark and on light terminals
        texts += f'\x1b[{style}m{text}\x1b[22;24m{" " * (width - width_of(text))}\x1b[0m'
    names = ''.join(name.ljust(width) for _, name, width, _, _ in cells).rstrip()
    return [texts, f'\x1b[2m{names}\x1b[0m'] if names else [texts]


def header(dataset, number, more=''):
    """The lines over a document: what it is, and the legend."""
    data = dataset.splits[0]
    ids, mask = data.document(number)
    title = f'document {number + 1:,} of {len(data.lengths):,} · {data.name} · {len(ids):,} tokens'
    legend = 'ids alone: there is no tokenizer'
    if dataset.tokenizer:
        title += f', {dataset.bytes_of(ids):,} bytes'
        legend = r'⏎ newline   → tab   · space at the end   \x.. byte'
    if mask is not None:
        title += f', {np.count_nonzero(mask) / len(ids):.1%} learned'
        legend += '   underlined: learned' if color else '   ^^^ learned'
    return (
        f'\n\x1b[1m{title}{more}\x1b[0m\n\x1b[2m{legend}\x1b[0m'
        if color
        else f'\n{title}{more}\n{legend}'
    )


def show(dataset):
    """Some documents, for a file or a pipe."""
    data = dataset.splits[0]
    last = min(document - 1 + documents, len(data.lengths))
    for number in range(document - 1, last):
        ids, mask = data.document(number)
        print(header(dataset, number))
        for _, lines in rows(
            dataset, ids[:max_tokens], mask, 0, shutil.get_terminal_size((100, 24)).columns
        ):
            print('\n'.join(lines))
        if len(ids) > max_tokens:
            print(f'... {len(ids) - max_tokens:,} more tokens (--max_tokens={max_tokens})')
    if last < len(data.lengths):
        print(f'\n{len(data.lengths) - last:,} more documents (--document={last + 1} goes on)')


def browse(dataset):
    """A document a page on a terminal, a long one a screenful at a time."""
    data = dataset.splits[0]
    number, starts = (
        document - 1,
        [0],
    )  # starts: where the screens of this document begin, up to the one shown
    while number < len(data.lengths):
        columns, height = shutil.get_terminal_size()
        ids, mask = data.document(number)
        page, first, after = [], starts[-1], starts[-1]
        for i, lines in rows(dataset, ids, mask, first, columns):
            if (
                page and len(page) + len(lines) > height - 4
            ):  # the header's three lines and the question
                break
            page, after = page + lines, i
        part = f' · {first + 1:,} to {after:,} of them here' if after - first < len(ids) else ''
        print('\n'.join([header(dataset, number, part), *page]))
        key = '?'
        while not (key in ('', 'b', 'q') or key.isdecimal() and 1 <= int(key) <= len(data.lengths)):
            key = input(
                f'Enter next, b back, 1 to {len(data.lengths)} goes there, q quits: '
            ).strip()
        if key == 'q':
            return
        if key == '' and after < len(ids):
            starts.append(after)
        elif key == 'b' and len(starts) > 1:
            starts.pop()
        else:
            number = number + 1 if key == '' else max(number - 1, 0) if key == 'b' else int(key) - 1
            starts = [0]


# ----------------------------------------------------------------------------- sizes
def sizes_of(dataset):
    """The sizes of each split and of all together."""
    sizes = {}
    for data in dataset.splits:
        tokens = sum(map(len, data.shards))
        n_bytes = noted_bytes(dataset.meta, data.name, tokens)
        if n_bytes is None and dataset.tokenizer:
            n_bytes = sum(map(dataset.bytes_of, data.shards))
        learned = sum(
            len(ids) if mask is None else int(np.count_nonzero(mask))
            for ids, mask in zip(data.shards, data.masks, strict=True)
        )
        sizes[data.name] = dict(
            tokens=tokens,
            documents=len(data.lengths),
            bytes=n_bytes,
            learned=learned,
            shards=len(data.shards),
        )
    columns = {
        key: [s[key] for s in sizes.values()]
        for key in ('tokens', 'documents', 'bytes', 'learned', 'shards')
    }
    sizes['total'] = {
        key: None if None in values else sum(values) for key, values in columns.items()
    }
    for s in sizes.values():
        s['bytes_per_token'] = None if s['bytes'] is None else s['bytes'] / s['tokens']
        s['learned_share'] = s['learned'] / s['tokens']
    return sizes


def noted_bytes(meta, name, tokens):
    """The bytes of a split as meta.json has them; None where it speaks of other files, or has been
    broken by hand."""
    try:
        noted = meta['splits'][name]
        return noted['bytes'] if noted['tokens'] == tokens and type(noted['bytes']) is int else None
    except (KeyError, TypeError):
        return None


def show_sizes(sizes):
    print(f'{"":6}{"tokens":>16}{"documents":>14}{"bytes/token":>13}{"learned":>9}{"shards":>8}')
    for name, s in sizes.items():
        ratio = '-' if s['bytes'] is None else f'{s["bytes_per_token"]:.3f}'
        print(
            f'{name:6}{s["tokens"]:16,}{s["documents"]:14,}{ratio:>13}{s["learned_share"]:9.1%}{s["shards"]:8,}'
        )


# -----------------------------------------------------------------------------
at_least(globals(), document=1, documents=1, max_tokens=1)
one_of(globals(), color=(True, False, 'auto'))
if json and not (count or quality):
    raise UserError('--json goes with --count or --quality')
places = [a for a in sys.argv[1:] if not a.startswith('-')]
if len(places) != 1:
    raise UserError('one dataset is needed: python prepare/look.py data/NAME')
for folder in (places[0], os.path.join('data', places[0])):
    folder = os.path.normpath(folder)
    names = [name for name in ('train', 'val', 'test') if split_files(folder, name)]
    if names:
        break
else:
    raise UserError(
        f'{places[0]} holds no tokens (train.bin, val.bin or test.bin)'
        if os.path.isdir(places[0])
        else f'there is no dataset {places[0]}, nor data/{places[0]}'
    )
if split not in names and not (count or quality):
    raise UserError(f'{folder} has no {split}.bin; it has {", ".join(names)}')
if hasattr(signal, 'SIGPIPE'):
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends this script without a word
sys.stdout.reconfigure(errors='backslashreplace')  # a terminal that is not UTF-8
if color == 'auto':
    color = (
        sys.stdout.isatty() and not os.environ.get('NO_COLOR') and os.environ.get('TERM') != 'dumb'
    )

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
    raise UserError(
        f'document={document}: {split} has {len(dataset.splits[0].lengths):,} documents'
    )
elif sys.stdout.isatty():
    try:
        browse(dataset)
    except (EOFError, KeyboardInterrupt):
        print()
else:
    show(dataset)
