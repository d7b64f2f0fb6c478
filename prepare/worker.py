"""What the processes of the pipeline do: records in, tokens out."""
import hashlib
import json
import os
import signal
import threading
import time

import numpy as np

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


def tokenize(index, instead, batch):
    """The tokens of a batch of (record, place): arrays over its examples and over its tokens, and notes [(why, place)]."""
    s, stages, encoder, masked = _job
    stage = stages[index].instead if instead else stages[index]
    examples, ids, learned, notes = [], [], [], []
    end = np.array([] if encoder.end_of_text is None else [encoder.end_of_text], np.uint32)
    for record, place in batch:
        try:
            documents, part = documents_of(stage, record, notes, place), isinstance(record, Text) and bool(record.key)
            texts = [''.join(texts_of(document)) for document in documents]
            if not part and not (texts and all(text.strip() for text in texts)):
                raise Skip('empty')
            if not part and sum(map(len, texts)) < s.min_length:
                raise Skip(f'shorter than min_length={s.min_length}')
        except Skip as e:
            notes.append((str(e), place))
            continue
        key = record.key if part else texts[0] if isinstance(documents[0], str) else repr(documents)
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        draw = int.from_bytes(hashlib.blake2b(digest, digest_size=8, key=str(s.seed).encode()).digest(), 'big') / 2 ** 64
        split, first = stage.split or ('val' if draw < s.val_fraction else 'train'), len(ids)
        for document in documents:
            new, mask = _encoded(encoder, document)
            ends = end[:part is False or record.last]
            ids += [new, ends]
            if masked:  # the end is learned where what it ends is
                learned += [mask, np.repeat(mask[-1:], len(ends))]
        examples.append((int.from_bytes(digest, 'big'), SPLITS.index(split), part, sum(map(len, ids[first:])),
                         sum(len(text.encode()) for text in texts), record.last if part else len(documents)))
    columns = zip(('hash', 'split', 'part', 'tokens', 'bytes', 'documents'), (np.uint64, int, bool, int, int, int), zip(*examples) if examples else [()] * 6)
    return {name: np.array(column, dtype) for name, dtype, column in columns} | dict(
        notes=notes, ids=np.concatenate(ids or [end[:0]]).astype(np.uint16 if encoder.vocab_size <= 1 << 16 else np.uint32),
        learned=np.concatenate(learned or [[]]).astype(np.uint8) if masked else None)


def _encoded(encoder, document):
    """ids of a document and, for each, whether it is learned."""
    if isinstance(document, str):
        ids = encoder.encode_array(document)
        return ids, np.ones(len(ids), np.uint8)
    if isinstance(document[0], dict):
        return encoder.encode_chat(document)
    pieces = [encoder.encode_array(text) for text, _ in document]
    return np.concatenate(pieces), np.repeat([learned for _, learned in document], [len(piece) for piece in pieces])


def texts_of(document):
    """The texts of a document."""
    return [document] if isinstance(document, str) else [p['content'] if isinstance(p, dict) else p[0] for p in document]


def documents_of(stage, record, notes, place):
    """The documents of a record, in valid Unicode; Skip where it has none."""
    if isinstance(record, Skip):
        raise record
    if isinstance(record, Text):
        if record.broken:
            notes.append((REPAIRED, (place[0], record.broken)))
        if record.key:
            return [record.text]
        record = record.text
    try:
        if isinstance(record, bytes):
            try:
                record = json.loads(record)
            except UnicodeDecodeError:
                notes.append((REPAIRED, place))
                record = json.loads(record.decode(errors='replace'))
    except (ValueError, RecursionError):
        raise Skip('no JSON') from None
    documents = stage.documents(record)
    try:
        for document in documents:
            ''.join(texts_of(document)).encode()
        return documents
    except UnicodeEncodeError:  # JSON can spell half a character
        notes.append((REPAIRED, place))
        return _valid(documents)


def _valid(value):
    if isinstance(value, str):
        return value.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    if isinstance(value, dict):
        return {key: _valid(v) for key, v in value.items()}
    return type(value)(map(_valid, value)) if isinstance(value, (list, tuple)) else value
