"""Exact direct effects of all components, fast; and knockouts.

With every other head frozen, a changed head output at END moves the residual stream at END and
nowhere else, since no later attention can carry it. So direct effects need END alone:

1. `circuitune.prompts`: keys and values of every prompt up to, not including, END.
2. `end_states`: one token per prompt through the model; keeps per layer the head outputs z, the
   attention and MLP contributions and the residual stream at END.
3. `direct_effects`: replay, layer by layer. A row is one (sender, example). A head of this layer
   starts as the clean residual stream with the attention block's output recomputed from its
   patched z; all older rows get the clean attention output. The model's *own* layer computes
   norms, MLP and residual additions, with its attention substituted.
4. Final norm, then only the unembedding rows of the admissible answers.

END is computed in float32 also where the weights are bfloat16 or float16 (`weights.widened`):
an effect is a difference of near-equal numbers. Each layer's weights are needed once per pass, so
a model whose weights are offloaded is read once in each of these steps.

Equals one hooked forward pass per component (Wang et al. 2023, path patching with MLPs in the
path; Zhang et al. 2024, section 3); checked in ``tests/test_patching.py`` against
``tests/reference/slow_effects.py`` and on any model by `circuitune check`.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import align_module_device
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import ModelOutput

from circuitune.components import Component, Head, Mlp, all_components
from circuitune.effects import METRICS, EffectTable, Metric
from circuitune.errors import UserError
from circuitune.memory import most_rows
from circuitune.models import Model
from circuitune.prompts import Prompts, prefill
from circuitune.sites import (
    Call,
    Trace,
    begin,
    first,
    intervene,
    march,
    packed,
    record,
    resume,
    substitute,
)
from circuitune.weights import widened

# Rows per layer call: enough for full matrix-multiply speed, small enough to stay in cache.
REPLAY_ROWS = 1024
# Rows of logits over the whole vocabulary that are made at once.
UNEMBED_ROWS = 64


def wide(values: Tensor) -> Tensor:
    """At least float32: effects are differences of near-equal numbers."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@dataclass(frozen=True)
class EndStates:
    """What passes END of every prompt, in float32 or the model's own wider type.

    Attributes:
        z: head outputs side by side, per layer.
        attention, mlp: contributions of the blocks, per layer.
        entry: residual stream that enters each layer.
        final: residual stream after the final norm.
        calls: how each layer was called, to call it again.
    """

    z: Float[Tensor, "layer example z"]
    attention: Float[Tensor, "layer example d_model"]
    mlp: Float[Tensor, "layer example d_model"]
    entry: Float[Tensor, "layer example d_model"]
    final: Float[Tensor, "example width"]
    calls: list[Call]

    def output(self, part: Component, d_head: int) -> Float[Tensor, "example width"]:
        """The output of one component: its slice of z, or its MLP's output."""
        if isinstance(part, Head):
            return self.z[part.layer, :, part.index * d_head : (part.index + 1) * d_head]
        return self.mlp[part.layer]

    def mean_outputs(
        self, parts: Iterable[Component], d_head: int
    ) -> dict[Component, Float[Tensor, " width"]]:
        """Mean output over the examples, the values of a mean ablation."""
        return {part: self.output(part, d_head).mean(dim=0) for part in parts}

    def averaged(self) -> "EndStates":
        """Every example replaced by the mean over the examples (for z and mlp)."""

        def mean(values: Tensor) -> Tensor:
            return values.mean(dim=1, keepdim=True).expand_as(values)

        return EndStates(
            mean(self.z), self.attention, mean(self.mlp), self.entry, self.final, self.calls
        )

    def of(self, examples: slice | Sequence[int]) -> "EndStates":
        """The states of some of the examples."""
        parts = (self.z, self.attention, self.mlp, self.entry)
        return EndStates(*(part[:, examples] for part in parts), self.final[examples], self.calls)


@torch.no_grad()
def end_states(
    model: Model, prompts: Prompts, *, edits: Mapping[Component, Tensor] | None = None
) -> EndStates:
    """Run END of every prompt and keep what passes, optionally with components overwritten.

    Args:
        model: the model.
        prompts: prompts from `prefill`.
        edits: new outputs at END, see `circuitune.sites.intervene`; one row for all prompts.
    """
    passes = [begin(model, use_cache=True, **batch.at_end) for batch in prompts.batches]
    with ExitStack() as stack:
        for batch in prompts.batches:
            stack.enter_context(batch.unchanged())
        stack.enter_context(intervene(model, edits or {}))
        trace = stack.enter_context(record(model, passes=len(passes)))
        states = [state[:, -1] for state in march(model, passes, wide=True)]
    order = torch.tensor([place for batch in prompts.batches for place in batch.places]).argsort()
    parts = (trace.z, trace.attention, trace.mlp, trace.entry)
    z, attention, mlp, entry = (wide(torch.stack(part))[:, order] for part in parts)
    return EndStates(z, attention, mlp, entry, finish(model, torch.cat(states)[order]), trace.calls)


