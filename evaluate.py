"""Measure a model on prepared data: loss, perplexity, bits per byte, accuracy.

python evaluate.py --out_dir=out --split=val --json
python evaluate.py --init_from=out/int8.pt                                what 8 bits cost
python evaluate.py --init_from=HuggingFaceTB/SmolLM2-135M --dataset=stories     anybody's model
python evaluate.py --out_dir=out-sentiment --labels                             a classifier

loss is in nats a token, perplexity its exponential, accuracy the share of tokens that were the
likeliest. Models with different tokenizers compare by bits per byte alone. Each token is predicted
once, from at most block_size tokens before it in its row.

--labels adds how often a document was given the right label (label_accuracy), precision, recall and
F1 of each label, and the table of which is taken for which, drawn in confusion.png beside the
weights. The model chooses among the labels alone.
"""

import json as json_
import math
import os
import time

from fledge import UserError, checkpoint
from fledge.configurator import configure
from fledge.device import Machine
from fledge.documents import open_split
from fledge.evaluation import evaluate, evaluate_labels, in_words
from fledge.formats import huggingface
from fledge.labels import draw_confusion, find_labels, label_scores, label_tables
from fledge.tokenizer import common_tokenizer
from fledge.tokens import split_files

# -----------------------------------------------------------------------------
init_from = 'resume'  # resume (out_dir's ckpt.pt), a checkpoint file, a Hugging Face folder or name
out_dir = 'out'  # a run's folder
dataset = ''  # a folder under data/; '': the one that the run was trained on
split = 'val'  # train, val, or test where the data has one
eval_iters = 0  # batches, spread evenly over the split; 0: all of it
batch_size = 4  # rows in a batch
block_size = 0  # tokens in a row; 0: the run's, of another model its context, at most 1024
labels = False  # how well the labels of prepare/classify.py are told apart
device = 'auto'  # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'  # auto, float32, bfloat16, float16
json = False  # the last line of output is one JSON object
configure(globals())
# -----------------------------------------------------------------------------
machine = Machine(device, dtype)
state, path, tokenizer = huggingface.load_with_tokenizer(init_from, out_dir, dataset)
run, older = state['config'], state.get('objective')
objective = run.get('objective', 'another' if older else 'next_token')
model = checkpoint.load_model(state, path).to(machine.device)
del state
machine.wrap(model)
context, vocab_size = model.config.block_size, model.config.vocab_size
block_size = block_size or min(context, run.get('block_size', 1024))
if block_size > context:
    raise UserError(f'block_size={block_size} is more than the context of {path}, {context}')
dataset = dataset or run.get('dataset')
if not dataset:
    raise UserError(f'{path} does not say what it was trained on: name the data with --dataset')
data_dir = os.path.join('data', dataset)
data = open_split(data_dir, split, block_size, vocab_size)
if common_tokenizer(data_dir, tokenizer, path).begin != tokenizer.begin:
    print(f'documents of {data_dir} do not begin with the tokens that they began with for {path}')
if data.pairs:
    raise UserError(
        f'{data_dir} has preferences: the run that learns from them measures them as it goes, '
        'in its metrics.jsonl'
    )
if objective != 'next_token':
    print(f'the run learned by {objective}; what is measured here is next-token loss')
if labels:
    # the model may give labels that this split lacks
    paths = sorted({*split_files(data_dir, 'train'), *data.paths})
    words = find_labels(paths, tokenizer, data_dir)
    if len(words) < 2 or max(words) >= vocab_size:
        raise UserError(
            f'{data_dir} has the labels {", ".join(words.values())}: a classifier needs two at '
            f'least, all of them in the vocabulary of {path} ({vocab_size:,} tokens)'
        )

began = time.monotonic()
result = evaluate(model, data, machine, batch_size, eval_iters, tokenizer)
speed = result['tokens'] / (time.monotonic() - began)
dtype = str(machine.dtype)[6:]
if not math.isfinite(result['loss']):
    raise UserError(
        f'the loss of {path} on {split} of {dataset} is {result["loss"]} in {dtype}: '
        'its weights are broken, or need --dtype=float32'
    )
if labels:
    confusion = evaluate_labels(model, data, machine, batch_size, eval_iters, list(words))
    of_labels = label_scores(confusion, list(words.values()))
if not machine.main:  # under torchrun one process speaks
    machine.leave()
    raise SystemExit
print(
    f'{split} of {dataset}: {in_words(result)}, accuracy {result["accuracy"]:.2%}; '
    f'{result["tokens"]:,} tokens, {result["bytes"]:,} bytes, in rows of {block_size}, {dtype}, '
    f'{speed:,.0f} tokens/s'
)
if labels:
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    if not os.path.isdir(folder):  # a name on the hub
        folder = '.'
    picture = os.path.join(folder, 'confusion.png')
    draw_confusion(of_labels, picture)
    print(f'{label_tables(of_labels)}\n{picture} shows it')
    result |= of_labels
if json:
    facts = dict(block_size=block_size, dtype=dtype, tokens_per_second=speed)
    print(json_.dumps(dict(dataset=dataset, split=split) | result | facts))
machine.leave()
