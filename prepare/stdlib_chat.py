"""Questions about Python's standard library, which its docstrings answer: a chat, no network.

python prepare/stdlib_chat.py       writes data/stdlib_chat, with the tokenizer of data/stdlib
python prepare/stdlib_chat.py --pairs --name=stdlib_pairs       for DPO: brief answers are preferred
"""

import ast
import os
import sys
import sysconfig
import warnings

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))  # where fledge/ is

from fledge.corpus import Made, Stage, configure, preference, prepare
from fledge.corpus.records import exchange

name = 'stdlib_chat'  # folder under data/
tokenizer = 'data/stdlib'  # the default run's; or gpt2, bytes, ...
val_fraction = 0.05  # of the functions, classes and modules
pairs = False  # pairs in place of conversations: an answer, and the same with more than was asked
settings = configure(globals())

LEFT_OUT = ('site-packages', 'dist-packages', 'test', 'tests', 'idlelib', 'lib2to3', 'ntpath.py')
KNOWN_AS = {'posixpath': 'os.path'}


def modules():
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


def summary_of(node):
    """The first paragraph of a docstring on one line, or ''."""
    paragraph = (ast.get_docstring(node) or '').strip().partition('\n\n')[0]
    return ' '.join(paragraph.split())


def talks_about(dotted, node):
    """The conversations about a function, a class or a module; [] where nothing is known of it."""
    answer = summary_of(node)
    if len(answer) < 15:
        return []
    if pairs:
        return pair_about(dotted, node, answer) if isinstance(node, ast.FunctionDef) else []
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


def pair_about(dotted, node, answer):
    """A brief answer about a function, and the one that says more than was asked."""
    more = f'{answer} {call_of(dotted, node)}'
    return preference(dict(prompt=f'What does {dotted} do?', chosen=answer, rejected=more))


def call_of(dotted, function):
    return f'It is called as {dotted}({ast.unparse(function.args)}).'


def all_talks():
    found = []
    for dotted, tree in modules():
        parts = [(dotted, tree)]
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != '_':
                parts.append((f'{dotted}.{node.name}', node))
        found += [talks for part in parts if (talks := talks_about(*part))]
    return found


warnings.simplefilter('ignore')  # old modules have odd escapes in their texts
talks = all_talks()
source = Made("the standard library's docstrings", len(talks), lambda i: talks[i])
version = sys.version.split()[0]
stage = Stage(source, lambda record: record)
prepare(settings, f'docstrings of Python {version}', [stage], masked=True, pairs=pairs)
