"""Joint selection: a small set of heads whose removal destroys tasks and spares others.

Effects of single heads do not add up: backups take over, and some heads serve every task. So sets
are judged as sets, by their exact knockout (mean ablation at END) in the tasks to destroy, the
*targets*, and in those to *spare*. Four ways propose a set of every size:

- ``iterated``: iterated path patching on the targets together (`circuitune.selection`);
- ``greedy``: a beam search that adds the head whose exact joint knockout does best;
- ``mask``: the strongest heads of a gradient mask (`circuitune.masks`);
- ``single_pass``: the ranking of Zhang et al. (2024), one sweep by relative logit.

Of the sets that reach the goal (of all, if none does) the best wins, or a smaller one that is
nearly as good. Sets are compared by accuracy and by logit difference: with few operand pairs
accuracy alone picks sets that are lucky on them (docs/log.md). Everything here sees the select half
only; `circuitune validate` measures all proposals on the other half.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from circuitune.components import Choice, Component, Head, parse_heads
from circuitune.config import LocateConfig
from circuitune.effects import EffectTable, measure
from circuitune.errors import UserError
from circuitune.knockout import final_at_end
from circuitune.masks import by_mask, check_in_memory, learn_mask
from circuitune.models import Model
from circuitune.pairs import Pair
from circuitune.patching import EndStates, first_choice, unembed
from circuitune.selection import RULES, iterated_selection
from circuitune.stats import bootstrap_mean
from circuitune.tasks import Task, prepare

PROPOSERS = ("iterated", "greedy", "mask", "single_pass")
# Sets that the beam search carries on from each size to the next.
BEAM = 2
# Heads that each ranking contributes to the pool of the beam search.
POOL = 12
# Heads that a round of the iterated ranking measures exactly, the best by a gradient estimate.
SCREEN = 40
# Pairs of each task that the search looks at; what it proposes is judged on all.
SEARCHED = 40
# Weight of what spared tasks lose, and of a logit, against the accuracy of the targets.
HARM_WEIGHT, LOGIT_WEIGHT = 2.0, 0.2
# A smaller set is taken if its loss is at most this much above the best one's.
NEARLY = 0.1


@dataclass(frozen=True)
class Left:
    """What is left of each task with a set of heads ablated.

    Attributes:
        accuracy: share of the pairs whose answer is still the first choice among the admissible
            answers (cheaper than among all tokens, and never less).
        logit_diff: mean logit difference, in logits.
    """

    accuracy: dict[str, float]
    logit_diff: dict[str, float]


@dataclass(frozen=True)
class Panel:
    """Tasks that are watched together while sets of heads are ablated.

    Attributes:
        model: the model.
        task: the pairs of all tasks as one; means are those of each task.
        rows: places of each task's pairs.
        targets: tasks to destroy.
        spared: tasks to keep.
        admissible: which candidates compete with each answer: those of the same task.
        measured: every set so far; its size is the compute used, in passes over END of all pairs.
    """

    model: Model
    task: Task
    rows: dict[str, list[int]]
    targets: tuple[str, ...]
    spared: tuple[str, ...]
    admissible: Bool[np.ndarray, "example candidate"]
    measured: dict[frozenset[Head], Left] = field(default_factory=dict)

    def left(self, heads: Iterable[Head]) -> Left:
        """What is left of each task with heads ablated; measured once."""
        key = frozenset(heads)
        if key not in self.measured:
            logits = self._logits(self._final(key))
            correct = logits.argmax(axis=1) == self.task.pairs.answers
            difference = measure(logits, self.task.pairs.answers)["logit_diff"]
            self.measured[key] = Left(self._by_task(correct), self._by_task(difference))
        return self.measured[key]

    def answered(self, heads: Iterable[Head]) -> dict[str, float]:
        """Share of each task's pairs whose answer is still the first choice among all tokens."""
        final = self._final(frozenset(heads))
        return self._by_task(first_choice(self.model, final) == self.task.tokens)

    def differences(self, heads: Iterable[Head]) -> Float[np.ndarray, " example"]:
        """Logit difference of every pair with heads ablated, in logits."""
        logits = self._logits(self._final(frozenset(heads)))
        return measure(logits, self.task.pairs.answers)["logit_diff"]

    def _by_task(self, values: np.ndarray) -> dict[str, float]:
        return {name: float(values[rows].mean()) for name, rows in self.rows.items()}

    def _final(self, heads: frozenset[Head]) -> Float[Tensor, "example width"]:
        if not heads:
            return self.task.clean.final
        d_head = self.model.d_head
        edits = {head: self.task.average.output(head, d_head) for head in sorted(heads)}
        return final_at_end(self.model, self.task, edits)

    def _logits(
        self, final: Float[Tensor, "example width"]
    ) -> Float[np.ndarray, "example candidate"]:
        """Logits of the admissible answers, minus infinity elsewhere."""
        logits = unembed(self.model, final, self.task.pairs.candidates).cpu().numpy()
        return np.where(self.admissible, logits, -np.inf)

    def weights(self) -> Float[np.ndarray, " example"]:
        """Share of each pair in its kind, every task counting the same; negative where spared."""
        found = np.zeros(len(self.task.pairs.answers))
        for names, sign in ((self.targets, 1.0), (self.spared, -1.0)):
            for name in names:
                found[self.rows[name]] = sign / len(names) / len(self.rows[name])
        return found

    def loss(self, heads: Iterable[Head], harm: float) -> float:
        """How far a set is from destroying the targets and sparing the rest; lower is better."""
        now, intact = self.left(heads), self.left(())
        gone = [now.accuracy[name] for name in self.targets]
        moved = [now.logit_diff[name] - intact.logit_diff[name] for name in self.targets]
        excess = sum(max(0.0, lost - harm / 2) for lost in self.harm(heads).values())
        return float(np.mean(gone) + LOGIT_WEIGHT * np.mean(moved) + HARM_WEIGHT * excess)

    def harm(self, heads: Iterable[Head]) -> dict[str, float]:
        """Accuracy that each spared task lost."""
        now, intact = self.left(heads).accuracy, self.left(()).accuracy
        return {name: intact[name] - now[name] for name in self.spared}


