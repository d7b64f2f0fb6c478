"""sample.py, as a person runs it."""

import json
import re
import shutil
import subprocess

import pytest
import torch
from conftest import ROOT, TINY, fails, python, run, start, write_tiny

from fledge import checkpoint
from model import sample_token


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')
    write_tiny(folder / 'data' / 'tiny')
    run(folder, 'train.py', *TINY, '--max_iters=30')
    return folder


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_does_nothing_is_said(trained):
    run(trained, 'sample.py', '--stop=', '--start=0', '--num_samples=1', '--max_new_tokens=3')
    flags = ['--init_from=out/ckpt.pt', '--out_dir=nowhere', '--temperature=0', '--top_k=3']
    process = start(trained, 'sample.py', '--start=0', '--num_samples=1', *flags)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 and 'without effect at temperature=0: top_k' in err
    assert 'without effect beside --init_from: out_dir' in err
    flags = ['--start=0', '--attention=a.png']
    process = start(trained, 'sample.py', '--prompts=p.txt', '--output=p.json', *flags)
    assert (
        'without effect beside --prompts: attention, start' in process.communicate(timeout=120)[1]
    )
    for flags, words in (
        (['--start=0', '--attention=a.png', '--top_p=0.5', '--json'], '--attention: json, top_p'),
        (['--chat', '--num_beams=2', '--ask=0'], '--chat: ask, num_beams'),
    ):
        process = start(trained, 'sample.py', *flags, stdin=subprocess.DEVNULL)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0 and f'without effect beside {words}\n' in err
    flags = ['--start=0', '--num_samples=2', '--length_penalty=2', '--system=x']
    process = start(trained, 'sample.py', *flags, '--num_beams=2', '--max_new_tokens=1', '--seed=3')
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 and err.startswith(
        'without effect with num_beams=2: num_samples, seed\n'
        'without effect without --ask or --chat: system\n'
    )


def greedy(trained, *flags):
    """The continuation of 012 by some tokens, and the last line of output."""
    flags = ('--temperature=0', '--num_samples=1', '--max_new_tokens=20', '--json', *flags)
    last = json.loads(run(trained, 'sample.py', *flags).splitlines()[-1])
    return last['samples'][0], last


@pytest.mark.slow
def test_a_prompt_comes_by_a_flag_a_file_or_standard_input(trained):
    text, _ = greedy(trained, '--start=012')
    (trained / 'prompt.txt').write_text('012')
    assert greedy(trained, '--start=FILE:prompt.txt')[0] == text
    process = subprocess.run(
        [python(), f'{ROOT}/sample.py', '--start=-', '--temperature=0', '--num_samples=1']
        + ['--max_new_tokens=20'],
        input=b'012',
        cwd=trained,
        capture_output=True,
    )
    assert process.stdout.decode() == f'{text}\n---------------\n'
    speed = r'prompt: 3 tokens, [\d,]+ tokens/s; generated: 20 tokens, [\d,]+ tokens/s\n'
    assert re.fullmatch(speed, process.stderr.decode())


@pytest.mark.slow
def test_stop_texts(trained):
    text, free = greedy(trained, '--start=012')
    assert free['finish_reasons'] == ['length'] and free['tokens'] == [20]
    stop = text[10:12]
    before = '012' + text[3:].partition(stop)[0]
    for flag in (f'--stop={stop}', f'--stop={json.dumps(["never", stop])}'):
        cut, last = greedy(trained, '--start=012', flag)
        assert cut == before and last['finish_reasons'] == ['stop']
    assert 'is no list of texts' in fails(trained, 'sample.py', '--stop=[1]')


@pytest.mark.slow
def test_penalties(trained):
    text, _ = greedy(trained, '--start=012')
    assert greedy(trained, '--start=012', '--frequency_penalty=0.0')[0] == text
    changed, _ = greedy(trained, '--start=012', '--presence_penalty=50')
    new = changed[3:]
    assert len(set(new)) == len(new) == 20  # none twice


def write_prompts(trained):
    lines = ['012', '34', '', '5', '67890123', '0', '1']
    (trained / 'prompts.txt').write_text('\n'.join(lines))
    return [line for line in lines if line]


