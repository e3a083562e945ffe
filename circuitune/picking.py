"""Which heads to tune: rules that order heads, each by another reason.

The best set to knock out need not be the best set to tune, so a rule is a choice of its own.
``docs/findings.md`` compares them with random heads of the same layers.

- ``direct``: the strongest direct effects of one sweep, by logit difference.
- ``circuit``: the circuit of ``circuit.json`` in its own order, iterated or joint.
- ``upstream``: heads that bring something to the circuit's heads, by their largest mean effect on
  the answer through the query, key or value of such a head (``paths.parquet``).
- ``gradient``: heads whose slices have the largest gradient of the training loss at the base,
  which is what a first step of tuning would use.
- ``cost``: direct effects for the FLOPs of a step: a low head makes every step dearer.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import pandas as pd
import torch

from circuitune.components import Head, Mlp, parse_component
from circuitune.effects import EffectTable
from circuitune.errors import UserError
from circuitune.examples import IGNORED, Example
from circuitune.methods import precise
from circuitune.models import Model
from circuitune.patching import unembed
from circuitune.plan import Workload, flops
from circuitune.runs import read_circuit
from circuitune.slices import attached, head_slices
from circuitune.writing import pad

Rule = Literal["direct", "circuit", "upstream", "gradient", "cost"]
RULES: tuple[Rule, ...] = get_args(Rule)
# Training texts behind the gradient, and how many of them run at once.
GRADIENT_TEXTS, TEXTS_PER_BATCH = 128, 16


def pick_heads(
    model: Model, run: Path, count: int, *, rule: str, examples: Sequence[Example] = ()
) -> tuple[Head, ...]:
    """The first ``count`` heads by a rule, best first.

    Args:
        model: the model.
        run: a run directory with ``effects.parquet``, ``circuit.json`` and ``paths.parquet``.
        count: how many heads.
        rule: one of `RULES`.
        examples: training texts; only ``gradient`` looks at them.

    Raises:
        UserError: the rule is unknown, or gives fewer heads.
    """
    if rule not in RULES:
        raise UserError(f"--pick must be one of {', '.join(RULES)}, found {rule!r}; use one.")
    if rule == "cost":
        strengths = {head: -mean for head, mean in direct_means(run).items() if mean < 0}
        found = for_their_price(strengths, prices(model, examples), count)
    elif rule == "gradient":
        found = by_gradient(model, examples)
    elif rule == "upstream":
        found = upstream(run)
    elif rule == "circuit":
        found = read_circuit(run)[1].heads
    else:
        ranked = EffectTable.load(run / "effects.parquet").rank("logit_diff")
        found = tuple(part for part in ranked if isinstance(part, Head))
    if len(found) < count:
        raise UserError(
            f"--heads must be at most {len(found)}, the number that the rule {rule} gives, found "
            f"{count}; choose fewer heads or another rule."
        )
    return tuple(found[:count])


def pick_mlps(run: Path, count: int) -> tuple[Mlp, ...]:
    """The MLPs with the strongest direct effects on the logit difference, best first."""
    ranked = EffectTable.load(run / "effects.parquet").rank("logit_diff")
    return tuple(part for part in ranked if isinstance(part, Mlp))[:count]


def direct_means(run: Path) -> dict[Head, float]:
    """Mean direct effect of each head on the logit difference, in logits."""
    table = EffectTable.load(run / "effects.parquet")
    means = table.effect("logit_diff").mean(axis=1)
    both = zip(table.components, means, strict=True)
    return {part: float(mean) for part, mean in both if isinstance(part, Head)}


def prices(model: Model, examples: Sequence[Example]) -> list[float]:
    """FLOPs of a step by its lowest tuned layer, as a share of those where layer 0 is tuned too.

    The layers below it are cached. One number per layer, falling from 1 to what the unembedding
    takes, which every step pays.

    Raises:
        UserError: there is no training text.
    """
    if not examples:
        raise UserError("The rule cost needs training texts, found none; give some.")
    tokens = sum(len(example.tokens) - 1 for example in examples)
    work = Workload(
        tokens=tokens,
        supervised=sum(example.supervised for example in examples),
        length=tokens // len(examples),
        steps=1,
    )
    steps = [
        flops(model, precise(model, [Head(layer, 0)]), work, cached=True).total
        for layer in range(model.layers)
    ]
    return [step / steps[0] for step in steps]


def for_their_price(
    strengths: Mapping[Head, float], price: Sequence[float], count: int
) -> tuple[Head, ...]:
    """The set of heads with the most strength for the price of its lowest layer.

    Args:
        strengths: of each head, 0 or more.
        price: of tuning a layer and what is above, see `prices`.
        count: how many heads; all, the strongest first, if there are not as many.

    Returns:
        the heads, strongest first; of equal sets the higher one.
    """
    ranked = sorted(strengths, key=lambda head: (-strengths[head], head))
    best, chosen = -1.0, tuple(ranked)
    for layer, paid in enumerate(price):
        heads = tuple(head for head in ranked if head.layer >= layer)[:count]
        worth = sum(strengths[head] for head in heads) / paid
        if len(heads) == count and worth >= best:
            best, chosen = worth, heads
    return chosen


def upstream(run: Path) -> tuple[Head, ...]:
    """Heads that feed the circuit's heads, by their largest mean effect through one of them.

    Raises:
        UserError: the run has no graph.
    """
    path = run / "paths.parquet"
    table = pd.read_parquet(path) if path.is_file() else pd.DataFrame()
    if table.empty:
        raise UserError(
            f"The rule upstream needs the graph of who feeds whom, {path} holds none; locate again "
            "with --graph, or pick by another rule."
        )
    table = table[(table["split"] == "select") & (table["stage"] == "edge")]
    ways = ["sender", "contrast", "role", "receiver", "at", "then"]
    means = table.groupby(ways, dropna=False)["effect"].mean().abs()
    best = means.groupby("sender").max().sort_values(ascending=False)
    named = [name for name in best.index if name[0].isdigit()]
    heads = [parse_component(name) for name in named]
    return tuple(head for head in heads if isinstance(head, Head))


def by_gradient(model: Model, examples: Sequence[Example]) -> tuple[Head, ...]:
    """All heads by the norm of the training loss's gradient over their q and o slices.

    Raises:
        UserError: there is no training text.
    """
    some = examples[:GRADIENT_TEXTS]
    if not some:
        raise UserError("The rule gradient needs training texts, found none; give some.")
    heads = [Head(layer, i) for layer in range(model.layers) for i in range(model.heads)]
    parts = head_slices(model, heads)
    squares = dict.fromkeys(heads, 0.0)
    with attached(model, parts) as views:
        for start in range(0, len(some), TEXTS_PER_BATCH):
            _loss(model, some[start : start + TEXTS_PER_BATCH]).backward()
        gradients = {part: _gradient(view) for part, view in views.items()}
    for head in heads:
        own = set(head_slices(model, [head]))
        squares[head] = sum(float((gradients[part] ** 2).sum()) for part in own)
    return tuple(sorted(heads, key=lambda head: -squares[head]))


def _loss(model: Model, examples: Sequence[Example]) -> torch.Tensor:
    """Sum of cross entropies at supervised tokens, nats."""
    tokens = pad([example.tokens[:-1] for example in examples], 0).to(model.device)
    labels = pad([example.labels[1:] for example in examples], IGNORED).to(model.device)
    states = model.hf.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    chosen = labels != IGNORED
    logits = unembed(model, states[chosen])
    return torch.nn.functional.cross_entropy(logits, labels[chosen], reduction="sum")


def _gradient(view: torch.Tensor) -> torch.Tensor:
    """The part of a parameter's gradient that belongs to a view of the parameter."""
    whole = view if view._base is None else view._base
    assert whole.grad is not None
    return whole.grad.as_strided(view.shape, view.stride(), view.storage_offset())
