"""What models say, measured: prompts side by side, exact match of numbers, speed; mistakes."""

import json
import math
import os
import shutil
from decimal import Decimal

import pytest
import torch
from conftest import fails, run, shared

from fledge import checkpoint
from fledge.device import Machine
from fledge.formats import huggingface
from fledge.generation import Sampling
from fledge.replies import distinct_share, final_number, measure_prompts, read_questions, reply_to
from fledge.tokenizer import train_bpe
from model import GPT, GPTConfig


@pytest.fixture(scope='module')
def stories(tmp_path_factory):
    """A folder with a real model."""
    folder = tmp_path_factory.mktemp('stories')
    shutil.copytree(shared('stories260k'), folder / 'hf', copy_function=shutil.copyfile)
    os.chmod(folder / 'hf', 0o755)
    return folder


def figures(folder, *flags):
    flags = ['--init_from=hf', '--device=cpu', '--dtype=float32', '--json', *flags]
    return json.loads(run(folder, 'evaluate.py', *flags).splitlines()[-1])


@pytest.mark.slow
def test_the_three_prompts(stories):
    found = figures(stories, '--prompts', '--temperature=0', '--max_new_tokens=40')
    assert list(found) == ['prompts']
    first, *others = found['prompts']['generations']
    assert first['prompt'] == 'Once upon a time,' and len(others) == 2
    assert first['text'].startswith(' there was a little girl named Lily. She loved to play')
    assert first['tokens'] == 40 and first['finish_reason'] == 'length'
    assert found['prompts']['mean_length'] == 40 and found['prompts']['ended'] == 0


def test_measures_of_generations_by_hand(stories):
    state, _, tokenizer = huggingface.load_with_tokenizer(str(stories / 'hf'), 'out')
    model, machine = checkpoint.load_model(state, 'hf').eval(), Machine('cpu', 'float32')
    prompts, sampling = ['Lily and Tom', 'One day, a dog', 'The'], Sampling(50, seed=3)
    found = measure_prompts(model, tokenizer, prompts, sampling, machine, 1000)
    nats, count, repeated, words = 0.0, 0, 0.0, []
    ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    for prompt, reply in zip(ids, reply_to(model, tokenizer, ids, sampling), strict=True):
        row = torch.tensor([prompt + reply.ids])
        logs = model(row[:, :-1], row[:, 1:])[0][0].log_softmax(dim=-1)
        behind = range(len(prompt) - 1, row.shape[1] - 1)
        nats -= logs[behind, row[0, len(prompt) :]].sum().item()
        count += len(reply.ids)
        fours = list(zip(*(reply.ids[i:] for i in range(4)), strict=False))
        repeated += (1 - len(set(fours)) / len(fours)) / 3
        words.append(reply.text.split())
    assert found['perplexity'] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert found['repetition'] == pytest.approx(repeated)
    together = sum(words, [])
    assert found['distinct_1'] == len(set(together)) / len(together) < 1
    pairs = [pair for text in words for pair in zip(text, text[1:], strict=False)]
    assert found['distinct_2'] == len(set(pairs)) / len(pairs)
    assert found['distinct_1'] < found['distinct_2'] < found['distinct_3']


def test_shares_of_different_ngrams():
    assert distinct_share(['abab', 'ab'], 1) == 2 / 6
    assert distinct_share(['abab', 'ab'], 2) == 2 / 4  # none goes from one text to another
    assert distinct_share(['a'], 2) == 1


@pytest.mark.parametrize(
    'text, number',
    [
        ('He has 3 apples and 5 pears, so 8.', '8'),
        ('It is $1,234.50 in all', '1234.5'),
        ('16-3=13', '13'),
        ('3 + 4 = 7\n#### 7\nQuestion: 2 + 2', '7'),
        ('#### -12', '-12'),
        ('18.00', '18'),
        ('none', None),
        ('12 ####', None),
    ],
)
def test_the_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_the_answers_of_gsm8k_are_read():
    questions = read_questions(shared('gsm8k', 'test.jsonl'))
    assert len(questions) == 1319 and questions[0][1] == 18
    assert [number for _, number in questions[:5]] == [18, 3, 70000, 540, 20]


