"""Continue a prompt with a trained model, answer a file of prompts, or talk in the terminal.

python sample.py --start="def main(" --num_samples=3 --top_p=0.9
python sample.py --out_dir=out-shakespeare --start=FILE:prompt.txt
cat prompt.txt | python sample.py --start=- --num_samples=1 > continued.txt
python sample.py --out_dir=out-sft --ask="What does os.path.join do?"
python sample.py --out_dir=out-sft --chat
python sample.py --prompts=prompts.txt --output=results.jsonl
python sample.py --start="def main(" --attention=attention.png
"""

import json as json_
import sys
import time
from contextlib import suppress
from dataclasses import fields, replace

from fledge import UserError
from fledge.configurator import configure, given, one_of
from fledge.device import Machine
from fledge.formats import huggingface
from fledge.generation import Sampling, generate, load
from fledge.prompts import answer_all, new_reply, read_prompts

# -----------------------------------------------------------------------------
init_from = 'resume'  # resume (out_dir's ckpt.pt), a checkpoint file, a Hugging Face folder or name
out_dir = 'out'  # a run's folder
start = '\n'  # the prompt, FILE:prompt.txt, or - for standard input; special tokens count as such
ask = ''  # in place of start: what a user says to a model that was tuned on conversations
chat = False  # in place of start: a conversation in the terminal
system = ''  # what such a model is told before all that a user says
prompts = ''  # in place of start: a file with a prompt a line, or .jsonl with prompt or messages
output = ''  # for prompts: the file of the answers, .jsonl, .json or .txt
batch_size = 32  # samples drawn together
attention = ''  # a PNG: what each token of the prompt looks at, in place of samples
num_samples = 10  # of each prompt; of prompts 1 unless it is given
max_new_tokens = 500  # in each sample
temperature = 0.8  # 0 is greedy, below 1 is safer, above 1 wilder
top_k = 200  # only the k likeliest tokens; 0: all
top_p = 1.0  # only the fewest tokens that have this probability together
min_p = 0.0  # only tokens with this share of the likeliest one's probability
repetition_penalty = 1.0  # above 1, tokens seen before become less likely
presence_penalty = 0.0  # above 0, tokens that a sample has already become less likely
frequency_penalty = 0.0  # the same, by how often it has them
num_beams = 1  # above 1 the likeliest sample is searched, so many beams at a time; nothing is drawn
length_penalty = 1.0  # of beams: above 0 longer samples are likelier, the more the higher
stop = 'auto'  # a sample ends before this text, or a JSON list of them; auto: with its document
seed = 1337  # of the first sample's draws; the next sample's is one more
device = 'auto'  # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'  # auto, float32, bfloat16, float16
quantize = 'none'  # int8: 8-bit weights, faster on a CPU
compile = False  # torch.compile the model, on a GPU; the first tokens then take a minute
json = False  # the last line of output is one JSON object
configure(globals())
# -----------------------------------------------------------------------------
one_of(globals(), quantize=('none', 'int8'))


def text_of(start):
    """The text of a prompt that may be in a file, or come by standard input."""
    try:
        if start == '-':
            start = sys.stdin.buffer.read().decode()
        elif start.startswith('FILE:'):
            with open(start[5:], encoding='utf-8') as f:
                start = f.read()
        start.encode()  # which bytes of the command line that are no UTF-8 fail at
    except (OSError, UnicodeError) as e:
        raise UserError(f'cannot read the prompt: {e}') from None
    return start


def ends_of(stop, tokenizer):
    """Where a sample ends: the ids of end tokens, and texts."""
    if not stop:
        return (), ()
    ends = tuple(huggingface.ends(tokenizer))
    if stop == 'auto':
        return ends, ()
    if stop in tokenizer.special:
        return (tokenizer.special[stop],), ()
    texts = [stop]
    if stop.startswith('['):
        with suppress(ValueError):  # a text that begins so
            texts = json_.loads(stop)
    if not all(isinstance(text, str) and text for text in texts):
        raise UserError(f'--stop={stop} is no list of texts')
    return ends, tuple(texts)


# ---- what is asked for
try:
    f'{ask}{system}'.encode()
except UnicodeError:  # the command line may have any bytes
    raise UserError('--ask and --system must be UTF-8 text') from None
if bool(prompts) != bool(output):
    raise UserError('--prompts=FILE and --output=FILE go together')
