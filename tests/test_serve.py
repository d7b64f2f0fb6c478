"""serve.py: a real server, asked by OpenAI's client, by eight clients at once, and by enemies."""

import http.client
import json
import math
import os
import random
import re
import signal
import socket
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from conftest import fails, start, write_chatterbox

from fledge import checkpoint
from fledge.tokenizer import byte_tokenizer, char_tokenizer
from model import GPT, GPTConfig

openai = pytest.importorskip('openai', reason='the package openai is not installed')
pytest.importorskip('starlette', reason='the package starlette is not installed')
BYTES = byte_tokenizer()
HELLO = [dict(role='user', content='hello')]


def write_random(folder, block_size=256):
    """A run whose model says the same at every call, which depends on all that came before."""
    sizes = dict(n_layer=2, n_head=2, n_embd=32, block_size=block_size)
    torch.manual_seed(0)
    model = GPT(GPTConfig(position='rope', vocab_size=BYTES.vocab_size, **sizes))
    for p in model.parameters():
        p.data *= 4
    folder.mkdir()
    args = checkpoint.model_args(model.config)
    saved = dict(model=model.state_dict(), model_args=args, config={}, iter_num=1)
    checkpoint.save(str(folder / 'ckpt.pt'), saved)
    BYTES.save(str(folder / 'tokenizer.json'))


def break_token(path, text):
    """Make the numbers of a token NaN: what is behind it cannot be computed."""
    state = checkpoint.load(str(path))
    state['model']['transformer.wte.weight'][BYTES.encode(text)] = math.nan
    torch.save(state, path)  # which checkpoint.save would refuse


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('serve')
    write_random(folder / 'out')
    write_chatterbox(folder / 'endless', BYTES, 'xyz', 1 << 16)
    write_chatterbox(folder / 'emoji', BYTES, '🎉', 256)
    write_chatterbox(folder / 'text', char_tokenizer('abcxyz.'), 'xyz', 256)
    write_chatterbox(folder / 'broken', BYTES, 'xyz', 1 << 16)
    break_token(folder / 'broken/ckpt.pt', '!')
    return folder


@contextmanager
def serving(folder, out_dir='out', *args, env=None):
    """A server: its process, and its port."""
    flags = (f'--out_dir={out_dir}', '--port=0', '--device=cpu', '--dtype=float32', *args)
    process = start(folder, 'serve.py', *flags, env=env)
    try:
        line = process.stdout.readline()
        found = re.fullmatch(r'(.+) is served at http://127\.0\.0\.1:(\d+)\n', line)
        assert found, line + process.stderr.read()
        yield process, int(found[2])
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope='module')
def port(folder):
    with serving(folder) as (_, port):
        yield port


@pytest.fixture(scope='module')
def client(port):
    return client_of(port)


def client_of(port, **options):
    options = dict(api_key='none', max_retries=0, timeout=60) | options
    return openai.OpenAI(base_url=f'http://127.0.0.1:{port}/v1', **options)


