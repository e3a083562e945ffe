"""The stage that finds the circuit: one exact sweep of everything, then a rule that chooses.

The rules are in `circuitune.selection`. Beside the choice stand what a reader needs to trust it:
the noise floor of the effects, significance after correction, how stable the set is, how far
a gradient estimate would have come, and the paper's single-pass ranking.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from circuitune import ranks
from circuitune.attribution import agreement, attribute
from circuitune.components import Choice, Circuit, Head
from circuitune.config import LocateConfig
from circuitune.controls import make_controls
from circuitune.effects import EffectTable, Metric, grouped_p_values
from circuitune.errors import UserError
from circuitune.graph import trace
from circuitune.joint import SEARCHED, check_joint, joint_selection, panel
from circuitune.memory import check_fits
from circuitune.models import Model
from circuitune.pairs import PairSet, encode
from circuitune.patching import noise_floor
from circuitune.runs import write_json
from circuitune.selection import all_heads, check_rule, choices, exactly, select
from circuitune.stats import (
    advise_sample_size,
    benjamini_hochberg,
    bootstrap_jaccard,
    split_half_agreement,
)
from circuitune.tasks import Task, gathered, prepare, sweep, total_effect

# The paper calls a head key if it moves the answer's logit by more than 5 % (section 4).
KEY_CUT = -0.05
# A component matters if it moves the answer by this share of what the whole corruption does, and
# the move is significant at this false-discovery rate over all components.
SHARE_CUT = 0.02
FALSE_DISCOVERY = 0.05
# Rounding does not depend on the prompt; a few show it.
NOISE_EXAMPLES = 8
# Key heads that the graph goes into.
TRACED = 5


def locate(model: Model, config: LocateConfig, run: Path, work: Path) -> None:
    """The stage: sweep, select, trace; writes ``effects.parquet`` and ``circuit.json``.

    The graph's values per example go to ``paths.parquet``. Several processes call it together
    (see `circuitune.ranks`); all get the same result.

    Args:
        model: the model.
        config: options.
        run: the run directory, read for the pairs (by the first process).
        work: where the files are written.
    """
    config = exactly(config)
    check_rule(config, ranks.world())
    if config.rule == "joint":
        check_joint(model, config)
    pair_set = ranks.first(lambda: PairSet.load(run))
    name = pair_set.tasks[0]
    pairs = pair_set.of(name, "select")
    encoded = encode(model.tokenizer, pairs, pair_set.answers)
    _tell(f"memory: {check_fits(model, [len(tokens) for tokens in encoded.clean])}")
    task = prepare(model, pairs, pair_set.answers, share=ranks.share())
    rng = np.random.default_rng(config.seed)
    table = sweep(model, task)
    heads = table.select([part for part in table.components if isinstance(part, Head)])
    floor = noise(model, task)
    effects_frame(table, floor).to_parquet(work / "effects.parquet", index=False)
    if config.rule == "joint":
        found, rule, size = together(model, pair_set, task, heads, config, rng)
    else:
        found, rule, size = select(model, task, heads, config, rng)
    circuit = Circuit(tuple(found), name, model.source, rule, size)
    content = circuit.to_json() | {
        "noise": {metric: float(values.max()) for metric, values in floor.items()},
        "single_pass": single_pass(heads, task, most=config.most, rng=rng, draws=config.draws),
        "significance": significance(table, total_effect(model, task), task),
        "stability": stability(heads, max(circuit.size, 1), task, rng=rng),
        "attribution": estimated(model, task, table, top=config.most),
    }
    pd.DataFrame().to_parquet(work / "paths.parquet")  # for a run without a graph
    if config.graph:
        content["graph"] = ranks.first(lambda: traced(model, pair_set, circuit, config, work))
    write_json(work / "circuit.json", content)


def together(
    model: Model,
    pair_set: PairSet,
    task: Task,
    heads: EffectTable,
    config: LocateConfig,
    rng: np.random.Generator,
) -> tuple[list[Choice], dict[str, Any], int]:
    """Choose by `circuitune.joint`: targets from the run's pairs, control tasks to spare.

    Args:
        model: the model.
        pair_set: the run's pairs.
        task: the first of its tasks.
        heads: direct effects of all heads on it.
        config: options.
        rng: draws intervals.

    Raises:
        UserError: a target has no pairs.
    """
    names = config.targets or pair_set.tasks[:1]
    for name in names:
        if name not in pair_set.tasks:
            raise UserError(
                f"--targets must be among {', '.join(pair_set.tasks)}, found {name!r}; correct the "
                "name or add it to --operators."
            )
    targets = {name: pair_set.of(name, "select") for name in names}
    controls = make_controls(
        model, pair_set.selection, taken=pair_set.tasks, seed=pair_set.selection.get("seed", 0)
    )
    spared = {item.name: item.all_of("select") for item in controls if item.pairs}
    watched = panel(model, targets, spared, pair_set.answers)
    searched = panel(model, targets, spared, pair_set.answers, most=SEARCHED)
    if tuple(names) != (pair_set.tasks[0],):
        pooled = [pair for own in targets.values() for pair in own]
        task = prepare(model, pooled, pair_set.answers)
        heads = sweep(model, task, senders=all_heads(model))
    return joint_selection(model, watched, searched, task, heads, config, rng)


def _tell(text: str) -> None:
    """One line for the user, from the first process."""
    if ranks.rank() == 0:
        tqdm.write(text, file=sys.stderr)


def noise(model: Model, task: Task) -> dict[Metric, np.ndarray]:
    """The noise floor of the task's effects per layer, see `circuitune.patching.noise_floor`."""
    clean, answers = task.clean.of(slice(NOISE_EXAMPLES)), task.answers[:NOISE_EXAMPLES]
    return noise_floor(model, clean, candidates=task.pairs.candidates, answers=answers)


