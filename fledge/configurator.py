"""Config files and --key=value over a script's settings, left to right.

A script's settings are the plain assignments at its top, each with a comment; names in CAPITALS are
constants, and none. configure(globals()) below them overrides them from config files (plain
Python), .json files and --key=value flags, checks names, types and bounds, and prints them all for
--help. A mistake costs one line and exit code 2.
"""

import ast
import difflib
import errno
import importlib.util
import os
import shlex
import shutil
import sys
import textwrap
import traceback
import types
from collections.abc import Iterator
from contextlib import suppress
from typing import TextIO

from fledge import UserError, read_json

HOOKS = {'objective'}  # settings that may be a function, which a config file defines by that name
given = set()  # names of the settings that flags and config files gave
FULL_OR_BROKEN_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
OPTIONAL_PACKAGES = ['tensorboard', 'transformers']  # used where they are installed
BROUGHT_BY = dict(pyarrow='datasets')  # a package that is imported: the one that installs it
HELP_COLUMN = 41  # where --help has the comments
# The least and the most of every numeric setting, in all scripts. A script's own default holds even
# outside, where it stands for something else: evaluate.py's block_size=0 is that of the run.
BOUNDS = {}
for least, most, names in (
    (0, 2**63 - 1, 'seed'),
    (0, 10**9, 'max_iters warmup_iters lr_decay_iters sample_interval early_stopping_patience'),
    (0, 10**9, 'eval_iters top_k min_length lora_rank stride'),
    (1, 10**9, 'eval_interval log_interval document documents max_tokens cap'),
    (1, 10**6, 'keep_checkpoints max_bad_steps'),
    (1, 10**4, 'seeds'),
    (2, 10**9, 'examples'),
    (0, 10**15, 'target_tokens'),
    (1, 10**15, 'train_bytes'),
    (0, 10**6, 'sample_tokens target_epochs max_minutes seconds grad_clip n_inner'),
    (0, 10**6, 'max_wait'),
    (0.001, 10**6, 'body_timeout'),
    (1, 10**6, 'ddp_timeout'),
    (1, 10**6, 'gradient_accumulation_steps rounds max_new_tokens'),
    (1, 10**6, 'min_letters max_letters'),
    (1, 10**5, 'batch_size num_samples streams max_batch'),
    (0, 10**5, 'max_waiting'),
    (0, 65_535, 'port'),
    (1, 2**20, 'block_size vocab_size prompt_tokens long_prompt'),
    (2, 2**20, 'new_tokens'),
    (1, 1000, 'n_layer n_head'),
    (0, 1000, 'n_kv_head num_proc n_encoder_layer'),
    (1, 1000, 'num_beams'),
    (-100, 100, 'length_penalty'),
    (0, 10**4, 'head_dim'),
    (1, 10**5, 'n_embd'),
    (1, 10**12, 'rope_theta'),
    (1e-12, 0.1, 'norm_eps'),
    (0, 0.99, 'dropout lora_dropout'),
    (1e-6, 1e6, 'lora_alpha'),
    (0, 10**5, 'world_size'),
    (0, 10**6, 'price_per_hour'),
    (1e-6, 100, 'dpo_beta'),
    (0, 0.999999, 'beta1 beta2'),
    (0, 10, 'learning_rate min_lr weight_decay'),
    (0, 100, 'temperature'),
    (1e-6, 1, 'top_p'),
    (0, 1, 'min_p'),
    (0.01, 100, 'repetition_penalty sample_repetition_penalty'),
    (-100, 100, 'presence_penalty frequency_penalty'),
    (1e-9, 0.999, 'val_fraction'),
    (2, 2**31 - 1, 'shard_tokens'),
    (0, 99_999, 'shard'),
    (1, 99_999, 'num_shards'),
    (0, 20, 'retries'),
    (2, 103, 'version'),
):
    BOUNDS |= dict.fromkeys(names.split(), (least, most))
KINDS = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'a text'}


