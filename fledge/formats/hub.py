"""Models' files on the Hugging Face hub, fetched once and then read from its cache."""

import os
import re
import sys

from fledge import UserError


def may_be_source(source: object) -> bool:
    """Whether a value that a file gives may be a path, or a name on the hub, to look for."""
    return isinstance(source, str) and source.isprintable() and 0 < len(source) < 1000


def is_name(source: str) -> bool:
    """Whether source may be a name on the hub: NAME or OWNER/NAME, if no folder OWNER is here."""
    owner = os.path.dirname(source)
    return bool(re.fullmatch(r'[\w.-]+(/[\w.-]+)?', source)) and not os.path.isdir(owner)


def download(name: str, patterns: list[str]) -> str:
    """The folder that holds the files of the hub's model `name` (OWNER/NAME) that match patterns.

    Raises UserError where they cannot be had.
    """
    missing, owner = f'{name} is no file or folder', os.path.dirname(name)
    if not is_name(name):
        taken = f' while there is a folder {owner}' if os.path.isdir(owner) else ''
        raise UserError(f'{missing}, and no name on the Hugging Face hub{taken}')
    os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')
    os.environ.setdefault('HF_HUB_DISABLE_SYMLINKS_WARNING', '1')
    import huggingface_hub
    from huggingface_hub import errors, utils

    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    try:
        return huggingface_hub.snapshot_download(name, allow_patterns=patterns)
    except errors.GatedRepoError:
        raise UserError(
            f'{name} is gated on the Hugging Face hub: accept its terms there, '
            'then log in with `hf auth login`, or set HF_TOKEN'
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f'{missing}, and the Hugging Face hub has no such model '
            '(or it is private: `hf auth login`)'
        ) from None
    except Exception as e:  # no network, a server out of service, a full disk
        reason = (str(e).splitlines() or [''])[0][:200]
        raise UserError(
            f'{missing}, and cannot be had from the Hugging Face hub ({type(e).__name__}: {reason})'
        ) from None
