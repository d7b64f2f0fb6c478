"""Classification: labels are found in data and learned, and evaluate.py --labels measures them."""

import json
import os
import random
import runpy

import numpy as np
import pytest
import torch
from conftest import ROOT, fails, run, shared, write_tiny

from fledge import checkpoint
from fledge.device import Machine
from fledge.documents import Documents
from fledge.evaluation import evaluate_labels, label_logits
from fledge.labels import find_labels, label_scores, label_tables
from fledge.tokenizer import load_tokenizer
from fledge.tokens import Batch, read_bin

SENTIMENT = os.path.join(ROOT, 'config', 'sentiment.py')
# GPT-2's architecture, which a Hugging Face folder can hold as well as our checkpoints
SMALL = ['--n_layer=1', '--n_head=2', '--n_kv_head=2', '--head_dim=8', '--n_embd=16']
SMALL += ['--position=learned', '--norm=layernorm', '--activation=gelu_tanh', '--qk_norm=False']
SMALL += ['--bias=True', '--n_inner=64', '--block_size=64', '--batch_size=4', '--device=cpu']
SMALL += ['--dtype=float32', '--sample_interval=0', '--warmup_iters=5', '--max_minutes=0']
WORDS = dict(bad=['dull', 'slow', 'flat'], fair=['plain', 'usual', 'odd'], good=['fun', 'fine'])


def write_films(path, n, seed):
    """Texts whose words say which of three labels they have, but for every tenth."""
    draw = random.Random(seed)
    with open(path, 'w') as f:
        for i in range(n):
            label = draw.choice(list(WORDS))
            said = label if i % 10 else draw.choice(list(WORDS))
            text = f'film {i} is {draw.choice(WORDS[said])} and {draw.choice(WORDS[said])}'
            f.write(json.dumps(dict(text=text, label=label)) + '\n')


def figures(folder, *flags):
    out = run(folder, 'evaluate.py', '--labels', '--json', '--dtype=float32', *flags)
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope='module')
def films(tmp_path_factory):
    """data/films with words as labels, and out/ with a model that learned them."""
    folder = tmp_path_factory.mktemp('films')
    write_films(folder / 'train.jsonl', 600, seed=1)
    write_films(folder / 'dev.jsonl', 90, seed=2)
    flags = ['--input=train.jsonl', '--val=dev.jsonl', '--name=films']
    trained_here = ['--tokenizer=train', '--vocab_size=330']
    out = run(folder, 'prepare/classify.py', *flags, *trained_here)
    assert out.endswith('labels: bad, fair, good\n')
    run(folder, 'train.py', '--dataset=films', *SMALL, '--max_iters=150', '--eval_interval=150')
    return folder


@pytest.mark.slow
def test_a_model_learns_classes(films):
    out = run(films, 'evaluate.py', '--labels', '--json', '--dtype=float32')
    found = json.loads(out.splitlines()[-1])
    assert found['label_accuracy'] > 0.85  # of a tenth the words say nothing
    assert list(found['labels']) == ['bad', 'fair', 'good']
    assert sum(map(sum, found['confusion'])) == 90
    assert 'loss' in found and 'accuracy' in found  # what it has without --labels
    tables = label_tables(found)
    assert tables in out
    assert f'label_accuracy {found["label_accuracy"]:.2%}' in tables
    assert (films / 'out/confusion.png').read_bytes().startswith(b'\x89PNG')


def by_hand(folder):
    """For each document of val: the logits of the labels by a forward of it alone, and its own."""
    state = checkpoint.load(str(folder / 'out/ckpt.pt'))
    model = checkpoint.load_model(state, 'ckpt.pt').eval()
    tokenizer = load_tokenizer(str(folder / 'data/films'))
    labels = [tokenizer.encode(f' {word}') for word in WORDS]
    assert all(len(ids) == 1 for ids in labels)
    labels = [ids[0] for ids in labels]
    ids = read_bin(str(folder / 'data/films/val.bin')).astype(np.int64)
    documents = np.split(ids, np.flatnonzero(ids == tokenizer.end_of_text) + 1)[:-1]
    logits, own = [], []
    for document in documents:
        text, label = document[:-2], document[-2]
        with torch.no_grad():
            logits.append(model(torch.from_numpy(text)[None])[0][0, -1, labels])
        own.append(labels.index(label))
    return model, labels, torch.stack(logits), own


def test_logits_are_those_of_each_document_alone(films):
    model, labels, expected, expected_own = by_hand(films)
    data = Documents(str(films / 'data/films'), 'val', 64, model.config.vocab_size)
    assert data.n_rows < 45  # several documents are in a row
    rows = data.evaluation_rows()
    arrays = data.evaluation_batch(rows)
    batch = Batch({name: torch.from_numpy(array) for name, array in arrays.items()})
    with torch.no_grad():
        own, logits = label_logits(model, batch, torch.tensor(labels), model.hidden)
    order = data.documents_of(rows)
    torch.testing.assert_close(logits, expected[order], rtol=1e-4, atol=1e-5)
    assert own.tolist() == [expected_own[i] for i in order]


