"""Paths sender -> receiver -> answer the slow way: plain hooks, whole forward passes, one path.

Nothing is shared with the fast way: no replay, no cells, no batching, no layout of projections.
Queries, keys and values are taken where the attention kernel gets them, head by head.
"""

import sys
from contextlib import ExitStack
from unittest.mock import patch

import torch
from torch import Tensor, nn

from circuitune.components import Embedding, Head, Mlp, Receiver, Sender
from circuitune.models import Model


def run(model: Model, tokens: list[int], edits: dict[str, Tensor]) -> dict[str, Tensor]:
    """What passed each site (head, token, width), those with an edit overwritten.

    Sites are z, q, k, v of a layer, the input (in) and output (mlp) of its MLP, and embed.
    """
    seen: dict[str, Tensor] = {}

    def passing(name: str, value: Tensor, heads: int = 1) -> Tensor:
        own = value.detach().reshape(len(tokens), heads, -1).transpose(0, 1)
        seen[name] = edits.get(name, own).clone()
        return seen[name].transpose(0, 1).reshape(value.shape).clone()  # Falcon adds in place

    def before(module: nn.Module, name: str, heads: int = 1) -> None:
        hook = lambda _, args: (passing(name, args[0], heads), *args[1:])  # noqa: E731
        stack.callback(module.register_forward_pre_hook(hook).remove)

    def after(module: nn.Module, name: str) -> None:
        hook = lambda _, __, output: passing(name, output)  # noqa: E731
        stack.callback(module.register_forward_hook(hook).remove)

    def kernel(place: object, name: str) -> None:
        own = getattr(place, name, None)

        def attention(*args: object, **kwargs: object) -> object:
            at = next(i for i, value in enumerate(args) if isinstance(value, Tensor))
            layer = sum(site.startswith("q") for site in seen)
            new = []
            for kind, value in zip("qkv", args[at : at + 3], strict=True):
                seen[f"{kind} {layer}"] = edits.get(f"{kind} {layer}", value[0]).clone()
                new.append(seen[f"{kind} {layer}"][None].clone())
            return own(*args[:at], *new, *args[at + 3 :], **kwargs)

        if own is not None:
            stack.enter_context(patch.object(place, name, attention))

    with ExitStack() as stack, torch.no_grad():
        kernel(nn.functional, "scaled_dot_product_attention")
        kernel(sys.modules[type(model.hf).__module__], "eager_attention_forward")
        after(model.hf.get_input_embeddings(), "embed")
        for number in range(model.layers):
            kernel(model.part(number, model.family.attention), "_attn")  # GPT-J
            before(model.part(number, model.family.out), f"z {number}", model.heads)
            before(model.part(number, model.family.mlp), f"in {number}")
            after(model.part(number, model.family.mlp), f"mlp {number}")
        seen["logits"] = model.hf(torch.tensor([tokens]), use_cache=False).logits
    return seen


def swap(into: Tensor, source: Tensor, places: list[int], heads: list[int]) -> Tensor:
    """A copy with some heads at some places taken from another run."""
    new = into.clone()
    for head in heads:
        new[head, places] = source[head, places]
    return new


def slow_path_logits(
    model: Model, clean: list[int], corrupt: list[int], sender: Sender, receiver: Receiver, **how
) -> Tensor:
    """Logits at END with one path patched; ``how`` is ``places`` and the query heads ``read``."""
    was, other = run(model, clean, {}), run(model, corrupt, {})
    held = {site: value for site, value in was.items() if site.startswith("z")}
    index = [sender.index] if isinstance(sender, Head) else [0]
    site = {Head: f"z {sender.layer}", Embedding: "embed"}.get(type(sender), f"mlp {sender.layer}")
    # 1. The sender corrupt, every other head held: what reaches the receiver.
    reached = run(model, clean, held | {site: swap(was[site], other[site], how["places"], index)})
    # 2. The model's own attention with only this query (keys, values) changed, or its own MLP.
    layer, whole = receiver.layer, isinstance(receiver.part, Mlp)
    site = f"{receiver.kind} {layer}"
    read = [0] if whole else list(how["read"])
    seats = [0] if whole else [head * len(was[site]) // model.heads for head in read]
    at = how["places"] if receiver.kind in ("k", "v") else [-1]
    looked = run(model, clean, {site: swap(was[site], reached[site], at, seats)})
    # 3. The receiver's (or its group's) new output at END, every other head held.
    site = f"mlp {layer}" if whole else f"z {layer}"
    edit = {site: swap(was[site], looked[site], [-1], read)}
    return run(model, clean, held | edit)["logits"][0, -1]
