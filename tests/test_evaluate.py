"""evaluate.py: its figures by hand and by the trainer's own, in every form a model comes in; what
it refuses."""

import json
import math
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, fails, forked, metrics, python, run, shared, start, write_tiny

from fledge import checkpoint
from fledge.device import Machine
from fledge.documents import open_split
from fledge.evaluation import evaluate
from fledge.formats import huggingface
from fledge.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe
from fledge.tokens import read_bin, write_bin
from model import GPT, GPTConfig


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')
    write_tiny(folder / 'data' / 'tiny', n_val=501)
    run(
        folder,
        'train.py',
        *TINY,
        '--max_iters=60',
        '--eval_iters=0',
        '--sample_interval=0',
        '--dtype=float32',
    )
    return folder


def figures(folder, *flags):
    return json.loads(run(folder, 'evaluate.py', '--device=cpu', '--json', *flags).splitlines()[-1])


@pytest.mark.slow
def test_the_trainers_own_loss(trained):
    found, last = figures(trained, '--dtype=float32'), metrics(trained / 'out')[-1]
    assert found['loss'] == pytest.approx(last['val_loss'], rel=1e-6) and found[
        'bits_per_byte'
    ] == pytest.approx(last['val_bpb'], rel=1e-6)
    assert list(found) == [
        'dataset',
        'split',
        'loss',
        'perplexity',
        'bits_per_byte',
        'accuracy',
        'tokens',
        'bytes',
        'accuracy_top5',
        'calibration_error',
        'loss_by_position',
        'block_size',
        'dtype',
        'tokens_per_second',
    ]


@pytest.mark.slow
def test_by_hand(trained):
    model = checkpoint.load_model(checkpoint.load(str(trained / 'out/ckpt.pt')), 'ckpt.pt').eval()
    ids, nats, correct = (
        torch.from_numpy(read_bin(str(trained / 'data/tiny/val.bin')).astype(np.int64)),
        0.0,
        0,
    )
    for first in range(0, len(ids) - 1, 16):  # rows of 16, the last one short
        x, y = ids[first : first + 16][: len(ids) - 1 - first], ids[first + 1 : first + 17]
        with torch.no_grad():
            p = model(x[None], x[None])[0][0].double().log_softmax(dim=-1)
        nats -= p[range(len(y)), y].sum().item()
        correct += (p.argmax(dim=-1) == y).sum().item()
    found = figures(trained, '--dtype=float32', '--batch_size=7')
    assert (
        found['tokens'] == 500
        and found['loss'] == pytest.approx(nats / 500, rel=1e-5)
        and found['accuracy'] == correct / 500
    )
    assert (
        found['perplexity'] == pytest.approx(math.exp(nats / 500), rel=1e-5)
        and 0.1 < found['accuracy'] < 0.9
    )
    size = sum(
        len(load_tokenizer(str(trained / 'data/tiny')).token_bytes[i]) for i in ids[1:].tolist()
    )
    assert found['bytes'] == size and found['bits_per_byte'] == pytest.approx(
        nats / math.log(2) / size, rel=1e-5
    )


def digits(spec):
    return spec | dict(
        pre_tokenizer=dict(
            type='Sequence',
            pretokenizers=[
                dict(type='Digits', individual_digits=True),
                dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=True),
            ],
        )
    )


