"""Checkpoints: written whole or not at all, and read as plain tensors, so that none can run code.

The file is nanoGPT's, a torch.save of model, optimizer, model_args, iter_num, best_val_loss and
config.
"""

import contextlib
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields

import torch
from torch.overrides import TorchFunctionMode

from encoder_decoder import make_model
from fledge import UserError, adapters, quantize, replacing
from fledge.tokenizer import GPT2_SIZE, Tokenizer, is_gpt2_size, padded_vocab_size
from model import ACTIVATIONS, GPT, GPTConfig

LARGEST_TABLE = 2**27  # numbers in a table of positions: a million of 128
SMALL_MODEL = 10**6  # weights; a small one is made, and the tensor that does not fit it is named


class NotFinite(UserError):
    """Weights that are infinite or no numbers, which are worth no file."""


def save(path: str, checkpoint: dict, older: str | None = None) -> None:
    """Write a dict of tensors and plain values; the old file stays until the new one is whole.

    older: the name that the old file takes then. UserError for a full disk; NotFinite.
    """
    for name, tensor in checkpoint['model'].items():
        if not tensor.isfinite().all():
            raise NotFinite(f'{name} has weights that are not finite: {path} is not written')
    try:
        with replacing(path, 'wb') as f:
            torch.save(checkpoint, f.name)  # by its name: through f it takes twice as long
            os.fsync(f.fileno())
            if hasattr(os, 'posix_fadvise'):  # read back what is on the disk, not in memory
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            check_sums(f.name)
            if older:
                os.replace(path, older)
        with contextlib.suppress(OSError):  # not on Windows: the new name survives a power cut too
            folder = os.open(os.path.dirname(path) or '.', os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as e:  # torch has no words for a full disk
        why = getattr(e, 'strerror', None) or 'the disk is full or broken'
        raise UserError(f'cannot write {path}: {why}; what was there before is as it was') from None


def load(path: str) -> dict:
    """The checkpoint at path, ours or nanoGPT's, as a dict.

    Raises UserError where it is missing, broken, or carries code.
    """
    try:
        check_sums(path)
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f'no checkpoint at {path}: train it first, or name another (--init_from, --out_dir)'
        ) from None
    except IsADirectoryError:
        raise UserError(f'{path} is a folder; name the checkpoint file in it') from None
    except (NotADirectoryError, PermissionError) as e:
        raise UserError(f'{path} cannot be read: {e.strerror}') from None
    except pickle.UnpicklingError as e:
        found = re.search(r'GLOBAL (\S+)', str(e))
        if found:
            raise UserError(
                f'{path} carries pickled code ({found[1]}), which is never run'
            ) from None
        raise UserError(
            f'{path} is no checkpoint: it is broken, or carries pickled code, which is never run'
        ) from None
    except UserError:
        raise
    except Exception as e:  # broken bytes fail in any way
        raise UserError(f'{path} is cut short or is no checkpoint ({type(e).__name__})') from None
    check(checkpoint, path)
    tensors = {}
    for name, tensor in checkpoint['model'].items():
        if not name.endswith('.attn.bias'):  # the causal mask that older scripts saved
            tensors[name.removeprefix('_orig_mod.')] = tensor  # torch.compile's
    return checkpoint | {'model': tensors}


def check_sums(path: str) -> None:
    """UserError unless each record of a torch.save file has the CRC-32 that was written with it.

    torch.load reads them without a look at it. 900 MB take 0.3 s. Those that were saved under
    torch's set_crc32_options(False) have none. Files from before torch 1.6 are no zips, and are
    refused: nothing in them can be checked.
    """
    with open(path, 'rb') as f:
        if f.read(4) != b'PK\3\4':  # what torch.load tells a zip by
            raise UserError(
                f'{path} is no checkpoint as torch.save has written it since torch 1.6: '
                'it is broken, or carries pickled code, which is never run'
            )
        try:
            archive = zipfile.ZipFile(f)
            records = archive.infolist()
            # of what says that it is a folder, torch.load reads whatever is in memory
            is_torchs = all(
                record.compress_type == zipfile.ZIP_STORED and not record.external_attr & 0x10
                for record in records
            )
            has_sums = any(record.CRC for record in records)
            broken = archive.testzip() if is_torchs and has_sums else None
        except Exception as e:  # broken bytes fail in any way
            raise UserError(f'{path} is cut short or broken: {e}') from None
    if not is_torchs:
        raise UserError(f'{path} is broken, or torch.save has not written it')
    if broken:
        raise UserError(
            f'{path} is broken: the checksum of {broken!r} does not match what is there; '
            'take another checkpoint, or fetch this one again'
        )


