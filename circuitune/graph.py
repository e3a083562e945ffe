"""Who feeds the key heads: a graph from the tokens to the answer, of exact effects.

Three measurements, each in the contrasts of `circuitune.roles`, where one token alone changes:

1. *Direct effects* at END of heads and MLPs: what brings which token to the answer.
2. Into the query, keys and values of each key head, and of the heads with the largest direct
   effects in each contrast, by role of the position: first what *all* that arrives there brings
   (a door), then the single senders behind the doors that matter.
3. The same for the heads that stage 2 found, at the places where they send: chains sender ->
   feeding head -> key head -> answer (`circuitune.chains`), down to the embeddings of the tokens.

What is measured at all is chosen on a few prompts of the ``select`` half: everything there is,
of which the strongest are kept. Every number that is reported is then measured anew, on prompts of
the ``test`` half. So no effect is large because it was chosen for being large, and the tests to
correct for are those of what was kept.

An effect is signed, in logits of ``logit_diff`` and a mean over prompts: negative, what is brought
supports the answer. Its interval resamples groups of prompts; p is that of a t test over the
means of groups, after Benjamini and Hochberg (1995) over all direct effects, doors or edges of its
stage. Attention weights play no part.

Not covered: MLPs as receivers, and heads three steps from the answer. A sender stands for what
passes it, also from further below.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from circuitune.chains import Study, Way, Whole
from circuitune.components import (
    Component,
    Head,
    Receiver,
    Sender,
    all_components,
    check_components,
)
from circuitune.effects import grouped_p_values
from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.pairs import Pair, Split, encode
from circuitune.roles import Contrasts, find_contrasts
from circuitune.stats import benjamini_hochberg, bootstrap_means

# Prompts of the test half that are measured, and of the select half that choose what is.
PROMPTS, SCREEN = 32, 8
# Heads with the largest direct effects in each contrast that are receivers beside the key heads.
BEARERS = 3
# Kept of the components in each contrast, and of the senders behind each open door.
KEPT_PARTS, KEPT_SENDERS = 16, 12
# A door matters if this share of the whole passes it, and a share of all that its contrast does.
OPEN_SHARE, OPEN_TOTAL = 0.1, 0.03
# The strongest of them are opened, so many into key heads and so many into feeding heads.
MOST_DOORS, MOST_FOLLOWED_DOORS = 12, 8
# Edges into each key head's query, keys or values in each contrast; and those followed down.
MOST_EDGES, FOLLOWED = 4, 8
FALSE_DISCOVERY = 0.05
# A component brings what a contrast changes if it carries this share of what it is part of.
BRINGS = 0.05

# Stage, half, way (of a direct effect the contrast alone), sender, and effects per example.
_Value = tuple[str, Split, Way | str, Sender | Whole, np.ndarray]


@dataclass(frozen=True)
class Effect:
    """A mean effect in logits with its interval, adjusted p-value, and share of what it is part of.

    The whole that ``share`` refers to is, for a direct effect, what the whole contrast does to the
    answer; for an edge into a key head, that head's direct effect; for an edge into a feeding
    head, the effect of the edge that is followed.
    """

    estimate: float
    low: float
    high: float
    p_adjusted: float
    share: float

    @property
    def counts(self) -> bool:
        """Whether it is significant and a share worth naming, in the direction of the whole."""
        return self.p_adjusted <= FALSE_DISCOVERY and self.share >= BRINGS


@dataclass(frozen=True)
class Edge:
    """What one sender brings on one way; the sender ``all`` is a door."""

    sender: Sender | Whole
    way: Way
    effect: Effect

    def to_json(self) -> dict[str, Any]:
        """One flat record."""
        return {"sender": str(self.sender), **_record(self.way), **asdict(self.effect)}


@dataclass(frozen=True)
class Node:
    """A component with its direct effects.

    Attributes:
        part: the component.
        key: whether it is a key head.
        effects: its direct effect in each contrast.
        brings: the contrasts for which its direct effect `Effect.counts`.
        passes_on: those for which one of its edges does, so that it brings them to another head.
    """

    part: Component
    key: bool
    effects: Mapping[str, Effect]
    brings: tuple[str, ...]
    passes_on: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary with the component under ``id``."""
        return {
            "id": str(self.part),
            "key": self.key,
            "brings": list(self.brings),
            "passes_on": list(self.passes_on),
            "effects": {name: asdict(effect) for name, effect in self.effects.items()},
        }


