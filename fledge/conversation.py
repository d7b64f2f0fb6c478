"""A conversation with a model over one KV cache, for a terminal or a script."""

import json

from fledge import UserError, read_json, replacing
from fledge.generation import Batch, Reply

ROLES = ('system', 'user', 'assistant')


class Conversation:
    """What was said so far, and a model that answers.

    sampling: a generation.Sampling. messages: [{'role': 'user' or 'assistant', 'content': text}].
    system: what the model is told before all of them. is_chat: whether the model has a form for
    conversations; one without goes on with the text of all that was said. reply: the
    generation.Reply at hand. n_trimmed: how many of the oldest messages the prompts leave out,
    because the context was full.
    """

    def __init__(self, model, tokenizer, sampling, system=''):
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.is_chat = tokenizer.has_chat_form
        self.system, self.messages = system, []
        self.batch = Batch(model, 1)
        self.reply, self.n_trimmed = None, 0

    def encode(self, messages):
        """The ids that the model goes on with to answer messages."""
        if self.is_chat:
            system = [dict(role='system', content=self.system)] if self.system else []
            return self.tokenizer.encode_chat_prompt(system + messages)
        texts = [self.system, *(message['content'] for message in messages)]
        return self.tokenizer.encode_prompt(''.join(texts))

    def prompt(self):
        """encode() of the messages, without the oldest ones where they do not fit.

        A quarter of the context, or max_new_tokens, is left for the reply. Where that is not to be
        had, the oldest turns are left out until half of the context is free: so the turns that
        follow find their beginning in the cache. UserError where the last message is too long.
        """
        context = self.model.config.block_size
        most = context - min(self.sampling.max_new_tokens, context // 4)
        ids = self.encode(self.messages[self.n_trimmed :])
        if len(ids) <= most:
            return ids
        for start, message in enumerate(self.messages):
            if start > self.n_trimmed and message['role'] == 'user':
                ids = self.encode(self.messages[start:])
                if len(ids) <= context // 2:
                    break
        if len(ids) > most:
            raise UserError(
                f'the message is too long: with what goes before it, it is {len(ids):,} tokens of '
                f'at most {most:,} ({context:,} are the context)'
            )
        self.n_trimmed = start
        return ids

    def say(self, text):
        """Answer a message of the user's: a generator of the pieces of the answer's text.

        The answer is among the messages when it has ended, or the generator is closed before. A
        message that cannot be answered (UserError) is not.
        """
        self.messages.append(dict(role='user', content=text))
        yield from self.answer()

    def retry(self):
        """Answer the last message of the user's again, otherwise; a generator as say() is."""
        while self.messages and self.messages[-1]['role'] != 'user':
            self.messages.pop()
        if not self.messages:
            raise UserError('nothing was said yet')
        yield from self.answer()

    def answer(self):
        self.reply = None
        try:
            prompt = self.prompt()
            self.reply = Reply(self.tokenizer, prompt, self.sampling)
            self.reply.room = self.model.config.block_size - len(prompt)
            self.batch.add(self.reply)
            yield self.reply.take()
            while self.batch.replies and len(self.reply.ids) < self.reply.room:
                self.batch.step()
                yield self.reply.take()
        except (UserError, ValueError):
            self.messages.pop()
            raise
        finally:
            if self.reply:
                self.batch.remove(self.reply)
                self.messages.append(dict(role='assistant', content=self.reply.text))

    def reset(self):
        self.messages, self.n_trimmed = [], 0

    def save(self, path):
        """Write the conversation to path as JSON, {'messages': [...]}, the system's first."""
        system = [dict(role='system', content=self.system)] if self.system else []
        try:
            with replacing(path) as f:
                json.dump(dict(messages=system + self.messages), f, ensure_ascii=False, indent=1)
        except OSError as e:
            raise UserError(f'cannot write {path}: {e.strerror}') from None

    def load(self, path):
        """Go on with a conversation that save() wrote; UserError for another file."""
        messages = read_json(path).get('messages')
        if not isinstance(messages, list):
            raise UserError(f'{path} holds no messages')
        for message in messages:
            ours = isinstance(message, dict) and message.keys() == {'role', 'content'}
            if not ours or message['role'] not in ROLES or not isinstance(message['content'], str):
                raise UserError(f'{path}: a message has a role ({", ".join(ROLES)}) and a content')
        system = [m['content'] for m in messages if m['role'] == 'system']
        self.system = '\n'.join(system)
        self.reset()
        self.messages = [m for m in messages if m['role'] != 'system']
