"""The stage that asks how far a circuit reaches: heads found on one task, knocked out in others.

Every task gives its own heads, found by the circuit's rule on its select half (those of the run's
own task are the circuit). Each set is mean-ablated at END in the test half of every task
(`circuitune.knockout`), so the matrix says which tasks share heads and which do without them.

``transfer.parquet`` has the columns of ``knockout.parquet``: ``set`` is ``top`` with k = 0 (the
intact model), ``source`` (heads of the task ``source``) or ``matched`` (random heads of the
circuit's layers); ``task`` is the target. Only prompts that the model answers are kept, so the
intact accuracy is 1.

``transfer.json`` holds ``tasks`` (how many prompts were tried, right and kept, and the heads;
``near_chance`` tells that the model is not shown to beat one that always says the ``commonest``
answer, so many of its right prompts may be lucky; of the run's own tasks this is not known),
``overlap`` (heads that the first ones of two tasks share, against what sets with as many heads in
each layer would share by chance), ``choices`` (accuracy on public multiple-choice questions before
and after the knockout, `circuitune.choosing`; under ``tasks`` that of each task of a data set, with
the ``chance`` of guessing) and ``tuned`` (how direct effects differ between the base and the tuned
model, `circuitune.changes`); a part that could not be made is a note.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from circuitune import choosing
from circuitune.changes import changes
from circuitune.components import Circuit, Head, check_components, parse_heads
from circuitune.config import TransferConfig
from circuitune.controls import Control
from circuitune.errors import UserError
from circuitune.knockout import knock_out
from circuitune.models import Model
from circuitune.pairs import Pair, PairSet, Split
from circuitune.readers import questions
from circuitune.runs import STAGES, Progress, progress, read_circuit, write_json
from circuitune.sources import SOURCES, make_sources
from circuitune.tasks import prepare
from circuitune.validate import Job, Knockout, control_circuit, matched_heads, row_of

# Public multiple-choice data sets on which nothing is calculated.
CHOICES = ("commonsense_qa", "bbh")
HUB = "hub"
# Heads of a set where the circuit's rule left their number open.
DEFAULT_HEADS = 5
NO_DATA = (
    "word problems and multiple-choice questions need data sets: give --data-dir a folder that "
    "holds them, or --data-dir hub"
)


@dataclass(frozen=True)
class Place:
    """A task of the matrix: its pairs, what more may be answered, and what is known of it.

    Attributes:
        name: the task.
        family: ``own`` (of the run), ``arithmetic``, ``word problem`` or ``control``.
        pairs: pairs of both halves; empty where the model answers too few.
        answers: further admissible answers.
        facts: counts of the prompts.
    """

    name: str
    family: str
    pairs: tuple[Pair, ...]
    answers: Sequence[str]
    facts: dict[str, Any]

    def of(self, split: Split) -> list[Pair]:
        """The pairs of one half."""
        return [pair for pair in self.pairs if pair.split == split]


def transfer(model: Model, config: TransferConfig, run: Path, work: Path) -> None:
    """The stage; writes ``transfer.parquet`` and ``transfer.json``.

    Args:
        model: the model.
        config: options.
        run: the run directory, read for pairs, circuit and, if there, the tuned heads.
        work: where the files are written.

    Raises:
        UserError: a task is unknown, or a data set cannot be had.
    """
    _, circuit = read_circuit(run)
    check_components(circuit.heads, model.layers, model.heads)
    if not circuit.heads:
        raise UserError(
            "A transfer needs at least one key head, circuit.json has none; locate with a larger "
            "--most."
        )
    pair_set = PairSet.load(run)
    parts = progress(run, STAGES["transfer"], config)
    k = config.heads or circuit.size or min(DEFAULT_HEADS, len(circuit.heads))
    asked = _questions(model, config)
    places = _places(model, pair_set, config)
    kept = [place for place in places if place.pairs]
    if circuit.task not in [place.name for place in kept]:
        raise UserError(
            f"A transfer starts from pairs of {circuit.task}, the circuit's task, {run} has none; "
            "add some and locate again."
        )
    heads = {
        place.name: _heads_of(model, place, circuit, max(k, config.overlap), parts)
        for place in tqdm(kept, desc="heads of each task", disable=None, leave=False)
    }
    sets = _sets(heads, circuit, k, config, model)
    rows = [
        row
        for place in tqdm(kept, desc="knockout", disable=None, leave=False)
        for row in parts.once(f"rows/{place.name}", partial(_rows, model, place, sets, config))
    ]
    pd.DataFrame(rows).to_parquet(work / "transfer.parquet", index=False)
    content = {
        "task": circuit.task,
        "k": k,
        "ablation": "mean over the corrupt prompts of each target, test half, at END",
        "tasks": [_told(place, heads, k) for place in places],
        "overlap": overlaps(heads, config.overlap, model.heads),
        "choices": _choices(model, asked, sets, config, parts),
        "tuned": parts.once("tuned", partial(_changed, model, run, config)),
        "notes": {} if config.data_dir else {"data": NO_DATA},
    }
    write_json(work / "transfer.json", content)
    parts.forget()


# ------------------------------------------------------------------------------------- the tasks


def _folder(config: TransferConfig) -> Path | None:
    """The folder with data sets, or None for the hub."""
    return None if config.data_dir in (None, HUB) else Path(str(config.data_dir)).expanduser()


def _questions(model: Model, config: TransferConfig) -> dict[str, list[choosing.MultipleChoice]]:
    """Multiple-choice questions of each data set; none without data.

    Raises:
        UserError: a set cannot be had, or a question does not fit the model.
    """
    if config.data_dir is None or not config.questions:
        return {}
    how = {"limit": config.questions, "seed": config.seed}
    try:
        found = {name: questions(name, _folder(config), **how) for name in CHOICES}
        for items in found.values():
            choosing.tokenised(model, items)  # refused now, not after all knockouts
    except UserError as error:
        less = "or ask no multiple-choice questions with --questions 0"
        raise UserError(f"{str(error).removesuffix('.')}, {less}.") from error
    return found


def wanted(config: TransferConfig, own: Sequence[str]) -> list[str]:
    """Names of the tasks beside the run's own.

    Raises:
        UserError: a word problem is asked for, and there are no data.
    """
    if config.tasks == ("none",):
        return []
    if config.tasks != ("all",):
        needy = [name for name in config.tasks if _needs_data(name)]
        if needy and config.data_dir is None:
            raise UserError(
                f"Task {needy[0]} must have its data set; give --data-dir a folder that holds it, "
                "or --data-dir hub."
            )
        return [name for name in config.tasks if name not in own]
    names = [name for name in SOURCES if name not in own]
    return [name for name in names if config.data_dir or not _needs_data(name)]


def _needs_data(name: str) -> bool:
    return name in SOURCES and SOURCES[name].family == "word problem"


def _places(model: Model, pair_set: PairSet, config: TransferConfig) -> list[Place]:
    """The run's own tasks, then the others."""
    found = []
    for name in pair_set.tasks:
        halves = {split: pair_set.of(name, split) for split in ("select", "test")}
        pairs = tuple(pair for own in halves.values() for pair in own[: config.per_split])
        facts = {**pair_set.selection["tasks"].get(name, {})}
        facts |= {split: min(config.per_split, len(own)) for split, own in halves.items()}
        found.append(Place(name, "own", pairs, pair_set.answers, facts))
    made: list[Control] = make_sources(
        model,
        pair_set.selection,
        wanted(config, pair_set.tasks),
        data_dir=_folder(config),
        per_split=config.per_split,
        seed=config.seed,
    )
    for control in made:
        source = SOURCES[control.name]
        answers = pair_set.answers if source.digits else ()
        found.append(Place(control.name, source.family, control.pairs, answers, control.facts))
    return found