def pair_states(model: Model, prompts: Prompts) -> tuple[EndStates, EndStates]:
    """`end_states` of the clean and the corrupt prompts of `circuitune.prompts.prefill_pairs`."""
    both, half = end_states(model, prompts), prompts.count // 2
    return both.of(slice(half)), both.of(slice(half, None))


@torch.no_grad()
def run_through(
    model: Model, prompts: Sequence[Sequence[int]]
) -> tuple[Trace, Float[Tensor, "example token d_model"]]:
    """What passes every position of prompts of equal length, and what leaves the last layer."""
    tokens = torch.tensor([list(prompt) for prompt in prompts], device=model.device)
    start = begin(model, input_ids=tokens, use_cache=False)
    with record(model, where="all") as trace:
        (state,) = march(model, [start], wide=True)
    return trace, state


def cell_states(
    trace: Trace,
    row: Int[Tensor, " cell"],
    place: Int[Tensor, " cell"],
    final: Float[Tensor, "cell width"],
) -> EndStates:
    """What passes some cells of `run_through`, each counted as an example."""
    z, attention, mlp, entry = (
        wide(torch.stack([values[row, place] for values in part]))
        for part in (trace.z, trace.attention, trace.mlp, trace.entry)
    )
    return EndStates(z, attention, mlp, entry, wide(final), trace.calls)


