"""What stands in front of every document: a token such as Llama's <s>, wherever its text goes."""

import json
import math
import shutil

import gguf
import numpy as np
import pytest
import torch
from conftest import run, shared
from torch.nn import functional as F

from fledge import checkpoint
from fledge.formats import huggingface
from fledge.tokenizer import TextStream, common_tokenizer, load_tokenizer
from fledge.tokens import read_bin

STORIES = ['Once upon a time, there was a cat.', 'The dog ran.\nIt sat down.', 'Lily was happy.']
TRAIN = ['--dataset=stories', '--block_size=32', '--batch_size=2', '--device=cpu']
TRAIN += ['--dtype=float32', '--max_iters=2', '--sample_interval=0', '--max_minutes=0']
SMALL = ['--n_layer=1', '--n_head=2', '--n_embd=32', '--head_dim=16']


@pytest.fixture
def folder(tmp_path):
    """A real Llama in base/, whose tokenizer puts <s> (1) in front, and data/stories made by it."""
    shutil.copytree(shared('stories260k'), tmp_path / 'base')
    with open(tmp_path / 'stories.jsonl', 'w') as f:
        f.writelines(
            json.dumps(dict(text=f'{text} {i}')) + '\n' for i in range(20) for text in STORIES
        )
    prepare(tmp_path, 'stories.jsonl')
    return tmp_path


def prepare(folder, path, script='text', name='stories'):
    flags = [f'--input={path}', f'--name={name}', '--tokenizer=base', '--val_fraction=0.3']
    return run(folder, f'prepare/{script}.py', *flags)


def test_every_document_begins_with_it(folder):
    tokenizer = load_tokenizer(str(folder / 'base'))
    assert tokenizer.begin == [1] and tokenizer.end_of_text == 2
    assert json.loads((folder / 'data/stories/meta.json').read_text())['begin'] == [1]
    n_documents = 0
    for split in ('train', 'val'):
        ids = read_bin(str(folder / f'data/stories/{split}.bin'))
        starts = np.flatnonzero(ids == 1)
        assert starts[0] == 0 and np.array_equal(ids[starts[1:] - 1], [2] * (len(starts) - 1))
        n_documents += len(starts)
    assert n_documents == 60
    # a single text is cut in two, which both begin with it
    (folder / 'one.txt').write_text('. '.join(STORIES * 9))
    prepare(folder, 'one.txt', name='one')
    meta = json.loads((folder / 'data/one/meta.json').read_text())
    for split in ('train', 'val'):
        ids = read_bin(str(folder / f'data/one/{split}.bin'))
        assert ids[0] == 1 and list(ids).count(1) == 1
        assert len(ids) == meta['splits'][split]['tokens'] == meta['splits'][split]['learned']
    # a conversation as well
    ids, learned = tokenizer.with_special().encode_chat([dict(role='assistant', content='Hi')])
    assert (ids[0], learned[0]) == (1, 0) and list(ids).count(1) == 1


@pytest.mark.slow
def test_a_model_is_sampled_and_exported_as_it_was_trained(folder):
    run(folder, 'train.py', *TRAIN, *SMALL)
    assert checkpoint.load(str(folder / 'out/ckpt.pt'))['begin'] == [1]
    # data that was prepared before documents began with anything
    meta = json.loads((folder / 'data/stories/meta.json').read_text())
    del meta['begin']
    (folder / 'data/stories/meta.json').write_text(json.dumps(meta))
    out = run(folder, 'evaluate.py', '--init_from=base', '--dataset=stories')
    assert 'do not begin with the tokens that they began with for base' in out
    run(folder, 'train.py', *TRAIN, '--init_from=base', '--out_dir=older')
    assert checkpoint.load(str(folder / 'older/ckpt.pt'))['begin'] == []
    run(folder, 'evaluate.py', '--out_dir=older')
    for run_folder, begin in (('out', [1]), ('older', [])):
        run(folder, 'export.py', f'--out_dir={run_folder}')
        assert load_tokenizer(str(folder / run_folder / 'hf')).begin == begin
        run(folder, 'export.py', f'--out_dir={run_folder}', '--format=gguf')
        fields = gguf.GGUFReader(folder / run_folder / 'model.gguf').fields
        assert fields['tokenizer.ggml.add_bos_token'].contents() == bool(begin)
        run(folder, 'export.py', f'--out_dir={run_folder}', '--format=ckpt')
        _, _, tokenizer = huggingface.load_with_tokenizer(str(folder / run_folder / 'model.pt'), '')
        assert tokenizer.begin == begin
        assert tokenizer.encode_prompt('a')[: len(begin)] == begin


