"""Continue a prompt with a trained model.

python sample.py --start="def main(" --num_samples=3 --top_p=0.9
python sample.py --out_dir=out-shakespeare --start=FILE:prompt.txt
python sample.py --out_dir=out-sft --ask="What does os.path.join do?"
"""

import json as json_
import sys

from fledge import UserError, checkpoint, cpu
from fledge.configurator import configure, given, one_of
from fledge.device import Machine
from fledge.formats import huggingface
from fledge.quantize import apply as quantize_weights
from fledge.quantize import is_quantized

# -----------------------------------------------------------------------------
init_from = 'resume'  # resume (out_dir's ckpt.pt), a checkpoint file, a Hugging Face folder or name
out_dir = 'out'  # a run's folder
start = '\n'  # the prompt, or FILE:prompt.txt; special tokens such as <|endoftext|> count as such
ask = ''  # in place of start: what a user says to a model that was tuned on conversations
num_samples = 10  # drawn together
max_new_tokens = 500  # in each sample
temperature = 0.8  # 0 is greedy, below 1 is safer, above 1 wilder
top_k = 200  # only the k likeliest tokens; 0: all
top_p = 1.0  # only the fewest tokens that have this probability together
min_p = 0.0  # only tokens with this share of the likeliest one's probability
repetition_penalty = 1.0  # above 1, tokens seen before become less likely
stop = 'auto'  # the special token that ends a sample; auto: of a text or of a turn; '': none
seed = 1337  # of the draws
device = 'auto'  # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'  # auto, float32, bfloat16, float16
quantize = 'none'  # int8: 8-bit weights, faster on a CPU
compile = False  # torch.compile the model, on a GPU; the first tokens then take a minute
json = False  # the last line of output is one JSON object
configure(globals())
# -----------------------------------------------------------------------------
one_of(globals(), quantize=('none', 'int8'))
idle = given & {'top_k', 'top_p', 'min_p', 'seed'}
if temperature == 0 and idle:
    print(f'without effect at temperature=0: {", ".join(sorted(idle))}', file=sys.stderr)

# ---- the model and its tokenizer
machine = Machine(device, dtype)
state, path, tokenizer = huggingface.load_with_tokenizer(init_from, out_dir)
model = checkpoint.load_model(state, path).to(machine.device, machine.dtype).eval()
if quantize == 'int8' and is_quantized(model):
    print(f'without effect: {path} has 8-bit weights already', file=sys.stderr)
elif quantize == 'int8':
    quantize_weights(model)
if compile and is_quantized(model):
    raise UserError('8-bit weights run on kernels of their own: leave out --compile')
if compile:
    model.compile()
elif machine.type == 'cpu':
    cpu.speed_up(model, packed=True)

# ---- the prompt, and where a sample ends
if ask and 'start' in given:
    print('without effect beside --ask: start', file=sys.stderr)
if ask:
    start = tokenizer.chat_prompt([dict(role='user', content=ask)])
if start.startswith('FILE:'):
    try:
        with open(start[5:], encoding='utf-8') as f:
            start = f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f'cannot read the prompt: {e}') from None
try:
    start.encode()
except UnicodeEncodeError:
    raise UserError('--start is no valid UTF-8') from None
prompt = tokenizer.encode_prompt(start)
if max(prompt) >= model.config.vocab_size:
    raise UserError(
        f'the tokenizer gives token {max(prompt)}, and the model of {path} has '
        f'{model.config.vocab_size}: it was trained with another tokenizer'
    )
if stop == 'auto':
    ends = huggingface.ends(tokenizer)
elif stop in tokenizer.special or not stop:
    ends = [tokenizer.special[stop]] if stop else []
else:
    known = ', '.join(tokenizer.special) or 'there are none'
    raise UserError(f'--stop={stop} is no special token of this tokenizer: {known}')

# ---- the samples
filters = dict(top_p=top_p, min_p=min_p or None, repetition_penalty=repetition_penalty)
try:
    rows = model.generate(
        [prompt] * num_samples, max_new_tokens, temperature, top_k or None, ends, seed, **filters
    )
except ValueError as e:
    raise UserError(f'{path}: {e}') from None
samples = []
for row in rows:
    new = row[len(prompt) :]
    text = tokenizer.decode_behind(prompt, new[:-1] if new[-1] in ends else new)
    samples.append(text if ask else start + text)  # what was asked need not be said again
sys.stdout.reconfigure(errors='replace')  # a terminal that cannot show a character shows another
for sample in samples:
    print(sample)
    print('---------------')
if json:
    counts = [len(row) - len(prompt) for row in rows]
    print(json_.dumps({'start': start, 'samples': samples, 'tokens': counts}))
