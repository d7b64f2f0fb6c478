"""evaluate.py: its figures by hand and by the trainer's own, in every form a model comes in; what it refuses."""
import json
import math

import numpy as np
import pytest
import torch
from conftest import TINY, fails, metrics, run, write_tiny

from fledge import checkpoint
from fledge.tokenizer import byte_tokenizer, load_tokenizer
from fledge.tokens import BinWriter, read_bin


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')
    write_tiny(folder / 'data' / 'tiny', n_val=501)
    run(folder, 'train.py', *TINY, '--max_iters=60', '--eval_iters=0', '--sample_interval=0', '--dtype=float32')
    return folder


def figures(folder, *flags):
    return json.loads(run(folder, 'evaluate.py', '--device=cpu', '--json', *flags).splitlines()[-1])


def test_the_trainers_own_loss(trained):
    found, last = figures(trained, '--dtype=float32'), metrics(trained / 'out')[-1]
    assert found['loss'] == pytest.approx(last['val_loss'], rel=1e-6) and found['bits_per_byte'] == pytest.approx(last['val_bpb'], rel=1e-6)
    assert list(found) == ['dataset', 'split', 'loss', 'perplexity', 'bits_per_byte', 'accuracy', 'tokens', 'bytes', 'tokens_per_second']


def test_by_hand(trained):
    model = checkpoint.load_model(checkpoint.load(str(trained / 'out/ckpt.pt')), 'ckpt.pt').eval()
    ids, nats, correct = torch.from_numpy(read_bin(str(trained / 'data/tiny/val.bin')).astype(np.int64)), 0.0, 0
    for start in range(0, len(ids) - 1, 16):  # rows of 16, the last one short
        x, y = ids[start:start + 16][:len(ids) - 1 - start], ids[start + 1:start + 17]
        with torch.no_grad():
            p = model(x[None], x[None])[0][0].double().log_softmax(dim=-1)
        nats -= p[range(len(y)), y].sum().item()
        correct += (p.argmax(dim=-1) == y).sum().item()
    found = figures(trained, '--dtype=float32', '--batch_size=7')
    assert found['tokens'] == 500 and found['loss'] == pytest.approx(nats / 500, rel=1e-5) and found['accuracy'] == correct / 500
    assert found['perplexity'] == pytest.approx(math.exp(nats / 500), rel=1e-5) and 0.1 < found['accuracy'] < 0.9
    size = sum(len(load_tokenizer(str(trained / 'data/tiny')).token_bytes[i]) for i in ids[1:].tolist())
    assert found['bytes'] == size and found['bits_per_byte'] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_special_tokens_are_no_text():
    tokenizer = byte_tokenizer()
    assert tokenizer.text_bytes(300).tolist() == [1] * 256 + [0] * 44 and tokenizer.text_bytes(3).tolist() == [1] * 3


def test_parts_of_it(trained):
    whole, part, train = figures(trained), figures(trained, '--eval_iters=3', '--batch_size=2'), figures(trained, '--split=train', '--block_size=8')
    assert part['tokens'] == 96 and part['loss'] == pytest.approx(whole['loss'], rel=0.3) and train['split'] == 'train' and train['tokens'] == 3999
    assert figures(trained, '--block_size=2')['loss'] > whole['loss']  # from less before it


def test_a_model_in_every_form(trained):
    whole = figures(trained, '--dtype=float32')
    run(trained, 'export.py', '--quantize=int8')
    run(trained, 'export.py', '--format=hf')
    eight = figures(trained, '--dtype=float32', '--init_from=out/int8.pt')
    assert eight['loss'] != whole['loss'] and eight['loss'] == pytest.approx(whole['loss'], rel=0.01)
    theirs = figures(trained, '--dtype=float32', '--init_from=out/hf', '--dataset=tiny')
    assert theirs['loss'] == pytest.approx(whole['loss'], rel=1e-6) and theirs['accuracy'] == whole['accuracy'] and theirs['bytes'] == whole['bytes']
    assert 'out/hf does not say what it was trained on: name the data with --dataset' in fails(trained, 'evaluate.py', '--init_from=out/hf')
    assert figures(trained, '--dtype=bfloat16')['loss'] == pytest.approx(whole['loss'], rel=0.01)


def test_what_is_refused(trained):
    assert 'data/tiny has no test.bin' in fails(trained, 'evaluate.py', '--split=test')
    assert 'data/gone has no val.bin' in fails(trained, 'evaluate.py', '--dataset=gone')
    assert 'more than the context of out/ckpt.pt, 16' in fails(trained, 'evaluate.py', '--block_size=17')
    assert 'batch_size=0 must be at least 1' in fails(trained, 'evaluate.py', '--batch_size=0')
    assert 'no checkpoint at' in fails(trained, 'evaluate.py', '--out_dir=nowhere')
    other = trained / 'data' / 'other'
    other.mkdir()
    with BinWriter(str(other / 'val.bin'), 256) as f:
        f.write(list(range(40)))
    byte_tokenizer().save(str(other / 'tokenizer.json'))
    assert 'another tokenizer than the one of out/ckpt.pt' in fails(trained, 'evaluate.py', '--dataset=other')
    broken = checkpoint.load(str(trained / 'out/ckpt.pt'))
    broken['model']['transformer.ln_f.weight'][0] = float('nan')
    checkpoint.save(str(trained / 'out/broken.pt'), broken)
    assert 'its weights are broken' in fails(trained, 'evaluate.py', '--init_from=out/broken.pt')