@dataclass(frozen=True)
class Graph:
    """Who feeds the key heads.

    Attributes:
        contrasts, roles: their names in the order of reading.
        totals: what each whole contrast does to the answer, in logits.
        nodes: key heads, components on an edge, and those that bring something directly.
        doors: all that arrives on the ways that were opened, sender ``all``.
        edges: the strongest significant senders behind the open doors.
        facts: numbers of prompts and tests, and the rule, for the record.
        values: per example, one row each: ``stage`` (direct, door, edge), ``split`` (select: the
            choice; test: the numbers of the graph), ``contrast``, ``sender``, ``role``,
            ``receiver`` (``answer`` for a direct effect), ``at``, ``then``, ``example`` (number of
            the pair) and ``effect`` in logits.
    """

    contrasts: tuple[str, ...]
    roles: tuple[str, ...]
    totals: Mapping[str, float]
    nodes: tuple[Node, ...]
    doors: tuple[Edge, ...]
    edges: tuple[Edge, ...]
    facts: Mapping[str, Any]
    values: pd.DataFrame

    def to_json(self) -> dict[str, Any]:
        """The record ``graph`` of ``circuit.json``; the values per example are not in it."""
        return {
            "metric": "logit_diff",
            "contrasts": list(self.contrasts),
            "roles": list(self.roles),
            "totals": dict(self.totals),
            "nodes": [node.to_json() for node in self.nodes],
            "doors": [edge.to_json() for edge in self.doors],
            "edges": [edge.to_json() for edge in self.edges],
            **self.facts,
        }


def trace(
    model: Model,
    pairs: Sequence[Pair],
    heads: Sequence[Head],
    *,
    answers: Sequence[str] = (),
    rng: np.random.Generator,
    draws: int = 2000,
    prompts: int = PROMPTS,
) -> Graph:
    """Trace what the key heads say to the answer down to the tokens.

    Args:
        model: a model of a known family.
        pairs: pairs of both halves of one task.
        heads: the key heads.
        answers: further admissible answers, see `circuitune.pairs.encode`.
        rng: draws the other operands, the samples of prompts and the intervals.
        draws: resamples of each interval.
        prompts: how many prompts of the test half are used at most, balanced over groups.

    Raises:
        UserError: there are no heads, no pair has its contrasts, a half has too few groups, or the
            model keeps queries, keys and values in an unknown way.
    """
    if not heads:
        raise UserError("A graph needs at least one key head, found none; name some.")
    check_components(heads, model.layers, model.heads)
    encoded = encode(model.tokenizer, pairs, answers)
    found = find_contrasts(model.tokenizer, pairs, rng=rng)
    screen, study = (
        Study.make(model, _half(found, split, most, rng), encoded.candidates, encoded.answers)
        for split, most in (("select", SCREEN), ("test", prompts))
    )
    tracer = _Tracer(screen, study, rng, draws, study.totals())
    screened = screen.direct(tracer.parts)
    first = tracer.stage(tracer.key_ways([*heads, *tracer.bearers(screened)]), MOST_DOORS)
    ways = {
        way: edge.effect.estimate
        for edge in [edge for edge in first.edges if isinstance(edge.sender, Head)][:FOLLOWED]
        for way in _ways(found, edge.sender, edge.way.contrast, edge.way)
    }
    second = tracer.stage(ways, MOST_FOLLOWED_DOORS)
    edges = (*first.edges, *second.edges)
    nodes, direct = tracer.nodes(screened, heads, edges)
    return Graph(
        contrasts=found.names,
        roles=found.roles,
        totals=tracer.totals,
        nodes=nodes,
        doors=(*first.doors, *second.doors),
        edges=edges,
        facts=_facts(study, found, direct, (first, second)),
        values=_frame(screen, study, [*direct, *first.values, *second.values]),
    )


def _half(found: Contrasts, split: Split, most: int, rng: np.random.Generator) -> Contrasts:
    """A sample of one half's prompts."""
    half = found.sample(split, most, rng=rng)
    groups = len({prompt.group for prompt in half.prompts})
    if groups < 2:
        raise UserError(
            "A graph needs usable pairs of two groups in each half, found "
            f"{len(half.prompts)} of {groups} in {split}; add pairs with other operands."
        )
    return half


def _ways(found: Contrasts, head: Head, contrast: str, above: Way | None = None) -> Iterator[Way]:
    """All ways into a head, which writes the answer or goes on as ``above`` says."""
    at, then = (None, None) if above is None else (above.role, above.receiver)
    for role in found.roles:
        for kind in ("q", "k", "v"):
            yield Way(Receiver(head, kind), role, contrast, at, then)


