"""Prove that the chosen heads matter: knockouts on the held-out half, with controls.

Heads are chosen on the select halves, everything here is measured on the test halves.

Curves over the number of heads are by mean ablation at END. At the circuit's own size the other
ablations and places of `circuitune.knockout` stand beside it. Beside the top-k sets stand

- ``single_pass``: the paper's ranking of one sweep;
- ``matched``: random heads, as many in each layer as the top-k set; ``random``: from anywhere;
- ``least``: the heads that move the answer least in the sweep, by mean absolute effect;
- ``other_task``: the circuit of a control task (`circuitune.controls`), made by the same rule;
- ``proposal``: after joint selection every set that was proposed (`circuitune.joint`), in all
  tasks; ``source`` names who proposed it.

The first four never hold a head of the set that they are compared with; the circuit of another
task may, since it is what it is. The circuit is also knocked out in the control tasks, which it
should spare (there on all prompts, right or wrong: ``change`` is accuracy minus that of the intact
model on the same prompts), and each control's circuit in its own task, where it should matter.

`circuitune.criteria` adds whether the circuit is faithful, complete and minimal.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from circuitune import ranks
from circuitune.components import Circuit, Head, check_components, parse_heads
from circuitune.config import LocateConfig, ValidateConfig
from circuitune.controls import KINDS, Control, make_controls
from circuitune.criteria import Sampler, judge
from circuitune.effects import EffectTable
from circuitune.errors import UserError
from circuitune.knockout import (
    ABLATIONS,
    PLACES,
    Ablation,
    Outcome,
    Spare,
    knock_out,
    measurable,
    prepare_spare,
)
from circuitune.models import Model
from circuitune.pairs import PairSet
from circuitune.ranks import Share
from circuitune.runs import STAGES, Progress, damaged, progress, read_circuit, write_json
from circuitune.selection import RULES, all_heads, iterated_selection
from circuitune.sites import Where
from circuitune.stats import Interval
from circuitune.tasks import Task, prepare, sweep

# Draws of layer-matched heads under the further ablations; each costs full passes.
FURTHER_DRAWS = 1
# Heads that a round of a control's selection measures exactly, the best by a gradient estimate.
SCREEN = 40


@dataclass(frozen=True)
class Knockout:
    """One set of heads to ablate: which kind (``set`` of knockout.parquet), size and draw.

    ``source`` is the task that the heads were chosen on, empty for random ones.
    """

    kind: str
    k: int
    draw: int
    heads: tuple[Head, ...]
    source: str = ""


@dataclass(frozen=True)
class Job:
    """A set to ablate in a task, by what and where."""

    task: str
    knockout: Knockout
    ablation: Ablation = "mean"
    where: Where = "end"

    def __str__(self) -> str:
        """A name that no other job of a run has."""
        own = self.knockout
        parts = (own.kind, own.k, own.draw, own.source, self.ablation, self.where)
        return "/".join(map(str, ("knockout", self.task, *parts)))


@dataclass(frozen=True)
class Rankings:
    """Heads in the orders that sets are taken from.

    Attributes:
        top: of the circuit, most important first.
        single_pass: of the paper's sweep.
        least: all heads of the sweep, the least important first.
        proposals: sets of joint selection, by whom and of what size.
    """

    top: tuple[Head, ...]
    single_pass: tuple[Head, ...]
    least: tuple[Head, ...]
    proposals: tuple[tuple[str, tuple[Head, ...]], ...] = ()


def matched_heads(
    heads: Sequence[Head], layers: int, per_layer: int, rng: np.random.Generator
) -> tuple[Head, ...]:
    """Random heads, as many in each layer as ``heads`` has, and none of them.

    Where a layer has too few other heads, the rest come from the nearest layers that have some;
    only a set of more than half of all heads gets fewer than it has.
    """
    free = _others(heads, layers, per_layer)
    drawn: list[Head] = []
    missing: list[int] = []
    for layer, count in sorted(Counter(head.layer for head in heads).items()):
        own = [head.index for head in free if head.layer == layer]
        picked = rng.choice(own, size=min(count, len(own)), replace=False)
        drawn += [Head(layer, int(index)) for index in sorted(picked)]
        missing += [layer] * (count - len(picked))
    for layer in missing:
        left = [head for head in free if head not in drawn]
        nearest = min((abs(head.layer - layer) for head in left), default=0)
        near = [head for head in left if abs(head.layer - layer) == nearest]
        drawn += [near[rng.integers(len(near))]] if near else []
    return tuple(sorted(drawn))


def random_heads(
    heads: Sequence[Head], layers: int, per_layer: int, rng: np.random.Generator
) -> tuple[Head, ...]:
    """As many random heads from anywhere, none of the given ones.

    Raises:
        UserError: the model has too few other heads.
    """
    free = _others(heads, layers, per_layer)
    if len(free) < len(heads):
        raise UserError(
            f"A random control needs {len(heads)} heads outside the set, the model has "
            f"{len(free)}; choose fewer heads."
        )
    picked = rng.choice(len(free), size=len(heads), replace=False)
    return tuple(free[index] for index in sorted(picked))


def _others(heads: Sequence[Head], layers: int, per_layer: int) -> list[Head]:
    """All heads but the given ones."""
    every = [Head(layer, index) for layer in range(layers) for index in range(per_layer)]
    return [head for head in every if head not in heads]


def plan(
    model: Model, rankings: Rankings, circuit: Circuit, config: ValidateConfig
) -> Iterator[Knockout]:
    """Every set of the circuit's own task; sizes beyond the ranking are left out.

    Raises:
        UserError: every size is beyond the ranking.
    """
    ranked = rankings.top
    if min(config.sizes) > len(ranked):
        raise UserError(
            f"--sizes must hold a number of ranked heads, found {min(config.sizes)} and more where "
            f"the run has {len(ranked)}; choose smaller ones or locate with a larger --most."
        )
    rng = np.random.default_rng(config.seed)
    for k in sorted({*config.sizes, own_size(circuit, config)}):
        if k > len(ranked):
            continue
        top = ranked[:k]
        yield Knockout("top", k, 0, top, circuit.task)
        yield Knockout("single_pass", k, 0, rankings.single_pass[:k], circuit.task)
        for draw in range(config.controls):
            yield Knockout("matched", k, draw, matched_heads(top, model.layers, model.heads, rng))
            anywhere = random_heads(top, model.layers, model.heads, rng)
            yield Knockout("random", k, draw, anywhere)
        least = tuple(head for head in rankings.least if head not in top)[:k]
        if len(least) == k:
            yield Knockout("least", k, 0, least, circuit.task)
    for by, heads in rankings.proposals:
        yield Knockout("proposal", len(heads), 0, heads, by)


def own_size(circuit: Circuit, config: ValidateConfig) -> int:
    """Number of heads of the circuit; the smallest size asked for where the rule left it open."""
    return min(circuit.size, len(circuit.heads)) or min(config.sizes)


def least_important(table: EffectTable) -> tuple[Head, ...]:
    """All heads of a sweep by mean absolute effect over the examples, the smallest first.

    Absolute, since a head that helps some prompts and harms others is not unimportant.
    """
    size = np.abs(table.effect("logit_diff")).mean(axis=1)
    parts = (table.components[row] for row in np.argsort(size, kind="stable"))
    return tuple(part for part in parts if isinstance(part, Head))


def further(config: ValidateConfig) -> list[tuple[Ablation, Where]]:
    """The ablations and places that are measured at the circuit's own size alone.

    Raises:
        UserError: an ablation or a place is unknown.
    """
    asked = (("ablations", config.ablations, ABLATIONS), ("where", config.where, PLACES))
    for name, given, known in asked:
        for item in given:
            if item not in known:
                raise UserError(
                    f"--{name} must be among {', '.join(known)}, found {item!r}; correct the name."
                )
    return [
        (ablation, where)
        for where in PLACES
        for ablation in ABLATIONS
        if where in config.where and ablation in config.ablations
        if (ablation, where) != ("mean", "end")
    ]


def control_circuit(
    model: Model, control: Control, answers: Sequence[str], rule: dict[str, Any], k: int
) -> tuple[Head, ...]:
    """The k heads of a control task, by the rule that chose the circuit, on its select half.

    The iterated rule screens with a gradient estimate; what it then chooses is measured exactly.
    It stands in for joint selection, which needs further tasks to spare.
    """
    task = prepare(model, control.of("select"), answers)
    if rule.get("name") not in (RULES["iterated"], RULES["joint"]):
        metric = rule.get("metric", "logit_diff")
        order = sweep(model, task, senders=all_heads(model)).rank(metric)
    else:
        # A gradient needs all weights at once.
        screen = 0 if model.offloaded else max(SCREEN, k)
        config = LocateConfig(most=k, draws=100, screen=screen)
        found, _ = iterated_selection(model, task, config, np.random.default_rng(0))
        order = [choice.component for choice in found]
    return tuple(part for part in order[:k] if isinstance(part, Head))


@dataclass(frozen=True)
class Others:
    """The control tasks of a model, and the circuits of those that it answers.

    Attributes:
        controls: every control task, also those without pairs.
        circuits: heads by control task, most important first.
        answers: further admissible answers of each.
    """

    controls: list[Control]
    circuits: dict[str, tuple[Head, ...]]
    answers: dict[str, Sequence[str]]

    def to_json(self, heads: Sequence[Head]) -> list[dict[str, Any]]:
        """Counts of every control, and how many heads its circuit shares with the given ones."""
        found = []
        for control in self.controls:
            facts = {"task": control.name, **control.facts, "kept": bool(control.pairs)}
            if own := self.circuits.get(control.name):
                facts["heads"] = [str(head) for head in own]
                facts["shared"] = len(set(own) & set(heads))
            found.append(facts)
        return found


def find_others(
    model: Model, pair_set: PairSet, circuit: Circuit, k: int, *, share: Share, parts: Progress
) -> Others:
    """Make the control tasks and find the k heads of each; processes share the tasks."""
    # The seed of the pairs, so that joint selection has seen the select halves alone.
    seed = pair_set.selection.get("seed", 0)
    controls = make_controls(model, pair_set.selection, taken=pair_set.tasks, seed=seed)
    kept = [control for control in controls if control.pairs]
    answers = {c.name: pair_set.answers if KINDS[c.name].digits else () for c in kept}

    def find(control: Control) -> list[str]:
        heads = control_circuit(model, control, answers[control.name], circuit.rule, k)
        return [str(head) for head in heads]

    found = [parts.once(f"heads/{item.name}", partial(find, item)) for item in share.of(kept)]
    circuits = map(parse_heads, share.collect(found))
    names = [control.name for control in kept]
    return Others(controls, dict(zip(names, circuits, strict=True)), answers)


def all_jobs(
    planned: Sequence[Knockout], others: Others, tasks: Sequence[str], circuit: Circuit, size: int
) -> list[Job]:
    """Every run by mean ablation at END, in an order that all processes agree on.

    Controls run on the task that the heads were chosen on, the rankings on every task of the
    run, the circuit also on the control tasks.
    """
    names = [name for name in tasks if name not in others.circuits]
    jobs = [Job(name, Knockout("top", 0, 0, (), circuit.task)) for name in tasks]
    for item in planned:
        reach = {"top": tasks, "proposal": tasks, "single_pass": names}
        everywhere = reach.get(item.kind, (circuit.task,))
        jobs += [Job(name, item) for name in everywhere]
    sizes = sorted({item.k for item in planned if item.k <= size})
    for draw, (source, heads) in enumerate(others.circuits.items()):
        for k in sizes:
            item = Knockout("other_task", k, draw, heads[:k], source)
            jobs += [Job(name, item) for name in (circuit.task, source)]
    return jobs


def further_jobs(
    planned: Sequence[Knockout], kinds: Sequence[tuple[Ablation, Where]], task: str, size: int
) -> list[Job]:
    """The further ablations of sets of the circuit's own size, on its own task."""
    chosen = [item for item in planned if item.k == size and item.draw < FURTHER_DRAWS]
    chosen = [item for item in chosen if item.kind in ("top", "matched", "least")]
    return [Job(task, item, *kind) for kind in kinds for item in chosen]