def _heads_of(
    model: Model, place: Place, circuit: Circuit, most: int, parts: Progress
) -> tuple[Head, ...]:
    """A task's heads, most important first; the circuit's own come first in its task."""

    def find() -> list[str]:
        order = list(circuit.heads) if place.name == circuit.task else []
        if len(order) < most:
            own = Control(place.name, place.pairs, place.facts)
            more = control_circuit(model, own, place.answers, circuit.rule, most)
            order += [head for head in more if head not in order]
        return [str(head) for head in order[:most]]

    return parse_heads(parts.once(f"heads/{place.name}", find))


def _told(place: Place, heads: Mapping[str, Sequence[Head]], k: int) -> dict[str, Any]:
    facts = {"task": place.name, "family": place.family, **place.facts, "kept": bool(place.pairs)}
    if place.facts.get("one_token") and "commonest" in place.facts:
        facts["near_chance"] = near_chance(place.facts)
    own = heads.get(place.name, ())
    return facts | {"heads": [str(head) for head in own[:k]], "ranked": [str(h) for h in own]}


def near_chance(facts: Mapping[str, Any]) -> bool:
    """Whether a model is not shown to beat always saying the commonest answer.

    Args:
        facts: how many prompts have a ``one_token`` answer and how many of these the
            ``commonest`` one; the ``low`` end of the interval of the rate of right ones.

    Returns:
        whether the lower bound of the rate of right answers is at most the share of the
        commonest answer.
    """
    return facts["low"] <= facts["commonest"] / facts["one_token"]


# ------------------------------------------------------------------------------------ the matrix


def _sets(
    heads: Mapping[str, Sequence[Head]],
    circuit: Circuit,
    k: int,
    config: TransferConfig,
    model: Model,
) -> list[Knockout]:
    """The intact model, every source and random heads of the circuit's layers."""
    rng = np.random.default_rng(config.seed)
    found = [Knockout("top", 0, 0, (), circuit.task)]
    for name, some in heads.items():
        found.append(Knockout("source", len(some[:k]), 0, tuple(some[:k]), name))
    own = heads[circuit.task][:k]
    for draw in range(config.controls):
        drawn = matched_heads(own, model.layers, model.heads, rng)
        found.append(Knockout("matched", len(drawn), draw, drawn))
    return found


