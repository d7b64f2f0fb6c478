"""Config files and --key=value over a script's settings, left to right.

A script's settings are the plain assignments at its top, each with a comment. configure(globals())
below them overrides them from config files (plain Python), .json files and --key=value flags,
checks names and types, and prints them all for --help. A mistake costs one line and exit code 2.
"""

import ast
import difflib
import errno
import importlib.util
import math
import os
import sys
import traceback

from fledge import UserError, read_json

given = set()  # names of the settings that flags and config files gave
FULL_OR_BROKEN_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
OPTIONAL_PACKAGES = ['tensorboard', 'transformers']  # used where they are installed


def configure(settings, argv=None, saved=None, also=None):
    """Override `settings`, a script's globals(), by argv (default: sys.argv[1:]).

    Returns all settings as a dict. saved: settings of a run that goes on; they replace the
    defaults, and argv overrides them. also: another script, whose settings this one takes too.
    A name set to None is a hook: a config file may define a function of that name.
    """
    sys.excepthook = one_line
    if also:
        for name, value in read_settings(also).items():
            settings.setdefault(name, value)
    public = {name: value for name, value in settings.items() if not name.startswith('_')}
    plain = {name: v for name, v in public.items() if isinstance(v, (bool, int, float, str))}
    # kept for a second call, which finds the settings overridden already
    defaults = settings.setdefault('_defaults', plain)
    hooks = settings.setdefault('_hooks', [name for name, v in public.items() if v is None])
    values = {}  # that argv gives
    for arg in sys.argv[1:] if argv is None else argv:
        if arg in ('--help', '-h'):
            print_help(settings, also)
            raise SystemExit(0)
        if arg.startswith('--'):
            name, equals, text = arg[2:].partition('=')
            check_name(name, defaults, arg)
            value = parse(text, defaults[name]) if equals else True
            values[name] = check_type(value, defaults[name], arg)
        elif arg.endswith('.json'):
            for name, value in read_json(arg, 'object of settings').items():
                check_name(name, defaults, arg)
                values[name] = check_type(value, defaults[name], f'{arg}: {name}')
        elif arg.endswith('.py'):
            for name, value in run_config(arg, defaults | values).items():
                if name in hooks and callable(value):
                    settings[name] = value
                elif name in defaults:
                    values[name] = check_type(value, defaults[name], f'{arg}: {name}')
                elif isinstance(value, (bool, int, float, str)) and not name.startswith('_'):
                    check_name(name, defaults, arg)
        else:
            refuse(arg, defaults)
    given.update(values)
    saved = {name: value for name, value in (saved or {}).items() if name in defaults}
    values = defaults | saved | values
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
    """The settings at the top of a script: {name: default}."""
    return {name: ast.literal_eval(node.value) for name, node, _ in assignments(path)}


def assignments(path):
    """(name, assignment, comment) of each setting of a script, read from its own lines.

    They end where it calls configure() or defines something: below that, a module that scripts
    share has no settings.
    """
    with open(path, encoding='utf-8') as f:
        source = f.read()
    lines = source.splitlines()
    for node in ast.parse(source).body:
        call = getattr(node, 'value', None)
        is_configure = isinstance(call, ast.Call) and getattr(call.func, 'id', '') == 'configure'
        if is_configure or isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            return
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            comment = lines[node.end_lineno - 1][node.end_col_offset :].strip().lstrip('# ')
            yield node.targets[0].id, node, comment


def refuse(arg, defaults):
    """UserError for an argument that is neither flag nor config file: it says what was meant."""
    name, equals, _ = arg.partition('=')
    near = difflib.get_close_matches(name, defaults, n=1)
    if os.path.exists(f'{arg}.py'):
        meant = f'{arg}.py'
    elif near:
        meant = f'--{near[0]}{arg[len(name) :]}' if equals else f'--{near[0]}=VALUE'
    elif 'input' in defaults and os.path.exists(arg):
        meant = f'--input={arg}'
    else:
        raise UserError(f'{arg}: a setting is --key=value, a config file ends in .py or .json')
    raise UserError(f'{arg} is no config file (.py, .json); did you mean {meant}?')


def check_name(name, defaults, where):
    if name not in defaults:
        near = difflib.get_close_matches(name, defaults, n=3) or list(defaults)[:3]
        raise UserError(
            f'{where}: no setting is called {name!r}; the nearest are {", ".join(near)} '
            '(a name of your own begins with _; --help lists all)'
        )


