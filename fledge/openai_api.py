"""OpenAI's API: what a request may ask for, and the forms of the answers.

The fields are those of platform.openai.com/docs/api-reference, with top_k, min_p and
repetition_penalty as vLLM and llama.cpp have them.
"""

import json
import math
import time
import uuid
from collections import Counter
from dataclasses import dataclass

from fledge.configurator import BOUNDS
from fledge.tokenizer import Tokenizer

ROLES = {'system': 'system', 'developer': 'system', 'user': 'user', 'assistant': 'assistant'}
NUMBERS = ('temperature', 'top_p', 'min_p', 'repetition_penalty')
NUMBERS += ('presence_penalty', 'frequency_penalty')
OTHERS = ('top_k', 'max_tokens', 'n', 'seed', 'stop', 'stream', 'logprobs')
MOST_LOGPROBS = 20
# Fields that ask for nothing that a reply would lack.
HARMLESS = ('model', 'user', 'store', 'metadata', 'service_tier', 'safety_identifier')
HARMLESS += ('prompt_cache_key', 'parallel_tool_calls', 'stream_options')
# Fields that ask for what is not done here, unless they have one of these values.
NOT_DONE = dict(
    echo=(False,),
    suffix=('',),
    best_of=(1,),
    logit_bias=({},),
    tools=([],),
    functions=([],),
    tool_choice=('none', 'auto'),
    function_call=('none', 'auto'),
    response_format=({'type': 'text'},),
    modalities=(['text'],),
    ignore_eos=(False,),
)


class Refusal(Exception):
    """A request that cannot be answered: an HTTP status, and why.

    param: the field that is wrong. code: OpenAI's word for what is wrong.
    """

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None
    ):
        super().__init__(message)
        self.status = status
        kind = 'invalid_request_error'
        if status == 429:
            kind = 'rate_limit_error'
        elif status >= 500:
            kind = 'server_error'
        self.body = {'error': dict(message=message, type=kind, param=param, code=code)}


@dataclass
class Request:
    """What is asked for."""

    is_chat: bool
    prompts: list[str | list[int]]  # texts or token ids; of a chat none
    messages: list[dict]  # of a chat: role and content of each
    sampling: dict  # by the names of generation.Sampling
    n: int  # replies to each prompt
    stream: bool
    include_usage: bool


def parse(data: bytes) -> dict:
    """The JSON object in a body, without what is null."""

    def refuse_constant(name):
        raise ValueError(f'{name} is no number')

    try:
        body = json.loads(data.decode(), parse_constant=refuse_constant)
        json.dumps(body, ensure_ascii=False).encode()  # which half a surrogate pair fails at
    except (ValueError, RecursionError) as e:
        raise Refusal(f'the body is no valid JSON: {str(e)[:200]}') from None
    if not isinstance(body, dict):
        raise Refusal('the body is no JSON object')
    return {name: value for name, value in body.items() if value is not None}


def read_request(body: dict, is_chat: bool, model_id: str, most: int) -> Request:
    """The Request that a parsed body makes; Refusal for what cannot be done.

    most: replies that a request may ask for.
    """
    own = ('messages', 'top_logprobs', 'max_completion_tokens') if is_chat else ('prompt',)
    known = {*NUMBERS, *OTHERS, *HARMLESS, *own}
    for name in body:
        if name in NOT_DONE:
            if body[name] not in NOT_DONE[name]:
                raise Refusal(f'{name} is not supported here', name)
        elif name not in known:
            raise Refusal(f'there is no field {name[:100]!r}', name[:100])
    if body.get('model', model_id) != model_id:
        words = f'the model {str(body["model"])[:100]!r} does not exist; {model_id!r} is served'
        raise Refusal(words, 'model', 404, 'model_not_found')
    options = body.get('stream_options', {})
    if not isinstance(options, dict):
        raise Refusal('stream_options is no object', 'stream_options')
    request = Request(
        is_chat,
        prompts=[] if is_chat else prompts_of(body.get('prompt')),
        messages=messages_of(body.get('messages')) if is_chat else [],
        sampling=sampling_of(body, is_chat),
        n=whole_number(body, 'n', 1, most) or 1,
        stream=bool_of(body, 'stream'),
        include_usage=bool_of(options, 'include_usage'),
    )
    if len(request.prompts) * request.n > most:
        words = f'{len(request.prompts):,} prompts with n={request.n}: at most {most} replies'
        raise Refusal(f'{words} are given to a request', 'prompt')
    return request


