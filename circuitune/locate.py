"""Choose the heads that matter: one exact sweep, then iterated path patching.

A single pass of direct effects misses backups: heads that take over once another is gone. So the
selection iterates (`iterated_selection`): ablate the set found so far, sweep again in that state,
add the strongest heads, repeat. The paper's single-pass ranking by relative logit is kept beside.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ttest_1samp
from tqdm.auto import tqdm

from circuitune.components import Choice, Circuit, Component, Head, all_components
from circuitune.config import LocateConfig
from circuitune.effects import EffectTable, Metric, measure
from circuitune.models import Model
from circuitune.pairs import Encoded, Pair, PairSet, encode
from circuitune.patching import EndStates, Prompts, direct_effects, end_states, prefill, unembed
from circuitune.runs import write_json
from circuitune.stats import (
    advise_sample_size,
    benjamini_hochberg,
    bootstrap_jaccard,
    split_half_agreement,
)

# The paper calls a head key if it moves the answer's logit by more than 5 % (section 4).
KEY_CUT = -0.05
# A component matters if it moves the answer by this share of what the whole corruption does, and
# the move is significant at this false-discovery rate over all components.
SHARE_CUT = 0.02
FALSE_DISCOVERY = 0.05
# Ranks are added in growing steps: late ranks matter less and each round costs a sweep.
ROUND_SIZES = (1, 1, 1, 2, 3, 5, 8, 13, 21)
# The knockout curve is flat from where it stays within this share of its lowest point.
FLAT = 0.05


@dataclass(frozen=True)
class Task:
    """The pairs of one task and split, tokenised, with the states at END that patching needs."""

    pairs: Encoded
    prompts: Prompts
    corrupt: EndStates

    @property
    def tokens(self) -> np.ndarray:
        """Token id of each pair's answer."""
        return np.array(self.pairs.candidates)[self.pairs.answers]


def prepare(model: Model, pairs: Sequence[Pair], answers: Sequence[str] = ()) -> Task:
    """Tokenise pairs, prefill the clean prompts and run the corrupt ones."""
    encoded = encode(model.tokenizer, pairs, answers)
    corrupt = end_states(model, prefill(model, encoded.corrupt))
    return Task(encoded, prefill(model, encoded.clean), corrupt)


def survivors(model: Model, task: Task, ablated: Sequence[Component] = ()) -> np.ndarray:
    """Per pair, whether the answer is still the first choice with components mean-ablated at END.

    The mean is taken over the corrupt prompts of the same pairs, as in Zhang et al. (2024).
    """
    edits = task.corrupt.mean_outputs(ablated, model.d_head)
    states = end_states(model, task.prompts, edits=edits)
    top = unembed(model, states.final).argmax(dim=-1).cpu().numpy()
    return top == task.tokens


def sweep(
    model: Model, task: Task, *, ablated: Sequence[Component] = (), heads_only: bool = False
) -> EffectTable:
    """Direct effects on a task, in the intact model or with components already ablated.

    Intact, a sender gets its own corrupt output per example. In an ablated state it gets the
    mean corrupt output, the same replacement that the ablation would give it.
    """
    senders = [part for part in all_components(model.layers, model.heads) if part not in ablated]
    if heads_only:
        senders = [part for part in senders if isinstance(part, Head)]
    edits = task.corrupt.mean_outputs(ablated, model.d_head)
    return direct_effects(
        model,
        end_states(model, task.prompts, edits=edits),
        task.corrupt.averaged() if heads_only else task.corrupt,
        candidates=task.pairs.candidates,
        answers=task.pairs.answers,
        senders=senders,
    )


def choices(
    table: EffectTable,
    order: Sequence[Component],
    *,
    metric: Metric,
    rng: np.random.Generator,
    groups: Sequence[str],
    draws: int = 2000,
    round_number: int = 1,
) -> list[Choice]:
    """Components with the interval of their mean effect."""
    intervals = table.select(order).intervals(metric, rng=rng, groups=groups, draws=draws)
    return [
        Choice(part, item.estimate, item.low, item.high, round_number)
        for part, item in zip(order, intervals, strict=True)
    ]


def iterated_selection(
    model: Model, task: Task, *, most: int, rng: np.random.Generator, draws: int = 2000
) -> tuple[list[Choice], list[dict[str, Any]]]:
    """Rank up to ``most`` heads by iterated path patching on logit difference.

    Returns:
        the heads in the order found, and per round the set size with the share of the task's
        pairs that survive (the curve whose flat part ends the circuit).
    """
    found: list[Choice] = []
    curve = [{"heads": 0, "accuracy": float(survivors(model, task).mean())}]
    bar = tqdm(total=most, desc="selecting heads", disable=None, leave=False)
    for number, size in enumerate(ROUND_SIZES, start=1):
        ablated = [choice.component for choice in found]
        table = sweep(model, task, ablated=ablated, heads_only=True)
        order = table.rank()[: min(size, most - len(found))]
        found += choices(
            table,
            order,
            metric="logit_diff",
            rng=rng,
            groups=task.pairs.groups,
            draws=draws,
            round_number=number,
        )
        bar.update(len(order))
        now = [choice.component for choice in found]
        curve.append({"heads": len(now), "accuracy": float(survivors(model, task, now).mean())})
        if len(found) >= most or not order:
            break
    bar.close()
    return found, curve


