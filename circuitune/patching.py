"""Exact direct effects of all components, fast; and knockouts.

With every other head frozen, a changed head output at END moves the residual stream at END and
nowhere else, since no later attention can carry it. So direct effects need END alone:

1. `prefill`: keys and values of every prompt up to, not including, END; computed once.
2. `end_states`: one token per prompt through the model; keeps per layer the head outputs z, the
   attention and MLP contributions and the residual stream at END.
3. `direct_effects`: replay, layer by layer. A row is one (sender, example). A head of this layer
   starts as the clean residual stream with the attention block's output recomputed from its
   patched z; all older rows get the clean attention output. The model's *own* layer computes
   norms, MLP and residual additions, with its attention substituted.
4. Final norm, then only the unembedding rows of the admissible answers.

Equals one hooked forward pass per component (Wang et al. 2023, path patching with MLPs in the
path; Zhang et al. 2024, section 3); checked in ``tests/test_patching.py`` against
``tests/reference/slow_effects.py`` and on any model by `circuitune check`.
"""

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import DynamicCache
from transformers.utils import ModelOutput

from circuitune.components import Component, Head, Mlp, all_components
from circuitune.effects import EffectTable
from circuitune.models import Model
from circuitune.sites import Call, first, intervene, packed, record, resume, substitute

# Rows per layer call: enough for full matrix-multiply speed, small enough to stay in cache.
REPLAY_ROWS = 1024
PROMPTS_PER_BATCH = 64


def wide(values: Tensor) -> Tensor:
    """At least float32: effects are differences of near-equal numbers."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@dataclass(frozen=True)
class Batch:
    """Prompts that run together, padded on the left so that END is the last position of all.

    Attributes:
        places: where the prompts stand in the caller's list.
        cache: keys and values of all positions but END.
        last: the last token of each prompt.
        inputs: attention mask and position ids for END; empty when the lengths are equal.
    """

    places: list[int]
    cache: DynamicCache
    last: Int[Tensor, "example 1"]
    inputs: dict[str, Tensor]


@dataclass(frozen=True)
class Prompts:
    """Tokenised prompts whose keys and values before END are computed (see `prefill`)."""

    batches: tuple[Batch, ...]
    count: int


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


@torch.no_grad()
def prefill(model: Model, prompts: Sequence[Sequence[int]]) -> Prompts:
    """Compute keys and values of all tokens but the last, prompts of similar length together.

    Results do not depend on the order or the batching of the prompts beyond float rounding.
    """
    batches = []
    for places in similar_lengths([len(tokens) for tokens in prompts], PROMPTS_PER_BATCH):
        tokens, mask = pad_left([prompts[place] for place in places])
        tokens, mask = tokens.to(model.device), mask.to(model.device)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        ragged = not bool(mask.all())
        before = {"attention_mask": mask[:, :-1], "position_ids": positions[:, :-1]}
        at_end = {"attention_mask": mask, "position_ids": positions[:, -1:]}
        cache = DynamicCache()  # keeps all tokens; sliding windows are in the model's own masks
        if tokens.shape[1] > 1:
            inputs = before if ragged else {}
            model.trunk(input_ids=tokens[:, :-1], past_key_values=cache, use_cache=True, **inputs)
        batches.append(Batch(places, cache, tokens[:, -1:], at_end if ragged else {}))
    return Prompts(tuple(batches), len(prompts))


def similar_lengths(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Places of at most ``most`` items, sorted by length, none over twice as long as another."""
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    groups: list[list[int]] = []
    for place in order:
        fits = groups and len(groups[-1]) < most
        if fits and lengths[place] <= 2 * lengths[groups[-1][0]]:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def pad_left(
    rows: Sequence[Sequence[int]],
) -> tuple[Int[Tensor, "batch token"], Int[Tensor, "batch token"]]:
    """Token ids padded on the left with zeros, and the attention mask."""
    width = max(len(row) for row in rows)
    tokens = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return tokens, mask


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
    kept: list[tuple[Tensor, ...]] = []
    calls: list[Any] = []
    for batch in prompts.batches:
        with intervene(model, edits or {}), record(model) as trace:
            final = _run_end(model, batch)
        parts = (trace.z, trace.attention, trace.mlp, trace.entry)
        kept.append((*(wide(torch.stack(part)) for part in parts), wide(final)))
        calls = trace.calls
    order = torch.tensor([place for batch in prompts.batches for place in batch.places]).argsort()
    z, attention, mlp, entry = (
        torch.cat([item[i] for item in kept], dim=1)[:, order] for i in range(4)
    )
    return EndStates(z, attention, mlp, entry, torch.cat([item[4] for item in kept])[order], calls)