def check_type(value, default, where):
    """value as the type of default; UserError where it has another.

    An int serves as a float, a whole float as an int, and a bool where 'auto' stands.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f'{where}: {value} is no finite number')
    if type(value) is type(default) or (isinstance(value, bool) and default == 'auto'):
        return value
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(default) is int and isinstance(value, float) and value.is_integer():
        return int(value)
    kinds = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'a text'}
    kind = kinds.get(type(value), f'a {type(value).__name__}')
    raise UserError(f'{where}: {value!r} is {kind}, and this setting takes {kinds[type(default)]}')


def parse(text, default):
    """The value that a flag's text spells, for a setting with this default."""
    try:
        value = ast.literal_eval(text)
    except Exception:  # it is no literal, so it is a text
        value = text
    wants_text = isinstance(default, str) and not (default == 'auto' and isinstance(value, bool))
    return text if wants_text and not isinstance(value, str) else value


class Assigned(dict):
    """What a config file assigns, which its own functions see as well."""

    def __init__(self, namespace):
        super().__init__()
        self.namespace = namespace

    def __setitem__(self, name, value):
        super().__setitem__(name, value)
        self.namespace[name] = value


def run_config(path, values):
    """Run a config file, which sees the settings before it; returns what it assigned."""
    try:
        with open(path, encoding='utf-8') as f:
            source = f.read()
    except OSError as e:
        known = os.listdir('config') if os.path.isdir('config') else []
        near = difflib.get_close_matches(path, [f'config/{name}' for name in known], n=1)
        meant = f'; did you mean {near[0]}?' if near else ''
        raise UserError(f'{path}: {e.strerror}{meant}') from None
    except UnicodeDecodeError:
        raise UserError(f'{path} is no config file: it is not text') from None
    namespace = dict(values, __name__='__config__', __file__=path)
    assigned = Assigned(namespace)
    try:
        exec(compile(source, path, 'exec'), namespace, assigned)
    except SyntaxError as e:
        raise UserError(f'{path}, line {e.lineno or "?"}: {e.msg}') from None
    except (Exception, SystemExit) as e:
        frames = traceback.extract_tb(e.__traceback__)
        lines = [f', line {frame.lineno}' for frame in frames if frame.filename == path]
        raise UserError(f'{path}{"".join(lines[-1:])}: {type(e).__name__}: {e}') from None
    return assigned


def print_help(settings, also):
    """Print a script's docstring, and every setting with its default and its comment."""
    print((settings.get('__doc__') or '').strip())
    print('\n\nSettings, overridden by config files (.py, .json) and --key=value, left to right:\n')
    shown = set()
    for path in filter(None, (settings['__file__'], also)):
        for name, node, comment in assignments(path):
            is_hook = isinstance(node.value, ast.Constant) and node.value.value is None
            if name not in shown and not is_hook:
                print(f'  --{name}={ast.unparse(node.value)}'.ljust(40), comment)
            shown.add(name)


def one_line(kind, error, trace):
    """sys.excepthook: a user's mistake is one line and exit code 2.

    A mistake in code that someone is hacking keeps Python's own traceback.
    """
    missing = missing_package(error)
    if isinstance(error, KeyboardInterrupt):
        print('interrupted', file=sys.stderr)
        raise SystemExit(130)
    if isinstance(error, UserError):
        words = str(error)
    elif missing:
        words = f'the package {missing} is not installed: pip install {missing}'
    elif kind.__name__ == 'OutOfMemoryError' or "can't allocate memory" in str(error):
        words = 'out of memory; take fewer rows at once (batch_size, num_samples), '
        words += 'a shorter block_size or, to train, --gradient_checkpointing'
    elif isinstance(error, (ConnectionError, TimeoutError)) or (
        isinstance(error, OSError) and error.errno in FULL_OR_BROKEN_DISK
    ):  # a closed pipe, a lost network, a disk
        words = str(error)
    else:
        return sys.__excepthook__(kind, error, trace)
    print(f'error: {words}', file=sys.stderr)
    raise SystemExit(2)


def missing_package(error):
    """The package that an import wants and that requirements.txt would install, or None."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    package = error.name.partition('.')[0]
    path = os.path.join(os.path.dirname(os.path.dirname(__file__)), 'requirements.txt')
    known = list(OPTIONAL_PACKAGES)
    if os.path.exists(path):
        with open(path, encoding='utf-8') as f:
            known += [line.partition('==')[0].strip() for line in f]
    is_known = package in known and importlib.util.find_spec(package) is None
    return package if is_known else None
