"""From pairs to targets: training, evaluation, samples, pictures, of the scripts themselves."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import ROOT, fails, metrics, run

from fledge import checkpoint
from fledge.attention import attention_of
from fledge.documents import Documents, open_split
from fledge.generation import Sampling
from fledge.targets import measure_targets
from fledge.tokenizer import load_tokenizer

CONFIG = os.path.join(ROOT, 'config/copy_task.py')
SMALL = ['--max_iters=20', '--n_embd=32', '--eval_interval=10', '--sample_interval=20']
SMALL += ['--sample_tokens=5', '--device=cpu', '--warmup_iters=2', '--log_interval=1']


def last_json(out):
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope='module')
def copies(tmp_path_factory):
    """A folder in which the README's quick start has run, with half of its steps and width."""
    folder = tmp_path_factory.mktemp('copies')
    out = run(
        folder,
        'train.py',
        CONFIG,
        '--max_iters=400',
        '--n_embd=64',
        '--n_head=4',
        '--n_layer=2',
    )
    assert 'data/copy_task' in out
    samples = next(folder.glob('out-copy-task/samples_step_*400.txt')).read_text()
    assert 'transformer>transformer<|endoftext|>\n' in samples
    return folder


@pytest.mark.slow
def test_it_copies_what_it_has_not_seen(copies):
    found = last_json(run(copies, 'evaluate.py', '--out_dir=out-copy-task', '--json'))
    assert found['exact_match'] >= 0.99 and found['chrf'] > 99 and found['bleu'] is None
    assert 450 < found['examples'] < 550 and found['loss'] < 0.02
    sources = {split: set() for split in ('train', 'val')}
    for split, texts in sources.items():
        data = Documents(str(copies / 'data/copy_task'), split, 32, 64, with_sources=True)
        texts |= {tuple(data.source_and_target(i)[0]) for i in range(data.n_documents)}
    assert len(sources['val']) == found['examples'] and not sources['val'] & sources['train']


@pytest.mark.slow
def test_a_target_that_fills_the_context_is_right_and_what_is_not_said_costs(copies):
    path = str(copies / 'out-copy-task/ckpt.pt')
    model = checkpoint.load_model(checkpoint.load(path), path).eval()
    tokenizer = load_tokenizer(str(copies / 'out-copy-task'))
    data = open_split(str(copies / 'data/copy_task'), 'val', 32, 64, with_sources=True)
    longest = [i for i in range(data.n_documents) if len(data.source_and_target(i)[1]) == 13]
    model.config.block_size = 13  # 12 letters and an end
    ends = (tokenizer.end_of_text,)
    found = measure_targets(model, tokenizer, data, longest, Sampling(temperature=0, ends=ends))
    assert found['exact_match'] > 0.9 and found['examples'] == len(longest) > 20
    stop = Sampling(temperature=0, ends=ends, stop=('a', 'e', 'i'))
    cut = measure_targets(model, tokenizer, data, longest, stop)
    assert cut['exact_match'] < 0.5 and cut['chrf'] < 90


@pytest.mark.slow
def test_a_sample_is_the_target_of_its_prompt(copies):
    of_run = ('--out_dir=out-copy-task', '--temperature=0', '--num_samples=1')
    for start in ('penguin', 'penguin>', ' penguin\n'):
        found = last_json(run(copies, 'sample.py', *of_run, f'--start={start}', '--json'))
        assert found['samples'] == ['penguin'] and found['start'] == start
    options = ('--out_dir=out-copy-task', '--num_beams=3', '--start=penguin')
    assert run(copies, 'sample.py', *options).startswith('penguin\n-----')
    words = ['albatross', 'gull', 'ostrich', 'kiwi', 'toucan']
    (copies / 'words.txt').write_text('\n'.join(words))
    for number, option in enumerate(('--temperature=0', '--num_beams=2')):
        answers = ('--prompts=words.txt', f'--output=answers{number}.jsonl', option)
        run(copies, 'sample.py', '--out_dir=out-copy-task', *answers)
        lines = (copies / f'answers{number}.jsonl').read_text().splitlines()
        assert [json.loads(line)['samples'] for line in lines] == [[word] for word in words]


@pytest.mark.slow
def test_cross_attention_is_a_diagonal(copies):
    path = str(copies / 'out-copy-task/ckpt.pt')
    model = checkpoint.load_model(checkpoint.load(path), path).eval()
    tokenizer = load_tokenizer(str(copies / 'out-copy-task'))
    letters = tokenizer.encode('transformer')
    source = torch.tensor([letters + tokenizer.encode('>')])
    idx = torch.tensor([[tokenizer.end_of_text, *letters]])
    cross = [block.cross_attn for block in model.transformer.h]
    heads = torch.cat(attention_of(model, idx, cross, source))
    diagonal = heads.diagonal(dim1=1, dim2=2)  # each letter, where it is to be said
    assert diagonal.mean(dim=1).max() > 0.8
    out = run(copies, 'sample.py', '--out_dir=out-copy-task', '--start=owl', '--attention=a.png')
    assert 'a.png' in out and (copies / 'a.png').stat().st_size > 10_000


