"""A conversation with a model over one KV cache, for a terminal or a script."""

import json
import os
from collections.abc import Generator
from dataclasses import replace

import torch

from fledge import UserError, read_json, replacing
from fledge.generation import Batch, Reply, Sampling
from fledge.tokenizer import TRIAL, Tokenizer
from model import GPT

ROLES = ('system', 'user', 'assistant')


@torch.no_grad()
def is_tuned(model: GPT, tokenizer: Tokenizer) -> bool:
    """Whether a model was tuned on conversations in the form that its tokenizer has for them.

    A form alone says little: every tokenizer trained here has ChatML's tokens. A model that has
    seen it in use finds the token that ends an answer likelier, where an answer ends, than one that
    knows nothing would (1 / vocab_size).
    """
    if not tokenizer.has_chat_form:
        return False
    try:
        ids, learned = tokenizer.encode_chat(TRIAL)
    except UserError:  # a template that says what to go on with, and not what is learned of it
        return True
    ids = ids.tolist()[: model.config.block_size]
    last = [i for i in range(1, len(ids) - 1) if learned[i] and not learned[i + 1]]
    if not last or max(ids) >= model.config.vocab_size:
        return False
    idx = torch.tensor([ids], device=model.transformer.wte.weight.device)
    x = model.hidden(idx)[0, [i - 1 for i in last]]
    p = model.logits(x).float().softmax(dim=-1)
    return max(p[row, ids[i]].item() for row, i in enumerate(last)) > 1 / model.config.vocab_size


class Conversation:
    """What was said so far, and a model that answers.

    messages: [{'role': 'user' or 'assistant', 'content': text}, ...].
    system: what the model is told before all of them. is_chat: see is_tuned; a model that is not
    goes on with the text of all that was said. reply: the generation.Reply at hand. n_trimmed: how
    many of the oldest messages the prompts leave out, because the context was full.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, sampling: Sampling, system: str = ''):
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.is_chat = is_tuned(model, tokenizer)
        self.system, self.messages = system, []
        self.batch = Batch(model, 1)
        self.reply, self.n_trimmed = None, 0
        self.n_answers = 0  # each is drawn by a seed of its own

    def with_system(self, messages: list[dict]) -> list[dict]:
        """messages, behind what the model is told before them if that is anything."""
        if not self.system:
            return messages
        return [dict(role='system', content=self.system), *messages]

    def encode(self, messages: list[dict]) -> list[int]:
        """The ids that the model goes on with to answer messages."""
        messages = self.with_system(messages)
        if self.is_chat:
            return self.tokenizer.encode_chat_prompt(messages)
        return self.tokenizer.encode_prompt(''.join(message['content'] for message in messages))

    def prompt(self, messages: list[dict]) -> list[int]:
        """encode() of messages, without the oldest ones where they do not fit.

        A quarter of the context is left for the reply, or max_new_tokens if those are fewer. Where
        that is not to be had, the oldest turns are left out until half of the context is free: so
        the turns that follow find their beginning in the cache. UserError where the last message is
        too long.
        """
        context = self.model.config.block_size
        most = context - min(self.sampling.max_new_tokens, context // 4)
        ids = self.encode(messages[self.n_trimmed :])
        if len(ids) <= most:
            return ids
        for start, message in enumerate(messages):
            if start > self.n_trimmed and message['role'] == 'user':
                ids = self.encode(messages[start:])
                if len(ids) <= context // 2:
                    break
        if len(ids) > most:
            raise UserError(
                f'the message is too long: with what goes before it, it is {len(ids):,} tokens of '
                f'at most {most:,} ({context:,} are the context)'
            )
        self.n_trimmed = start
        return ids

    def say(self, text: str) -> Generator[str]:
        """Answer a message of the user's: a generator of the pieces of the answer's text.

        Both are among the messages when the answer has ended, or the generator is closed before. A
        message that cannot be answered (UserError) leaves them as they were.
        """
        yield from self.answer([*self.messages, dict(role='user', content=text)])

    def retry(self) -> Generator[str]:
        """Answer the last message of the user's again, otherwise; a generator as say() is."""
        asked = list(self.messages)
        while asked and asked[-1]['role'] != 'user':
            asked.pop()
        if not asked:
            raise UserError('nothing was said yet')
        yield from self.answer(asked)

    def answer(self, messages: list[dict]) -> Generator[str]:
        prompt = self.prompt(messages)
        room = self.model.config.block_size - len(prompt)
        sampling = replace(self.sampling, max_new_tokens=min(self.sampling.max_new_tokens, room))
        if sampling.seed is not None:
            sampling.seed += self.n_answers
        self.n_answers += 1
        reply = self.reply = Reply(self.tokenizer, prompt, sampling)
        try:
            self.batch.add(reply)
            yield reply.take()
            while self.batch.replies:
                self.batch.step()
                yield reply.take()
        except ValueError as e:
            reply = None
            raise UserError(str(e)) from None
        finally:
            self.batch.remove(self.reply)
            if reply:
                self.messages = [*messages, dict(role='assistant', content=reply.text)]

    def reset(self) -> None:
        self.messages, self.n_trimmed = [], 0

    def save(self, path: str) -> None:
        """Write the conversation to path as JSON, {'messages': [...]}, the system's first."""
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f'{path} is no file')
        messages = self.with_system(self.messages)
        try:
            with replacing(path) as f:
                json.dump(dict(messages=messages), f, ensure_ascii=False, indent=1)
        except OSError as e:
            raise UserError(f'cannot write {path}: {e.strerror}') from None

    def load(self, path: str) -> None:
        """Go on with a conversation that save() wrote; UserError for another file."""
        messages = read_json(path).get('messages')
        if not isinstance(messages, list):
            raise UserError(f'{path} holds no messages')
        for message in messages:
            ours = isinstance(message, dict) and message.keys() == {'role', 'content'}
            if not ours or message['role'] not in ROLES or not isinstance(message['content'], str):
                raise UserError(f'{path}: a message has a role ({", ".join(ROLES)}) and a content')
            if any('\ud800' <= character <= '\udfff' for character in message['content']):
                raise UserError(f'{path}: a message has half a surrogate pair, which is no text')
        system = [m['content'] for m in messages if m['role'] == 'system']
        self.system = '\n'.join(system)
        self.reset()
        self.messages = [m for m in messages if m['role'] != 'system']