def check(checkpoint: object, path: str) -> None:
    """UserError unless checkpoint is one; config may be missing, and is then empty."""
    parts = checkpoint if isinstance(checkpoint, dict) else {}
    if not isinstance(parts.get('model'), dict) or not isinstance(parts.get('model_args'), dict):
        raise UserError(f'{path} is no checkpoint: it lacks model or model_args')
    config = checkpoint.setdefault('config', {})
    if not isinstance(config, dict) or not isinstance(config.get('dataset'), (str, type(None))):
        raise UserError(f'{path} is no checkpoint: its config is no settings')
    for name, tensor in checkpoint['model'].items():
        if not isinstance(name, str) or not torch.is_tensor(tensor):
            raise UserError(f'{path} is no checkpoint: model holds more than named tensors')
        is_plain = tensor.layout == torch.strided and tensor.device.type == 'cpu'
        if not is_plain or tensor.is_complex():
            raise UserError(f'{path} is no checkpoint: {name[:100]!r} is no tensor of real numbers')
        if tensor.nbytes > tensor.untyped_storage().nbytes():  # one number that is repeated
            raise UserError(f'{path} is broken: it holds less of {name[:100]!r} than its shape')


def load_model(checkpoint: dict, path: str, dropout: float | None = None) -> GPT:
    """The GPT of a loaded checkpoint, on the CPU, its adapters merged.

    dropout overrides the saved one. path names the checkpoint in a UserError.
    """
    args = dict(checkpoint['model_args'])
    if dropout is not None:
        args['dropout'] = dropout
    try:
        state = adapters.merged(checkpoint, path)
        config = GPTConfig(**args)
        for field in fields(config):
            value = getattr(config, field.name)
            if field.type is int and type(value) is not int:
                raise TypeError(f'{field.name}={value!r} is no whole number')
        check_size(config, [tensor.numel() for tensor in state.values()])
        model = empty_model(config)
        quantized = any(tensor.dtype == torch.int8 for tensor in state.values())
        if quantized:
            for layer in model.modules():
                if isinstance(layer, torch.nn.Linear):
                    layer.to('meta')  # nothing is there to be rounded yet
            quantize.apply(model)
        for name, tensor in state.items():
            if tensor.dtype != torch.int8:
                state[name] = tensor.float()
        # the checkpoint's tensors become the model's, so that there is one of each
        model.load_state_dict(state, assign=True)
        if model.config.tie_embeddings and not quantized:
            model.lm_head.weight = model.transformer.wte.weight
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        why = ' '.join(str(e).split())[:300]
        raise UserError(f'{path} does not fit this model: {why}') from None
    return model


def check_size(config: GPTConfig, sizes: Sequence[int]) -> None:
    """ValueError where tensors of these sizes are far from enough for a GPTConfig's model.

    It is asked before memory is taken for a model that a broken file describes.
    """
    n_layers, is_rope = config.n_layer + config.n_encoder_layer, config.position == 'rope'
    rows = (config.n_head + config.n_kv_head) * config.head_dim + config.n_inner  # of n_embd each
    rows = config.vocab_size + n_layers * rows
    if config.position == 'learned':
        rows += config.block_size
    elif config.block_size > LARGEST_TABLE // (config.head_dim if is_rope else config.n_embd):
        raise ValueError(f'block_size={config.block_size} is longer than any context')
    if n_layers > len(sizes) + 1000 or rows * config.n_embd > sum(sizes) + SMALL_MODEL:
        raise ValueError('it describes a larger model than its tensors are for')


class NoInitialization(TorchFunctionMode):
    """Makes the functions of torch.nn.init, which all ask such a mode first, do nothing."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, '__module__', '') == 'torch.nn.init':
            return args[0] if args else kwargs['tensor']
        return function(*args, **kwargs or {})


def empty_model(config: GPTConfig) -> GPT:
    """A GPT whose matrices are not filled in: shapes, and a place to assign tensors to.

    It takes 0.02 s. The meta device would do the same, but imports torch's compiler for it: 1.1 s.
    """
    with NoInitialization():
        return make_model(config)


def model_args(config: GPTConfig) -> dict:
    """A GPTConfig as a dict: nanoGPT's seven fields, and those that depart from a GPT-2 of these.

    So nanoGPT reads the checkpoint of a GPT-2.
    """
    gpt2 = {field.name: field.default for field in fields(config)[7:]}
    gpt2 |= dict(n_kv_head=config.n_head, head_dim=config.n_embd / config.n_head)
    gpt2 |= dict(n_inner=4 * config.n_embd, qkv_bias=config.bias)
    if ACTIVATIONS[config.activation][0]:
        del gpt2['n_inner']  # a gated MLP of that width has to say so
    return {k: v for k, v in asdict(config).items() if k not in gpt2 or v != gpt2[k]}


def config_of(settings: dict, tokenizer: Tokenizer | None) -> GPTConfig:
    """The GPTConfig of a new model by a script's settings; tokenizer: of its data, or None."""
    values = {
        field.name: settings[field.name] for field in fields(GPTConfig) if field.name in settings
    }
    values['vocab_size'] = settings['vocab_size'] or padded_vocab_size(tokenizer)
    if settings['qkv_bias'] == 'auto':
        values['qkv_bias'] = settings['bias']
    try:
        return GPTConfig(**values)
    except ValueError as e:
        raise UserError(str(e)) from None