def spare_for(model: Model, task: Task, jobs: Sequence[Job], rng: np.random.Generator) -> Spare:
    """What the further ablations of some jobs need, see `circuitune.knockout.prepare_spare`."""
    everywhere = [job for job in jobs if job.where == "all" and job.ablation != "zero"]
    heads = sorted({head for job in everywhere for head in job.knockout.heads})
    return prepare_spare(model, task, heads, rng)


def row_of(job: Job, found: Outcome, groups: Sequence[str], seed: int) -> dict[str, Any]:
    """One row of ``knockout.parquet``."""
    sampler = Sampler(groups, seed)
    alive = sampler.rate(found.correct)
    if not job.knockout.heads and found.correct.all():  # by selection, not by sampling
        alive = Interval(1.0, 1.0, 1.0, len(found.correct))
    difference, divergence = sampler.mean(found.logit_diff), sampler.mean(found.kl)
    change = sampler.paired(found.correct, found.intact)
    return {
        "set": job.knockout.kind,
        "k": job.knockout.k,
        "draw": job.knockout.draw,
        "ablation": job.ablation,
        "where": job.where,
        "task": job.task,
        "accuracy": alive.estimate,
        "n": len(found.correct),
        "low": alive.low,
        "high": alive.high,
        "change": change.estimate,
        "change_low": change.low,
        "change_high": change.high,
        "logit_diff": difference.estimate,
        "logit_diff_low": difference.low,
        "logit_diff_high": difference.high,
        "kl": divergence.estimate,
        "kl_low": divergence.low,
        "kl_high": divergence.high,
        "source": job.knockout.source,
        "data": "" if job.ablation == "zero" else data_of(job.task),
        "heads": " ".join(str(head) for head in job.knockout.heads),
    }


