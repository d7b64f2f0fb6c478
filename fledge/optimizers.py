"""AdamW and Muon over the right parameters."""

import torch

from fledge import UserError


def orthogonalize(x, dtype=torch.bfloat16):
    """The nearest (semi-)orthogonal matrices, roughly, of matrices x (n, rows, columns): five Newton-Schulz iterations in dtype."""
    x = x.to(dtype)
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    wide = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = wide @ wide.mT
        wide = torch.baddbmm(
            wide, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), wide, beta=3.4445
        )
    return wide if wide.shape == x.shape else wide.mT


class Muon(torch.optim.Muon):
    """torch's Muon, its state and its update, with matrices of one shape orthogonalized together: small ones take half the time."""

    TOGETHER = 1 << 22  # elements: larger matrices gain nothing, and copies of them take memory

    def __init__(self, parameters, lr, weight_decay, momentum=0.95):
        super().__init__(parameters, lr=lr, weight_decay=weight_decay, momentum=momentum)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            same = {}
            for p in group['params']:
                if p.grad is not None:
                    same.setdefault(p.shape, []).append(p)
            for shape, parameters in same.items():
                n = max(1, self.TOGETHER // shape.numel())
                for first in range(0, len(parameters), n):
                    self._update(parameters[first : first + n], group)

    def _update(self, parameters, group):
        for p in parameters:
            if not self.state[p]:
                self.state[p]['momentum_buffer'] = torch.zeros_like(p)
        momenta, gradients = (
            [self.state[p]['momentum_buffer'] for p in parameters],
            [p.grad for p in parameters],
        )
        torch._foreach_lerp_(momenta, gradients, 1 - group['momentum'])
        update = torch.stack(gradients).lerp_(torch.stack(momenta), group['momentum'])  # Nesterov's
        update = orthogonalize(update).to(parameters[0].dtype)
        torch._foreach_mul_(parameters, 1 - group['lr'] * group['weight_decay'])
        rows, columns = parameters[0].shape
        torch._foreach_add_(
            parameters, update.unbind(), alpha=-group['lr'] * max(1, rows / columns) ** 0.5
        )


def make_optimizers(model, name, learning_rate, weight_decay, betas):
    """The optimizers of a model, a list: [AdamW], or [AdamW, Muon].

    adamw: matrices and embeddings decay, vectors do not (nanoGPT's two groups, in its order: its state loads).
    muon: the blocks' matrices go to Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon); embeddings, head and
    vectors stay with AdamW, undecayed. One learning rate serves both.
    """
    if not 0 <= betas[0] < 1 or not 0 <= betas[1] < 1:
        raise UserError(f'beta1={betas[0]} and beta2={betas[1]} must be in [0, 1)')
    fused = next(model.parameters()).device.type in ('cpu', 'cuda')
    parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if name == 'adamw':
        groups = [
            dict(params=[p for _, p in parameters if p.dim() >= 2], weight_decay=weight_decay),
            dict(params=[p for _, p in parameters if p.dim() < 2], weight_decay=0.0),
        ]
        return [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)]
    if name != 'muon':
        raise UserError(f'optimizer={name!r} is none of adamw, muon')
    matrices = [p for n, p in parameters if p.dim() == 2 and '.h.' in n]
    others = [p for n, p in parameters if p.dim() != 2 or '.h.' not in n]
    return [
        torch.optim.AdamW(others, lr=learning_rate, betas=betas, weight_decay=0.0, fused=fused),
        Muon(matrices, lr=learning_rate, weight_decay=weight_decay),
    ]


def state_dict(optimizers):
    """What a checkpoint keeps: one optimizer's state alone, as nanoGPT's does, or a list of two."""
    states = [o.state_dict() for o in optimizers]
    return states[0] if len(states) == 1 else states


def load_state_dict(optimizers, saved):
    """Restore momenta and step counts; rates, betas and decay stay as the settings say."""
    states = saved if isinstance(saved, list) else [saved]
    try:
        if len(states) != len(optimizers):
            raise ValueError(f'{len(states)} optimizers saved, {len(optimizers)} wanted')
        for optimizer, state in zip(optimizers, states):
            mine = optimizer.state_dict()['param_groups']
            groups = [
                m | {'params': s['params']}
                for m, s in zip(mine, state['param_groups'], strict=True)
            ]
            shapes = [p.shape for g in optimizer.param_groups for p in g['params']]
            for i, entry in state['state'].items():
                if any(
                    t.dim() and t.shape != shapes[i] for t in entry.values() if torch.is_tensor(t)
                ):
                    raise ValueError(f'the state of parameter {i} has another shape')
            optimizer.load_state_dict({'state': state['state'], 'param_groups': groups})
    except (ValueError, KeyError, IndexError, TypeError) as e:
        raise UserError(
            f"the checkpoint's optimizer state is another optimizer's ({e}); resume with the settings that it was saved with (nanoGPT's: config/nanogpt.py and its own config)"
        ) from None
