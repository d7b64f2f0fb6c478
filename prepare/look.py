"""Look at a prepared dataset: its documents token by token, its size, and what is wrong with it.

python prepare/look.py data/notes --split=val     documents as coloured tokens over their ids, learned tokens underlined
python prepare/look.py data/notes --count         tokens, documents, bytes a token, learned tokens
python prepare/look.py data/notes --quality       vocabulary, lengths, duplicates, val text in train: a WARNING for each thing that ruins runs
"""
import codecs
import json as json_
import os
import re
import shutil
import signal
import sys
import unicodedata

import numpy as np

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from fledge import UserError, replacing
from fledge.configurator import configure
from fledge.tokenizer import find_tokenizer
from fledge.tokens import read_bin, read_meta, split_files

split = 'train'         # whose documents are shown: train, val or test
document = 1            # the number of the first one shown
documents = 3           # how many are shown where the output is no terminal
max_tokens = 500        # of each of them
color = 'auto'          # True, False; auto: on a terminal, unless NO_COLOR is set
count = False           # show the sizes of all splits
quality = False         # show what the data is like, plot it (quality.png in its folder), warn of what ruins runs
json = False            # of --count and --quality: the last line of output is one JSON object
configure(globals(), argv=[a for a in sys.argv[1:] if a.startswith('-')])

CHUNK = 1 << 18         # tokens at a time: memory stays small, and the arrays stay in the cache
WINDOW, WINDOWS = 50, 1000  # tokens in a stretch of val that is looked for in train, and how many of them
NEAR_EMPTY = 5          # a document of fewer tokens teaches nothing
MULTIPLIER = 0x9E3779B97F4A7C15  # of the hashes; odd, so that it has an inverse mod 2^64
FAULTS = {'replacement_characters': '\ufffd', 'invalid_bytes': '[\udc80-\udcff]', 'control_characters': '[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]'}


class Split:
    """One split: its shards, the mask of each (None: all is learned), and where each one's documents end.

    A document ends after an end-of-text token, or with its shard.
    """

    def __init__(self, name):
        paths = split_files(folder, name)
        self.name, self.ends, self.lengths, self.terminated = name, [], [], 0
        self.shards = [np.asarray(read_bin(p, headerless=not meta)) for p in paths]
        self.masks = [read_mask(p.removesuffix('.bin') + '.mask.bin', len(ids)) for p, ids in zip(paths, self.shards)]
        for ids in self.shards:
            ends = [] if end is None else [at + 1 + np.flatnonzero(part == end) for at, part in chunks(ids)]
            ends = np.concatenate([*ends, np.zeros(0, np.int64)])
            terminated = len(ends)
            if not terminated or ends[-1] < len(ids):
                ends = np.append(ends, len(ids))
            lengths = np.diff(ends, prepend=0)
            lengths[:terminated] -= 1  # the end of text itself
            self.ends.append(ends)
            self.lengths.append(lengths)
            self.terminated += terminated
        self.lengths = np.concatenate(self.lengths)

    def document(self, number):
        """Document `number`, counted from 0: its ids and its mask."""
        for ids, mask, ends in zip(self.shards, self.masks, self.ends):
            if number < len(ends):
                here = slice(ends[number - 1] if number else 0, ends[number])
                return ids[here], None if mask is None else mask[here]
            number -= len(ends)

    def size(self):
        """What --count shows."""
        tokens, noted = sum(map(len, self.shards)), meta.get('splits', {}).get(self.name, {})
        n_bytes = noted['bytes'] if noted.get('tokens') == tokens and 'bytes' in noted else sum(map(bytes_of, self.shards)) if tokenizer else None
        learned = sum(len(ids) if mask is None else int(np.count_nonzero(mask)) for ids, mask in zip(self.shards, self.masks))
        return dict(tokens=tokens, documents=len(self.lengths), bytes=n_bytes, learned=learned, shards=len(self.shards))


def read_mask(path, n):
    if not os.path.exists(path):
        return None
    if os.path.getsize(path) != n:
        raise UserError(f'{path} has {os.path.getsize(path):,} bytes for {n:,} tokens: a mask is one byte a token')
    return np.asarray(np.memmap(path, np.uint8, mode='r'))


def chunks(ids):
    return ((at, ids[at:at + CHUNK]) for at in range(0, len(ids), CHUNK))