@pytest.mark.slow
def test_what_has_no_place_for_it_says_so_in_a_line(copies):
    of_run = '--out_dir=out-copy-task'
    for form in ('hf', 'gguf', 'onnx', 'peft'):
        line = fails(copies, 'export.py', of_run, f'--format={form}')
        assert f'is an encoder-decoder, for which --format={form} has no place' in line
    assert not list(copies.glob('out-copy-task/hf*'))
    line = fails(copies, 'sample.py', of_run, '--ask=Who are you?')
    assert '--start is its source' in line
    assert 'is an encoder-decoder' in fails(copies, 'sample.py', of_run, '--chat')
    assert 'is an encoder-decoder' in fails(copies, 'serve.py', of_run, '--port=0')
    for flag in ('--speed', '--prompts'):
        line = fails(copies, 'evaluate.py', of_run, flag)
        assert 'measured on sources and targets' in line
    line = fails(copies, 'sample.py', of_run, f'--start={"a" * 40}')
    assert 'the source has 41 tokens, and the model reads 1 to 32' in line
    assert 'character' in fails(copies, 'sample.py', of_run, '--start=Umlaut: ä')


@pytest.mark.slow
def test_in_8_bits_it_copies_too(copies):
    of_run = '--out_dir=out-copy-task'
    out = run(copies, 'export.py', of_run, '--quantize=int8', '--start=owl', '--json')
    path = last_json(out)['output']
    found = last_json(run(copies, 'sample.py', f'--init_from={path}', '--start=heron', '--json'))
    assert 'heron' in found['samples']


@pytest.mark.slow
def test_adapters_learn_another_task(copies):
    """LoRA on all of its layers, cross-attention among them."""
    run(copies, 'prepare/copy_task.py', '--task=reverse', '--name=reverse', '--examples=3000')
    learns = ['--init_from=out-copy-task/ckpt.pt', '--dataset=reverse', '--out_dir=out-reverse']
    learns += ['--lora_rank=8', '--max_iters=30', '--eval_interval=30', '--sample_interval=0']
    run(copies, 'train.py', CONFIG, *learns)
    tensors = checkpoint.load(str(copies / 'out-reverse/ckpt.pt'))['model']
    assert 'transformer.h.1.cross_attn.q_attn.lora_B' in tensors
    assert 'transformer.encoder.1.mlp.c_fc.lora_A' in tensors
    assert all(tensor.any() for tensor in tensors.values())
    losses = [line['val_loss'] for line in metrics(copies / 'out-reverse') if 'val_loss' in line]
    assert losses[-1] < losses[0]
    found = last_json(run(copies, 'evaluate.py', '--out_dir=out-reverse', '--json'))
    assert found['loss'] == pytest.approx(losses[-1], rel=0.05)


@pytest.fixture(scope='module')
def few(tmp_path_factory):
    """A folder with a small copy task, and the config."""
    folder = tmp_path_factory.mktemp('few')
    run(folder, 'prepare/copy_task.py', '--examples=300', '--symbols=abcd', '--max_letters=6')
    return folder


def same_run(a, b):
    a, b = (checkpoint.load(str(path / 'ckpt.pt')) for path in (a, b))
    assert a['iter_num'] == b['iter_num'] == 20
    for name, tensor in a['model'].items():
        assert torch.equal(tensor, b['model'][name]), name


@pytest.mark.slow
def test_a_run_that_stopped_goes_on_bit_for_bit(few):
    more = ['--dropout=0.1', '--gradient_accumulation_steps=2', '--batch_size=4']
    run(few, 'train.py', CONFIG, *SMALL, *more, '--out_dir=whole')
    stopped = ['--max_iters=10', '--lr_decay_iters=20', '--out_dir=stopped']
    run(few, 'train.py', CONFIG, *SMALL, *more, *stopped)
    resume = ['--init_from=resume', '--out_dir=stopped', '--max_iters=20']
    run(few, 'train.py', *resume)
    same_run(few / 'whole', few / 'stopped')