def ask(port, path, body=None, method='POST', **headers):
    """An answer: its status, and the JSON in it, or its bytes where they are none."""
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    headers = {'Content-Type': 'application/json'} | {
        k.replace('_', '-'): v for k, v in headers.items()
    }
    connection.request(method, path, data, headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    try:
        return answer.status, json.loads(content)
    except ValueError:
        return answer.status, content


def complete(port, **body):
    status, answer = ask(port, '/v1/completions', body)
    assert status == 200, answer
    return answer


def begin_stream(port, **body):
    """A connection on which a streamed completion has begun, and the answer to read from."""
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
    headers = {'Content-Type': 'application/json'}
    connection.request('POST', '/v1/completions', json.dumps(body | dict(stream=True)), headers)
    answer = connection.getresponse()
    assert answer.status == 200 and answer.readline().startswith(b'data: {')
    return connection, answer


def at_hand(port):
    _, health = ask(port, '/health', method='GET')
    return health['decoding'], health['waiting']


def listens(port):
    try:
        socket.create_connection(('127.0.0.1', port), timeout=60).close()
    except ConnectionError:
        return False
    return True


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- what it answers


def test_models_and_the_page(port, client):
    [model] = client.models.list().data
    assert model.id == 'out' and model.context == 256 and model.chat in (True, False)
    status, page = ask(port, '/', method='GET')
    assert status == 200 and page.startswith(b'<!doctype html>')
    assert ask(port, '/health', method='GET')[1]['status'] == 'ok'


def test_a_chat_whole_and_streamed(client):
    options = dict(model='out', messages=HELLO, max_tokens=12, temperature=0)
    whole = client.chat.completions.create(**options)
    [choice] = whole.choices
    assert choice.finish_reason == 'length' and choice.message.role == 'assistant'
    n_prompt = len(BYTES.encode_chat_prompt(HELLO))
    usage = whole.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (n_prompt, 12)
    assert usage.total_tokens == n_prompt + 12
    stream = list(
        client.chat.completions.create(
            **options, stream=True, stream_options=dict(include_usage=True)
        )
    )
    assert stream[0].choices[0].delta.role == 'assistant' and stream[-1].usage == usage
    pieces = [chunk.choices[0].delta.content or '' for chunk in stream[:-1]]
    assert ''.join(pieces) == choice.message.content and len(pieces) > 3
    assert stream[-2].choices[0].finish_reason == 'length'
    in_parts = [dict(role='user', content=[dict(type='text', text='hello')])]
    same = client.chat.completions.create(**options | dict(messages=in_parts))
    assert same.choices[0].message.content == choice.message.content


def test_completions_are_the_models_own(folder, client):
    state = checkpoint.load(str(folder / 'out/ckpt.pt'))
    model = checkpoint.load_model(state, 'out').eval()
    texts = ['once upon', 'a time']
    prompts = [BYTES.encode(text) for text in texts]
    rows = [model.generate([prompt], 9, temperature=0)[0][len(prompt) :] for prompt in prompts]
    for prompt in (texts, prompts):
        answer = client.completions.create(
            model='out', prompt=prompt, max_tokens=9, temperature=0, n=2
        )
        got = [choice.text for choice in answer.choices]
        assert got == [BYTES.decode(row) for row in rows for _ in range(2)]
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage.completion_tokens == 36
        assert answer.usage.prompt_tokens == sum(map(len, prompts))


def test_logprobs(client):
    options = dict(model='out', max_tokens=5, temperature=0)
    chat = client.chat.completions.create(**options, messages=HELLO, logprobs=True, top_logprobs=3)
    content = chat.choices[0].logprobs.content
    assert len(content) == 5
    for token in content:
        assert len(token.top_logprobs) == 3 and token.logprob == token.top_logprobs[0].logprob
        assert bytes(token.bytes).decode('utf-8', 'replace') == token.token
    text = client.completions.create(**options, prompt='hello', logprobs=2)
    logprobs = text.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 5
    stream = client.completions.create(**options, prompt='hello', logprobs=2, stream=True)
    parts = [chunk.choices[0].logprobs for chunk in stream]
    told = [logprob for part in parts for logprob in part.token_logprobs]
    assert told == pytest.approx(logprobs.token_logprobs, abs=1e-4)
    assert [offset for part in parts for offset in part.text_offset] == logprobs.text_offset
    assert logprobs.text_offset[4] == sum(map(len, logprobs.tokens[:4]))


def test_texts_and_token_ids_in_one_request(client):
    options = dict(model='out', max_tokens=7, temperature=0)
    texts = ['once upon', 'a time']
    apart = [client.completions.create(prompt=t, **options).choices[0].text for t in texts]
    ids = BYTES.encode(texts[1])
    both = client.completions.create(prompt=[texts[0], ids], **options)
    assert [choice.text for choice in both.choices] == apart


def test_settings_are_what_a_request_does_not_say(folder):
    with serving(folder, 'out', '--max_new_tokens=6', '--temperature=0') as (_, port):
        usual = complete(port, prompt='a')
        assert usual['usage']['completion_tokens'] == 6
        other = complete(port, prompt='a', seed=5, max_tokens=6, temperature=5.0)
        assert other['choices'][0]['text'] != usual['choices'][0]['text']


def test_draws(client):
    def text(**options):
        options = dict(model='out', prompt='a', max_tokens=20) | options
        return [choice.text for choice in client.completions.create(**options).choices]

    assert text(seed=1) == text(seed=1) != text(seed=2)
    several = text(seed=1, n=3)
    assert several[0] == text(seed=1)[0] and len(set(several)) == 3
    greedy = text(temperature=0)
    for strict in (dict(top_k=1), dict(min_p=1), dict(top_p=1e-6)):
        assert text(seed=3, extra_body=strict) == greedy
    other = text(temperature=0, presence_penalty=2, frequency_penalty=2)
    penalized = text(temperature=0, extra_body=dict(repetition_penalty=5))
    assert other != greedy != penalized


def test_a_stop_text_is_never_sent(client):
    options = dict(model='out', prompt='a', max_tokens=40, temperature=0)
    text = client.completions.create(**options).choices[0].text
    stop = text[5:8]
    before = text[: text.index(stop)]
    [choice] = client.completions.create(**options, stop=stop).choices
    assert choice.text == before and choice.finish_reason == 'stop'
    stream = list(client.completions.create(**options, stop=['never', stop], stream=True))
    assert ''.join(chunk.choices[0].text for chunk in stream) == before


@pytest.mark.slow
def test_a_character_is_never_broken(folder):
    with serving(folder, 'emoji') as (_, port):
        options = dict(prompt='🎉', max_tokens=200, seed=4)
        stream = client_of(port).completions.create(model='emoji', **options, stream=True)
        pieces = [chunk.choices[0].text for chunk in stream]
        # its four bytes in any order: what is a character comes whole, the rest as U+FFFD
        assert ''.join(pieces) == complete(port, **options)['choices'][0]['text']
        assert len(pieces) > 40 and any(len(piece.encode()) == 4 for piece in pieces)


def test_a_reply_ends_with_the_context(client):
    answer = client.completions.create(
        model='out', prompt='x' * 200, max_tokens=1000, temperature=0
    )
    assert answer.choices[0].finish_reason == 'length' and answer.usage.total_tokens == 256
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model='out', prompt='x' * 256)
    assert error.value.code == 'context_length_exceeded' and '256' in str(error.value)


