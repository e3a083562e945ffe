"""Paths sender -> receiver -> answer the slow way: plain hooks, whole forward passes, one path.

Nothing is shared with the fast way: no replay, no cells, no batching.
"""

import torch
from torch import Tensor, nn

from circuitune.components import Embedding, Head, Receiver, Sender
from circuitune.models import Model


def run(model: Model, tokens: list[int], edits: dict[str, Tensor]) -> dict[str, Tensor]:
    """What passed each site (z, q, k, v, mlp by layer, embed, logits), the edited overwritten."""
    seen: dict[str, Tensor] = {}

    def passing(name: str, value: Tensor) -> Tensor:
        seen[name] = edits.get(name, value.detach()).clone()
        return seen[name].clone()

    def after(module: nn.Module, name: str) -> object:
        return module.register_forward_hook(lambda _, __, output: passing(name, output))

    handles = [after(model.hf.get_input_embeddings(), "embed")]
    for number, layer in enumerate(model.hf.model.layers):
        attention, z = layer.self_attn, f"z {number}"
        before = lambda _, args, z=z: (passing(z, args[0]),)  # noqa: E731
        handles.append(attention.o_proj.register_forward_pre_hook(before))
        handles.append(after(layer.mlp, f"mlp {number}"))
        handles += [after(getattr(attention, f"{kind}_proj"), f"{kind} {number}") for kind in "qkv"]
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
    site = {Head: f"z {sender.layer}", Embedding: "embed"}.get(type(sender), f"mlp {sender.layer}")
    # 1. The sender corrupt, every other head held: what reaches the receiver's projection.
    reached = run(
        model, clean, held | {site: swap(was[site], other[site], how["places"], index, count)}
    )
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
