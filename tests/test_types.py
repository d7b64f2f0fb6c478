"""What others build on says of what type it takes and returns."""

import ast
import glob
import os

import pytest
from conftest import ROOT

FILES = [
    'model.py',
    'encoder_decoder.py',
    *glob.glob('fledge/**/*.py', root_dir=ROOT, recursive=True),
]


def public_functions(body):
    """The functions and methods, as (node, whether it is a method), with no underscore in front."""
    for node in body:
        if isinstance(node, ast.ClassDef) and is_public(node.name):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            yield from ((method, True) for method in methods if is_public(method.name))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and is_public(node.name):
            yield node, False


def is_public(name):
    return not name.startswith('_') or name == '__init__'


@pytest.mark.parametrize('path', sorted(FILES))
def test_public_functions_have_types(path):
    with open(os.path.join(ROOT, path), encoding='utf-8') as f:
        tree = ast.parse(f.read())
    without = []
    for function, is_method in public_functions(tree.body):
        arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        static = any(getattr(d, 'id', '') == 'staticmethod' for d in function.decorator_list)
        if is_method and not static:
            arguments = arguments[1:]  # self
        without += [f'{function.name}({a.arg})' for a in arguments if a.annotation is None]
        if function.returns is None and function.name != '__init__':
            without.append(f'{function.name} ->')
    assert not without, f'{path}: no type for {", ".join(without)}'