# ---- what it refuses


def test_errors_have_openais_form(port, client):
    for options, words in (
        (dict(temperature=-1), 'temperature=-1 is no number from 0'),
        (dict(temperature='hot'), 'temperature=hot'),
        (dict(top_p=0), 'top_p=0'),
        (dict(max_tokens=0), 'max_tokens=0'),
        (dict(max_tokens=1.5), 'no whole number'),
        (dict(n=1000), 'n=1000'),
        (dict(seed='x'), 'seed=x'),
        (dict(extra_body=dict(stream_options=1)), 'stream_options'),
        (dict(stop=['']), 'stop is'),
        (dict(tools=[dict(type='function', function=dict(name='f'))]), 'tools is not supported'),
        (dict(response_format=dict(type='json_object')), 'response_format is not supported'),
        (dict(top_logprobs=2), 'needs logprobs'),
        (dict(extra_body=dict(temprature=1)), "there is no field 'temprature'"),
        (dict(messages=[]), 'at least one'),
        (dict(messages=[dict(role='robot', content='x')]), r'messages[0].role'),
        (dict(messages=[dict(role='user', content=[dict(type='image_url')])]), 'is no text'),
    ):
        options = dict(model='out', messages=HELLO) | options
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(**options)
        assert words in str(error.value) and error.value.type == 'invalid_request_error'
    with pytest.raises(openai.NotFoundError, match='gpt-4'):
        client.completions.create(model='gpt-4', prompt='x')
    for prompt in ([], [[]], [1, 'a'], [259_000], [-1], 7, None):
        assert ask(port, '/v1/completions', dict(prompt=prompt))[0] == 400
    assert ask(port, '/v1/completions', b'{"prompt": "x", "metadata": [NaN]}')[0] == 400
    status, answer = ask(port, '/v1/completions', dict(prompt=['a'] * 100_000, n=16))
    assert status == 400 and '100,000 prompts with n=16' in answer['error']['message']
    assert ask(port, '/v1/nothing', {})[0] == 404
    assert ask(port, '/v1/completions', method='GET')[0] == 405
    for kind in ('text/plain', 'application/jsonp', ''):
        assert ask(port, '/v1/completions', b'{}', Content_Type=kind)[0] == 415
    assert ask(port, '/v1/completions', b' ' * (5 << 20))[0] == 413
    status, answer = ask(port, '/v1/models', method='GET', Host='elsewhere.example')
    assert status == 403 and 'elsewhere.example' in answer['error']['message']


