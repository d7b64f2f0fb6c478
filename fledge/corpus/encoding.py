"""Records to tokens: the tokenizer that the settings ask for, and what the workers do with it."""

import hashlib
import itertools
import json
import math
import multiprocessing
import os
import signal
import threading
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from fledge import UserError
from fledge.corpus.sources import LOST, NO_TEXT, REPAIRED, Files, Skip, Text, read
from fledge.tokenizer import (
    END_OF_TEXT,
    IM_END,
    IM_START,
    char_tokenizer,
    load_tokenizer,
    train_bpe,
)
from fledge.tokens import format_of

SPLITS = ('train', 'val', 'test')
# What is known of an example: the documents of a record, or a part of a long text.
EXAMPLE = np.dtype(
    [
        ('hash', np.uint64),
        ('split', np.int64),  # its number in SPLITS
        ('part', bool),  # whether it is a part of a long text
        ('tokens', np.int64),
        ('bytes', np.int64),
        ('documents', np.int64),  # that end in it
    ]
)


class Note(NamedTuple):
    """What is to be said of a record."""

    kind: str  # a field of the pipeline's state that counts such notes
    why: str
    place: tuple  # file and line, 0 for all of it; None where it does not matter
    before: int  # the number of examples before it
    count: int = 1


class Tokenized(NamedTuple):
    """What came of a batch of records."""

    examples: np.ndarray  # of EXAMPLE
    ids: np.ndarray  # of all examples, one after another
    learned: np.ndarray  # uint8 for each of the ids, whether it is learned; None without masks
    notes: list  # of Note


def choose_tokenizer(s, stages, masked):
    """The tokenizer that the settings ask for; chars and train are made of the stages' own text.

    Also returns why conversations are not in the form of its chat template, if so, or ''.
    """
    if s.tokenizer == 'chars':
        characters = set(itertools.chain.from_iterable(texts(s, stages, 0)))
        if not masked:
            return char_tokenizer(sorted(characters)), ''
        characters |= set('system\nuser\nassistant\n')
        return char_tokenizer(sorted(characters), (END_OF_TEXT, IM_START, IM_END)), ''
    if s.tokenizer == 'train':
        return train_bpe(texts(s, stages, s.train_bytes), s.vocab_size), ''
    encoder = load_tokenizer(s.tokenizer)
    return encoder.for_chats() if masked else (encoder, '')


def texts(s, stages, budget):
    """The texts of the documents; with a budget, some of those to train on, about so many bytes."""
    chosen = [stage for stage in stages if not (budget and stage.split in ('val', 'test'))]
    for stage in chosen:
        share = budget // len(chosen)
        # of files that hold more than that, the beginnings of 64 slices
        many = isinstance(stage.source, Files) and stage.source.size > share > 0
        slices = 64 if many else 1
        size = count = 0
        position = None  # where a slice is left, and the next one is looked for from there
        for i in range(slices):
            enough = share * (i + 1) / slices if budget else math.inf
            if size >= enough:  # a slice before it gave more than its share
                continue
            for record, _, after in read(stage.source, position, i, slices, s.retries):
                position = after
                found = []
                with suppress(Skip):
                    for document in documents_of(stage, record, []):
                        found += texts_of(document)
                for text in found:
                    yield text
                    size += len(text.encode())
                count += 1
                if size >= enough or count == stage.limit:
                    break


def set_job(*job):
    """What tokenize() needs: the settings, the stages, the tokenizer, whether masks are written."""
    global _job
    _job = job


def start_worker(*job):
    """Begin a worker process, which ends with its parent, however that ends."""
    set_job(*job)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to hear
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def leave_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def tokenize(stage_index, records):
    """The Tokenized of a batch of (record, place) of a stage."""
    s, stages, encoder, masked = _job
    examples, notes = [], []
    ids, learned = [end_of(encoder)[:0]], [np.zeros(0, np.uint8)]
    for record, (path, line) in records:
        repaired = []  # (line of the record or 0 for its own, characters lost if they are many)
        before = len(examples)
        try:
            example, pieces, spelled = _encode(s, stages[stage_index], encoder, record, repaired)
        except Skip as e:
            notes.append(Note(e.kind, str(e), (path, line), before))
        except UserError as e:  # a character that the vocabulary lacks
            notes.append(Note('dropped', str(e), (path, line), before))
        else:
            examples.append(example)
            for piece_ids, piece_learned in pieces:
                ids.append(piece_ids)
                learned.append(piece_learned)
            notes += [Note('spelled_out', token, (path, line), before) for token in spelled]
        for n, lost in repaired:
            notes.append(Note('repaired', REPAIRED, (path, n or line), before))
            if lost:
                notes.append(Note('lost', LOST, (path, 0), before, lost))
    return Tokenized(
        np.array(examples, EXAMPLE),
        np.concatenate(ids).astype(format_of(encoder.vocab_size)[1]),
        np.concatenate(learned).astype(np.uint8) if masked else None,
        notes,
    )


