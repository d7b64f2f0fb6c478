"""Tasks with right answers: the forms of a line, the scores of lm-evaluation-harness, mistakes."""

import importlib.util
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import fails, run, shared

from fledge import UserError, checkpoint
from fledge.device import Machine
from fledge.formats import huggingface
from fledge.tasks import (
    Example,
    measures,
    read_task,
    run_task,
    score_ends,
    score_example,
    share_interval,
)
from fledge.tokenizer import train_bpe
from model import GPT, GPTConfig


def write(path, *records):
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    return str(path)


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """Folders that transformers opens: a real model, and GPT-2's architecture at random."""
    transformers = pytest.importorskip('transformers')
    stories, folder = shared('stories260k'), tmp_path_factory.mktemp('models')
    with open(shared('lambada', 'test.jsonl')) as f:
        texts = [json.loads(line)['text'] for line in f][:500]
    tokenizer = train_bpe(texts, 600)
    torch.manual_seed(0)
    args = dict(position='learned', norm='layernorm', activation='gelu_tanh', bias=True)
    args |= dict(qkv_bias=True, qk_norm=False, tie_embeddings=True, dropout=0.0)
    args |= dict(vocab_size=tokenizer.vocab_size, block_size=64, n_layer=2, n_head=2, n_embd=32)
    model = GPT(GPTConfig(**args))
    with torch.no_grad():  # logits of an untrained model are all alike
        for parameter in model.parameters():
            parameter.mul_(8)
    state = dict(model=model.state_dict(), model_args=checkpoint.model_args(model.config))
    checkpoint.save(str(folder / 'ckpt.pt'), state | dict(config={}))
    tokenizer.save(str(folder / 'tokenizer.json'))
    run(folder, 'export.py', '--init_from=ckpt.pt', '--output=gpt2')
    found = {}
    for path in (stories, str(folder / 'gpt2')):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        found[path] = theirs.eval(), transformers.AutoTokenizer.from_pretrained(path)
    return found


@torch.no_grad()
def harness(theirs, tokenizer, context, continuation):
    """lm-evaluation-harness 0.4.13: TemplateLM.loglikelihood, _encode_pair, _loglikelihood_tokens
    of its Hugging Face models."""
    prefix = tokenizer.bos_token_id
    prefix = tokenizer.eos_token_id if prefix is None else prefix
    if context == '':
        before = [prefix]
        behind = tokenizer.encode(continuation, add_special_tokens=False)
        if behind[0] == prefix:
            before, behind = behind[:1], behind[1:]
    else:
        n_spaces = len(context) - len(context.rstrip())
        if n_spaces > 0:
            continuation = context[-n_spaces:] + continuation
            context = context[:-n_spaces]
        before = tokenizer.encode(context)
        behind = tokenizer.encode(context + continuation)[len(before) :]
    longest = theirs.config.max_position_embeddings
    ids = torch.tensor((before + behind)[-(longest + 1) :][:-1])
    logs = theirs(ids[None]).logits[0].log_softmax(dim=-1)[-len(behind) :]
    greedy = logs.argmax(dim=-1).tolist() == behind
    return logs[range(len(behind)), behind].sum().item(), greedy


def ours(path, tmp_path, *records):
    """What run_task gives for each record alone: a list of its measures."""
    state, _, tokenizer = huggingface.load_with_tokenizer(path, 'out')
    machine, model = Machine('cpu', 'float32'), checkpoint.load_model(state, path)
    machine.wrap(model)
    grouped = [record | dict(group=str(i)) for i, record in enumerate(records)]
    examples = read_task(write(tmp_path / 'task.jsonl', *grouped))
    found = run_task(model.eval(), tokenizer, path, examples, machine, 2048)
    return found, [found['groups'][str(i)] for i in range(len(records))]


@pytest.mark.slow
def test_pairs_get_the_harness_choices(models, tmp_path):
    with open(shared('blimp', 'blimp.jsonl')) as f:
        records = [json.loads(line) for line in f][::33][:200]
    pairs = [dict(good=r['good'], bad=r['bad']) for r in records]
    for path, (theirs, tokenizer) in models.items():
        whole, each = ours(path, tmp_path, *pairs)
        right = 0
        for pair, found in zip(pairs, each, strict=True):
            good, _ = harness(theirs, tokenizer, '', ' ' + pair['good'])
            bad, _ = harness(theirs, tokenizer, '', ' ' + pair['bad'])
            by_length = good / len(pair['good']) >= bad / len(pair['bad'])
            assert found['accuracy'] == (good >= bad)
            assert found['accuracy_norm'] == by_length
            bits = -good / math.log(2) / len(pair['good'].encode())
            assert found['bits_per_byte'] == pytest.approx(bits, rel=1e-4)
            right += good >= bad
        assert whole['accuracy'] == right / 200 and 20 < right < 180