def _rows(
    model: Model, place: Place, sets: Sequence[Knockout], config: TransferConfig
) -> list[dict[str, Any]]:
    """All knockouts in one target."""
    task = prepare(model, place.of("test"), place.answers)
    return [
        row_of(
            Job(place.name, item),
            knock_out(model, task, item.heads),
            task.pairs.groups,
            config.seed,
        )
        for item in sets
    ]


# ----------------------------------------------------------------------------------- the overlap


def overlaps(heads: Mapping[str, Sequence[Head]], k: int, per_layer: int) -> list[dict[str, Any]]:
    """Heads that the first k of every two tasks share, against chance.

    Chance: both sets keep their number of heads in each layer, which heads is drawn anew. The
    number shared is then a sum of hypergeometric ones, taken exactly, not by drawing.

    Args:
        heads: heads of each task, most important first.
        k: how many are compared.
        per_layer: heads of a layer.

    Returns:
        per pair of tasks ``a``, ``b``, ``k``, ``shared``, ``expected``, ``high`` (97.5 % of the
        random pairs share no more) and ``p`` of sharing at least as many.
    """
    names = list(heads)
    found = []
    for place, a in enumerate(names):
        for b in names[place + 1 :]:
            first, second = set(heads[a][:k]), set(heads[b][:k])
            chance = shared_by_chance(first, second, per_layer)
            shared = len(first & second)
            facts = {"a": a, "b": b, "k": min(len(first), len(second)), "shared": shared}
            mean = float(chance @ np.arange(len(chance)))
            high = int(np.searchsorted(chance.cumsum(), 0.975))
            found.append(
                facts | {"expected": mean, "high": high, "p": float(chance[shared:].sum())}
            )
    return found


def shared_by_chance(first: set[Head], second: set[Head], per_layer: int) -> np.ndarray:
    """Probability that random sets with as many heads in each layer share 0, 1, 2, ... heads."""
    from scipy.stats import hypergeom

    ones, others = (Counter(head.layer for head in some) for some in (first, second))
    chance = np.ones(1)
    for layer in ones.keys() & others.keys():
        most = min(ones[layer], others[layer])
        own = hypergeom(per_layer, ones[layer], others[layer]).pmf(np.arange(most + 1))
        chance = np.convolve(chance, own)
    return chance


# ------------------------------------------------------------------- other abilities, and tuning


def _choices(
    model: Model,
    asked: Mapping[str, Sequence[choosing.MultipleChoice]],
    sets: Sequence[Knockout],
    config: TransferConfig,
    parts: Progress,
) -> list[dict[str, Any]]:
    """Multiple-choice accuracy with the heads of the run's task and random ones ablated."""
    own = sets[0].source
    picked = [item for item in sets if item.kind == "matched" or item.source == own]
    picked = [item for item in picked if item.heads]
    found: list[dict[str, Any]] = []
    for data, items in asked.items():
        found += parts.once(f"choices/{data}", partial(_scored, model, data, items, picked, config))
    return found


def _scored(
    model: Model,
    data: str,
    items: Sequence[choosing.MultipleChoice],
    sets: Sequence[Knockout],
    config: TransferConfig,
) -> list[dict[str, Any]]:
    prepared = choosing.prepare(model, items)
    every = sorted({head for item in sets for head in item.heads})
    means = choosing.mean_outputs(model, prepared, every)
    intact = choosing.score(model, prepared)
    rows = []
    for item in tqdm(sets, desc=data, disable=None, leave=False):
        after = choosing.score(model, prepared, item.heads, means)
        facts = {"data": data, "set": item.kind, "source": item.source, "draw": item.draw}
        facts["heads"] = [str(head) for head in item.heads]
        facts["tasks"] = _by_task(items, intact, after, seed=config.seed)
        rows.append(facts | choosing.compare(intact, after, seed=config.seed))
    return rows


def _by_task(
    items: Sequence[choosing.MultipleChoice],
    before: choosing.Scores,
    after: choosing.Scores,
    *,
    seed: int,
) -> list[dict[str, Any]]:
    """The same for each task of a data set that holds several, beside what guessing would give.

    On a task at chance the model has nothing to lose; a knockout may still turn its guesses.
    """
    places: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        places.setdefault(item.id.rpartition("/")[0], []).append(place)
    if len(places) < 2:
        return []
    rows = []
    for task, own in places.items():
        found = choosing.compare(before.of(own), after.of(own), seed=seed)
        chance = float(np.mean([1 / len(items[place].choices) for place in own]))
        rows.append({"task": task, "chance": chance} | found)
    return rows


def _changed(model: Model, run: Path, config: TransferConfig) -> dict[str, Any]:
    """What tuning did to the direct effects, or why that cannot be told."""
    if not (run / "tuned").is_dir():
        return {"note": "nothing is tuned yet: `circuitune tune RUN`, then transfer again"}
    try:
        return changes(model, run, seed=config.seed)
    except UserError as error:
        return {"note": str(error)}
