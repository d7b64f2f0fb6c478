"""Config files, JSON files and flags over a script's settings."""

import glob
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, run

from fledge import UserError
from fledge.configurator import (
    BOUNDS,
    assignments,
    configure,
    given,
    missing_package,
    read_settings,
)
from fledge.corpus import pipeline
from model import GPT, GPTConfig

SCRIPTS = ['train.py', 'sample.py', 'serve.py', 'evaluate.py', 'bench.py', 'export.py']
SCRIPTS += ['draw.py', 'compare.py']
SCRIPTS += sorted(f'prepare/{os.path.basename(p)}' for p in glob.glob(f'{ROOT}/prepare/*.py'))
PLAIN = dict(steps=10, rate=0.1, name='run', on=False, mode='auto', objective='next_token')
DEFAULTS = PLAIN | dict(_private=3)


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.py').write_text(
        'import time\nsteps = 20\nrate = 1\n'
        'name = "ft-" + str(time.time() > 0)\n_half = steps // 2\n'
        'def objective(model, batch):\n    return steps\n'
    )
    (tmp_path / 'b.py').write_text('steps = steps * 2  # sees what came before it\n')
    (tmp_path / 'c.json').write_text(json.dumps({'steps': 7, 'on': True}))
    return tmp_path


def configured(*argv):
    settings = dict(DEFAULTS)
    return configure(settings, argv), settings


def test_overrides_apply_from_left_to_right(files):
    own = dict(objective='a.py')
    assert configured('a.py')[0] == PLAIN | dict(steps=20, rate=1.0, name='ft-True') | own
    assert configured('a.py', '--objective=dpo')[1]['objective'] == 'dpo'
    assert configured('a.py', 'b.py', '--rate=2')[0]['steps'] == 40
    assert configured('b.py', 'a.py')[0]['steps'] == 20
    assert configured('a.py', 'c.json', 'b.py')[0]['steps'] == 14
    assert configured('--steps=3', 'c.json')[0]['steps'] == 7
    assert configured('c.json', '--steps=3', '--on=False')[0] == PLAIN | dict(steps=3)
    values, settings = configured('a.py', '--steps=1')
    assert (
        settings['steps'] == 1
        and settings['objective'](None, None) == 20
        and settings['_private'] == 3
        and values['objective'] == 'a.py'
    )


def test_what_comes_last_is_the_objective(files):
    """What is said of it and what is done are the same."""
    (files / 'dpo.py').write_text("objective = 'dpo'\n")
    (files / 'dpo.json').write_text(json.dumps(dict(objective='dpo')))
    for last in ('dpo.py', 'dpo.json', '--objective=dpo'):
        values, settings = configured('a.py', last)
        assert values['objective'] == settings['objective'] == 'dpo', last


def test_a_constant_is_no_setting(files):
    """Such as one that a script imports."""
    settings = DEFAULTS | dict(VERSION='3.11', BATCH_BYTES=5)
    assert configure(dict(settings), []) == PLAIN
    for arg in ('--VERSION=4', '--BATCH_BYTES=6'):
        with pytest.raises(UserError, match='no setting is called'):
            configure(dict(settings), [arg])


def test_a_run_that_goes_on_keeps_its_settings(files):
    settings = dict(DEFAULTS)
    configure(settings, ['--steps=3'])
    values = configure(settings, ['--steps=3'], saved=dict(steps=8, rate=0.5, mode=False, gone=1))
    assert (
        values == PLAIN | dict(steps=3, rate=0.5, mode=False)
        and settings['rate'] == 0.5
        and 'gone' not in settings
    )
    (files / 'relative.py').write_text(
        'steps = steps * 2\nobjective = lambda model, batch: steps\n'
    )
    values = configure(settings, ['relative.py'], saved=dict(steps=20))
    assert (
        values['steps'] == 20 == settings['objective'](None, None)
    )  # twice the default, and not twice what was saved
    assert (
        configure(settings, ['--mode=auto'], saved=dict(mode=True))['mode'] == 'auto'
    )  # types are the defaults'


