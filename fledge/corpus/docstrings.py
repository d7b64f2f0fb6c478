"""Python's standard library as questions, which its own docstrings answer."""

import ast
import os
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator

from fledge.corpus.encoding import Stage
from fledge.corpus.records import exchange, preference
from fledge.corpus.sources import Made

VERSION = sys.version.split()[0]
LEFT_OUT = ('site-packages', 'dist-packages', 'test', 'tests', 'idlelib', 'lib2to3', 'ntpath.py')
KNOWN_AS = {'posixpath': 'os.path'}


def modules() -> Iterator[tuple[str, ast.Module]]:
    """(dotted name, its parsed source) of each public module."""
    root = sysconfig.get_paths()['stdlib']
    for directory, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in LEFT_OUT and f[0] not in '_.')
        for file in sorted(f for f in files if f.endswith('.py') and f not in LEFT_OUT):
            path = os.path.relpath(os.path.join(directory, file), root)
            dotted = path.removesuffix('.py').replace(os.sep, '.').removesuffix('.__init__')
            if '._' not in f'.{dotted}':
                with open(os.path.join(directory, file), encoding='utf-8', errors='replace') as f:
                    yield KNOWN_AS.get(dotted, dotted), ast.parse(f.read())


def summary_of(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> str:
    """The first paragraph of a docstring on one line, or '' where it hardly says anything."""
    paragraph = (ast.get_docstring(node) or '').strip().partition('\n\n')[0]
    summary = ' '.join(paragraph.split())
    return summary if len(summary) >= 15 else ''


def talks_about(dotted: str, node: ast.Module | ast.ClassDef | ast.FunctionDef) -> list:
    """The conversations about a function, a class or a module; [] where nothing is known of it."""
    answer = summary_of(node)
    if not answer:
        return []
    if isinstance(node, ast.Module):
        return [exchange(f'What is the module {dotted} for?', answer)]
    if isinstance(node, ast.ClassDef):
        kind, call = 'class', ''
    else:
        kind, call = 'function', call_of(dotted, node)
    talks = [exchange(f'What does {dotted} do?', ' '.join(filter(None, (answer, call))))]
    sentence = answer.partition('. ')[0].rstrip('.')
    talks.append(exchange(f'Which {kind} is this: {sentence}?', f'{dotted}: {answer}'))
    if call:
        talks.append(exchange(f'How do I call {dotted}?', call))
    return talks


def pair_about(dotted: str, node: ast.Module | ast.ClassDef | ast.FunctionDef) -> list:
    """A brief answer about a function, and the one that says more than was asked; [] as above."""
    answer = summary_of(node)
    if not answer or not isinstance(node, ast.FunctionDef):
        return []
    more = f'{answer} {call_of(dotted, node)}'
    return preference(dict(prompt=f'What does {dotted} do?', chosen=answer, rejected=more))


def call_of(dotted: str, function: ast.FunctionDef) -> str:
    return f'It is called as {dotted}({ast.unparse(function.args)}).'


def stage_of(documents_about: Callable) -> Stage:
    """The Stage of all documents that documents_about, talks_about or pair_about, makes.

    It is given (dotted name, node) of each module, and of its public functions and classes.
    """
    warnings.simplefilter('ignore')  # old modules have odd escapes in their texts
    found = []
    for dotted, tree in modules():
        found.append(documents_about(dotted, tree))
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != '_':
                found.append(documents_about(f'{dotted}.{node.name}', node))
    found = [documents for documents in found if documents]
    source = Made(f'the docstrings of Python {VERSION}', len(found), lambda i: found[i])
    return Stage(source, lambda documents: documents)