def _encode(s, stage, encoder, record, repaired):
    """A record as an EXAMPLE, [(ids, learned), ...] of its documents, special tokens spelled out.

    Skip if it has no documents.
    """
    documents = documents_of(stage, record, repaired)
    part = isinstance(record, Text) and bool(record.key)
    document_texts = [''.join(texts_of(document)) for document in documents]
    if not part:
        if not document_texts or not all(text.strip() for text in document_texts):
            raise Skip('empty')
        if sum(map(len, document_texts)) < s.min_length:
            raise Skip(f'shorter than min_length={s.min_length}')
    pieces = []
    for document in documents:
        ids, learned = _encode_document(encoder, document, begins=not part or record.first)
        pieces.append((ids, learned))
        if not part or record.last:  # the end is learned where what it ends is
            end = end_of(encoder)
            end_learned = learned[-1:] if len(learned) else np.uint8(1)
            if encoder.template and is_chat(document):  # which its own token has ended
                end_learned = np.uint8(0)
            pieces.append((end, np.repeat(end_learned, len(end))))
    # a document's hash says whether it has come before, and with the seed which split it is in
    if part:
        key = record.key
    elif documents == document_texts[:1]:
        key = document_texts[0]
    else:
        key = repr(documents)
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    split = stage.split or _draw_split(s, documents[0], digest)
    example = (
        int.from_bytes(digest, 'big'),
        SPLITS.index(split),
        part,
        sum(len(ids) for ids, _ in pieces),
        sum(len(text.encode()) for text in document_texts),
        record.last if part else len(documents),
    )
    spelled = [token for text in document_texts for token in encoder.special_pattern.findall(text)]
    return example, pieces, spelled


def _draw_split(s, document, digest):
    """train or val, by the digest of an example, the first document of which is given."""
    drawn = digest
    if not isinstance(document, str) and not is_chat(document):
        # pieces: all targets of a source are in one split, so val's sources are not in train
        source, _ = document[0]
        drawn = source.encode()
    draw = hashlib.blake2b(drawn, digest_size=8, key=str(s.seed).encode()).digest()
    return 'val' if int.from_bytes(draw, 'big') / 2**64 < s.val_fraction else 'train'


def _encode_document(encoder, document, begins):
    """ids of a document and, for each, whether it is learned; begins: not a later part of one."""
    if is_chat(document):
        return encoder.encode_chat(document)
    parts = [(document, 1)] if isinstance(document, str) else document
    pieces = [np.array(encoder.begin if begins else [], np.uint32)]
    for i, (text, _) in enumerate(parts):
        stands_behind_another = i > 0 or not begins
        if stands_behind_another and encoder.space_in_front:  # which has no place there
            ids, _ = encoder.encode_inside(text)
            pieces.append(np.array(ids, np.uint32))
        else:
            pieces.append(encoder.encode_array(text))
    learned = np.repeat([0, *(is_learned for _, is_learned in parts)], [len(p) for p in pieces])
    return np.concatenate(pieces), learned


def is_chat(document):
    """Whether a document is a conversation: a list of messages."""
    return not isinstance(document, str) and isinstance(document[0], dict)


def end_of(encoder):
    """What ends a document: its end-of-text token, or nothing."""
    return np.array([] if encoder.end_of_text is None else [encoder.end_of_text], np.uint32)


def texts_of(document):
    """The texts of a document: of a text itself, of a conversation's messages, or of pieces."""
    if isinstance(document, str):
        return [document]
    return [part['content'] if isinstance(part, dict) else part[0] for part in document]


def documents_of(stage, record, repaired):
    """The documents of a record, in valid Unicode; what was not is added to repaired."""
    if isinstance(record, Skip):
        raise record
    if isinstance(record, Text):
        if record.broken:
            lost = record.text.count('\ufffd')
            many = lost * 1000 > len(record.text)
            repaired.append((record.broken, lost if many else 0))
        if record.key:
            return [record.text]
        if '\0' in record.text:
            raise Skip(NO_TEXT)
        record = record.text
    if isinstance(record, bytes):
        record = _parse(record, repaired)
    documents = stage.documents(record)
    try:
        for document in documents:
            ''.join(texts_of(document)).encode()
        return documents
    except UnicodeEncodeError:  # JSON can spell half a character
        repaired.append((0, 0))
        return _valid(documents)


def _parse(line, repaired):
    """What a line of JSON says; Skip where it is none."""
    try:
        try:
            return json.loads(line)
        except UnicodeDecodeError:
            repaired.append((0, 0))
            return json.loads(line.decode('utf-8-sig', errors='replace'))
    except (ValueError, RecursionError):
        raise Skip('no JSON') from None


def _valid(value):
    """value with U+FFFD in place of half characters, in whatever it is made of."""
    if isinstance(value, str):
        return value.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    if isinstance(value, dict):
        return {key: _valid(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_valid, value))
    return value
