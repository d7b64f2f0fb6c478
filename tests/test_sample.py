"""sample.py, as a person runs it."""

import json
import re
import shutil

import pytest
import torch
from conftest import TINY, fails, run, start, write_tiny

from fledge import checkpoint
from model import sample_token


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')
    write_tiny(folder / 'data' / 'tiny')
    run(folder, 'train.py', *TINY, '--max_iters=30')
    return folder


def test_samples_continue_the_prompt(trained):
    out = run(
        trained, 'sample.py', '--start=012', '--num_samples=3', '--max_new_tokens=40', '--json'
    )
    samples = out.split('---------------\n')
    assert (
        len(samples) == 4
        and all(s.startswith('012') for s in samples[:3])
        and len(set(samples[:3])) == 3
    )
    last = json.loads(samples[3])
    assert (
        last['start'] == '012'
        and last['samples'] == [s[:-1] for s in samples[:3]]
        and last['tokens'] == [40] * 3
    )


def test_flags_of_sampling(trained):
    def one(*flags):
        return run(
            trained, 'sample.py', '--start=012', '--num_samples=1', '--max_new_tokens=30', *flags
        )

    assert one() == one() != one('--seed=2')
    assert (
        one('--temperature=0') == one('--top_k=1') == one('--top_p=0.00001') == one('--min_p=1.0')
    )
    (trained / 'prompt.txt').write_text('34\n5')
    assert one('--start=FILE:prompt.txt').startswith('34\n5')
    assert one('--init_from=out/best.pt', '--dtype=float32').startswith('012')


def test_a_run_samples_without_its_data(trained, tmp_path):
    run(
        tmp_path,
        'sample.py',
        f'--out_dir={trained}/out',
        '--start=1',
        '--num_samples=1',
        '--max_new_tokens=5',
    )
    run(
        trained / 'out',
        'sample.py',
        '--init_from=ckpt.pt',
        '--start=1',
        '--num_samples=1',
        '--max_new_tokens=5',
    )


def test_what_does_nothing_is_said(trained):
    words = 'is no special token of this tokenizer'
    assert words in fails(trained, 'sample.py', '--stop=###', '--num_samples=1')
    run(trained, 'sample.py', '--stop=', '--start=0', '--num_samples=1', '--max_new_tokens=3')
    flags = ['--init_from=out/ckpt.pt', '--out_dir=nowhere', '--temperature=0', '--top_k=3']
    process = start(trained, 'sample.py', '--start=0', '--num_samples=1', *flags)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 and 'without effect at temperature=0: top_k' in err
    assert 'without effect beside --init_from: out_dir' in err


def test_mistakes_are_one_line(trained, tmp_path):
    assert 'no checkpoint at out/ckpt.pt' in fails(tmp_path, 'sample.py')
    assert "'é' is not in this vocabulary" in fails(trained, 'sample.py', '--start=é')
    assert 'cannot read the prompt' in fails(trained, 'sample.py', '--start=FILE:nowhere.txt')
    for flag in ('--top_p=0', '--min_p=2', '--repetition_penalty=0'):
        assert 'must be' in fails(trained, 'sample.py', flag)
    assert 'temperature=-1 must be' in fails(trained, 'sample.py', '--temperature=-1')
    assert re.search(
        'no setting is called .num_sample.; the nearest are num_samples',
        fails(trained, 'sample.py', '--num_sample=1'),
    )
    raw = (trained / 'out' / 'ckpt.pt').read_bytes()
    (tmp_path / 'cut.pt').write_bytes(raw[: len(raw) // 2])
    assert 'cut short' in fails(tmp_path, 'sample.py', '--init_from=cut.pt')
    state = checkpoint.load(str(trained / 'out' / 'ckpt.pt'))
    state['config'] = re.compile('x')  # a class that plain tensors do not need
    torch.save(state, tmp_path / 'odd.pt')
    assert 'carries pickled code' in fails(tmp_path, 'sample.py', '--init_from=odd.pt')


@pytest.mark.parametrize('temperature', [0, 0.8])
def test_nothing_is_chosen_by_logits_that_are_not_finite(temperature, trained):
    state = checkpoint.load(str(trained / 'out/ckpt.pt'))
    state['model']['transformer.ln_f.weight'][0] = float('nan')
    (trained / 'nan').mkdir(exist_ok=True)
    torch.save(state, trained / 'nan/ckpt.pt')
    shutil.copy(trained / 'out/tokenizer.json', trained / 'nan')
    words = fails(trained, 'sample.py', '--out_dir=nan', f'--temperature={temperature}')
    assert (
        words == 'error: nan/ckpt.pt: the logits are not finite: no token can be chosen by them\n'
    )


@pytest.mark.parametrize('temperature', [0, 1e-50, 1.0])
def test_a_masked_token_is_not_chosen_and_an_infinite_one_is_refused(temperature):
    infinity, draws = float('inf'), torch.full((1, 1), 0.5)

    def choose(*logits):
        return sample_token(torch.tensor([logits]), draws, temperature).item()

    assert choose(-infinity, 2.0, -infinity) == 1
    for logits in ([0.0, infinity, 1.0], [-infinity] * 3, [0.0, float('nan'), 1.0]):
        with pytest.raises(ValueError, match='the logits are not finite'):
            choose(*logits)
