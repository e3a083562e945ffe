"""Which set is enough: what joint selection proposed, in sentences and tables."""

from collections.abc import Sequence
from dataclasses import dataclass

from circuitune.report import format as fmt
from circuitune.report.estimate import Estimate
from circuitune.report.format import MISSING, Cell
from circuitune.report.measures import HeldOut
from circuitune.report.reach import Joint, Proposal
from circuitune.report.tables import Phrase, Row, Sentence, Table, columns, row, sentence


@dataclass(frozen=True)
class BothHalves:
    """A proposal on both halves.

    Attributes:
        left: Right answers left of the target that keeps most, select half (0-1).
        lost: What spared tasks lose on average there (0-1); None where there is none.
        held_left, held_lost: The same on the held-out half, None where not measured.
    """

    proposal: Proposal
    left: float
    lost: float | None
    held_left: Estimate | None
    held_lost: float | None

    @property
    def size(self) -> int:
        """Number of heads."""
        return len(self.proposal.heads)


@dataclass(frozen=True)
class Enough:
    """What the section says.

    Attributes:
        told: Goal, choice and outcome in sentences.
        sets: Every proposal on both halves.
        beside: The proposals of the chosen size.
        chosen: The chosen set, task by task; None where it is not among the proposals.
        every: All proposals.
        note: Why there is no held-out half, or empty.
    """

    told: tuple[Sentence, ...]
    sets: tuple[BothHalves, ...]
    beside: Table
    chosen: Table | None
    every: Table
    note: str


def enough(found: Joint, held: Sequence[HeldOut], size: int, command: str) -> Enough:
    """The section.

    Args:
        found: The record of joint selection.
        held: The proposals on the held-out half, empty where not measured.
        size: Of the circuit.
        command: The command line that measures the held-out half.
    """
    known = {(item.by, item.k, item.task): item for item in held}
    sets = tuple(_judged(found, proposal, known) for proposal in found.proposals)
    title = f"Proposed sets of {size} heads" if size != 1 else "Proposed sets of one head"
    missing = f"Held-out half of the proposals: not measured yet, `{command}` does."
    return Enough(
        told=_told(found, sets),
        sets=sets,
        beside=_table(found, [own for own in sets if own.size == size], title, sized=False),
        chosen=_chosen(found, known),
        every=_table(found, sets, "All proposed sets", sized=True),
        note="" if held else missing,
    )


_Known = dict[tuple[str, int, str], HeldOut]


def _judged(found: Joint, proposal: Proposal, known: _Known) -> BothHalves:
    """The target that keeps most and the mean loss; nothing where a task is not measured."""
    by = (proposal.by, len(proposal.heads))
    left = [known[(*by, task)].accuracy for task in found.targets if (*by, task) in known]
    moved = [known[(*by, task)].change for task in found.spared if (*by, task) in known]
    return BothHalves(
        proposal,
        left=max((proposal.accuracy.get(task, 0.0) for task in found.targets), default=0.0),
        lost=_lost(
            [
                proposal.accuracy[task] - found.intact.get(task, 1.0)
                for task in found.spared
                if task in proposal.accuracy
            ]
        ),
        held_left=max(left, key=lambda own: own.value)
        if left and len(left) == len(found.targets)
        else None,
        held_lost=_lost(moved) if len(moved) == len(found.spared) else None,
    )


def _lost(changes: Sequence[float]) -> float | None:
    """Mean loss of tasks; a gain in one makes up for no loss in another."""
    return sum(max(0.0, -change) for change in changes) / len(changes) if changes else None


def _told(found: Joint, sets: Sequence[BothHalves]) -> tuple[Sentence, ...]:
    one = len(found.targets) == 1
    targets = _listed(found.targets)
    goal = f"at most {_percent(found.left)} of the right answers to "
    goal += targets if one else f"each of {targets}"
    if found.spared:
        goal += f" left, and {_listed(found.spared)} lose at most {_points(found.harm)} on average"
    else:
        goal += " left"
    reached = sum(own.proposal.reached for own in sets)
    lines = [
        sentence(
            f"Goal: {goal}. Of {len(sets)} proposed sets {reached} reach it on the select half, "
            f"by exact knockout; {fmt.count(found.evaluated)} sets were knocked out in all."
        )
    ]
    own = next((own for own in sets if own.proposal is found.chosen), None)
    if own is not None:
        lines.append(_choice(found, own))
    return tuple(lines)


