"""Rules that choose heads: iterated path patching, one sweep, or the paper's cut.

A single sweep of direct effects misses backups: heads that take over once another is gone. So the
default rule iterates: ablate the set found so far, sweep again in that state, add the strongest
heads, repeat. A round needs the strongest few heads alone, so it can be *screened* (measure only
the best of a gradient estimate) or *raced* (`circuitune.racing`); what is chosen is measured
exactly on all pairs in every case.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from circuitune.attribution import attribute
from circuitune.components import Choice, Component, Head
from circuitune.config import LocateConfig
from circuitune.effects import EffectTable, Metric
from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.patching import direct_effects
from circuitune.racing import Race, race
from circuitune.tasks import Task, survivors, sweep

# Ranks are added in growing steps: late ranks matter less and each round costs a sweep.
ROUND_SIZES = (1, 1, 1, 2, 3, 5, 8, 13, 21)
# The knockout curve is flat from where it stays within this share of its lowest point.
FLAT = 0.05
RULES = {
    "iterated": "iterated path patching",
    "single": "one sweep by logit difference",
    "paper": "one sweep by relative logit, cut as in Zhang et al. (2024)",
    "joint": "joint selection by exact knockouts of sets",
}


def all_heads(model: Model, without: Sequence[Component] = ()) -> list[Component]:
    """Every head of a model but the given ones."""
    heads = (Head(layer, index) for layer in range(model.layers) for index in range(model.heads))
    return [head for head in heads if head not in without]


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


def select(
    model: Model, task: Task, heads: EffectTable, config: LocateConfig, rng: np.random.Generator
) -> tuple[list[Choice], dict[str, Any], int]:
    """Rank up to ``config.most`` heads by the rule that the options name, but for ``joint``.

    Args:
        model: the model.
        task: the task, with the pairs to select on.
        heads: direct effects of all heads in the intact model.
        config: options.
        rng: draws intervals and the order of races.

    Returns:
        the heads in order, the record of the rule (with the knockout curve on the task's pairs),
        and how many of them make the circuit.

    Raises:
        UserError: no head passes the paper's cut.
    """
    if config.rule == "iterated":
        found, record = iterated_selection(model, task, config, rng)
        return found, record, flat_from(record["curve"])
    metric: Metric = "logit_diff" if config.rule == "single" else "relative_logit"
    order = heads.rank(metric)[: config.most]
    how = {"metric": metric, "rng": rng, "groups": task.pairs.groups, "draws": config.draws}
    found = choices(heads, order, **how)
    record = _record(config, task) | {"metric": metric}
    if config.rule == "paper":
        return found, record | {"cut": config.cut}, _passing(heads, found, config)
    record["curve"] = _curve(model, task, order)
    return found, record, flat_from(record["curve"])


def exactly(config: LocateConfig) -> LocateConfig:
    """The options without racing and screening, if ``exact`` asks for it."""
    return replace(config, race=0.0, screen=0) if config.exact else config


def check_rule(config: LocateConfig, processes: int = 1) -> None:
    """Refuse options that do not fit each other, before anything is measured.

    Raises:
        UserError: no such rule, or a way to speed it up that it does not have.
    """
    if config.rule not in RULES:
        raise UserError(
            f"--rule must be {', '.join(RULES)}, found {config.rule!r}; correct the name."
        )
    if not 0 <= config.race < 1:
        raise UserError(
            f"--race must be a confidence below 1 (0 turns it off), found {config.race}; try 0.95."
        )
    fast = [name for name in ("race", "screen") if getattr(config, name)]
    if config.rule == "joint" and processes > 1:
        raise UserError(
            f"--rule joint works in one process, {processes} were started; start it without a "
            "launcher."
        )
    if fast and (config.rule != "iterated" or len(fast) > 1 or processes > 1):
        raise UserError(
            f"--{fast[0]} speeds up the rounds of --rule iterated, alone and in one process, found "
            f"--rule {config.rule}, {' and '.join(fast)}, {processes} process(es); leave "
            "one out."
        )


def _record(config: LocateConfig, task: Task) -> dict[str, Any]:
    return {
        "name": RULES[config.rule],
        "metric": "logit_diff",
        "ablation": "mean over the corrupt prompts, at END",
        "pairs": len(task.pairs.answers),
    }


def _passing(heads: EffectTable, found: Sequence[Choice], config: LocateConfig) -> int:
    """How many heads pass the paper's cut.

    Raises:
        UserError: none does.
    """
    passing = sum(choice.estimate < config.cut for choice in found)
    if not passing:
        strongest = heads.mean("relative_logit").min()
        raise UserError(
            f"--rule paper keeps heads that change the answer's logit by less than {config.cut:.1%}"
            f", the strongest changes it by {strongest:.1%}; a raw logit has an arbitrary zero, so "
            "raise --cut or use --rule iterated."
        )
    return passing


def iterated_selection(
    model: Model, task: Task, config: LocateConfig, rng: np.random.Generator
) -> tuple[list[Choice], dict[str, Any]]:
    """Rank heads by iterated path patching on logit difference.

    A head's effect is that of adding it to the ablated set: its mean corrupt output patched in.

    Returns:
        the heads in the order found, and the record of the rule with the share of the task's pairs
        that survive after each round (the curve whose flat part ends the circuit).
    """
    most = min(config.most, model.layers * model.heads)
    found: list[Choice] = []
    curve = [_point(model, task, [])]
    races: list[Race] = []
    bar = tqdm(total=most, desc="selecting heads", disable=None, leave=False)
    for number, size in enumerate(_sizes(most), start=1):
        ablated = [choice.component for choice in found]
        senders: Sequence[Component] = all_heads(model, ablated)
        if config.race:
            # Every race may err, together they keep the confidence that was asked for.
            confidence = 1 - (1 - config.race) / len(_sizes(most))
            races.append(race_heads(model, task, size, rng, ablated=ablated, confidence=confidence))
            senders = [choice.component for choice in races[-1].chosen]
        elif config.screen:
            senders = screened(model, task, max(size, config.screen), ablated=ablated)
        table = sweep(model, task, ablated=ablated, senders=senders, corrupt=task.average)
        order = table.rank()[:size]
        how = {"groups": task.pairs.groups, "draws": config.draws, "round_number": number}
        found += choices(table, order, metric="logit_diff", rng=rng, **how)
        bar.update(len(order))
        curve.append(_point(model, task, [choice.component for choice in found]))
    bar.close()
    record = _record(config, task) | {"curve": curve}
    if config.screen:
        record["screen"] = config.screen
    if races:
        record["race"] = {
            "confidence": config.race,
            "evaluations": sum(int(item.spent()) for item in races),
            "full_evaluations": sum(int(item.full()) for item in races),
        }
    return found, record


def _sizes(most: int) -> list[int]:
    """How many heads each round adds."""
    sizes: list[int] = []
    while sum(sizes) < most:
        step = ROUND_SIZES[min(len(sizes), len(ROUND_SIZES) - 1)]
        sizes.append(min(step, most - sum(sizes)))
    return sizes


def _point(model: Model, task: Task, heads: Sequence[Component]) -> dict[str, Any]:
    return {"heads": len(heads), "accuracy": float(survivors(model, task, heads).mean())}


def _curve(model: Model, task: Task, order: Sequence[Component]) -> list[dict[str, Any]]:
    """Survivors with the first heads of a ranking ablated, at the sizes of the rounds."""
    ends = np.cumsum([0, *_sizes(len(order))])
    return [_point(model, task, order[:end]) for end in ends]


def flat_from(curve: Sequence[dict[str, Any]]) -> int:
    """Size of the smallest set after which the knockout curve stays flat (within `FLAT`)."""
    floor = min(point["accuracy"] for point in curve)
    limit = floor + FLAT * curve[0]["accuracy"]
    return next(int(point["heads"]) for point in curve if point["accuracy"] <= limit)


def race_heads(
    model: Model,
    task: Task,
    k: int,
    rng: np.random.Generator,
    *,
    ablated: Sequence[Component] = (),
    confidence: float = 0.95,
) -> Race:
    """The k heads whose mean ablation has the strongest direct effects, by `circuitune.racing`.

    Args:
        model: the model.
        task: the task.
        k: how many heads are wanted.
        rng: draws the order of the pairs.
        ablated: components that are mean-ablated at END throughout.
        confidence: least probability that the set is that of the full sweep.
    """
    heads = all_heads(model, ablated)
    clean = task.states(model, ablated)

    def measure(rows: list[int], places: list[int]) -> np.ndarray:
        return direct_effects(
            model,
            clean.of(places),
            task.average.of(places),
            candidates=task.pairs.candidates,
            answers=task.answers[places],
            senders=[heads[row] for row in rows],
        ).effect()

    return race(
        measure,
        heads,
        len(task.pairs.answers),
        k=min(k, len(heads)),
        rng=rng,
        confidence=confidence,
    )


def screened(
    model: Model, task: Task, most: int, *, ablated: Sequence[Component] = ()
) -> list[Component]:
    """The heads with the largest gradient estimates, by mean absolute value over the examples.

    The absolute value, since a head whose effect is not linear can get the wrong sign; among
    twice as many heads as were wanted it had all (docs/log.md).
    """
    table = attribute(
        model,
        task.states(model, ablated),
        task.average,
        candidates=task.pairs.candidates,
        answers=task.answers,
    ).select(all_heads(model, ablated))
    order = np.argsort(-np.abs(table.effect()).mean(axis=1), kind="stable")[:most]
    return [table.components[row] for row in sorted(order)]
