"""What the processes of the pipeline do: records in, tokens out."""

import hashlib
import json
import os
import signal
import threading
import time

import numpy as np

from fledge import UserError
from fledge.tokens import format_of
from prepare.sources import REPAIRED, Skip, Text

SPLITS = ('train', 'val', 'test')


def start(parent, *job):
    """Begin a worker of the process `parent`, with which it ends; job: what tokenize() needs besides a batch."""
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to hear
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def leave_with_parent():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


COLUMNS = dict(
    hash=np.uint64, split=int, part=bool, tokens=int, bytes=int, documents=int
)  # of an example; part: of a text, not its end


def tokenize(index, instead, batch):
    """The tokens of a batch of (record, place): arrays over its examples and over its tokens, and notes.

    A note is (why, place, the number of examples before it), of a record that was left out or repaired.
    """
    s, stages, encoder, masked = _job
    stage = stages[index].instead if instead else stages[index]
    examples, ids, learned, notes = [], [end_of(encoder)[:0]], [np.zeros(0, np.uint8)], []
    for record, place in batch:
        before, noted = len(examples), []
        try:
            example, encoded = _example(s, stage, encoder, record, noted)
            examples.append(example)
            for new, mask in encoded:
                ids.append(new)
                learned.append(mask)
        except (
            Skip,
            UserError,
        ) as e:  # UserError: a character that a vocabulary of characters lacks
            noted.append((str(e), 0))
        notes += [(why, (place[0], line or place[1]), before) for why, line in noted]
    columns = zip(*examples) if examples else [()] * len(COLUMNS)
    return {
        name: np.array(column, dtype) for (name, dtype), column in zip(COLUMNS.items(), columns)
    } | dict(
        notes=notes,
        ids=np.concatenate(ids).astype(format_of(encoder.vocab_size)[1]),
        learned=np.concatenate(learned).astype(np.uint8) if masked else None,
    )


def _example(s, stage, encoder, record, notes):
    """A record's COLUMNS, and [(ids, whether each is learned), ...]; Skip where it gives nothing."""
    documents, part = (
        documents_of(stage, record, notes),
        isinstance(record, Text) and bool(record.key),
    )
    texts = [''.join(texts_of(document)) for document in documents]
    if not part and not (texts and all(text.strip() for text in texts)):
        raise Skip('empty')
    if not part and sum(map(len, texts)) < s.min_length:
        raise Skip(f'shorter than min_length={s.min_length}')
    encoded = []
    for document in documents:
        ids, learned = _encoded(encoder, document)
        encoded.append((ids, learned))
        if not part or record.last:  # the end is learned where what it ends is
            end = end_of(encoder)
            encoded.append(
                (end, np.repeat(learned[-1:] if len(learned) else np.uint8(1), len(end)))
            )
    # a document's hash says whether it has come before, and with the seed which split it is in
    key = record.key if part else texts[0] if documents == texts[:1] else repr(documents)
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    draw = (
        int.from_bytes(
            hashlib.blake2b(digest, digest_size=8, key=str(s.seed).encode()).digest(), 'big'
        )
        / 2**64
    )
    split = SPLITS.index(stage.split or ('val' if draw < s.val_fraction else 'train'))
    return (
        int.from_bytes(digest, 'big'),
        split,
        part,
        sum(len(ids) for ids, _ in encoded),
        sum(len(text.encode()) for text in texts),
        record.last if part else len(documents),
    ), encoded


def end_of(encoder):
    """What ends a document: its end-of-text token, or nothing."""
    return np.array([] if encoder.end_of_text is None else [encoder.end_of_text], np.uint32)


def _encoded(encoder, document):
    """ids of a document and, for each, whether it is learned."""
    if isinstance(document, str):
        ids = encoder.encode_array(document)
        return ids, np.ones(len(ids), np.uint8)
    if isinstance(document[0], dict):
        return encoder.encode_chat(document)
    pieces = [encoder.encode_array(text) for text, _ in document]
    return np.concatenate(pieces), np.repeat(
        [learned for _, learned in document], [len(piece) for piece in pieces]
    )


def texts_of(document):
    """The texts of a document."""
    return (
        [document]
        if isinstance(document, str)
        else [p['content'] if isinstance(p, dict) else p[0] for p in document]
    )


def documents_of(stage, record, notes):
    """The documents of a record, in valid Unicode; Skip where it has none. What was repaired is added to notes: (why, line)."""
    if isinstance(record, Skip):
        raise record
    if isinstance(record, Text):
        if record.broken:
            notes.append((REPAIRED, record.broken))
        if record.key:
            return [record.text]
        record = record.text
    try:
        if isinstance(record, bytes):
            try:
                record = json.loads(record)
            except UnicodeDecodeError:
                notes.append((REPAIRED, 0))
                record = json.loads(record.decode(errors='replace'))
    except (ValueError, RecursionError):
        raise Skip('no JSON') from None
    documents = stage.documents(record)
    try:
        for document in documents:
            ''.join(texts_of(document)).encode()
        return documents
    except UnicodeEncodeError:  # JSON can spell half a character
        notes.append((REPAIRED, 0))
        return _valid(documents)


def _valid(value):
    if isinstance(value, str):
        return value.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    if isinstance(value, dict):
        return {key: _valid(v) for key, v in value.items()}
    return type(value)(map(_valid, value)) if isinstance(value, (list, tuple)) else value
