"""The sweep over all heads, by circuitune and by others: one hooked forward pass per head.

All methods patch z of one head at END and hold every other head at its clean z, so all of them
measure the same direct effect. The others get their best configuration: all prompts in one batch,
equal lengths (no padding), inference mode, hooks only in the sender's layer and above, logits of
END only, no cache that nobody reads. Each says how to run prompts (`Pass`); `sweep` is the loop
over the heads that they share.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache

from circuitune.attribution import attribute
from circuitune.components import Component, Head
from circuitune.effects import EffectTable
from circuitune.models import Model, resolve
from circuitune.pairs import Encoded
from circuitune.patching import EndStates, direct_effects, pair_states
from circuitune.prompts import prefill_pairs


@dataclass
class Laps:
    """Seconds of the phases of one sweep, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def lap(self, phase: str) -> Iterator[None]:
        """Time what happens inside."""
        started = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - started


@dataclass(frozen=True)
class Own:
    """One sweep by circuitune: effects, seconds of its phases, and the order of a screen."""

    table: EffectTable
    phases: dict[str, float]
    order: tuple[Component, ...] = ()


def all_heads(model: Model) -> list[Head]:
    """Every head, layer by layer."""
    return [Head(layer, index) for layer in range(model.layers) for index in range(model.heads)]


def states_of(model: Model, task: Encoded, laps: Laps) -> tuple[EndStates, EndStates]:
    """What passes END of the clean and of the corrupt prompts."""
    with laps.lap("prefill"):
        prompts = prefill_pairs(model, task.clean, task.corrupt)
    with laps.lap("end"):
        return pair_states(model, prompts)


def ours(model: Model, task: Encoded) -> Own:
    """The exact sweep over all heads."""
    laps = Laps()
    states = states_of(model, task, laps)
    options = {"candidates": task.candidates, "answers": task.answers}
    with laps.lap("replay"):
        table = direct_effects(model, *states, **options, senders=all_heads(model))
    return Own(table, laps.seconds)


def screened(model: Model, task: Encoded, most: int) -> Own:
    """The exact sweep over the ``most`` heads with the largest estimates by gradients.

    The order is by the mean *size* over the examples: the sign of a first-order estimate can be
    wrong for a strong head, and estimates of both signs would cancel in a mean.
    """
    laps = Laps()
    states = states_of(model, task, laps)
    options = {"candidates": task.candidates, "answers": task.answers}
    with laps.lap("attribution"):
        estimate = attribute(model, *states, **options).select(all_heads(model))
        places = np.argsort(-np.abs(estimate.effect()).mean(axis=1), kind="stable")
        order = tuple(estimate.components[place] for place in places)
    with laps.lap("replay"):
        table = direct_effects(model, *states, **options, senders=order[:most])
    return Own(table, laps.seconds, order)


def replay_flop(model: Model, examples: int) -> int:
    """Floating point operations of the matrix products of the replay over all heads.

    A row meets W_O and the MLP in its own layer and the MLP in every later one. Norms, the final
    norm and the few rows of the unembedding are left out; experts are counted as if all ran.
    """
    total = 0
    for layer in range(model.layers):
        mlp, out = (
            sum(weight.numel() for weight in matrices(model.part(layer, path)))
            for path in (model.family.mlp, model.family.out)
        )
        started = model.heads * examples
        total += 2 * started * ((layer + 1) * mlp + out)
    return total


def matrices(module: nn.Module) -> list[Tensor]:
    """The weight matrices of a module."""
    return [weight for weight in module.parameters() if weight.ndim > 1]


Edit = Callable[[Tensor], None]
"""Reads or changes, in place, what the heads of a layer give at END: (example, head, d_head)."""

Pass = Callable[[Mapping[int, Edit]], Float[Tensor, "example vocab"]]
"""Runs the prompts with one edit per layer and returns the logits at END."""

Maker = Callable[[Sequence[Sequence[int]]], Pass]
"""Prepares the passes over some prompts of equal length."""


@dataclass(frozen=True)
class Swept:
    """A sweep over some heads, and what it took.

    Attributes:
        table: the effects.
        once: seconds that are spent whatever the number of heads: caches, clean and corrupt run.
        each: seconds of each head, in the order of the table.
    """

    table: EffectTable
    once: float
    each: list[float]


