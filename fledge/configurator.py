"""Config files and --key=value over a script's settings, left to right.

A script's settings are the plain assignments at its top, each with a comment. `configure(globals())` below them
overrides them from config files (plain Python), .json files and --key=value flags, checks names and types, and
prints them all for --help. A mistake costs one line and exit code 2.
"""

import ast
import difflib
import math
import os
import sys
import traceback

from fledge import UserError, read_json


def configure(settings, argv=None, saved=None, also=None):
    """Override `settings`, a script's globals(), by argv (default: sys.argv[1:]); returns all settings as a dict.

    saved: settings of a run that goes on; they replace the defaults, and argv overrides them. A name set to None
    is a hook: a config file may define a function of that name. also: another script, whose settings this one takes too.
    """
    sys.excepthook = one_line
    for name, value in (read_settings(also) if also else {}).items():
        settings.setdefault(name, value)
    defaults = settings.setdefault(
        '_defaults',
        {
            k: v
            for k, v in settings.items()
            if not k.startswith('_') and isinstance(v, (bool, int, float, str))
        },
    )
    hooks = settings.setdefault(
        '_hooks', [k for k, v in settings.items() if not k.startswith('_') and v is None]
    )
    given = {}
    for arg in sys.argv[1:] if argv is None else argv:
        if arg in ('--help', '-h'):
            print(
                (settings.get('__doc__') or '').strip(),
                '\n\nSettings, overridden by config files (.py, .json) and --key=value, left to right:\n',
            )
            shown = _help(settings['__file__'])
            if also:
                _help(also, but=shown)
            raise SystemExit(0)
        if arg.startswith('--'):
            name, equals, text = arg[2:].partition('=')
            _known(name, defaults, arg)
            given[name] = (
                _parse(text, defaults[name], arg) if equals else _checked(True, defaults[name], arg)
            )
        elif arg.endswith('.json'):
            overrides = read_json(arg, 'object of settings')
            for name, value in overrides.items():
                _known(name, defaults, arg)
                given[name] = _checked(value, defaults[name], f'{arg}: {name}')
        else:
            for name, value in _run(arg, defaults | given).items():
                if name in hooks and callable(value):
                    settings[name] = value
                elif name in defaults:
                    given[name] = _checked(value, defaults[name], f'{arg}: {name}')
                elif isinstance(value, (bool, int, float, str)) and not name.startswith('_'):
                    _known(name, defaults, arg)
    values = defaults | {k: v for k, v in (saved or {}).items() if k in defaults} | given
    settings.update(values)
    return values


def at_least(settings, **bounds):
    """UserError for a setting, by name, that is below its bound."""
    for name, least in bounds.items():
        if settings[name] < least:
            raise UserError(f'{name}={settings[name]} must be at least {least}')


def one_of(settings, **known):
    """UserError for a setting, by name, that is none of its known values."""
    for name, values in known.items():
        if settings[name] not in values:
            raise UserError(f'{name}={settings[name]!r} is none of {", ".join(map(str, values))}')


def read_settings(path):
    """The settings at the top of a script, {name: default}: its plain assignments before it calls configure() or defines anything."""
    return {name: ast.literal_eval(node.value) for name, node, _ in _assignments(path)}


def _assignments(path):
    """(name, assignment, comment) of each setting of a script, read from its own lines."""
    with open(path, encoding='utf-8') as f:
        source = f.read()
    lines = source.splitlines()
    for node in ast.parse(source).body:
        call = getattr(node, 'value', None)
        if isinstance(call, ast.Call) and getattr(call.func, 'id', None) == 'configure':
            return
        if isinstance(
            node, (ast.FunctionDef, ast.ClassDef)
        ):  # below them, a module that scripts share has no settings
            return
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield (
                node.targets[0].id,
                node,
                lines[node.end_lineno - 1][node.end_col_offset :].strip().lstrip('# '),
            )


def _known(name, defaults, where):
    if name not in defaults:
        near = difflib.get_close_matches(name, defaults, n=3) or list(defaults)[:3]
        raise UserError(
            f'{where}: no setting is called {name!r}; the nearest are {", ".join(near)} (a name of your own begins with _; --help lists all)'
        )


