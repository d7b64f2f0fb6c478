"""LoRA (Hu et al. 2021, arXiv:2106.09685): beside a weight W, two thin matrices, as scale * B A.

In a checkpoint the tensors lie beside NAME.weight as NAME.lora_A (rank, columns) and NAME.lora_B
(rows, rank); config has lora_alpha, and scale is lora_alpha / rank.
"""

from fledge import UserError


def merge(state, alpha, path):
    """A checkpoint's tensors with each adapter added to its weight; path names it in errors."""
    merged = dict(state)
    for name in state:
        if not name.endswith('.lora_A'):
            continue
        base = name.removesuffix('.lora_A')
        a, b = merged.pop(name), merged.pop(f'{base}.lora_B', None)
        weight = merged.get(f'{base}.weight')
        complete = not any(part is None for part in (alpha, b, weight))
        fits = complete and (len(b), a.shape[1]) == weight.shape and b.shape[1] == len(a)
        if not fits or not weight.is_floating_point():
            raise UserError(
                f'{path}: the adapter {base} does not fit a weight, or config lacks lora_alpha'
            )
        merged[f'{base}.weight'] = weight.float() + alpha / len(a) * b.float() @ a.float()
    return merged
