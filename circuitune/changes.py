"""How tuning changed what each head does: direct effects of the base and of the tuned model.

Both are measured on the same pairs of the circuit's task, by the same sweep; every comparison is
paired, and pairs that share operands are resampled together. As everywhere, a negative effect
supports the answer, so a head *grew* if its effect became more negative, and *shrank* if it
became less negative. Tuning may sharpen all logits at once, and then every effect grows; so each
effect is also given as a share of the total effect of the corruption in the same model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import mannwhitneyu

from circuitune.components import Head, parse_component
from circuitune.deltas import Delta, merged, tuned_variants
from circuitune.effects import EffectTable, grouped_p_values, measure
from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.pairs import Pair, PairSet, Split
from circuitune.patching import unembed
from circuitune.runs import read_circuit
from circuitune.selection import all_heads
from circuitune.stats import (
    Interval,
    benjamini_hochberg,
    bootstrap_jaccard,
    bootstrap_means,
    clustered_proportion,
    jaccard,
    paired_difference,
    resample_counts,
)
from circuitune.tasks import prepare, survivors, sweep

# Most changes that a record lists.
LISTED = 30
# Sizes of the rankings that are compared.
TOP = (5, 10, 20)
# A change counts at this false-discovery rate over all heads.
FALSE_DISCOVERY = 0.05


@dataclass(frozen=True)
class Measured:
    """One model on the pairs of a task.

    Attributes:
        heads: direct effects of all heads.
        correct: whether the answer is the first choice among all tokens.
        total: change of the logit difference from clean to corrupt, in logits.
    """

    heads: EffectTable
    correct: Bool[np.ndarray, " example"]
    total: Float[np.ndarray, " example"]

    @property
    def effects(self) -> Float[np.ndarray, "sender example"]:
        """Direct effects on the logit difference, in logits."""
        return self.heads.effect("logit_diff")


def measured(model: Model, pairs: Sequence[Pair], answers: Sequence[str] = ()) -> Measured:
    """Sweep all heads of a model as it is now.

    Args:
        model: the model, base or with a delta in its weights.
        pairs: the pairs.
        answers: further admissible answers.
    """
    task = prepare(model, pairs, answers)
    heads = sweep(model, task, senders=all_heads(model))
    logits = unembed(model, task.corrupt.final, task.pairs.candidates).cpu().numpy()
    corrupt = measure(logits, task.answers)["logit_diff"]
    return Measured(heads, survivors(model, task), corrupt - heads.clean["logit_diff"])


def changes(
    model: Model, run: Path, *, split: Split = "test", draws: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Compare the direct effects of a model and of its tuned version.

    Args:
        model: the base model that the run tuned; left exactly as it was.
        run: a run directory with ``circuit.json`` and ``tuned/``.
        split: the half of the circuit's pairs, ``test`` for the one that nothing was chosen on.
        draws: number of resamples.
        seed: seed of the resamples.

    Returns:
        plain data: the ``task``, ``split``, number of ``pairs`` and of ``groups``, and under
        ``variants`` what `compared` says of each method that tuned chosen heads.

    Raises:
        UserError: the run has no tuned heads or no pairs in this half, or they belong to another
            model.
    """
    deltas = {name: delta for name, delta in tuned_variants(run).items() if tuned_heads(delta)}
    if not deltas:
        raise UserError(
            f"Only tuned heads can be compared with the others, {run / 'tuned'} names none; tune "
            "with --methods precise,random."
        )
    task = read_circuit(run)[1].task
    pair_set = PairSet.load(run)
    pairs, answers = pair_set.of(task, split), pair_set.answers
    if len({pair.group for pair in pairs}) < 2:
        raise UserError(
            f"The {split} half of {task} must hold pairs of two groups or more, {run} has "
            f"{len(pairs)} pair(s); compare on another half or collect more pairs."
        )
    groups = [pair.group for pair in pairs]
    base = measured(model, pairs, answers)
    variants = {}
    for name, delta in deltas.items():
        with merged(model, delta):
            tuned = measured(model, pairs, answers)
        heads = tuned_heads(delta)
        variants[name] = compared(base, tuned, heads, groups=groups, draws=draws, seed=seed)
    facts = {"task": task, "split": split, "pairs": len(pairs), "groups": len(set(groups))}
    return facts | {"metric": "logit_diff", "variants": variants}