@pytest.mark.slow
def test_settings_that_cannot_be_are_a_line(few):
    config = (CONFIG, *SMALL, '--out_dir=none')
    (few / 'data/text').mkdir(exist_ok=True)
    (few / 'notes.txt').write_text('Some text without any target at all. ' * 200)
    run(few, 'prepare/text.py', '--input=notes.txt', '--name=text', '--tokenizer=bytes')
    line = fails(few, 'train.py', *config, '--dataset=text')
    assert 'data/text is a text without sources and targets' in line
    line = fails(few, 'train.py', *config, '--block_size=4')
    assert 'no source and target' in line and '--block_size=5' in line
    line = fails(few, 'train.py', *config, '--objective=dpo')
    assert 'pairs of chosen and rejected' in line
    assert 'position=' in fails(few, 'train.py', *config, '--position=sine')


@pytest.mark.slow
def test_pairs_are_prepared_as_the_error_says_and_translated(few):
    config = (os.path.join(ROOT, 'config/translate.py'), *SMALL, '--head_dim=8')
    command = fails(few, 'train.py', *config).split('make it with: python ')[1]
    numbers = ['one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine']
    pairs = (
        f'{a} times {b} and {c}\t{c} plus {a} x {b}'
        for a in numbers
        for b in numbers
        for c in numbers
    )
    (few / 'pairs.tsv').write_text('\n'.join(pairs))
    run(few, *command.replace('YOUR_FILES', 'pairs.tsv').split(), '--val_fraction=0.1')
    run(few, 'train.py', *config, '--target_epochs=25', '--n_layer=1')
    for options in ((), ('--num_beams=3', '--length_penalty=0.5')):
        asked = ('--out_dir=out-translate', '--eval_iters=3', '--max_new_tokens=30', '--json')
        found = last_json(run(few, 'evaluate.py', *asked, *options))
        assert 0 < found['chrf'] <= 100 and 0 <= found['bleu'] <= 100 and found['examples'] == 12
    out = run(few, 'sample.py', '--out_dir=out-translate', '--start=two times two and two')
    assert out.count('\n-----') == 10


@pytest.mark.slow
def test_a_decoder_alone_learns_the_same_data(few):
    decoder = ['--n_encoder_layer=0', '--out_dir=decoder', '--norm_first=True', '--max_iters=30']
    run(few, 'train.py', CONFIG, *SMALL, *decoder)
    found = last_json(run(few, 'evaluate.py', '--out_dir=decoder', '--json'))
    assert 0 <= found['exact_match'] < 1 and found['examples'] > 5
    assert found['chrf'] < 100
    asked = ['--out_dir=decoder', '--start=abc', '--temperature=0', '--num_samples=1', '--json']
    with_separator = run(few, 'sample.py', *asked[:1], '--start=abc>', *asked[2:])
    assert (
        last_json(with_separator)['samples'] == last_json(run(few, 'sample.py', *asked))['samples']
    )
    line = fails(few, 'export.py', '--out_dir=decoder', '--format=hf')
    assert 'position=sinusoidal' in line


def test_sources_and_targets_are_those_of_the_documents(few):
    folder = str(few / 'data/copy_task')
    tokenizer = load_tokenizer(folder)
    data = open_split(folder, 'train', 32, 64, seed=1, with_sources=True)
    seen = set()
    for epoch in range(2):
        for row in range(data.n_rows):
            batch = data.rows(epoch * data.n_rows + row, 1)
            documents, sources = batch['documents'][0], batch['source_documents'][0]
            for number in range(documents.max() + 1):
                source = batch['source'][0][sources == number].tolist()
                inputs = batch['inputs'][0][documents == number].tolist()
                targets = batch['targets'][0][documents == number].tolist()
                text = tokenizer.decode(source)
                assert tokenizer.decode(targets) == text[:-1] + '<|endoftext|>' and text[-1] == '>'
                assert inputs == [tokenizer.end_of_text, *targets[:-1]]
                seen.add((epoch, text))
            assert (batch['source'][0][sources < 0] == -1).all()
            assert (batch['targets'][0][documents < 0] == -1).all()
    assert len(seen) == 2 * data.n_documents
    whole = data.rows(0, data.n_rows)
    numbers = np.concatenate([whole['documents'], whole['source_documents']], axis=1)
    assert sorted(set(numbers.ravel().tolist())) == [-1, *range(data.n_documents)]
    assert (whole['targets'] >= 0).sum() == data.n_learned == data.weight(0, data.n_rows)


def test_what_is_longer_than_a_row_is_left_out_and_counted(few):
    folder = str(few / 'data/copy_task')
    everything = open_split(folder, 'train', 32, 64, with_sources=True)
    some = open_split(folder, 'train', 6, 64, with_sources=True)
    lengths = [len(everything.source_and_target(i)[0]) for i in range(everything.n_documents)]
    n_fit = sum(length <= 6 for length in lengths)
    assert 0 < n_fit < len(lengths)
    assert (some.n_documents, some.n_too_long) == (n_fit, len(lengths) - n_fit)
    assert f'{some.n_too_long} left out (longer than a row' in some.summary()
