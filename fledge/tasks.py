"""Tasks with right answers, out of JSONL files: which of the answers does a model find likeliest?

They are put, cut into tokens and scored as lm-evaluation-harness 0.4.13 does it (github.com/
EleutherAI/lm-evaluation-harness), so that the numbers compare with published ones. A line is one of

    {"good": ..., "bad": ...}                        BLiMP: two sentences
    {"text": ...}                                    LAMBADA: the last word is the answer
    {"question": ..., "choices": ..., "answer": ...} ARC and its kin; also answerKey, label
    {"ctx": ..., "endings": [...], "label": ...}     HellaSwag
    {"goal": ..., "sol1": ..., "sol2": ..., "label": ...}  PIQA

where choices are texts, {"text", "label"} each, or {"text": [...], "label": [...]}, and an answer
is a number from 0, a label, a letter, or the text. A phenomenon, group, category or subject beside
them puts a line into a group.
"""

import math
import re
from dataclasses import dataclass

import numpy as np
import torch

from fledge import UserError, read_records
from fledge.device import Machine
from fledge.evaluation import score_targets
from fledge.formats.huggingface import special_tokens
from fledge.tokenizer import Tokenizer
from fledge.tokens import Batch
from model import GPT

GROUPS = ('phenomenon', 'group', 'category', 'subject')  # fields that may name a line's group


@dataclass
class Example:
    where: str  # its file and line
    context: str  # what stands before the answers; '': nothing
    answers: list[str]  # a single one is right where greedy decoding says it
    right: int  # which of them
    group: str  # '': none


# ---- files


def read_task(path: str) -> list[Example]:
    """The examples of a JSONL file; UserError for a line that is none."""
    examples = []
    for where, record in read_records(path):
        try:
            context, answers, right = parts_of(record)
            texts = [context, *answers]
        except (KeyError, TypeError, AttributeError):
            raise UserError(
                f'{where} is of no known form: good and bad, text, or question, choices and answer '
                '(fledge/tasks.py lists them)'
            ) from None
        if not answers or not isinstance(answers, list):
            raise UserError(f'{where} has no list of choices')
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f'{where}: its context and its answers must be texts')
        if not all(answer.strip() for answer in answers):
            raise UserError(f'{where}: an answer is empty')
        if right is None:
            raise UserError(f'{where}: its answer is none of its {len(answers)} choices')
        named = [record[name] for name in GROUPS if record.get(name) is not None]
        group = str(named[0]) if named else ''
        examples.append(Example(where, context, answers, right, group))
    return examples


def parts_of(record: dict) -> tuple:
    """The context, the answers and the number of the right one (None: it is none of them).

    What the record has in their places, which may be anything; KeyError, TypeError or
    AttributeError for a record of no known form.
    """
    if 'good' in record:
        return '', [record['good'], record['bad']], 0
    if 'sentence_good' in record:
        return '', [record['sentence_good'], record['sentence_bad']], 0
    if 'goal' in record:
        answers = [record['sol1'], record['sol2']]
        context = 'Question: ' + record['goal'] + '\nAnswer:'
        return context, answers, number_of(record['label'], answers)
    if 'endings' in record:
        return hellaswag(record)
    if 'choices' in record:
        answers, labels = record['choices'], []
        if isinstance(answers, dict):
            answers, labels = answers['text'], answers['label']
        elif all(isinstance(choice, dict) for choice in answers):
            labels = [choice['label'] for choice in answers]
            answers = [choice['text'] for choice in answers]
        field = next((name for name in ('answerKey', 'label') if name in record), 'answer')
        context = 'Question: ' + record['question'] + '\nAnswer:'
        return context, answers, number_of(record[field], answers, labels)
    *before, last = record['text'].split(' ')
    return ' '.join(before), [last], 0


def hellaswag(record: dict) -> tuple:
    """parts_of a record of HellaSwag; its own fields are joined and cleaned as the harness does."""

    def clean(text):
        text = re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. '))
        return text.replace('  ', ' ')

    answers, context = record['endings'], record.get('ctx')
    if 'activity_label' in record:
        context = f'{record["ctx_a"]} {record["ctx_b"].capitalize()}'
        context = clean(f'{record["activity_label"]}: {context}')
        answers = [clean(answer) for answer in answers]
    return context, answers, number_of(record['label'], answers)


def number_of(answer: object, answers: list, labels: list | tuple = ()) -> int | None:
    """Which one an answer means: by its label, from 0, by its text or by its letter; else None."""
    labels = [str(label) for label in labels]
    if str(answer) in labels:
        return labels.index(str(answer))
    numbers = list(range(len(answers)))
    letters = [chr(ord('A') + i) for i in numbers]
    for names in (numbers, answers, letters, [str(i) for i in numbers]):
        if answer in names and type(answer) is not bool:
            return names.index(answer)
    return None


# ---- scores


def prefix_token(tokenizer: Tokenizer, folder: str) -> int:
    """The token that stands before what has no context: what begins a text, else what ends one.

    folder: where the model came from, whose tokenizer_config.json may name them.
    """
    _, texts = special_tokens(tokenizer, folder)
    token = texts.get('bos_token') or texts.get('eos_token')
    return tokenizer.special.get(token, 0)


def encode_answer(
    tokenizer: Tokenizer, prefix: int, context: str, answer: str
) -> tuple[list[int], int]:
    """The ids of a context with an answer behind it, and how many of them are the answer's.

    Spaces at the end of the context count to the answer, as its tokens do that begin with one.
    """
    before = context.rstrip()
    behind = f'{context[len(before) :]} {answer}'
    if before:
        ids = tokenizer.encode_prompt(before + behind)
        return ids, len(ids) - len(tokenizer.encode_prompt(before))
    ids = tokenizer.encode(behind, allow_special=True)
    if ids[:1] != [prefix]:
        ids = [prefix, *ids]
    return ids, len(ids) - 1


