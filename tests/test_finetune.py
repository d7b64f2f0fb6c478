"""Fine-tuning by train.py: the loss is the one of the documents alone, every kind of run goes on
bit for bit, preferences are learned as two full models say, vocabularies grow, and a real model
learns without forgetting."""

import json
import math
import os
import random
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, fails, metrics, python, run, shared, start
from torch.nn import functional as F

from fledge import checkpoint
from fledge.documents import open_split
from fledge.formats import huggingface
from fledge.tokenizer import END_OF_TEXT, Tokenizer, byte_tokenizer, load_tokenizer, train_bpe
from fledge.tokens import read_bin

TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
BYTES = byte_tokenizer()
# the three shapes of a block that cover the families
SHAPES = dict(
    gpt2=[
        '--position=learned',
        '--norm=layernorm',
        '--activation=gelu',
        '--bias',
        '--qk_norm=False',
        '--n_kv_head=0',
    ],
    llama=['--qk_norm=False', '--tie_embeddings=False'],
    qwen3=[],
)
# what all runs here share; a run has no samples, and is evaluated when its steps are done
PLAIN = [*TINY, '--block_size=128', '--sample_interval=0', '--eval_interval=1000', '--eval_iters=0']
PLAIN += ['--dtype=float32', '--dataset=talks']
BETA = 0.3


def write_records(path, records):
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))


def talk(n_asked, n_answered):
    """A conversation of so many bytes, of which no two are alike."""
    letters = random.Random(100 * n_asked + n_answered)
    asked = ''.join(letters.choices('abcdefgh', k=n_asked))
    answered = ''.join(letters.choices('stuvwxyz', k=n_answered))
    return dict(question=asked, answer=answered)


def pair(i):
    """A preference for capital letters; chosen and rejected are of different lengths."""
    letters = random.Random(i)
    chosen = ''.join(letters.choices('ABCD', k=3 + i % 5))
    rejected = ''.join(letters.choices('abcd', k=3 + i % 4))
    return dict(prompt=f'{i}?', chosen=chosen, rejected=rejected)


@pytest.fixture(scope='module')
def room(tmp_path_factory):
    """A folder with data/talks, data/pairs, and a base of each shape in base-SHAPE."""
    folder = tmp_path_factory.mktemp('finetune')
    # of the first eight no two share a row of 128; half of them teach a token or two
    talks = [talk(60, 1), talk(58, 1), talk(56, 2), talk(54, 2)]
    talks += [talk(1, 60), talk(2, 58), talk(3, 56), talk(4, 54)]
    talks += [talk(1, 1), talk(2, 1), talk(3, 1), talk(4, 1), talk(1, 2)]
    talks += [talk(2, 2), talk(3, 2), talk(1, 3), talk(2, 3), talk(1, 4)]
    write_records(folder / 'talks.jsonl', talks)
    write_records(folder / 'val.jsonl', [talk(10, n) for n in (1, 5, 60)])
    flags = ['--tokenizer=bytes', '--num_proc=1']
    files = ['--input=talks.jsonl', '--val=val.jsonl', '--name=talks']
    run(folder, 'prepare/chat.py', *files, *flags)
    write_records(folder / 'pairs.jsonl', [pair(i) for i in range(40)])
    write_records(folder / 'val-pairs.jsonl', [pair(i) for i in range(40, 50)])
    files = ['--input=pairs.jsonl', '--val=val-pairs.jsonl', '--name=pairs']
    run(folder, 'prepare/preferences.py', *files, *flags)
    for shape, shape_flags in SHAPES.items():
        run(folder, 'train.py', *PLAIN, *shape_flags, '--max_iters=30', f'--out_dir=base-{shape}')
    return folder


