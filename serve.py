"""A model behind the OpenAI API, and a page to talk to it.

python serve.py --out_dir=out-sft                 then open http://127.0.0.1:8000
python serve.py --init_from=HuggingFaceTB/SmolLM2-135M-Instruct --port=8001
FLEDGE_API_KEY=a-secret python serve.py --host=0.0.0.0

curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
    -d '{"messages": [{"role": "user", "content": "What does os.path.join do?"}]}'

Requests that come together are decoded together: a thread beside the event loop draws the next
token of each, and between two tokens who waits is taken in, and who has hung up let go.
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
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields

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


def listen(host, port):
    """A socket that listens at host and port; UserError where that cannot be."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        if os.name == 'posix':  # Windows would let two servers listen at one port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(1024)
    except (OSError, UnicodeError) as e:
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
if not re.fullmatch('[!-~]*', api_key):
    raise UserError('the API key is of ASCII letters, digits and signs: clients send no others')
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
if os.path.isdir(path):
    model_id = os.path.basename(os.path.abspath(path))
elif os.path.isfile(path):  # a run's: the folder's name, and the file's unless it is the latest
    folder, name = os.path.split(os.path.abspath(path))
    model_id = os.path.basename(folder)
    if name != 'ckpt.pt':
        model_id += f'/{name}'
else:  # a name on the hub
    model_id = path
names = {field.name for field in fields(Sampling)} & globals().keys()
defaults = {name: globals()[name] for name in names}
defaults['ends'] = tuple(huggingface.ends(tokenizer))
is_chat = is_tuned(model, tokenizer)  # else the page is one to complete a text in
# beside the event loop a thread owns the model, and another encodes texts, one at a time
decoding, encoding = ThreadPoolExecutor(1), ThreadPoolExecutor(1)


# ---- the replies that wait, and those that are decoded: only the event loop touches the two lists


class Task:
    """A reply on its way, and where what is new of it goes."""

    def __init__(self, index, reply, news):
        self.index, self.reply = index, reply
        self.news = news  # an asyncio.Queue of what Answers.chunk takes, a dict, or a Refusal
        self.cancelled = False
        self.n_sent = 0  # tokens whose log probabilities are sent

    def tell(self):
        """Put what is new of the reply among the news, if anything is."""
        reply, logprobs = self.reply, None
        text = reply.take()
        if reply.sampling.n_logprobs is not None:
            logprobs = reply.logprobs[self.n_sent :]
            self.n_sent = len(reply.logprobs)
        if text or logprobs or reply.finish_reason:
            about = dict(logprobs=logprobs, finish_reason=reply.finish_reason)
            self.news.put_nowait(dict(index=self.index, text=text) | about)


waiting, going = deque(), []  # Tasks
arrived = asyncio.Event()  # a Task has begun to wait


async def decode():
    """Decode what waits, for as long as the process lives."""
    loop, batch = asyncio.get_running_loop(), None
    while True:
        while not waiting and not going:
            arrived.clear()
            await arrived.wait()
        leaving = [task for task in going if task.cancelled]
        going[:] = [task for task in going if not task.cancelled]
        # one at a step, so that those who go on do not wait for many prompts to be read
        joining = waiting.popleft() if waiting and len(going) < max_batch else None
        if joining:
            going.append(joining)
        try:
            batch = await loop.run_in_executor(decoding, step, batch, joining, leaving)
        except Exception as e:  # a model whose numbers are broken, or a full memory
            print(f'error: {type(e).__name__}: {e}', file=sys.stderr)
            batch = None  # what it holds may be half written
            for task in going:
                task.news.put_nowait(Refusal(f'the model failed: {e}', status=500))
            going.clear()
        for task in going:
            task.tell()
        going[:] = [task for task in going if not task.reply.finish_reason]


def step(batch, joining, leaving):
    """Draw the next token of each reply of a Batch, which it returns; None: a new one."""
    batch = batch or Batch(model, max_batch)
    for task in leaving:
        batch.remove(task.reply)
    if joining:
        batch.add(joining.reply)
    batch.step()
    return batch


