"""Is it the circuit? Other ablations, control tasks and the three criteria, as tables."""

from collections.abc import Sequence
from dataclasses import dataclass

from circuitune.report import format as fmt
from circuitune.report.estimate import Estimate
from circuitune.report.findings import ControlTask, Judgement
from circuitune.report.format import MISSING, Cell
from circuitune.report.measures import Removal
from circuitune.report.tables import Table, columns, row

_ABLATIONS = ("mean", "zero", "resample")
_PLACES = {"end": "at END", "all": "everywhere"}
_SETS = ("top", "matched", "least")


@dataclass(frozen=True)
class Judged:
    """The tables; None where something was not measured.

    Attributes:
        accuracy: Accuracy by ablation and place for the circuit and two controls of its size.
        divergence: The same of the KL divergence to the intact model.
        controls: The control tasks, with the circuit out and with their own circuit out.
        criteria: Faithfulness, completeness and minimality with what each number says.
        heads: What each head of the circuit does beside the circuit and beside all others.
        subsets: The random subsets that completeness rests on.
        note: Why there are no criteria, or empty.
    """

    accuracy: Table | None
    divergence: Table | None
    controls: Table | None
    criteria: Table | None
    heads: Table | None
    subsets: Table | None
    note: str

    @property
    def shows(self) -> bool:
        """Whether there is anything to show but the note."""
        return any((self.accuracy, self.controls, self.criteria))


def judged(
    removals: Sequence[Removal], judgement: Judgement | None, task: str, command: str
) -> Judged:
    """All tables.

    Args:
        removals: What was removed, see `measures.removals`.
        judgement: The criteria, None in a run of an older version.
        task: The circuit's own task.
        command: The command line that measures what is missing.
    """
    own = [r for r in removals if r.task == task and r.k > 0 and r.kind in _SETS]
    further = any((r.ablation, r.where) != ("mean", "end") for r in own)
    missing = f"Faithfulness, completeness and minimality: not measured yet, `{command}` does."
    return Judged(
        accuracy=_accuracy(own) if further else None,
        divergence=_divergence(own) if further else None,
        controls=_controls(removals, judgement.controls if judgement else (), task),
        criteria=_criteria(judgement) if judgement else None,
        heads=_heads(judgement) if judgement and judgement.minimality else None,
        subsets=_subsets(judgement) if judgement and judgement.subsets else None,
        note="" if judgement else missing,
    )


def _kinds(own: Sequence[Removal]) -> list[tuple[str, str]]:
    """What replaces an output, and where; the usual ones in their order first."""
    found = dict.fromkeys((r.ablation, r.where) for r in own)
    usual = [(a, w) for w in _PLACES for a in _ABLATIONS if (a, w) in found]
    return usual + [kind for kind in found if kind not in usual]


def _by_kind(own: Sequence[Removal], title: str, values: dict[Removal, Cell], note: str) -> Table:
    sets = [kind for kind in _SETS if any(r.kind == kind for r in own)]
    found = {(r.kind, r.ablation, r.where): values[r] for r in own if r in values}
    rows = [
        row(
            f"{ablation}, {_PLACES.get(where, where)}",
            *(found.get((kind, ablation, where), Cell(MISSING)) for kind in sets),
        )
        for ablation, where in _kinds(own)
    ]
    labels = [fmt.set_name(kind) for kind in sets]
    return Table(title, columns("Replaced by", *labels, left=["Replaced by"]), tuple(rows), note)


def _accuracy(own: Sequence[Removal]) -> Table:
    size = max(r.k for r in own)
    draws = {r.draws for r in own if r.kind == "matched"}
    most = max(draws, default=1)
    note = "Resample: the output on another prompt. Everywhere: at END and all positions before."
    if most > 1:
        rest = "one draw" if min(draws) == 1 else f"{min(draws)} draws"
        note += f" Random heads: mean of {most} draws"
        note += f" by mean at END, {rest} else." if len(draws) > 1 else "."
    title = f"Right answers with {size} heads removed"
    return _by_kind(own, title, {r: fmt.accuracy(r.accuracy) for r in own}, note)


def _divergence(own: Sequence[Removal]) -> Table | None:
    values = {r: fmt.plain(r.kl, digits=3) for r in own if r.kl}
    return _by_kind(own, "KL to the intact model, nats", values, "") if values else None


