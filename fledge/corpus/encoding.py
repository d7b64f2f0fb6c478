"""Records to tokens: the tokenizer that the settings ask for, and what the workers do with it."""

import hashlib
import itertools
import json
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from fledge import UserError
from fledge.corpus.sources import (
    LOST,
    NO_TEXT,
    REPAIRED,
    Files,
    Hub,
    Made,
    OrElse,
    Skip,
    Text,
    Urls,
    read,
)
from fledge.tokenizer import (
    END_OF_TEXT,
    IM_END,
    IM_START,
    Tokenizer,
    char_tokenizer,
    load_tokenizer,
    train_bpe,
)
from fledge.tokens import format_of

SPLITS = ('train', 'val', 'test')


class Stage(NamedTuple):
    """One source of a dataset, and what to make of its records.

    documents(record) runs in the workers and returns the documents of one example, which stay
    together: each a text, a conversation [{'role': ..., 'content': ...}, ...], or pieces
    [(text, learned), ...]. It raises Skip(why) where a record is of no use. Records that are bytes
    are parsed as JSON first.
    """

    source: Files | Hub | Made | OrElse | Urls
    documents: Callable
    split: str = ''  # train, val or test; '': val_fraction of the examples, by hash, are val
    limit: int = 0  # examples to take; 0: all


class Example(NamedTuple):
    """The documents of a record, or a part of a long text, as tokens."""

    hash: int | None  # 64 bits that tell whether it has come before; None for a part
    split: str
    ids: np.ndarray
    learned: np.ndarray | None  # uint8 for each of the ids: 1 where learned; None without masks
    size: int  # bytes of its text
    documents: int  # that end in it


class Note(NamedTuple):
    """What is to be said of a record."""

    kind: str  # a field of the pipeline's state that counts such notes
    why: str
    place: tuple | None  # file and line, 0 for all of it; None where it does not matter
    times: int = 1


def choose_tokenizer(
    s: SimpleNamespace, stages: list[Stage], masked: bool
) -> tuple[Tokenizer, str]:
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


def texts(s: SimpleNamespace, stages: list[Stage], budget: int) -> Iterator[str]:
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


def set_job(*job: object) -> None:
    """What tokenize() needs: the settings, the stages, the tokenizer, whether masks are written."""
    global _job
    _job = job


def start_worker(*job: object) -> None:
    """Begin a worker process, which ends with its parent, however that ends."""
    set_job(*job)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to hear
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def leave_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def tokenize(stage_index: int, records: list) -> list:
    """The Examples of a batch of (record, place) of a stage, and Notes, in the records' order."""
    s, stages, encoder, masked = _job
    results = []
    for record, (path, line) in records:
        repaired = []  # (line of the record or 0 for its own, characters lost if they are many)
        try:
            example, spelled = _encode(s, stages[stage_index], encoder, masked, record, repaired)
        except Skip as e:
            found = [Note(e.kind, str(e), (path, line))]
        except UserError as e:  # a character that the vocabulary lacks
            found = [Note('dropped', str(e), (path, line))]
        else:
            found = [Note('spelled_out', token, (path, line)) for token in spelled]
            found.append(example)
        for n, lost in repaired:
            results.append(Note('repaired', REPAIRED, (path, n or line)))
            if lost:
                results.append(Note('lost', LOST, (path, 0), lost))
        results += found
    return results


def _encode(s, stage, encoder, masked, record, repaired):
    """A record as an Example, and the special tokens that are spelled out in its text.

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
    ids, learned = [], []
    for document in documents:
        document_ids, is_learned = _encode_document(encoder, document, not part or record.first)
        ids.append(document_ids)
        learned.append(is_learned)
        if not part or record.last:  # the end is learned where what it ends is
            end = end_of(encoder)
            end_learned = is_learned[-1:] if len(is_learned) else 1
            if encoder.template and is_chat(document):  # which its own token has ended
                end_learned = 0
            ids.append(end)
            learned.append(np.repeat(end_learned, len(end)))
    # a document's hash says whether it has come before, and with the seed which split it is in
    if part:
        key = record.key
    elif documents == document_texts[:1]:
        key = document_texts[0]
    else:
        key = repr(documents)
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    example = Example(
        hash=None if part else int.from_bytes(digest, 'big'),
        split=stage.split or _draw_split(s, documents[0], digest),
        ids=np.concatenate(ids).astype(format_of(encoder.vocab_size)[1]),
        learned=np.concatenate(learned).astype(np.uint8) if masked else None,
        size=sum(len(text.encode()) for text in document_texts),
        documents=int(record.last) if part else len(documents),
    )
    spelled = [token for text in document_texts for token in encoder.special_pattern.findall(text)]
    return example, spelled


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


def is_chat(document: str | list) -> bool:
    """Whether a document is a conversation: a list of messages."""
    return not isinstance(document, str) and isinstance(document[0], dict)


def end_of(encoder: Tokenizer) -> np.ndarray:
    """What ends a document: its end-of-text token, or nothing."""
    return np.array([] if encoder.end_of_text is None else [encoder.end_of_text], np.uint32)


def texts_of(document: str | list) -> list[str]:
    """The texts of a document: of a text itself, of a conversation's messages, or of pieces."""
    if isinstance(document, str):
        return [document]
    return [part['content'] if isinstance(part, dict) else part[0] for part in document]


def documents_of(stage: Stage, record: object, repaired: list) -> list:
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
