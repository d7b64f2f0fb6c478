"""requirements.txt alone is enough for most; what more is needed is named in a line."""

import importlib.metadata
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, write_tiny
from packaging.requirements import Requirement


def installed_by(path):
    """The names of all distributions that `pip install -r path` brings, as far as they are here."""
    with open(os.path.join(ROOT, path)) as f:
        wanted = [Requirement(line.strip()) for line in f]
    names, seen = [], set()
    while wanted:
        requirement = wanted.pop()
        extras = requirement.extras or {''}
        if (requirement.name, *extras) in seen:
            continue
        seen.add((requirement.name, *extras))
        try:
            distribution = importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:  # for another system
            continue
        names.append(requirement.name)
        for line in distribution.requires or []:
            needed = Requirement(line)
            marker = needed.marker
            if marker is None or any(marker.evaluate({'extra': extra}) for extra in extras):
                wanted.append(needed)
    return names


@pytest.fixture(scope='session')
def small_environment(tmp_path_factory):
    """A folder of links to the packages that requirements.txt brings, and to nothing else."""
    folder = tmp_path_factory.mktemp('packages')
    for name in installed_by('requirements.txt'):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or []} - {'..', '__pycache__'}:
            link = folder / top
            if not link.exists():
                link.symlink_to(distribution.locate_file(top))
    return folder


@pytest.fixture
def run_small(tmp_path, small_environment):
    """Run a script of ours in tmp_path where those packages alone are installed."""
    write_tiny(tmp_path / 'data' / 'tiny')

    def run(script, *args):
        return subprocess.run(
            [sys.executable, '-S', os.path.join(ROOT, script), *args],
            cwd=tmp_path,
            env=os.environ | {'PYTHONPATH': str(small_environment)},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.mark.slow
def test_requirements_txt_is_enough_to_prepare_train_sample_evaluate_and_export(
    tmp_path, run_small
):
    (tmp_path / 'notes.txt').write_text('some words of my own. ' * 500)
    prepared = ['--input=notes.txt', '--name=notes', '--tokenizer=train', '--vocab_size=280']
    trained = [*TINY, '--dataset=notes', '--max_iters=3']
    for script, *args in [
        ('prepare/text.py', *prepared),
        ('prepare/look.py', 'data/notes'),
        ('train.py', *trained),
        ('sample.py', '--max_new_tokens=3'),
        ('evaluate.py', '--device=cpu', '--split=val'),
        ('export.py',),
        ('draw.py', '--positions=positions.png'),
    ]:
        done = run_small(script, *args)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    'package, file, script, args',
    [
        ('datasets', 'hub', 'prepare/tinystories.py', ['--tokenizer=bytes']),
        (
            'datasets',
            'hub',
            'prepare/text.py',
            ['--input=a.parquet', '--name=a', '--tokenizer=bytes'],
        ),
        ('wandb', 'wandb', 'train.py', [*TINY, '--max_iters=1', '--wandb_log']),
        ('uvicorn', 'serve', 'serve.py', []),
    ],
)
def test_a_package_that_is_not_installed_is_a_line(
    tmp_path, run_small, package, file, script, args
):
    (tmp_path / 'a.parquet').write_bytes(b'PAR1')
    done = run_small(script, *args)
    command = f'pip install -r requirements-{file}.txt'
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f'error: the package {package} is not installed: {command}'
    )
    assert os.path.exists(os.path.join(ROOT, f'requirements-{file}.txt'))


@pytest.mark.slow
def test_an_export_that_lacks_its_package_leaves_nothing(tmp_path, run_small):
    run_small('train.py', *TINY, '--max_iters=1')
    before = set(os.listdir(tmp_path / 'out'))
    for format in ('gguf', 'onnx'):
        done = run_small('export.py', f'--format={format}')
        assert done.returncode == 2
        assert 'is not installed: pip install -r requirements-export.txt' in done.stderr
    assert set(os.listdir(tmp_path / 'out')) == before


def test_every_requirement_is_pinned_and_installed_for_the_tests():
    wanted = {name for name in os.listdir(ROOT) if re.fullmatch(r'requirements.*\.txt', name)}
    with open(os.path.join(ROOT, 'requirements-dev.txt')) as f:
        dev = f.read()
    for name in wanted - {'requirements-dev.txt'}:
        assert f'-r {name}\n' in dev, f'requirements-dev.txt does not take {name} in'
    for name in wanted:
        with open(os.path.join(ROOT, name)) as f:
            for line in filter(str.strip, f):
                assert re.fullmatch(r'-r requirements.*\.txt|\w[\w.-]*==[\w.]+', line.strip()), line