@pytest.mark.slow
def test_the_table_is_the_one_by_hand(films):
    model, labels, logits, own = by_hand(films)
    expected = np.zeros((3, 3), int)
    for given, label in zip(logits.argmax(dim=1).tolist(), own, strict=True):
        expected[label, given] += 1
    assert expected.trace() < 90  # some are wrong, so that the two axes cannot be swapped unseen
    assert (expected != expected.T).any()
    assert figures(films)['confusion'] == expected.tolist()
    data = Documents(str(films / 'data/films'), 'val', 64, model.config.vocab_size)
    model.train()
    found = evaluate_labels(model, data, Machine('cpu', 'float32'), 7, 0, labels)
    assert (found == expected).all() and model.training
    part = evaluate_labels(model, data, Machine('cpu', 'float32'), 2, 2, labels)
    assert 0 < part.sum() < 90


def test_sentiments_loss_by_hand(films):
    """Each token of a text predicts its label; the label and the end count as much as all of it."""
    state = checkpoint.load(str(films / 'out/ckpt.pt'))
    model = checkpoint.load_model(state, 'ckpt.pt').train()  # which has no dropout
    data = Documents(str(films / 'data/films'), 'val', 64, model.config.vocab_size)
    batch = data.evaluation_batch(data.evaluation_rows()[:3])
    inputs, targets, documents = batch['inputs'], batch['targets'], batch['documents']
    of_text, of_learned = [], []
    for number in range(documents.max() + 1):
        here = documents == number
        ids = torch.from_numpy(inputs[here])
        label, end = targets[here][-2:].tolist()
        with torch.no_grad():
            nats = -model(ids[None], ids[None])[0][0].log_softmax(dim=1)
        of_text += nats[:-2, label].tolist()
        of_learned += [nats[-2, label].item(), nats[-1, end].item()]
    tensors = {name: torch.from_numpy(values) for name, values in batch.items()}
    objective = runpy.run_path(SENTIMENT)['objective']
    expected = np.mean(of_text) + np.mean(of_learned)
    assert objective(model, tensors).item() == pytest.approx(expected, rel=1e-4)
    found = objective(model.eval(), tensors).item()  # what is to be told is the label
    assert found == pytest.approx(np.mean(of_learned), rel=1e-4)


@pytest.mark.slow
def test_sentiments_recipe_learns_classes(films):
    small = ['--n_embd=32', '--block_size=64', '--device=cpu', '--dtype=float32']
    flags = ['--dataset=films', '--target_epochs=12', '--dropout=0.1', '--out_dir=recipe']
    run(films, 'train.py', SENTIMENT, *flags, *small)
    assert figures(films, '--out_dir=recipe')['label_accuracy'] > 0.85


def test_scores_by_hand():
    # of 4 a: 3 a, 1 b; of 6 b: 2 a, 4 b; of 2 c, which nobody was given: both b
    found = label_scores(np.array([[3, 1, 0], [2, 4, 0], [0, 2, 0]]), ['a', 'b', 'c'])
    assert found['label_accuracy'] == 7 / 12
    a, b, c = found['labels'].values()
    assert a == dict(precision=3 / 5, recall=3 / 4, f1=pytest.approx(2 / 3), documents=4)
    assert b == dict(precision=4 / 7, recall=4 / 6, f1=pytest.approx(8 / 13), documents=6)
    assert c == dict(precision=0, recall=0, f1=0, documents=2)
    assert found['macro_f1'] == pytest.approx((2 / 3 + 8 / 13) / 3)
    assert label_tables(found).splitlines()[3:] == [
        'b             0.5714  0.6667  0.6154          6',
        'c             0.0000  0.0000  0.0000          2',
        'the documents of each label (rows), by the label that they were given (columns)',
        '                   a          b          c',
        'a                  3          1          0',
        'b                  2          4          0',
        'c                  0          2          0',
    ]


@pytest.mark.slow
def test_any_model_that_loads(films):
    whole = figures(films)
    run(films, 'export.py')
    assert 'GPT2LMHeadModel' in (films / 'out/hf/config.json').read_text()
    theirs = figures(films, '--init_from=out/hf', '--dataset=films')
    assert theirs['confusion'] == whole['confusion']
    assert (films / 'out/hf/confusion.png').exists()
    adapter = ['--init_from=out/ckpt.pt', '--out_dir=lora', '--lora_rank=2', '--learning_rate=0']
    run(films, 'train.py', '--dataset=films', *SMALL, *adapter, '--max_iters=1', '--decay_lr=False')
    assert figures(films, '--out_dir=lora')['confusion'] == whole['confusion']