@pytest.fixture(scope='module')
def elsewhere(room):
    """With a GPT-2 of transformers in theirs, and data/chats in its tokens and two new ones."""
    transformers = pytest.importorskip('transformers')
    texts = ['What is the colour of the sky? It is blue.', 'Why is the sky blue? Because it is.']
    trained = train_bpe(texts, 280)
    plain = [token for token in trained.spec['added_tokens'] if token['content'] == END_OF_TEXT]
    tokenizer = Tokenizer(trained.spec | dict(added_tokens=plain))
    assert tokenizer.vocab_size == 278
    torch.manual_seed(0)
    sizes = dict(vocab_size=278, n_positions=128, n_embd=16, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(room / 'theirs')
    tokenizer.save(str(room / 'theirs/tokenizer.json'))
    write_records(room / 'chats.jsonl', [dict(question=text, answer=text) for text in texts])
    files = ['--input=chats.jsonl', '--val=chats.jsonl', '--name=chats']
    run(room, 'prepare/chat.py', *files, '--tokenizer=theirs', '--num_proc=1')
    return room


def base(shape):
    return f'--init_from=base-{shape}/ckpt.pt'


def load(path):
    """The model of a checkpoint, its adapters merged."""
    return checkpoint.load_model(huggingface.load(str(path)), str(path)).eval()


def documents_of(folder, split, end_of_text=BYTES.end_of_text):
    """Each document of a prepared dataset, read by itself: its ids, and whether each is learned."""
    ids = np.array(read_bin(str(folder / f'{split}.bin')), np.int64)
    learned = np.fromfile(folder / f'{split}.mask.bin', np.uint8).astype(bool)
    ends = np.flatnonzero(ids == end_of_text) + 1
    return list(zip(np.split(ids, ends)[:-1], np.split(learned, ends)[:-1], strict=True))


def nats_of(model, document):
    """What a model pays for the learned tokens of a document alone, in nats: their sum."""
    ids, learned = map(torch.from_numpy, document)
    logits, _ = model(ids[None, :-1], ids[None, 1:])
    return F.cross_entropy(logits[0], ids[1:], reduction='none')[learned[1:]].sum()


def mean_nats(model, documents):
    """The mean over all learned tokens of some documents."""
    n_learned = sum(learned[1:].sum() for _, learned in documents)
    return sum(nats_of(model, document) for document in documents) / int(n_learned)


def gradient_norm(parameters):
    return torch.stack([p.grad.norm() for p in parameters]).norm().item()


# ---- conversations


@pytest.mark.slow
def test_the_rows_of_a_step_teach_very_different_numbers_of_tokens(room):
    data = open_split(str(room / 'data/talks'), 'train', 128, BYTES.vocab_size, seed=1337)
    learned = [data.weight(row, 1) for row in range(8)]
    assert data.n_rows == 8 and data.n_cut == 0 and data.n_documents == 18
    assert max(learned) > 10 * min(learned)


@pytest.mark.slow
@pytest.mark.parametrize(
    'shape, batch_size, accumulation, n_processes',
    [('llama', 8, 1, 1), ('qwen3', 2, 4, 1), ('gpt2', 1, 8, 1), ('gpt2', 1, 8, 2)],
)
def test_a_step_is_the_mean_over_all_learned_tokens(
    room, shape, batch_size, accumulation, n_processes
):
    flags = [*PLAIN, base(shape), '--max_iters=1', f'--out_dir=step-{shape}']
    flags += [f'--batch_size={batch_size}', f'--gradient_accumulation_steps={accumulation}']
    if n_processes == 1:
        run(room, 'train.py', *flags)
    else:
        command = [python(), *TORCHRUN, os.path.join(ROOT, 'train.py'), *flags]
        done = subprocess.run(command, cwd=room, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    model = load(room / f'base-{shape}/ckpt.pt')
    loss = mean_nats(model, documents_of(room / 'data/talks', 'train'))
    loss.backward()
    first, last = metrics(room / f'step-{shape}')
    assert abs(first['train_loss'] - loss.item()) < 1e-5
    assert abs(first['grad_norm'] / gradient_norm(model.parameters()) - 1) < 1e-5
    with torch.no_grad():
        val = documents_of(room / 'data/talks', 'val')
        after = load(room / f'step-{shape}/ckpt.pt')
        assert abs(first['val_loss'] - mean_nats(model, val).item()) < 1e-5
        assert abs(last['val_loss'] - mean_nats(after, val).item()) < 1e-5


# ---- runs that go on

# a config file that sends the process a signal in its WHENth micro-batch; a run that goes on reads
# its config files twice
INTERRUPTED = """
import os, signal, threading
import model

_forward = getattr(model.GPT, 'plain_forward', model.GPT.forward)
_calls = [0]

def _counting_forward(self, *args, **options):
    _calls[0] += self.training
    if _calls[0] == WHEN:
        for thread in threading.enumerate():  # a checkpoint that is being written is to be whole
            if not thread.daemon and thread is not threading.current_thread():
                thread.join()
        os.kill(os.getpid(), signal.SIGNAL)
    return _forward(self, *args, **options)

model.GPT.plain_forward, model.GPT.forward = _forward, _counting_forward
"""
LORA = ['--lora_rank=4', '--lora_dropout=0.2']
DPO = ['--objective=dpo', '--dataset=pairs']


def assert_same_run(a, b):
    """Two runs' metrics, but for their times, and their checkpoints are equal to the last bit."""
    lines = []
    for folder in (a, b):
        lines.append(metrics(folder))
        for line in lines[-1]:
            for name in ('elapsed', 'tokens_per_second', 'mfu'):
                del line[name]
    assert lines[0] == lines[1]
    first, second = (checkpoint.load(str(folder / 'ckpt.pt')) for folder in (a, b))
    assert first['iter_num'] == second['iter_num']
    assert first['best_val_loss'] == second['best_val_loss']
    for name in ('model', 'reference'):
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
    optimizers = []
    for saved in (first, second):
        states = saved['optimizer']  # of one, or a list
        states = states if isinstance(states, list) else [states]
        optimizers.append([state['state'] for state in states])
    torch.testing.assert_close(*optimizers, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    'name, own_flags',
    [
        ('sft', [base('qwen3')]),
        ('lora', ['--init_from=theirs', '--dataset=chats', *LORA]),
        ('dpo', [base('llama'), *DPO]),
        ('dpo-lora', [base('gpt2'), *DPO, *LORA]),
    ],
)
def test_a_run_that_was_killed_and_then_stopped_equals_one_in_one_go(elsewhere, name, own_flags):
    room = elsewhere
    flags = [*PLAIN, '--dropout=0.1', '--gradient_checkpointing', *own_flags]
    flags += ['--batch_size=2', '--gradient_accumulation_steps=2']
    flags += ['--max_iters=6', '--eval_interval=3']
    run(room, 'train.py', *flags, f'--out_dir={name}-whole')
    whole = room / f'{name}-whole'
    # the checkpoint of step 3 is there, and what came behind it is lost
    (room / 'kill.py').write_text(INTERRUPTED.replace('WHEN', '10').replace('SIGNAL', 'SIGKILL'))
    (room / 'stop.py').write_text(INTERRUPTED.replace('WHEN', '3').replace('SIGNAL', 'SIGTERM'))
    run(room, 'train.py', 'kill.py', *flags, f'--out_dir={name}-parts', code=-9)
    parts = room / f'{name}-parts'
    assert metrics(parts)[-1]['step'] == 3
    assert checkpoint.load(str(parts / 'ckpt.pt'))['iter_num'] == 3
    resume = ['--init_from=resume', f'--out_dir={name}-parts']
    out = run(room, 'train.py', 'stop.py', *resume)
    assert 'resuming at step 3' in out
    assert re.search('stopped at step [45]', out)  # 4 where the step was not done in a moment
    assert 'done at step 6' in run(room, 'train.py', *resume)
    assert_same_run(whole, parts)


# ---- preferences


def margins_of(trained, reference, documents):
    """By how much each chosen document is ahead of its rejected one, by the paper's formula."""
    margins = []
    for chosen, rejected in zip(documents[0::2], documents[1::2], strict=True):
        chosen_ratio = nats_of(reference, chosen) - nats_of(trained, chosen)
        rejected_ratio = nats_of(reference, rejected) - nats_of(trained, rejected)
        margins.append(BETA * (chosen_ratio - rejected_ratio))
    return torch.stack(margins)


@pytest.fixture(scope='module')
def preferences(room):
    """Runs of a shape, by name, whose steps see all pairs: a checkpoint at step 3, and its next."""
    for name, own_flags in (('gpt2', []), ('qwen3', ['--lora_rank=4'])):
        flags = [*PLAIN, *DPO, base(name), f'--out_dir=pairs-{name}', f'--dpo_beta={BETA}']
        flags += ['--batch_size=4', '--gradient_accumulation_steps=5', '--decay_lr=False']
        flags += own_flags
        run(room, 'train.py', *flags, '--max_iters=3')
        (room / f'pairs-{name}/ckpt.pt').rename(room / f'pairs-{name}/step3.pt')
        os.link(room / f'pairs-{name}/step3.pt', room / f'pairs-{name}/ckpt.pt')
        run(room, 'train.py', *flags, '--init_from=resume', '--max_iters=4')
    return room


def gradient_norm_of_adapters(model, path):
    """The norm that a merged model's gradient is for the adapters of the checkpoint at path."""
    saved, squares = checkpoint.load(str(path)), 0
    scale = saved['config']['lora_alpha'] / saved['config']['lora_rank']
    for name, a in saved['model'].items():
        if name.endswith('.lora_A'):
            b = saved['model'][name.replace('lora_A', 'lora_B')]
            of_weight = model.get_parameter(name.replace('lora_A', 'weight')).grad
            squares += (scale * b.T @ of_weight).square().sum()
            squares += (scale * of_weight @ a.T).square().sum()
    return squares.sqrt().item()


@pytest.mark.slow
@pytest.mark.parametrize('shape', ['gpt2', 'qwen3'])
def test_a_step_of_preferences_is_the_formula_of_two_full_models(preferences, shape):
    data = open_split(str(preferences / 'data/pairs'), 'train', 128, BYTES.vocab_size)
    assert data.n_rows == 20
    trained_path = preferences / f'pairs-{shape}/step3.pt'
    reference, trained = load(preferences / f'base-{shape}/ckpt.pt'), load(trained_path)
    reference.requires_grad_(False)
    line = metrics(preferences / f'pairs-{shape}')[3]
    assert line['step'] == 3
    documents = documents_of(preferences / 'data/pairs', 'train')
    margins = margins_of(trained, reference, documents)
    loss = torch.log1p(torch.exp(-margins)).mean()
    loss.backward()
    norm = gradient_norm(trained.parameters())
    if shape == 'qwen3':
        norm = gradient_norm_of_adapters(trained, trained_path)
    assert abs(line['train_loss'] - loss.item()) < 1e-5
    assert abs(line['grad_norm'] / norm - 1) < 1e-4
    assert abs(line['reward_margin'] - margins.mean().item()) < 1e-4
    assert abs(line['preference_accuracy'] - (margins > 0).float().mean().item()) < 1e-6
    with torch.no_grad():
        val = documents_of(preferences / 'data/pairs', 'val')
        margins = margins_of(load(preferences / f'pairs-{shape}/ckpt.pt'), reference, val)
    last = metrics(preferences / f'pairs-{shape}')[-1]
    assert abs(last['val_loss'] - torch.log1p(torch.exp(-margins)).mean().item()) < 1e-5
    assert abs(last['val_reward_margin'] - margins.mean().item()) < 1e-4


@pytest.mark.slow
def test_trl_finds_the_same_loss_and_gradient(preferences):
    trl = pytest.importorskip('trl')
    transformers = pytest.importorskip('transformers')
    datasets = pytest.importorskip('datasets')
    models = []
    for path in ('pairs-gpt2/step3.pt', 'base-gpt2/ckpt.pt'):
        output = path.replace('/', '-') + '-hf'
        run(preferences, 'export.py', f'--init_from={path}', '--format=hf', f'--output={output}')
        folder = str(preferences / output)
        models.append(transformers.AutoModelForCausalLM.from_pretrained(folder))
    args = trl.DPOConfig(
        output_dir=str(preferences / 'trl'), beta=BETA, report_to='none', use_cpu=True, bf16=False
    )
    trainer = trl.DPOTrainer(
        model=models[0],
        ref_model=models[1],
        args=args,
        train_dataset=datasets.Dataset.from_list([dict(prompt='a', chosen='b', rejected='c')]),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
    )
    # the pairs as they were prepared: its own chat template would learn a newline behind an answer
    examples, documents = [], documents_of(preferences / 'data/pairs', 'train')
    for chosen, rejected in zip(documents[0::2], documents[1::2], strict=True):
        (ids, learned), (other_ids, other_learned) = chosen, rejected
        prompt = ids[: learned.argmax()]
        example = dict(prompt_ids=prompt.tolist(), chosen_ids=ids[learned].tolist())
        examples.append(example | dict(rejected_ids=other_ids[other_learned].tolist()))
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    loss.backward()
    line = metrics(preferences / 'pairs-gpt2')[3]
    norm = gradient_norm(p for p in trainer.model.parameters() if p.grad is not None)
    [margin] = trainer._metrics['eval']['rewards/margins']
    assert abs(line['train_loss'] - loss.item()) < 1e-4
    assert abs(line['grad_norm'] / norm - 1) < 1e-4
    assert abs(line['reward_margin'] - margin) < 1e-4


# a config file that writes down what the first training step finds in memory
COUNTING = """
import gc, json, torch
import model

_forward = model.GPT.forward

def _counting_forward(self, *args, **options):
    if self.training:
        sizes, models = {}, 0
        for thing in gc.get_objects():
            if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.is_floating_point():
                storage = thing.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
            models += issubclass(type(thing), model.GPT)
        with open('counted.json', 'w') as f:
            json.dump(dict(models=models, bytes=sum(sizes.values())), f)
        model.GPT.forward = _forward
    return _forward(self, *args, **options)

model.GPT.forward = _counting_forward
"""


@pytest.mark.slow
@pytest.mark.parametrize('own_flags', [[], ['--lora_rank=4']])
def test_forty_pairs_teach_their_preference_and_no_second_model_is_held(room, own_flags):
    (room / 'count.py').write_text(COUNTING)
    flags = [*PLAIN, *DPO, base('qwen3'), '--out_dir=taught', '--optimizer=adamw', *own_flags]
    flags += ['--max_iters=20', '--eval_interval=5', '--batch_size=10']
    run(room, 'train.py', 'count.py', *flags)
    lines = metrics(room / 'taught')
    assert abs(lines[0]['train_loss'] - math.log(2)) < 1e-5
    assert abs(lines[0]['reward_margin']) < 1e-5
    evaluated = [line for line in lines if line['val_loss'] is not None]
    assert [line['step'] for line in evaluated] == [0, 5, 10, 15, 20]
    margins = [line['val_reward_margin'] for line in evaluated]
    assert margins == sorted(margins) and margins[-1] > margins[1] + 0.1
    assert lines[19]['reward_margin'] > lines[9]['reward_margin'] + 0.1
    assert evaluated[-1]['val_preference_accuracy'] == 1.0
    counted = json.loads((room / 'counted.json').read_text())
    n_bytes = sum(p.nbytes for p in load(room / 'base-qwen3/ckpt.pt').parameters())
    assert counted['models'] == 1 and n_bytes <= counted['bytes'] < 1.5 * n_bytes


# ---- a model from elsewhere, whose tokenizer has no chat tokens


GROWN = [*PLAIN, '--dataset=chats', '--init_from=theirs', '--batch_size=1']


@pytest.fixture(scope='module')
def grown(elsewhere):
    """Runs on it: out_dir=grown-full, of no step, and grown-lora, of some."""
    said = run(elsewhere, 'train.py', *GROWN, '--out_dir=grown-full', '--max_iters=0')
    assert 'begin as the mean of those known: <|im_start|>, <|im_end|>' in said
    flags = ['--lora_rank=2', '--max_iters=30', '--learning_rate=0.02']
    run(elsewhere, 'train.py', *GROWN, *flags, '--out_dir=grown-lora')
    return elsewhere


@pytest.mark.slow
def test_new_tokens_begin_as_the_mean_and_old_ones_stay(grown):
    before = huggingface.load(str(grown / 'theirs'))['model']['transformer.wte.weight']
    saved = checkpoint.load(str(grown / 'grown-full/ckpt.pt'))
    assert saved['model_args']['vocab_size'] == 280 == len(before) + 2
    for name in ('transformer.wte.weight', 'lm_head.weight'):
        rows = saved['model'][name]
        assert torch.equal(rows[:278], before)
        torch.testing.assert_close(rows[278:], before.mean(dim=0).expand(2, -1))


def test_adapters_train_the_rows_of_new_tokens_and_bring_them_back(grown):
    before = huggingface.load(str(grown / 'theirs'))['model']['transformer.wte.weight']
    own = checkpoint.load(str(grown / 'grown-lora/ckpt.pt'))['model']['transformer.wte.lora_rows']
    assert own.shape == (2, 16) and (own.abs().amax(dim=1) > 0.01).all()
    rows = load(grown / 'grown-lora/ckpt.pt').transformer.wte.weight.detach()
    assert torch.equal(rows[:278], before)
    torch.testing.assert_close(rows[278:], before.mean(dim=0) + own)
    last = metrics(grown / 'grown-lora')[-1]['val_loss']
    by_hand = mean_nats(
        load(grown / 'grown-lora/ckpt.pt'), documents_of(grown / 'data/chats', 'val', 277)
    )
    assert abs(last - by_hand.item()) < 1e-5 and last < metrics(grown / 'grown-lora')[0]['val_loss']


@pytest.mark.slow
@pytest.mark.parametrize('out_dir', ['grown-full', 'grown-lora'])
def test_a_grown_model_says_the_same_here_and_in_transformers(grown, out_dir):
    transformers = pytest.importorskip('transformers')
    start = '<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n'
    flags = ['--temperature=0', '--num_samples=1', '--max_new_tokens=20', '--stop=', '--json']
    said = run(grown, 'sample.py', f'--out_dir={out_dir}', f'--start={start}', *flags)
    [ours] = json.loads(said.splitlines()[-1])['samples']
    run(grown, 'export.py', f'--out_dir={out_dir}', '--format=hf')
    folder = str(grown / out_dir / 'hf')
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 280 == model.config.vocab_size
    ids = tokenizer(start, return_tensors='pt')
    theirs = model.generate(**ids, max_new_tokens=20, do_sample=False, eos_token_id=None)[0]
    assert ours == tokenizer.decode(theirs) and ours != start


# ---- the optimizer


@pytest.mark.slow
@pytest.mark.parametrize(
    'flags, chosen, why',
    [
        (['--init_from=scratch'], 'muon', 'the weights are new'),
        ([base('qwen3')], 'muon', 'muon trained these weights from scratch'),
        (['--init_from=theirs', '--dataset=chats'], 'adamw', 'these weights come from elsewhere'),
        ([base('qwen3'), '--lora_rank=4'], 'adamw', 'adapters learn, the weights stay'),
        ([base('qwen3'), '--optimizer=adamw'], 'adamw', ''),
        ([base('qwen3'), '--lora_rank=4', '--optimizer=muon'], 'muon', ''),
    ],
)
def test_one_line_says_which_optimizer_is_taken_and_why(elsewhere, flags, chosen, why):
    said = run(elsewhere, 'train.py', *PLAIN, *flags, '--out_dir=optimizer', '--dry_run')
    lines = [line for line in said.splitlines() if line.startswith('optimizer=')]
    assert lines == ([f'optimizer={chosen}: {why}'] if why else [])
    assert f" optimizer='{chosen}'" in said


@pytest.mark.slow
def test_a_stage_between_does_not_change_who_trained_the_weights(room):
    stage = [*PLAIN, '--lora_rank=4', '--max_iters=2', '--out_dir=between']
    run(room, 'train.py', *stage, base('qwen3'))
    flags = ['--init_from=between/ckpt.pt', '--out_dir=after', '--dry_run']
    assert 'optimizer=muon: muon trained these' in run(room, 'train.py', *PLAIN, *flags)


@pytest.mark.slow
def test_samples_of_a_run_are_asked_in_the_form_of_its_conversations(room):
    flags = ['--sample_ask=1?', '--sample_interval=1', '--max_iters=1', '--out_dir=asked']
    run(room, 'train.py', *PLAIN, base('qwen3'), *flags)
    text = (room / 'asked/samples_step_000001.txt').read_text()
    assert text.startswith('<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n')


@pytest.mark.slow
def test_asking_needs_a_form_and_no_start(elsewhere):
    flags = ['--ask=Hi', '--num_samples=1', '--max_new_tokens=2']
    words = fails(elsewhere, 'sample.py', '--init_from=theirs', *flags)
    assert 'this model has no form for conversations' in words
    flags += ['--init_from=base-qwen3/ckpt.pt', '--start=x']
    assert 'error' not in run(elsewhere, 'sample.py', *flags)


# ---- what a user can get wrong


def message(role, content):
    return dict(role=role, content=content)


@pytest.mark.slow
@pytest.mark.parametrize(
    'record, words',
    [
        (dict(messages=[message('user', 'a')]), 'no message of the assistant'),
        (dict(question='a', answer=' '), 'an empty message'),
        (
            dict(messages=[message('user', 'a'), message('tool', 'b')]),
            "a role 'tool'; roles are system, user and assistant",
        ),
        (dict(prompt='a', chosen='b', rejected='b'), 'chosen and rejected are the same'),
    ],
)
def test_a_record_of_no_use_is_left_out_and_alone_is_an_error(room, record, words):
    script = 'prepare/preferences.py' if 'chosen' in record else 'prepare/chat.py'
    write_records(room / 'wrong.jsonl', [record])
    alone = ['--tokenizer=bytes', '--num_proc=1', '--input=wrong.jsonl', '--name=wrong']
    expected = f'error: wrong.jsonl gives no documents; 1 x {words} (wrong.jsonl:1)\n'
    assert fails(room, script, *alone) == expected
    assert not (room / 'data/wrong').exists()
    write_records(room / 'wrong.jsonl', [pair(60) if 'chosen' in record else talk(5, 5), record])
    val = 'val-pairs.jsonl' if 'chosen' in record else 'val.jsonl'
    said = run(room, script, *alone, f'--val={val}')
    assert f'left out: 1 x {words} (wrong.jsonl:2)' in said
    shutil.rmtree(room / 'data/wrong')


@pytest.mark.slow
@pytest.mark.parametrize(
    'flags, words',
    [
        (DPO[:1], 'data/talks has no pairs of chosen and rejected, which objective=dpo learns'),
        (DPO[1:], 'data/pairs has preferences, of which half would be learned by mistake'),
        (['--lora_rank=17'], 'lora_rank=17 is above the width of attn.c_attn, which is 16'),
        (['--init_from=scratch', '--lora_rank=4'], 'lora_rank adds to weights that are there'),
        (
            ['--lora_rank=4', '--out_dir=base-qwen3'],
            'base-qwen3 has the weights that are begun with',
        ),
        (['--quantize_base=nf4'], 'adapters beside them learn, by --lora_rank=8'),
    ],
)
def test_what_cannot_be_trained_is_a_line(room, flags, words):
    assert words in fails(room, 'train.py', *PLAIN, base('qwen3'), '--out_dir=wrong', *flags)
    assert not (room / 'wrong').exists()


@pytest.mark.slow
def test_adapters_do_not_go_on_without_their_rank_or_on_another_base(room):
    (room / 'moved').mkdir()
    shutil.copy(room / 'base-qwen3/ckpt.pt', room / 'moved/ckpt.pt')
    shutil.copy(room / 'base-qwen3/tokenizer.json', room / 'moved/tokenizer.json')
    flags = ['--init_from=moved/ckpt.pt', '--lora_rank=4', '--out_dir=lora', '--max_iters=1']
    run(room, 'train.py', *PLAIN, *flags)
    before = (room / 'lora/ckpt.pt').read_bytes()
    resume = ['train.py', '--init_from=resume', '--out_dir=lora', '--max_iters=2']
    assert 'lora_rank=0 (it has ' in fails(room, *resume, '--lora_rank=0')
    assert 'lora_alpha=8.0 (it has 16.0)' in fails(room, *resume, '--lora_alpha=8')
    saved = checkpoint.load(str(room / 'moved/ckpt.pt'))
    saved['model']['transformer.h.0.mlp.c_fc.weight'][0, 0] += 0.01
    checkpoint.save(str(room / 'moved/ckpt.pt'), saved)
    words = 'lora/ckpt.pt was trained on another moved/ckpt.pt than the one that is there'
    assert words in fails(room, *resume)
    fresh = ['--init_from=lora/ckpt.pt', '--out_dir=wrong']
    assert words in fails(room, 'train.py', *PLAIN, *fresh)
    assert (room / 'lora/ckpt.pt').read_bytes() == before


# a sitecustomize.py that hides a package as if it had never been installed
HIDING = """
import sys
from importlib.machinery import PathFinder

class WithoutBitsandbytes:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition('.')[0] != 'bitsandbytes':
            return PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutBitsandbytes
"""


@pytest.mark.slow
def test_four_bits_without_bitsandbytes_are_a_line(room):
    (room / 'hiding').mkdir()
    (room / 'hiding/sitecustomize.py').write_text(HIDING)
    flags = [*PLAIN, base('qwen3'), '--out_dir=wrong', '--lora_rank=4', '--quantize_base=nf4']
    env = dict(PYTHONPATH=str(room / 'hiding'))
    process = start(room, 'train.py', *flags, env=env, own=True)
    _, err = process.communicate(timeout=120)
    words = 'the package bitsandbytes is not installed: pip install -r requirements-qlora.txt'
    assert (process.returncode, err) == (2, f'error: {words}\n')
    assert not (room / 'wrong').exists()


# ---- a real model, on real data


@pytest.fixture(scope='module')
def real(tmp_path_factory):
    """A folder with data/instructions and data/shakespeare in the tokens of stories260k."""
    folder = tmp_path_factory.mktemp('real')
    stories = f'--tokenizer={shared("stories260k")}'
    with open(shared('instructions', 'instruction-data.json')) as f:
        records = json.load(f)[:1000]
    (folder / 'instructions.json').write_text(json.dumps(records))
    with open(shared('tinyshakespeare', 'input.txt')) as f:
        (folder / 'shakespeare.txt').write_text(f.read())
    for script, name in (('chat', 'instructions.json'), ('text', 'shakespeare.txt')):
        flags = [f'--input={name}', f'--name={name.partition(".")[0]}', '--val_fraction=0.05']
        run(folder, f'prepare/{script}.py', *flags, stories, '--num_proc=1')
    return folder


@torch.no_grad()
def nats_of_stories(model, stories, begin):
    """The mean nats a token of stories, ids, behind their beginning."""
    nats = []
    for story in torch.tensor(stories):
        logits, _ = model(story[None, :-1], story[None, 1:])
        nats.append(F.cross_entropy(logits[0, begin - 1 :], story[begin:]))
    return torch.stack(nats).mean().item()


@pytest.mark.slow
@pytest.mark.parametrize('rank', [0, 8])
@pytest.mark.parametrize('dataset', ['instructions', 'shakespeare'])
def test_a_real_model_learns_and_still_tells_stories(real, dataset, rank):
    source = shared('stories260k')
    flags = [f'--init_from={source}', f'--dataset={dataset}', f'--lora_rank={rank}']
    flags += ['--block_size=256', '--max_iters=24', '--warmup_iters=4', '--max_minutes=0']
    flags += ['--eval_interval=1000', '--eval_iters=4', '--sample_interval=0', '--device=cpu']
    run(real, 'train.py', *flags, f'--out_dir={dataset}-{rank}')
    lines = metrics(real / f'{dataset}-{rank}')
    before, after = lines[0]['val_loss'], lines[-1]['val_loss']
    # what the model tells of itself, before and after
    plain, tuned = load(source), load(real / f'{dataset}-{rank}/ckpt.pt')
    tokenizer = load_tokenizer(source)
    prompt = tokenizer.encode_prompt('Once upon a time')
    stories = plain.generate([prompt] * 4, 150, temperature=0.7, seed=1)
    told, tells = (nats_of_stories(m, stories, len(prompt)) for m in (plain, tuned))
    [greedy] = tuned.generate([prompt], 30, temperature=0)
    text = tokenizer.decode(greedy[len(prompt) :])
    assert after < before - 0.5
    assert tells < told + math.log(2)  # its own stories cost it less than twice the perplexity
    assert text.startswith(', there was a little girl named Lily. She loved to ')
