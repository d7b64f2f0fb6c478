"""Draw what a model knows of positions, how its learning rate moves, how its gradient flows.

python draw.py --out_dir=out --positions=positions.png    what it tells positions by, and how alike
python draw.py --out_dir=out --schedule=schedule.png      the learning rate by step, and others
python draw.py --out_dir=out --gradients=gradients.png    norms of the gradient by layer and matrix
python draw.py --init_from=HuggingFaceTB/SmolLM2-135M --dataset=stories --gradients=gradients.png

Several can be drawn at once. What each token looks at is drawn by sample.py --attention=PNG, and
the loss by train.py itself.
"""

import math
import os
import sys

from fledge import UserError, checkpoint, pictures, quantize
from fledge.configurator import configure, given
from fledge.device import Machine
from fledge.documents import open_split
from fledge.formats import huggingface
from fledge.log import read_metrics
from fledge.tokenizer import common_tokenizer

# -----------------------------------------------------------------------------
init_from = 'resume'  # resume (out_dir's ckpt.pt), a checkpoint file, a Hugging Face folder or name
out_dir = 'out'  # a run's folder
positions = ''  # a PNG: what the model adds for each position, and how alike two of them are
schedule = ''  # a PNG: the learning rate by step, what the run used, and the other schedules
gradients = ''  # a PNG: the norm of the gradient in each matrix of each layer
dataset = ''  # for gradients: a folder under data/; '': the one that the run was trained on
split = 'val'  # for gradients: train, val, or test where the data has one
batch_size = 4  # for gradients: rows of it, spread evenly over the split
device = 'auto'  # auto, cpu, cuda, cuda:1, mps
configure(globals())
# -----------------------------------------------------------------------------
if not (positions or schedule or gradients):
    raise UserError('nothing to draw: name a PNG with --positions, --schedule or --gradients')
idle = given & {'dataset', 'split', 'batch_size', 'device'}
if idle and not gradients:
    print(f'without effect without --gradients: {", ".join(sorted(idle))}', file=sys.stderr)
state, path, tokenizer = huggingface.load_with_tokenizer(init_from, out_dir, dataset)
settings = state['config']
model = checkpoint.load_model(state, path).eval()

if positions:
    pictures.draw_positions(model, positions)

if schedule:
    of_schedule, end = pictures.schedule_of(state, path)
    log, used = os.path.join(os.path.dirname(path), 'metrics.jsonl'), []
    if os.path.exists(log):
        used = [(line['step'], line['lr']) for line in read_metrics(log) if line['lr'] is not None]
    else:
        print(f'there is no {log}: what the run used is not drawn', file=sys.stderr)
    pictures.draw_schedule(of_schedule, end, used, schedule)

if gradients:
    if quantize.is_quantized(model):
        raise UserError(
            f'{path} has 8-bit weights, which have no gradient: name what it was made of'
        )
    dataset = dataset or settings.get('dataset')
    if not dataset:
        raise UserError(f'{path} does not say what it was trained on: name the data with --dataset')
    objective = settings.get('objective', 'next_token')
    if objective != 'next_token':
        print(f'the run learned by {objective}; the gradient drawn is of next-token loss')
    data_dir = os.path.join('data', dataset)
    common_tokenizer(data_dir, tokenizer, path)
    context, vocab_size = model.config.block_size, model.config.vocab_size
    row_length = min(context, settings.get('block_size', 1024))
    with_sources = model.config.n_encoder_layer > 0
    data = open_split(data_dir, split, row_length, vocab_size, with_sources=with_sources)
    machine = Machine(device, 'float32')
    batch = machine.move(data.evaluation_batch(data.evaluation_rows(batch_size)))
    loss, norms = pictures.gradient_norms(model.to(machine.device), batch)
    if not math.isfinite(loss):
        raise UserError(f'the loss of {path} on {split} of {dataset} is {loss}: it has no gradient')
    title = f'Norm of the gradient in each matrix ({split} of {dataset}, loss {loss:.3g})'
    pictures.draw_gradients(norms, model.config.tie_embeddings, title, gradients)