def tuned_heads(delta: Delta) -> list[str]:
    """The heads that a delta was trained on, as its record names them; none of whole models.

    Raises:
        UserError: the record has no list of components.
    """
    names = delta.facts.get("components")
    if not isinstance(names, list):
        raise UserError(
            "The record of a delta must list its heads under components, found "
            f"{names!r}; tune again."
        )
    parts = (parse_component(name) for name in names)
    return [str(part) for part in parts if isinstance(part, Head)]


def compared(
    base: Measured,
    tuned: Measured,
    chosen: Sequence[str],
    *,
    groups: Sequence[str],
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """What tuning changed, from the effects before and after.

    Args:
        base: the base model.
        tuned: the tuned model on the same pairs.
        chosen: the heads that were tuned.
        groups: the group of each pair.
        draws: number of resamples.
        seed: seed of the resamples.

    Returns:
        ``accuracy`` and ``total_effect`` before and after; ``heads``, the largest changes, and
        ``tuned``, those of the tuned heads, each as `_rows` makes them; how many heads ``grew``
        and ``shrank``; ``overlap`` of the strongest heads; and ``tuned_against_others``.
    """
    how = {"groups": groups, "draws": draws, "seed": seed}
    difference = tuned.effects - base.effects
    rows = _rows(base, tuned, **how)
    order = np.argsort([-abs(row["change"][0]) for row in rows], kind="stable")
    is_tuned = np.array([row["id"] in chosen for row in rows])
    directions = [row["direction"] for row in rows]
    return {
        "accuracy": _accuracies(base.correct, tuned.correct, **how),
        "total_effect": {"before": float(base.total.mean()), "after": float(tuned.total.mean())},
        "tested": len(rows),
        "false_discovery": FALSE_DISCOVERY,
        "grew": directions.count("grew"),
        "shrank": directions.count("shrank"),
        "heads": [rows[place] for place in order[:LISTED]],
        "tuned": [rows[place] for place in order if is_tuned[place]][:LISTED],
        "overlap": _overlaps(base.effects, tuned.effects, groups, seed=seed),
        "tuned_against_others": against_others(difference, is_tuned, **how),
    }


def _rows(
    base: Measured, tuned: Measured, *, groups: Sequence[str], draws: int, seed: int
) -> list[dict[str, Any]]:
    """One record per head.

    Mean effect ``before`` and ``after``, and ``change``, after minus before with a 95 % interval,
    in logits; ``p_adjusted`` of a t test over the means of groups (Benjamini-Hochberg over all
    heads), and the ``direction``. Then the same as shares of each model's total effect, positive
    where the head supports the answer: ``share_before``, ``share_after``, ``share_change`` with
    a 95 % interval; without an effect of the corruption there are none.
    """
    before, after = base.effects, tuned.effects
    difference = after - before
    rng = np.random.default_rng(seed)
    intervals = bootstrap_means(difference, rng=rng, groups=groups, draws=draws)
    adjusted = benjamini_hochberg(grouped_p_values(difference, groups))
    rows = [
        {
            "id": str(part),
            "before": float(before[row].mean()),
            "after": float(after[row].mean()),
            "change": _bounds(intervals[row]),
            "p_adjusted": float(adjusted[row]),
            "direction": _direction(intervals[row].estimate, adjusted[row]),
        }
        for row, part in enumerate(base.heads.components)
    ]
    weights = _weights(len(base.total), groups=groups, draws=draws, seed=seed)
    totals = [model.total @ weights for model in (base, tuned)]
    if all(total.all() for total in totals):
        old, new = before @ weights / totals[0], after @ weights / totals[1]
        low, high = np.quantile((new - old)[:, 1:], [0.025, 0.975], axis=1)
        for row, record in enumerate(rows):
            record["share_before"], record["share_after"] = float(old[row, 0]), float(new[row, 0])
            change = float(new[row, 0] - old[row, 0])
            record["share_change"] = [change, float(low[row]), float(high[row])]
    return rows


def _weights(
    examples: int, *, groups: Sequence[str], draws: int, seed: int
) -> Float[np.ndarray, "example draw"]:
    """Weights that sum to one: first of the sample itself, then of its resamples."""
    rng = np.random.default_rng(seed)
    counts = resample_counts(examples, draws=draws, rng=rng, groups=groups)
    every = np.vstack([np.ones(examples), counts])
    return (every / every.sum(axis=1, keepdims=True)).T


def _direction(change: float, p_adjusted: float) -> str:
    """``grew`` (more support), ``shrank``, or ``unclear`` where chance could have done it."""
    if p_adjusted > FALSE_DISCOVERY:
        return "unclear"
    return "grew" if change < 0 else "shrank"


def _accuracies(
    before: Bool[np.ndarray, " example"],
    after: Bool[np.ndarray, " example"],
    *,
    groups: Sequence[str],
    draws: int,
    seed: int,
) -> dict[str, list[float]]:
    """Accuracy before and after, and its change, with 95 % intervals."""
    how = {"groups": groups, "draws": draws}
    rates = {
        name: clustered_proportion(hits, rng=np.random.default_rng(seed), **how)
        for name, hits in (("before", before), ("after", after))
    }
    rates["change"] = paired_difference(after, before, rng=np.random.default_rng(seed), **how)
    return {name: _bounds(interval) for name, interval in rates.items()}


def _overlaps(
    before: Float[np.ndarray, "sender example"],
    after: Float[np.ndarray, "sender example"],
    groups: Sequence[str],
    *,
    seed: int,
) -> list[dict[str, Any]]:
    """Common heads of the strongest k before and after.

    ``noise`` is the mean Jaccard index between the strongest k before tuning and those of its own
    resamples: overlap below it is more than chance in the choice of pairs.
    """
    strongest = [np.argsort(values.mean(axis=1), kind="stable") for values in (before, after)]
    found = []
    for k in (k for k in TOP if k < len(before)):
        old, new = (set(order[:k].tolist()) for order in strongest)
        rng = np.random.default_rng(seed)
        noise = bootstrap_jaccard(before, k=k, rng=rng, groups=groups).estimate
        row = {"k": k, "common": len(old & new), "jaccard": jaccard(old, new)}
        found.append(row | {"noise": float(noise)})
    return found


def against_others(
    difference: Float[np.ndarray, "sender example"],
    is_tuned: Bool[np.ndarray, " sender"],
    *,
    groups: Sequence[str],
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Whether tuned heads changed more than all others, whatever the direction.

    Args:
        difference: effect after minus before, per head and pair.
        is_tuned: which heads were tuned.
        groups: the group of each pair.
        draws: number of resamples.
        seed: seed of the resamples.

    Returns:
        mean |mean change| of ``tuned`` heads and of ``others``, in logits; their ``difference``
        with a 95 % interval over resampled groups (noise inflates the many small changes of the
        others in each resample, so the interval errs towards no difference); ``p`` of a two-sided
        Mann-Whitney test over heads; None if all heads or none were tuned.
    """
    if is_tuned.all() or not is_tuned.any():
        return None
    weights = _weights(difference.shape[1], groups=groups, draws=draws, seed=seed)
    sizes = np.abs(difference @ weights)
    gaps = sizes[is_tuned].mean(axis=0) - sizes[~is_tuned].mean(axis=0)
    low, high = np.quantile(gaps[1:], [0.025, 0.975])
    own, others = sizes[is_tuned, 0], sizes[~is_tuned, 0]
    return {
        "tuned": float(own.mean()),
        "others": float(others.mean()),
        "difference": [float(gaps[0]), float(low), float(high)],
        "p": float(mannwhitneyu(own, others).pvalue),
    }


def _bounds(interval: Interval) -> list[float]:
    return [float(value) for value in (interval.estimate, interval.low, interval.high)]
