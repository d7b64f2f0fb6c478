"""LoRA (Hu et al. 2021, arXiv:2106.09685): beside a weight W, the product of two thin matrices, scale * B A.

In a checkpoint the tensors lie beside NAME.weight as NAME.lora_A (rank, columns) and NAME.lora_B (rows, rank); config has lora_alpha,
and scale is lora_alpha / rank.
"""

from fledge import UserError


def merge(state, alpha, path):
    """state, a checkpoint's tensors, with each adapter added to its weight. path names the checkpoint in errors."""
    merged = dict(state)
    for name in [n for n in state if n.endswith('.lora_A')]:
        base = name.removesuffix('.lora_A')
        a, b, weight = (
            merged.pop(name),
            merged.pop(f'{base}.lora_B', None),
            merged.get(f'{base}.weight'),
        )
        if (
            alpha is None
            or b is None
            or weight is None
            or not weight.is_floating_point()
            or (len(b), a.shape[1]) != weight.shape
            or b.shape[1] != len(a)
        ):
            raise UserError(
                f'{path}: the adapter {base} does not fit a weight, or config lacks lora_alpha'
            )
        merged[f'{base}.weight'] = weight.float() + alpha / len(a) * b.float() @ a.float()
    return merged