@pytest.mark.slow
def test_a_file_of_prompts(trained):
    lines = write_prompts(trained)
    flags = ['--prompts=prompts.txt', '--max_new_tokens=9', '--temperature=0', '--dtype=float32']
    assert 'go together' in fails(trained, 'sample.py', *flags)
    for name in ('a.jsonl', 'a.json', 'a.txt'):
        out = run(trained, 'sample.py', *flags, f'--output={name}', '--batch_size=3')
        assert out == f'{name}: 6 prompts answered\n'
        settings = json.loads((trained / f'{name}.settings.json').read_text())
        assert settings['temperature'] == 0 and settings['model'] == 'out/ckpt.pt'
    results = json.loads((trained / 'a.json').read_text())
    by_line = [json.loads(line) for line in (trained / 'a.jsonl').read_text().splitlines()]
    assert results == by_line and [r['prompt'] for r in results] == lines
    texts = (trained / 'a.txt').read_text().split('\n---------------\n')[:-1]
    for line, text, result in zip(lines, texts, results, strict=True):
        alone = run(trained, 'sample.py', f'--start={line}', '--num_samples=1', *flags[1:])
        assert alone == f'{text}\n---------------\n' and text == line + result['samples'][0]
    assert 'is there already' in fails(trained, 'sample.py', *flags, '--output=a.json')
    assert not list(trained.glob('*.part')) and not list(trained.glob('*.tmp'))


@pytest.mark.slow
def test_an_interrupted_file_of_prompts_goes_on(trained):
    write_prompts(trained)
    flags = ['--prompts=prompts.txt', '--max_new_tokens=9', '--num_samples=2']
    run(trained, 'sample.py', *flags, '--output=whole.json')
    whole = json.loads((trained / 'whole.json').read_text())
    assert len(set(whole[0]['samples'])) == 2
    # as a run leaves it that was killed within a line
    settings = json.loads((trained / 'whole.json.settings.json').read_text())
    prompts = [result['prompt'] for result in whole]
    lines = [
        dict(settings=settings, prompts=prompts),
        [4, whole[4]],
        [1, whole[1] | {'samples': 2}],
    ]
    part = trained / 'rest.json.part'
    part.write_text(''.join(json.dumps(line) + '\n' for line in lines) + '[2, {"prom')
    others = fails(trained, 'sample.py', *flags, '--output=rest.json', '--seed=2')
    assert 'was begun with other settings or prompts' in others and part.exists()
    part.with_name('own.json.part').write_text('{"a user\'s own file": \n')
    others = fails(trained, 'sample.py', *flags, '--output=own.json')
    assert 'was begun with other settings or prompts' in others
    out = run(trained, 'sample.py', *flags, '--output=rest.json', '--json').splitlines()
    assert out[0] == 'rest.json: 4 prompts answered'
    assert json.loads(out[1]) == dict(output='rest.json', answered=4)
    rest = json.loads((trained / 'rest.json').read_text())
    assert rest[1]['samples'] == 2 and rest[:1] + rest[2:] == whole[:1] + whole[2:]


@pytest.mark.slow
def test_bad_files_of_prompts(trained):
    (trained / 'empty.txt').write_text('\n\n')
    (trained / 'broken.jsonl').write_text('{"prompt": "0"}\n{"prompt": 1}\n')
    (trained / 'binary.txt').write_bytes(b'\xff\xfe\x80')
    for flags, words in (
        (['--prompts=nowhere.txt', '--output=b.txt'], 'cannot read the prompts: nowhere.txt'),
        (['--prompts=empty.txt', '--output=b.txt'], 'holds no prompts'),
        (['--prompts=broken.jsonl', '--output=b.txt'], 'broken.jsonl, line 2 has no prompt'),
        (['--prompts=binary.txt', '--output=b.txt'], 'is no UTF-8 text'),
        (['--prompts=prompts.txt', '--output=b.csv'], 'ends in none of .jsonl, .json, .txt'),
        (['--prompts=prompts.txt', '--output=nowhere/b.txt'], 'cannot write nowhere/b.txt'),
        (['--prompts=prompts.txt', '--output=full.txt'], 'No space left on device'),
    ):
        write_prompts(trained)
        if 'full' in flags[1] and not (trained / 'full.txt.part').is_symlink():
            (trained / 'full.txt.part').symlink_to('/dev/full')
        assert words in fails(trained, 'sample.py', *flags, '--max_new_tokens=3')
    assert not (trained / 'b.txt').exists()


@pytest.mark.slow
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


@pytest.mark.slow
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
    write_prompts(trained)
    words = fails(trained, 'sample.py', '--out_dir=nan', '--prompts=prompts.txt', '--output=n.json')
    assert 'no token can be chosen by them; what is done is kept' in words


@pytest.mark.parametrize('temperature', [0, 1e-50, 1.0])
def test_a_masked_token_is_not_chosen_and_an_infinite_one_is_refused(temperature):
    infinity, draws = float('inf'), torch.full((1, 1), 0.5)

    def choose(*logits):
        return sample_token(torch.tensor([logits]), draws, temperature).item()

    assert choose(-infinity, 2.0, -infinity) == 1
    for logits in ([0.0, infinity, 1.0], [-infinity] * 3, [0.0, float('nan'), 1.0]):
        with pytest.raises(ValueError, match='the logits are not finite'):
            choose(*logits)