def panel(
    model: Model,
    targets: Mapping[str, Sequence[Pair]],
    spared: Mapping[str, Sequence[Pair]],
    answers: Sequence[str] = (),
    *,
    most: int | None = None,
) -> Panel:
    """Run all pairs of some tasks together; every task keeps the mean over its own corrupt runs.

    Args:
        model: the model.
        targets: pairs of each task to destroy.
        spared: pairs of each task to keep, also those that the model gets wrong.
        answers: further admissible answers, of the targets and of tasks that share one with them.
        most: most pairs of a task; all by default.
    """
    every = {name: own[:most] for name, own in {**targets, **spared}.items()}
    pairs = [pair for own in every.values() for pair in own]
    task = prepare(model, pairs, answers)
    ends = np.cumsum([0, *(len(own) for own in every.values())])
    rows = {name: list(range(ends[i], ends[i + 1])) for i, name in enumerate(every)}
    task = replace(task, average=_averaged_by(task.corrupt, list(rows.values())))
    admissible = _admissible(task, rows, tuple(targets))
    return Panel(model, task, rows, tuple(targets), tuple(spared), admissible)


def _admissible(
    task: Task, rows: Mapping[str, list[int]], targets: Sequence[str]
) -> Bool[np.ndarray, "example candidate"]:
    """Per pair the candidates of its task; targets, and tasks like them, share theirs."""
    answers, count = task.pairs.answers, len(task.pairs.candidates)
    # A candidate that is nobody's answer was given as a further admissible one.
    shared = set(range(count)) - set(answers.tolist())
    shared |= {int(place) for name in targets for place in answers[rows[name]]}
    found = np.zeros((len(answers), count), dtype=bool)
    for own in rows.values():
        places = set(answers[own].tolist())
        found[np.ix_(own, sorted(places | shared if places & shared else places))] = True
    return found


def _averaged_by(states: EndStates, blocks: Sequence[Sequence[int]]) -> EndStates:
    """Every example replaced by the mean over its block (for z and mlp)."""
    z, mlp = states.z.clone(), states.mlp.clone()
    for block in blocks:
        for values in (z, mlp):
            values[:, block] = values[:, block].mean(dim=1, keepdim=True)
    return replace(states, z=z, mlp=mlp)


def joint_selection(
    model: Model,
    watched: Panel,
    searched: Panel,
    target: Task,
    table: EffectTable,
    config: LocateConfig,
    rng: np.random.Generator,
) -> tuple[list[Choice], dict[str, Any], int]:
    """The set of heads that best reaches the goal on the select half.

    Args:
        model: the model.
        watched: the tasks to destroy and to spare, select half.
        searched: the same with fewer pairs of each task, for the search.
        target: the pairs of all tasks to destroy as one task, for the rankings.
        table: direct effects of all heads on ``target`` in the intact model.
        config: options.
        rng: draws intervals.

    Returns:
        the heads in the order of what each adds, the record of the rule with every proposal, and
        their number.
    """
    most = largest(model, config)
    rankings = _rankings(model, searched, target, table, config, rng)
    pool = list(dict.fromkeys(head for ranking in rankings.values() for head in ranking[:POOL]))
    sets = {name: [ranking[:k] for k in range(1, most + 1)] for name, ranking in rankings.items()}
    sets["greedy"] = beam_search(searched, pool, most, config.harm)
    proposals = [
        _proposal(watched, name, heads, config) for name in PROPOSERS for heads in sets[name]
    ]
    chosen = best_of(proposals)
    order = in_order(watched, parse_heads(chosen["heads"]), config.harm)
    found = _choices(watched, order, config, rng)
    record = {
        "name": RULES["joint"],
        "metric": "accuracy",
        "ablation": "mean over the corrupt prompts of each task, at END",
        "targets": list(watched.targets),
        "spared": list(watched.spared),
        "pairs": {name: len(rows) for name, rows in watched.rows.items()},
        "intact": watched.answered(()),
        "goal": {"left": config.left, "harm": config.harm, "reached": chosen["reached"]},
        "by": chosen["by"],
        "evaluated_sets": len(watched.measured) + len(searched.measured),
        "proposals": proposals,
        "curve": _curve(watched, order),
    }
    return found, record, len(found)


