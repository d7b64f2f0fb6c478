"""Checkpoints: written whole or not at all, and read as plain tensors, so nothing in one is ever executed.

The file is nanoGPT's: a torch.save of model, optimizer, model_args, iter_num, best_val_loss and config.
"""

import os
import pickle
import re

import torch
from torch.overrides import TorchFunctionMode

from fledge import UserError, adapters, int8, replacing
from model import GPT, GPTConfig


def save(path, checkpoint):
    """Write checkpoint, a dict of tensors and plain values, to path: the old file stays until the new one is on disk."""
    try:
        with replacing(path, 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:  # a full disk surfaces as either
        raise UserError(
            f'cannot write {path}: {getattr(e, "strerror", None) or e}; what was there before is as it was'
        ) from None


def link(path, other):
    """Give the checkpoint at path a second name, which keeps it when path is replaced by a later one."""
    temporary = other + '.tmp'
    if os.path.exists(temporary):  # of a process that was killed right here
        os.remove(temporary)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        import shutil

        shutil.copyfile(path, temporary)
    os.replace(temporary, other)


def load(path):
    """The checkpoint at path, ours or nanoGPT's, as a dict; UserError where it is missing, broken or carries code."""
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f'no checkpoint at {path}: train first, or name another with --out_dir'
        ) from None
    except IsADirectoryError:
        raise UserError(f'{path} is a folder; name the checkpoint file in it') from None
    except pickle.UnpicklingError as e:
        found = re.search(r'GLOBAL (\S+)', str(e))
        raise UserError(
            f'{path} carries pickled code ({found[1]}), which is never run: it is refused'
            if found
            else f'{path} is no checkpoint: it is broken, or carries pickled code, which is never run'
        ) from None
    except Exception as e:  # broken bytes fail in any way
        raise UserError(f'{path} is cut short or is no checkpoint ({type(e).__name__})') from None
    if not isinstance(checkpoint, dict) or not all(
        isinstance(checkpoint.get(k), dict) for k in ('model', 'model_args')
    ):
        raise UserError(f'{path} is no checkpoint: it lacks model or model_args')
    config = checkpoint.setdefault('config', {})
    if (
        not all(isinstance(k, str) and torch.is_tensor(v) for k, v in checkpoint['model'].items())
        or not isinstance(config, dict)
        or not isinstance(config.get('dataset') or '', str)
    ):
        raise UserError(
            f'{path} is no checkpoint: model holds more than named tensors, or config is no settings'
        )
    # torch.compile's prefix and the causal mask that older scripts saved
    checkpoint['model'] = {
        k.removeprefix('_orig_mod.'): v
        for k, v in checkpoint['model'].items()
        if not k.endswith('.attn.bias')
    }
    return checkpoint


class _NothingDrawn(TorchFunctionMode):
    """Turns torch.nn.init's functions, which all ask a mode first, into nothing."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, '__module__', '') == 'torch.nn.init':
            return args[0] if args else kwargs['tensor']
        return function(*args, **kwargs or {})


def empty_model(config):
    """A GPT whose matrices are not filled in, and so take no memory yet: shapes, and a place to assign tensors to.

    The meta device would do the same, and import torch's compiler for it, which takes half a second or more.
    """
    with _NothingDrawn():
        return GPT(config)


def load_model(checkpoint, path, dropout=None):
    """The GPT of a loaded checkpoint, on the CPU, its adapters merged; dropout overrides the saved one. path is for error messages."""
    try:
        state = adapters.merge(
            checkpoint['model'], checkpoint.get('config', {}).get('lora_alpha'), path
        )
        quantized = any(tensor.dtype == torch.int8 for tensor in state.values())
        config = GPTConfig(
            **checkpoint['model_args'] | ({} if dropout is None else {'dropout': dropout})
        )
        model = empty_model(
            config
        )  # the checkpoint's tensors become the model's, so there is one of each
        if quantized:
            for layer in [m for m in model.modules() if isinstance(m, torch.nn.Linear)]:
                layer.to('meta')  # nothing is there to be rounded yet
            int8.quantize(model)
        model.load_state_dict(
            {
                name: tensor if tensor.dtype == torch.int8 else tensor.float()
                for name, tensor in state.items()
            },
            assign=True,
        )
        if config.tie_embeddings and not quantized:
            model.lm_head.weight = model.transformer.wte.weight
    except (
        TypeError,
        ValueError,
        RuntimeError,
        AttributeError,
        LookupError,
        ZeroDivisionError,
    ) as e:
        raise UserError(
            f'{path} does not fit this model: {" ".join(str(e).split())[:300]}'
        ) from None
    return model
