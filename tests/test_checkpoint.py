"""Checkpoints survive, and never run code."""

import contextlib
import os
import pickle
import random
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_saving import FullDisk

from fledge import UserError, checkpoint, optimizers
from model import GPT, GPTConfig


def small_model(**others):
    sizes = dict(block_size=8, vocab_size=20, n_layer=1, n_head=2, n_embd=8)
    return GPT(GPTConfig(**sizes | others))


def a_checkpoint(**others):
    model = small_model()
    saved = dict(model=model.state_dict(), model_args=checkpoint.model_args(model.config))
    return saved | dict(iter_num=3, best_val_loss=2.5) | others


def test_what_is_saved_is_loaded(tmp_path):
    path, saved = str(tmp_path / 'ckpt.pt'), a_checkpoint()
    checkpoint.save(path, saved)
    loaded = checkpoint.load(path)
    assert loaded['iter_num'] == 3
    assert all(torch.equal(v, loaded['model'][k]) for k, v in saved['model'].items())
    checkpoint.load_model(loaded, path)
    assert os.listdir(tmp_path) == ['ckpt.pt']


def test_it_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    order, fsync, replace, check = [], os.fsync, os.replace, checkpoint.check_sums
    monkeypatch.setattr(os, 'fsync', lambda f: (fsync(f), order.append('fsync')))
    monkeypatch.setattr(os, 'replace', lambda a, b: (replace(a, b), order.append('replace')))
    monkeypatch.setattr(checkpoint, 'check_sums', lambda f: (check(f), order.append('read back')))
    checkpoint.save(str(tmp_path / 'ckpt.pt'), a_checkpoint())
    assert order == ['fsync', 'read back', 'replace', 'fsync']  # the last one is of the folder


def test_what_older_scripts_left_in_is_taken_out(tmp_path):
    path, saved = str(tmp_path / 'ckpt.pt'), a_checkpoint()
    saved['model'] = {f'_orig_mod.{k}': v for k, v in saved['model'].items()}
    saved['model']['_orig_mod.transformer.h.0.attn.bias'] = torch.ones(1)
    torch.save(saved, path)
    checkpoint.load_model(checkpoint.load(path), path)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize('how', ['inside', 'alone', 'plain pickle'])
def test_a_payload_is_refused_and_not_run(tmp_path, how):
    path, payload = str(tmp_path / 'ckpt.pt'), Payload(str(tmp_path / 'owned'))
    if how == 'plain pickle':
        with open(path, 'wb') as f:
            pickle.dump(payload, f)
    else:
        torch.save(a_checkpoint(config=payload) if how == 'inside' else payload, path)
    with pytest.raises(UserError, match='carries pickled code.* which is never run'):
        checkpoint.load(path)
    assert not (tmp_path / 'owned').exists()


@pytest.mark.parametrize('keep', [0, 1, 100, 0.5, 0.99])
def test_one_cut_short_is_named(tmp_path, keep):
    path = tmp_path / 'ckpt.pt'
    checkpoint.save(str(path), a_checkpoint())
    raw = path.read_bytes()
    path.write_bytes(raw[: keep if isinstance(keep, int) else int(len(raw) * keep)])
    with pytest.raises(UserError, match='ckpt.pt is (cut short or|no checkpoint)'):
        checkpoint.load(str(path))


def test_one_that_does_not_fit_is_named(tmp_path):
    with pytest.raises(UserError, match='no checkpoint at .*nowhere'):
        checkpoint.load(str(tmp_path / 'nowhere.pt'))
    path, good = str(tmp_path / 'ckpt.pt'), a_checkpoint()
    for content, words in (
        ({'weights': 1}, 'lacks model or model_args'),
        ({'model': 3, 'model_args': {}}, 'lacks model or model_args'),
        (good | dict(config=None), 'config is no settings'),
        (good | dict(config=dict(dataset=5)), 'config is no settings'),
        (good | dict(model={'a': 'b'}), 'holds more than named tensors'),
        (good | dict(model={5: torch.zeros(1)}), 'holds more than named tensors'),
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=words):
            checkpoint.load(path)
    args, one = good['model_args'], torch.tensor(1.0)
    scaling = dict(position='rope', rope_scaling=dict(rope_type='linear'))
    adapter = {'x.lora_A': one, 'x.lora_B': one, 'x.weight': torch.zeros(1)}
    for others, words in (
        (dict(model_args=args | dict(n_embd=16)), 'does not fit this model: .*size mismatch'),
        (dict(model_args={'width': 3}), 'unexpected keyword'),
        (dict(model_args=args | scaling), 'does not fit this model'),
        (dict(model=adapter, config=dict(lora_alpha=1)), 'does not fit'),
    ):
        with pytest.raises(UserError, match=words):
            checkpoint.load_model(good | others, path)


