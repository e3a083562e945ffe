"""Chains sender -> head -> key head -> answer the slow way: plain hooks, whole forward passes.

One prompt and one chain at a time; nothing is shared with the fast way. For models laid out as
Llama is: ``model.layers``, ``self_attn`` with ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``.
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


def slow_chain_logits(
    model: Model,
    clean: list[int],
    corrupt: list[int],
    sender: Sender,
    hops: list[tuple[Receiver, list[int]]],
) -> Tensor:
    """Logits at END with one chain patched.

    Each hop is a receiver and the places at which something new arrives there; what leaves the
    last receiver counts at END.
    """
    was, other = run(model, clean, {}), run(model, corrupt, {})
    held = {site: value for site, value in was.items() if site.startswith("z")}
    index, count = (sender.index, model.heads) if isinstance(sender, Head) else (0, 1)
    site = {Head: f"z {sender.layer}", Embedding: "embed"}.get(type(sender), f"mlp {sender.layer}")
    edit = {site: swap(was[site], other[site], hops[0][1], index, count)}
    for number, (receiver, places) in enumerate(hops):
        reached = run(model, clean, held | edit)
        layer, head, query = receiver.layer, receiver.part.index, receiver.kind == "q"
        site, count = f"{receiver.kind} {layer}", model.heads if query else model.kv_heads
        seat = head * count // model.heads
        looked = run(model, clean, {site: swap(was[site], reached[site], places, seat, count)})
        leaves = hops[number + 1][1] if number + 1 < len(hops) else [-1]
        z = f"z {layer}"
        edit = {z: swap(was[z], looked[z], leaves, head, model.heads)}
    return run(model, clean, held | edit)["logits"][0, -1]
