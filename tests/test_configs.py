"""Every config file trains on the data that the command which its error names prepares."""

import gzip
import json
import os
import random
import re

import pytest
from conftest import ROOT, fails, metrics, run, shared
from hub import Hub, parquet_bytes

# tested below, by README's own commands, in test_sequence_to_sequence.py and test_depth.py
ELSEWHERE = ['sft.py', 'dpo.py', 'sentiment.py', 'qlora_distilgpt2.py']
ELSEWHERE += ['copy_task.py', 'translate.py', 'depth.py']
CONFIGS = {name for name in os.listdir(os.path.join(ROOT, 'config')) if name.endswith('.py')}
CONFIGS = sorted(CONFIGS - set(ELSEWHERE))
# a small model and a single step; tokenizer and vocabulary are the config's own
STEP = [
    '--n_layer=1',
    '--n_head=2',
    '--n_kv_head=2',
    '--head_dim=16',
    '--n_embd=32',
    '--n_inner=64',
]
STEP += ['--block_size=32', '--batch_size=2', '--gradient_accumulation_steps=1', '--max_iters=1']
STEP += ['--warmup_iters=0', '--eval_iters=1', '--eval_interval=1', '--log_interval=1']
STEP += ['--sample_interval=0', '--device=cpu', '--compile=False']


def texts(n):
    """n texts of made-up words, 300 letters each."""
    rng = random.Random(n)
    words = [''.join(rng.choices('abcdefghij', k=rng.randint(2, 9))) for _ in range(3000)]
    return [' '.join(rng.choices(words, k=50)) for _ in range(n)]


@pytest.fixture(scope='module')
def hub():
    """The corpora that configs want, in their repositories' layouts, small."""
    rows = [dict(text=text) for text in texts(300)]
    lines = ''.join(json.dumps(row) + '\n' for row in rows).encode()
    card = '---\nconfigs:\n- config_name: sample-10BT\n  data_files: sample/10BT/*\n---\n'
    with Hub() as hub:
        hub.files['sample.json.gz'] = gzip.compress(lines)
        hub.add('allenai/dolma', {'urls/v1_6-sample.txt': hub.url('sample.json.gz')})
        hub.add(
            'HuggingFaceFW/fineweb-edu',
            {'README.md': card, 'sample/10BT/000_00000.parquet': parquet_bytes(rows)},
        )
        talks = [dict(instruction=f'Say {i}.', input='', output=f'{i}, then.') for i in range(200)]
        hub.add('yahma/alpaca-cleaned', {'alpaca_data_cleaned.json': json.dumps(talks)})
        openwebtext = {'data/train-00000-of-00001.parquet': parquet_bytes(rows)}
        hub.add('Skylion007/openwebtext', openwebtext, revision='refs/pr/18')
        hub.add('Skylion007/openwebtext', {'openwebtext.py': '# a loading script'})
        yield hub


@pytest.fixture(scope='module')
def prepared(hub, tmp_path_factory):
    """A folder with what the commands named so far have prepared, and those commands."""
    return tmp_path_factory.mktemp('configs'), set()


@pytest.mark.slow
@pytest.mark.parametrize('name', CONFIGS)
def test_a_config_trains_on_what_its_error_names(hub, prepared, name):
    folder, commands = prepared
    config = os.path.join(ROOT, 'config', name)
    with open(config) as f:
        dataset = re.search(r"^dataset = '(\w+)'", f.read(), re.M)[1]
    if not (folder / 'data' / dataset).exists():
        err = fails(folder, 'train.py', config, *STEP)
        script, *flags = re.search(r'make it with: python (.*)\n', err)[1].split()
        if script == 'prepare/shakespeare_char.py':  # it fetches from elsewhere than the hub
            (folder / 'input.txt').write_text('\n'.join(texts(30)))
            flags.append('--input=input.txt')
        elif script != 'prepare/dolma.py':  # the others are GPT-2's tokens
            shared('tiktoken')
        run(folder, script, *flags, '--num_proc=1', '--retries=0', env=hub.env)
        commands.add(script)
    assert f'prepare/{dataset}.py' in commands
    run(folder, 'train.py', config, *STEP, f'--out_dir=out-{name}')
    (end,) = [line for line in metrics(folder / f'out-{name}') if line['step'] == 1]
    assert end['val_loss'] > 0


@pytest.mark.slow
def test_sentiment_trains_on_labels(tmp_path):
    config = os.path.join(ROOT, 'config', 'sentiment.py')
    words = fails(tmp_path, 'train.py', config, *STEP)
    assert 'data/sst2 has no train.bin' in words and 'labels by' in words and 'classify.py' in words
    rows = [dict(text=text, label=i % 2) for i, text in enumerate(texts(200))]
    (tmp_path / 'train.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    flags = ['--labels=negative,positive', '--tokenizer=train', '--vocab_size=600']
    flags += ['--name=sst2', '--num_proc=1', '--val_fraction=0.1']
    run(tmp_path, 'prepare/classify.py', '--input=train.jsonl', *flags)
    run(tmp_path, 'train.py', config, *STEP, '--target_epochs=0', '--block_size=256')
    out = run(tmp_path, 'evaluate.py', '--out_dir=out-sentiment', '--labels', '--device=cpu')
    assert 'label_accuracy' in out


@pytest.mark.slow
def test_qlora_trains_on_alpaca(hub, tmp_path):
    pytest.importorskip('bitsandbytes')
    shared('tiktoken')
    run(tmp_path, 'prepare/alpaca.py', '--num_proc=1', '--val_fraction=0.1', env=hub.env)
    flags = [*STEP, '--head_dim=0', '--n_inner=0']
    gpt2 = [os.path.join(ROOT, 'config', 'nanogpt.py'), '--dataset=alpaca', '--out_dir=base']
    run(tmp_path, 'train.py', *gpt2, *flags)
    config = os.path.join(ROOT, 'config', 'qlora_distilgpt2.py')
    tuned = ['--init_from=base/ckpt.pt', '--lora_rank=4']
    out = run(tmp_path, 'train.py', config, *STEP, *tuned)
    assert 'optimizer=adamw: adapters learn' in out and 'done at step 1' in out