@pytest.mark.slow
def test_last_words_get_the_harness_choices(models, tmp_path):
    with open(shared('lambada', 'test.jsonl')) as f:
        texts = [json.loads(line)['text'] for line in f][:98]
    # words that the real model does say, and spaces in front of the last one
    texts += ['Once upon a time, there was a', 'Lily and her mom went to the  park']
    n_right = []
    for path, (theirs, tokenizer) in models.items():
        _, each = ours(path, tmp_path, *(dict(text=text) for text in texts))
        expected = []
        for text in texts:
            context, _, last = text.rpartition(' ')
            expected.append(harness(theirs, tokenizer, context, ' ' + last))
        for text, found, (log, greedy) in zip(texts, each, expected, strict=True):
            size = len(text.rpartition(' ')[2].encode())
            assert found['accuracy'] == greedy
            assert found['bits_per_byte'] == pytest.approx(-log / math.log(2) / size, rel=1e-4)
        n_right.append(sum(greedy for _, greedy in expected))
    assert n_right[0] > 0
    # longer than the context of 64: the beginning is left out, in both
    assert max(len(tokenizer.encode(text)) for text in texts) > 100


def test_questions_get_the_harness_choices(models, tmp_path):
    choices = ['in the park', 'Mom', 'a very big red ball that bounced', 'sky ☀']
    questions = [f'Where did {name} play?' for name in ('Lily', 'Tom', 'the cat', 'Sue', 'Max')]
    records = [dict(question=q, choices=choices, answer=i % 4) for i, q in enumerate(questions)]
    for path, (theirs, tokenizer) in models.items():
        _, each = ours(path, tmp_path, *records)
        for record, found in zip(records, each, strict=True):
            context = f'Question: {record["question"]}\nAnswer:'
            logs = [harness(theirs, tokenizer, context, f' {c}')[0] for c in choices]
            by_length = np.array(logs) / [len(c) for c in choices]
            assert found['accuracy'] == (np.argmax(logs) == record['answer'])
            assert found['accuracy_norm'] == (np.argmax(by_length) == record['answer'])


def test_a_long_answer_is_compared_by_its_characters():
    """As the harness does it, and not by the three bytes that each of the first ones takes."""
    example = Example('', '', ['☀☀', 'abcd'], 0, '')
    greedy = np.array([False, False])
    assert score_example(example, np.array([2.0, 3.0]), greedy)[:2] == (True, False)
    assert score_example(example, np.array([2.0, 5.0]), greedy)[:2] == (True, True)


LM_EVAL_TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@pytest.mark.slow
def test_the_harness_itself_agrees_on_an_exported_folder(models, tmp_path, monkeypatch):
    if not importlib.util.find_spec('lm_eval'):
        pytest.skip('lm_eval is not installed: pip install lm_eval==0.4.13')
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'hub'))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    import lm_eval

    with open(shared('blimp', 'blimp.jsonl')) as f:
        sentences = [json.loads(line)['good'] for line in f][::67]
    records = []
    for i in range(0, 96, 4):
        choices = sentences[i + 1 : i + 4]
        records.append(dict(question=sentences[i], choices=choices, answer=i % 3))
    path = write(tmp_path / 'tiny.jsonl', *records)
    (tmp_path / 'tiny.yaml').write_text(LM_EVAL_TASK % path)
    for folder in models:
        found, _ = ours(folder, tmp_path, *records)
        theirs = lm_eval.simple_evaluate(
            model='hf',
            model_args=dict(pretrained=folder, dtype='float32', device='cpu'),
            tasks=['tiny'],
            task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path)),
            bootstrap_iters=0,
        )['results']['tiny']
        assert theirs['acc,none'] == pytest.approx(found['accuracy'])
        assert theirs['acc_norm,none'] == pytest.approx(found['accuracy_norm'])