def _run_end(model: Model, batch: Batch) -> Float[Tensor, "example width"]:
    """Final hidden state of END; the cache is copied, since a forward pass extends it."""
    cache = copy.deepcopy(batch.cache)
    output = model.trunk(
        input_ids=batch.last, past_key_values=cache, use_cache=True, **batch.inputs
    )
    return output.last_hidden_state[:, -1]


def finish(model: Model, state: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch width"]:
    """What the model makes of residual streams after its last layer, at least float32.

    The model's own code runs: the final norm, and in some models a projection.
    """
    rows = state.reshape(-1, 1, state.shape[-1])
    tokens = torch.zeros(len(rows), 1, dtype=torch.long, device=rows.device)
    with resume(model, model.layers, rows.to(_dtype(model.layer(model.layers - 1)))):
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
    rows = {part: row for row, part in enumerate(sorted(senders, key=_start))}
    state = clean.entry.new_empty(len(rows), *clean.entry.shape[1:])
    active = 0
    for layer in tqdm(range(model.layers), desc="sweep", disable=None, leave=False):
        replay(model, clean, layer, state[:active])
        here = [part for part in rows if part.layer == layer]
        if not here:
            continue
        state[active : active + len(here)] = start_rows(model, clean, corrupt, here)
        active += len(here)
    hidden = torch.cat([finish(model, part) for part in _chunks(state)])
    patched = unembed(model, hidden, candidates)[[rows[part] for part in senders]]
    plain = unembed(model, clean.final, candidates)
    return EffectTable.from_logits(
        senders, plain.cpu().numpy(), patched.cpu().numpy(), np.asarray(answers)
    )


def _start(part: Component) -> tuple[int, int]:
    return (part.layer, 0 if isinstance(part, Head) else 1)


def _chunks(state: Float[Tensor, "sender example d_model"]) -> Iterable[Tensor]:
    size = max(1, REPLAY_ROWS // state.shape[1])
    return (state[start : start + size] for start in range(0, state.shape[0], size))


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
    attention = wide(out(z.to(out.weight.dtype)))
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
    dtype = _dtype(module)

    def attend(*_args: Any, **_kwargs: Any) -> Any:
        return packed(attention.to(dtype, copy=True), call.attention)  # a layer may add in place

    def feed(*inputs: Tensor, **named: Tensor) -> Any:
        seen = inputs[0] if inputs else next(iter(named.values()))
        value = mlp.to(dtype, copy=True)
        return packed(value.reshape(*seen.shape[:-1], -1), call.mlp)  # OPT: one axis for both

    with ExitStack() as stack:
        stack.enter_context(substitute(model.part(layer, family.attention), attend))
        if family.norm_before_attention:
            norm = model.part(layer, family.norm_before_attention)
            stack.enter_context(substitute(norm, lambda values: values))
        if mlp is not None:
            stack.enter_context(substitute(model.part(layer, family.mlp), feed))
        output = module(rows.to(dtype), *call.args, **call.kwargs)
    return wide(first(output))


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


@dataclass(frozen=True)
class Cost:
    """What a sweep over all components will take: bytes beside the weights, and seconds."""

    memory: int
    seconds: float

    def __str__(self) -> str:
        return f"about {self.memory / 2**20:.0f} MiB beside the weights, {self.seconds:.0f} s"


@torch.no_grad()
def sweep_cost(model: Model, examples: int) -> Cost:
    """Estimate a sweep from the sizes, and from the replay of one layer, timed.

    Args:
        model: the model.
        examples: number of prompt pairs.
    """
    width, layers = model.d_model, model.layers
    senders = layers * (model.heads + 1)
    kept = 2 * layers * (3 * width + model.heads * model.d_head)  # both runs, see `EndStates`
    states = end_states(model, prefill(model, [[1, 2]] * min(examples, 64)))
    rows = max(1, REPLAY_ROWS // states.final.shape[0])
    state = states.entry[layers // 2].repeat(rows, 1, 1)
    replay(model, states, layers // 2, state)
    started = time.perf_counter()
    replay(model, states, layers // 2, state)
    per_row = (time.perf_counter() - started) / (rows * states.final.shape[0])
    replayed = examples * (model.heads + 1) * layers * (layers + 1) / 2
    return Cost(4 * examples * (senders * width + kept), per_row * replayed)
