"""Paths sender -> receiver -> answer the slow way: plain hooks, whole forward passes, one path.

Nothing is shared with the fast way: no replay, no cells, no batching.
"""

import torch
from torch import Tensor

from circuitune.components import Embedding, Head, Receiver, Sender
from circuitune.models import Model


def run(model: Model, tokens: list[int], edits: dict[str, Tensor]) -> dict[str, Tensor]:
    """What passed each site (z, q, k, v, mlp by layer, embed, logits), the edited overwritten."""
    seen: dict[str, Tensor] = {}

    def passing(name: str, value: Tensor) -> Tensor:
        seen[name] = edits.get(name, value.detach()).clone()
        return seen[name].clone()

    def after(name: str) -> object:
        return lambda _, __, output: passing(name, output)

    def before(name: str) -> object:
        return lambda _, args: (passing(name, args[0]),)

    handles = [model.hf.get_input_embeddings().register_forward_hook(after("embed"))]
    for number in range(model.layers):
        layer = model.layer(number)
        handles.append(layer.mlp.register_forward_hook(after(f"mlp {number}")))
        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(before(f"z {number}")))
        for kind in "qkv":
            projection = getattr(layer.self_attn, f"{kind}_proj")
            handles.append(projection.register_forward_hook(after(f"{kind} {number}")))
    with torch.no_grad():
        seen["logits"] = model.hf(torch.tensor([tokens]), use_cache=False).logits
    for handle in handles:
        handle.remove()
    return seen


def swap(into: Tensor, source: Tensor, places: list[int], head: int, heads: int) -> Tensor:
    """A copy with one head's columns, at some places, taken from another run."""
    width = into.shape[-1] // heads
    columns, new = slice(head * width, (head + 1) * width), into.clone()
    new[0, places, columns] = source[0, places, columns]
    return new


def slow_path_logits(
    model: Model, clean: list[int], corrupt: list[int], sender: Sender, receiver: Receiver, **how
) -> Tensor:
    """Logits at END with one path patched; ``how`` is ``places`` and the query heads ``read``."""
    was, other = run(model, clean, {}), run(model, corrupt, {})
    held = {site: value for site, value in was.items() if site.startswith("z")}
    index, count = (sender.index, model.heads) if isinstance(sender, Head) else (0, 1)
    kind = {Head: f"z {sender.layer}", Embedding: "embed"}.get(type(sender), f"mlp {sender.layer}")
    patched = swap(was[kind], other[kind], how["places"], index, count)
    # 1. The sender corrupt, every other head held: what reaches the receiver's projection.
    reached = run(model, clean, held | {kind: patched})
    # 2. The model's own attention with only this query (keys, values) changed.
    head, layer, query = receiver.head.index, receiver.head.layer, receiver.kind == "q"
    site, count = f"{receiver.kind} {layer}", model.heads if query else model.kv_heads
    at, seat = ([-1], head) if query else (how["places"], head * count // model.heads)
    looked = run(model, clean, {site: swap(was[site], reached[site], at, seat, count)})
    # 3. The new z at END of the receiver (or its group), every other head held.
    z = was[f"z {layer}"]
    for head in how["read"]:
        z = swap(z, looked[f"z {layer}"], [-1], head, model.heads)
    return run(model, clean, held | {f"z {layer}": z})["logits"][0, -1]