def configure(
    settings: dict,
    argv: list[str] | None = None,
    saved: dict | None = None,
    also: str | None = None,
    others: list[str] | None = None,
) -> dict:
    """Override `settings`, a script's globals(), by argv (default: sys.argv[1:]).

    Returns all settings. saved: settings of a run that goes on; they replace the
    defaults, and argv overrides them. also: another script, whose settings this one takes too.
    others: a list that takes the arguments which are neither flags nor config files; None: they are
    mistakes. Of HOOKS a config file may define the function itself: `settings` then has that, and
    what is returned the path of the file.
    """
    sys.excepthook = one_line
    with suppress(AttributeError):  # of a notebook's output, which takes any character
        sys.stdout.reconfigure(errors='backslashreplace')  # a terminal that is not UTF-8
    if also:
        for name, value in read_settings(also).items():
            settings.setdefault(name, value)
    plain = {}
    for name, value in settings.items():
        if may_be_set(name) and isinstance(value, tuple(KINDS)):
            plain[name] = value
    # kept for a second call, which finds the settings overridden already
    defaults = settings.setdefault('_defaults', plain)
    values, functions = {}, {}  # that argv gives
    hooks = HOOKS & defaults.keys()
    arguments = list(sys.argv[1:] if argv is None else argv)
    while arguments:
        arg = arguments.pop(0)
        new, where = {}, f'{arg}: '
        if arg in ('--help', '-h'):
            print_help(settings, also)
            raise SystemExit(0)
        if arg.startswith('--'):
            name, equals, text = arg[2:].partition('=')
            check_name(name, defaults, arg)
            if not equals:
                text = text_behind(name, defaults[name], arguments, others)
            new, where = {name: parse(name, text, defaults[name])}, '--'
        elif arg.endswith('.json'):
            new = read_json(arg, 'object of settings')
        elif arg.endswith('.py'):
            new = run_config(arg, defaults | values)
        elif others is None:
            refuse(arg, defaults)
        else:
            others.append(arg)
        for name, value in new.items():
            if name not in defaults and is_own(name, value, hooks):
                continue
            check_name(name, defaults, arg)
            functions.pop(name, None)
            if name in hooks and callable(value):
                values[name], functions[name] = arg, value
            else:
                values[name] = check(name, value, defaults[name], where)
    given.update(values)
    saved = {name: value for name, value in (saved or {}).items() if name in defaults}
    values = defaults | saved | values
    settings.update(values | functions)
    return values


def may_be_set(name: str) -> bool:
    """Whether a setting may be called so: _name is private, and NAME a constant of any module."""
    return not name.startswith('_') and not name.isupper()


def is_own(name: str, value: object, hooks: set[str]) -> bool:
    """Whether a config file has a name for itself: _name, or a module, a class, a function.

    But a function whose name is almost that of a hook is meant to be the hook.
    """
    if name.startswith('_') or isinstance(value, (type, types.ModuleType)):
        return True
    return callable(value) and not difflib.get_close_matches(name, hooks)


def one_of(settings: dict, **known: tuple) -> None:
    """UserError for a setting, by name, that is none of its known values."""
    for name, values in known.items():
        if settings[name] not in values:
            raise UserError(f'{name}={settings[name]!r} is none of {", ".join(map(str, values))}')


def read_settings(path: str) -> dict:
    """The settings at the top of a script: {name: default}."""
    return {name: default for name, default, _ in assignments(path)}


def assignments(path: str) -> Iterator[tuple[str, object, str]]:
    """(name, default, comment) of each setting of a script, read from its own lines.

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
        is_named = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        if is_named and may_be_set(node.targets[0].id):
            comment = lines[node.end_lineno - 1][node.end_col_offset :].strip().lstrip('# ')
            with suppress(ValueError):  # what is no literal is no setting
                yield node.targets[0].id, ast.literal_eval(node.value), comment


def refuse(arg: str, defaults: dict) -> None:
    """UserError for an argument that is neither flag nor config file: it says what was meant."""
    name, equals, value = arg.partition('=')
    near = difflib.get_close_matches(name, defaults, n=1)
    if os.path.exists(f'{arg}.py'):
        meant = shlex.quote(f'{arg}.py')
    elif near:
        meant = f'--{near[0]}={shlex.quote(value)}' if equals else f'--{near[0]}=VALUE'
    elif 'input' in defaults and os.path.exists(arg):
        meant = f'--input={shlex.quote(arg)}'
    else:
        raise UserError(f'{arg}: a setting is --key=value, a config file ends in .py or .json')
    raise UserError(f'{arg} is no config file (.py, .json); did you mean {meant}?')


def check_name(name: str, defaults: dict, where: str) -> None:
    """UserError for a name that is no setting's; where: it stands, in words."""
    if name not in defaults:
        near = difflib.get_close_matches(name.lower(), defaults, n=3)
        near = near or [known for known in defaults if name.lower() in known]
        nearest = f'; the nearest are {", ".join(near[:3])}' if near else ''
        raise UserError(
            f'{where}: no setting is called {name!r}{nearest} '
            '(a name of your own begins with _; --help lists all)'
        )


def takes_bool(name: str, default: object) -> bool:
    """Whether a setting may be True or False; of a name in BOUNDS 'auto' stands for a number."""
    return isinstance(default, bool) or (default == 'auto' and name not in BOUNDS)


def text_behind(name: str, default: object, arguments: list[str], others: list[str] | None) -> str:
    """The text of a flag without =: the next of the arguments, or True where it may stand alone."""
    is_text = isinstance(default, str) and not takes_bool(name, default)
    following = arguments[0] if arguments else '--'
    is_config = following.endswith(('.py', '.json')) and not is_text
    is_value = not following.startswith('--') and not is_config
    if takes_bool(name, default):
        if not is_value or (others is not None and following not in ('True', 'False', 'auto')):
            return 'True'
    elif not is_value:
        raise UserError(f'--{name} takes {KINDS[type(default)]}: --{name}={in_shell(default)}')
    return arguments.pop(0)