def known(ids):
    """ids as places in `spelled`, whose last entry stands for all that the vocabulary lacks."""
    return np.minimum(ids, np.int64(vocab_size))


def bytes_of(ids):
    """The bytes of the text of ids, without ends of text."""
    return sum(int(lengths_spelled[known(part)].sum()) for _, part in chunks(ids))


# ----------------------------------------------------------------------------- documents, token by token
def shown(spelling):
    """A token's bytes as text that a terminal does nothing with but print it: all else is spelled out."""
    text = spelling.decode('utf-8', errors='surrogateescape')  # bytes that are no UTF-8 by themselves become \udc80 ... \udcff
    text = text.rstrip(' ') + '·' * (len(text) - len(text.rstrip(' ')))  # told from the padding behind them
    text = '◌' * (text != '' and width_of(text[0]) == 0) + text  # what a combining character sits on
    escaped = lambda code: f'\\x{code & 0xff:02x}' if code < 0x80 or 0xdc80 <= code <= 0xdcff else f'\\u{code:04x}'
    return ''.join(c if c.isprintable() else {'\n': '⏎', '\t': '→'}.get(c) or escaped(ord(c)) for c in text)


def width_of(text):
    """How many columns of a terminal text takes."""
    return sum(0 if unicodedata.category(c) in ('Mn', 'Me') else 2 if unicodedata.east_asian_width(c) in 'WF' else 1 for c in text)


def rows(ids, mask, first, columns):
    """A document from token `first` on, row by row: (the token after it, its lines: texts, ids, marks)."""
    cells, used = [], 0
    for i in range(first, len(ids)):
        spelling, name = spelled[known(ids[i])], str(ids[i])
        text, name = (shown(spelling), name) if tokenizer else (name, '')
        if width_of(text) >= columns:  # a token longer than a line
            while width_of(text) > columns - 2:
                text = text[:-1]
            text += '…'
        room = max(width_of(text), len(name) + color)  # with colours no | stands between the ids
        if cells and used + room >= columns:
            yield i, lines_of(cells)
            cells, used = [], 0
        cells.append((text, name, room, i % 2, mask is not None and bool(mask[i])))
        used += room + 1 - color
        if b'\n' in spelling or i + 1 == len(ids):
            yield i + 1, lines_of(cells)
            cells, used = [], 0


def lines_of(cells):
    if color:  # black on pastel reads well on dark and on light terminals
        texts = ''.join(f'\x1b[{"1;4;" * learned}38;5;16;48;5;{(153, 223)[odd]}m{text}\x1b[22;24m{" " * (room - width_of(text))}\x1b[0m'
                        for text, _, room, odd, learned in cells)
        names = ''.join(name.ljust(room) for _, name, room, _, _ in cells).rstrip()
        return [texts] + [f'\x1b[2m{names}\x1b[0m'] * (names != '')
    lines = ['|'.join(text + ' ' * (room - width_of(text)) for text, _, room, _, _ in cells),
             '|'.join(name.ljust(room) for _, name, room, _, _ in cells) if tokenizer else '',
             ' '.join('^ '[not learned] * room for _, _, room, _, learned in cells)]
    return [line.rstrip() for line in lines if line.strip()]


def header(data, number, more=''):
    """The lines over a document: what it is, and the legend."""
    ids, mask = data.document(number)
    size = f', {bytes_of(ids):,} bytes' if tokenizer else ''
    learned = '' if mask is None else f', {np.count_nonzero(mask) / len(ids):.1%} learned'
    marks = '' if mask is None else '   underlined: learned' if color else '   ^^^ learned'
    title = f'document {number + 1:,} of {len(data.lengths):,} · {data.name} · {len(ids):,} tokens{size}{learned}{more}'
    legend = (r'⏎ newline   → tab   · space at the end   \x.. byte' if tokenizer else 'ids alone: there is no tokenizer') + marks
    return f'\n\x1b[1m{title}\x1b[0m\n\x1b[2m{legend}\x1b[0m' if color else f'\n{title}\n{legend}'


