"""README's commands, read from README and run as written, with smaller models and fewer steps
appended."""

import os
import re
import shlex
import shutil
import subprocess

import pytest
from conftest import ROOT, SHARED, forked, python, write_tiny
from test_bench import NANOGPT

SMALL = (
    '--n_layer=1 --n_head=2 --n_kv_head=1 --head_dim=8 --n_embd=16 --n_inner=32 --block_size=32 '
    '--batch_size=2 --gradient_accumulation_steps=2 --max_iters=6 --eval_interval=3 --eval_iters=1 '
    '--sample_interval=3 --sample_tokens=5 --warmup_iters=1 --device=cpu'
)


def commands():
    """Every line of README's sh blocks, without its comment."""
    with open(os.path.join(ROOT, 'README.md'), encoding='utf-8') as f:
        blocks = re.findall(r'```sh\n(.*?)```', f.read(), re.S)
    return [
        line.split('  #')[0].strip()
        for block in blocks
        for line in block.splitlines()
        if line.strip() and not line.startswith('#')
    ]


def python_files():
    """(name, text) of README's Python blocks that are files: their first line is `# NAME.py`."""
    with open(os.path.join(ROOT, 'README.md'), encoding='utf-8') as f:
        return re.findall(r'```python\n# (\w+\.py)\n(.*?)```', f.read(), re.S)


def test_readme_names_the_two_commands():
    assert 'pip install -r requirements.txt && python train.py' in commands()
    assert 'pip install -r requirements-dev.txt && python -m pytest' in commands()
    with open(os.path.join(ROOT, '.ci', 'run')) as f:
        assert 'pip install -r requirements-dev.txt && python -m pytest\n' in f.read()


def test_readmes_table_has_every_corpus():
    with open(os.path.join(ROOT, 'README.md'), encoding='utf-8') as f:
        named = set(re.findall(r'`(?:python )?prepare/(\w+)\.py', f.read()))
    scripts = {n[:-3] for n in os.listdir(os.path.join(ROOT, 'prepare')) if n.endswith('.py')}
    own_examples = {'text', 'chat', 'look', 'merge'}
    assert named <= scripts
    missing = scripts - named - own_examples
    assert not missing, f"README's table of corpora lacks {missing}"


def test_readmes_map_is_true():
    with open(os.path.join(ROOT, 'README.md'), encoding='utf-8') as f:
        named = set(
            re.findall(
                r'^\s*([\w/]+\.py)\s{2,}',
                re.search(r'```\n(model\.py.*?)```', f.read(), re.S)[1],
                re.M,
            )
        )
    there = {n for n in os.listdir(ROOT) if n.endswith('.py')} | {
        n for n in os.listdir(os.path.join(ROOT, 'fledge')) if n.endswith('.py')
    }
    assert named - {n for n in named if '/' in n} == there - {'__init__.py'}


@pytest.mark.slow
def test_readmes_commands_run(tmp_path):
    if not os.path.isdir(SHARED):
        pytest.skip('the real data is not at hand')
    for name in os.listdir(ROOT):
        if name.endswith('.py'):
            shutil.copy(os.path.join(ROOT, name), tmp_path)
    for name in ('fledge', 'prepare', 'config'):
        shutil.copytree(os.path.join(ROOT, name), tmp_path / name)
    (tmp_path / 'notes').mkdir()
    (tmp_path / 'notes' / 'a.md').write_text('some words of my own. ' * 500)
    (tmp_path / 'talk.txt').write_text('more of them, and others. ' * 500)
    (tmp_path / 'notes' / 'b.txt').write_text('a second file, longer than the first one is. ' * 500)
    (tmp_path / 'notes' / 'many.jsonl').write_text(
        ''.join(f'{{"text": "note {i}"}}\n' for i in range(900))
    )
    (tmp_path / 'talks.jsonl').write_text(
        '{"instruction": "Say 1.", "output": "1"}\n{"messages": [{"role": "user", '
        '"content": "2?"}, {"role": "assistant", "content": "2"}]}\n'
    )
    pairs = (f'{i} and one\t{i} und eins\n' for i in range(300))
    (tmp_path / 'pairs.tsv').write_text(''.join(pairs))
    (tmp_path / 'prompts.txt').write_text('one\ntwo\n')
    (tmp_path / 'their_config.py').write_text("dataset = 'tiny'\nlearning_rate = 1e-3\n")
    (tmp_path / 'theirs').mkdir()
    (tmp_path / 'theirs' / 'model.py').write_text(NANOGPT)
    write_tiny(tmp_path / 'data' / 'tiny')
    for name, text in python_files():
        (tmp_path / name).write_text(text)
    ran = []
    for command in commands():
        command = command.removeprefix('pip install -r requirements.txt && ')
        feed, _, piped = command.rpartition(' | ')  # what another program gives to it
        words = shlex.split(piped)
        if words[0] in ('pip', 'git') or 'pytest' in words:
            continue
        if words[0] == 'torchrun':
            words = ['python', '-m', 'torch.distributed.run', *words[1:]]
        if 'train.py' in words:
            missing = [
                w for w in words if 'dolma' in w or 'gpt2_' in w
            ]  # corpora too large to have here
            words += SMALL.split() + (['--dataset=tiny', '--vocab_size=64'] if missing else [])
            if 'config/dpo.py' in words:  # a pair has to fit in a row
                words += ['--block_size=256', '--target_epochs=0']
            if {'config/sft.py', 'config/translate.py'} & set(words):
                words += ['--target_epochs=0']
        if 'bench.py' in words:
            words += SMALL.split() + [
                '--vocab_size=65',
                '--rounds=1',
                '--seconds=0.1',
                '--new_tokens=3',
                '--prompt_tokens=3',
                '--compile=False',
            ]
            words = [w.replace('../nanoGPT', str(tmp_path / 'theirs')) for w in words]
            words += ['--dataset=tiny'] if '--only=loss' in words else []  # all of val, each time
        if 'sample.py' in words:
            words += ['--max_new_tokens=5']
        if 'evaluate.py' in words:
            words += ['--eval_iters=5', '--device=cpu']
        if words[1].startswith('prepare/shakespeare'):
            words.append(f'--input={SHARED}/tinyshakespeare/input.txt')
        if not feed and words[0] == 'python' and words[1].endswith('.py'):
            code, out, err = forked(tmp_path, str(tmp_path / words[1]), *words[2:])
        else:
            if words[0] == 'python':
                words[0] = python()
            given = subprocess.run(feed, shell=True, capture_output=True, text=True).stdout
            done = subprocess.run(
                words, cwd=tmp_path, input=given, capture_output=True, text=True, timeout=300
            )
            code, out, err = done.returncode, done.stdout, done.stderr
        assert code == 0, f'{command}\n{out}\n{err}'
        ran.append(command)
    assert len(ran) >= 18
