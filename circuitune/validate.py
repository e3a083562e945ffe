"""Prove that the chosen heads matter: knockout curves on the held-out half, with controls.

Ablation is mean ablation at END, the mean taken over the corrupt prompts of the same held-out
pairs. Beside the top-k sets stand the paper's single-pass ranking and random sets: ``matched``
has as many heads in each layer as the top-k set, ``random`` lies anywhere. Controls never hold a
head of the set that they are compared with.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from circuitune import ranks
from circuitune.components import Circuit, Head, parse_component
from circuitune.config import ValidateConfig
from circuitune.effects import measure
from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.pairs import PairSet
from circuitune.patching import first_choice, unembed
from circuitune.stats import Interval, clustered_proportion
from circuitune.tasks import Task, prepare


@dataclass(frozen=True)
class Knockout:
    """One set of heads to ablate: which kind (``set`` of knockout.parquet), size and draw."""

    kind: str
    k: int
    draw: int
    heads: tuple[Head, ...]


def matched_heads(
    heads: Sequence[Head], per_layer: int, rng: np.random.Generator
) -> tuple[Head, ...]:
    """Random heads, as many in each layer as ``heads`` has, and none of them.

    Where a layer has too few other heads, all of them are taken.
    """
    drawn: list[Head] = []
    for layer, count in sorted(Counter(head.layer for head in heads).items()):
        free = [i for i in range(per_layer) if Head(layer, i) not in heads]
        picked = rng.choice(free, size=min(count, len(free)), replace=False)
        drawn += [Head(layer, int(index)) for index in sorted(picked)]
    return tuple(drawn)


def random_heads(
    heads: Sequence[Head], layers: int, per_layer: int, rng: np.random.Generator
) -> tuple[Head, ...]:
    """As many random heads from anywhere, none of the given ones.

    Raises:
        UserError: the model has too few other heads.
    """
    free = [Head(layer, i) for layer in range(layers) for i in range(per_layer)]
    free = [head for head in free if head not in heads]
    if len(free) < len(heads):
        raise UserError(
            f"A random control needs {len(heads)} heads outside the set, the model has "
            f"{len(free)}; choose fewer heads."
        )
    picked = rng.choice(len(free), size=len(heads), replace=False)
    return tuple(free[index] for index in sorted(picked))


def plan(
    model: Model,
    ranked: Sequence[Head],
    single_pass: Sequence[Head],
    config: ValidateConfig,
) -> Iterator[Knockout]:
    """Every set to knock out; sizes beyond the ranking are left out.

    Raises:
        UserError: every size is beyond the ranking.
    """
    if min(config.sizes) > len(ranked):
        raise UserError(
            f"--sizes must hold a number of ranked heads, found {min(config.sizes)} and more where "
            f"the run has {len(ranked)}; choose smaller ones or locate with a larger --most."
        )
    rng = np.random.default_rng(config.seed)
    for k in config.sizes:
        if k > len(ranked):
            continue
        top = tuple(ranked[:k])
        yield Knockout("top", k, 0, top)
        yield Knockout("single_pass", k, 0, tuple(single_pass[:k]))
        for draw in range(config.controls):
            yield Knockout("matched", k, draw, matched_heads(top, model.heads, rng))
            anywhere = random_heads(top, model.layers, model.heads, rng)
            yield Knockout("random", k, draw, anywhere)


def knock_out(model: Model, task: Task, heads: Sequence[Head]) -> tuple[np.ndarray, np.ndarray]:
    """Mean-ablate heads at END.

    Returns:
        per pair, whether the answer is still the first choice among all tokens, and its logit
        difference against the other admissible answers.
    """
    states = task.states(model, heads)
    top = first_choice(model, states.final)
    logits = unembed(model, states.final, task.pairs.candidates).cpu().numpy()
    return top == task.tokens, measure(logits, task.pairs.answers)["logit_diff"]


def validate(model: Model, config: ValidateConfig, run: Path, work: Path) -> None:
    """The stage: knock out every planned set on the held-out pairs of every task.

    Controls run on the task that the heads were chosen on, the top-k sets on every task.
    Several processes (see `circuitune.ranks`) share the sets, each on all pairs.
    """
    record = ranks.first(lambda: _read_circuit(run))
    circuit = Circuit.from_json(record)
    single = [parse_component(item["id"]) for item in record["single_pass"]["components"]]
    pair_set = ranks.first(lambda: PairSet.load(run))
    tasks = {
        name: prepare(model, pair_set.of(name, "test"), pair_set.answers)
        for name in pair_set.tasks
        if pair_set.of(name, "test")
    }
    jobs = [
        (name, knockout)
        for knockout in plan(model, circuit.heads, single, config)
        for name in tasks
        if name == circuit.task or knockout.kind in ("top", "single_pass")
    ]
    jobs += [(name, Knockout("top", 0, 0, ())) for name in tasks]
    share = ranks.share()
    rows = []
    for name, knockout in tqdm(share.of(jobs), desc="knockout", disable=None, leave=False):
        hits, difference = knock_out(model, tasks[name], knockout.heads)
        groups = tasks[name].pairs.groups
        rng = np.random.default_rng(config.seed)
        alive = clustered_proportion(hits.astype(float), rng=rng, groups=groups)
        if knockout.k == 0 and hits.all():  # by selection, not by sampling
            alive = Interval(1.0, 1.0, 1.0, len(hits))
        rows.append(
            {
                "set": knockout.kind,
                "k": knockout.k,
                "draw": knockout.draw,
                "ablation": "mean",
                "where": "end",
                "task": name,
                "accuracy": alive.estimate,
                "n": len(hits),
                "low": alive.low,
                "high": alive.high,
                "logit_diff": float(difference.mean()),
                "heads": " ".join(str(head) for head in knockout.heads),
            }
        )
    frame = pd.DataFrame(share.collect(rows)).sort_values(
        ["task", "set", "k", "draw"], kind="stable"
    )
    frame.to_parquet(work / "knockout.parquet", index=False)


def _read_circuit(run: Path) -> dict[str, Any]:
    return json.loads((run / "circuit.json").read_text(encoding="utf-8"))