def submit(replies):
    """Let replies wait for their turn; their Tasks, and the queue of their news."""
    if len(waiting) + len(replies) > max_waiting + max_batch - len(going):
        raise Refusal(f'{len(waiting)} replies wait already: try later', status=429)
    news = asyncio.Queue()
    tasks = [Task(index, reply, news) for index, reply in enumerate(replies)]
    waiting.extend(tasks)
    arrived.set()
    return tasks, news


async def cancel(tasks):
    """Let go of tasks, which their client does not wait for any more."""
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
            if 'seed' in settings:
                settings['seed'] += i
            replies.append(Reply(tokenizer, prompt, Sampling(**settings)))
    return replies


async def generate(request, is_chat):
    body = parse(await read_body(request))
    asked = read_request(body, is_chat, model_id, max_batch + max_waiting)
    loop = asyncio.get_running_loop()
    prompts = await loop.run_in_executor(encoding, encode, asked)
    replies = replies_to(asked, prompts)
    answers = Answers(asked, model_id, tokenizer)
    tasks, news = submit(replies)
    hangup = asyncio.create_task(tell_hangup(request, news))
    try:
        first = await first_news(tasks, news)
        while not asked.stream and not all(reply.finish_reason for reply in replies):
            await next_news(news)
    except BaseException:
        await cancel(tasks)
        raise
    finally:
        hangup.cancel()
    if not asked.stream:
        return JSONResponse(answers.whole(replies, usage_of(prompts, replies)))
    return StreamingResponse(
        events(answers, prompts, replies, news, first),
        headers={'Cache-Control': 'no-cache'},
        media_type='text/event-stream',
        background=BackgroundTask(cancel, tasks),  # at its end, or where the client hangs up
    )


async def tell_hangup(request, news):
    """Put a Refusal among the news when the client hangs up."""
    while (await request.receive())['type'] != 'http.disconnect':
        pass
    news.put_nowait(Refusal('the client has hung up'))


async def next_news(news):
    item = await news.get()
    if isinstance(item, Refusal):
        raise item
    return item


async def first_news(tasks, news):
    """The first of the news; Refusal where the turn of no task has come within max_wait seconds."""
    with suppress(TimeoutError):
        return await asyncio.wait_for(next_news(news), max_wait)
    if all(task in waiting for task in tasks):
        raise Refusal(f'no turn came within {max_wait:g} seconds: try later', status=429)
    return await next_news(news)


async def events(answers, prompts, replies, news, item):
    """A streamed answer, as server-sent events; item: the first of the news."""
    n_going = len(replies)
    try:
        while True:
            yield event(answers.chunk(**item))
            n_going -= item['finish_reason'] is not None
            if not n_going:
                break
            item = await next_news(news)
    except Refusal as refusal:  # the status is sent already
        yield event(refusal.body)
        return
    if answers.request.include_usage:
        usage = usage_of(prompts, replies)
        yield event(answers.as_chunk(choices=[], usage=usage))
    yield 'data: [DONE]\n\n'


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
    if not is_loopback(named.strip('[]')):  # a name that somebody points at this machine
        raise Refusal(f'this server does not answer for the host {named[:100]!r}', status=403)


async def page(request):
    with open(PAGE, encoding='utf-8') as f:
        return HTMLResponse(f.read(), headers={'X-Frame-Options': 'DENY'})


async def health(request):
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
    app = Starlette(routes=routes, exception_handlers=handlers)
    # h11 bounds what the headers of a request may hold
    options = dict(http='h11', log_level='warning', timeout_keep_alive=30, lifespan='off')
    config = uvicorn.Config(app, **options)
    name = f'[{address[0]}]' if ':' in address[0] else address[0]
    print(f'{model_id} is served at http://{name}:{address[1]}', flush=True)
    async with asyncio.TaskGroup() as group:
        group.create_task(decode())
        await uvicorn.Server(config).serve(sockets=[listening])


def leave(*_):
    os._exit(0)  # a thread in the middle of a token, after a second Ctrl-C, is not waited for


signal.signal(signal.SIGTERM, leave)  # which uvicorn hands on once the replies at hand have ended
signal.signal(signal.SIGINT, leave)
asyncio.run(serve())