@pytest.mark.slow
def test_a_model_without_a_form_for_conversations(folder):
    with serving(folder, 'text') as (_, port):
        status, answer = ask(port, '/v1/chat/completions', dict(messages=HELLO))
        assert status == 400 and 'no form for conversations' in answer['error']['message']
        status, answer = ask(port, '/v1/completions', dict(prompt='é'))
        assert status == 400 and 'not in this vocabulary' in answer['error']['message']
        assert set(complete(port, prompt='a')['choices'][0]['text']) <= set('xyz')
        # more of the likeliest than there are tokens
        logprobs = complete(port, prompt='a', max_tokens=1, logprobs=20)['choices'][0]['logprobs']
        [likeliest] = logprobs['top_logprobs']
        assert len(likeliest) == char_tokenizer('abcxyz.').vocab_size
        assert sum(map(math.exp, likeliest.values())) == pytest.approx(1)


@pytest.mark.slow
def test_a_key(folder):
    with serving(folder, env=dict(FLEDGE_API_KEY='a-secret')) as (_, port):
        for key in ('', 'another', 'é'):
            with pytest.raises((openai.AuthenticationError, UnicodeError, openai.OpenAIError)):
                client_of(port, api_key=key).models.list()
        assert client_of(port, api_key='a-secret').models.list().data
        assert ask(port, '/v1/models', method='GET')[0] == 401
        assert ask(port, '/health', method='GET')[0] == 200


@pytest.mark.slow
def test_where_it_does_not_listen(folder, port):
    words = fails(folder, 'serve.py', '--host=0.0.0.0', '--port=0')
    assert words == 'error: --host=0.0.0.0 lets others in: set --api_key or FLEDGE_API_KEY\n'
    words = fails(folder, 'serve.py', '--api_key=a-sécret', '--port=0')
    assert words.startswith('error: the API key is of ASCII letters, digits and signs')
    words = fails(folder, 'serve.py', f'--port={port}')
    assert f'cannot listen at 127.0.0.1:{port}: Address already in use' in words
    assert 'no checkpoint' in fails(folder, 'serve.py', '--out_dir=nowhere', '--port=0')


def test_a_body_that_does_not_come_is_not_waited_for(folder):
    with serving(folder, 'out', '--body_timeout=0.1') as (_, port):
        connection = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
        connection.putrequest('POST', '/v1/completions')
        connection.putheader('Content-Type', 'application/json')
        connection.putheader('Content-Length', '1000')
        connection.endheaders(b'{"prompt": ')
        answer = connection.getresponse()
        assert answer.status == 408 and 'longer than 0.1 seconds' in answer.read().decode()
        assert connection.sock is None  # the server has said that it closes


@pytest.mark.slow
def test_a_model_that_fails_is_told_and_the_next_request_is_served(folder):
    with serving(folder, 'broken') as (_, port):
        connection, answer = begin_stream(port, prompt='long', max_tokens=60_000)
        status, refused = ask(port, '/v1/completions', dict(prompt='!'))
        assert status == 500 and 'not finite' in refused['error']['message']
        assert refused['error']['type'] == 'server_error'
        assert b'"type": "server_error"' in answer.read()  # which was decoded beside it
        assert at_hand(port) == (0, 0)
        assert complete(port, prompt='a', max_tokens=5)['usage']['completion_tokens'] == 5


# ---- several at once


