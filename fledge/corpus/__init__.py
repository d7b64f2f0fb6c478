"""The pipeline under prepare/: sources give records, which become documents, tokens and files.

A script there is its settings, `settings = configure(globals())`, and a call of prepare().
"""

from collections.abc import Callable

from fledge import configurator
from fledge.corpus import pipeline
from fledge.corpus.encoding import Stage
from fledge.corpus.pipeline import prepare
from fledge.corpus.records import (
    article,
    conversation,
    is_title,
    labelled,
    preference,
    text_of,
    translated,
)
from fledge.corpus.sources import (
    RECORDS,
    TABLES,
    Files,
    Hub,
    Made,
    OrElse,
    Skip,
    Urls,
    fetch,
    split_paths,
)

__all__ = ['RECORDS', 'TABLES', 'Files', 'Hub', 'Made', 'OrElse', 'Skip', 'Stage', 'Urls']
__all__ += ['article', 'configure', 'conversation', 'fetch', 'is_title', 'labelled', 'own_files']
__all__ += ['preference', 'prepare', 'text_of', 'translated']


def configure(script: dict) -> dict:
    """The settings of a script, given its globals(), and those that all share.

    Config files and --key=value override them; see fledge.configurator.
    """
    return configurator.configure(script, also=pipeline.__file__)


def own_files(settings: dict, documents: Callable, **options) -> list[Stage]:
    """The stages of a user's own files, --input and --val; options: of Files."""
    val = settings['val']
    split = 'train' if val else ''  # else val is a fraction of it
    stages = [Stage(Files(split_paths(settings['input']), **options), documents, split)]
    if val:  # first, so that it keeps what is in both
        stages.insert(0, Stage(Files(split_paths(val), **options), documents, 'val'))
    return stages