def test_every_form_of_a_line(tmp_path):
    choices, labels = ['one', 'two', 'three'], ['1', '2', '3']
    about = dict(question='How many?')
    same = [
        about | dict(choices=choices, answer=1),
        about | dict(choices=choices, answer='B'),
        about | dict(choices=choices, answer='two'),
        about | dict(choices=choices, label='1'),
        about | dict(choices=dict(text=choices, label=labels), answerKey='2'),
        about | dict(choices=dict(text=choices, label=list('ABC')), answerKey='B'),
        about
        | dict(
            choices=[dict(text=t, label=i) for t, i in zip(choices, labels, strict=True)],
            answerKey='2',
        ),
    ]
    for example in read_task(write(tmp_path / 'same.jsonl', *same)):
        assert example.context == 'Question: How many?\nAnswer:'
        assert example.answers == choices and example.right == 1

    def one(**record):
        [example] = read_task(write(tmp_path / 'one.jsonl', record))
        return example.context, example.answers, example.right, example.group

    assert one(goal='Sit', sol1='a', sol2='b', label=1) == (
        'Question: Sit\nAnswer:',
        ['a', 'b'],
        1,
        '',
    )
    # a number among choices that are numbers counts from 0
    assert one(**about, choices=['1', '2', '0'], answer=1, subject='maths')[2:] == (1, 'maths')
    assert one(**about, choices=['1', '2', '0'], answer='0')[2] == 2
    assert one(ctx='She', endings=['ran.', 'fell.'], label='1') == ('She', ['ran.', 'fell.'], 1, '')
    raw = dict(ctx='-', ctx_a='A man [title] sits.', ctx_b='he', activity_label='Rowing')
    assert one(**raw, endings=['[step] rows  on.', 'sinks.'], label=0)[:2] == (
        'Rowing: A man. sits. He',
        [' rows on.', 'sinks.'],
    )
    assert one(text='a b  c') == ('a b ', ['c'], 0, '')
    assert one(sentence_good='x', sentence_bad='y', phenomenon=3) == ('', ['x', 'y'], 0, '3')


@pytest.mark.parametrize(
    'line, words',
    [
        ('{"text": "a b"', 'is no valid JSON'),
        ('\xff', 'is no valid JSON'),
        ('{"text": "a \\ud800"}', 'is no valid JSON'),
        ('{"question": "?", "choices": [], "answer": 0}', 'has no list of choices'),
        ('{"question": "?", "choices": "ab", "answer": 0}', 'has no list of choices'),
        ('{"question": null, "choices": ["a", "b"], "answer": 0}', 'is of no known form'),
        ('[1]', 'is no JSON object'),
        ('{"words": "a b"}', 'is of no known form'),
        ('{"good": "a"}', 'is of no known form'),
        ('{"question": "?", "choices": ["a", "b"]}', 'is of no known form'),
        ('{"question": "?", "choices": 3, "answer": 0}', 'is of no known form'),
        ('{"question": "?", "choices": ["a", "b"], "answer": 2}', 'none of its 2 choices'),
        ('{"question": "?", "choices": ["a", "b"], "answer": -1}', 'none of its 2 choices'),
        ('{"question": "?", "choices": ["a", "b"], "answer": true}', 'none of its 2 choices'),
        ('{"question": "?", "choices": ["a", "b"], "answer": "C"}', 'none of its 2 choices'),
        ('{"question": "?", "choices": ["a", ""], "answer": 0}', 'an answer is empty'),
        ('{"question": "?", "choices": ["a", 1], "answer": 0}', 'must be texts'),
        ('{"text": "a b "}', 'an answer is empty'),
    ],
)
def test_a_bad_line_is_named(line, words, tmp_path):
    path = tmp_path / 'bad.jsonl'
    path.write_bytes(b'{"text": "a b"}\n\n' + line.encode('latin-1') + b'\n')
    with pytest.raises(UserError, match=f'bad.jsonl, line 3.*{words}'):
        read_task(str(path))


@pytest.mark.slow
def test_missing_and_empty_files(tmp_path):
    (tmp_path / 'empty.jsonl').write_text('\n')
    assert 'empty.jsonl is empty' in fails(tmp_path, 'evaluate.py', '--tasks=empty.jsonl')
    words = fails(tmp_path, 'evaluate.py', '--tasks=gone.jsonl')
    assert words == 'error: gone.jsonl: No such file or directory\n'