def _checked(value, default, where):
    """value as the type of default: an int serves as a float, a whole float as an int, a bool where 'auto' stands."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f'{where}: {value} is no finite number')
    if type(value) is type(default) or (isinstance(value, bool) and default == 'auto'):
        return value
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(default) is int and isinstance(value, float) and value.is_integer():
        return int(value)
    raise UserError(
        f'{where}: {value!r} is {_kind(value)}, and this setting takes {_kind(default)}'
    )


def _kind(value):
    return {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'a text'}.get(
        type(value), f'a {type(value).__name__}'
    )


def _parse(text, default, where):
    try:
        value = ast.literal_eval(text)
    except (
        Exception
    ):  # ValueError, SyntaxError, TypeError, MemoryError: it is no literal, so it is a text
        value = text
    if isinstance(default, str) and not (default == 'auto' and isinstance(value, bool)):
        value = value if isinstance(value, str) else text
    return _checked(value, default, where)


class _Assigned(dict):
    """What a config file assigns, shown to its own functions as well."""

    def __init__(self, namespace):
        self.namespace = namespace

    def __setitem__(self, name, value):
        super().__setitem__(name, value)
        self.namespace[name] = value


def _run(path, values):
    """Run a config file, which sees the settings before it; returns what it assigned."""
    try:
        with open(path, encoding='utf-8') as f:
            source = f.read()
    except OSError as e:
        known = (
            sorted(f'config/{n}' for n in os.listdir('config') if n.endswith('.py'))
            if os.path.isdir('config')
            else []
        )
        near = difflib.get_close_matches(path, known, n=1)
        raise UserError(
            f'{path}: {e.strerror}'
            + (f'; did you mean {near[0]}?' if near else '; a setting is --key=value')
        ) from None
    except UnicodeDecodeError:
        raise UserError(f'{path} is no config file: it is not text') from None
    namespace = dict(values, __name__='__config__', __file__=path)
    assigned = _Assigned(namespace)
    try:
        exec(compile(source, path, 'exec'), namespace, assigned)
    except SyntaxError as e:
        raise UserError(f'{path}, line {e.lineno}: {e.msg}') from None
    except (Exception, SystemExit) as e:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(e.__traceback__)
            if frame.filename == path
        ]
        raise UserError(
            f'{path}, line {lines[-1] if lines else "?"}: {type(e).__name__}: {e}'
        ) from None
    return assigned


def _help(path, but=()):
    """Print every setting of a script with its default and its comment; returns their names."""
    assignments = list(_assignments(path))
    for name, node, comment in assignments:
        hook = isinstance(node.value, ast.Constant) and node.value.value is None  # no setting
        if name not in but and not hook:
            print(f'  --{name}={ast.unparse(node.value)}'.ljust(40), comment)
    return [name for name, _, _ in assignments]


def one_line(kind, error, trace):
    """sys.excepthook: a user's mistake is one line and exit code 2, anything else Python's own traceback."""
    if issubclass(kind, UserError):
        print(f'error: {error}', file=sys.stderr)
    elif issubclass(kind, ModuleNotFoundError) and error.name:
        package = error.name.partition('.')[0]
        print(
            f'error: the package {package} is not installed: pip install {package}', file=sys.stderr
        )
    elif kind.__name__ == 'OutOfMemoryError' or "can't allocate memory" in str(
        error
    ):  # a GPU's, a CPU's
        print(
            'error: out of memory; take fewer rows at once (batch_size, num_samples), a shorter block_size or, to train, --gradient_checkpointing',
            file=sys.stderr,
        )
    elif issubclass(kind, OSError):  # a full disk, a file that went away
        print(f'error: {error}', file=sys.stderr)
    elif issubclass(kind, KeyboardInterrupt):
        print('interrupted', file=sys.stderr)
        raise SystemExit(130)
    else:
        return sys.__excepthook__(kind, error, trace)
    raise SystemExit(2)