@pytest.mark.parametrize(
    'flag, name, value',
    [
        ('--on', 'on', True),
        ('--on=True', 'on', True),
        ('--rate=1', 'rate', 1.0),
        ('--rate=6e-4', 'rate', 6e-4),
        ('--steps=1e3', 'steps', 1000),
        ('--mode=False', 'mode', False),
        ('--name=a=b', 'name', 'a=b'),
        ('--name=7', 'name', '7'),
        ('--name=', 'name', ''),
        ('--name="x-y"', 'name', '"x-y"'),
        (r'--name=\n', 'name', r'\n'),
        ('--name=True', 'name', 'True'),
        ('--steps 3', 'steps', 3),
        ('--steps -1', 'steps', -1),
        ('--rate 1e-2', 'rate', 0.01),
        ('--name b.py', 'name', 'b.py'),
        ('--name -', 'name', '-'),
        ('--on False', 'on', False),
        ('--on c.json', 'on', True),
        ('--on --steps=3', 'on', True),
        ('--mode auto', 'mode', 'auto'),
        ('--mode False', 'mode', False),
        ('--mode', 'mode', True),
        ('--mode=True', 'mode', True),
        ('--mode=auto', 'mode', 'auto'),
        ('--steps=-1', 'steps', -1),
    ],
)
def test_values_take_the_type_of_the_default(files, flag, name, value):
    found = configured(*flag.split(' '))[0][name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    'argument, words',
    [
        ('--step=3', "no setting is called 'step'; the nearest are steps"),
        ('--obj=dpo', "no setting is called 'obj'; the nearest are objective ("),
        ('--speed=3', "no setting is called 'speed' ("),
        ('--steps=2.5', 'takes a whole number'),
        ('--steps=many', 'takes a whole number'),
        ('--rate=fast', 'takes a number'),
        ('--on=2', 'takes True or False'),
        ('--on=auto', 'takes True or False'),
        ('--rate={[]:1}', 'takes a number'),
        ('exits.py', 'exits.py, line 1: SystemExit'),
        ('--steps=True', 'takes a whole number'),
        ('--steps', '--steps takes a whole number: --steps=10'),
        ('--steps --on', '--steps takes a whole number: --steps=10'),
        ('--rate a.py', '--rate takes a number: --rate=0.1'),
        ('--name --on', '--name takes a text: --name=run'),
        ('--steps many', "--steps='many' is a text"),
        ('--on yes', 'takes True or False'),
        ('--on=', 'takes True or False'),
        ('--steps=1e999', '--steps=inf must be'),
        (f'--rate={10**400}', 'must be'),
        ('huge.json', 'huge.json: rate=nan must be'),
        ('nowhere.py', 'nowhere.py: No such file'),
        ('nowhere.json', 'nowhere.json: No such file'),
        ('steps=3', 'did you mean --steps=3'),
        ('step=3', 'did you mean --steps=3'),
        ('steps', 'did you mean --steps=VALUE'),
        ('raises', 'did you mean raises.py'),
        ('binary.txt', 'a config file ends in .py or .json'),
        ('raises.py', 'raises.py, line 2: ZeroDivisionError: division by zero'),
        ('syntax.py', 'syntax.py, line 1:'),
        ('typo.py', "no setting is called 'stepz'"),
        ('type.py', 'type.py: steps='),
        ('broken.json', 'broken.json is no valid JSON'),
        ('list.json', 'holds no object'),
        ('type.json', 'type.json: on='),
        ('typo.json', "no setting is called 'stepz'"),
        ('binary.py', 'is no config file'),
    ],
)
def test_a_mistake_is_named(tmp_path, monkeypatch, argument, words):
    monkeypatch.chdir(tmp_path)
    for name, text in {
        'exits.py': 'raise SystemExit\n',
        'raises.py': 'steps = 1\nrate = 1 / 0\n',
        'syntax.py': 'steps = = 1\n',
        'typo.py': 'stepz = 3\n',
        'type.py': 'steps = "3"\n',
        'huge.json': '{"rate": NaN}',
        'broken.json': '{"steps": ',
        'list.json': '[1]',
        'type.json': '{"on": 3}',
        'typo.json': '{"stepz": 3}',
    }.items():
        (tmp_path / name).write_text(text)
    (tmp_path / 'binary.py').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(UserError, match=words.replace('(', r'\(')):
        configured('--steps=5', *argument.split(' '))


@pytest.mark.parametrize('script', ['train.py', 'sample.py', 'prepare/text.py'])
def test_help_lists_every_setting_with_its_comment(script, tmp_path):
    out = run(tmp_path, script, '--help')
    settings = [line for line in out.splitlines() if line.startswith('  --')]
    assert len(settings) >= 8 and all(re.search(r'=\S.*\s{1,}\S', line) for line in settings), out
    if script == 'train.py':
        assert (
            '--out_dir=out ' in out
            and 'checkpoints, metrics.jsonl' in out
            and '--learning_rate=auto ' in out
        )


@pytest.mark.parametrize(
    'name, low, high',
    [
        ('dolma_75m', 70e6, 80e6),
        ('gpt2_small_50m', 50e6, 53e6),
        ('gpt2_124m', 123e6, 125e6),
        ('shakespeare_char', 9e6, 12e6),
    ],
)
def test_a_config_has_the_size_that_its_name_says(name, low, high):
    values = {}
    with open(os.path.join(ROOT, 'config', f'{name}.py'), encoding='utf-8') as f:
        exec(f.read(), values)
    known = {k: v for k, v in values.items() if k in GPTConfig.__dataclass_fields__}
    with torch.device('meta'):
        model = GPT(GPTConfig(**{'vocab_size': 65, **known}))
    assert low <= model.get_num_params(non_embedding=False) <= high