def test_an_answer_beyond_the_context(models, tmp_path):
    path = list(models)[1]
    with pytest.raises(UserError, match='task.jsonl, line 1: an answer is .* context .* is 64'):
        ours(path, tmp_path, dict(good='a ' * 200, bad='b'))


@pytest.mark.slow
def test_broken_weights_have_no_choices(models, tmp_path):
    state = huggingface.load(next(iter(models)))
    state['model']['transformer.ln_f.weight'][0] = float('nan')
    torch.save(state | dict(folder=None), tmp_path / 'broken.pt')
    shutil.copyfile(f'{next(iter(models))}/tokenizer.json', tmp_path / 'tokenizer.json')
    write(tmp_path / 'pair.jsonl', dict(good='a', bad='b'))
    for flag in ('--tasks=pair.jsonl', '--prompts', '--speed'):
        words = fails(tmp_path, 'evaluate.py', '--init_from=broken.pt', '--device=cpu', flag)
        assert 'the weights of ' in words and ' are broken' in words


@pytest.mark.slow
def test_rows_of_any_lengths_score_as_each_alone(models):
    path = next(iter(models))
    state, _, _ = huggingface.load_with_tokenizer(path, 'out')
    model, machine = checkpoint.load_model(state, path).eval(), Machine('cpu', 'float32')
    rng = np.random.default_rng(0)
    rows = []
    for length in rng.integers(2, 600, 40).tolist():  # some longer than the context of 512
        ids = rng.integers(3, 512, length).tolist()
        rows.append((ids, int(rng.integers(1, min(length, 512)))))
    together, _ = score_ends(model, machine, rows, 1500)
    for (ids, n), nats in zip(rows, together, strict=True):
        x = torch.tensor(ids[-513:])
        logs = model(x[None, :-1], x[None, 1:])[0][0].log_softmax(dim=-1)
        alone = -logs[range(len(x) - 1), x[1:]][-n:].sum().item()
        assert nats == pytest.approx(alone, rel=1e-4)


def test_intervals():
    low, high = share_interval(0.0, 100)
    assert low == 0 and high == pytest.approx(0.0370, abs=1e-4)  # Wilson's, by hand
    for n in range(1, 100):
        assert share_interval(0.0, n)[0] == 0 and share_interval(1.0, n)[1] == 1
    assert share_interval(0.5, 100) == pytest.approx([0.4038, 0.5962], abs=1e-4)
    found = measures([(True, False, 1.0), (False, False, 2.0), (True, True, 3.0)])
    assert found['accuracy'] == pytest.approx(2 / 3)
    assert found['accuracy_norm'] == pytest.approx(1 / 3)
    half = 1.96 / math.sqrt(3)
    assert found['bits_per_byte_interval'] == pytest.approx([2 - half, 2 + half])
    assert measures([(True, True, 1.0)])['bits_per_byte_interval'] is None


@pytest.mark.slow
def test_models_side_by_side(models, tmp_path):
    stories, gpt2 = models
    write(tmp_path / 'words.jsonl', *(dict(text=f'Once upon a {w}') for w in ('time', 'hill')))
    write(tmp_path / 'pairs.jsonl', dict(good='She runs.', bad='She run.', phenomenon='verbs'))
    flags = ['--tasks=words.jsonl,pairs.jsonl', '--json', '--device=cpu', '--dtype=float32']
    out = run(tmp_path, 'evaluate.py', f'--init_from={gpt2}', *flags)
    alone = json.loads(out.splitlines()[-1])
    assert list(alone) == ['tasks'] and 'loss' not in out
    both = run(tmp_path, 'evaluate.py', f'--init_from={gpt2},{stories}', *flags)
    first, second = json.loads(both.splitlines()[-1])['models']
    assert first == dict(model=gpt2) | alone and second['model'] == stories
    assert second['tasks']['words.jsonl']['accuracy'] == 0.5  # there was a time, not a hill
    assert list(second['tasks']['pairs.jsonl']['groups']) == ['verbs']
    [row] = [line for line in both.splitlines() if line.startswith('words.jsonl accuracy ')]
    assert '0.5 (0.09453 to 0.9055)' in row
    with open(f'{gpt2}/tasks.png', 'rb') as f:
        assert f.read(4) == b'\x89PNG'