@pytest.mark.slow
def test_a_label_that_val_lacks_can_be_given(films):
    rows = (films / 'dev.jsonl').read_text().splitlines()
    (films / 'no_good.jsonl').write_text('\n'.join(r for r in rows if '"good"' not in r))
    flags = ['--input=train.jsonl', '--val=no_good.jsonl', '--name=no_good']
    run(films, 'prepare/classify.py', *flags, '--tokenizer=data/films')
    found = figures(films, '--dataset=no_good')
    assert list(found['labels']) == ['bad', 'fair', 'good']
    assert found['labels']['good']['documents'] == 0


@pytest.mark.slow
def test_a_label_that_is_no_token_is_warned_of_and_refused(films):
    flags = ['--input=train.jsonl', '--val=dev.jsonl', '--name=bytes', '--tokenizer=bytes']
    out = run(films, 'prepare/classify.py', *flags)
    words = "data/bytes: the label ' "
    assert out.splitlines()[-1].startswith(f'warning: {words}')
    assert "' bad' is 4 tokens (' ', 'b', 'a', 'd')" in out or 'is 5 tokens (' in out
    assert 'other words (--labels), another --tokenizer or a larger --vocab_size' in out
    run(films, 'train.py', '--dataset=bytes', *SMALL, '--max_iters=1', '--out_dir=out-bytes')
    assert words in fails(films, 'evaluate.py', '--out_dir=out-bytes', '--labels')


def test_labels_of_sentencepiece_are_tokens(tmp_path):
    """Its tokens begin with the space that a label has in front, and it puts none of its own."""
    source = shared('stories260k')
    texts = [dict(text=f'Once {i}', label=['he', 'she'][i % 2]) for i in range(40)]
    (tmp_path / 'x.jsonl').write_text('\n'.join(map(json.dumps, texts)))
    flags = ['--input=x.jsonl', '--name=x', f'--tokenizer={source}', '--val_fraction=0.3']
    assert 'labels: he, she\n' in run(tmp_path, 'prepare/classify.py', *flags)
    tokenizer, folder = load_tokenizer(source), tmp_path / 'data/x'
    ids = read_bin(str(folder / 'val.bin')).tolist()
    end = ids.index(load_tokenizer(str(folder)).end_of_text, 2)
    assert tokenizer.decode(ids[:end]).removeprefix('<s>').strip().startswith('Once')
    found = find_labels([str(folder / 'val.bin')], load_tokenizer(str(folder)), 'x')
    assert sorted(found.values()) == ['he', 'she']


@pytest.fixture(scope='module')
def tiny(films):
    """A model of plain text, in out-tiny."""
    write_tiny(films / 'data/tiny')
    run(films, 'train.py', '--dataset=tiny', *SMALL, '--max_iters=1', '--out_dir=out-tiny')


def prepare(folder, script, name, records):
    """Make data/NAME of records by a script of prepare/, in the tokens of data/films."""
    (folder / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, records)))
    flags = [f'--input={name}.jsonl', f'--name={name}', '--tokenizer=data/films']
    run(folder, f'prepare/{script}.py', *flags, '--val_fraction=0.3')


@pytest.mark.slow
def test_data_without_labels_is_refused(films, tiny):
    words = fails(films, 'evaluate.py', '--out_dir=out-tiny', '--labels')
    assert 'data/tiny has no labels: prepare/classify.py prepares texts with their labels' in words
    words = fails(films, 'train.py', SENTIMENT, '--dataset=tiny', *SMALL, '--out_dir=never')
    assert 'learns labels, which prepare/classify.py prepares' in words
    talk = [dict(prompt=f'How is film {i}?', completion='fun and fine') for i in range(40)]
    prepare(films, 'chat', 'talk', talk)
    words = fails(films, 'evaluate.py', '--dataset=talk', '--labels')
    assert 'data/talk has no labels' in words


@pytest.mark.slow
def test_pairs_are_refused(films):
    pairs = []
    for i in range(40):
        pairs.append(dict(prompt=f'How is film {i}?', chosen='fun', rejected='dull'))
    prepare(films, 'preferences', 'pairs', pairs)
    words = fails(films, 'evaluate.py', '--dataset=pairs', '--labels')
    assert 'data/pairs has preferences' in words


@pytest.mark.slow
def test_a_single_label_is_refused(films):
    rows = [dict(text=f'film {i}', label='good') for i in range(40)]
    prepare(films, 'classify', 'one', rows)
    words = fails(films, 'evaluate.py', '--dataset=one', '--labels')
    assert 'data/one has the labels good: a classifier needs two at least' in words


@pytest.mark.slow
def test_a_model_that_knows_no_such_tokens_is_refused(films, tiny):
    words = fails(films, 'evaluate.py', '--out_dir=out-tiny', '--dataset=films', '--labels')
    assert 'beyond the vocabulary of 64: the model has no such tokens' in words
