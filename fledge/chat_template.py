"""The chat template of somebody's model: Jinja, rendered in a sandbox as transformers renders it.

A template is data from elsewhere. What it may do is to put the texts of messages between its own.
"""

import functools
import itertools
import json
import os
import re
from typing import NamedTuple

from fledge import UserError, read_json, replacing

TEMPLATE, CONFIG = 'chat_template.jinja', 'tokenizer_config.json'
FILES = [TEMPLATE, CONFIG]  # beside a tokenizer.json


class ChatTemplate(NamedTuple):
    """A template's text, and the texts of the special tokens that it may name."""

    text: str
    tokens: dict  # of bos_token and eos_token, as far as there are any


def read(folder: str) -> ChatTemplate | None:
    """The ChatTemplate of a Hugging Face folder, or None. UserError for a broken file."""
    path, config_path = (os.path.join(folder, name) for name in FILES)
    config = read_json(config_path) if os.path.exists(config_path) else {}
    text = config.get('chat_template')
    if isinstance(text, list):  # of several, the one without a purpose of its own
        named = {t.get('name'): t.get('template') for t in text if isinstance(t, dict)}
        text = named.get('default')
    if os.path.exists(path):
        with open(path, encoding='utf-8', errors='replace') as f:
            text = f.read()
    if not isinstance(text, str):
        return None
    tokens = {key: special_token(config, key) for key in ('bos_token', 'eos_token')}
    return ChatTemplate(text, {key: token for key, token in tokens.items() if token is not None})


def special_token(config: dict, key: str) -> str | None:
    """The text of a special token in a parsed tokenizer_config.json, or None."""
    token = config.get(key)
    if isinstance(token, dict):
        token = token.get('content')
    return token if isinstance(token, str) else None


def write(folder: str, template: ChatTemplate | None) -> None:
    """Put a ChatTemplate into folder, as read() finds it; an older one goes if it is None."""
    path = os.path.join(folder, TEMPLATE)
    if template:
        with replacing(path) as f:
            f.write(template.text)
        with replacing(os.path.join(folder, CONFIG)) as f:
            json.dump(dict(tokenizer_class='PreTrainedTokenizerFast', **template.tokens), f)
    elif os.path.exists(path):
        os.remove(path)


@functools.cache
def compiled(text: str) -> object:
    """The jinja2.Template of a text, with nothing at hand but what jinja2 deems harmless."""
    import jinja2
    from jinja2 import sandbox

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def refuse(value, name):  # jinja2 itself would say that there is nothing by that name
        kind = type(value).__name__
        raise jinja2.exceptions.SecurityError(f'it asks for {name!r} of a {kind}, which is unsafe')

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols']
    )
    environment.unsafe_undefined = refuse
    known = environment.globals
    allowed = dict(namespace=known['namespace'], range=known['range'])
    environment.globals = dict(raise_exception=raise_exception, **allowed)
    # transformers' own tag, which marks what the assistant says and changes nothing
    text = re.sub(r'({%[-+]?\s*)generation(\s*[-+]?%})', r'\1if true\2', text)
    text = re.sub(r'({%[-+]?\s*)endgeneration(\s*[-+]?%})', r'\1endif\2', text)
    return environment.from_string(text)


def render(
    template: ChatTemplate, messages: list[dict], add_generation_prompt: bool = False
) -> str:
    """The text of messages by a ChatTemplate. UserError where it fails, in whatever way."""
    fresh = [dict(role=message['role'], content=message['content']) for message in messages]
    options = dict(add_generation_prompt=add_generation_prompt, tools=None, documents=None)
    try:
        text = compiled(template.text).render(messages=fresh, **options, **template.tokens)
        text.encode()  # which half a surrogate pair fails at
        return text
    except Exception as e:  # its own raise_exception, or anything that code can run into
        reason = ' '.join(str(e).split())[:150] or type(e).__name__
        raise UserError(f'the chat template fails: {reason}') from None


def split_at_messages(
    template: ChatTemplate, messages: list[dict], to_answer: bool = False
) -> list[tuple[str, int | None]]:
    """The text of messages in pieces [(text, number of the message that it is, or None), ...].

    to_answer: with what comes before an answer to them. A message may lose the white space around
    it. UserError where one is not there literally.
    """
    text = render(template, messages, to_answer)
    # where the messages are, and where the template's own text: with letters that mean nothing
    marks = [f'\ue000{i}\ue001' for i in range(len(messages))]
    marked = [dict(m, content=mark) for m, mark in zip(messages, marks, strict=True)]
    first, *found = re.split(f'({"|".join(marks)})', render(template, marked, to_answer))
    if sorted(found[::2]) != sorted(marks):
        raise UserError('the chat template leaves out a message, or repeats it')
    pieces, at = [(first, None)], len(first)
    for mark, following in zip(found[::2], found[1::2], strict=True):
        i = marks.index(mark)
        content = messages[i]['content']
        if not text.startswith(content + following, at):
            content = content.strip()
        pieces += [(content, i), (following, None)]
        at += len(content + following)
    if ''.join(piece for piece, _ in pieces) != text:
        raise UserError('the chat template changes what a message says')
    return pieces


def lay_out(
    template: ChatTemplate, messages: list[dict], special_pattern: re.Pattern
) -> tuple[list[tuple[str, int | None]], list[tuple[int, int]]]:
    """A conversation as pieces (see split_at_messages), and which parts of its text are learned.

    The second is [(start, end), ...] in characters: all that follows the prompt for an answer, up
    to and including the special token (which special_pattern finds) that ends it. An answer that
    the template writes otherwise once more is said, as Qwen3's does, is not learned. UserError
    where a prompt is not what the text begins with, or no special token ends an answer.
    """
    pieces, learned, at = split_at_messages(template, messages), [], 0
    text = ''.join(piece for piece, _ in pieces)
    for (piece, i), (following, _) in itertools.pairwise(pieces):  # the last is no message
        start, at = at, at + len(piece)
        if i is None or messages[i]['role'] != 'assistant':
            continue
        prompt = render(template, messages[:i], add_generation_prompt=True)
        if not text.startswith(prompt) or len(prompt) > start:
            raise UserError('the chat template prompts for an answer otherwise than it writes one')
        last_token = special_pattern.search(following)
        if not last_token:
            raise UserError("no special token ends an answer in the chat template's form")
        end = at + last_token.end()
        is_last = i == len(messages) - 1
        as_said = is_last or render(template, messages[: i + 1]).startswith(text[:end])
        if as_said and messages[i].get('learned', True):
            learned.append((len(prompt), end))
    return pieces, learned
