"""A model behind the OpenAI API, and a page to talk to it.

python serve.py --out_dir=out-sft                 then open http://127.0.0.1:8000
python serve.py --init_from=HuggingFaceTB/SmolLM2-135M-Instruct --port=8001
FLEDGE_API_KEY=a-secret python serve.py --host=0.0.0.0

curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
    -d '{"messages": [{"role": "user", "content": "What does os.path.join do?"}]}'

Requests that come together are decoded together: one thread owns the model, and between two tokens
takes in who waits and lets go who has ended or hung up.
"""

import asyncio
import hmac
import ipaddress
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from typing import NamedTuple

from fledge import UserError
from fledge.configurator import configure, one_of
from fledge.conversation import is_tuned
from fledge.device import Machine
from fledge.formats import huggingface
from fledge.generation import Batch, Reply, Sampling, load
from fledge.openai_api import Answers, Refusal, parse, read_request, usage_of

# -----------------------------------------------------------------------------
init_from = 'resume'  # resume (out_dir's ckpt.pt), a checkpoint file, a Hugging Face folder or name
out_dir = 'out'  # a run's folder
host = '127.0.0.1'  # the address to listen at; any but this machine's own needs a key
port = 8000  # 0: one that is free
api_key = ''  # what requests must carry; '': the environment's FLEDGE_API_KEY, if it has one
max_batch = 16  # replies decoded together
max_waiting = 64  # replies that wait for their turn; beyond that a request is refused
max_wait = 60.0  # seconds that a reply waits at most
body_timeout = 30.0  # seconds that the body of a request may take to come
# where a request does not say otherwise
max_new_tokens = 500  # in a reply
temperature = 0.8  # 0 is greedy, below 1 is safer, above 1 wilder
top_k = 200  # only the k likeliest tokens; 0: all
top_p = 1.0  # only the fewest tokens that have this probability together
min_p = 0.0  # only tokens with this share of the likeliest one's probability
repetition_penalty = 1.0  # above 1, tokens seen before become less likely
device = 'auto'  # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'  # auto, float32, bfloat16, float16
quantize = 'none'  # int8: 8-bit weights, faster on a CPU
compile = False  # torch.compile the model, on a GPU; the first tokens then take a minute
configure(globals())  # which says in a line what is not installed of the rest
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

# -----------------------------------------------------------------------------
one_of(globals(), quantize=('none', 'int8'))
MOST_BYTES = 4 << 20  # of a body
PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'fledge', 'page.html')
LOOPBACK = ['127.0.0.1', 'localhost', '::1']