@torch.inference_mode()
def sweep(make: Maker, model: Model, task: Encoded, heads: Sequence[Head]) -> Swept:
    """Direct effects of some heads, one pass per head, each pass timed.

    Args:
        make: the method, one of `PEERS` with the model given.
        model: the model.
        task: prompts of equal length, and the answers.
        heads: the senders.
    """
    started = time.perf_counter()
    run, run_corrupt = make(task.clean), make(task.corrupt)
    clean, corrupt = {}, {}
    candidates = list(task.candidates)
    keep_all = {layer: partial(_keep, clean, layer) for layer in range(model.layers)}
    plain = run(keep_all)[:, candidates]
    run_corrupt({layer: partial(_keep, corrupt, layer) for layer in range(model.layers)})
    once = time.perf_counter() - started
    patched, each = [], []
    for head in heads:
        started = time.perf_counter()
        mixed = clean[head.layer].clone()
        mixed[:, head.index] = corrupt[head.layer][:, head.index]
        new = clean | {head.layer: mixed}
        edits = {layer: partial(_put, new[layer]) for layer in range(head.layer, model.layers)}
        patched.append(run(edits)[:, candidates])
        each.append(time.perf_counter() - started)
    table = EffectTable.from_logits(
        heads, plain.cpu().numpy(), torch.stack(patched).cpu().numpy(), task.answers
    )
    return Swept(table, once, each)


def _keep(kept: dict[int, Tensor], layer: int, z: Tensor) -> None:
    kept[layer] = z.clone()


def _put(new: Tensor, z: Tensor) -> None:
    z.copy_(new)


def at_end(model: Model, z: Tensor) -> Float[Tensor, "example head d_head"]:
    """The head outputs of the last position, as a view whatever the axes of heads are."""
    return z[:, -1].view(len(z), model.heads, model.d_head)


def hooked(model: Model, edits: Mapping[int, Edit], run: Callable[[], Any]) -> Tensor:
    """Logits at END of a Hugging Face forward pass with edits on the inputs of the o_proj."""

    def hook(edit: Edit) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: edit(at_end(model, args[0]))

    with ExitStack() as stack:
        for layer, edit in edits.items():
            handle = model.part(layer, model.family.out).register_forward_pre_hook(hook(edit))
            stack.callback(handle.remove)
        return run().logits[:, -1]


def whole_prompts(model: Model) -> Maker:
    """Plain Hugging Face: every pass runs all tokens."""

    def make(prompts: Sequence[Sequence[int]]) -> Pass:
        tokens = torch.tensor(prompts, device=model.device)
        run = partial(model.hf, input_ids=tokens, use_cache=False, logits_to_keep=1)
        return lambda edits: hooked(model, edits, run)

    return make


def end_only(model: Model) -> Maker:
    """Plain Hugging Face with keys and values cached: every pass runs END alone.

    No tool does this by itself; it shows which part of the gain is the cache.
    """

    def make(prompts: Sequence[Sequence[int]]) -> Pass:
        tokens, cache = torch.tensor(prompts, device=model.device), DynamicCache()
        model.trunk(input_ids=tokens[:, :-1], past_key_values=cache, use_cache=True)
        end = partial(model.hf, input_ids=tokens[:, -1:], past_key_values=cache, use_cache=True)

        def run(edits: Mapping[int, Edit]) -> Tensor:
            logits = hooked(model, edits, end)
            cache.crop(-1)  # a pass appends END
            return logits

        return run

    return make


def transformer_lens(model: Model) -> Maker:
    """The bridge of TransformerLens on the same weights, `run_with_hooks` over all tokens.

    It replaces the model's own modules. Its ``start_at_layer`` would not help: in version 4.3
    the layers below still run.
    """
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(
        resolve(model.source),
        hf_model=model.hf,
        tokenizer=model.tokenizer,
        device=str(model.device),
    )

    def named(layer: int, edit: Edit) -> tuple[str, Callable[..., None]]:
        return f"blocks.{layer}.attn.hook_z", lambda z, hook: edit(at_end(model, z))

    def make(prompts: Sequence[Sequence[int]]) -> Pass:
        tokens = torch.tensor(prompts, device=model.device)

        def run(edits: Mapping[int, Edit]) -> Tensor:
            hooks = [named(layer, edit) for layer, edit in edits.items()]
            options = {"logits_to_keep": 1, "use_cache": False}
            return bridge.run_with_hooks(tokens, fwd_hooks=hooks, **options)[:, -1]

        return run

    return make


PEERS: dict[str, Callable[[Model], Maker]] = {
    "hooked forward": whole_prompts,
    "hooked, END only": end_only,
    "TransformerLens": transformer_lens,
}


def spread(heads: Sequence[Head], count: int, seed: int) -> list[Head]:
    """A random sample of heads, one from each of ``count`` equal stretches of the layers."""
    rng = random.Random(seed)
    stretches = np.array_split(np.arange(len(heads)), min(count, len(heads)))
    return [heads[rng.choice(list(stretch))] for stretch in stretches]