# --------------------------------------------------------------------------------- choose


@dataclass(frozen=True)
class _Stage:
    """What was found on some ways: see `Graph`; and how many doors stayed shut for the time."""

    doors: tuple[Edge, ...] = ()
    edges: tuple[Edge, ...] = ()
    unopened: int = 0
    tests: int = 0
    values: tuple[_Value, ...] = ()


@dataclass(frozen=True)
class _Tracer:
    """Chooses on the prompts of ``screen`` and measures on those of ``study``."""

    screen: Study
    study: Study
    rng: np.random.Generator
    draws: int
    totals: Mapping[str, float]

    def key_ways(self, heads: Sequence[Head]) -> dict[Way, float]:
        """The ways into heads that write the answer, with each head's direct effect."""
        receivers = list(dict.fromkeys(heads))
        return {
            way: float(effects[place].mean())
            for name, effects in self.study.direct(receivers).items()
            for place, head in enumerate(receivers)
            for way in _ways(self.study.found, head, name)
        }

    def stage(self, wholes: Mapping[Way, float], most: int) -> _Stage:
        """Doors that matter, and the senders behind the strongest of them.

        Args:
            wholes: ways, and the effect that what they bring is a share of.
            most: how many doors are opened at most.
        """
        doors = self.screen.measure(dict.fromkeys(wholes, (Whole(),)))
        size = {way: abs(float(values.mean())) for way, values in doors.items()}
        least = {
            way: max(OPEN_SHARE * abs(whole), OPEN_TOTAL * abs(self.totals[way.contrast]))
            for way, whole in wholes.items()
        }
        matter = sorted((way for way in size if size[way] > least[way]), key=lambda w: -size[w])
        opened = {way: self.study.below(way.receiver.part) for way in matter[:most]}
        if not opened:
            return _Stage()
        screened = self.screen.measure(opened)
        strongest = {
            way: [opened[way][row] for row in _largest(values, KEPT_SENDERS)]
            for way, values in screened.items()
        }
        passed = self.study.measure(dict.fromkeys(opened, (Whole(),)))
        found = self.study.measure(strongest)
        edges = self._judged(found, strongest, wholes)
        return _Stage(
            doors=self._judged(passed, dict.fromkeys(opened, (Whole(),)), wholes),
            edges=_kept(edges),
            unopened=len(matter[most:]),
            tests=len(edges),
            values=(
                *_values("door", "select", doors, dict.fromkeys(doors, (Whole(),))),
                *_values("door", "test", passed, dict.fromkeys(passed, (Whole(),))),
                *_values("edge", "select", screened, opened),
                *_values("edge", "test", found, strongest),
            ),
        )

    def _judged(
        self,
        values: Mapping[Way, Float[np.ndarray, "sender example"]],
        senders: Mapping[Way, Sequence[Sender | Whole]],
        wholes: Mapping[Way, float],
    ) -> tuple[Edge, ...]:
        """An edge of each row."""
        rows = [(way, sender) for way in values for sender in senders[way]]
        effects = self._effects(np.concatenate(list(values.values())), [wholes[w] for w, _ in rows])
        return tuple(Edge(sender, way, e) for (way, sender), e in zip(rows, effects, strict=True))

    @property
    def parts(self) -> tuple[Component, ...]:
        """All components."""
        return all_components(self.study.model.layers, self.study.model.heads)

    def bearers(self, screened: Mapping[str, Float[np.ndarray, "sender example"]]) -> list[Head]:
        """The heads with the largest direct effects in each contrast."""
        heads = [(row, part) for row, part in enumerate(self.parts) if isinstance(part, Head)]
        rows = [row for row, _ in heads]
        return [
            heads[place][1]
            for values in screened.values()
            for place in _largest(values[rows], BEARERS)
        ]

    def nodes(
        self,
        screened: Mapping[str, Float[np.ndarray, "sender example"]],
        heads: Sequence[Head],
        edges: Sequence[Edge],
    ) -> tuple[tuple[Node, ...], list[_Value]]:
        """Key heads, whatever is on an edge, and what brings something to the answer directly.

        Args:
            screened: direct effects of all components on the prompts that choose.
            heads: the key heads.
            edges: all edges.
        """
        rows = {row for values in screened.values() for row in _largest(values, KEPT_PARTS)}
        drawn = {edge.sender for edge in edges} | {edge.way.receiver.part for edge in edges}
        drawn |= set(heads)
        parts = [part for row, part in enumerate(self.parts) if row in rows or part in drawn]
        measured = self.study.direct(parts)
        wholes = [self.totals[name] for name in measured for _ in parts]
        effects = self._effects(np.concatenate(list(measured.values())), wholes)
        passed = {(edge.sender, edge.way.contrast) for edge in edges if edge.effect.counts}
        nodes = []
        for row, part in enumerate(parts):
            own = dict(zip(measured, effects[row :: len(parts)], strict=True))
            brings = tuple(name for name in own if own[name].counts)
            passes = tuple(name for name in own if (part, name) in passed)
            if part in drawn or brings:
                nodes.append(Node(part, part in heads, own, brings, passes))
        values = [
            ("direct", split, name, part, own)
            for split, found, of in (("select", screened, self.parts), ("test", measured, parts))
            for name, rows in found.items()
            for part, own in zip(of, rows, strict=True)
        ]
        return tuple(nodes), values

    def _effects(
        self, values: Float[np.ndarray, "row example"], wholes: Sequence[float]
    ) -> list[Effect]:
        """Mean, interval, p-value and share of each row."""
        groups = self.study.groups
        p = grouped_p_values(values, groups)
        intervals = bootstrap_means(values, rng=self.rng, groups=groups, draws=self.draws)
        return [
            Effect(
                item.estimate,
                item.low,
                item.high,
                float(q),
                item.estimate / whole if whole else 0.0,
            )
            for item, q, whole in zip(intervals, benjamini_hochberg(p), wholes, strict=True)
        ]


