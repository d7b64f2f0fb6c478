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

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))  # where fledge/ is

from fledge import UserError
from fledge.configurator import configure, one_of
from fledge.corpus.quality import Dataset, assess, show_quality, width_of
from fledge.tokens import split_files

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
