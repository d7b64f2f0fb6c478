"""Classification: the words that are labels of documents, and how often the right one is chosen.

Documents with labels end with one learned token, the label, and the end of text behind it.
"""

import os

import numpy as np

from fledge import UserError
from fledge.report import new_axes, save
from fledge.tokenizer import Tokenizer, load_tokenizer
from fledge.tokens import mask_path, read_bin, split_files


def find_labels(paths: list[str], tokenizer: Tokenizer, folder: str) -> dict[int, str]:
    """The labels of prepared documents, {token id: word}, in the order of the words.

    paths: .bin files, with a .mask.bin beside each. folder: what an error calls them. UserError
    where they have no labels, or a label is not a single token.
    """
    learned = []
    for path in paths:
        if os.path.exists(mask_path(path)):
            mask = np.memmap(mask_path(path), np.uint8, mode='r')
            learned.append(read_bin(path)[np.flatnonzero(mask)])
    learned = np.concatenate(learned) if learned else np.array([], np.int64)
    ends = np.flatnonzero(learned == tokenizer.end_of_text)
    if not len(ends):
        raise UserError(
            f'{folder} has no labels: prepare/classify.py prepares texts with their labels'
        )
    lengths = np.diff(ends, prepend=-1) - 1  # of what is learned in front of each end of text
    if np.any(lengths != 1):
        first = int(np.argmax(lengths != 1))
        tokens = learned[ends[first] - lengths[first] : ends[first]].tolist()
        pieces = [repr(tokenizer.decode([token])) for token in tokens[:5]]
        pieces += ['...'] if len(tokens) > 5 else []
        raise UserError(
            f'{folder}: the label {tokenizer.decode(tokens)[:40]!r} is {len(tokens):,} tokens '
            f'({", ".join(pieces)}), and evaluate.py --labels compares single tokens: prepare it '
            'with other words (--labels), another --tokenizer or a larger --vocab_size'
        )
    ids = np.unique(learned[ends - 1]).tolist()
    words = {token: tokenizer.decode([token]).strip() for token in ids}
    return dict(sorted(words.items(), key=lambda item: item[1]))


def report_labels(settings: dict) -> None:
    """Print the labels of what a script of prepare/ made, or a warning where they are not tokens.

    settings: the script's.
    """
    if settings['num_shards'] > 1:  # a slice, which may lack some
        return
    folder, paths = os.path.join('data', settings['name']), []
    for split in ('train', 'val', 'test'):
        paths += split_files(folder, split)
    try:
        words = find_labels(paths, load_tokenizer(folder), folder).values()
        print(f'labels: {", ".join(words)}')
    except UserError as e:
        print(f'warning: {e}')


def label_scores(confusion: np.ndarray, words: list[str]) -> dict:
    """What a confusion table says: label_accuracy, macro_f1, labels, confusion.

    confusion: int64 (n, n), how many documents of each label (row) were given each (column).
    words: the n labels. `labels` has the precision, recall and F1 of each, and its documents; a
    share of nothing is 0. macro_f1 is the mean of their F1.
    """
    right = np.diag(confusion)
    given, own = confusion.sum(axis=0), confusion.sum(axis=1)
    precision = right / np.maximum(given, 1)
    recall = right / np.maximum(own, 1)
    f1 = 2 * right / np.maximum(given + own, 1)
    of_labels = {}
    for i, word in enumerate(words):
        of_labels[word] = dict(
            precision=float(precision[i]),
            recall=float(recall[i]),
            f1=float(f1[i]),
            documents=int(own[i]),
        )
    return dict(
        label_accuracy=float(right.sum() / confusion.sum()),
        macro_f1=float(f1.mean()),
        labels=of_labels,
        confusion=confusion.tolist(),
    )


def label_tables(result: dict) -> str:
    """What label_scores() returned, as a person reads it: a line, and two tables."""
    words = list(result['labels'])
    documents = sum(map(sum, result['confusion']))
    width = max(9, *map(len, words))
    lines = [
        f'label_accuracy {result["label_accuracy"]:.2%}, macro F1 {result["macro_f1"]:.4f}, '
        f'of {documents:,} documents',
        f'{"":{width}}  precision  recall      F1  documents',
    ]
    for word, of_label in result['labels'].items():
        lines.append(
            f'{word:{width}}  {of_label["precision"]:9.4f}  {of_label["recall"]:6.4f}  '
            f'{of_label["f1"]:6.4f}  {of_label["documents"]:9,}'
        )
    lines.append('the documents of each label (rows), by the label that they were given (columns)')
    lines.append(' ' * width + ''.join(f'  {word:>{width}}' for word in words))
    for word, counts in zip(words, result['confusion'], strict=True):
        lines.append(f'{word:{width}}' + ''.join(f'  {count:{width},}' for count in counts))
    return '\n'.join(lines)


def draw_confusion(result: dict, path: str) -> None:
    """Draw the confusion table of what label_scores() returned, as a PNG at path, and say so."""
    words, confusion = list(result['labels']), np.array(result['confusion'])
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    axes = new_axes((3 + 0.8 * len(words), 2.5 + 0.8 * len(words)))
    axes.imshow(shares, cmap='Blues', vmin=0, vmax=1)
    for i in range(len(words)):
        for j in range(len(words)):
            color = 'white' if shares[i, j] > 0.5 else 'black'
            axes.text(j, i, f'{confusion[i, j]:,}', ha='center', va='center', color=color)
    axes.set_xticks(range(len(words)), words, rotation=45, ha='right')
    axes.set_yticks(range(len(words)), words)
    axes.set(xlabel='was given', ylabel='is', title=f'{result["label_accuracy"]:.1%} are right')
    save(axes.figure, path)
