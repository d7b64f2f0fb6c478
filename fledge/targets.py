"""How well a model gives the targets of sources: exact match, chrF and BLEU."""

import logging
from collections.abc import Iterable
from dataclasses import replace

from fledge.documents import Documents
from fledge.generation import Reply, Sampling, generate, reply_to_source
from fledge.tasks import share_interval
from fledge.tokenizer import Tokenizer
from model import GPT

AT_ONCE = 32  # rows: replies, or beams


def measure_targets(
    model: GPT, tokenizer: Tokenizer, data: Documents, numbers: Iterable[int], sampling: Sampling
) -> dict:
    """What a model says to sources, against their targets: a dict.

    data: a documents.Documents with_sources. numbers: of the documents that are asked. exact_match:
    the share of which every token is right, with its 95% interval. chrf (Popovic 2015) and bleu
    (Papineni et al. 2002), 0 to 100: sacrebleu's of the texts, by its defaults; BLEU is None where
    no target has the four words that it counts by. A decoder alone reads the source as its prompt;
    a reply ends at twice the longest target. ValueError for logits that are not finite.
    """
    import sacrebleu

    pairs = [data.source_and_target(number) for number in numbers]
    targets = [target for _, target in pairs]
    sampling = replace(sampling, max_new_tokens=2 * max(map(len, targets)))
    replies = [reply_to_source(model, tokenizer, source, sampling) for source, _ in pairs]
    for _ in generate(model, replies, AT_ONCE):
        pass
    n_right, texts = 0, []
    for reply, target in zip(replies, targets, strict=True):
        n_right += reply.ids == target
        # the target as a reply, so that the two texts are made of tokens in the same way
        right = Reply(tokenizer, reply.prompt, replace(sampling, max_new_tokens=len(target)))
        for token in target:
            right.receive(token)
        texts.append(right.text)
    logging.getLogger('sacrebleu').setLevel(logging.ERROR)  # it suspects texts of being tokenized
    said, share = [reply.text for reply in replies], n_right / len(replies)
    has_four_words = any(len(text.split()) >= 4 for text in texts)  # or no n-gram of the longest
    return dict(
        examples=len(replies),
        exact_match=share,
        exact_match_interval=share_interval(share, len(replies)),
        chrf=sacrebleu.corpus_chrf(said, [texts]).score,
        bleu=sacrebleu.corpus_bleu(said, [texts]).score if has_four_words else None,
    )
