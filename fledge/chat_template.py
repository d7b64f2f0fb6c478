"""The chat template of somebody's model: Jinja, rendered in a sandbox as transformers renders it.

A template is data from elsewhere. What it may do is to put the texts of messages between its own.
"""

import functools
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


def read(folder):
    """The ChatTemplate of a Hugging Face folder, or None. UserError for a broken file."""
    path, template = os.path.join(folder, TEMPLATE), None
    config = os.path.join(folder, CONFIG)
    config = read_json(config) if os.path.exists(config) else {}
    if os.path.exists(path):
        try:
            with open(path, encoding='utf-8') as f:
                template = f.read()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f'{path} cannot be read: {e}') from None
    else:
        template = config.get('chat_template')
    if isinstance(template, list):  # of several, the one without a purpose of its own
        named = {t.get('name'): t.get('template') for t in template if isinstance(t, dict)}
        template = named.get('default')
    if not isinstance(template, str):
        return None
    tokens = {}
    for key in ('bos_token', 'eos_token'):
        token = config.get(key)
        token = token.get('content') if isinstance(token, dict) else token
        if isinstance(token, str):
            tokens[key] = token
    return ChatTemplate(template, tokens)


def write(folder, template):
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
def compiled(text):
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


def render(template, messages, add_generation_prompt=False):
    """The text of messages by a ChatTemplate. UserError where it fails, in whatever way."""
    fresh = [dict(role=message['role'], content=message['content']) for message in messages]
    options = dict(add_generation_prompt=add_generation_prompt, tools=None, documents=None)
    try:
        return compiled(template.text).render(messages=fresh, **options, **template.tokens)
    except Exception as e:  # its own raise_exception, or anything that code can run into
        reason = ' '.join(str(e).split())[:150] or type(e).__name__
        raise UserError(f'the chat template fails: {reason}') from None


def lay_out(template, messages, special_pattern):
    """A conversation as one text: its pieces, and the parts of it that are learned.

    Returns [(text, whether it is a message's own), ...] and [(start, end), ...] in characters.
    Learned is what follows the prompt for an answer, up to and including the special token (that
    special_pattern finds) which ends it; not of an answer that the template writes otherwise once
    more is said, as Qwen3's does. A message may lose the white space around it. UserError where a
    prompt is not what the whole begins with, a message is not there literally, or no special token
    ends an answer.
    """
    text = render(template, messages)
    # where the messages are, and where the template's own text: with letters that mean nothing
    marks = [f'\ue000{i}\ue001' for i in range(len(messages))]
    marked = [dict(m, content=mark) for m, mark in zip(messages, marks, strict=True)]
    found = re.split(f'({"|".join(marks)})', render(template, marked))
    if sorted(found[1::2]) != sorted(marks):
        raise UserError('the chat template leaves out a message, or repeats it')
    pieces, at = [(found[0], False)], len(found[0])
    starts, turn_ends = {}, {}  # of each message in the text
    for mark, following in zip(found[1::2], found[2::2], strict=True):
        i = marks.index(mark)
        content = messages[i]['content']
        if not text.startswith(content + following, at):
            content = content.strip()
        starts[i] = at
        pieces += [(content, True), (following, False)]
        at += len(content)
        end = special_pattern.search(following)
        turn_ends[i] = at + end.end() if end else None
        at += len(following)
    if ''.join(piece for piece, _ in pieces) != text:
        raise UserError('the chat template changes what a message says')
    learned = []
    for i, message in enumerate(messages):
        if message['role'] != 'assistant':
            continue
        prompt = render(template, messages[:i], add_generation_prompt=True)
        if not text.startswith(prompt) or len(prompt) > starts[i]:
            raise UserError('the chat template prompts for an answer otherwise than it writes one')
        if turn_ends[i] is None:
            raise UserError("no special token ends an answer in the chat template's form")
        when_said = render(template, messages[: i + 1])
        as_said = when_said[: turn_ends[i]] == text[: turn_ends[i]]
        if as_said and message.get('learned', True):
            learned.append((len(prompt), turn_ends[i]))
    return pieces, learned
