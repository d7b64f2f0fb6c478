"""Documents in, a prepared dataset out: what every script in prepare/ calls."""
import json
import os
import random
import shlex
import sys

from fledge import UserError, lock_folder, replacing
from fledge.tokenizer import char_tokenizer, load_tokenizer, train_bpe
from fledge.tokens import BinWriter

BATCH_BYTES = 8 << 20  # of text, tokenized at a time: memory stays small, threads stay busy


def read_tiny_shakespeare(path):
    """The text at path, fetched first where path is under data/ and missing, and its address."""
    url = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
    if not os.path.exists(path) and path.startswith('data/'):
        import urllib.request
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                content = response.read()
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with replacing(path, 'wb') as f:
                f.write(content)
        except Exception as e:  # no network, no such page, a broken answer, nowhere to write
            raise UserError(f'cannot fetch {url} ({e}); put the text at {path} or name it with --input') from None
    try:
        with open(path, encoding='utf-8') as f:
            return f.read(), url
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f'cannot read {path}: {e}') from None


def read_files(paths, field, quiet=False):
    """The documents of .txt, .md, .jsonl and .parquet files and of folders of them, in the order of their names."""
    files = []
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f'{path} does not exist')
        found = [os.path.join(d, n) for d, _, names in os.walk(path) for n in names] if os.path.isdir(path) else [path]
        files += sorted(f for f in found if os.path.splitext(f)[1] in ('.txt', '.md', '.jsonl', '.parquet'))
    if not files:
        raise UserError(f'{", ".join(paths)}: no .txt, .md, .jsonl or .parquet files there')
    skipped = []
    for file in files:
        if file.endswith(('.txt', '.md')):
            try:
                with open(file, encoding='utf-8', errors='replace', newline='') as f:
                    text = f.read()
            except OSError as e:
                raise UserError(f'cannot read {file}: {e.strerror}') from None
            if text:
                yield text
        else:
            for place, row in _rows(file, field):
                text = row.get(field) if isinstance(row, dict) else row
                if isinstance(text, str) and text:
                    yield text.encode('utf-8', errors='replace').decode()  # JSON can spell half a surrogate pair
                elif text != '':
                    skipped.append(f'{file}:{place}')
    if skipped and not quiet:
        print(f'skipped {len(skipped):,} records without a text in {field!r}, the first at {", ".join(skipped[:3])}', file=sys.stderr)


def _rows(file, field):
    """(line or row number, record) of a .jsonl or .parquet; a record that cannot be read is None."""
    if file.endswith('.jsonl'):
        with open(file, encoding='utf-8', errors='replace') as f:
            for i, line in enumerate(f, 1):
                try:
                    yield i, json.loads(line) if line.strip() else ''
                except ValueError:
                    yield i, None
        return
    import pyarrow.parquet
    try:
        table, place = pyarrow.parquet.ParquetFile(file), 0
        if field not in table.schema_arrow.names:
            raise UserError(f'{file} has no column {field!r}; it has {", ".join(table.schema_arrow.names)} (--field=NAME)')
        for batch in table.iter_batches(1024, columns=[field]):
            for text in batch.column(0).to_pylist():
                place += 1
                yield place, text
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(f'{file} is not readable: {e}') from None


def choose_tokenizer(source, texts, vocab_size, train_characters=64_000_000):
    """A tokenizer by name or place; 'chars' and 'train' make one from texts(), train from its first 64 million characters."""
    if source == 'chars':
        return char_tokenizer(sorted(set().union(*texts())))
    if source != 'train':
        return load_tokenizer(source)

    def sample():
        size = 0
        for text in texts():
            yield text
            size += len(text)
            if size >= train_characters:
                return
    return train_bpe(sample(), vocab_size)


def split_documents(texts, val_fraction, seed):
    """(split, text) of each document, val by a seeded draw; where all fell to one side, the end of the last one is val."""
    if not 0 < val_fraction < 1:
        raise UserError(f'val_fraction={val_fraction} is not between 0 and 1')
    rng, last, seen = random.Random(seed), None, set()
    for text in texts:
        if last is not None:
            yield last
        last = ('val' if rng.random() < val_fraction else 'train', text)
        seen.add(last[0])
    if len(seen) == 1:
        cut = int(len(last[1]) * (1 - val_fraction))
        yield from ((split, part) for split, part in (('train', last[1][:cut]), ('val', last[1][cut:])) if part)
    elif seen:
        yield last


def write_dataset(name, documents, tokenizer, source, num_proc=0):
    """Tokenize (split, text) pairs into data/name: train.bin, val.bin, tokenizer.json, meta.json. Returns the meta.

    Each document ends with the tokenizer's end-of-text token, where it has one. Files take their final names when all
    is written, train.bin last of all, so what an interrupted run leaves does not look prepared.
    """
    if num_proc < 0:
        raise UserError(f'num_proc={num_proc} must not be negative')
    folder = os.path.join('data', name)
    num_proc = num_proc or (len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    splits = {s: dict(tokens=0, bytes=0, documents=0) for s in ('train', 'val')}
    os.makedirs(folder, exist_ok=True)
    lock = lock_folder(folder, wait=True)
    with BinWriter(f'{folder}/train.bin', tokenizer.vocab_size) as train, BinWriter(f'{folder}/val.bin', tokenizer.vocab_size) as val:
        for batch in _batches(documents):
            for (split, text), ids in zip(batch, tokenizer.encode_batch([text for _, text in batch], num_proc)):
                (train if split == 'train' else val).write(ids + end)
                splits[split]['tokens'] += len(ids + end)
                splits[split]['bytes'] += len(text.encode('utf-8', errors='surrogatepass'))
                splits[split]['documents'] += 1
        empty = [s for s, n in splits.items() if n['tokens'] == 0]
        if empty:
            raise UserError(f'{source} gives no {" and no ".join(empty)} text: it is empty, or too short for its val_fraction')
        tokenizer.save(f'{folder}/tokenizer.json')
        meta = dict(source=source, vocab_size=tokenizer.vocab_size, splits=splits, command=shlex.join(['python', *sys.argv]))
        with replacing(f'{folder}/meta.json') as f:
            json.dump(meta, f, indent=1)
    os.close(lock)
    for split, n in splits.items():
        print(f'{folder}/{split}.bin: {n["tokens"]:,} tokens of {n["documents"]:,} documents, {n["bytes"] / n["tokens"]:.2f} bytes a token')
    return meta


def _batches(documents):
    batch, size = [], 0
    for split, text in documents:
        batch.append((split, text))
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