def test_a_prompt_begins_as_a_document_does(folder):
    tokenizer = load_tokenizer(str(folder / 'base'))
    cat = tokenizer.encode('the cat')
    assert tokenizer.encode_prompt('the cat') == [1, *cat]
    assert tokenizer.encode_prompt('<s>the cat')[:1] == [1]
    assert tokenizer.encode_prompt('<s>the cat').count(1) == 1
    assert tokenizer.encode_prompt('<|endoftext|>the cat') == [2, 1, *cat]
    assert tokenizer.encode_prompt('') == [1]
    assert tokenizer.without_begin().encode_prompt('') == [2]


def test_data_of_before_there_was_a_begin_have_none(folder):
    theirs, data = load_tokenizer(str(folder / 'base')), folder / 'data/stories'
    assert common_tokenizer(str(data), theirs, 'base').begin == [1]
    meta = json.loads((data / 'meta.json').read_text())
    del meta['begin']
    (data / 'meta.json').write_text(json.dumps(meta))
    assert common_tokenizer(str(data), theirs, 'base').begin == []
    assert theirs.begin == theirs.as_trained({}).begin == [1]
    # and so have runs on such data, unlike weights from elsewhere
    assert theirs.as_trained(dict(iter_num=5)).begin == []
    assert theirs.as_trained(dict(iter_num=5, begin=[1])).begin == [1]


@pytest.mark.slow
def test_what_is_added_to_a_prompt_keeps_its_space(folder):
    tokenizer = load_tokenizer(str(folder / 'base'))
    for prompt, more in (('the cat', ' sat on'), ('the ca', 't sat'), ('a', 'é 中 b'), ('', 'the')):
        before, whole = tokenizer.encode_prompt(prompt), tokenizer.encode_prompt(prompt + more)
        shared_ids = 0
        while whole[: shared_ids + 1] == before[: shared_ids + 1] and shared_ids < len(before):
            shared_ids += 1
        stream = TextStream(tokenizer, whole[:shared_ids])
        text = ''.join(map(stream.add, whole[shared_ids:])) + stream.end()
        assert (prompt + more).endswith(text) and len(text) >= len(more) - 1
    greedy = ['--temperature=0', '--num_samples=1', '--max_new_tokens=25', '--dtype=float32']
    story = 'Once upon a time, there was a little girl named Lily. She loved to play outside'
    sample = run(folder, 'sample.py', '--init_from=base', '--start=Once upon a time', *greedy)
    assert sample.startswith(story[: len(sample.splitlines()[0])])
    assert sample.startswith('Once upon a time, there was')
    sample = run(folder, 'sample.py', '--init_from=base', '--start=Once upon a', *greedy)
    assert sample.startswith('Once upon a time, there was')


@pytest.mark.slow
def test_bytes_are_the_documents_own(folder):
    """Neither the space that SentencePiece adds nor special tokens count, above or below."""
    flags = [
        '--init_from=base',
        '--dataset=stories',
        '--dtype=float32',
        '--json',
        '--block_size=512',
    ]
    found = json.loads(run(folder, 'evaluate.py', *flags).splitlines()[-1])
    meta = json.loads((folder / 'data/stories/meta.json').read_text())
    assert found['bytes'] == meta['splits']['val']['bytes']
    # all in one row: the nats of the tokens of text
    model = checkpoint.load_model(huggingface.load(str(folder / 'base')), 'base').eval()
    ids = read_bin(str(folder / 'data/stories/val.bin')).astype(np.int64)
    assert len(ids) <= 513
    inputs, targets = torch.tensor(ids[None, :-1]), torch.tensor(ids[None, 1:])
    logits = model(inputs, targets)[0]
    each = F.cross_entropy(logits[0], targets[0], reduction='none')
    nats = each[targets[0] > 2].sum().item()
    assert found['bits_per_byte'] == pytest.approx(nats / math.log(2) / found['bytes'], rel=1e-4)
    assert found['loss'] == pytest.approx(each.mean().item(), rel=1e-4)


@pytest.mark.slow
def test_tokens_beyond_the_embedding_get_rows_of_it(folder):
    talk = [dict(role='user', content='Hi'), dict(role='assistant', content='Ho')]
    with open(folder / 'talks.jsonl', 'w') as f:
        f.writelines(
            json.dumps(dict(messages=[*talk, dict(role='user', content=str(i))])) + '\n'
            for i in range(40)
        )
    prepare(folder, 'talks.jsonl', script='chat', name='talks')
    out = run(folder, 'train.py', '--init_from=base', *TRAIN, '--dataset=talks')
    assert 'begin as the mean of those known: <|im_start|>, <|im_end|>' in out
    saved = checkpoint.load(str(folder / 'out' / 'ckpt.pt'))
    assert saved['model_args']['vocab_size'] == 514 == len(saved['model']['lm_head.weight'])
    # text has none of those tokens, whoever prepared it
    spec = load_tokenizer(str(folder / 'base')).with_special(['<pad>']).spec
    (folder / 'base/tokenizer.json').write_text(json.dumps(spec))
    prepare(folder, 'stories.jsonl', name='padded')
    run(folder, 'train.py', '--init_from=base', *TRAIN, '--dataset=padded')
