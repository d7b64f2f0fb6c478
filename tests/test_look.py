"""prepare/look.py: what it shows, what it counts, and what it warns of."""

import contextlib
import io
import json
import os
import pty
import re
import runpy
import select
import signal
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from conftest import ROOT, fails, run, write_tiny

from fledge import UserError
from fledge.tokenizer import Tokenizer, byte_tokenizer, char_tokenizer, load_tokenizer, train_bpe
from fledge.tokens import read_bin, write_bin

END = 256  # the byte tokenizer's end of text


def write(folder, tokenizer=None, vocab_size=None, masks=None, **files):
    """A dataset of one .bin for each name.

    A list of texts is encoded, an end of text behind each; ids are written as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer or byte_tokenizer()
    for name, content in files.items():
        if len(content) and isinstance(content[0], (str, bytes)):
            end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
            content = np.concatenate(
                [
                    [*(text if isinstance(text, bytes) else tokenizer.encode(text)), *end]
                    for text in content
                ]
            )
        write_bin(str(folder / f'{name}.bin'), content, vocab_size or tokenizer.vocab_size)
    for name, mask in (masks or {}).items():
        np.asarray(mask, np.uint8).tofile(folder / f'{name}.mask.bin')
    tokenizer.save(str(folder / 'tokenizer.json'))
    (folder / 'meta.json').write_text(json.dumps(dict(vocab_size=tokenizer.vocab_size, splits={})))


def look(cwd, *args, columns=100):
    """What look.py prints, run in this process, which has numpy and matplotlib already."""
    out = io.TextIOWrapper(io.BytesIO(), 'utf-8')
    on_pipe = signal.getsignal(signal.SIGPIPE)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.chdir(cwd)
        patch.setenv('COLUMNS', str(columns))
        patch.setattr(sys, 'argv', ['prepare/look.py', *args])
        patch.setattr(sys, 'path', sys.path[:])
        patch.setattr(sys, 'excepthook', sys.excepthook)
        try:
            runpy.run_path(os.path.join(ROOT, 'prepare/look.py'), run_name='__main__')
        finally:
            signal.signal(signal.SIGPIPE, on_pipe)
    out.flush()
    return out.buffer.getvalue().decode()


def mistake(cwd, *args):
    """The line that look.py stops with."""
    with pytest.raises(UserError) as stop:
        look(cwd, *args)
    assert '\n' not in str(stop.value)
    return str(stop.value)


def figures(cwd, *args):
    return json.loads(look(cwd, *args, '--json').splitlines()[-1])


def words(rng, n):
    return ' '.join(''.join(chr(97 + c) for c in rng.integers(0, 26, 6)) for _ in range(n))


@pytest.fixture
def good(tmp_path):
    """A dataset with nothing to warn of: documents of random words, in bytes."""
    rng = np.random.default_rng(0)
    texts = [words(rng, 30) for _ in range(260)]
    write(tmp_path / 'data' / 'good', train=texts[60:], val=texts[:60])
    return tmp_path, texts


# ----------------------------------------------------------------------------- documents
def test_texts_stand_over_their_ids(tmp_path):
    write(tmp_path / 'data' / 'd', train=['ab\tc\nd', 'second'])
    out = look(tmp_path, 'data/d')
    assert out == (
        '\ndocument 1 of 2 · train · 7 tokens, 6 bytes\n'
        '⏎ newline   → tab   · space at the end   \\x.. byte\n'
        'a |b |→|c |⏎\n97|98|9|99|10\nd  |<|endoftext|>\n100|256\n'
        '\ndocument 2 of 2 · train · 7 tokens, 6 bytes\n'
        '⏎ newline   → tab   · space at the end   \\x.. byte\n'
        's  |e  |c |o  |n  |d  |<|endoftext|>\n115|101|99|111|110|100|256\n'
    )
    assert (
        look(tmp_path, 'd') == out == look(tmp_path, 'd/', '--color=False')
    )  # the bare name; a trailing slash
    assert (
        'document 2 of 2' in (second := look(tmp_path, 'd', '--document=2'))
        and 'document 1' not in second
    )
    one = look(tmp_path, 'd', '--documents=1', '--max_tokens=4')
    assert (
        'document 2 of' not in one
        and '... 3 more tokens (--max_tokens=4)' in one
        and '1 more documents (--document=2 goes on)' in one
    )


def test_learned_tokens_are_marked(tmp_path):
    write(tmp_path / 'data' / 'd', train=['abcd'], val=['x'], masks={'train': [0, 1, 1, 0, 1]})
    out = look(tmp_path, 'd').splitlines()
    assert '60.0% learned' in out[1] and out[2].endswith('^^^ learned')
    assert out[3:] == [
        'a |b |c |d  |<|endoftext|>',
        '97|98|99|100|256',
        '   ^^ ^^     ^^^^^^^^^^^^^',
    ]
    colours = look(tmp_path, 'd', '--color').splitlines()
    assert (
        re.findall(r'\x1b\[1;4;[\d;]*m(\S+) *\x1b', colours[3]) == ['b', 'c', '<|endoftext|>']
        and 'underlined' in colours[2]
    )
    assert 'learned' not in look(tmp_path, 'd', '--split=val')
    np.zeros(3, np.uint8).tofile(tmp_path / 'data' / 'd' / 'train.mask.bin')
    assert 'data/d/train.mask.bin has 3 bytes for 5 tokens' in mistake(tmp_path, 'd')


def columns_of(line):
    """Where each character of a line stands in a terminal: {column: character}."""
    at, places = 0, {}
    for c in line:
        if not unicodedata.combining(c):
            places[at] = c
            at += 2 if unicodedata.east_asian_width(c) in 'WF' else 1
    return places, at


def test_wide_and_combining_characters_keep_the_columns(tmp_path):
    text = '日本e\u0301x😀한\u0301z'
    write(tmp_path / 'data' / 'd', char_tokenizer(sorted(set(text))), train=[text])
    texts, ids = look(tmp_path, 'd').splitlines()[3:]
    bars = [{at for at, c in columns_of(line)[0].items() if c == '|'} for line in (texts, ids)]
    assert bars[0] == bars[1] and len(bars[0]) == 8 and '◌\u0301' in texts and '日|' in texts
    texts, ids = (
        re.sub(r'\x1b\[[\d;]*m', '', line)
        for line in look(tmp_path, 'd', '--color').splitlines()[3:]
    )
    starts = [m.start() for m in re.finditer(r'\d+', ids)]
    assert [columns_of(texts)[0][at] for at in starts] == list('日本e◌x😀한◌z')


def test_lines_keep_to_the_width(tmp_path):
    tokenizer = train_bpe(['a' * 64 + ' 日本 b'] * 50, 400)
    assert max(map(len, tokenizer.token_bytes.values())) >= 64
    write(tmp_path / 'data' / 'd', tokenizer, train=['a' * 64 + ' 日本 b' * 30])
    ids = [str(i) for i in read_bin(str(tmp_path / 'data' / 'd' / 'train.bin'))]
    for width in (20, 33, 80):
        for color in (True, False):
            out = [
                re.sub(r'\x1b\[[\d;]*m', '', line)
                for line in look(tmp_path, 'd', f'--color={color}', columns=width).splitlines()[3:]
            ]
            assert max(columns_of(line)[1] for line in out) <= width and len(out) >= 4
            assert [
                i for line in out[1::2] for i in re.findall(r'\d+', line)
            ] == ids  # none is lost at a line's end


@pytest.mark.parametrize('color', [True, False])
def test_nothing_in_the_data_steers_the_terminal(tmp_path, color):
    evil = '\x1b[2J\x1b]0;title\x07\r\x08\x7f\x00\x9b31m\u202e\u2066\u200b\u2028\xad\ue000 é'
    write(tmp_path / 'data' / 'chars', char_tokenizer(sorted(set(evil))), train=[evil * 3])
    write(tmp_path / 'data' / 'bytes', train=[evil.encode() + b'\xff\xc3'])
    for name in ('chars', 'bytes'):
        for args in ([], ['--quality'] if color else ['--count']):
            out = look(tmp_path, name, f'--color={color}', *args)
            out = re.sub(r'\x1b\[[0-9;]*m', '', out) if color and not args else out
            assert not [c for c in out if not (c.isprintable() or c == '\n')]
            assert '--count' in args or '\\x1b' in out and '\\x07' in out
    characters, in_bytes = look(tmp_path, 'chars'), look(tmp_path, 'bytes')
    assert (
        '\\u202e' in characters
        and '\\x9b' in characters
        and '\\xff' in in_bytes
        and '\\xc3' in in_bytes
    )


def test_colours_are_for_those_who_want_them(tmp_path):
    write(tmp_path / 'data' / 'd', train=['some text'])
    assert '\x1b' not in look(tmp_path, 'd') and '\x1b[38;5;16;48;5;153ms' in look(
        tmp_path, 'd', '--color=True'
    )
    assert '\x1b' in terminal(tmp_path, ['d'], ['q']) and '\x1b' not in terminal(
        tmp_path, ['d'], ['q'], env={'NO_COLOR': '1'}
    )


def terminal(cwd, args, keys, size=(24, 80), env=None):
    """All that look.py shows on a terminal to someone who types a key at each question."""
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', *size, 0, 0))
    clean = (
        {k: v for k, v in os.environ.items() if k not in ('COLUMNS', 'LINES', 'NO_COLOR')}
        | {'TERM': 'xterm-256color', 'PYTHONUTF8': '1'}
        | (env or {})
    )
    process = subprocess.Popen(
        [sys.executable, os.path.join(ROOT, 'prepare/look.py'), *args],
        cwd=cwd,
        env=clean,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    out, asked, keys, key, waited = b'', 0, list(keys), '', 0
    while True:
        if not select.select([ours], [], [], 0.5)[0]:
            waited += 1
            if waited > 40:
                process.kill()
            elif key in ('\x03', '\x04'):  # typed before the script began to read, and lost
                os.write(ours, key.encode())
            continue
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        out += part
        if keys and out.count(b'q quits: ') > asked:
            asked += 1
            key = keys.pop(0)
            os.write(ours, key.encode() + (b'' if key in ('\x03', '\x04') else b'\n'))
    os.close(ours)
    assert process.wait(timeout=20) == 0 and not keys, out.decode()
    return out.decode().replace('\r\n', '\n')


def pages(out):
    return re.findall(r'document (\d+) of', out)


@pytest.mark.slow
def test_pages(tmp_path):
    write(tmp_path / 'data' / 'd', train=[f'text {i}' for i in range(12)])
    out = terminal(
        tmp_path, ['d'], ['', '', 'b', '7', '', 'b', 'nonsense', '99', '0', '12', 'b', 'q']
    )
    assert pages(out) == ['1', '2', '3', '2', '7', '8', '7', '7', '7', '7', '12', '11']
    assert pages(terminal(tmp_path, ['d', '--document=11'], ['', ''])) == [
        '11',
        '12',
    ]  # Enter after the last one ends it
    for key in ('\x04', '\x03'):
        assert 'Traceback' not in (out := terminal(tmp_path, ['d'], ['', key])) and pages(out) == [
            '1',
            '2',
        ]


def test_a_long_document_is_shown_a_screenful_at_a_time(tmp_path):
    write(tmp_path / 'data' / 'd', train=['x' * 300, 'y'])
    out = terminal(
        tmp_path, ['d'], ['', 'b', '', '2', 'b', 'q'], size=(12, 60), env={'NO_COLOR': '1'}
    )
    screens = out.split('Enter next')[:-1]
    assert all(len(s.splitlines()) <= 12 for s in screens)
    spans = [re.search(r'(\d+) to (\d+) of them', s).groups() for s in screens[:4]]
    assert (
        spans[0] == spans[2] and spans[1] == spans[3] and int(spans[1][0]) == int(spans[0][1]) + 1
    )
    assert pages(out) == ['1', '1', '1', '1', '2', '1'] and screens[5].count('x') == screens[
        0
    ].count('x')
    assert screens[0].count('|x') + 4 == int(
        spans[0][1]
    )  # four lines of texts, none with a | before its first


# ----------------------------------------------------------------------------- figures
def test_prepared_text_and_shards_count_the_same(tmp_path):
    (tmp_path / 'n.jsonl').write_text(
        ''.join(json.dumps({'text': f'naïve text {i} 日本'}) + '\n' for i in range(50))
    )
    run(
        tmp_path,
        'prepare/text.py',
        '--input=n.jsonl',
        '--name=n',
        '--tokenizer=train',
        '--vocab_size=280',
        '--val_fraction=0.2',
    )
    f = figures(tmp_path, 'n', '--count')['splits']
    meta = json.loads((tmp_path / 'data/n/meta.json').read_text())['splits']
    for name in ('train', 'val'):
        assert {k: f[name][k] for k in ('tokens', 'bytes', 'documents')} == {
            k: meta[name][k] for k in ('tokens', 'bytes', 'documents')
        }
    assert (
        f['total']['documents'] == 50
        and f['train']['bytes_per_token'] == f['train']['bytes'] / f['train']['tokens']
    )
    whole = figures(tmp_path, 'n', '--quality')
    ids, tokenizer = (
        read_bin(str(tmp_path / 'data/n/train.bin')),
        load_tokenizer(str(tmp_path / 'data/n')),
    )
    assert {t['id']: t['count'] for t in whole['most_frequent']} == {
        i: int((ids == i).sum()) for i in [t['id'] for t in whole['most_frequent']]
    }
    assert whole['ids_seen'] == len(np.unique(ids)) and whole['vocab_size'] == tokenizer.vocab_size
    cut = int(np.flatnonzero(ids == tokenizer.end_of_text)[9]) + 1
    parts = {
        'train_000000': ids[:cut],
        'train_000001': ids[cut:],
        'val': read_bin(str(tmp_path / 'data/n/val.bin')),
    }
    masks = {
        'train_000000': np.zeros(cut),
        'train_000001': np.ones(len(ids) - cut),
        'val': np.ones(len(parts['val'])),
    }
    write(
        tmp_path / 'data' / 'shards', tokenizer, masks=masks, **parts
    )  # its meta knows no bytes: they are counted
    g = figures(tmp_path, 'shards', '--count')['splits']
    assert g['train'] == f['train'] | dict(
        shards=2, learned=len(ids) - cut, learned_share=(len(ids) - cut) / len(ids)
    )
    again = figures(tmp_path, 'shards', '--quality')
    assert all(
        again[key] == whole[key]
        for key in ('most_frequent', 'least_frequent', 'lengths', 'coverage')
    )
    tenth, eleventh = (
        look(tmp_path, 'shards', f'--document={i}', '--documents=1').splitlines() for i in (10, 11)
    )
    assert '0.0% learned' in tenth[1] and '100.0% learned' in eleventh[1]
    assert look(tmp_path, 'n', '--document=11', '--documents=1').splitlines()[3] == eleventh[3]


def test_hashes_do_not_mind_chunks_and_shards(tmp_path):
    """Documents and windows are found wherever a chunk or a shard ends; near copies are not."""
    rng = np.random.default_rng(1)
    long = rng.integers(0, 50, 400_000)  # over a chunk
    near = np.append(long[:-1], (long[-1] + 1) % 50)
    small = rng.integers(0, 50, 60)
    end = [50]
    tokenizer = char_tokenizer([chr(48 + i) for i in range(50)], ['<|endoftext|>'])
    for name, parts in (
        ('a', dict(train=np.concatenate([small, end, long, end, near, end]))),
        ('b', dict(train_000000=np.concatenate([long, end, small, end]), train_000001=near)),
    ):
        write(
            tmp_path / 'data' / name,
            tokenizer,
            val=np.concatenate([small, end, long, end, rng.integers(0, 50, 90), end]),
            **parts,
        )
        f = figures(tmp_path, name, '--quality')
        train, val = f['splits']['train'], f['splits']['val']
        assert (train['documents'], train['duplicates'], val['documents_in_train']) == (3, 0, 2)
        assert val['windows'] == 1000 and 990 <= val['windows_in_train'] <= 1000
        assert f['lengths']['32-63'] == 1 and f['lengths']['262,144-524,287'] == 2


def test_faults_of_the_text_are_counted(tmp_path):
    tokenizer = byte_tokenizer()
    write(
        tmp_path / 'data' / 'd',
        tokenizer,
        train=[
            'fine 日本 é\t\r\n',
            'lost \ufffd',
            b'cut \xe6\x97',
            'bell \x07',
            'next line \x85',
            'a' * 262_143 + 'é',
            b'\xe6',
            b'\x97\xa5',
            '',
        ],
    )
    f = figures(tmp_path, 'd', '--quality')['splits']['train']
    assert [
        f[f'documents_with_{k}']
        for k in ('replacement_characters', 'invalid_bytes', 'control_characters')
    ] == [1, 3, 2]
    assert f['near_empty'] == 3 and f['documents'] == 9
    assert f['documents_with_special_tokens_spelled_out'] == 0


def test_special_tokens_spelled_out_are_warned_of(good):
    folder, texts = good
    warned = warnings_of(folder, train=texts[60:] + ['a <|endoftext|> b'] * 3, val=texts[:60])
    assert '3 of 203 documents of train spell out a special token' in warned[0] + warned[-1]


def test_bytes_of_sentencepiece_make_characters(tmp_path):
    import tokenizers

    vocab = (
        {'<unk>': 0, '</s>': 1}
        | {f'<0x{byte:02X}>': 2 + byte for byte in range(256)}
        | {'a': 258, 'b': 259}
    )
    spelled = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, [], byte_fallback=True, unk_token='<unk>')
    )
    spelled.add_special_tokens(['</s>'])
    spelled.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    write(tmp_path / 'data' / 'd', Tokenizer(json.loads(spelled.to_str())), train=['a日b'])
    assert look(tmp_path, 'd').splitlines()[3:] == [
        'a  |\\xe6|\\x97|\\xa5|b  |</s>',
        '258|232 |153 |167 |259|1',
    ]
    train = figures(tmp_path, 'd', '--quality')['splits']['train']
    assert (
        train['bytes'],
        train['documents_with_replacement_characters'],
        train['documents_with_invalid_bytes'],
    ) == (5, 0, 0)


def test_the_plot_is_a_picture(good):
    from PIL import Image

    folder, _ = good
    assert 'data/good/quality.png' in look(folder, 'good', '--quality')
    with Image.open(folder / 'data/good/quality.png') as image:
        image.load()
        assert (
            image.format == 'PNG' and image.width > 600 and len(image.convert('L').getcolors()) > 20
        )
    assert not list(folder.glob('data/good/*.tmp'))


def warnings_of(folder, **files):
    write(folder / 'data' / 'w', **files)
    out = look(folder, 'w', '--quality')
    lines = re.findall('^WARNING: (.*)$', out, re.M)
    assert (lines == []) == ('no warnings' in out)
    return lines


def test_good_data_has_no_warnings(good):
    out = look(good[0], 'good', '--quality')
    assert out.endswith('no warnings\n') and 'WARNING' not in out and '0 of 252 windows' in out


BYTES = byte_tokenizer()
WRONG = [  # what is done to good data, and all the warnings that follow
    (
        lambda t, v: dict(train=t + v[:3], val=v, masks={'val': np.zeros(12_600)}),
        [
            '3 of 60 documents of val are in train too',
            '12 of 252 windows of 50 tokens of val',
            'the mask of val lets nothing be learned',
        ],
    ),
    (
        lambda t, v: dict(train=t + ['x' + text for text in v[:9]], val=v, test=['y' + t[0]]),
        ['30 of 252 windows of 50 tokens of val', '3 of 4 windows of 50 tokens of test'],
    ),
    (
        lambda t, v: dict(train=t + ['x' * 100_000] + t[:5], val=BYTES.encode(' '.join(v))),
        [
            'one token is 70.',
            '5 of 206 documents of train repeat another one',
            'val has no end-of-text token',
        ],
    ),
    (
        lambda t, v: dict(
            train=t[:-5] + [f'{text} \ufffd' for text in t[-5:]] + [f'{i:04}' for i in range(20)],
            val=v[:40],
        ),
        [
            '20 of 220 documents of train have fewer than 5 tokens',
            '5 of 220 documents of train hold U+FFFD',
            'val has 8,',
        ],
    ),
    (
        lambda t, v: dict(train=[*BYTES.encode(t[0]), 300, 65535, END], val=v),
        ['2 tokens of train are beyond the vocabulary of 259'],
    ),
]


@pytest.mark.parametrize(
    'make, expected', WRONG, ids=lambda x: x[0].split(' of ')[-1] if isinstance(x, list) else ''
)
def test_warnings(good, make, expected):
    folder, texts = good
    found = warnings_of(folder, **make(texts[60:], texts[:60]))
    found = sorted(
        found,
        key=lambda line: (
            [e in line for e in expected].index(True) if any(e in line for e in expected) else -1
        ),
    )
    assert len(found) == len(expected), found
    assert all(e in line for e, line in zip(expected, found, strict=True)), found


def test_text_that_is_none(good):
    folder, texts = good
    train = [
        *texts[66:],
        *[b'half \xe6\x97 %d' % i for i in range(3)],
        *[f'bell \x07 {i}' for i in range(3)],
    ]
    found = warnings_of(folder, train=train, val=texts[:60])
    assert sorted(found) == [
        '3 of 200 documents of train hold bytes that are no UTF-8 (1.5%)',
        '3 of 200 documents of train hold control characters (1.5%)',
    ]


def test_a_vocabulary_too_large(good):
    folder, texts = good
    tokenizer = char_tokenizer(
        [chr(97 + i) for i in range(26)] + [' '] + [chr(0x4E00 + i) for i in range(20)],
        ['<|endoftext|>'],
    )
    found = warnings_of(folder, tokenizer=tokenizer, train=texts[60:], val=texts[:60])
    assert (
        len(found) == 1
        and found[0].startswith('20 of the 47 ids of the vocabulary')
        and '42.6%' in found[0]
    )


# ---------------------------------------------------------------- other people's folders
def test_nanogpts_folder(tmp_path):
    folder = tmp_path / 'data' / 'old'
    folder.mkdir(parents=True)
    for name, n in (('train', 500), ('val', 60)):
        (np.arange(n) % 70 + 5000).astype(np.uint16).tofile(folder / f'{name}.bin')
    out = look(tmp_path, 'data/old', '--max_tokens=3').splitlines()
    assert out[1:] == [
        'document 1 of 1 · train · 500 tokens',
        'ids alone: there is no tokenizer',
        '5000|5001|5002',
        '... 497 more tokens (--max_tokens=3)',
    ]
    f = figures(tmp_path, 'old', '--quality')
    assert (
        f['splits']['train']['bytes'] is None
        and f['splits']['val']['windows_in_train'] == 1
        and f['vocab_size'] == 5070
    )
    assert [
        re.sub(r'\x1b\[[\d;]*m', '', line)
        for line in look(tmp_path, 'old', '--max_tokens=3', '--color').splitlines()
    ][3] == '5000 5001 5002 '
    import pickle

    (folder / 'meta.pkl').write_bytes(
        pickle.dumps(dict(vocab_size=6000, itos={i: chr(i) for i in range(6000)}, stoi={}))
    )
    assert f'{chr(5000)}' in look(tmp_path, 'old')


@pytest.mark.slow
@pytest.mark.parametrize(
    'meta',
    [
        dict(vocab_size='many'),
        dict(vocab_size=-1, splits={}),
        dict(vocab_size=10**30, splits=dict(train=[])),
        dict(vocab_size=1.5, splits=dict(train=dict(tokens='7', bytes='6'))),
        dict(vocab_size=None, splits=dict(train=dict(tokens=7, bytes='6'))),
    ],
)
def test_a_broken_meta_is_ignored(tmp_path, meta):
    folder = tmp_path / 'data' / 'd'
    write(folder, train=['second'])
    (folder / 'meta.json').write_text(json.dumps(meta))
    f = figures(tmp_path, 'd', '--count')
    assert f['vocab_size'] == 259 and f['splits']['train']['bytes'] == 6
    (folder / 'tokenizer.json').unlink()
    f = figures(tmp_path, 'd', '--quality')
    assert f['vocab_size'] == 257 and f['splits']['train']['tokens'] == 7
    (folder / 'meta.json').write_text('[]')
    assert 'meta.json holds no object' in mistake(tmp_path, 'd')
    for splits in ([], 'train', None):
        (folder / 'meta.json').write_text(json.dumps(dict(splits=splits)))
        assert 'meta.json is broken: splits is no dict' in mistake(tmp_path, 'd')


def test_a_dataset_of_characters_is_one_document_a_file(tmp_path):
    (tmp_path / 'one.txt').write_text('to be or not to be, that is the question: ' * 50)
    run(
        tmp_path,
        'prepare/text.py',
        '--input=one.txt',
        '--name=one',
        '--tokenizer=chars',
        '--val_fraction=0.1',
    )
    assert look(tmp_path, 'one').startswith(
        '\ndocument 1 of 1 · train · 1,890 tokens, 1,890 bytes\n'
    )
    assert [s['documents'] for s in figures(tmp_path, 'one', '--count')['splits'].values()] == [
        1,
        1,
        2,
    ]


def test_mistakes_are_one_line(tmp_path):
    write_tiny(tmp_path / 'data' / 'tiny')
    (tmp_path / 'empty').mkdir()

    def wrong(*args):
        return mistake(tmp_path, *args)

    assert 'one dataset is needed: python prepare/look.py data/NAME' in fails(
        tmp_path, 'prepare/look.py'
    )
    assert 'one dataset is needed' in wrong('tiny', 'tiny')
    assert 'neither nowhere nor data/nowhere holds train.bin, val.bin or' in wrong('nowhere')
    assert 'neither empty nor data/empty holds' in wrong('empty')
    assert 'data/tiny has no test.bin; it has train, val' in wrong('tiny', '--split=test')
    assert 'document=2: train has 1 documents' in wrong('tiny', '--document=2')
    assert 'document=5: val has 1' in wrong('tiny', '--split', 'val', '--document', '5')
    assert 'max_tokens=0 must be 1 to' in wrong('tiny', '--max_tokens=0')
    assert "color='blue' is none of" in wrong('tiny', '--color=blue')
    assert '--json goes with --count or --quality' in wrong('tiny', '--json')
    assert "no setting is called 'qualty'" in wrong('tiny', '--qualty')
    (tmp_path / 'data' / 'tiny' / 'train.bin').write_bytes(b'')
    assert 'train.bin is empty' in wrong('tiny')
    assert 'Settings' in run(tmp_path, 'prepare/look.py', '--help')