KINDS = {
    'on tiktoken': lambda spec: spec,
    "Qwen's": lambda spec: spec | dict(normalizer=dict(type='NFC')),
    "SmolLM's": digits,
    'a token that is not special': lambda spec: (
        spec
        | dict(
            added_tokens=spec['added_tokens']
            + [spec['added_tokens'][0] | dict(id=300, content='[PAD]', special=False)]
        )
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_bytes_are_those_of_the_text(kind, tmp_path):
    """Tokens that end within a character count what they hold of it, special ones nothing, in every
    backend."""
    text = 'naïve cafés in 東京, 12 of them 😀 with Ελλάδα'
    plain = train_bpe([text] * 9, 300)
    tokenizer = Tokenizer(KINDS[kind](plain.spec))
    assert (
        bool(tokenizer.bpe) == (kind == 'on tiktoken')
        and tokenizer.agrees_with(plain)
        and plain.agrees_with(tokenizer)
    )
    write_tiny(tmp_path / 'data/tiny')
    tokenizer.save(str(tmp_path / 'data/tiny/tokenizer.json'))
    for split in ('train', 'val'):
        ids = []
        for document in [' '] + [text] * 20:
            ids += tokenizer.encode(document) + [tokenizer.end_of_text]
        write_bin(str(tmp_path / f'data/tiny/{split}.bin'), ids, 301)
    run(
        tmp_path,
        'train.py',
        *TINY,
        '--max_iters=1',
        '--eval_iters=0',
        '--sample_interval=0',
        '--dtype=float32',
    )
    found = figures(tmp_path, '--dtype=float32')
    assert found['bytes'] == 20 * len(text.encode()) and found['tokens'] == 1 + 20 * (
        len(tokenizer.encode(text)) + 1
    )
    # the nats of special tokens, one a document, are in the loss alone
    all_bits = found['loss'] * found['tokens'] / math.log(2) / found['bytes']
    assert 0.85 * all_bits < found['bits_per_byte'] < 0.98 * all_bits


@pytest.mark.slow
def test_parts_of_it(trained):
    part, train = (
        figures(trained, '--eval_iters=3', '--batch_size=2', '--dtype=float32'),
        figures(trained, '--split=train', '--block_size=8'),
    )
    model, data = (
        checkpoint.load_model(checkpoint.load(str(trained / 'out/ckpt.pt')), 'ckpt.pt').eval(),
        read_bin(str(trained / 'data/tiny/val.bin')),
    )
    rows = torch.from_numpy(
        np.stack([data[16 * (i * 32 // 6) :][:17] for i in range(6)]).astype(np.int64)
    )  # 6 of 32 rows, evenly spread
    with torch.no_grad():
        expected = model(rows[:, :-1], rows[:, 1:])[1].item()
    assert (
        part['tokens'] == 96
        and part['loss'] == pytest.approx(expected, rel=1e-5)
        and train['split'] == 'train'
        and train['tokens'] == 3999
    )
    assert (
        figures(trained, '--block_size=2')['loss'] > figures(trained)['loss']
    )  # from less before it


@pytest.mark.slow
def test_rows_are_the_runs_or_no_longer_than_1024(trained):
    run(
        trained,
        'train.py',
        *TINY,
        '--max_iters=1',
        '--batch_size=1',
        '--block_size=1100',
        '--sample_interval=0',
        '--eval_iters=1',
        '--out_dir=long',
    )
    run(trained, 'export.py', '--out_dir=long')
    assert (
        figures(trained, '--out_dir=long')['block_size'] == 1100
        and figures(trained, '--init_from=long/hf', '--dataset=tiny')['block_size'] == 1024
    )
    run(trained, 'export.py', '--init_from=long/hf', '--format=ckpt', '--output=again/model.pt')
    assert figures(trained, '--init_from=again/model.pt', '--dataset=tiny')['block_size'] == 1024


@pytest.mark.slow
def test_logits_are_made_a_part_at_a_time(tmp_path):
    """A model of 4 rows of 1,024 tokens and a vocabulary of 150,000 has 2.4 GB of them."""
    model = GPT(GPTConfig(block_size=1024, vocab_size=150_000, n_layer=1, n_head=1, n_embd=8))
    checkpoint.save(
        str(tmp_path / 'model.pt'),
        dict(model=model.state_dict(), model_args=checkpoint.model_args(model.config)),
    )
    byte_tokenizer().save(str(tmp_path / 'tokenizer.json'))
    (tmp_path / 'data/d').mkdir(parents=True)
    write_bin(str(tmp_path / 'data/d/val.bin'), np.arange(4097) % 256, 256)
    # it says itself what it took: what the system says of it would count this process as well
    (tmp_path / 'measured.py').write_text(
        f'import runpy, sys\nsys.path.insert(0, {ROOT!r})\nfrom fledge.device import Machine\n'
        f'runpy.run_path({os.path.join(ROOT, "evaluate.py")!r}, run_name="__main__")\n'
        'print(Machine("cpu").peak_memory())\n'
    )
    flags = ['--init_from=model.pt', '--dataset=d', '--device=cpu', '--dtype=float32']
    code, out, err = forked(tmp_path, str(tmp_path / 'measured.py'), *flags)
    assert code == 0, err
    assert 'its tokens are taken for those of model.pt' in out and '4,096 tokens' in out
    assert 5e8 < int(out.splitlines()[-1]) < 1.7e9


@pytest.mark.slow
def test_a_model_in_every_form(trained):
    whole = figures(trained, '--dtype=float32')
    run(trained, 'export.py', '--quantize=int8')
    run(trained, 'export.py', '--format=hf')
    eight = figures(trained, '--dtype=float32', '--init_from=out/int8.pt')
    assert eight['loss'] != whole['loss'] and eight['loss'] == pytest.approx(
        whole['loss'], rel=0.01
    )
    theirs = figures(trained, '--dtype=float32', '--init_from=out/hf', '--dataset=tiny')
    assert (
        theirs['loss'] == pytest.approx(whole['loss'], rel=1e-6)
        and theirs['accuracy'] == whole['accuracy']
        and theirs['bytes'] == whole['bytes']
    )
    assert 'out/hf does not say what it was trained on: name the data with --dataset' in fails(
        trained, 'evaluate.py', '--init_from=out/hf'
    )
    half = figures(trained, '--dtype=bfloat16')
    assert (
        half['loss'] != whole['loss']
        and half['loss'] == pytest.approx(whole['loss'], rel=0.01)
        and half['dtype'] == 'bfloat16'
    )


@pytest.mark.slow
def test_a_checkpoint_that_says_nothing_of_its_run(trained):
    """nanoGPT's own say less than ours; the tokenizer is then the data's."""
    saved = checkpoint.load(str(trained / 'out/ckpt.pt'))
    (trained / 'bare').mkdir()
    for config in ({}, dict(config=dict(dataset=None))):
        checkpoint.save(
            str(trained / 'bare/ckpt.pt'), {k: saved[k] for k in ('model', 'model_args')} | config
        )
        assert (
            figures(trained, '--out_dir=bare', '--dataset=tiny')['loss'] == figures(trained)['loss']
        )


@pytest.mark.slow
def test_what_is_refused(trained):
    assert 'data/tiny has no test.bin' in fails(trained, 'evaluate.py', '--split=test')
    assert 'data/gone has no val.bin' in fails(trained, 'evaluate.py', '--dataset=gone')
    assert 'more than the context of out/ckpt.pt, 16' in fails(
        trained, 'evaluate.py', '--block_size=17'
    )
    assert 'batch_size=0 must be 1 to' in fails(trained, 'evaluate.py', '--batch_size=0')
    assert "device='meta' cannot be used here" in fails(trained, 'evaluate.py', '--device=meta')
    assert 'eval_iters=-1 must be 0 to' in fails(trained, 'evaluate.py', '--eval_iters=-1')
    assert 'no checkpoint at' in fails(trained, 'evaluate.py', '--out_dir=nowhere')
    other = trained / 'data' / 'other'
    other.mkdir()
    write_bin(str(other / 'val.bin'), list(range(40)), 256)
    byte_tokenizer().save(str(other / 'tokenizer.json'))
    words = 'another tokenizer than the one of out/ckpt.pt: prepare it with --tokenizer=out\n'
    assert words in fails(trained, 'evaluate.py', '--dataset=other')
    broken = checkpoint.load(str(trained / 'out/ckpt.pt'))
    broken['model']['transformer.ln_f.weight'][0] = float('nan')
    torch.save(broken, trained / 'out/broken.pt')
    assert 'its weights are broken' in fails(trained, 'evaluate.py', '--init_from=out/broken.pt')


def test_positions_are_those_in_a_document(tmp_path):
    """Of packed documents: three of 5 tokens in a row of 16."""
    byte_tokenizer().save(str(tmp_path / 'tokenizer.json'))
    tokens = [*b'abcd', byte_tokenizer().end_of_text] * 30
    model = GPT(GPTConfig(block_size=16, vocab_size=300, n_layer=1, n_head=1, n_embd=8)).eval()
    write_bin(str(tmp_path / 'val.bin'), tokens, 300)
    np.ones(len(tokens), np.uint8).tofile(tmp_path / 'val.mask.bin')
    data, machine = open_split(str(tmp_path), 'val', 16, 300), Machine('cpu', 'float32')
    found = evaluate(model, data, machine, 4, 0, None, detailed=True)
    assert [(p['last'], p['tokens']) for p in found['loss_by_position']] == [
        (1, 30),
        (2, 30),
        (4, 60),
    ]
    plain = evaluate(model, data, machine, 4, 0, None)
    assert plain == {name: found[name] for name in plain} and 'accuracy_top5' not in plain


@pytest.fixture(scope='module')
def stories(tmp_path_factory):
    """A folder with a real model, and data/tales in its tokens."""
    folder = tmp_path_factory.mktemp('stories')
    shutil.copytree(shared('stories260k'), folder / 'hf', copy_function=shutil.copyfile)
    os.chmod(folder / 'hf', 0o755)
    (folder / 'data/tales').mkdir(parents=True)
    tokenizer = load_tokenizer(str(folder / 'hf'))
    with open(shared('wikitext-2', 'test.txt'), encoding='utf-8') as f:
        ids = tokenizer.begin + tokenizer.encode(f.read()[:6000])
    write_bin(str(folder / 'data/tales/val.bin'), ids, 512)
    tokenizer.save(str(folder / 'data/tales/tokenizer.json'))
    return folder, ids


@pytest.mark.slow
def test_details_by_hand(stories):
    folder, ids = stories
    model, logs, read = checkpoint.load_model(huggingface.load(str(folder / 'hf')), 'hf'), [], []
    targets = torch.tensor(ids[1:])
    for first in range(0, len(ids) - 1, 96):
        row = torch.tensor([ids[:-1][first : first + 96]])
        with torch.no_grad():
            logs.append(model.eval()(row, row)[0][0].log_softmax(dim=-1))
        read += range(1, row.shape[1] + 1)
    logs, read = torch.cat(logs), torch.tensor(read)
    found = figures(
        folder, '--init_from=hf', '--dataset=tales', '--dtype=float32', '--block_size=96'
    )
    in_top5 = (logs.topk(5).indices == targets[:, None]).any(dim=1)
    assert found['accuracy_top5'] == pytest.approx(in_top5.float().mean().item())
    assert found['accuracy'] < found['accuracy_top5'] < 1
    confidence, likeliest = logs.exp().max(dim=1)
    correct, error = likeliest == targets, 0
    for i in range(15):
        here = (confidence * 15).int() == i
        if here.any():
            gap = correct[here].float().mean() - confidence[here].mean()
            error += abs(gap.item()) * here.sum().item() / len(targets)
    assert found['calibration_error'] == pytest.approx(error, rel=1e-3) and error > 0.01
    nats = -logs[range(len(targets)), targets]
    parts = found['loss_by_position']
    lasts = [1, 2, 4, 8, 16, 32, 64, 128]
    assert [part['last'] for part in parts] == lasts
    assert [part['first'] for part in parts] == [1, *(last + 1 for last in lasts[:-1])]
    for part in parts:
        here = (read >= part['first']) & (read <= part['last'])
        assert part['tokens'] == here.sum()
        assert part['loss'] == pytest.approx(nats[here].mean().item(), rel=1e-4)
    assert (folder / 'hf/loss_by_position.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.slow
def test_perplexity_is_that_of_transformers(stories):
    """With a stride by the loop of transformers' documentation, each token counted once."""
    transformers = pytest.importorskip('transformers')
    folder, ids = stories
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / 'hf', dtype=torch.float32)
    ids = torch.tensor([ids])
    flags = ['--init_from=hf', '--dataset=tales', '--dtype=float32', '--block_size=96']

    def nats_of(inputs, targets):  # a label is moved by one place in the model
        with torch.no_grad():
            loss = theirs(inputs, labels=targets).loss
        n = (targets[:, 1:] != -100).sum().item()
        return loss.item() * n, n

    total, count = 0.0, 0
    for first in range(0, ids.shape[1] - 1, 96):  # rows, and the token behind each
        row = ids[:, first : first + 97]
        nats, n = nats_of(row, row)
        total, count = total + nats, count + n
    found = figures(folder, *flags)
    assert found['tokens'] == count == ids.shape[1] - 1
    assert found['perplexity'] == pytest.approx(math.exp(total / count), rel=1e-4)

    length = ids.shape[1]
    for stride in (32, 95):
        total, count, previous_end = 0.0, 0, 0
        for begin in range(0, length, stride):
            end = min(begin + 96, length)
            targets = ids[:, begin:end].clone()
            targets[:, : -(end - previous_end)] = -100
            nats, n = nats_of(ids[:, begin:end], targets)
            total, count, previous_end = total + nats, count + n, end
            if end == length:
                break
        sliding = figures(folder, *flags, f'--stride={stride}', '--batch_size=5')
        assert sliding['tokens'] == count == length - 1
        assert sliding['perplexity'] == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.mark.slow
def test_several_models(trained, tmp_path):
    run(trained, 'export.py', '--quantize=int8', '--output=eight/int8.pt')
    alone = [figures(trained, '--dtype=float32')]
    alone.append(figures(trained, '--dtype=float32', '--init_from=eight/int8.pt'))
    flags = ['--init_from=resume,eight/int8.pt', '--dtype=float32', '--json', '--device=cpu']
    out = run(trained, 'evaluate.py', *flags)
    found = json.loads(out.splitlines()[-1])['models']
    assert [model.pop('model') for model in found] == ['out/ckpt.pt', 'eight/int8.pt']
    for model in (*found, *alone):
        del model['tokens_per_second']
    assert found == alone
    [row] = [line for line in out.splitlines() if line.startswith('perplexity ')]
    assert row.split()[1:] == [f'{model["perplexity"]:.4g}' for model in alone]
    # two runs by their folders, the second one's data in other tokens
    other = trained / 'data' / 'bytes'
    other.mkdir()
    write_bin(str(other / 'val.bin'), list(range(40)), 256)
    byte_tokenizer().save(str(other / 'tokenizer.json'))
    assert 'another tokenizer' in fails(trained, 'evaluate.py', '--dataset=bytes', *flags[:1])
    assert 'no checkpoint at gone/ckpt.pt' in fails(trained, 'evaluate.py', '--out_dir=out,gone')


@pytest.mark.slow
def test_a_stride_that_cannot_be(trained):
    assert 'stride=16 must be less than block_size=16' in fails(
        trained, 'evaluate.py', '--stride=16'
    )


@pytest.mark.slow
def test_what_does_nothing_is_said(trained):
    def said(*flags):
        process = start(trained, 'evaluate.py', '--device=cpu', *flags)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0
        return [line for line in err.splitlines() if line.startswith('without effect')]

    assert said('--eval_iters=1', '--seed=3', '--max_new_tokens=5', '--num_beams=2') == [
        'without effect without --prompts: seed',
        'without effect without --prompts or --answers: max_new_tokens',
        'without effect without sources and targets: num_beams',
    ]
    (trained / 'prompts.txt').write_text('012')
    flags = ('--prompts=prompts.txt', '--seed=3', '--max_new_tokens=5', '--stride=2')
    assert said(*flags) == ['without effect without --dataset or --split: stride']


@pytest.mark.slow
def test_processes_share_the_split_and_the_tasks(stories):
    folder, _ = stories
    records = [dict(good=f'{i} dogs run.', bad=f'{i} dogs runs.') for i in range(9)]
    (folder / 'task.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
    flags = ['--init_from=hf', '--dataset=tales', '--tasks=task.jsonl', '--dtype=float32']
    flags += ['--batch_size=1', '--block_size=16']
    alone = figures(folder, *flags)
    torchrun = [python(), '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    script = os.path.join(ROOT, 'evaluate.py')
    done = subprocess.run(
        [*torchrun, script, '--device=cpu', '--json', *flags],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('do not begin with') == 1  # one of them speaks
    both = json.loads(done.stdout.splitlines()[-1])
    assert both['loss'] == pytest.approx(alone['loss'], rel=1e-6)
    assert both['calibration_error'] == pytest.approx(alone['calibration_error'], rel=1e-4)
    assert both['tasks']['task.jsonl']['bits_per_byte'] == pytest.approx(
        alone['tasks']['task.jsonl']['bits_per_byte'], rel=1e-5
    )
    assert done.stdout.count('val of tales') == 1
