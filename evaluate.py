"""Measure a model on prepared data: loss, perplexity, bits per byte, accuracy.

python evaluate.py --out_dir=out --split=val --json
python evaluate.py --init_from=out/int8.pt                                      what 8 bits cost
python evaluate.py --init_from=HuggingFaceTB/SmolLM2-135M --dataset=stories     anybody's model

loss is in nats a token, perplexity its exponential, accuracy the share of tokens that were the likeliest. Models with different tokenizers
compare by bits per byte alone. Each token is predicted once, from at most block_size tokens before it in its row.
"""
import json as json_
import math
import os
import time
from contextlib import nullcontext

import torch
from tqdm import tqdm

from fledge import UserError, checkpoint, pretrained
from fledge.configurator import configure
from fledge.device import choose_device, choose_dtype, keep_memory
from fledge.tokenizer import find_tokenizer
from fledge.tokens import Tokens

# -----------------------------------------------------------------------------
init_from = 'resume'        # resume (out_dir's ckpt.pt), a checkpoint file, or a Hugging Face model: its folder or name
out_dir = 'out'             # a run's folder
dataset = ''                # a folder under data/; '': the one that the run was trained on
split = 'val'               # train, val, or test where the data has one
eval_iters = 0              # batches, spread evenly over the split; 0: all of it
batch_size = 4              # rows in a batch
block_size = 0              # tokens in a row; 0: the run's, of a Hugging Face model its context, at most 1024
device = 'auto'             # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'              # auto, float32, bfloat16, float16
json = False                # the last line of output is one JSON object
configure(globals())
# -----------------------------------------------------------------------------
for name, least in (('eval_iters', 0), ('batch_size', 1), ('block_size', 0)):
    if globals()[name] < least:
        raise UserError(f'{name}={globals()[name]} must be at least {least}')
device = choose_device(device)
device_type = device.split(':')[0]
keep_memory()
dtype = choose_dtype(dtype, device)
autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device_type, dtype)
state, path, tokenizer = pretrained.load_with_tokenizer(init_from, out_dir)
model = checkpoint.load_model(state, path).to(device).eval()
context, vocab_size = model.config.block_size, model.config.vocab_size
block_size = block_size or (min(context, 1024) if 'folder' in state else context)
if block_size > context:
    raise UserError(f'block_size={block_size} is more than the context of {path}, {context}')
dataset = dataset or state.get('config', {}).get('dataset', '')
del state
if not dataset:
    raise UserError(f'{path} does not say what it was trained on: name the data with --dataset')
data_dir = os.path.join('data', dataset)
theirs = find_tokenizer(data_dir)
if theirs and not tokenizer.agrees_with(theirs):
    raise UserError(f'{data_dir} was prepared with another tokenizer than the one of {path}')
data = Tokens(data_dir, split, block_size, vocab_size)
rows = data.evaluation_rows(eval_iters * batch_size or None)
bytes_of = tokenizer.text_bytes(vocab_size)

nats, correct, n_tokens, n_bytes, began = 0.0, 0, 0, 0, time.monotonic()
for first in tqdm(range(0, len(rows), batch_size), unit='batch', leave=False, disable=None):  # none where it is no terminal
    x, y = data.evaluation_batch(rows[first:first + batch_size])
    known = y[y >= 0]
    x, y = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)
    with torch.no_grad(), autocast:
        logits, loss = model(x, y)
    nats += loss.item() * len(known)
    correct += int((logits.argmax(dim=-1) == y).sum())
    n_tokens, n_bytes = n_tokens + len(known), n_bytes + int(bytes_of[known].sum())
loss, seconds = nats / n_tokens, time.monotonic() - began
if not math.isfinite(loss):
    raise UserError(f'the loss of {path} on {split} of {dataset} is {loss}: its weights are broken')
perplexity, accuracy = math.exp(min(loss, 700)), correct / n_tokens
bits_per_byte = nats / math.log(2) / n_bytes if n_bytes else None
print(f'{split} of {dataset}: loss {loss:.4f}, perplexity {perplexity:.2f}, ' + (f'{bits_per_byte:.4f} bits per byte, ' if n_bytes else '')
      + f'accuracy {accuracy:.2%}; {n_tokens:,} tokens, {n_bytes:,} bytes, in {seconds:.1f} s ({n_tokens / seconds:,.0f} tokens/s)')
if json:
    print(json_.dumps(dict(dataset=dataset, split=split, loss=loss, perplexity=perplexity, bits_per_byte=bits_per_byte, accuracy=accuracy,
                           tokens=n_tokens, bytes=n_bytes, tokens_per_second=n_tokens / seconds)))
