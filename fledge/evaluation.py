"""The one evaluation that train.py and evaluate.py call, and the windows that it can slide."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional as F

from fledge import UserError
from fledge.device import Machine
from fledge.documents import Documents
from fledge.formats.huggingface import ends
from fledge.objectives import loss_and_numbers, next_token
from fledge.tokenizer import Tokenizer
from fledge.tokens import Batch, Tokens, check_ids, spread
from model import GPT, place_documents

LOGITS = 1 << 25  # that exist at once: with a large vocabulary all of a batch are gigabytes
BINS = 15  # of calibration


@torch.no_grad()
def evaluate(
    model: GPT,
    data: 'Tokens | Documents | Windows',
    machine: Machine,
    batch_size: int,
    n_batches: int,
    tokenizer: Tokenizer | None,
    objective: Callable = next_token,
    detailed: bool = False,
) -> dict:
    """Measure a model on rows spread evenly over a split, the same ones each time.

    n_batches: of batch_size rows; 0: the whole split. tokenizer: of the tokens. The processes of
    machine share the rows.
    Returns a dict: loss (nats a token) and tokens, and for next_token perplexity, accuracy,
    bits_per_byte (None where no bytes are known) and bytes, else the objective's own numbers.
    bits_per_byte compares across tokenizers: it is the bits that the tokens of text cost, over the
    bytes of the text. Special tokens are in neither, nor are spaces that a tokenizer adds. (Of one
    that changes a text, by folding spaces for example, it is the changed text's.)
    detailed: measure for next_token what details() returns as well.
    """
    was_training = model.training
    model.eval()
    text_bytes, added, before_texts = np.zeros(model.config.vocab_size, np.int64), 0, []
    if tokenizer:
        text_bytes = tokenizer.text_bytes(len(text_bytes))
        added, before_texts = tokenizer.space_in_front, list(tokenizer.before_texts - {None})
    rows = data.evaluation_rows(n_batches * batch_size or None)
    sums = Counter()
    for here in machine.batches(rows, batch_size):
        batch = data.evaluation_batch(here)
        learned = batch['targets'] >= 0
        with machine.autocast():
            if objective is next_token:
                sizes = text_bytes[batch['targets']] * learned
                batch['is_text'] = sizes > 0
                n_texts = (batch['is_text'] & np.isin(batch['inputs'], before_texts)).sum()
                moved, hidden = machine.move(batch), machine.hidden(model)
                numbers = next_token_sums(model, moved, hidden, detailed)
                numbers['bytes'] = sizes.sum() - n_texts * added
            else:
                numbers = objective_sums(model, batch, machine, objective, data.pairs)
        sums.update(numbers)  # which adds them up by name
        sums['tokens'] += int(learned.sum())
    model.train(was_training)
    totals = Counter()
    for theirs in machine.gather(sums):
        totals.update(theirs)
    n_tokens = totals.pop('tokens')
    if objective is not next_token:
        weight = totals.pop('_weight')
        return {name: total / weight for name, total in totals.items()} | {'tokens': n_tokens}
    loss, n_bytes = totals['nats'] / n_tokens, int(totals['bytes'])
    result = dict(
        loss=loss,
        perplexity=math.exp(min(loss, 700)),
        bits_per_byte=totals['text_nats'] / math.log(2) / n_bytes if n_bytes else None,
        accuracy=totals['correct'] / n_tokens,
        tokens=n_tokens,
        bytes=n_bytes,
    )
    return result | details(totals, n_tokens) if detailed else result


def objective_sums(
    model: GPT, batch: Batch, machine: Machine, objective: Callable, pairs: bool
) -> dict[str, float]:
    """An objective's loss and numbers, each times what their mean over a batch is over.

    That is how many targets are learned in it, or how many pairs it has: `_weight`, which is no
    name of an objective's own number.
    """
    weight = int((batch['targets'] >= 0).sum())
    if pairs:
        weight = (int(batch['documents'].max()) + 1) // 2
    loss, means = loss_and_numbers(objective, model, machine.move(batch))
    means = means | {'loss': loss}
    return {name: float(mean) * weight for name, mean in means.items()} | {'_weight': weight}


@torch.no_grad()
def evaluate_labels(
    model: GPT,
    data: Documents,
    machine: Machine,
    batch_size: int,
    n_batches: int,
    labels: list[int],
) -> np.ndarray:
    """Which label a model gives to the documents of a split, of which rows as in evaluate.

    labels: their token ids. Returns int64 (n, n): how many documents of each label (row) were given
    each (column).
    """
    was_training = model.training
    model.eval()
    confusion = np.zeros((len(labels), len(labels)), np.int64)
    ids = torch.tensor(labels, device=machine.device)
    rows = data.evaluation_rows(n_batches * batch_size or None)
    for here in machine.batches(rows, batch_size):
        batch = machine.move(data.evaluation_batch(here))
        with machine.autocast():
            own, logits = label_logits(model, batch, ids, machine.hidden(model))
        given = logits.argmax(dim=1)
        np.add.at(confusion, (own.cpu().numpy(), given.cpu().numpy()), 1)
    model.train(was_training)
    return sum(machine.gather(confusion))


def label_logits(
    model: GPT, batch: Batch, labels: torch.Tensor, hidden: Callable
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of the labels where a document's label is predicted, and which one is its own.

    labels: token ids, (n,). hidden: model's, or compiled. Returns own, int64 (documents,), which
    of the n it is, and logits (documents, n), in the order of the batch.
    """
    is_label = torch.isin(batch['targets'], labels)  # (rows, block_size)
    x = hidden(batch['inputs'], **batch.context())[is_label]
    own = (batch['targets'][is_label][:, None] == labels).int().argmax(dim=1)
    return own, model.logits(x)[:, labels]


def next_token_sums(model: GPT, batch: Batch, hidden: Callable, detailed: bool = False) -> dict:
    """Nats of all targets and of those that are text, and how many were the likeliest token.

    batch has `is_text` beside its targets. hidden: model's, or compiled. detailed: the sums that
    details() needs as well.
    """
    learned = batch['targets'] >= 0
    scores = score_targets(model, batch, hidden, detailed)
    text_nats = scores['nats'][batch['is_text'][learned]].sum()
    sums = dict(
        nats=scores['nats'].sum().item(),
        text_nats=text_nats.item(),
        correct=scores['correct'].sum().item(),
    )
    if not detailed:
        return sums
    positions = torch.arange(learned.shape[1], device=learned.device).expand(learned.shape)
    if 'documents' in batch:
        positions, _ = place_documents(batch['documents'])
    read = positions[learned].cpu().numpy() + 1  # tokens from which each target is predicted
    scores = {name: score.cpu().numpy() for name, score in scores.items()}
    buckets = np.ceil(np.log2(read)).astype(np.int64)  # 1, 2, 3 to 4, 5 to 8, 9 to 16, ...
    n_buckets = learned.shape[1].bit_length() + 1
    bins = np.nan_to_num(scores['confidence'] * BINS).astype(np.int64)  # broken weights give NaN
    bins = np.minimum(bins, BINS - 1)
    return sums | dict(
        top5=scores['top5'].sum(),
        bucket_tokens=np.bincount(buckets, minlength=n_buckets),
        bucket_nats=np.bincount(buckets, scores['nats'], n_buckets),
        bin_correct=np.bincount(bins, scores['correct'], BINS),
        bin_confidence=np.bincount(bins, scores['confidence'], BINS),
    )


def score_targets(
    model: GPT, batch: Batch, hidden: Callable, detailed: bool = False
) -> dict[str, torch.Tensor]:
    """How each target of a batch that is learned is predicted: {name: float32 (n_learned,)}.

    nats: what it costs. correct: 1 where it was the likeliest token. detailed adds top5, 1 where at
    most four tokens were likelier, and confidence, the probability of the likeliest token.
    hidden: model's, or compiled.
    """
    learned = batch['targets'] >= 0
    x = hidden(batch['inputs'], **batch.context())[learned]
    targets = batch['targets'][learned]
    nats, correct, top5, confidence = torch.empty((4, len(targets)), device=x.device)
    n = max(1, LOGITS // model.config.vocab_size)
    for start in range(0, len(targets), n):
        here = slice(start, start + n)
        logits = model.logits(x[here]).float()
        nats[here] = F.cross_entropy(logits, targets[here], reduction='none')
        correct[here] = (logits.argmax(dim=-1) == targets[here]).float()
        if detailed:
            own = logits.gather(1, targets[here, None])
            top5[here] = ((logits > own).sum(dim=1) < 5).float()
            confidence[here] = logits.softmax(dim=-1).max(dim=-1).values
    scores = dict(nats=nats, correct=correct)
    return scores | dict(top5=top5, confidence=confidence) if detailed else scores


def details(totals: dict, n_tokens: int) -> dict:
    """What the sums of next_token_sums say beyond the loss.

    accuracy_top5: how often the right token was among the five likeliest. calibration_error: by how
    much the likeliest token's probability is off from how often it is right (expected calibration
    error in 15 bins of equal width, Guo et al. 2017, arXiv:1706.04599). loss_by_position: a list
    of {first, last, loss, tokens}, the nats a token of those predicted from first to last tokens.
    """
    nats, tokens = totals['bucket_nats'].tolist(), totals['bucket_tokens'].tolist()
    by_position = []
    for i in np.flatnonzero(tokens).tolist():
        first = 2 ** (i - 1) + 1 if i else 1
        by_position.append(dict(first=first, last=2**i, loss=nats[i] / tokens[i], tokens=tokens[i]))
    gaps = np.abs(totals['bin_confidence'] - totals['bin_correct'])
    return dict(
        accuracy_top5=float(totals['top5'] / n_tokens),
        calibration_error=float(gaps.sum() / n_tokens),
        loss_by_position=by_position,
    )


class Windows:
    """The tokens of a split as windows that overlap, each read anew, for evaluate().

    Each has block_size tokens and starts `stride` after the one before; in all but the first the
    last `stride` tokens alone are predicted, so that each is predicted once and from much of the
    context. That is how transformers' documentation computes perplexity ("Perplexity of
    fixed-length models").
    """

    def __init__(self, data: Tokens, stride: int):
        self.data, self.stride = data, stride

    def evaluation_rows(self, limit: int | None = None) -> list[tuple[int, int, int]]:
        """(shard, start, first token to predict) of `limit` windows spread evenly, or of all."""
        windows = []
        for shard, ids in enumerate(self.data.shards):
            predicted = 1  # tokens of the shard so far; nothing stands before the first one
            for start in range(0, len(ids) - 1, self.stride):
                if predicted < len(ids):
                    windows.append((shard, start, predicted))
                predicted = start + self.data.block_size
        return spread(windows, limit)

    def evaluation_batch(self, windows: Sequence[tuple[int, int, int]]) -> Batch:
        """Some of evaluation_rows as a Batch of rows of block_size - 1."""
        inputs = np.zeros((len(windows), self.data.block_size - 1), np.int64)
        targets = np.full(inputs.shape, -1, np.int64)
        for row, (shard, start, predicted) in enumerate(windows):
            ids = self.data.shards[shard][start : start + self.data.block_size]
            check_ids(ids, self.data.vocab_size, self.data.paths[shard], start)
            inputs[row, : len(ids) - 1] = ids[:-1]
            first = predicted - start - 1  # column in which the first of them is the target
            targets[row, first : len(ids) - 1] = ids[first + 1 :]
        return Batch(inputs=inputs, targets=targets)


def samples(
    model: GPT,
    tokenizer: Tokenizer,
    machine: Machine,
    count: int,
    start: str,
    ask: str,
    n_tokens: int,
    repetition_penalty: float,
    seed: int,
) -> list[str]:
    """So many continuations of a text or, where that is given, of what a user asks.

    Of an encoder-decoder, the text with the targets that follow it.
    """
    has_encoder = model.config.n_encoder_layer > 0
    prompt, source = [tokenizer.end_of_text if has_encoder else 0], [0]
    try:
        if has_encoder:
            source = tokenizer.encode_source(start)[: model.config.block_size] or [0]
        elif ask:
            prompt = tokenizer.encode_chat_prompt([dict(role='user', content=ask)])
        else:
            prompt = tokenizer.encode_prompt(start)
    except UserError:  # a vocabulary of characters, or one that has no form for conversations
        pass
    was_training = model.training
    model.eval()
    with machine.autocast():
        options = dict(top_p=0.95, repetition_penalty=repetition_penalty, seed=seed)
        if ask or has_encoder:  # an answer ends; a text goes on
            options['stop'] = ends(tokenizer)
        if has_encoder:
            options['source'] = [source] * count
        rows = model.generate([prompt] * count, n_tokens, 0.8, **options)
    model.train(was_training)
    if has_encoder:
        rows = [source + row[1:] for row in rows]
    return [tokenizer.decode(row) for row in rows]


def in_words(result: dict) -> str:
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