@torch.no_grad()
def score_ends(
    model: GPT, machine: Machine, rows: list[tuple[list[int], int]], n_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """The nats that the ends of rows cost, and whether greedy decoding says them: float64, bool.

    rows: [(ids, how many of the last ones are scored)]; no more than the context and a token are
    read, the last ones. Rows of like length are read together, up to n_tokens with their padding.
    The processes of machine share them.
    """
    rows = [(ids[-model.config.block_size - 1 :], n) for ids, n in rows]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    batches = []
    while order:
        n = max(1, n_tokens // len(rows[order[0]][0]))
        batches.append(order[:n])
        order = order[n:]
    nats, misses = np.zeros((2, len(rows)))
    for [here] in machine.batches(batches, 1, 'answers'):
        width = len(rows[here[0]][0]) - 1
        inputs = np.zeros((len(here), width), np.int64)
        targets = np.full((len(here), width), -1, np.int64)
        for row, i in enumerate(here):
            ids, n = rows[i]
            inputs[row, : len(ids) - 1] = ids[:-1]
            targets[row, len(ids) - 1 - n : len(ids) - 1] = ids[-n:]
        batch = machine.move(Batch(inputs=inputs, targets=targets))
        with machine.autocast():
            scores = score_targets(model, batch, machine.hidden(model))
        row_of_each = np.nonzero(targets >= 0)[0]
        nats[here] = np.bincount(row_of_each, scores['nats'].cpu().numpy())
        misses[here] = np.bincount(row_of_each, 1 - scores['correct'].cpu().numpy())
    return sum(machine.gather(nats)), sum(machine.gather(misses)) == 0


def run_task(
    model: GPT,
    tokenizer: Tokenizer,
    folder: str,
    examples: list[Example],
    machine: Machine,
    n_tokens: int,
) -> dict:
    """What a model makes of examples: measures() of all, and `groups`, {group: the same}.

    folder: where the model came from. n_tokens: that are read together. UserError for an answer
    that is longer than the context.
    """
    prefix, rows = prefix_token(tokenizer, folder), []
    for example in examples:
        for answer in example.answers:
            try:
                ids, n = encode_answer(tokenizer, prefix, example.context, answer)
            except UserError as e:  # a character that a vocabulary of characters has not
                raise UserError(f'{example.where}: {e}') from None
            if not 0 < n <= model.config.block_size:
                raise UserError(
                    f'{example.where}: an answer is {n} tokens, and the context of the model is '
                    f'{model.config.block_size}'
                )
            if max(ids) >= model.config.vocab_size:
                raise UserError(f'{example.where}: token {max(ids)} is beyond the vocabulary')
            rows.append((ids, n))
    nats, greedy = score_ends(model, machine, rows, n_tokens)
    if not np.isfinite(nats).all():
        raise UserError('the weights of the model are broken, or need --dtype=float32: loss is NaN')
    scores, first = [], 0
    for example in examples:
        here = slice(first, first + len(example.answers))
        first = here.stop
        scores.append(score_example(example, nats[here], greedy[here]))
    groups = {}
    for example, score in zip(examples, scores, strict=True):
        groups.setdefault(example.group, []).append(score)
    groups.pop('', None)
    return measures(scores) | dict(groups={name: measures(groups[name]) for name in sorted(groups)})


def score_example(
    example: Example, nats: np.ndarray, greedy: np.ndarray
) -> tuple[bool, bool, float]:
    """Whether the right answer is chosen, whether it is by nats a character, its bits per byte."""
    right = example.answers[example.right]
    bits_per_byte = nats[example.right] / math.log(2) / len(right.encode())
    if len(example.answers) == 1:
        return greedy[0], greedy[0], bits_per_byte
    lengths = [len(answer) for answer in example.answers]
    chosen, chosen_by_length = nats.argmin(), (nats / lengths).argmin()
    return chosen == example.right, chosen_by_length == example.right, bits_per_byte


def measures(scores: list[tuple[bool, bool, float]]) -> dict:
    """The means of what score_example() returned, with 95% intervals.

    accuracy; accuracy_norm, where the answer with the fewest nats a character is chosen (of a
    single answer the same); bits_per_byte of the right answer, without the space in front of it,
    the number that tells small models apart (arXiv:2508.13144).
    """
    right, right_norm, bits_per_byte = np.array(scores, np.float64).T
    n, mean = len(scores), float(bits_per_byte.mean())
    bits_interval = None  # nothing is known of one alone
    if n > 1:
        half = 1.96 * float(bits_per_byte.std(ddof=1)) / math.sqrt(n)
        bits_interval = [mean - half, mean + half]
    return dict(
        examples=n,
        accuracy=float(right.mean()),
        accuracy_interval=share_interval(right.mean(), n),
        accuracy_norm=float(right_norm.mean()),
        accuracy_norm_interval=share_interval(right_norm.mean(), n),
        bits_per_byte=mean,
        bits_per_byte_interval=bits_interval,
    )


def share_interval(share: float, n: int) -> list[float]:
    """The 95% interval of a share of n, [low, high] (Wilson 1927): it holds for 0 and 1 as well."""
    z = 1.96
    middle = share + z**2 / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # of 0 and 1 it ends there, which rounding would miss
    low = (middle - half) / (1 + z**2 / n) if share > 0 else 0
    high = (middle + half) / (1 + z**2 / n) if share < 1 else 1
    return [float(low), float(high)]