def _largest(values: Float[np.ndarray, "row example"], most: int) -> list[int]:
    """Rows with the largest mean, of either sign."""
    return np.argsort(-np.abs(values.mean(axis=1)), kind="stable")[:most].tolist()


def _kept(edges: Iterable[Edge]) -> tuple[Edge, ...]:
    """Significant edges, the strongest into each receiver in each contrast; strongest first."""
    into: dict[Any, int] = defaultdict(int)
    kept = []
    for edge in sorted(edges, key=lambda edge: -abs(edge.effect.estimate)):
        way = edge.way
        place = (way.receiver, way.contrast, way.at, way.then)
        if edge.effect.p_adjusted <= FALSE_DISCOVERY and into[place] < MOST_EDGES:
            into[place] += 1
            kept.append(edge)
    return tuple(kept)


# ----------------------------------------------------------------------------- for the record


def _facts(
    study: Study, found: Contrasts, direct: Sequence[_Value], stages: Sequence[_Stage]
) -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    return {
        "prompts": len(study.groups),
        "groups": len(set(study.groups)),
        "given": found.given,
        "dropped": found.dropped,
        "tests": {
            "direct": sum(split == "test" for _, split, *_ in direct),
            "doors": sum(len(stage.doors) for stage in stages),
            "edges": sum(stage.tests for stage in stages),
        },
        "unopened": sum(stage.unopened for stage in stages),
        "brings": (
            f"significant at a false-discovery rate of {FALSE_DISCOVERY:.0%} and at least "
            f"{BRINGS:.0%} of what this difference does to the answer in all"
        ),
    }


def _record(way: Way) -> dict[str, Any]:
    """A way in plain texts; absent ``at`` and ``then`` are null."""
    then = None if way.then is None else str(way.then)
    return {**asdict(way), "receiver": str(way.receiver), "then": then}


def _values(
    stage: str,
    split: Split,
    values: Mapping[Way, Float[np.ndarray, "sender example"]],
    senders: Mapping[Way, Sequence[Sender | Whole]],
) -> Iterator[_Value]:
    """One record for each way and sender."""
    for way, effects in values.items():
        for sender, own in zip(senders[way], effects, strict=True):
            yield stage, split, way, sender, own


def _frame(screen: Study, study: Study, values: Sequence[_Value]) -> pd.DataFrame:
    """All effects per example, see `Graph.values`."""
    examples = {
        split: [prompt.place for prompt in side.found.prompts]
        for split, side in (("select", screen), ("test", study))
    }
    records = []
    for stage, split, way, sender, _ in values:
        into = {"contrast": way, "role": "end", "receiver": "answer", "at": None, "then": None}
        into = _record(way) if isinstance(way, Way) else into
        records.append({"stage": stage, "split": split, "sender": str(sender)} | into)
    counts = [len(own) for *_, own in values]
    frame = pd.DataFrame(records)
    frame = frame.loc[frame.index.repeat(counts)].reset_index(drop=True)
    frame["example"] = np.concatenate([examples[split] for _, split, *_ in values])
    frame["effect"] = np.concatenate([own for *_, own in values])
    return frame