def _listed(tasks: Sequence[str]) -> str:
    *first, last = (fmt.task_name(task) for task in tasks)
    return f"{', '.join(first)} and {last}" if first else last


def _choice(found: Joint, own: BothHalves) -> Sentence:
    by = fmt.set_name(own.proposal.by)
    heads = f"{own.size} heads" if own.size != 1 else "one head"
    why = "the smallest that does" if own.proposal.reached else "none does, this is the nearest"
    name = f"{heads} by {by}"
    if own.held_left is None:
        return sentence("Chosen: ", Phrase(name, "top"), f", {why}.")
    lost = ""
    if own.held_lost is not None:
        lost = f", and spared tasks lose {_points(own.held_lost)} on average"
    left = Phrase(str(fmt.accuracy(own.held_left)), "top")
    holds = own.held_left.value <= found.left and (own.held_lost or 0.0) <= found.harm
    verdict = "the goal holds" if holds else "the goal is missed"
    chosen = Phrase(name, "top")
    return sentence(
        "Chosen: ", chosen, f", {why}. On the held-out half {verdict}: ", left, f" left{lost}."
    )


def _percent(value: float) -> str:
    return str(fmt.percent(Estimate(value), digits=0))


def _points(value: float | None) -> str:
    return MISSING if value is None else f"{fmt.number(100 * value, 1)} pts"


def _table(found: Joint, sets: Sequence[BothHalves], title: str, *, sized: bool) -> Table:
    held = any(own.held_left for own in sets)
    labels = ["Proposed by", *(["Heads"] if sized else []), "Left, select"]
    labels += ["Left, held out"] if held else []
    labels += ["Lost, select"] + (["Lost, held out"] if held else [])
    labels += ["Goal", "Set"]
    rows = [_row(own, held=held, sized=sized, strong=own.proposal is found.chosen) for own in sets]
    one = fmt.task_name(found.targets[0]) if len(found.targets) == 1 else ""
    note = (
        f"Left: right answers to {one or 'the target that keeps most'}. Lost: accuracy of the "
        "spared tasks on all prompts, mean; a gain makes up for no loss. Goal: on the select half. "
        "Bold: the chosen set."
    )
    words = ("Proposed by", "Goal")
    return Table(title, columns(*labels, left=words, code=["Set"]), tuple(rows), note)


def _row(own: BothHalves, *, held: bool, sized: bool, strong: bool) -> Row:
    cells: list[str | Cell] = [fmt.set_name(own.proposal.by)]
    cells += [str(own.size)] if sized else []
    cells.append(fmt.accuracy(Estimate(own.left)))
    if held:
        cells.append(fmt.accuracy(own.held_left) if own.held_left else MISSING)
    cells.append(_points(own.lost))
    if held:
        cells.append(_points(own.held_lost))
    cells += ["reached" if own.proposal.reached else MISSING, " ".join(own.proposal.heads)]
    return row(*cells, strong=strong)


def _chosen(found: Joint, known: _Known) -> Table | None:
    """The chosen set by task; None before the held-out half is measured."""
    own = found.chosen
    if own is None or not known:
        return None
    rows = []
    for role, tasks in (("target", found.targets), ("spared", found.spared)):
        for task in tasks:
            held = known.get((own.by, len(own.heads), task))
            rows.append(
                row(
                    fmt.task_name(task),
                    role,
                    fmt.accuracy(Estimate(own.accuracy[task])) if task in own.accuracy else MISSING,
                    fmt.accuracy(held.accuracy) if held else MISSING,
                    _points(held.change) if held else MISSING,
                )
            )
    labels = ("Task", "Role", "Select half", "Held-out half", "Change from intact")
    heads = columns(*labels, left=["Task", "Role"])
    return Table("Right answers left without the chosen set", heads, tuple(rows))