def teach(folder, is_chat):
    """A run's folder with a model that has learned to answer two sums by heart."""
    sums = [('What is 2 + 3?', 'It is 5.'), ('What is 4 + 5?', 'It is 8.')]
    documents = [f'Question: {q}\nAnswer: {a}\n' for q, a in sums]
    tokenizer = train_bpe(documents * 9, 300)
    if not is_chat:
        added = [t for t in tokenizer.spec['added_tokens'] if t['content'] == '<|endoftext|>']
        tokenizer = tokenizer.changed(added_tokens=added)
    rows = [tokenizer.encode_prompt(text) + [tokenizer.end_of_text] for text in documents]
    if is_chat:
        rows = []
        for question, answer in sums:
            talk = [dict(role='user', content=question), dict(role='assistant', content=answer)]
            rows.append(tokenizer.encode_chat(talk)[0].tolist())
    torch.manual_seed(0)
    size = dict(n_layer=2, n_head=2, n_embd=64, block_size=128)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, dropout=0.0, **size))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(200):
        for row in rows:
            x = torch.tensor([row])
            model(x[:, :-1], x[:, 1:].contiguous())[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    folder.mkdir()
    state = dict(model=model.state_dict(), model_args=checkpoint.model_args(model.config))
    checkpoint.save(str(folder / 'ckpt.pt'), state | dict(config={}))
    tokenizer.save(str(folder / 'tokenizer.json'))


@pytest.mark.slow
@pytest.mark.parametrize('is_chat', [False, True])
def test_exact_match(is_chat, tmp_path):
    teach(tmp_path / 'out', is_chat)
    with open(tmp_path / 'sums.jsonl', 'w') as f:
        for question, number in (('What is 2 + 3?', 5), ('What is 4 + 5?', 9)):
            f.write(json.dumps(dict(question=question, answer=f'So.\n#### {number}')) + '\n')
    flags = ['--answers=sums.jsonl', '--device=cpu', '--dtype=float32', '--json']
    flags += ['--max_new_tokens=20']
    found = json.loads(run(tmp_path, 'evaluate.py', *flags).splitlines()[-1])['answers']
    texts = [answer['text'].strip() for answer in found['answers']]
    assert texts == ['It is 5.', 'It is 8.']
    assert [answer['right'] for answer in found['answers']] == [True, False]
    assert found['exact_match'] == 0.5 and found['questions'] == 2


@pytest.mark.slow
def test_speed(stories):
    found = figures(stories, '--speed')['speed']
    assert found['prompt_tokens'] == found['new_tokens'] == 255
    expected = 255 / found['time_to_first_token']
    assert found['prefill_tokens_per_second'] == pytest.approx(expected)
    assert found['prefill_tokens_per_second'] > found['decode_tokens_per_second'] > 0


@pytest.mark.slow
def test_models_go_on_side_by_side(stories):
    (stories / 'prompts.txt').write_text('Tom ☀\n\nLily\n')
    (stories / 'prompts.jsonl').write_text('{"prompt": "Tom ☀"}\n{"text": "Lily"}\n')
    flags = ['--device=cpu', '--dtype=float32', '--max_new_tokens=9', '--json']
    one = figures(stories, '--prompts=prompts.jsonl', *flags)
    out = run(stories, 'evaluate.py', '--init_from=hf,./hf', '--prompts=prompts.txt', *flags)
    first, second = json.loads(out.splitlines()[-1])['models']
    assert first['prompts'] == second['prompts'] == one['prompts']
    text = one['prompts']['generations'][1]['text']
    assert f'---------------\nLily\n[hf] {text}\n[./hf] {text}\n' in out


@pytest.mark.slow
def test_a_long_prompt_and_many_tokens_stay_in_the_context(stories):
    (stories / 'long.txt').write_text('Lily ran. ' * 300)
    [reply] = figures(stories, '--prompts=long.txt', '--max_new_tokens=5')['prompts']['generations']
    assert reply['tokens'] == 5
    [reply] = figures(stories, '--prompts=long.txt', '--max_new_tokens=900')['prompts'][
        'generations'
    ]
    assert reply['tokens'] <= 511
    flags = ['--prompts', '--temperature=0']
    whole = figures(stories, *flags, '--max_new_tokens=20')['prompts']['generations']
    longer = figures(stories, *flags, '--max_new_tokens=900')['prompts']['generations']
    for few, many in zip(whole, longer, strict=True):  # the prompt is read in both
        assert many['text'].startswith(few['text']) and many['tokens'] > 20


@pytest.mark.slow
def test_mistakes_are_one_line(stories):
    for name, content in (
        ('empty.txt', b'\n'),
        ('latin.txt', b'caf\xe9\n'),
        ('words.jsonl', b'{"text": "a"}\n{"words": "b"}\n'),
        ('plain.jsonl', b'{"question": "a", "answer": "b"}\n'),
        ('list.jsonl', b'\n[]\n'),
    ):
        (stories / name).write_bytes(content)
    for flag, words in (
        ('--prompts=empty.txt', 'empty.txt holds no prompts'),
        ('--prompts=gone.txt', 'cannot read the prompts: '),
        ('--prompts=latin.txt', 'cannot read the prompts: latin.txt'),
        ('--prompts=words.jsonl', 'words.jsonl, line 2 has no prompt'),
        ('--answers=plain.jsonl', 'plain.jsonl, line 1: its answer has no number'),
        ('--answers=words.jsonl', 'words.jsonl, line 1 has no question and answer'),
        ('--answers=list.jsonl', 'list.jsonl, line 2 is no JSON object'),
        ('--answers=gone.jsonl', 'gone.jsonl: No such file or directory'),
    ):
        assert words in fails(stories, 'evaluate.py', '--init_from=hf', flag)
