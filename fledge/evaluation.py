"""The one evaluation that train.py and evaluate.py call."""

import math

import numpy as np
import torch
from torch.nn import functional as F

from fledge import UserError
from fledge.formats.huggingface import ends
from fledge.objectives import loss_and_numbers, next_token

LOGITS = 1 << 25  # that exist at once: with a large vocabulary all of a batch are gigabytes


@torch.no_grad()
def evaluate(model, data, machine, batch_size, n_batches, tokenizer, objective=next_token):
    """Measure a model on rows spread evenly over a split, the same ones each time.

    data: a tokens.Tokens or documents.Documents. n_batches: of batch_size rows; 0: the whole split.
    tokenizer: of the tokens, or None. The processes of machine share the rows.
    Returns a dict: loss (nats a token) and tokens, and for next_token perplexity, accuracy,
    bits_per_byte (None where no bytes are known) and bytes, else the objective's own numbers.
    bits_per_byte compares across tokenizers: it is the bits that the tokens of text cost, over the
    bytes of the text. Special tokens are in neither, nor are spaces that a tokenizer adds. (Of one
    that changes a text, by folding spaces for example, it is the changed text's.)
    """
    was_training = model.training
    model.eval()
    text_bytes, added, before_texts = np.zeros(model.config.vocab_size, np.int64), 0, []
    if tokenizer:
        text_bytes = tokenizer.text_bytes(len(text_bytes))
        added, before_texts = tokenizer.space_in_front, list(tokenizer.before_texts - {None})
    rows = data.evaluation_rows(n_batches * batch_size or None)
    sums = {}
    for here in machine.batches(rows, batch_size):
        batch = data.evaluation_batch(here)
        learned = batch['targets'] >= 0
        n_learned = int(learned.sum())
        with machine.autocast():
            if objective is next_token:
                sizes = text_bytes[batch['targets']] * learned
                batch['is_text'] = sizes > 0
                n_texts = (batch['is_text'] & np.isin(batch['inputs'], before_texts)).sum()
                numbers = next_token_sums(model, machine.move(batch), machine.hidden(model))
                numbers['bytes'] = sizes.sum() - n_texts * added
            else:
                loss, means = loss_and_numbers(objective, model, machine.move(batch))
                means = means | {'loss': loss}
                weight = n_learned  # what a mean over the batch is over
                if data.pairs:
                    weight = (int(batch['documents'].max()) + 1) // 2
                numbers = {name: float(mean) * weight for name, mean in means.items()}
                numbers['weight'] = weight
        numbers['tokens'] = n_learned
        for name, number in numbers.items():
            sums[name] = sums.get(name, 0) + number
    model.train(was_training)
    totals = {}
    for theirs in machine.gather(sums):
        for name, number in theirs.items():
            totals[name] = totals.get(name, 0) + number
    n_tokens = totals.pop('tokens')
    if objective is not next_token:
        weight = totals.pop('weight')
        return {name: total / weight for name, total in totals.items()} | {'tokens': n_tokens}
    loss, n_bytes = totals['nats'] / n_tokens, int(totals['bytes'])
    return dict(
        loss=loss,
        perplexity=math.exp(min(loss, 700)),
        bits_per_byte=totals['text_nats'] / math.log(2) / n_bytes if n_bytes else None,
        accuracy=totals['correct'] / n_tokens,
        tokens=n_tokens,
        bytes=n_bytes,
    )


@torch.no_grad()
def evaluate_labels(model, data, machine, batch_size, n_batches, labels):
    """Which label a model gives to the documents of a split, of which rows as in evaluate.

    data: a documents.Documents. labels: the token ids of the labels, a list. Returns int64 (n, n):
    how many documents of each label (row) were given each (column).
    """
    was_training = model.training
    model.eval()
    confusion = np.zeros((len(labels), len(labels)), np.int64)
    labels = torch.tensor(labels, device=machine.device)
    rows = data.evaluation_rows(n_batches * batch_size or None)
    for here in machine.batches(rows, batch_size):
        batch = machine.move(data.evaluation_batch(here))
        with machine.autocast():
            own, logits = label_logits(model, batch, labels, machine.hidden(model))
        given = logits.argmax(dim=1)
        np.add.at(confusion, (own.cpu().numpy(), given.cpu().numpy()), 1)
    model.train(was_training)
    return sum(machine.gather(confusion))


def label_logits(model, batch, labels, hidden):
    """The logits of the labels where a document's label is predicted, and which one is its own.

    labels: token ids, (n,). hidden: model's, or compiled. Returns own, int64 (documents,), which
    of the n it is, and logits (documents, n), in the order of the batch.
    """
    is_label = torch.isin(batch['targets'], labels)  # (rows, block_size)
    x = hidden(batch['inputs'], documents=batch['documents'])[is_label]
    own = (batch['targets'][is_label][:, None] == labels).int().argmax(dim=1)
    return own, model.logits(x)[:, labels]


def next_token_sums(model, batch, hidden):
    """Nats of all targets and of those that are text, and how many were the likeliest token.

    batch has `is_text` beside its targets. hidden: model's, or compiled.
    """
    learned = batch['targets'] >= 0
    x = hidden(batch['inputs'], documents=batch.get('documents'))[learned]
    targets = batch['targets'][learned]
    nats, correct = torch.empty((2, len(targets)), device=x.device)
    n = max(1, LOGITS // model.config.vocab_size)
    for start in range(0, len(targets), n):
        here = slice(start, start + n)
        logits = model.logits(x[here]).float()
        nats[here] = F.cross_entropy(logits, targets[here], reduction='none')
        correct[here] = (logits.argmax(dim=-1) == targets[here]).float()
    text_nats = nats[batch['is_text'][learned]].sum()
    return dict(nats=nats.sum().item(), text_nats=text_nats.item(), correct=correct.sum().item())


def samples(model, tokenizer, machine, count, start, ask, n_tokens, repetition_penalty, seed):
    """So many continuations of a text or, where that is given, of what a user asks, as texts."""
    try:
        if ask:
            prompt = tokenizer.encode_chat_prompt([dict(role='user', content=ask)])
        else:
            prompt = tokenizer.encode_prompt(start)
    except UserError:  # a vocabulary of characters, or one that has no form for conversations
        prompt = [0]
    was_training = model.training
    model.eval()
    with machine.autocast():
        filters = dict(top_p=0.95, repetition_penalty=repetition_penalty)
        stop = ends(tokenizer) if ask else None  # an answer ends; a text goes on
        rows = model.generate([prompt] * count, n_tokens, 0.8, stop=stop, seed=seed, **filters)
    model.train(was_training)
    return [tokenizer.decode(row) for row in rows]


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