def data_of(task: str) -> str:
    """The prompts that a mean or a donor comes from, in words."""
    return f"the corrupt prompts of {task}, test half"


def run_job(model: Model, task: Task, job: Job, spare: Spare, seed: int) -> dict[str, Any] | None:
    """One row, or None where no example can be measured (resampling without a donor)."""
    examples = measurable(task, spare, job.ablation, job.where)
    if not examples:
        return None
    how = {"ablation": job.ablation, "where": job.where, "spare": spare}
    found = knock_out(model, task, job.knockout.heads, **how)
    return row_of(job, found, [task.pairs.groups[place] for place in examples], seed)


def validate(model: Model, config: ValidateConfig, run: Path, work: Path) -> None:
    """The stage: knock out every planned set, judge the circuit; writes both files.

    Several processes (see `circuitune.ranks`) share the runs, each on all pairs.

    Raises:
        UserError: an option is wrong, or a file of the run does not fit the model.
    """
    kinds = further(config)
    circuit, rankings = ranks.first(lambda: read_rankings(run))
    check_components([*rankings.top, *rankings.single_pass], model.layers, model.heads)
    check_components(rankings.least, model.layers, model.heads)
    pair_set = ranks.first(lambda: PairSet.load(run))
    size, share = own_size(circuit, config), ranks.share()
    process = f"-{ranks.rank()}-of-{ranks.world()}"
    parts = progress(run, STAGES["validate"], config, process=process)
    planned = list(plan(model, rankings, circuit, config))
    others = Others([], {}, {})
    if config.control_tasks:
        others = find_others(model, pair_set, circuit, size, share=share, parts=parts)
    halves = {name: pair_set.of(name, "test") for name in pair_set.tasks}
    tasks = {n: prepare(model, pairs, pair_set.answers) for n, pairs in halves.items() if pairs}
    for control in others.controls:
        if control.pairs:
            answers = others.answers[control.name]
            tasks[control.name] = prepare(model, control.all_of("test"), answers)
    if circuit.task not in tasks:
        raise UserError(
            f"The test half must hold pairs of {circuit.task}, the circuit's task, {run} has none; "
            "add some and locate again."
        )
    jobs = all_jobs(planned, others, list(tasks), circuit, size)
    jobs += further_jobs(planned, kinds, circuit.task, size)
    spare = spare_for(
        model, tasks[circuit.task], share.of(jobs), np.random.default_rng(config.seed)
    )
    rows = [
        parts.once(str(job), partial(run_job, model, tasks[job.task], job, spare, config.seed))
        for job in tqdm(share.of(jobs), desc="knockout", disable=None, leave=False)
    ]
    whole = share.collect(rows)
    order = ["task", "set", "k", "draw", "where", "ablation"]
    frame = pd.DataFrame([row for row in whole if row]).sort_values(order, kind="stable")
    frame.to_parquet(work / "knockout.parquet", index=False)
    heads = rankings.top[:size]
    judged = partial(judge, model, tasks[circuit.task], heads, seed=config.seed, share=share)
    content = {
        "task": circuit.task,
        "ablation": f"mean over {data_of(circuit.task)}, at END",
        # Several processes judge together, so none may find its part done before.
        **(parts.once("criteria", judged) if share.world == 1 else judged()),
        "controls": others.to_json(heads),
        "without_donor": sum(row is None for row in whole),
    }
    write_json(work / "validate.json", content)
    parts.forget()


def read_rankings(run: Path) -> tuple[Circuit, Rankings]:
    """The circuit of a run, and the orders that `locate` put the heads in.

    Raises:
        UserError: ``circuit.json`` or ``effects.parquet`` is damaged.
    """
    record, circuit = read_circuit(run)
    try:
        heads = parse_heads(item["id"] for item in record["single_pass"]["components"])
        made = circuit.rule.get("proposals", ())
        proposals = tuple((item["by"], parse_heads(item["heads"])) for item in made)
    except (LookupError, TypeError, AttributeError) as error:
        raise damaged(run / "circuit.json", error) from error
    table = EffectTable.load(run / "effects.parquet")
    return circuit, Rankings(circuit.heads, heads, least_important(table), proposals)