def check_joint(model: Model, config: LocateConfig) -> None:
    """Refuse what joint selection cannot do, before anything is measured.

    Raises:
        UserError: a goal that no set could reach or that every set reaches, or offloaded weights.
    """
    check_in_memory(model)
    for name in ("left", "harm", "share"):
        value = getattr(config, name)
        if not 0 < value < 1:
            raise UserError(
                f"--{name} must be a share between 0 and 1, found {value}; try "
                f"{LocateConfig.__dataclass_fields__[name].default}."
            )


def largest(model: Model, config: LocateConfig) -> int:
    """Most heads of a set: a share of all heads, at least 2."""
    return min(max(2, int(config.share * model.layers * model.heads)), config.most)


def _rankings(
    model: Model,
    searched: Panel,
    target: Task,
    table: EffectTable,
    config: LocateConfig,
    rng: np.random.Generator,
) -> dict[str, list[Head]]:
    """Heads in the order of each proposer but the beam search, and of one sweep."""
    quick = replace(config, draws=100, most=POOL, race=0.0, screen=SCREEN)
    iterated, _ = iterated_selection(model, target, quick, rng)
    mask = learn_mask(model, searched.task, searched.admissible, searched.weights())
    return {
        "iterated": _heads(choice.component for choice in iterated),
        "mask": by_mask(mask),
        "single_pass": _heads(table.rank("relative_logit")),
        "direct": _heads(table.rank("logit_diff")),
    }


def _heads(parts: Iterable[Component]) -> list[Head]:
    return [part for part in parts if isinstance(part, Head)]


def beam_search(watched: Panel, pool: Sequence[Head], most: int, harm: float) -> list[list[Head]]:
    """The best set of each size up to ``most``, grown head by head from the best smaller sets."""
    best, beam = [], [frozenset[Head]()]
    for _ in range(most):
        grown = {heads | {head} for heads in beam for head in pool if head not in heads}
        ranked = sorted(grown, key=lambda heads: (watched.loss(heads, harm), sorted(heads)))
        beam = ranked[:BEAM]
        best.append(sorted(beam[0]))
    return best


def in_order(watched: Panel, heads: Sequence[Head], harm: float) -> list[Head]:
    """The heads of a set, each the one that does most beside those before it."""
    order: list[Head] = []
    while len(order) < len(heads):
        rest = [head for head in heads if head not in order]
        order.append(min(rest, key=lambda head: watched.loss([*order, head], harm)))
    return order


def _proposal(
    watched: Panel, name: str, heads: Sequence[Head], config: LocateConfig
) -> dict[str, Any]:
    answered = watched.answered(heads)
    intact = watched.answered(())
    lost = [max(0.0, intact[name] - answered[name]) for name in watched.spared]
    destroyed = max(answered[name] for name in watched.targets) <= config.left
    return {
        "by": name,
        "k": len(heads),
        "heads": [str(head) for head in heads],
        "accuracy": answered,
        "logit_diff": watched.left(heads).logit_diff,
        "loss": watched.loss(heads, config.harm),
        # Few prompts make the loss of one task coarse, so spared tasks count on average; a gain
        # in one, though, makes up for no loss in another.
        "reached": destroyed and float(np.mean(lost or [0.0])) <= config.harm,
    }


def best_of(proposals: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The least loss among the sets that reach the goal, or a smaller set with nearly as little."""
    able = [item for item in proposals if item["reached"]] or list(proposals)
    limit = min(item["loss"] for item in able) + NEARLY
    return min((p for p in able if p["loss"] <= limit), key=lambda p: (p["k"], p["loss"]))


def _choices(
    watched: Panel, order: Sequence[Head], config: LocateConfig, rng: np.random.Generator
) -> list[Choice]:
    """Each head with what it adds to the knockout of those before it, on all targets, in logits."""
    places = [place for name in watched.targets for place in watched.rows[name]]
    groups = [watched.task.pairs.groups[place] for place in places]
    found, before = [], watched.differences(())
    for number, head in enumerate(order, start=1):
        after = watched.differences(order[:number])
        change = (after - before)[places]
        item = bootstrap_mean(change, rng=rng, groups=groups, draws=config.draws)
        found.append(Choice(head, item.estimate, item.low, item.high, number))
        before = after
    return found


def _curve(watched: Panel, order: Sequence[Head]) -> list[dict[str, Any]]:
    """Mean accuracy of the targets with the first heads of the chosen set ablated."""
    points = []
    for size in range(len(order) + 1):
        now = watched.left(order[:size]).accuracy
        mean = float(np.mean([now[name] for name in watched.targets]))
        points.append({"heads": size, "accuracy": mean})
    return points