def model_to_train(
    checkpoint: dict, path: str, settings: dict, given: set[str], say: Callable[[str], None]
) -> GPT:
    """The model of a loaded checkpoint, for rows of block_size tokens.

    Its shape is its own: settings are brought in line with it, and those of `given` that ask for
    another are named by say(). UserError, which names path, for rows that it cannot take.
    """
    context = checkpoint['model_args'].get('block_size', GPTConfig.block_size)
    if 'block_size' not in given:
        settings['block_size'] = min(settings['block_size'], context)
    fit_rows(checkpoint, settings['block_size'], path)
    model = load_model(checkpoint, path, dropout=settings['dropout'])
    if model.config.block_size != context:
        say(f'the context of {context} becomes {model.config.block_size}, by block_size')
    for name in sorted(settings.keys() & asdict(model.config).keys() - {'block_size'}):
        own = getattr(model.config, name)
        by_itself = settings[name] is not False and settings[name] in (0, 'auto')
        if own != settings[name] and name in given and not by_itself:
            say(f'{name}={settings[name]!r} is ignored: the checkpoint has {own!r}')
        settings[name] = own
    return model


def fit_rows(checkpoint: dict, block_size: int, path: str) -> None:
    """Let the model of a loaded checkpoint train in rows of block_size tokens.

    RoPE and sinusoids have no last position: the context stays, or grows. Learned positions beyond
    block_size are dropped; there are no more than the checkpoint has (UserError, which names path).
    """
    args = checkpoint['model_args']
    context = args.get('block_size', GPTConfig.block_size)
    if args.get('position') in ('rope', 'sinusoidal'):
        args['block_size'] = max(context, block_size)
        return
    if block_size > context:
        more = f'{block_size=} is more, and --block_size={context} the most'
        raise UserError(f'{path} has {context} learned positions; {more}')
    name = 'transformer.wpe.weight'
    if block_size < context and name in checkpoint['model']:
        checkpoint['model'][name] = checkpoint['model'][name][:block_size].clone()
        args['block_size'] = block_size


def fit_tokenizer(
    checkpoint: dict,
    theirs: Tokenizer | None,
    tokenizer: Tokenizer | None,
    say: Callable[[str], None],
) -> int:
    """Make room in a loaded checkpoint for tokens that its own tokenizer lacks and the data's has.

    theirs: its own, tokenizer: the data's; None where unknown. say() tells of new ones. Returns how
    many rows of the vocabulary nobody has trained then, or 0.
    """
    vocab_size = checkpoint['model_args'].get('vocab_size', GPTConfig.vocab_size)
    n_known = GPT2_SIZE if is_gpt2_size(vocab_size) else vocab_size
    n_known = theirs.vocab_size if theirs else n_known
    if not tokenizer or tokenizer.vocab_size <= n_known:
        return 0
    vocab_size = max(vocab_size, tokenizer.vocab_size)
    # the rows of adapters would not be the last any more
    checkpoint['model'] = adapters.merged(checkpoint, 'the checkpoint')
    grow_vocabulary(checkpoint, n_known, vocab_size)
    new = [token for token, i in tokenizer.special.items() if i >= n_known]
    say(f'new tokens, which begin as the mean of those known: {", ".join(new)}')
    return vocab_size - n_known


def grow_vocabulary(checkpoint: dict, n_known: int, vocab_size: int) -> None:
    """Give the tokens n_known .. vocab_size - 1 of a loaded checkpoint rows to learn, in place.

    They are special tokens that its model never saw, or padding: each begins as the mean of the
    rows of those known, in the embedding and in the head.
    """
    for name in ('transformer.wte.weight', 'lm_head.weight'):
        weight = checkpoint['model'].get(name)
        if weight is None or not weight.is_floating_point():
            continue
        known = weight[:n_known].float()
        new = known.mean(dim=0).expand(vocab_size - n_known, -1)
        checkpoint['model'][name] = torch.cat((known, new))
    checkpoint['model_args']['vocab_size'] = vocab_size
