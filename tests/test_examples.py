"""The examples for clusters: their syntax, and that what they ask for is there."""

import os
import re
import shlex
import shutil
import subprocess

import pytest
from conftest import ROOT, TINY, python
from torch.distributed.run import get_args_parser

from fledge.configurator import configure, read_settings

SLURM = os.path.join(ROOT, 'examples', 'slurm.sh')
KUBERNETES = os.path.join(ROOT, 'examples', 'kubernetes.yaml')


def objects():
    """The objects that kubectl would make, by kind."""
    yaml = pytest.importorskip('yaml')
    with open(KUBERNETES, encoding='utf-8') as f:
        return {each['kind']: each for each in yaml.safe_load_all(f)}


def slurm_command():
    with open(SLURM, encoding='utf-8') as f:
        return f.read().replace('\\\n', ' ')


def kubernetes_command():
    (container,) = objects()['Job']['spec']['template']['spec']['containers']
    shell, flag, command = container['command']
    assert (shell, flag) == ('bash', '-c')
    return command


def test_bash_reads_the_examples():
    if not shutil.which('bash'):
        pytest.skip('bash is not at hand')
    for command in (slurm_command(), kubernetes_command()):
        subprocess.run(['bash', '-n'], input=command, text=True, check=True)


@pytest.mark.parametrize('command', [slurm_command, kubernetes_command])
def test_torchrun_and_train_know_the_flags(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(re.search(r'\btorchrun +--[^&\n]*', command())[0])[1:]
    words = [re.sub(r'^(--\w+)=\$\w+$', r'\1=2', word) for word in words]  # $SLURM_NNODES
    script = words.index('train.py')
    parsed = get_args_parser().parse_args(words)  # ends the process where it does not know a flag
    assert parsed.training_script_args == words[script + 1 :]
    assert (parsed.nnodes, parsed.rdzv_backend) == ('2', 'c10d') and parsed.max_restarts > 0
    settings = read_settings('train.py') | {'__file__': 'train.py'}
    config = configure(settings, parsed.training_script_args)  # UserError for an unknown one
    assert config['auto_resume'] is True
    n_processes = 16
    assert config['gradient_accumulation_steps'] * config['batch_size'] % n_processes == 0


def test_slurms_options_come_before_the_first_command():
    with open(SLURM, encoding='utf-8') as f:
        lines = [line for line in f.read().splitlines() if line.strip()]
    is_command = [not line.startswith('#') for line in lines]
    options = [i for i, line in enumerate(lines) if line.startswith('#SBATCH ')]
    assert lines[0] == '#!/bin/bash' and max(options) < is_command.index(True)
    # sbatch reads no comment behind an option
    assert all(re.fullmatch(r'#SBATCH --[\w-]+(=\S+)?', lines[i]) for i in options)
    assert '#SBATCH --requeue' in lines and '#SBATCH --signal=TERM@120' in lines


def test_kubernetes_knows_every_field():
    validator = pytest.importorskip('kubernetes_validate')
    for each in objects().values():
        validator.validate(each, '1.37.0', strict=True)
        validator.validate(each, '1.29.0', strict=True)


def test_kubernetes_objects_name_each_other():
    claim, service, job = (objects()[kind] for kind in ('PersistentVolumeClaim', 'Service', 'Job'))
    pod = job['spec']['template']['spec']
    name = job['metadata']['name']
    assert service['spec']['selector'] == {'job-name': name}  # the label that a Job gives its pods
    assert pod['subdomain'] == service['metadata']['name']
    assert f'--rdzv_endpoint={name}-0.{pod["subdomain"]}:' in kubernetes_command()
    assert job['spec']['completions'] == job['spec']['parallelism'] == 2
    claims = [volume.get('persistentVolumeClaim') for volume in pod['volumes']]
    assert {'claimName': claim['metadata']['name']} in claims
    (container,) = pod['containers']
    mounted = {mount['name'] for mount in container['volumeMounts']}
    assert mounted == {volume['name'] for volume in pod['volumes']}


@pytest.mark.slow
def test_kubernetes_command_trains_and_knows_that_the_run_is_over(workdir):
    out_dir = re.search(r'--out_dir=(\S+)', kubernetes_command())[1]
    here = kubernetes_command().replace('--nnodes=2 --nproc_per_node=8', '--nnodes=1')
    here = here.replace('fledge-0.fledge:29500', 'localhost:0')
    here = here.replace('torchrun', shlex.join([python(), '-m', 'torch.distributed.run']))
    train, tiny = os.path.join(ROOT, 'train.py'), [*TINY, '--max_iters=2']
    (workdir / out_dir).mkdir(parents=True)
    (workdir / out_dir / 'train.log').write_text('stopped at step 1 after 0.1 minutes')
    for more, is_over in (['--eval_only'], False), ([], True):
        command = here.replace('train.py config/gpt2_124m.py', shlex.join([train, *tiny, *more]))
        done = subprocess.run(['bash', '-c', command], cwd=workdir, capture_output=True, text=True)
        assert (done.returncode == 0) == is_over, done.stderr
