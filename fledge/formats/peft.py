"""LoRA adapters in the files of peft, Hugging Face's library: adapter_config.json and its tensors.

peft adapts the layers of transformers' models. Where several of these lie in one of ours (queries,
keys and values; gate and up), writing gives each our A and its rows of B, and reading puts their
A one below the other, with B block by block.
"""

import json
import math
import os

import torch

from fledge import UserError, adapters, checkpoint, read_json
from fledge.formats import families, hub, save_tensors
from model import GPTConfig

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
PREFIX = 'base_model.model.'
# Settings under which the same tensors, A and B, would make another model.
FOREIGN = ('use_dora', 'modules_to_save', 'alpha_pattern', 'trainable_token_indices')
FOREIGN += ('target_parameters', 'layer_replication', 'lora_bias', 'alora_invocation_tokens')
FOREIGN += ('use_qalora', 'use_bdlora', 'arrow_config', 'kasa_config', 'velora_config')
FOREIGN += ('monteclora_config',)
# Ways to begin that leave the base's weights as they are.
BEGINNINGS = (True, False, 'gaussian', 'eva', 'orthogonal')
MERGE = 'merge it with peft (merge_and_unload) and load that model'


def theirs(kind: str, module: str) -> list[str]:
    """The names in transformers of the layers that lie in one of ours, in order."""
    names = [name for name, _ in families.names_of(kind, f'{module}.weight')]
    return [name.removesuffix('.weight') for name in names]


def write(
    folder: str, tensors: dict[str, torch.Tensor], config: GPTConfig, settings: dict, base: str
) -> None:
    """Write adapters into folder.

    tensors: those of an adapter checkpoint, all of one rank. config: the GPTConfig of its model.
    settings: its run's, of which lora_alpha and lora_dropout count. base: the folder or name of the
    base that transformers loads. UserError for rows of new tokens, and for a model of no family.
    """
    kind = families.config_of(config)['model_type']
    written, targets, ranks = {}, set(), set()
    for name, a in tensors.items():
        if name.endswith('.lora_rows'):
            raise UserError(
                'this adapter has trained rows of new tokens, which the base that peft would load '
                'lacks: leave out --format=peft, and the whole model is written'
            )
        if not name.endswith('.lora_A'):
            continue
        ours = name.removesuffix('.lora_A')
        b, modules = tensors[f'{ours}.lora_B'], theirs(kind, ours)
        parts = b.split(families.rows_of(config, len(modules), len(b)))
        for module, part in zip(modules, parts, strict=True):
            written[f'{PREFIX}{module}.lora_A.weight'] = a.float().clone()
            written[f'{PREFIX}{module}.lora_B.weight'] = part.float().clone()
            targets.add('.'.join(module.split('.')[-2:]))
        ranks.add(len(a))
    [rank] = ranks
    content = dict(
        peft_type='LORA',
        task_type='CAUSAL_LM',
        base_model_name_or_path=base,
        r=rank,
        lora_alpha=settings['lora_alpha'],
        lora_dropout=settings.get('lora_dropout', 0.0),
        target_modules=sorted(targets),
        fan_in_fan_out=bool(families.FAMILIES[kind].transposed),
        bias='none',
        inference_mode=True,
    )
    with open(f'{folder}/{CONFIG}', 'w', encoding='utf-8') as f:
        json.dump(content, f, indent=2)
    save_tensors(written, f'{folder}/{WEIGHTS}', f'{folder}/{CONFIG}')


def read_config(folder: str) -> dict:
    """The adapter_config.json in folder, a dict; UserError for what is not plain LoRA."""
    where = os.path.join(folder, CONFIG)
    config = read_json(where)
    if config.get('peft_type') != 'LORA':
        raise UserError(
            f'{where}: peft_type={config.get("peft_type")!r} is none that is read: LORA'
        )
    for name in FOREIGN:
        if config.get(name):
            raise UserError(f'{where}: {name}={str(config[name])[:60]} is not supported: {MERGE}')
    if config.get('bias', 'none') != 'none':
        raise UserError(f'{where}: bias={config["bias"]!r} is not supported: {MERGE}')
    beginning = config.get('init_lora_weights', True)
    if beginning not in BEGINNINGS:
        raise UserError(
            f"{where}: init_lora_weights={str(beginning)[:60]!r} changed the base's weights, "
            f'which is not supported: {MERGE}'
        )
    alpha, base = config.get('lora_alpha'), config.get('base_model_name_or_path')
    if type(alpha) not in (int, float) or not 0 < alpha < 1e9:
        raise UserError(f'{where}: lora_alpha={alpha!r:.60} is no number above 0')
    if not hub.may_be_source(base):
        raise UserError(f'{where} names no base: put its folder in as base_model_name_or_path')
    return config


def read(folder: str, saved: dict, config: GPTConfig) -> dict[str, torch.Tensor]:
    """The adapters' tensors in folder, {name: float32 tensor} as adapters.merged takes them.

    saved: read_config's. config: the base's GPTConfig. Layers may have different ranks: B is scaled
    so that saved's lora_alpha / rank holds for each. UserError for what does not fit the base.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    where = os.path.join(folder, WEIGHTS)
    if not os.path.exists(where):
        raise UserError(f'{folder} has no {WEIGHTS}: save the adapter again with peft')
    try:
        tensors = load_file(where)
    except (OSError, SafetensorError) as e:
        raise UserError(f'{where} cannot be read: {str(e).splitlines()[0][:200]}') from None
    kind = families.config_of(config)['model_type']
    alpha, own = saved['lora_alpha'], {}
    for ours, layer in checkpoint.empty_model(config).named_modules():
        if not ours.endswith(adapters.LAYERS):
            continue
        names = theirs(kind, ours)
        rows_of_each = families.rows_of(config, len(names), layer.out_features)
        all_a, all_b = [], []
        for name, rows in zip(names, rows_of_each, strict=True):
            # a layer without an adapter has one of rank 0
            nothing = torch.zeros(0, layer.in_features), torch.zeros(rows, 0)
            a = tensors.pop(f'{PREFIX}{name}.lora_A.weight', nothing[0]).float()
            b = tensors.pop(f'{PREFIX}{name}.lora_B.weight', nothing[1]).float()
            rank = len(a)
            if a.shape != (rank, layer.in_features) or b.shape != (rows, rank):
                raise UserError(
                    f'{where}: the adapter of {name} is {tuple(b.shape)} by {tuple(a.shape)}, '
                    f'and the layer {(rows, layer.in_features)}'
                )
            divisor = math.sqrt(rank) if saved.get('use_rslora') else rank
            all_a.append(a)
            all_b.append(b * alpha / divisor if rank else b)
        a, b = torch.cat(all_a), torch.block_diag(*all_b)
        if len(a):
            own[f'{ours}.lora_A'], own[f'{ours}.lora_B'] = a, b * len(a) / alpha
    if tensors:
        raise UserError(f'{where}: tensor {min(tensors)} is no LoRA of a {kind} block')
    if not own:
        raise UserError(f'{where} holds no tensors')
    return own
