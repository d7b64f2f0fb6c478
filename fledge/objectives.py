"""What a model is trained to do.

An objective is a function (model, batch) -> (loss, {name: number}): the loss to minimize, a float32
scalar, and further numbers, which train.py logs and evaluates by name. batch: a tokens.Batch of
tensors. A config file may define its own as `objective`, and may return the loss alone.
"""

from fledge import UserError
from fledge.run import KEYS

TAKEN = {'bytes', 'step_losses', *KEYS}  # names of the log's own numbers


def next_token(model, batch):
    """Mean cross entropy of the targets, in nats a token; no logits are kept.

    Settings reach it as attributes of the model: others know it by being this very function.
    """
    _, loss = model(batch['inputs'], batch['targets'], return_logits=False)
    return loss, {}


def loss_and_numbers(objective, model, batch):
    """What an objective returns, as (loss, numbers) where it returned the loss alone."""
    result = objective(model, batch)
    loss, numbers = result if isinstance(result, tuple) else (result, {})
    for name in TAKEN & numbers.keys():
        raise UserError(f'the objective has a number called {name!r}, which the log has too')
    return loss, numbers