def listen(host, port):
    """A socket that listens at host and port; UserError where that cannot be."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(1024)
    except (OSError, OverflowError, UnicodeError) as e:
        why = getattr(e, 'strerror', None) or e
        raise UserError(
            f'cannot listen at {host}:{port}: {why}; --port=0 takes a free one'
        ) from None
    return sock


def is_loopback(host):
    if host == 'localhost':
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


# ---- before anything takes long: may it listen there
api_key = api_key or os.environ.get('FLEDGE_API_KEY', '')
if not api_key and not is_loopback(host):
    raise UserError(f'--host={host} lets others in: set --api_key or FLEDGE_API_KEY')
listening = listen(host, port)
address = listening.getsockname()

# ---- the model
machine = Machine(device, dtype)
model, path, tokenizer = load(machine, init_from, out_dir, quantize, compile)
if model.config.n_encoder_layer:
    raise UserError(
        f'{path} is an encoder-decoder, for which this API has no place: python sample.py --prompts'
    )
context = model.config.block_size
if os.path.isfile(path):  # a run's: the folder's name, and the file's unless it is the latest
    folder, name = os.path.split(os.path.abspath(path))
    model_id = os.path.basename(folder) + ('' if name == 'ckpt.pt' else f'/{name}')
else:
    model_id = os.path.basename(os.path.abspath(path)) if os.path.isdir(path) else path
names = {field.name for field in fields(Sampling)} & globals().keys()
defaults = {name: globals()[name] for name in names}
defaults['ends'] = tuple(huggingface.ends(tokenizer))
is_chat = is_tuned(model, tokenizer)  # else the page is one to complete a text in
encoding = ThreadPoolExecutor(1)  # a long text is encoded beside the loop, one at a time


# ---- the thread that decodes


class News(NamedTuple):
    """What is new of a Task."""

    task: 'Task'
    text: str
    logprobs: list | None  # of the new tokens, as generation.Reply has them
    finish_reason: str | None
    failure: Refusal | None = None


class Task:
    """A reply on its way, and where the news of it go."""

    def __init__(self, index, reply, news):
        self.index, self.reply = index, reply
        self.news = news  # an asyncio.Queue of News
        self.joined = self.cancelled = False
        self.n_sent = 0  # tokens whose log probabilities are sent

    def new(self):
        """What is new of it, or None."""
        reply, logprobs = self.reply, None
        text = reply.take()
        if reply.sampling.n_logprobs is not None:
            logprobs = reply.logprobs[self.n_sent :]
            self.n_sent = len(reply.logprobs)
        if text or logprobs or reply.finish_reason:
            return News(self, text, logprobs, reply.finish_reason)
        return None


# Tasks, which go from the one to the other under `changed`; `going` is the decoding thread's
waiting, going = deque(), []
changed = threading.Condition()


def decode(loop):
    """Decode what waits, for as long as the process lives."""
    batch = None
    while True:
        with changed:
            while not waiting and not going:
                changed.wait()
            # one at a step, so that those who go on do not wait for many prompts to be read
            joining = waiting.popleft() if waiting and len(going) < max_batch else None
            if joining:
                joining.joined = True
                going.append(joining)
        try:
            batch = batch or Batch(model, max_batch)
            if joining:
                batch.add(joining.reply)
            for task in [task for task in going if task.cancelled]:
                batch.remove(task.reply)
                going.remove(task)
            batch.step()
            news = [task.new() for task in going]
        except Exception as e:  # a model whose numbers are broken, or a full memory
            print(f'error: {type(e).__name__}: {e}', file=sys.stderr)
            batch = None  # what it holds may be half written
            why = f'the model failed: {e}'
            news = [News(task, '', None, None, Refusal(why, status=500)) for task in going]
            going.clear()
        going[:] = [task for task in going if not task.reply.finish_reason]
        loop.call_soon_threadsafe(deliver, list(filter(None, news)))


def deliver(news):
    for item in news:
        item.task.news.put_nowait(item)


def submit(replies):
    """Let replies wait for their turn; their Tasks, and the queue of their news."""
    news = asyncio.Queue()
    tasks = [Task(index, reply, news) for index, reply in enumerate(replies)]
    with changed:
        if len(waiting) + len(tasks) > max_waiting + max_batch - len(going):
            raise Refusal(f'{len(waiting)} replies wait already: try later', status=429)
        waiting.extend(tasks)
        changed.notify()
    return tasks, news


def cancel(tasks):
    """Let go of tasks, which their client does not wait for any more."""
    with changed:
        for task in tasks:
            task.cancelled = True
            if task in waiting:
                waiting.remove(task)


# ---- what is asked, and what is answered


async def read_body(request):
    kind = request.headers.get('content-type', '').partition(';')[0]
    if kind.strip().lower() != 'application/json':
        raise Refusal('the Content-Type of a body is application/json', status=415)
    data = bytearray()
    try:
        async with asyncio.timeout(body_timeout):
            async for part in request.stream():
                data += part
                if len(data) > MOST_BYTES:
                    raise Refusal(f'the body is longer than {MOST_BYTES:,} bytes', status=413)
    except TimeoutError:
        raise Refusal(f'the body took longer than {body_timeout:g} seconds', status=408) from None
    return bytes(data)


def encode(asked):
    """The prompts of a request as token ids; Refusal for what is no prompt of this model."""
    try:
        if asked.is_chat and not tokenizer.has_chat_form:
            raise UserError('this model has no form for conversations: use /v1/completions')
        if asked.is_chat:
            prompts = [tokenizer.encode_chat_prompt(asked.messages)]
        else:
            prompts = [
                tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt
                for prompt in asked.prompts
            ]
    except UserError as e:
        raise Refusal(str(e), 'messages' if asked.is_chat else 'prompt') from None
    for prompt in prompts:
        if min(prompt) < 0 or max(prompt) >= model.config.vocab_size:
            raise Refusal(f'token ids are 0 to {model.config.vocab_size - 1:,}', 'prompt')
        if len(prompt) >= context:
            raise Refusal(
                f'the prompt is {len(prompt):,} tokens, and the context of this model {context:,}',
                'messages' if asked.is_chat else 'prompt',
                code='context_length_exceeded',
            )
    return prompts


def replies_to(asked, prompts):
    replies = []
    for prompt in prompts:
        for i in range(asked.n):
            settings = defaults | asked.sampling
            room = context - len(prompt)
            settings['max_new_tokens'] = min(settings['max_new_tokens'], room)
            if settings.get('seed') is not None:
                settings['seed'] += i
            replies.append(Reply(tokenizer, prompt, Sampling(**settings)))
    return replies


async def generate(request, is_chat):
    body = parse(await read_body(request))
    asked = read_request(body, is_chat, model_id, max_batch + max_waiting)
    loop = asyncio.get_running_loop()
    prompts = await loop.run_in_executor(encoding, encode, asked)
    replies = replies_to(asked, prompts)
    tasks, news = submit(replies)
    answers = Answers(asked, model_id, tokenizer)
    hangup = asyncio.ensure_future(hung_up(request))
    try:
        first = await first_news(tasks, news, hangup)
        while not asked.stream:
            if all(reply.finish_reason for reply in replies):
                return JSONResponse(answers.whole(replies, usage_of(prompts, replies)))
            await next_news(news, hangup)
    except BaseException:
        cancel(tasks)
        raise
    finally:
        hangup.cancel()
    stream = events(answers, prompts, tasks, news, first)
    # where the client hangs up before the first event is sent, events() is never begun
    let_go = BackgroundTask(cancel, tasks)
    headers = {'Cache-Control': 'no-cache'}
    return StreamingResponse(
        stream, headers=headers, media_type='text/event-stream', background=let_go
    )


async def hung_up(request):
    """Wait until the client hangs up."""
    while (await request.receive())['type'] != 'http.disconnect':
        pass


async def next_news(news, hangup, timeout=None):
    """The next of the news; ClientDisconnect where the client hangs up, None after the timeout."""
    coming = asyncio.ensure_future(news.get())
    await asyncio.wait({coming, hangup}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    if not coming.done():
        coming.cancel()
        if hangup.done():
            raise ClientDisconnect
        return None
    return checked(coming.result())


def checked(item):
    if item.failure:
        raise item.failure
    return item


async def first_news(tasks, news, hangup):
    """The first of the news; Refusal where the turn of no task has come within max_wait seconds."""
    while (item := await next_news(news, hangup, max_wait)) is None:
        if not any(task.joined for task in tasks):
            raise Refusal(f'no turn came within {max_wait:g} seconds: try later', status=429)
    return item


async def events(answers, prompts, tasks, news, item):
    """A streamed answer, as server-sent events; item: the first of the news."""
    begun, n_ended = set(), 0
    try:
        while True:
            index = item.task.index
            is_first = index not in begun
            begun.add(index)
            yield event(
                answers.chunk(index, item.text, item.logprobs, item.finish_reason, is_first)
            )
            n_ended += bool(item.finish_reason)
            if n_ended == len(tasks):
                break
            item = checked(await news.get())
        if answers.request.include_usage:
            usage = usage_of(prompts, [task.reply for task in tasks])
            yield event(answers.as_chunk(choices=[], usage=usage))
        yield 'data: [DONE]\n\n'
    except Refusal as refusal:  # the status is sent already
        yield event(refusal.body)
    finally:
        cancel(tasks)


def event(content):
    return f'data: {json.dumps(content)}\n\n'


# ---- the routes


def admit(request):
    """Refusal for a request that lacks the key or, without one, that another site makes."""
    if api_key:
        given = request.headers.get('authorization', '').removeprefix('Bearer ')
        if not hmac.compare_digest(given.encode(), api_key.encode()):
            raise Refusal(
                'a key is needed: Authorization: Bearer KEY', None, 401, 'invalid_api_key'
            )
        return
    named = re.sub(r':\d+$', '', request.headers.get('host', ''))
    if named.strip('[]') not in [*LOOPBACK, host]:  # a name that somebody points at this machine
        raise Refusal(f'this server does not answer for the host {named[:100]!r}', status=403)


async def page(request):
    with open(PAGE, encoding='utf-8') as f:
        return HTMLResponse(f.read(), headers={'X-Frame-Options': 'DENY'})


async def health(request):
    with changed:
        return JSONResponse(dict(status='ok', decoding=len(going), waiting=len(waiting)))


async def models(request):
    admit(request)
    own = dict(chat=is_chat, context=context)
    served = dict(id=model_id, object='model', created=started, owned_by='fledge', **own)
    return JSONResponse(dict(object='list', data=[served]))


async def chat_completions(request):
    admit(request)
    return await generate(request, is_chat=True)


async def completions(request):
    admit(request)
    return await generate(request, is_chat=False)


async def refuse(request, refusal):
    # what is left of a body is not waited for
    headers = {'Connection': 'close'} if refusal.status in (408, 413, 415) else {}
    return JSONResponse(refusal.body, refusal.status, headers)


async def no_route(request, error):
    refusal = Refusal(
        f'{error.detail}: {request.method} {request.url.path}', status=error.status_code
    )
    return JSONResponse(refusal.body, error.status_code, error.headers)


async def nobody_hears(request, error):
    return Response(status_code=400)


started = int(time.time())
routes = [
    Route('/', page),
    Route('/health', health),
    Route('/v1/models', models),
    Route('/v1/chat/completions', chat_completions, methods=['POST']),
    Route('/v1/completions', completions, methods=['POST']),
]
handlers = {Refusal: refuse, HTTPException: no_route, ClientDisconnect: nobody_hears}


async def serve():
    thread = threading.Thread(target=decode, args=(asyncio.get_running_loop(),), daemon=True)
    thread.start()
    app = Starlette(routes=routes, exception_handlers=handlers)
    # h11 bounds what the headers of a request may hold
    options = dict(http='h11', log_level='warning', timeout_keep_alive=30, lifespan='off')
    config = uvicorn.Config(app, **options)
    name = f'[{address[0]}]' if ':' in address[0] else address[0]
    print(f'{model_id} is served at http://{name}:{address[1]}', flush=True)
    await uvicorn.Server(config).serve(sockets=[listening])


def leave(*_):
    os._exit(0)  # a thread in the middle of a token, after a second Ctrl-C, is not waited for


signal.signal(signal.SIGTERM, leave)  # which uvicorn hands on once the replies at hand have ended
signal.signal(signal.SIGINT, leave)
asyncio.run(serve())
