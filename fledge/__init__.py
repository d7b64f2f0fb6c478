"""What fledge's scripts stand on, one subject a file."""

import atexit
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

import filelock
import psutil


class UserError(Exception):
    """What a user can get wrong: one line and exit code 2; fledge.configurator sees to it."""


def read_json(path: str, what: str = 'object') -> dict:
    """The JSON object at path; UserError where it is missing, broken or no `what`."""
    try:
        with open(path, encoding='utf-8') as f:
            content = json.load(f)
    except OSError as e:
        raise UserError(f'{path}: {e.strerror}') from None
    except (ValueError, RecursionError) as e:
        raise UserError(f'{path} is no valid JSON: {e}') from None
    if not isinstance(content, dict):
        raise UserError(f'{path} holds no {what}')
    return content


def read_records(path: str) -> list[tuple[str, dict]]:
    """[(where, record)] of the lines of a JSONL file; UserError names the line that is none."""
    records = []
    try:
        with open(path, 'rb') as f:
            lines = list(f)
    except OSError as e:
        raise UserError(f'{path}: {e.strerror}') from None
    for number, line in enumerate(lines, 1):
        where = f'{path}, line {number}'
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            json.dumps(record, ensure_ascii=False).encode()  # which half a surrogate pair fails at
        except (ValueError, RecursionError) as e:
            raise UserError(f'{where} is no valid JSON: {e}') from None
        if not isinstance(record, dict):
            raise UserError(f'{where} is no JSON object')
        records.append((where, record))
    if not records:
        raise UserError(f'{path} is empty: a line is a JSON object')
    return records


def read_meta(folder: str) -> dict:
    """meta.json of a prepared dataset, or {} where there is none (nanoGPT's folders)."""
    path = os.path.join(folder, 'meta.json')
    meta = read_json(path) if os.path.exists(path) else {}
    for name, kind in dict(splits=dict, begin=list, separator=str, source=str).items():
        if not isinstance(meta.get(name, kind()), kind):
            raise UserError(f'{path} is broken: {name} is no {kind.__name__}; prepare it again')
    return meta


def usable_cores() -> list[int]:
    """The numbers of the cores that this process may use: a scheduler may have left it a few."""
    if hasattr(psutil.Process, 'cpu_affinity'):
        return psutil.Process().cpu_affinity()
    return list(range(psutil.cpu_count()))  # macOS lets every process use all


def lock_folder(folder: str, wait: bool) -> filelock.BaseFileLock:
    """Hold folder for this process, until it ends or calls release_folder() with what is returned.

    The lock is on a file in it, .lock, and ends with its process, however that ends. Where another
    process holds it: wait for that, or UserError.
    """
    lock = filelock.FileLock(os.path.join(folder, '.lock'))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        held = f'another process is writing to {folder}'
        if not wait:
            raise UserError(held) from None
        print(f'{held}; waiting for it to end', file=sys.stderr)
        lock.acquire()
    atexit.register(release_folder, lock)
    return lock


def release_folder(lock: filelock.BaseFileLock) -> None:
    """Let go of a folder that lock_folder() holds; the file goes as well."""
    if lock.is_locked:
        with suppress(OSError):  # Windows removes no open file: there release() does it
            os.remove(lock.lock_file)
        lock.release()


@contextmanager
def replacing(path: str, mode: str = 'w') -> Iterator[IO]:
    """Open a file that takes the name `path` when the `with` block ends well, else leaves none."""
    temporary = path + '.tmp'
    try:
        with open(temporary, mode, encoding=None if 'b' in mode else 'utf-8') as f:
            yield f
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