def sampling_of(body: dict, is_chat: bool) -> dict:
    """The settings of generation.Sampling that a body gives."""
    found = {}
    for name in NUMBERS:
        if name in body:
            found[name] = float(number(body, name, *BOUNDS[name]))
    if 'top_k' in body:
        found['top_k'] = max(0, whole_number(body, 'top_k', -1, 2**31))  # -1: vLLM's word for all
    if 'seed' in body:
        found['seed'] = whole_number(body, 'seed', -(2**63), 2**63 - 1) % 2**63
    for name in ('max_tokens', 'max_completion_tokens'):
        if name in body:
            found['max_new_tokens'] = whole_number(body, name, 1, 2**31)
    stop = body.get('stop', [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > 16 or not all_texts(stop):
        raise Refusal('stop is a text or a list of at most 16, none of them empty', 'stop')
    found['stop'] = tuple(stop)
    if is_chat and bool_of(body, 'logprobs'):
        found['n_logprobs'] = whole_number(body, 'top_logprobs', 0, MOST_LOGPROBS) or 0
    elif is_chat and 'top_logprobs' in body:
        raise Refusal('top_logprobs needs logprobs to be true', 'top_logprobs')
    elif not is_chat and 'logprobs' in body:
        found['n_logprobs'] = whole_number(body, 'logprobs', 0, MOST_LOGPROBS)
    return found


def number(body: dict, name: str, least: float, most: float) -> float:
    value = body[name]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not least <= value <= most or not math.isfinite(value):
        raise Refusal(f'{name}={str(value)[:50]} is no number from {least:,} to {most:,}', name)
    return value


def whole_number(body: dict, name: str, least: int, most: int) -> int | None:
    """None where it is not given."""
    if name not in body:
        return None
    value = number(body, name, least, most)
    if value != int(value):
        raise Refusal(f'{name}={value} is no whole number', name)
    return int(value)


def bool_of(body: dict, name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise Refusal(f'{name} is true or false', name)
    return value


def all_texts(values: list) -> bool:
    return all(isinstance(value, str) and value for value in values)


def prompts_of(prompt: object) -> list[str | list[int]]:
    """The prompts of a completion: texts or token ids."""
    many = [prompt] if is_prompt(prompt) else prompt
    if not isinstance(many, list) or not many or not all(map(is_prompt, many)):
        raise Refusal('prompt is a text, a list of token ids, or a list of either', 'prompt')
    return many


def is_prompt(value: object) -> bool:
    """Whether it is a text, or a list of numbers that may be token ids."""
    if isinstance(value, str):
        return True
    return isinstance(value, list) and value != [] and all(type(token) is int for token in value)


def messages_of(messages: object) -> list[dict]:
    """The messages of a chat as the tokenizer takes them: dicts of role and content."""
    if not isinstance(messages, list) or not messages:
        raise Refusal('messages is a list of at least one {role, content}', 'messages')
    found = []
    for i, message in enumerate(messages):
        where = f'messages[{i}]'
        if not isinstance(message, dict):
            raise Refusal(f'{where} is no object', where)
        role, content = message.get('role'), message.get('content')
        if not isinstance(role, str) or role not in ROLES:
            raise Refusal(f'{where}.role is none of {", ".join(ROLES)}', f'{where}.role')
        if isinstance(content, list):
            for part in content:
                if not isinstance(part, dict) or not isinstance(part.get('text'), str):
                    raise Refusal(f'{where}.content has a part that is no text', where)
            content = ''.join(part['text'] for part in content)
        if not isinstance(content, str):
            raise Refusal(f'{where}.content is no text', f'{where}.content')
        others = {name for name, value in message.items() if value} - {'role', 'content', 'name'}
        if others:
            raise Refusal(f'{where}.{min(others)[:50]} is not supported here', where)
        found.append(dict(role=ROLES[role], content=content))
    return found


class Answers:
    """The forms of the answers to a request."""

    def __init__(self, request: Request, model_id: str, tokenizer: Tokenizer):
        self.request, self.tokenizer = request, tokenizer
        self.object = 'chat.completion' if request.is_chat else 'text_completion'
        prefix = 'chatcmpl-' if request.is_chat else 'cmpl-'
        self.common = dict(id=prefix + uuid.uuid4().hex, object=self.object)
        self.common |= dict(created=int(time.time()), model=model_id)
        self.begun = set()  # the replies of which a part is streamed
        self.n_told = Counter()  # characters of each reply that come with log probabilities

    def whole(self, replies: list, usage: dict) -> dict:
        """An answer that is not streamed. replies: generation.Reply, all of them ended."""
        choices = []
        for index, reply in enumerate(replies):
            logprobs = None
            if reply.sampling.n_logprobs is not None:
                logprobs = self.logprobs(index, reply.logprobs)
            choice = dict(index=index, finish_reason=reply.finish_reason, logprobs=logprobs)
            if self.request.is_chat:
                choice['message'] = dict(role='assistant', content=reply.text, refusal=None)
            else:
                choice['text'] = reply.text
            choices.append(choice)
        return self.common | dict(choices=choices, usage=usage)

    def chunk(
        self, index: int, text: str, logprobs: list[tuple] | None, finish_reason: str | None
    ) -> dict:
        """A part of a streamed answer. logprobs: of its tokens, as generation.Reply has them."""
        if logprobs is not None:
            logprobs = self.logprobs(index, logprobs)
        choice = dict(index=index, finish_reason=finish_reason, logprobs=logprobs)
        if not self.request.is_chat:
            choice['text'] = text
        elif index in self.begun:
            choice['delta'] = dict(content=text)
        else:
            choice['delta'] = dict(role='assistant', content=text)
        self.begun.add(index)
        return self.as_chunk(choices=[choice])

    def as_chunk(self, **fields) -> dict:
        name = 'chat.completion.chunk' if self.request.is_chat else self.object
        chunk = self.common | dict(object=name) | fields
        if self.request.include_usage:
            chunk.setdefault('usage', None)
        return chunk

    def logprobs(self, index: int, tokens: list[tuple]) -> dict:
        """The form of log probabilities, as generation.Reply has them, of tokens of a reply."""
        if self.request.is_chat:
            content = []
            for token, logprob, likeliest in tokens:
                others = [self.of_token(*pair) for pair in likeliest]
                content.append(self.of_token(token, logprob) | dict(top_logprobs=others))
            return dict(content=content, refusal=None)
        texts = [self.text(token) for token, _, _ in tokens]
        offsets = []
        for text in texts:
            offsets.append(self.n_told[index])
            self.n_told[index] += len(text)
        return dict(
            tokens=texts,
            token_logprobs=[logprob for _, logprob, _ in tokens],
            top_logprobs=[{self.text(t): p for t, p in likeliest} for _, _, likeliest in tokens],
            text_offset=offsets,
        )

    def text(self, token: int) -> str:
        return self.tokenizer.token_bytes.get(token, b'').decode('utf-8', 'replace')

    def of_token(self, token: int, logprob: float) -> dict:
        data = self.tokenizer.token_bytes.get(token, b'')
        return dict(token=self.text(token), logprob=logprob, bytes=list(data))


def usage_of(prompts: list[list[int]], replies: list) -> dict:
    n_read = sum(map(len, prompts))
    n_written = sum(len(reply.ids) for reply in replies)
    return dict(prompt_tokens=n_read, completion_tokens=n_written, total_tokens=n_read + n_written)