def test_a_reply_beside_seven_others_is_the_one_alone(port):
    prompts = [f'{"prompt " * i}number {i}' for i in range(8)]

    def text(prompt):
        answer = complete(port, prompt=prompt, max_tokens=60, temperature=0)
        return answer['choices'][0]['text']

    alone = [text(prompt) for prompt in prompts]
    together = {}
    threads = [
        threading.Thread(target=lambda p=prompt: together.update({p: text(p)}))
        for prompt in prompts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [together[prompt] for prompt in prompts] == alone


def test_nobody_waits_for_anothers_whole_reply_and_who_hangs_up_leaves(folder):
    with serving(folder, 'endless') as (process, port):
        connection, answer = begin_stream(port, prompt='long', max_tokens=60_000)
        short = complete(port, prompt='short', max_tokens=5)
        assert short['usage']['completion_tokens'] == 5
        wait_until(lambda: at_hand(port) == (1, 0))  # the long one is still going
        assert answer.readline() is not None
        whole = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
        body = json.dumps(dict(prompt='whole', max_tokens=60_000))
        whole.request('POST', '/v1/completions', body, {'Content-Type': 'application/json'})
        wait_until(lambda: at_hand(port) == (2, 0))
        answer.close()
        connection.close()
        wait_until(lambda: at_hand(port) == (1, 0))
        whole.close()
        wait_until(lambda: at_hand(port) == (0, 0))
        assert process.poll() is None


@pytest.mark.slow
def test_a_queue_is_bounded_in_length_and_in_time(folder):
    flags = ('--max_batch=1', '--max_waiting=1')
    with serving(folder, 'endless', *flags, '--max_wait=0.5') as (_, port):
        connection, answer = begin_stream(port, prompt='long', max_tokens=60_000)
        status, body = ask(port, '/v1/completions', dict(prompt='late'))
        assert status == 429 and 'no turn came within 0.5 seconds' in body['error']['message']
        assert at_hand(port) == (1, 0)
    with serving(folder, 'endless', *flags) as (_, port):
        connection, answer = begin_stream(port, prompt='long', max_tokens=60_000)
        second = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
        body = json.dumps(dict(prompt='second', max_tokens=3))
        second.request('POST', '/v1/completions', body, {'Content-Type': 'application/json'})
        wait_until(lambda: at_hand(port) == (1, 1))
        with pytest.raises(openai.RateLimitError, match='wait already'):
            client_of(port).completions.create(model='endless', prompt='third')
        second.close()  # it hangs up while it waits
        wait_until(lambda: at_hand(port) == (1, 0))
        second.request('POST', '/v1/completions', body, {'Content-Type': 'application/json'})
        wait_until(lambda: at_hand(port) == (1, 1))
        answer.close()
        connection.close()
        assert second.getresponse().status == 200


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_replies_at_hand(folder, number):
    with serving(folder, 'endless', '--max_batch=1') as (process, port):
        connection, answer = begin_stream(port, prompt='long', max_tokens=2000)
        second = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
        body = json.dumps(dict(prompt='second', max_tokens=3))
        second.request('POST', '/v1/completions', body, {'Content-Type': 'application/json'})
        wait_until(lambda: at_hand(port) == (1, 1))
        process.send_signal(number)
        rest = answer.read()
        assert rest.endswith(b'data: [DONE]\n\n') and b'"finish_reason": "length"' in rest
        assert json.loads(second.getresponse().read())['usage']['completion_tokens'] == 3
        assert process.wait(60) == 0 and process.stderr.read() == ''


@pytest.mark.slow
def test_a_second_interrupt_waits_for_nothing(folder):
    with serving(folder, 'endless') as (process, port):
        connection, answer = begin_stream(port, prompt='long', max_tokens=60_000)
        process.send_signal(signal.SIGINT)
        wait_until(lambda: not listens(port))  # it takes nobody in any more
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0 and process.stderr.read() == ''


# ---- enemies

NUMBERS = 'temperature top_p top_k min_p max_tokens n seed repetition_penalty presence_penalty'
NUMBERS = [*NUMBERS.split(), 'frequency_penalty']
FIELDS = [*NUMBERS, 'model', 'stop', 'stream', 'stream_options', 'logprobs', 'logit_bias', 'tools']
GOOD = [
    ('/v1/completions', dict(prompt='x', max_tokens=1)),
    ('/v1/chat/completions', dict(max_tokens=1, messages=HELLO)),
]
NOWHERE_RIGHT = [10**30, -(10**30), 1e308, [[]], [None], [{}], [['a', 1]]]


def hostile_body(chance, good):
    """The bytes of a body that is broken, or asks for what cannot be."""
    kind = chance.randint(0, 7)
    if kind == 0:
        return chance.randbytes(chance.randint(1, 200))
    if kind == 1:
        data = json.dumps(good).encode()
        return data[: chance.randint(0, len(data) - 1)]
    if kind == 2:
        value = chance.choice([b'NaN', b'Infinity', b'1e999', b'-' + b'9' * 5000, b'0x1'])
        return b'{"temperature": ' + value + b', ' + json.dumps(good)[1:].encode()
    if kind == 3:
        return chance.choice([b'[', b'{"a":']) * 100_000
    if kind == 4:
        return json.dumps(chance.choice([1, None, 'x', [good], True])).encode()
    if kind == 5:
        return chance.choice([b'{"prompt": "\\ud800"}', b'{"prompt": "\xff"}', b'{"a": 1, "a": 2}'])
    if kind == 6:
        values = ['x', '', True, {}, [], [1]]
        return json.dumps(good | {chance.choice(NUMBERS): chance.choice(values)}).encode()
    name = chance.choice([*FIELDS, *good, 'unknown'])
    return json.dumps(good | {name: chance.choice(NOWHERE_RIGHT)}).encode()


def half_closed(port, chance):
    """A connection that is closed on this side in the middle of a request; what comes back."""
    data = b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
    data += b'Content-Length: 1000\r\n\r\n{"prompt": "x"}'
    kind = chance.randint(0, 6)
    if kind == 1:
        data = chance.randbytes(300)
    if kind == 2:
        data = b'GET / HTTP/1.1\r\n' + b'X-Long: ' + b'x' * 200_000
    if kind == 3:
        data = data[: chance.randint(1, len(data))]
    if kind == 4:
        length = chance.choice([b'-1', b'1e9', b'9' * 30, b'3', b'2, 3', b''])
        data = data.replace(b'1000', length)
    if kind > 4:
        chunk = chance.choice([b'zz\r\n', b'5\r\n{"pr\r\n-1\r\n', b'f' * 40, b'ffff\r\n{'])
        data = data.replace(b'Content-Length: 1000', b'Transfer-Encoding: chunked')
        data = data[: data.index(b'{')] + chunk
    with socket.create_connection(('127.0.0.1', port), timeout=60) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            return connection.recv(1000)
        except OSError:  # it has hung up already
            return b''


@pytest.mark.slow
def test_no_request_ends_the_server(folder):
    chance = random.Random(0)
    with serving(folder) as (process, port):
        before = complete(port, prompt='good', max_tokens=5, temperature=0)['choices']
        slow = socket.create_connection(('127.0.0.1', port), timeout=60)
        slow.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n')
        for i in range(2000):
            if i % 10 == 0:
                back = half_closed(port, chance)
                assert back == b'' or re.match(rb'HTTP/1.1 4\d\d ', back), back
                continue
            path, good = chance.choice(GOOD)
            body = hostile_body(chance, good)
            status, answer = ask(port, path, body)
            assert 400 <= status < 500 and answer['error']['message'], (body[:99], answer)
        slow.close()
        wait_until(lambda: at_hand(port) == (0, 0))
        after = complete(port, prompt='good', max_tokens=5, temperature=0)['choices']
        assert after == before and process.poll() is None


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='needs /proc')
def test_memory_is_flat(folder):
    chance = random.Random(0)

    def memory(process):
        with open(f'/proc/{process.pid}/statm') as f:
            return int(f.read().split()[1]) * os.sysconf('SC_PAGESIZE')

    with serving(folder) as (process, port):
        for i in range(600):
            prompt = 'x' * chance.randint(1, 200)
            complete(port, prompt=prompt, max_tokens=chance.randint(1, 30), n=chance.randint(1, 3))
            if i == 200:
                before = memory(process)
        assert memory(process) - before < 20e6
