"""What a model says, measured: its generations, its answers that are numbers, and its speed.

The model is as sample.py has it: in the type that it computes in, packed on a CPU.
"""

import math
import re
import time
from dataclasses import replace
from decimal import Decimal

import torch

from fledge import UserError, read_records
from fledge.conversation import is_tuned
from fledge.device import Machine
from fledge.formats.huggingface import ends
from fledge.generation import Batch, Reply, Sampling, generate
from fledge.prompts import encode
from fledge.tasks import score_ends, share_interval
from fledge.tokenizer import Tokenizer
from model import GPT

PROMPTS = ['Once upon a time,', 'Solve: (3x + 5 = 11)', 'Write a function add(a, b) {']
AT_ONCE = 16  # replies
NUMBER = re.compile(r'(?<![\d.])-?\d[\d,]*(?:\.\d+)?')


def read_questions(path: str) -> list[tuple[str, Decimal]]:
    """[(question, number)] of a JSONL file in gsm8k's form, whose answers end with #### N."""
    questions = []
    for where, record in read_records(path):
        question, answer = record.get('question'), record.get('answer')
        if not isinstance(question, str) or not isinstance(answer, str):
            raise UserError(f'{where} has no question and answer')
        number = final_number(answer)
        if number is None:
            raise UserError(f'{where}: its answer has no number')
        questions.append((question, number))
    return questions


def final_number(text: str) -> Decimal | None:
    """The number behind the first ####, or else the last one; None: there is none."""
    _, marked, behind = text.partition('####')
    found = NUMBER.findall(behind if marked else text)
    if not found:
        return None
    return Decimal((found[0] if marked else found[-1]).replace(',', ''))


def reply_to(
    model: GPT, tokenizer: Tokenizer, prompts: list[list[int]], sampling: Sampling
) -> list[Reply]:
    """The replies to prompts, lists of token ids, all of them ended.

    None goes beyond the context: of a prompt as many last tokens are kept as leave room for the
    reply, or half of the context, and then the reply is shorter. UserError for a token that the
    model does not have, ValueError for logits that are not finite.
    """
    beyond = max(map(max, prompts))
    if beyond >= model.config.vocab_size:
        raise UserError(f'token {beyond} of a prompt is beyond the vocabulary of the model')
    context = model.config.block_size
    longest_prompt = max(context - sampling.max_new_tokens, context // 2, 1)
    replies = []
    for prompt in prompts:
        prompt = prompt[-longest_prompt:]
        n_new = min(sampling.max_new_tokens, context - len(prompt))
        replies.append(Reply(tokenizer, prompt, replace(sampling, max_new_tokens=n_new)))
    for _ in generate(model, replies, AT_ONCE):
        pass
    return replies


def measure_prompts(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: list[str | list[dict]],
    sampling: Sampling,
    machine: Machine,
    n_tokens: int,
) -> dict:
    """What a model goes on with behind prompts, and what that is like.

    prompts: as of prompts.read_prompts. n_tokens: how many are read together for the perplexity,
    which is under the model itself, without temperature. distinct_1, _2, _3: the share of different
    ones among all n-grams of words (Li et al. 2016, arXiv:1510.03055). repetition: the mean over
    the replies of 1 - different 4-grams of tokens / all of them (seq-rep-4, Welleck et al. 2019,
    arXiv:1908.04319). mean_length in tokens. ended: the share that did so by themselves.
    """
    ids = [encode(prompt, tokenizer) for prompt in prompts]
    replies = reply_to(model, tokenizer, ids, replace(sampling, ends=tuple(ends(tokenizer))))
    words = [reply.text.split() for reply in replies]
    repeated = [1 - distinct_share([reply.ids], 4) for reply in replies]
    rows = [(reply.prompt + reply.ids, len(reply.ids)) for reply in replies]
    nats, _ = score_ends(model, machine, rows, n_tokens)
    lengths = [len(reply.ids) for reply in replies]
    generations = []
    for prompt, reply in zip(prompts, replies, strict=True):
        about = dict(tokens=len(reply.ids), finish_reason=reply.finish_reason)
        generations.append(dict(prompt=prompt, text=reply.text) | about)
    return dict(
        distinct_1=distinct_share(words, 1),
        distinct_2=distinct_share(words, 2),
        distinct_3=distinct_share(words, 3),
        repetition=sum(repeated) / len(replies),
        mean_length=sum(lengths) / len(replies),
        ended=sum(reply.finish_reason == 'stop' for reply in replies) / len(replies),
        perplexity=math.exp(min(nats.sum() / sum(lengths), 700)),
        generations=generations,
    )


def distinct_share(sequences: list[list] | list[str], n: int) -> float:
    """The share of different ones among the n-grams of all sequences; 1 where there are none."""
    found = []
    for sequence in sequences:
        found += [tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)]
    return len(set(found)) / len(found) if found else 1.0


def measure_answers(
    model: GPT, tokenizer: Tokenizer, questions: list[tuple[str, Decimal]], max_new_tokens: int
) -> dict:
    """How often a model's greedy answer has the right number, with the answers.

    questions: see read_questions. They are asked in the model's form for conversations, else as
    lm-evaluation-harness asks gsm8k's, without examples.
    """
    is_chat = is_tuned(model, tokenizer)
    prompts = []
    for question, _ in questions:
        if is_chat:
            prompts.append(tokenizer.encode_chat_prompt([dict(role='user', content=question)]))
        else:
            prompts.append(tokenizer.encode_prompt(f'Question: {question}\nAnswer:'))
    sampling = Sampling(max_new_tokens, temperature=0, ends=tuple(ends(tokenizer)))
    if not is_chat:
        sampling.stop = ('Question:',)
    replies = reply_to(model, tokenizer, prompts, sampling)
    answers, n_right = [], 0
    for (question, number), reply in zip(questions, replies, strict=True):
        is_right = final_number(reply.text) == number
        n_right += is_right
        answers.append(dict(question=question, text=reply.text, right=is_right))
    share = n_right / len(questions)
    return dict(
        questions=len(questions),
        exact_match=share,
        exact_match_interval=share_interval(share, len(questions)),
        answers=answers,
    )


def measure_speed(model: GPT, tokenizer: Tokenizer) -> dict:
    """How fast a model reads and writes, one reply at a time, the best of three.

    prefill_tokens_per_second of a prompt of prompt_tokens, time_to_first_token (seconds) behind
    it, decode_tokens_per_second of new_tokens more.
    """
    n_prompt = n_new = max(1, min(256, model.config.block_size // 2 - 1))
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(max_new_tokens=n_new + 1, temperature=0)
    first_token, others = math.inf, math.inf
    for _ in range(3):
        prompt = torch.randint(model.config.vocab_size, (n_prompt,), generator=generator).tolist()
        reply, batch = Reply(tokenizer, prompt, sampling), Batch(model, 1, n_prompt + n_new + 1)
        began = time.perf_counter()
        batch.add(reply)
        read = time.perf_counter()
        while batch.replies:
            batch.step()
        first_token = min(first_token, read - began)
        others = min(others, time.perf_counter() - read)
    return dict(
        prompt_tokens=n_prompt,
        new_tokens=n_new,
        prefill_tokens_per_second=n_prompt / first_token,
        time_to_first_token=first_token,
        decode_tokens_per_second=n_new / others,
    )