def show(data):
    """Some documents, for a file or a pipe."""
    last = min(document - 1 + documents, len(data.lengths))
    for number in range(document - 1, last):
        ids, mask = data.document(number)
        print(header(data, number))
        for _, lines in rows(ids[:max_tokens], mask, 0, shutil.get_terminal_size((100, 24)).columns):
            print('\n'.join(lines))
        if len(ids) > max_tokens:
            print(f'... {len(ids) - max_tokens:,} more tokens (--max_tokens={max_tokens})')
    if last < len(data.lengths):
        print(f'\n{len(data.lengths) - last:,} more documents (--document={last + 1} goes on)')


def browse(data):
    """A document a page on a terminal, a long one a screenful at a time."""
    number, starts = document - 1, [0]  # starts: where the screens of this document begin, up to the one shown
    while number < len(data.lengths):
        columns, height = shutil.get_terminal_size()
        ids, mask = data.document(number)
        page, after = [], starts[-1]
        for i, lines in rows(ids, mask, starts[-1], columns):
            if page and len(page) + len(lines) > height - 4:  # the header's three lines and the question
                break
            page, after = page + lines, i
        part = f' · {starts[-1] + 1:,} to {after:,} of them here' if after - starts[-1] < len(ids) else ''
        print('\n'.join([header(data, number, part), *page]))
        question = f'Enter next, b back, 1 to {len(data.lengths)} goes there, q quits: '
        key = input(question).strip()
        while not (key in ('', 'b', 'q') or key.isdecimal() and 1 <= int(key) <= len(data.lengths)):
            key = input(question).strip()
        if key == 'q':
            return
        if key == '' and after < len(ids):
            starts.append(after)
        elif key == 'b' and len(starts) > 1:
            starts.pop()
        else:
            number, starts = number + 1 if key == '' else max(number - 1, 0) if key == 'b' else int(key) - 1, [0]


# ----------------------------------------------------------------------------- figures
def table(*lines):
    """Columns, the first flush left, the others flush right."""
    widths = [max(map(width_of, column)) for column in zip(*lines)]
    for line in lines:
        print('  '.join([line[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(line[1:], widths[1:])]))


def sizes_of(splits):
    """The sizes of each split and of all together."""
    sizes = {data.name: data.size() for data in splits}
    columns = {key: [s[key] for s in sizes.values()] for key in ('tokens', 'documents', 'bytes', 'learned', 'shards')}
    sizes['total'] = {key: None if None in values else sum(values) for key, values in columns.items()}
    for s in sizes.values():
        s |= dict(bytes_per_token=s['bytes'] and s['bytes'] / s['tokens'], learned_share=s['learned'] / s['tokens'])
    table(('', 'tokens', 'documents', 'bytes/token', 'learned', 'shards'),
          *((name, f'{s["tokens"]:,}', f'{s["documents"]:,}', f'{s["bytes_per_token"]:.3f}' if s['bytes'] else '-', f'{s["learned_share"]:.1%}', f'{s["shards"]:,}')
            for name, s in sizes.items()))
    return sizes


def powers(base, n):
    return np.cumprod(np.array([1] + [base] * (n - 1), np.uint64))


def mixed(ids):
    """A 64-bit number for each id, far from those of its neighbours."""
    x = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93)
    return x ^ x >> np.uint64(32)


