"""Direct effects the slow way: one full hooked forward pass per sender and prompt.

Nothing is shared with the fast sweep: no cache, batch or replay, plain hooks, the whole prompt.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from circuitune.components import Component, Head
from circuitune.models import Model


def run_with(model: Model, tokens: list[int], z_at: dict[int, Tensor], mlp_at: dict[int, Tensor]):
    """Logits at END; z and MLP outputs at END overwritten. Also what passed END, per layer."""
    seen: dict[str, dict[int, Tensor]] = {"z": {}, "mlp": {}}
    handles = []
    for layer in range(model.layers):

        def on_z(_, args, layer=layer):
            z = args[0].clone()
            if layer in z_at:
                z[0, -1] = z_at[layer]
            seen["z"][layer] = z[0, -1].clone()
            return (z,)

        def on_mlp(_, __, output, layer=layer):
            output = output.clone()
            rows = output.view(len(tokens), -1)  # of the one prompt; OPT has no batch axis here
            if layer in mlp_at:
                rows[-1] = mlp_at[layer]
            seen["mlp"][layer] = rows[-1].clone()
            return output

        handles.append(model.part(layer, model.family.out).register_forward_pre_hook(on_z))
        handles.append(model.part(layer, model.family.mlp).register_forward_hook(on_mlp))
    with torch.no_grad():
        logits = model.hf(torch.tensor([tokens], device=model.device), use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits[0, -1], seen["z"], seen["mlp"]


def slow_patched_logits(
    model: Model, clean: list[int], corrupt: list[int], senders: Sequence[Component], choice: list
) -> Tensor:
    """Logits of ``choice`` after the clean prompt, a row per patched sender, other heads held."""
    _, z_clean, _ = run_with(model, clean, {}, {})
    _, z_corrupt, mlp_corrupt = run_with(model, corrupt, {}, {})
    rows = []
    for sender in senders:
        layer, z, mlp = sender.layer, {k: value.clone() for k, value in z_clean.items()}, {}
        if isinstance(sender, Head):
            width = slice(sender.index * model.d_head, (sender.index + 1) * model.d_head)
            z[layer][width] = z_corrupt[layer][width]
        else:
            mlp[layer] = mlp_corrupt[layer]
        rows.append(run_with(model, clean, z, mlp)[0][choice])
    return torch.stack(rows)