def flat_from(curve: Sequence[dict[str, Any]]) -> int:
    """Size of the smallest set after which the knockout curve stays flat (within `FLAT`)."""
    floor = min(point["accuracy"] for point in curve)
    limit = floor + FLAT * curve[0]["accuracy"]
    return next(int(point["heads"]) for point in curve if point["accuracy"] <= limit)


def locate(model: Model, config: LocateConfig, run: Path, work: Path) -> None:
    """The stage: sweep, select, and write ``effects.parquet`` and ``circuit.json``.

    Args:
        model: the model.
        config: options.
        run: the run directory, read for the pairs.
        work: where the two files are written.
    """
    pair_set = PairSet.load(run)
    name = pair_set.tasks[0]
    pairs = pair_set.of(name, "select")
    task = prepare(model, pairs, pair_set.selection.get("admissible", ()))
    rng = np.random.default_rng(config.seed)
    table = sweep(model, task)
    table.to_frame().to_parquet(work / "effects.parquet", index=False)
    found, curve = iterated_selection(model, task, most=config.most, rng=rng, draws=config.draws)
    rule = {
        "name": "iterated path patching",
        "metric": "logit_diff",
        "ablation": "mean over the corrupt prompts, at END",
        "pairs": len(pairs),
        "curve": curve,
    }
    circuit = Circuit(tuple(found), name, model.source, rule, size=flat_from(curve))
    heads = table.select([part for part in table.components if isinstance(part, Head)])
    single = single_pass(heads, task, most=config.most, rng=rng, draws=config.draws)
    content = circuit.to_json() | {
        "single_pass": single,
        "significance": significance(table, total_effect(model, task), task),
        "stability": stability(heads, max(circuit.size, 1), task, rng=rng),
    }
    write_json(work / "circuit.json", content)


def single_pass(
    heads: EffectTable, task: Task, *, most: int, rng: np.random.Generator, draws: int = 2000
) -> dict[str, Any]:
    """The paper's ranking: one sweep, by ``relative_logit``, and how many pass its -5 % cut."""
    order = heads.rank("relative_logit")[:most]
    groups = task.pairs.groups
    top = choices(heads, order, metric="relative_logit", rng=rng, groups=groups, draws=draws)
    return {
        "metric": "relative_logit",
        "components": [item.to_json() for item in top],
        "key_cut": KEY_CUT,
        "key_heads": int((heads.mean("relative_logit") < KEY_CUT).sum()),
    }


def total_effect(model: Model, task: Task) -> float:
    """Mean change of the logit difference from the clean to the corrupt run, in logits."""
    clean = end_states(model, task.prompts).final
    runs = (unembed(model, final, task.pairs.candidates) for final in (clean, task.corrupt.final))
    before, after = (
        measure(logits.cpu().numpy(), task.pairs.answers)["logit_diff"].mean() for logits in runs
    )
    return float(after - before)


def significance(table: EffectTable, total: float, task: Task) -> dict[str, Any]:
    """Which components matter, by a cut that has a scale of its own.

    A raw logit has an arbitrary zero, so the paper's -5 % of it selects nothing on many models.
    Here a component is key if its mean effect is at least `SHARE_CUT` of the total effect, in
    its direction, and differs from zero after Benjamini-Hochberg correction over all components
    (t test over the means of operand pairs, since prompts that share operands are not
    independent; with ten pairs a permutation test could not pass the correction).
    """
    effects = table.effect("logit_diff")
    groups = np.array(task.pairs.groups)
    means = np.stack(
        [effects[:, groups == name].mean(axis=1) for name in np.unique(groups)], axis=1
    )
    p_values = ttest_1samp(means, 0.0, axis=1).pvalue if means.shape[1] > 1 else np.ones(len(means))
    adjusted = benjamini_hochberg(np.nan_to_num(p_values, nan=1.0))
    # A corruption that changes nothing gives no scale, and then no component has a share of it.
    shares = effects.mean(axis=1) / total if total else np.zeros(len(effects))
    key = [
        {"id": str(part), "share": float(share), "p_adjusted": float(p)}
        for part, share, p in zip(table.components, shares, adjusted, strict=True)
        if share >= SHARE_CUT and p <= FALSE_DISCOVERY
    ]
    return {
        "total_effect": total,
        "share_cut": SHARE_CUT,
        "false_discovery": FALSE_DISCOVERY,
        "significant": int((adjusted <= FALSE_DISCOVERY).sum()),
        "tested": len(adjusted),
        "key": sorted(key, key=lambda item: -item["share"]),
    }


def stability(
    heads: EffectTable, k: int, task: Task, *, rng: np.random.Generator
) -> dict[str, Any]:
    """How stable the top k heads of one sweep are, and how many pairs would make them so."""
    effects, groups = heads.effect("logit_diff"), task.pairs.groups
    if len(set(groups)) < 4 or k >= len(effects):
        return {"k": k, "pairs": effects.shape[1], "note": "too few operand pairs to resample"}
    jaccard = bootstrap_jaccard(effects, k=k, rng=rng, groups=groups)
    halves = split_half_agreement(effects, k=k, rng=rng, groups=groups)
    return {
        "k": k,
        "pairs": effects.shape[1],
        "bootstrap_jaccard": [jaccard.estimate, jaccard.low, jaccard.high],
        "split_half_jaccard": [halves.estimate, halves.low, halves.high],
        "pairs_for_jaccard_0.8": advise_sample_size(effects, k=k, rng=rng, groups=groups),
    }
