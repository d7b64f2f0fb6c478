"""What a model is trained to do.

An objective is a function (model, batch) -> (loss, {name: number}): the loss to minimize, a float32
scalar, and further numbers, which train.py logs and evaluates by name. batch: a tokens.Batch of
tensors. A config file may define its own as `objective`, and may return the loss alone. It sees the
settings as they were where its file was named: flags behind the file do not reach it.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from fledge import UserError
from fledge.device import Machine
from fledge.documents import Documents
from fledge.log import KEYS
from fledge.tokens import Batch, Tokens
from model import GPT

TAKEN = {'bytes', 'skipped_steps', 'step_losses', *KEYS}  # names of the log's own numbers


def next_token(model: GPT, batch: Batch) -> torch.Tensor:
    """Mean cross entropy of the targets, in nats a token; no logits are kept."""
    return model(batch['inputs'], batch['targets'], return_logits=False, **batch.context())[1]


def dpo(model: GPT, batch: Batch, beta: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290), in nats a pair.

    batch: pairs of documents, a chosen one and its rejected, with `reference`: what sums_of_logs
    was before training (see add_reference). beta: how dear it is to depart from that. Numbers:
    reward_margin, by which the chosen's reward is ahead, and preference_accuracy, how often it is.
    """
    rewards = beta * (sums_of_logs(model, batch) - batch['reference'])
    margins = rewards[0::2] - rewards[1::2]
    numbers = dict(reward_margin=margins.mean(), preference_accuracy=(margins > 0).float().mean())
    return -F.logsigmoid(margins).mean(), numbers


def sums_of_logs(model: GPT, batch: Batch) -> torch.Tensor:
    """The log-probability (nats) of what is learned in each document of a batch, float32 (n,)."""
    documents = batch['documents']
    at_once = dict(return_logits=False, documents=documents, reduction='none')
    _, nats = model(batch['inputs'], batch['targets'], **at_once)
    sums = torch.zeros(int(documents.max()) + 1, device=nats.device)
    # padding, whose document is -1, has no nats
    return sums.index_add(0, documents.clamp(min=0).flatten(), -nats.flatten())


@torch.no_grad()
def add_reference(
    model: GPT,
    data: Documents,
    machine: Machine,
    batch_size: int,
    saved: torch.Tensor | None = None,
) -> None:
    """Give the batches of data what sums_of_logs is of the model now.

    So that no second model is needed: it is computed once, before training, and saved: the
    same array at an earlier time, which then is taken. The processes of machine share the work.
    """
    if saved is not None and len(saved) != data.n_documents:
        raise UserError(
            f'{data.paths[0]} gave {len(saved):,} documents when this run began, and now gives '
            f'{data.n_documents:,}: keep its block_size'
        )
    if saved is not None:
        data.of_documents['reference'] = saved.numpy()
        return
    was_training = model.training
    model.eval()
    reference, rows = np.zeros(data.n_documents, np.float32), data.evaluation_rows()
    for here in machine.batches(rows, batch_size, 'reference'):
        with machine.autocast():
            sums = sums_of_logs(model, machine.move(data.evaluation_batch(here)))
        reference[data.documents_of(here)] = sums.cpu().numpy()
    model.train(was_training)
    data.of_documents['reference'] = sum(machine.gather(reference))


def references(splits: tuple[Tokens | Documents, ...]) -> list[torch.Tensor] | None:
    """The reference of each of some splits in pairs, for a checkpoint; None of other splits."""
    if not splits[0].pairs:
        return None
    return [torch.from_numpy(data.of_documents['reference']) for data in splits]


# What the setting `objective` may name: (function, whether it learns from pairs, by dpo_beta).
OBJECTIVES = {'next_token': (next_token, False), 'dpo': (dpo, True)}


def choose(objective: str | Callable, dpo_beta: float) -> Callable:
    """The function that a setting names, one of OBJECTIVES, or a config file's own, as it is."""
    if callable(objective):
        return objective
    if objective.endswith('.py'):
        raise UserError(
            f'this run has an objective of its own, in {objective}: name that config file again'
        )
    if objective not in OBJECTIVES:
        raise UserError(f'objective={objective!r} is none of {", ".join(OBJECTIVES)}')
    function, of_pairs = OBJECTIVES[objective]
    return functools.partial(function, beta=dpo_beta) if of_pairs else function


def check_data(objective: str, data: Tokens | Documents, folder: str) -> None:
    """UserError where preferences meet an objective that is not theirs, or the other way round.

    objective: the setting; of a config file's own nothing is known.
    """
    _, of_pairs = OBJECTIVES.get(objective, (None, data.pairs))
    if data.pairs and not of_pairs:
        raise UserError(
            f'{folder} has preferences, of which half would be learned by mistake: '
            'learn them with config/dpo.py'
        )
    if of_pairs and not data.pairs:
        raise UserError(
            f'{folder} has no pairs of chosen and rejected, which objective={objective} learns '
            'from: prepare/preferences.py makes them'
        )


def loss_and_numbers(objective: Callable, model: GPT, batch: Batch) -> tuple[torch.Tensor, dict]:
    """What an objective returns, as (loss, numbers) where it returned the loss alone."""
    result = objective(model, batch)
    loss, numbers = result if isinstance(result, tuple) else (result, {})
    for name in TAKEN & numbers.keys():
        raise UserError(f'the objective has a number called {name!r}, which the log has too')
    return loss, numbers