ways = [name for name in ('chat', 'prompts', 'ask', 'start') if globals()[name]]
way, *others = ways or ['start']
of_samples = {field.name for field in fields(Sampling)} | {'num_samples', 'batch_size', 'json'}
of_draws = {'top_k', 'top_p', 'min_p', 'seed'}
penalties = {'repetition_penalty', 'presence_penalty', 'frequency_penalty'}
idle = {f'beside --{way}': set(others)}  # why settings have no effect: their names
if chat:
    num_beams = 1
    idle['beside --chat'] |= {'attention', 'batch_size', 'json', 'num_beams', 'num_samples'}
elif prompts:
    idle['beside --prompts'] |= {'attention'}
elif attention:
    idle['beside --attention'] = of_samples
if num_beams > 1:  # the one best is searched
    idle[f'with num_beams={num_beams}'] = of_draws | penalties | {'temperature', 'num_samples'}
else:
    idle['without --num_beams'] = {'length_penalty'}
    if temperature == 0:
        idle['at temperature=0'] = of_draws
if not (ask or chat):
    idle['without --ask or --chat'] = {'system'}
for why, names in idle.items():
    if names & given:
        print(f'without effect {why}: {", ".join(sorted(names & given))}', file=sys.stderr)

# ---- the model, and how its tokens are drawn
machine = Machine(device, dtype)
model, path, tokenizer = load(machine, init_from, out_dir, quantize, compile)
has_encoder = model.config.n_encoder_layer > 0
if has_encoder and (chat or ask):
    raise UserError(f'{path} is an encoder-decoder: --start is its source, it does not converse')
ends, stops = ends_of(stop, tokenizer)
known = {field.name for field in fields(Sampling)} & globals().keys()
settings = {name: globals()[name] for name in known - {'stop', 'ends'}}
sampling = Sampling(**settings, stop=stops, ends=ends)
if num_beams > 1 or (prompts and 'num_samples' not in given):
    num_samples = 1
samplings = [replace(sampling, seed=seed + i) for i in range(num_samples)]
sys.stdout.reconfigure(errors='replace')  # a terminal that cannot show a character shows another

if chat:
    from fledge.conversation import Conversation
    from fledge.terminal import talk

    talk(Conversation(model, tokenizer, sampling, system), path)
    raise SystemExit

if prompts:
    recorded = dict(settings, model=path, stop=stop, num_samples=num_samples, dtype=dtype)
    n = answer_all(model, tokenizer, read_prompts(prompts), samplings, batch_size, output, recorded)
    print(f'{output}: {n} prompts answered')
    if json:
        print(json_.dumps(dict(output=output, answered=n)))
    raise SystemExit

# ---- the prompt
if ask:  # which need not be said again
    start, asked = '', [dict(role='system', content=system)] if system else []
    asked.append(dict(role='user', content=ask))
else:
    start = asked = text_of(start)
replies = [new_reply(model, tokenizer, asked, sampling) for sampling in samplings]
prompt = replies[0].source or replies[0].prompt
if has_encoder or tokenizer.separator:
    start = ''  # it is a source, which the samples do not begin with
if attention:
    from fledge.attention import draw_attention

    draw_attention(model, tokenizer, prompt, attention)
    print(f'{attention} shows what each token looks at')
    raise SystemExit

# ---- the samples, drawn together; they are shown one after the other, each as it comes
number, began = 0, time.monotonic()
read_seconds = n_first = 0  # until the prompt was read, and the tokens that were drawn by then
print(start, end='', flush=True)
try:
    for _ in generate(model, replies, batch_size):
        if not read_seconds:
            read_seconds = time.monotonic() - began
            n_first = sum(len(reply.ids) for reply in replies)
        while number < num_samples:
            print(replies[number].take(), end='', flush=True)
            if not replies[number].finish_reason:
                break
            print('\n---------------')
            number += 1
            if number < num_samples:
                print(start, end='')
except ValueError as e:
    raise UserError(f'{path}: {e}') from None
counts = [len(reply.ids) for reply in replies]
n_timed, seconds = sum(counts) - n_first, time.monotonic() - began - read_seconds
if num_beams > 1:  # which are all there at once
    n_timed, seconds = sum(counts), read_seconds
print(
    f'prompt: {len(prompt):,} tokens, {len(prompt) / read_seconds:,.0f} tokens/s; '
    f'generated: {sum(counts):,} tokens, {n_timed / max(seconds, 1e-3):,.0f} tokens/s',
    file=sys.stderr,
)
if json:
    samples = [start + reply.text for reply in replies]
    reasons = [reply.finish_reason for reply in replies]
    result = dict(start=ask or asked, samples=samples, tokens=counts, finish_reasons=reasons)
    print(json_.dumps(result))
