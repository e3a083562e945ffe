"""Paths sender -> receiver -> answer the slow way: plain hooks, whole forward passes, one path.

Nothing is shared with the fast way: no replay, no cells, no batching. The receiver's own module
computes everything after its projection, and every other head is overwritten in every layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from circuitune.components import Head
from circuitune.models import Model
from circuitune.paths import Embedding, Receiver, Sender


def run(model: Model, tokens: list[int], edits: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits at END, and what passed each site; a site named in ``edits`` is overwritten."""
    seen: dict[str, Tensor] = {}
    handles = []

    def passing(name: str, value: Tensor) -> Tensor:
        seen[name] = edits.get(name, value.detach()).clone()
        return seen[name].clone()

    def after(module: torch.nn.Module, name: str) -> None:
        hook = lambda _, __, output, name=name: passing(name, output)  # noqa: E731
        handles.append(module.register_forward_hook(hook))

    after(model.hf.get_input_embeddings(), "embed")
    for layer in range(model.layers):
        attention, mlp = (model.part(layer, path) for path in ("self_attn", "mlp"))
        after(mlp, f"mlp {layer}")
        for kind in "qkv":
            after(getattr(attention, f"{kind}_proj"), f"{kind} {layer}")
        hook = lambda _, args, layer=layer: (passing(f"z {layer}", args[0]),)  # noqa: E731
        handles.append(attention.o_proj.register_forward_pre_hook(hook))
    with torch.no_grad():
        logits = model.hf(torch.tensor([tokens]), use_cache=False).logits[0, -1]
    for handle in handles:
        handle.remove()
    return logits, seen


def slow_path_logits(
    model: Model,
    prompts: tuple[list[int], list[int]],
    path: tuple[Sender, Receiver],
    positions: Sequence[int],
    *,
    group: bool = False,
) -> Tensor:
    """Logits at END with one path patched; ``prompts`` are clean and corrupt, ``path`` one way."""
    (clean, corrupt), (sender, receiver) = prompts, path
    places, head, share = list(positions), receiver.head, model.heads // model.kv_heads
    _, was = run(model, clean, {})
    _, other = run(model, corrupt, {})
    held = {name: value for name, value in was.items() if name.startswith("z")}

    # 1. The sender corrupt at some places, every other head held: what the projection makes of it.
    columns = slice(None)
    if isinstance(sender, Head):
        columns = slice(sender.index * model.d_head, (sender.index + 1) * model.d_head)
        site = f"z {sender.layer}"
    else:
        site = "embed" if isinstance(sender, Embedding) else f"mlp {sender.layer}"
    edited = was[site].clone()
    edited[0, places, columns] = other[site][0, places, columns]
    _, reached = run(model, clean, held | {site: edited})

    # 2. The receiver's query at END, or keys or values at these places, as they were there.
    site = f"{receiver.kind} {head.layer}"
    index, read = (head.index, [-1]) if receiver.kind == "q" else (head.index // share, places)
    width = was[site].shape[-1] // (model.heads if receiver.kind == "q" else model.kv_heads)
    changed = was[site].clone()
    columns = slice(index * width, (index + 1) * width)
    changed[0, read, columns] = reached[site][0, read, columns]
    _, looked = run(model, clean, {site: changed})

    # 3. The receiver's new z at END, every other head held.
    heads = [head.index]
    if group and receiver.kind != "q":
        heads = [index for index in range(model.heads) if index // share == head.index // share]
    z = was[f"z {head.layer}"].clone()
    for index in heads:
        columns = slice(index * model.d_head, (index + 1) * model.d_head)
        z[0, -1, columns] = looked[f"z {head.layer}"][0, -1, columns]
    logits, _ = run(model, clean, held | {f"z {head.layer}": z})
    return logits