def parse(name: str, text: str, default: object) -> object:
    """The value that a flag's text spells, for a setting with this default."""
    is_number = default == 'auto' and name in BOUNDS
    is_bool = takes_bool(name, default) and text in ('True', 'False')
    if isinstance(default, str) and not is_number and not is_bool:
        return text
    try:
        return ast.literal_eval(text)
    except Exception:  # it is no literal, so it is a text
        return text


def check(name: str, value: object, default: object, where: str) -> object:
    """value as the type of default; UserError where it has another type, or is out of BOUNDS.

    An int serves as a float, a whole float as an int. Where 'auto' stands a bool does, or a number
    for a name in BOUNDS.
    """
    where = f'{where}{name}={value!r:.100}'
    if default == 'auto' and name in BOUNDS and value != 'auto':
        default = -1.0  # no number's default
    if type(value) in (int, float) and type(default) in (int, float) and value != default:
        least, most = BOUNDS.get(name, (-1e300, 1e300))
        if not least <= value <= most:  # which NaN is not either
            raise UserError(f'{where} must be {least:,} to {most:,}')
    if type(value) is type(default) or (isinstance(value, bool) and default == 'auto'):
        return value
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(default) is int and isinstance(value, float) and value.is_integer():
        return int(value)
    kind = KINDS.get(type(value), f'a {type(value).__name__}')
    raise UserError(f'{where} is {kind}, and this setting takes {KINDS[type(default)]}')


def in_shell(value: object) -> str:
    """A value as it is typed in a shell; control characters as bash, zsh and ksh take them."""
    text = str(value)
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + repr('"' + text)[2:]  # a text with a " in it is written between two '


class Assigned(dict):
    """What a config file assigns, which its own functions see as well."""

    def __init__(self, namespace: dict):
        super().__init__()
        self.namespace = namespace

    def __setitem__(self, name, value):
        super().__setitem__(name, value)
        self.namespace[name] = value


def run_config(path: str, values: dict) -> dict:
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


def print_help(settings: dict, also: str | None) -> None:
    """Print a script's docstring, and every setting with its default and its comment."""
    print((settings.get('__doc__') or '').strip())
    print('\n\nSettings, overridden by config files (.py, .json) and --key=value, left to right:\n')
    shown = set()
    for path in filter(None, (settings['__file__'], also)):
        for name, default, comment in assignments(path):
            if name not in shown and isinstance(default, tuple(KINDS)):
                print_setting(f'--{name}={in_shell(default)}', comment)
            shown.add(name)


def print_setting(flag: str, comment: str) -> None:
    """Print a flag and, beside it, its comment, which goes on below itself on a narrow terminal."""
    columns = shutil.get_terminal_size(fallback=(1000, 0)).columns
    width = max(20, columns - HELP_COLUMN)
    first, *more = textwrap.wrap(comment, width) or ['']
    print(f'  {flag}'.ljust(HELP_COLUMN - 1), first)
    for line in more:
        print(' ' * HELP_COLUMN + line)


def one_line(kind: type, error: BaseException, trace: types.TracebackType | None) -> None:
    """sys.excepthook: a user's mistake is one line and exit code 2.

    A mistake in code that someone is hacking keeps Python's own traceback.
    """
    if isinstance(error, KeyboardInterrupt):
        print('interrupted', file=sys.stderr)
        raise SystemExit(130)
    if isinstance(error, BrokenPipeError):  # who read what is printed has read enough: | head
        discard(sys.stdout)
        raise SystemExit(141)  # as of a program that SIGPIPE ends
    if isinstance(error, UserError):
        words = str(error)
    elif missing_package(error):
        words = missing_package(error)
    elif (
        isinstance(error, MemoryError)
        or kind.__name__ == 'OutOfMemoryError'
        or "can't allocate memory" in str(error)
    ):
        words = 'out of memory; take fewer rows at once (batch_size, num_samples), '
        words += 'a shorter block_size or, to train, --gradient_checkpointing'
    elif isinstance(error, (ConnectionError, TimeoutError)) or (
        isinstance(error, OSError) and error.errno in FULL_OR_BROKEN_DISK
    ):  # a lost network, a disk
        words = str(error)
    else:
        return sys.__excepthook__(kind, error, trace)
    print(f'error: {words}', file=sys.stderr)
    if 'RANK' in os.environ:  # threads of torch.distributed would abort a process that exits
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)
    raise SystemExit(2)


def discard(file: TextIO) -> None:
    """Let what is written to a file from here on go nowhere, for nobody reads it any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def missing_package(error: BaseException) -> str:
    """Which package an import wants, and the command that installs it; '' for other errors."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return ''
    package = error.name.partition('.')[0]
    package = BROUGHT_BY.get(package, package)
    if importlib.util.find_spec(package) is not None:
        return ''
    words = f'the package {package} is not installed: pip install '
    if package in OPTIONAL_PACKAGES:
        return words + package
    folder = os.path.dirname(os.path.dirname(__file__))
    for name in sorted(os.listdir(folder)):
        if not name.startswith('requirements') or name == 'requirements-dev.txt':
            continue
        with open(os.path.join(folder, name), encoding='utf-8') as f:
            if package in [line.partition('==')[0].strip() for line in f]:
                return f'{words}-r {name}'
    return ''