def finish(model: Model, state: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch width"]:
    """What the model makes of residual streams after its last layer, at least float32.

    The model's own code runs: the final norm, and in some models a projection.
    """
    rows = wide(state.reshape(-1, 1, state.shape[-1]))
    tokens = torch.zeros(len(rows), 1, dtype=torch.long, device=rows.device)
    with ExitStack() as stack:
        stack.enter_context(resume(model, model.layers, rows))
        for part in model.after_layers:
            stack.enter_context(widened(part))
        final = model.trunk(input_ids=tokens, use_cache=False).last_hidden_state
    return wide(final).reshape(*state.shape[:-1], -1)


@dataclass
class TrunkOutput(ModelOutput):
    """Everything that a causal model may read from its trunk."""

    last_hidden_state: Tensor | None = None
    past_key_values: Any = None
    hidden_states: Any = None
    attentions: Any = None
    cross_attentions: Any = None
    router_logits: Any = None


def unembed(
    model: Model, hidden: Float[Tensor, "*batch width"], tokens: Sequence[int] | None = None
) -> Float[Tensor, "*batch candidate"]:
    """Logits of the given tokens (all by default) from normed hidden states, in float32.

    The model's own forward computes them with its trunk substituted, so that soft-caps and
    logit scales are the model's.
    """
    embedding = model.hf.get_output_embeddings()
    flat = hidden.reshape(1, -1, hidden.shape[-1])
    with ExitStack() as stack:
        stack.enter_context(align_module_device(embedding))  # its rows are read, not only called
        trunk = TrunkOutput(last_hidden_state=flat)
        stack.enter_context(substitute(model.trunk, trunk))
        if tokens is not None:
            rows = wide(embedding.weight[list(tokens)])
            bias = None if embedding.bias is None else wide(embedding.bias[list(tokens)])

            def project(values: Tensor) -> Tensor:
                return torch.nn.functional.linear(values.to(rows.dtype), rows, bias)

            stack.enter_context(substitute(embedding, project))
        else:
            flat = trunk.last_hidden_state = flat.to(embedding.weight.dtype)
        placeholder = torch.zeros(1, flat.shape[1], dtype=torch.long, device=flat.device)
        logits = model.hf(input_ids=placeholder, use_cache=False).logits
    return wide(logits).reshape(*hidden.shape[:-1], -1)


@torch.no_grad()
def first_choice(
    model: Model, hidden: Float[Tensor, "example width"]
) -> Int[np.ndarray, " example"]:
    """The token that the model would say next, from normed hidden states; a few rows at a time.

    Raises:
        UserError: a state is NaN or infinite.
    """
    if not hidden.isfinite().all():
        raise UserError(
            f"Hidden states must be finite, those of {model.source} are not; use --dtype float32, "
            "or mend the checkpoint."
        )
    some = hidden.split(UNEMBED_ROWS)
    return np.concatenate([unembed(model, h).argmax(dim=-1).cpu().numpy() for h in some])


@torch.no_grad()
def direct_effects(
    model: Model,
    clean: EndStates,
    corrupt: EndStates,
    *,
    candidates: Sequence[int],
    answers: Int[np.ndarray, " example"],
    senders: Sequence[Component] | None = None,
) -> EffectTable:
    """Direct effect of every sender on the answer at END, per example.

    Args:
        model: the model.
        clean: states of the clean run (the run that is patched).
        corrupt: states whose outputs are patched in, same examples; `EndStates.averaged` of a
            corrupt run gives mean ablation instead of per-example patching.
        candidates: token ids of the admissible answers.
        answers: index into ``candidates`` of each example's answer.
        senders: components to measure; all heads and MLPs by default.
    """
    senders = tuple(senders if senders is not None else all_components(model.layers, model.heads))
    total = len(clean.final)
    size = max(1, (most_rows(model) or total * len(senders)) // max(1, len(senders)))
    blocks = [slice(start, start + size) for start in range(0, total, size)]
    patched = torch.cat(
        [_patched(model, clean.of(b), corrupt.of(b), candidates, senders) for b in blocks], dim=1
    )
    plain = unembed(model, clean.final, candidates)
    return EffectTable.from_logits(
        senders, plain.cpu().numpy(), patched.cpu().numpy(), np.asarray(answers)
    )


def _patched(
    model: Model,
    clean: EndStates,
    corrupt: EndStates,
    candidates: Sequence[int],
    senders: Sequence[Component],
) -> Float[Tensor, "sender example candidate"]:
    """Candidate logits with each sender patched."""
    order = sorted(senders, key=_start)
    here = [[part for part in order if part.layer == layer] for layer in range(model.layers)]

    def start(layer: int) -> Float[Tensor, "sender example d_model"]:
        return start_rows(model, clean, corrupt, here[layer])

    hidden = _replayed(model, clean, [len(parts) for parts in here], start)
    row = {part: number for number, part in enumerate(order)}
    patched = unembed(model, hidden, candidates)[[row[part] for part in senders]]
    # Nothing to patch is no effect, exactly; the replay would leave rounding (see `noise_floor`).
    same = [(_z(clean, part, model) == _z(corrupt, part, model)).all(-1) for part in senders]
    plain = unembed(model, clean.final, candidates)
    return torch.where(torch.stack(same)[..., None], plain, patched)


def _z(states: EndStates, part: Component, model: Model) -> Float[Tensor, "example width"]:
    return states.output(part, model.d_head)


def _replayed(
    model: Model,
    clean: EndStates,
    counts: Sequence[int],
    start: Callable[[int], Tensor],
) -> Float[Tensor, "sender example width"]:
    """Final hidden states of rows that start in each layer and pass all layers above."""
    state = clean.entry.new_empty(sum(counts), *clean.entry.shape[1:])
    active = 0
    for layer in tqdm(range(model.layers), desc="sweep", disable=None, leave=False):
        with widened(model.layer(layer)):
            replay(model, clean, layer, state[:active])
            if counts[layer]:
                state[active : active + counts[layer]] = start(layer)
        active += counts[layer]
    return torch.cat([finish(model, part) for part in _chunks(state)])


@torch.no_grad()
def noise_floor(
    model: Model,
    clean: EndStates,
    *,
    candidates: Sequence[int],
    answers: Int[np.ndarray, " example"],
) -> dict[Metric, Float[np.ndarray, " layer"]]:
    """What float rounding alone does to an effect: clean patched into clean by the same path.

    Args:
        model: the model.
        clean: states of the clean run; a few examples are enough.
        candidates: token ids of the admissible answers.
        answers: index into ``candidates`` of each example's answer.

    Returns:
        per metric the largest absolute effect over the examples of a sender of each layer.
    """

    def start(layer: int) -> Float[Tensor, "sender example d_model"]:
        return start_rows(model, clean, clean, [Head(layer, 0)])

    hidden = _replayed(model, clean, [1] * model.layers, start)
    layers = [Head(layer, 0) for layer in range(model.layers)]
    logits = (unembed(model, values, candidates).cpu().numpy() for values in (clean.final, hidden))
    table = EffectTable.from_logits(layers, *logits, np.asarray(answers))
    return {metric: np.abs(table.effect(metric)).max(axis=1) for metric in METRICS}


def _start(part: Component) -> tuple[int, int]:
    return (part.layer, 0 if isinstance(part, Head) else 1)


def _chunks(state: Float[Tensor, "sender example d_model"]) -> Sequence[Tensor]:
    """Pieces of nearly equal size; a small rest would run at a fraction of the speed."""
    most = max(1, REPLAY_ROWS // state.shape[1])
    return state.tensor_split(math.ceil(len(state) / most)) if len(state) else ()


def replay(
    model: Model, clean: EndStates, layer: int, state: Float[Tensor, "sender example d_model"]
) -> None:
    """Advance rows through one layer in place, the attention held at its clean output."""
    attention = clean.attention[layer][None]  # broadcasts over the senders of a chunk
    for chunk in _chunks(state):
        chunk.copy_(run_layer(model, clean, layer, chunk, attention))


def start_rows(
    model: Model, clean: EndStates, corrupt: EndStates, parts: Sequence[Component]
) -> Float[Tensor, "sender example d_model"]:
    """The residual stream after the senders' own layer, heads first, then the MLP."""
    rows = []
    for part in parts:
        layer = part.layer
        entry, attention = clean.entry[layer][None], clean.attention[layer][None]
        if isinstance(part, Mlp):
            mlp = corrupt.mlp[layer][None]
            rows.append(run_layer(model, clean, layer, entry, attention, mlp=mlp))
    heads = [part for part in parts if isinstance(part, Head)]
    size = max(1, REPLAY_ROWS // clean.final.shape[0])
    starts = range(0, len(heads), size)
    patched = [_start_heads(model, clean, corrupt, heads[i : i + size]) for i in starts]
    return torch.cat([*patched, *rows])


def _start_heads(
    model: Model, clean: EndStates, corrupt: EndStates, heads: Sequence[Head]
) -> Float[Tensor, "sender example d_model"]:
    """Rows of heads of one layer: W_O applied to z with one head's slice replaced."""
    layer = heads[0].layer
    z = clean.z[layer].repeat(len(heads), 1, 1)
    for row, head in enumerate(heads):
        width = slice(head.index * model.d_head, (head.index + 1) * model.d_head)
        z[row, :, width] = corrupt.z[layer][:, width]
    out = model.part(layer, model.family.out)
    with widened(model.layer(layer)):
        attention = wide(out(z))
    entry = clean.entry[layer].expand(len(heads), -1, -1)
    return run_layer(model, clean, layer, entry, attention)


def run_layer(
    model: Model,
    clean: EndStates,
    layer: int,
    rows: Float[Tensor, "sender example d_model"],
    attention: Float[Tensor, "#sender example d_model"],
    mlp: Float[Tensor, "#sender example d_model"] | None = None,
) -> Float[Tensor, "sender example d_model"]:
    """The model's own layer on single positions, attention (and MLP, if given) substituted."""
    module, family, call = model.layer(layer), model.family, clean.calls[layer]

    def attend(*inputs: Any, **named: Any) -> Any:
        device = _seen(inputs, named).device
        value = attention.to(device, rows.dtype, copy=True)  # a layer may add in place
        return packed(value, call.attention)

    def feed(*inputs: Any, **named: Any) -> Any:
        seen = _seen(inputs, named)
        value = mlp.to(seen.device, rows.dtype, copy=True)
        return packed(value.reshape(*seen.shape[:-1], -1), call.mlp)  # OPT: one axis for both

    with ExitStack() as stack:
        stack.enter_context(widened(module))
        stack.enter_context(substitute(model.part(layer, family.attention), attend))
        if family.norm_before_attention:
            norm = model.part(layer, family.norm_before_attention)
            stack.enter_context(substitute(norm, lambda values: values))
        if mlp is not None:
            stack.enter_context(substitute(model.part(layer, family.mlp), feed))
        output = module(rows, *call.args, **call.kwargs)
    return wide(first(output))


def _seen(inputs: Sequence[Any], named: Mapping[str, Any]) -> Tensor:
    """The first tensor that a module was given."""
    return next(item for item in (*inputs, *named.values()) if isinstance(item, Tensor))


@torch.no_grad()
def sweep_seconds(model: Model, pairs: int) -> float:
    """How long a sweep over all components will take: the replay of one layer, timed.

    Args:
        model: the model.
        pairs: number of prompt pairs.
    """
    layer = model.layers // 2
    states = end_states(model, prefill(model, [[1, 2]] * min(pairs, 64)))
    rows = max(1, REPLAY_ROWS // states.final.shape[0])
    state = states.entry[layer].repeat(rows, 1, 1)
    with widened(model.layer(layer)):
        replay(model, states, layer, state)
        started = time.perf_counter()
        replay(model, states, layer, state)
        per_row = (time.perf_counter() - started) / (rows * states.final.shape[0])
    return per_row * pairs * (model.heads + 1) * model.layers * (model.layers + 1) / 2