def _controls(removals: Sequence[Removal], facts: Sequence[ControlTask], task: str) -> Table | None:
    names = list(dict.fromkeys(r.source for r in removals if r.kind == "other_task"))
    if not names and not facts:
        return None
    names += [fact.task for fact in facts if fact.task not in names]
    own = fmt.task_name(task)
    rows = []
    for name in names:
        fact = next((fact for fact in facts if fact.task == name), None)
        spared = _find(removals, "top", task, name)
        hit = _find(removals, "other_task", name, name)
        crossed = _find(removals, "other_task", name, task)
        right = fmt.accuracy(fact.rate) if fact and fact.rate else MISSING
        shared = MISSING if fact is None or fact.shared is None else str(fact.shared)
        rows.append(row(fmt.task_name(name), right, *map(_left, (spared, hit, crossed)), shared))
    labels = (
        "Answered",
        f"left without the circuit of {own}",
        "left without its own circuit",
        f"{own} left without its circuit",
        "Heads shared",
    )
    note = (
        "Nothing is calculated here; answered: intact, of all prompts whose answer is one token. "
        "What is left is of all held-out prompts, right or wrong. Circuits of one size by one "
        "rule, mean ablation at END."
    )
    dropped = [fmt.task_name(fact.task) for fact in facts if not fact.kept]
    if dropped:
        note += f" Too few right answers to measure: {', '.join(dropped)}."
    heads = columns("Control task", *labels, left=["Control task"])
    return Table("Control tasks", heads, tuple(rows), note)


def _find(removals: Sequence[Removal], kind: str, source: str, task: str) -> Removal | None:
    """The removal of a circuit in a task, by mean at END; `source` is what it was chosen on."""
    return next(
        (
            r
            for r in removals
            if (r.kind, r.task) == (kind, task) and r.k > 0 and r.source in (source, "")
            if (r.ablation, r.where) == ("mean", "end")
        ),
        None,
    )


def _left(removal: Removal | None) -> Cell:
    return Cell(MISSING) if removal is None else fmt.accuracy(removal.accuracy)


def _criteria(found: Judgement) -> Table:
    rows = [
        row("Faithfulness", _faithful(found), _faithful_reading(found)),
        row("Completeness", fmt.plain(found.incomplete, digits=2), _complete_reading(found)),
    ]
    if found.minimality:
        below = sum(_supports(h.from_circuit) and _supports(h.from_model) for h in found.minimality)
        reading = (
            "Heads that support the answer, interval below 0, both beside the rest of the circuit "
            "and beside all heads outside it."
        )
        rows.append(row("Minimality", f"{below} of {len(found.minimality)}", reading))
    note = (
        f"Mean ablation at END, logit differences over {found.pairs} held-out pairs "
        f"({found.groups} groups); MLPs and positions before END stay. Intact: "
        f"{fmt.effect_in_words('logit_diff', found.clean)}; corrupt prompts: "
        f"{fmt.effect_in_words('logit_diff', found.corrupt)}."
    )
    heads = columns("Criterion", "Value", "Reading", left=["Criterion", "Reading"])
    return Table("Faithful, complete, minimal?", heads, tuple(rows), note)


def _supports(effect: Estimate) -> bool:
    return effect.high is not None and effect.high < 0


def _faithful(found: Judgement) -> Cell:
    share = found.circuit.share
    return fmt.percent(share, digits=0) if share else Cell(MISSING)


def _faithful_reading(found: Judgement) -> str:
    rate = fmt.accuracy(found.circuit.accuracy)
    alone = f"With all other heads ablated {rate} of the answers are right"
    if found.circuit.share is None:
        return f"{alone}; the corruption takes too little away to give a share."
    nothing = found.nothing.share
    beside = f"; with all heads ablated {fmt.percent(nothing, digits=0)}" if nothing else ""
    return f"{alone}, and this share of what the corruption takes away is kept{beside}."


def _complete_reading(found: Judgement) -> str:
    below = sum(_supports(subset.difference) for subset in found.subsets)
    count = len(found.subsets)
    reading = (
        "Logits between circuit and model when random parts of the circuit are removed from both; "
        "0 is complete, noise alone gives more."
    )
    if count:
        reading += f" In {below} of {count} the circuit falls further, interval below 0."
    return reading


def _heads(found: Judgement) -> Table:
    rows = [
        row(
            head.id,
            fmt.effect("logit_diff", head.from_circuit),
            fmt.effect("logit_diff", head.from_model),
        )
        for head in found.minimality
    ]
    heads = columns("Head", "Beside the circuit", "Beside all others", code=["Head"])
    note = (
        "Logits; negative supports. Beside the circuit: what removing it does where only the "
        "circuit is left. Beside all others: what it adds where the rest of the circuit is removed."
    )
    return Table("Head by head", heads, tuple(rows), note)


def _subsets(found: Judgement) -> Table:
    rows = [
        row(
            "  ".join(subset.removed),
            fmt.number(subset.circuit, 2),
            fmt.number(subset.model, 2),
            fmt.effect("logit_diff", subset.difference),
        )
        for subset in found.subsets
    ]
    heads = columns("Removed", "Circuit", "Model", "Difference", code=["Removed"])
    return Table("Without random parts of the circuit", heads, tuple(rows))
