"""A file of prompts, and a file of what a model says to them that survives an interruption."""

import json
import os

from tqdm import tqdm

from fledge import UserError, read_records, replacing
from fledge.generation import Reply, Sampling, generate, reply_to_source
from fledge.tokenizer import Tokenizer
from model import GPT

FORMATS = ('.jsonl', '.json', '.txt')


def read_prompts(path: str) -> list[str | list[dict]]:
    """The prompts of a file: each is a text, or a list of messages (role, content).

    A .jsonl has an object a line, with `prompt`, `text` or `messages`; of any other file each line
    is a prompt. Empty lines are none. UserError for a file that cannot be read or holds none.
    """
    if path.endswith('.jsonl'):
        return [prompt_of(record, where) for where, record in read_records(path)]
    try:
        with open(path, encoding='utf-8') as f:
            prompts = [line.rstrip('\n') for line in f if line.strip()]
    except OSError as e:
        raise UserError(f'cannot read the prompts: {path}: {e.strerror}') from None
    except UnicodeDecodeError:
        raise UserError(f'cannot read the prompts: {path} is no UTF-8 text') from None
    if not prompts:
        raise UserError(f'{path} holds no prompts')
    return prompts


def prompt_of(record: dict, where: str) -> str | list[dict]:
    """The prompt in a record; UserError, which names where that is, for one without."""
    for key in ('prompt', 'text'):
        if isinstance(record.get(key), str) and record[key]:
            return record[key]
    messages = record.get('messages')
    if isinstance(messages, list) and messages and all(map(is_message, messages)):
        return [dict(role=message['role'], content=message['content']) for message in messages]
    raise UserError(f'{where} has no prompt: a text as `prompt` or `text`, or `messages`')


def is_message(message: object) -> bool:
    """Whether it is what the tokenizer takes for one: a dict of a role and a content, texts."""
    if not isinstance(message, dict):
        return False
    return isinstance(message.get('role'), str) and isinstance(message.get('content'), str)


def encode(prompt: str | list[dict], tokenizer: Tokenizer) -> list[int]:
    """The ids of a prompt of read_prompts()."""
    if isinstance(prompt, str):
        return tokenizer.encode_prompt(prompt)
    return tokenizer.encode_chat_prompt(prompt)


def new_reply(
    model: GPT, tokenizer: Tokenizer, prompt: str | list[dict], sampling: Sampling
) -> Reply:
    """The Reply to a prompt of read_prompts(), a source where the model learned from pairs.

    UserError for messages to an encoder-decoder, and for a source that it cannot read.
    """
    if not model.config.n_encoder_layer:
        if tokenizer.separator and isinstance(prompt, str):
            return Reply(tokenizer, tokenizer.encode_source(prompt), sampling)
        return Reply(tokenizer, encode(prompt, tokenizer), sampling)
    if not isinstance(prompt, str):
        raise UserError('an encoder-decoder has no form for conversations: its prompt is a source')
    source, context = tokenizer.encode_source(prompt), model.config.block_size
    if not 0 < len(source) <= context:
        raise UserError(
            f'the source has {len(source):,} tokens, and the model reads 1 to {context:,}'
        )
    return reply_to_source(model, tokenizer, source, sampling)


def answer_all(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: list[str | list[dict]],
    samplings: list[Sampling],
    batch_size: int,
    output: str,
    settings: dict,
) -> int:
    """Write what a model says to prompts to a file; returns how many prompts were left to do.

    samplings: one for each answer to a prompt. output: a name in one of FORMATS. settings: written
    beside it. What is done is kept in output + '.part' as it comes, and a second call with the same
    settings and prompts goes on from there. UserError where output is there already, for a .part of
    other settings, for a full disk, and for a model that fails.
    """
    if not output.endswith(FORMATS):
        raise UserError(f'output={output!r} ends in none of {", ".join(FORMATS)}')
    if os.path.exists(output):
        raise UserError(f'{output} is there already: remove it, or name another --output')
    header, part = dict(settings=settings, prompts=prompts), output + '.part'
    done = read_part(part, header) if os.path.isfile(part) else {}
    replies = {}  # of each prompt that is left
    for i, prompt in enumerate(prompts):
        if i not in done:
            replies[i] = [new_reply(model, tokenizer, prompt, each) for each in samplings]
    # of like lengths together; and the longest first, so that none is left to run alone at the end
    by_length = sorted(replies, key=lambda i: -len(replies[i][0].source or replies[i][0].prompt))
    in_order = [reply for i in by_length for reply in replies[i]]
    number_of = {reply: i for i in replies for reply in replies[i]}
    try:
        with open(part, 'a' if done else 'w', encoding='utf-8') as f:
            if not done:
                f.write(json.dumps(header) + '\n')
            bar = tqdm(total=len(prompts), initial=len(done), unit='prompt', disable=None)
            for ended in generate(model, in_order, batch_size):
                for i in {number_of[reply] for reply in ended}:
                    if not all(reply.finish_reason for reply in replies[i]):
                        continue
                    done[i] = result(prompts[i], replies[i])
                    f.write(json.dumps([i, done[i]]) + '\n')
                    f.flush()
                    bar.update()
            bar.close()
        results = [done[i] for i in range(len(prompts))]
        with replacing(output + '.settings.json') as f:
            json.dump(settings, f, indent=1)
        with replacing(output) as f:
            f.write(as_text(results, os.path.splitext(output)[1]))
        os.remove(part)
    except OSError as e:
        raise UserError(f'cannot write {output}: {e.strerror}; what is done is kept') from None
    except ValueError as e:  # of broken weights, or another model's tokens
        raise UserError(f'{e}; what is done is kept') from None
    return len(replies)


def read_part(path: str, header: dict) -> dict[int, dict]:
    """{number of a prompt: its result} of an unfinished file; UserError if it is of another run."""
    with open(path, encoding='utf-8', errors='replace') as f:
        lines = f.readlines()
    whole = [line for line in lines if line.endswith('\n')]
    try:
        records = [json.loads(line) for line in whole]
        if records and records.pop(0) != header:
            raise ValueError('its header is another')
        done = dict(records)
    except (RecursionError, TypeError, ValueError):  # another program's file, or another run's
        raise UserError(
            f'{path} was begun with other settings or prompts: remove it, or name another --output'
        ) from None
    if whole != lines:  # a run ended within a line, behind which nothing can be appended
        with replacing(path) as f:
            f.writelines(whole)
    return done


def result(prompt: str | list[dict], replies: list[Reply]) -> dict:
    return dict(
        prompt=prompt,
        samples=[reply.text for reply in replies],
        tokens=[len(reply.ids) for reply in replies],
        finish_reasons=[reply.finish_reason for reply in replies],
    )


def as_text(results: list[dict], ending: str) -> str:
    """Results as the text of a file with this ending."""
    if ending == '.json':
        return json.dumps(results, ensure_ascii=False, indent=1) + '\n'
    if ending == '.jsonl':
        return ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in results)
    texts = []
    for r in results:
        start = r['prompt'] if isinstance(r['prompt'], str) else ''
        texts += [f'{start}{sample}\n---------------\n' for sample in r['samples']]
    return ''.join(texts)