def windows_of(data):
    """The hashes of up to WINDOWS stretches of WINDOW tokens, spread evenly over a split."""
    last = np.cumsum([len(ids) // WINDOW for ids in data.shards])
    chosen = np.linspace(0, last[-1] - 1, min(WINDOWS, last[-1])).astype(int)
    shards = np.searchsorted(last, chosen, side='right')
    stretches = [data.shards[s][at:at + WINDOW] for s, at in zip(shards, (chosen - np.append(0, last)[shards]) * WINDOW)]
    return (mixed(np.array(stretches).reshape(-1, WINDOW)) * powers(MULTIPLIER, WINDOW)).sum(axis=1, dtype=np.uint64)


def scan(data, wanted):
    """One pass over a split: how often each id occurs (the last: all beyond the vocabulary), the hash of each document,
    which of the hashes `wanted` some stretch of WINDOW tokens has, and the documents with tokens that may be FAULTS.

    The hash of x0 x1 ... is the sum of x_i * MULTIPLIER^i mod 2^64: that of any stretch is a difference of two prefix
    sums, times the inverse of the power that it begins with.
    """
    power, inverse = powers(MULTIPLIER, CHUNK + WINDOW), powers(pow(MULTIPLIER, -1, 1 << 64), CHUNK + WINDOW)
    likely = np.zeros(1 << 16, bool)  # the first 16 bits of the wanted: they rule out most stretches at once
    likely[wanted >> np.uint64(48)] = True
    counts, hashes, found, suspects, before = np.zeros(vocab_size + 1, np.int64), [], [wanted[:0]], [], 0
    for ids, ends in zip(data.shards, data.ends):
        carried, length = 0, 0  # hash and tokens so far of a document that goes on from chunk to chunk
        for at, part in chunks(ids):
            part = known(part)
            counted = np.bincount(part)
            counts[:len(counted)] += counted
            reach = ids[at:at + CHUNK + WINDOW - 1]  # a stretch that begins in this chunk may end in the next
            sums = np.zeros(len(reach) + 1, np.uint64)
            np.cumsum(mixed(reach) * power[:len(reach)], out=sums[1:])
            if len(wanted) and len(reach) >= WINDOW:
                hashed = (sums[WINDOW:] - sums[:-WINDOW]) * inverse[:len(sums) - WINDOW]
                found.append(np.intersect1d(hashed[likely[hashed >> np.uint64(48)]], wanted))
            first, last = np.searchsorted(ends, [at, at + len(part)], side='right').tolist()  # the documents that end here
            bounds = np.concatenate([[0], ends[first:last] - at, [len(part)]])
            pieces = (sums[bounds[1:]] - sums[bounds[:-1]]) * inverse[bounds[:-1]]
            pieces[:1] = pieces[:1] * np.uint64(pow(MULTIPLIER, length, 1 << 64)) + np.uint64(carried)
            hashes.append(pieces[:-1])
            carried, length = pieces[-1], int(bounds[-1] - bounds[-2]) + length * (first == last)
            suspects.append(before + first + np.flatnonzero(np.diff(np.searchsorted(np.flatnonzero(suspicious[part]), bounds))))
        before += len(ends)
    return counts, np.concatenate(hashes), np.concatenate(found), np.unique(np.concatenate(suspects)).tolist()


def faults(ids):
    """How many of each of FAULTS the text of a document has."""
    decoder, n = codecs.getincrementaldecoder('utf-8')('surrogateescape'), [0] * len(FAULTS)
    for at, part in chunks(ids):
        text = decoder.decode(b''.join([spelled[i] for i in known(part).tolist()]), final=at + CHUNK >= len(ids))
        n = [k + len(re.findall(pattern, text)) for k, pattern in zip(n, FAULTS.values())]
    return n


def assess(splits, result):
    """Fill in what the splits are like; returns the warnings."""
    warnings, hashes = [], {}
    windows = {data.name: windows_of(data) for data in splits if data.name != 'train'}
    for data in splits:  # train first
        name, f, n = data.name, result['splits'][data.name], len(data.lengths)
        wanted = np.unique(np.concatenate(list(windows.values()))) if name == 'train' and windows else np.zeros(0, np.uint64)
        counts, hashes[name], found, suspects = scan(data, wanted)
        texts = np.array([faults(data.document(number)[0]) for number in suspects]).reshape(-1, len(FAULTS))
        f |= dict(beyond_vocabulary=int(counts[-1]), duplicates=n - len(np.unique(hashes[name])), near_empty=int((data.lengths < NEAR_EMPTY).sum()),
                  **{f'documents_with_{fault}': int(k) for fault, k in zip(FAULTS, (texts > 0).sum(axis=0))})
        if name == 'train':
            result |= frequencies(counts[:-1], f['tokens'], warnings) | dict(lengths=histogram(data.lengths))
            for other, theirs in windows.items():
                result['splits'][other] |= dict(windows=len(theirs), windows_in_train=int(np.isin(theirs, found).sum()))
        elif 'windows_in_train' in f:
            f['documents_in_train'] = int(np.isin(hashes[name][data.lengths >= NEAR_EMPTY], hashes['train']).sum())
            for what, k, of in (('documents', f['documents_in_train'], n), (f'windows of {WINDOW} tokens', f['windows_in_train'], f['windows'])):
                if k > 0.01 * of:
                    warnings.append(f'{k:,} of {of:,} {what} of {name} are in train too ({k / of:.1%}): the loss on {name} flatters')
        for key, most, what in (('duplicates', 0.01, 'repeat another one'), ('near_empty', 0.05, f'have fewer than {NEAR_EMPTY} tokens'),
                                ('documents_with_replacement_characters', 0.01, 'hold U+FFFD: their text was decoded wrongly')):
            if f[key] > most * n:
                warnings.append(f'{f[key]:,} of {n:,} documents of {name} {what} ({f[key] / n:.1%})')
        if counts[-1]:
            warnings.append(f'{counts[-1]:,} tokens of {name} are beyond the vocabulary of {vocab_size:,}: training stops at the first of them')
        if end is not None and not data.terminated:
            warnings.append(f'{name} has no end-of-text token: a model trained on such text never learns to stop')
        if f['learned'] == 0:
            warnings.append(f'the mask of {name} lets nothing be learned')
        if name == 'val' and f['tokens'] < 10_000:
            warnings.append(f'val has {f["tokens"]:,} tokens: under 10,000 its loss is noisy')
    return warnings


def frequencies(counts, tokens, warnings):
    """Which ids of the vocabulary train has and how often, with a plot of it."""
    order = np.argsort(-counts, kind='stable')[:np.count_nonzero(counts)]
    most, least = ([dict(id=i, count=int(counts[i]), share=counts[i] / tokens, text=shown(spelled[i])) for i in ids.tolist()] for ids in (order[:20], order[:-21:-1]))
    if most and most[0]['share'] > (0.1 if vocab_size >= 1000 else 0.3):  # of characters, a space is a fifth
        warnings.append(f'one token is {most[0]["share"]:.1%} of train: {most[0]["id"]} {most[0]["text"]}')
    # special tokens may wait for fine-tuning, and byte-level vocabularies have every byte
    words = [i for i in range(vocab_size) if not tokenizer or i not in tokenizer.special.values() and not (tokenizer.bpe and len(spelled[i]) == 1)]
    unseen = int((counts[words] == 0).sum())
    if unseen > 0.05 * len(words):
        warnings.append(f'{unseen:,} of the {len(words):,} ids of the vocabulary, single bytes and special tokens left out, are never seen in train ({unseen / len(words):.1%})')
    from matplotlib.figure import Figure  # without pyplot: faster to import, and never a window
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    ranks, seen = np.arange(1, len(order) + 1), counts[order]
    axes.loglog(ranks, seen, '.-', label='train')
    axes.loglog(ranks, seen[:1] / ranks, '--', color='gray', label="Zipf's law, 1 / rank")
    title = f'{os.path.basename(folder)}: {tokens:,} tokens, {len(order):,} different ones of {vocab_size:,}'
    axes.set(xlabel='rank of the token', ylabel='times in train', ylim=(0.7, None), title=title.replace('$', r'\$'))
    axes.legend()
    axes.grid(alpha=0.3)
    with replacing(os.path.join(folder, 'quality.png'), 'wb') as f:
        figure.savefig(f, format='png', dpi=150)
    return dict(ids_seen=len(order), coverage=len(order) / vocab_size, most_frequent=most, least_frequent=least)


def histogram(lengths):
    """How many documents have 0, 1, 2-3, 4-7, ... tokens, up to the longest."""
    bits = np.bincount(np.frexp(lengths)[1])  # 0 takes 0 bits, 1 takes 1, 2 and 3 take 2
    return {f'{1 << b - 1:,}-{(1 << b) - 1:,}' if b > 1 else str(b): int(n) for b, n in enumerate(bits)}


def show_quality(result):
    splits = {name: f for name, f in result['splits'].items() if name != 'total'}
    if 'train' in splits:
        print(f'\n{result["ids_seen"]:,} of the {vocab_size:,} ids of the vocabulary are in train ({result["coverage"]:.1%}); the most and the least frequent:')
        for two in zip(result['most_frequent'], result['least_frequent']):
            left, right = (f'{t["id"]:8} {t["count"]:13,} {t["share"]:9.4%}  {t["text"]}' for t in two)
            print(left + ' ' * (50 - width_of(left)) + right)
        print('\ntokens of a document of train, the end of text not counted:')
        n = splits['train']['documents']
        for lengths, k in result['lengths'].items():
            print(f'{lengths:>25} {k:13,} {k / n:6.1%} {"█" * -(-40 * k // max(result["lengths"].values()))}'.rstrip())
        print(f'\ntimes of each rank: {os.path.join(folder, "quality.png")}')
    print('\ndocuments')
    keys = ('duplicates', 'near_empty', *(f'documents_with_{fault}' for fault in FAULTS), 'documents_in_train')
    share = lambda f, key: f'{f[key]:,} ({f[key] / f["documents"]:.1%})' if key in f else '-'
    table(('', 'repeat another', f'under {NEAR_EMPTY} tokens', 'with U+FFFD', 'not UTF-8', 'with control characters', 'in train too'),
          *((name, *(share(f, key) for key in keys)) for name, f in splits.items()))
    for name, f in splits.items():
        if f.get('windows'):
            print(f'{f["windows_in_train"]:,} of {f["windows"]:,} windows of {WINDOW} tokens of {name} are in train too ({f["windows_in_train"] / f["windows"]:.1%})')
    print()
    for warning in result['warnings']:
        print(f'WARNING: {warning}')
    if not result['warnings']:
        print('no warnings')


# -----------------------------------------------------------------------------
for name in ('document', 'documents', 'max_tokens'):
    if globals()[name] < 1:
        raise UserError(f'{name}={globals()[name]} must be at least 1')
if color not in (True, False, 'auto'):
    raise UserError(f'color={color!r} is none of True, False, auto')
if json and not (count or quality):
    raise UserError('--json goes with --count or --quality')
places = [a for a in sys.argv[1:] if not a.startswith('-')]
if len(places) != 1:
    raise UserError('one dataset is needed: python prepare/look.py data/NAME')
found = [f for f in (places[0], os.path.join('data', places[0])) if any(split_files(f, name) for name in ('train', 'val', 'test'))]
if not found:
    raise UserError(f'{places[0]} holds no tokens (train.bin, val.bin or test.bin)' if os.path.isdir(places[0]) else f'there is no dataset {places[0]}, nor data/{places[0]}')
folder = os.path.normpath(found[0])
names = [name for name in ('train', 'val', 'test') if split_files(folder, name)]
if split not in names and not (count or quality):
    raise UserError(f'{folder} has no {split}.bin; it has {", ".join(names)}')
if hasattr(signal, 'SIGPIPE'):
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends this script without a word
sys.stdout.reconfigure(errors='backslashreplace')  # a terminal that is not UTF-8
if color == 'auto':
    color = sys.stdout.isatty() and not os.environ.get('NO_COLOR') and os.environ.get('TERM') != 'dumb'

meta, tokenizer = read_meta(folder), find_tokenizer(folder)
end = tokenizer.end_of_text if tokenizer else None
splits = [Split(name) for name in (names if count or quality else [split])]
# no vocabulary that anybody trains has over a million ids: more is a broken file, and no reason to count that far
vocab_size = tokenizer.vocab_size if tokenizer else meta.get('vocab_size') or min(1 << 20, 1 + max(int(ids.max()) for data in splits for ids in data.shards))
spelled = [tokenizer.token_bytes.get(i, b'') if tokenizer else b'' for i in range(vocab_size)] + [b'']
if tokenizer and tokenizer.hf:  # SentencePiece's tokens for single bytes
    spelled = [bytes([int(t[3:5], 16)]) if t and re.fullmatch('<0x[0-9A-F]{2}>', t) else b for t, b in
               ((tokenizer.hf.id_to_token(i), b) for i, b in enumerate(spelled))]
lengths_spelled = np.array([0 if i == end else len(b) for i, b in enumerate(spelled)])
fault = re.compile('|'.join(FAULTS.values()))  # by itself: half a character may turn out to be none
suspicious = np.array([bool(fault.search(b.decode('utf-8', errors='surrogateescape'))) for b in spelled])

if count or quality:
    result = dict(dataset=folder, vocab_size=vocab_size, splits=sizes_of(splits))
    if quality:
        result['warnings'] = assess(splits, result)
        show_quality(result)
    if json:
        print(json_.dumps(result))
elif document > len(splits[0].lengths):
    raise UserError(f'document={document}: {split} has {len(splits[0].lengths):,} documents')
elif sys.stdout.isatty():
    try:
        browse(splits[0])
    except (EOFError, KeyboardInterrupt):
        print()
else:
    show(splits[0])
