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

import torch
from torch.nn import functional as F
from tqdm import tqdm

from fledge import UserError, checkpoint
from fledge.configurator import at_least, configure
from fledge.device import autocast_to, choose_device, choose_dtype, keep_memory
from fledge.formats import huggingface
from fledge.tokenizer import find_tokenizer
from fledge.tokens import Tokens

# -----------------------------------------------------------------------------
init_from = 'resume'  # resume (out_dir's ckpt.pt), a checkpoint file, or a Hugging Face model: its folder or name
out_dir = 'out'  # a run's folder
dataset = ''  # a folder under data/; '': the one that the run was trained on
split = 'val'  # train, val, or test where the data has one
eval_iters = 0  # batches, spread evenly over the split; 0: all of it
batch_size = 4  # rows in a batch
block_size = 0  # tokens in a row; 0: the run's, of a model from elsewhere its context, at most 1024
device = 'auto'  # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'  # auto, float32, bfloat16, float16
json = False  # the last line of output is one JSON object
configure(globals())
# -----------------------------------------------------------------------------
at_least(globals(), eval_iters=0, batch_size=1, block_size=0)
device = choose_device(device)
keep_memory()
dtype = choose_dtype(dtype, device)
state, path, tokenizer = huggingface.load_with_tokenizer(init_from, out_dir, dataset)
model, run = checkpoint.load_model(state, path).to(device).eval(), state['config']
del state
context, vocab_size = model.config.block_size, model.config.vocab_size
block_size = block_size or (context if 'block_size' in run else min(context, 1024))
if block_size > context:
    raise UserError(f'block_size={block_size} is more than the context of {path}, {context}')
dataset = dataset or run.get('dataset')
if not dataset:
    raise UserError(f'{path} does not say what it was trained on: name the data with --dataset')
data_dir = os.path.join('data', dataset)
data = Tokens(data_dir, split, block_size, vocab_size)
theirs = find_tokenizer(data_dir)
if theirs and not tokenizer.agrees_with(theirs):
    raise UserError(f'{data_dir} was prepared with another tokenizer than the one of {path}')
if (
    not theirs and tokenizer.vocab_size != 50257
):  # nanoGPT's folders say nothing where the vocabulary is GPT-2's
    print(f'{data_dir} has no tokenizer.json: its tokens are taken for those of {path}')
rows = data.evaluation_rows(eval_iters * batch_size or None)
bytes_of = torch.from_numpy(tokenizer.text_bytes(vocab_size)).to(device)

nats, correct, n_tokens, n_bytes, began = 0.0, 0, 0, 0, time.monotonic()
for first in tqdm(
    range(0, len(rows), batch_size), unit='batch', leave=False, disable=None
):  # no bar but on a terminal
    x, y = (
        torch.from_numpy(a).to(device)
        for a in data.evaluation_batch(rows[first : first + batch_size])
    )
    with torch.no_grad(), autocast_to(dtype, device):
        hidden, y = model.transformer.ln_f(model.hidden(x))[y >= 0], y[y >= 0]
        for h, targets in zip(
            hidden.split(512), y.split(512)
        ):  # the logits of all at once may be gigabytes
            logits = model.lm_head(h).float()
            nats += F.cross_entropy(logits, targets, reduction='sum').item()
            correct += int((logits.argmax(dim=-1) == targets).sum())
    n_tokens, n_bytes = n_tokens + len(y), n_bytes + int(bytes_of[y].sum())
loss, seconds = nats / n_tokens, time.monotonic() - began
if not math.isfinite(loss):
    raise UserError(
        f'the loss of {path} on {split} of {dataset} is {loss} in {str(dtype)[6:]}: its weights are broken, or need --dtype=float32'
    )
perplexity, accuracy = math.exp(min(loss, 700)), correct / n_tokens
bits_per_byte = nats / math.log(2) / n_bytes if n_bytes else None
print(
    f'{split} of {dataset}: loss {loss:.4f}, perplexity {perplexity:.6g}, '
    + (f'{bits_per_byte:.4f} bits per byte, ' if n_bytes else '')
    + f'accuracy {accuracy:.2%}; {n_tokens:,} tokens, {n_bytes:,} bytes, in rows of {block_size}, {str(dtype)[6:]}, {n_tokens / seconds:,.0f} tokens/s'
)
if json:
    print(
        json_.dumps(
            dict(
                dataset=dataset,
                split=split,
                loss=loss,
                perplexity=perplexity,
                bits_per_byte=bits_per_byte,
                accuracy=accuracy,
                tokens=n_tokens,
                bytes=n_bytes,
                block_size=block_size,
                dtype=str(dtype)[6:],
                tokens_per_second=n_tokens / seconds,
            )
        )
    )