def test_a_script_takes_another_ones_settings_too(tmp_path):
    out = run(tmp_path, 'bench.py', '--help')
    assert (
        '--rounds=5 ' in out
        and '--optimizer=auto ' in out
        and 'TRAIN' not in out
        and '--objective=next_token' in out
    )


def test_advice_is_for_packages_that_are_ours():
    def missing(name):
        return missing_package(ModuleNotFoundError(f'No module named {name!r}', name=name))

    assert missing('mdoel') == ''  # a slip of who hacks the code: Python's own traceback
    assert missing('torch.utils.gone') == ''  # torch is there
    assert missing_package(ImportError('cannot import name', name='torch')) == ''
    if importlib.util.find_spec('tensorboard') is None:
        words = 'the package tensorboard is not installed: pip install tensorboard'
        assert missing('tensorboard') == words


@pytest.mark.parametrize(
    'code, status, words',
    [
        ('import mdoel', 1, "No module named 'mdoel'"),
        (
            'open("gone.txt")',
            1,
            "FileNotFoundError: [Errno 2] No such file or directory: 'gone.txt'",
        ),
        ('raise OSError(28, "No space left on device")', 2, 'error: [Errno 28] No space left'),
        ('raise UserError("what is wrong")', 2, 'error: what is wrong'),
        ('raise KeyboardInterrupt', 130, 'interrupted'),
        ('raise ConnectionResetError("it hung up")', 2, 'error: it hung up'),
    ],
)
def test_only_a_users_mistake_is_one_line(tmp_path, code, status, words):
    script = 'from fledge import UserError\nfrom fledge.configurator import configure\n'
    script += f'steps = 3\nconfigure(globals())\n{code}\n'
    done = subprocess.run(
        [sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == status and words in done.stderr
    assert ('Traceback' in done.stderr) == (status == 1)


def test_given_are_the_names_that_were_given(files):
    given.clear()
    configured('a.py', '--steps=1', 'c.json')
    assert given == {'steps', 'rate', 'name', 'objective', 'on'}


def test_a_file_that_is_no_config_is_not_run(files):
    (files / 'corpus.txt').write_text('raise SystemExit("it was run")')
    with pytest.raises(UserError, match='did you mean --input=corpus.txt'):
        configure(dict(DEFAULTS, input=''), ['corpus.txt'])


def paths_of(script):
    """Its path, and that of the script whose settings it takes too, or None."""
    path = os.path.join(ROOT, script)
    with open(path, encoding='utf-8') as f:
        source = f.read()
    if 'also=TRAIN' in source:
        return path, os.path.join(ROOT, 'train.py')
    return path, pipeline.__file__ if 'prepare(settings' in source else None


def of_script(script):
    """What configure() finds in a script of ours: its settings, and those it takes too."""
    path, also = paths_of(script)
    settings = read_settings(path) | {'__file__': path}
    configure(settings, [], also=also)
    return settings


def numbers_of(script):
    return {n: v for n, v in of_script(script).items() if type(v) in (int, float)}


@pytest.mark.slow
def test_bounds_are_those_of_the_scripts_numbers():
    # whose default is 'auto', and no number
    assert set(BOUNDS) == set().union({'learning_rate'}, *map(numbers_of, SCRIPTS))


SIGNED = ['seed', 'presence_penalty', 'frequency_penalty', 'length_penalty']


@pytest.mark.parametrize('script', SCRIPTS)
def test_every_number_is_in_its_bounds_or_refused(script):
    settings = of_script(script)
    for name, default in numbers_of(script).items():
        least, most = BOUNDS[name]
        assert 0 <= least < most <= 10**15 or name in SIGNED, name
        for value in (-1, 0, -1e-9, 10**19, 1e300, 1e999, 10**400, 'many', '', [1], True):
            is_number = type(value) in (int, float)
            if is_number and (value == default or least <= value <= most):
                assert configure(dict(settings), [f'--{name}={value}'])[name] == value
                continue
            for argv in ([f'--{name}={value}'], [f'--{name}', f'{value}']):
                with pytest.raises(UserError) as refused:
                    configure(dict(settings), argv)
                words = str(refused.value)
                assert words.startswith(f'--{name}') and '\n' not in words
                assert ' takes a ' in words or (is_number and ' must be ' in words)
        for value in (least, most, default):
            for argv in ([f'--{name}={value}'], [f'--{name}', f'{value}']):
                found = configure(dict(settings), argv)[name]
                assert found == value and type(found) is type(default)


@pytest.mark.slow
def test_a_run_at_the_ends_of_the_bounds_trains(workdir):
    names = 'seed eval_iters norm_eps rope_theta sample_repetition_penalty beta1 beta2 grad_clip'
    for end in (0, 1):
        flags = [f'--{name}={BOUNDS[name][end]}' for name in names.split()]
        flags += ['--max_iters=2', '--sample_interval=1', f'--out_dir=my {end}']
        out = run(workdir, 'train.py', *TINY, *flags)
        assert 'done at step 2' in out and 'nan' not in out, out
        assert f"Try it: python sample.py --out_dir='my {end}'\n" in out


@pytest.mark.slow
def test_what_help_shows_can_be_pasted(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '1000')
    odd = dict(a='', b="it's", c='two  words', d='\n', e='\t\'"\\é\x01', f='$HOME', g='*', h=1e-6)
    odd |= dict(i='\\n', j='a\\', k='--x', l='日本 `x`', m=-1)
    lines = [f'{name} = {value!r}  # what {name} is\n' for name, value in odd.items()]
    (tmp_path / 'odd.py').write_text(''.join(lines))
    command, expected = "printf '%s\\0'", []
    for script in (*SCRIPTS, str(tmp_path / 'odd.py')):
        defaults = of_script(script)
        plain = defaults['_defaults']
        with pytest.raises(SystemExit):
            configure(defaults, ['--help'], also=paths_of(script)[1])
        comments = {}
        for path in filter(None, reversed(paths_of(script))):
            comments |= {name: comment for name, _, comment in assignments(path)}
        shown = re.findall(r'^  (--(\w+)=.*)$', capsys.readouterr().out, re.M)
        assert {name for _, name in shown} == plain.keys()
        for line, name in shown:
            command += f' {line.removesuffix(comments[name])}'
            expected.append(f'--{name}={plain[name]}')
    done = subprocess.run(['bash', '-c', command], capture_output=True, text=True, timeout=60)
    assert done.stdout.split('\0')[:-1] == expected
    assert done.stdout.split('\0')[-1] == ''


def test_a_slip_in_the_name_of_a_module_keeps_its_traceback(tmp_path):
    script = 'from fledge.configurator import configure\nconfigure(globals())\nimport os.paht\n'
    (tmp_path / 'slip.py').write_text(f'import sys\nsys.path.insert(0, {ROOT!r})\n{script}')
    assert 'Traceback' in run(tmp_path, str(tmp_path / 'slip.py'), code=1)


@pytest.mark.parametrize(
    'text, words',
    [
        (
            'def objectiv(model, batch): pass',
            "no setting is called 'objectiv'; the nearest are obj",
        ),
        ('objective = 5', 'objective=5 is a whole number, and this setting takes a text'),
        ('N_LAYER = 4', "no setting is called 'N_LAYER'; the nearest are n_layer "),
        ('LR = 3e-4', r"no setting is called 'LR' \(a name of your own begins with _"),
        ("rope_scaling = dict(rope_type='linear')", "no setting is called 'rope_scaling'"),
        ('sizes = [1, 2]', "no setting is called 'sizes'"),
    ],
)
def test_what_a_config_file_defines_and_nobody_reads_is_a_mistake(tmp_path, text, words):
    (tmp_path / 'c.py').write_text(text)
    with pytest.raises(UserError, match=words):
        configure(dict(n_layer=3, objective='next_token'), [str(tmp_path / 'c.py')])
    fine = 'import math\nfrom dataclasses import dataclass\n_own = [1]\ndef helper(): pass\n'
    (tmp_path / 'c.py').write_text(fine + 'n_layer = math.ceil(3.5)')
    assert (
        configure(dict(n_layer=3, objective='next_token'), [str(tmp_path / 'c.py')])['n_layer'] == 4
    )


@pytest.mark.slow
def test_who_has_read_enough_of_the_help_is_told_nothing():
    command = f'{shlex.quote(sys.executable)} train.py --help | head -1'
    done = subprocess.run(['bash', '-c', command], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith('Train a GPT') and done.stderr == ''


@pytest.mark.slow
def test_help_fits_a_narrow_terminal(tmp_path):
    out = run(tmp_path, 'sample.py', '--help', env={'COLUMNS': '80'})
    settings = out[out.index('  --') :].splitlines()
    assert max(map(len, settings)) <= 80 and any(line.startswith(' ' * 41) for line in settings)
    joined = ' '.join(out.split())
    assert ' '.join(run(tmp_path, 'sample.py', '--help').split()) == joined
