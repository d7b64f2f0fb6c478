"""The one evaluation that train.py and evaluate.py call."""

import math

import torch
from torch.nn import functional as F
from tqdm import tqdm

from fledge.objectives import loss_and_numbers, next_token

LOGITS = 1 << 25  # that exist at once: with a large vocabulary all of a batch are gigabytes


@torch.no_grad()
def evaluate(model, data, machine, batch_size, n_batches, text_bytes, objective=next_token):
    """Measure a model on rows spread evenly over a split, the same ones each time.

    data: a tokens.Tokens. n_batches: of batch_size rows; 0: the whole split. text_bytes: the bytes
    of text behind each token id, (vocab_size,). The processes of machine share the rows.
    Returns a dict: loss (nats a token) and tokens, and for next_token perplexity, accuracy,
    bits_per_byte (None where no bytes are known) and bytes, else the objective's own numbers.
    """
    was_training = model.training
    model.eval()
    rows = data.evaluation_rows(n_batches * batch_size or None)
    starts = range(machine.rank * batch_size, len(rows), machine.world_size * batch_size)
    sums = {}
    # a bar on a terminal, and that of the first process alone
    for start in tqdm(starts, unit='batch', leave=False, disable=None if machine.main else True):
        batch = data.evaluation_batch(rows[start : start + batch_size])
        learned = batch['targets'][batch['targets'] >= 0]
        with machine.autocast():
            if objective is next_token:
                numbers = next_token_sums(model, machine.move(batch), machine.hidden(model))
                numbers['bytes'] = text_bytes[learned].sum()
            else:
                loss, means = loss_and_numbers(objective, model, machine.move(batch))
                means = means | {'loss': loss}
                numbers = {name: float(mean) * len(learned) for name, mean in means.items()}
        numbers['tokens'] = len(learned)
        for name, number in numbers.items():
            sums[name] = sums.get(name, 0) + number
    model.train(was_training)
    totals = {}
    for theirs in machine.gather(sums):
        for name, number in theirs.items():
            totals[name] = totals.get(name, 0) + number
    n_tokens = totals.pop('tokens')
    if objective is not next_token:
        return {name: total / n_tokens for name, total in totals.items()} | {'tokens': n_tokens}
    loss, n_bytes = totals['nats'] / n_tokens, int(totals['bytes'])
    return dict(
        loss=loss,
        perplexity=math.exp(min(loss, 700)),
        bits_per_byte=totals['nats'] / math.log(2) / n_bytes if n_bytes else None,
        accuracy=totals['correct'] / n_tokens,
        tokens=n_tokens,
        bytes=n_bytes,
    )


def next_token_sums(model, batch, hidden):
    """Nats of all targets, and how many were the likeliest token. hidden: model's, or compiled."""
    learned = batch['targets'] >= 0
    x, targets = hidden(batch['inputs'])[learned], batch['targets'][learned]
    nats = torch.zeros((), device=x.device)  # on the device, which is not waited for
    correct = torch.zeros((), dtype=torch.long, device=x.device)
    n = max(1, LOGITS // model.config.vocab_size)
    for x_rows, target_rows in zip(x.split(n), targets.split(n), strict=True):
        logits = model.lm_head(x_rows).float()
        nats += F.cross_entropy(logits, target_rows, reduction='sum')
        correct += (logits.argmax(dim=-1) == target_rows).sum()
    return {'nats': nats.item(), 'correct': correct.item()}


def in_words(result):
    """An evaluation as a person reads it."""
    words = [f'loss {result["loss"]:.4f}']
    if 'bytes' in result:  # it is of next_token
        words.append(f'perplexity {result["perplexity"]:.6g}')
        if result['bits_per_byte'] is not None:
            words.append(f'{result["bits_per_byte"]:.4f} bits per byte')
    else:
        own = [name for name in result if name not in ('loss', 'tokens')]
        words += [f'{name} {result[name]:.4g}' for name in own]
    return ', '.join(words)