def test_a_full_disk_leaves_the_previous_one(tmp_path):
    path = str(tmp_path / 'ckpt.pt')
    checkpoint.save(path, a_checkpoint())
    with FullDisk(4000), pytest.raises(UserError, match='what was there before is as it was'):
        checkpoint.save(path, a_checkpoint(iter_num=99))
    assert checkpoint.load(path)['iter_num'] == 3 and os.listdir(tmp_path) == ['ckpt.pt']


@pytest.mark.slow
def test_killed_while_saving_leaves_a_whole_one(tmp_path):
    path = str(tmp_path / 'ckpt.pt')
    program = (
        'import sys, torch\nfrom fledge import checkpoint\n'
        'big = dict(model={"w": torch.zeros(5_000_000)}, model_args={}, iter_num=0)\n'
        f'while True:\n    big["iter_num"] += 1\n    checkpoint.save({path!r}, big)\n'
        '    print(big["iter_num"], flush=True)\n'
    )
    for lines in (1, 2, 3):
        process = subprocess.Popen(
            [sys.executable, '-c', program], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        done = [int(process.stdout.readline()) for _ in range(lines)][-1]
        process.kill()  # SIGKILL, in the middle of the next one
        process.wait()
        assert checkpoint.load(path)['iter_num'] >= done


@pytest.mark.parametrize('seed', range(40))
def test_broken_bytes_are_a_mistake_not_a_traceback(tmp_path, seed):
    path, rng = tmp_path / 'ckpt.pt', random.Random(seed)
    checkpoint.save(str(path), a_checkpoint())
    raw = bytearray(path.read_bytes())
    for _ in range(20):
        raw[rng.randrange(len(raw) if seed % 2 else 3000)] = rng.randrange(256)
    path.write_bytes(raw)
    with contextlib.suppress(UserError):
        checkpoint.load_model(checkpoint.load(str(path)), str(path))


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_optimizer_state_comes_back_but_settings_stay(name):
    model = small_model()
    idx = torch.randint(20, (2, 9))

    def step(opts):
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        for o in opts:
            o.step()
            o.zero_grad()

    first = optimizers.make_optimizers(model, name, 0.1, 0.2, (0.9, 0.95))
    step(first)
    saved = optimizers.state_dict(first)
    second = optimizers.make_optimizers(model, name, 0.3, 0.4, (0.8, 0.9))
    optimizers.load_state_dict(second, saved)
    assert second[0].param_groups[0]['betas'] == (0.8, 0.9)
    assert second[-1].param_groups[0]['lr'] == 0.3
    for a, b in zip(first, second, strict=True):
        states = a.state_dict()['state'].values(), b.state_dict()['state'].values()
        for s, t in zip(*states, strict=True):
            assert all(torch.equal(s[k], t[k]) for k in s)
    step(second)
    other = 'muon' if name == 'adamw' else 'adamw'
    with pytest.raises(UserError, match="another optimizer's"):
        opts = optimizers.make_optimizers(model, other, 0.1, 0, (0.9, 0.95))
        optimizers.load_state_dict(opts, saved)


def test_every_parameter_is_in_one_group():
    model = small_model(n_layer=2, qk_norm=True)
    for name in ('adamw', 'muon'):
        opts = optimizers.make_optimizers(model, name, 0.1, 0.2, (0.9, 0.95))
        ids = [id(p) for o in opts for g in o.param_groups for p in g['params']]
        assert sorted(ids) == sorted(id(p) for p in model.parameters())
    matrices = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')
    expected = {id(p) for n, p in model.named_parameters() if n.endswith(matrices)}
    assert {id(p) for p in opts[1].param_groups[0]['params']} == expected
    with pytest.raises(UserError, match='none of adamw, muon'):
        optimizers.make_optimizers(model, 'sgd', 0.1, 0, (0.9, 0.95))