def effects_frame(table: EffectTable, floor: dict[Metric, np.ndarray]) -> pd.DataFrame:
    """``effects.parquet``: the tidy table with the noise floor of each row's layer and metric."""
    frame = table.to_frame()
    layers = frame["layer"].to_numpy()
    frame["noise"] = np.nan
    for metric, values in floor.items():
        rows = (frame["metric"] == metric).to_numpy()
        frame.loc[rows, "noise"] = values[layers[rows]]
    return frame


def traced(
    model: Model, pair_set: PairSet, circuit: Circuit, config: LocateConfig, work: Path
) -> dict[str, Any]:
    """Who feeds the key heads, see `circuitune.graph`; also writes ``paths.parquet``.

    Where it cannot be told (own prompts without a counterpart of equal length, few operands, an
    unknown layout of the projections), the record says why.
    """
    pairs = [pair for pair in pair_set.pairs if pair.task == circuit.task]
    try:
        graph = trace(
            model,
            pairs,
            circuit.heads[: max(1, min(circuit.size, TRACED))],
            answers=pair_set.answers,
            rng=np.random.default_rng(config.seed),
            draws=config.draws,
        )
    except UserError as error:
        _tell(f"no graph: {error}")
        return {"note": str(error)}
    graph.values.to_parquet(work / "paths.parquet", index=False)
    return graph.to_json()


def estimated(model: Model, task: Task, exact: EffectTable, *, top: int) -> dict[str, Any]:
    """How far a gradient estimate agrees with the exact effects, of heads and of everything."""
    if model.offloaded:
        return {"note": "needs the weights in memory, a backward pass runs through all layers"}
    table = attribute(
        model,
        task.clean,
        task.corrupt,
        candidates=task.pairs.candidates,
        answers=task.answers,
    )
    estimate = gathered(table, task.share)
    heads = [part for part in exact.components if isinstance(part, Head)]
    return {
        "metric": "logit_diff",
        "heads": asdict(agreement(estimate.select(heads), exact.select(heads), top=top)),
        "all": asdict(agreement(estimate, exact, top=top)),
    }


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


def significance(table: EffectTable, total: float, task: Task) -> dict[str, Any]:
    """Which components matter, by a cut that has a scale of its own.

    A raw logit has an arbitrary zero, so the paper's -5 % of it selects nothing on many models.
    Here a component is key if its mean effect is at least `SHARE_CUT` of the total effect, in
    its direction, and differs from zero after Benjamini-Hochberg correction over all components
    (t test over the means of operand pairs, since prompts that share operands are not
    independent; with ten pairs a permutation test could not pass the correction).
    """
    effects = table.effect("logit_diff")
    adjusted = benjamini_hochberg(grouped_p_values(effects, task.pairs.groups))
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
