"""How far a circuit reaches, in sentences and tables."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from circuitune.report import format as fmt
from circuitune.report.estimate import Estimate
from circuitune.report.format import MISSING, Cell
from circuitune.report.measures import Reach
from circuitune.report.reach import Choices, HeadChange, Place, Scored, Transfer, Tuned, Variant
from circuitune.report.tables import Row, Table, columns, row

FAMILIES = ("own", "arithmetic", "word problem", "control")
RANDOM = "random, same layers"
_CHANGES = 10
_SCORES = {"acc": "accuracy", "acc_norm": "accuracy by byte"}
_PARTS = {"data": "Word problems and multiple-choice questions"}


@dataclass(frozen=True)
class Reached:
    """The tables; None, or empty, where a part was not measured.

    Attributes:
        matrix: Every source in every target, with intervals.
        compact: Each target without the circuit's heads, its own and random ones.
        caption: What the numbers of the matrix are.
        flagged: The tasks that the model hardly answers or too rarely, with counts.
        shared: Heads shared with the run's own task.
        choices: Multiple-choice accuracy before and after.
        choices_rest: The same by draw and by the other scores.
        changed: What tuning did, a sentence for each fact.
        changes: The largest changes of direct effects.
        tuned: The changes of the tuned heads.
        notes: Why something is not there.
    """

    matrix: Table | None
    compact: Table | None
    caption: str
    flagged: str
    shared: Table | None
    choices: Table | None
    choices_rest: Table | None
    changed: tuple[str, ...]
    changes: Table | None
    tuned: Table | None
    notes: tuple[str, ...]


def reached(found: Transfer, cells: Sequence[Reach]) -> Reached:
    """All tables of a transfer.

    Args:
        found: The record.
        cells: The matrix, see `measures.reach`.
    """
    variants = found.tuned.variants if found.tuned else ()
    precise = next((v for v in variants if v.name == "precise"), next(iter(variants), None))
    return Reached(
        matrix=_matrix(found, cells) if cells else None,
        compact=_compact(found, cells) if cells else None,
        caption=_caption(found, cells) if cells else "",
        flagged=_flagged(found.places),
        shared=_shared(found),
        choices=_choices(found.choices),
        choices_rest=_choices_rest(found.choices),
        changed=_changed(found.tuned) if found.tuned else (),
        changes=_changes(precise.heads, precise) if precise else None,
        tuned=_changes(precise.tuned, precise) if precise else None,
        notes=_notes(found),
    )


def names_of(found: Transfer, cells: Sequence[Reach]) -> tuple[list[str], list[str]]:
    """Sources (the random ones, "", last) and targets of the matrix, both by family."""
    order = [p.task for family in FAMILIES for p in found.places if p.family == family]
    order += [p.task for p in found.places if p.task not in order]
    sources = {cell.source for cell in cells}
    targets = {cell.target for cell in cells}
    order += sorted((sources | targets) - {*order, ""})
    rows = [name for name in order if name in sources] + [""] * ("" in sources)
    return rows, [name for name in order if name in targets]


def _notes(found: Transfer) -> tuple[str, ...]:
    lines = [f"{_PARTS.get(part, part.capitalize())}: {why}." for part, why in found.notes.items()]
    if found.tuned and found.tuned.note:
        lines.append(f"What tuning did to the heads: {found.tuned.note.rstrip('.')}.")
    return tuple(lines)


# ------------------------------------------------------------------------------------ the matrix


def _by_name(cells: Sequence[Reach]) -> Callable[[str, str], Cell]:
    known = {(cell.source, cell.target): fmt.accuracy(cell.accuracy) for cell in cells}
    return lambda source, target: known.get((source, target), Cell(MISSING))


def _matrix(found: Transfer, cells: Sequence[Reach]) -> Table:
    sources, targets = names_of(found, cells)
    left = _by_name(cells)
    rows = [
        row(
            fmt.task_name(source) if source else RANDOM,
            *(left(source, target) for target in targets),
            strong=source == found.task,
        )
        for source in sources
    ]
    labels = [fmt.task_name(target) for target in targets]
    heads = columns("Heads of", *labels, left=["Heads of"])
    return Table("Right answers left, by task that is asked", heads, tuple(rows))


def _compact(found: Transfer, cells: Sequence[Reach]) -> Table:
    left = _by_name(cells)
    rows = [
        row(
            fmt.task_name(target),
            left(found.task, target),
            left(target, target),
            left("", target),
            strong=target == found.task,
        )
        for target in names_of(found, cells)[1]
    ]
    labels = (f"Heads of {fmt.task_name(found.task)}", "its own heads", RANDOM)
    title = f"Right answers left without {found.k} heads"
    return Table(title, columns("Task", *labels, left=["Task"]), tuple(rows))


def _caption(found: Transfer, cells: Sequence[Reach]) -> str:
    draws = max((cell.draws for cell in cells if not cell.source), default=0)
    sizes = sorted({cell.n for cell in cells})
    prompts = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    text = (
        f"Right answers left, %, in {prompts} held-out prompts of each task that the intact model "
        f"answers, with the {found.k} heads of the task at the left replaced by their mean at END."
    )
    if draws:
        text += " Last row: random heads of the circuit's layers"
        text += f", mean of {draws} draws." if draws > 1 else ", one draw."
    return text


def _flagged(places: Sequence[Place]) -> str:
    near = [_counted(place) for place in places if place.kept and place.near_chance]
    few = [_counted(place) for place in places if not place.kept]
    lines = []
    if near:
        always = "Not shown to beat always the commonest answer, so right answers may be luck"
        lines.append(f"{always}: {', '.join(near)}.")
    if few:
        lines.append(f"Too few right answers to measure: {', '.join(few)}.")
    return " ".join(lines)


def _counted(place: Place) -> str:
    usual = f", {place.commonest} have the commonest" if place.near_chance else ""
    return f"{fmt.task_name(place.task)} ({place.correct} of {place.of} right{usual})"


def _shared(found: Transfer) -> Table | None:
    own = [shared for shared in found.overlap if found.task in shared.tasks]
    if not own:
        return None
    rows = [
        row(
            *(fmt.task_name(name) for name in shared.tasks if name != found.task),
            f"{shared.shared} of {shared.k}",
            fmt.number(shared.expected, 1),
            str(shared.high),
            fmt.p_value(shared.p),
        )
        for shared in own
    ]
    labels = ("Task", "Shared", "By chance", "At most", "p value")
    note = (
        "Chance: as many heads in each layer, drawn at random; at most, in 97.5 % of draws. p of "
        f"sharing at least as many, {len(own)} comparisons, not corrected."
    )
    title = f"First heads shared with {fmt.task_name(found.task)}"
    return Table(title, columns(*labels, left=["Task"]), tuple(rows), note)


# ------------------------------------------------------------------------------- other abilities


def _choices(found: Sequence[Choices]) -> Table | None:
    rows: list[Row] = []
    for data in dict.fromkeys(item.data for item in found):
        own = [item for item in found if item.data == data]
        circuit = [item for item in own if item.kind == "source"]
        drawn = [item for item in own if item.kind == "matched"]
        rows += [_scored(item, "circuit", [item.scores["acc"]]) for item in circuit]
        if drawn:
            rows.append(_scored(drawn[0], RANDOM, [item.scores["acc"] for item in drawn]))
    if not rows:
        return None
    margin = fmt.number(100 * found[0].margin, 0)
    loss = f"Loss of {margin} pts excluded"
    labels = ("Questions", "Removed", "Asked", "Before", "After", "Change", loss)
    note = "Accuracy by the highest summed log probability of a choice, 95 % intervals"
    draws = len({item.draw for item in found if item.kind == "matched"})
    note += f"; random: mean of {draws} draws [lowest, highest]." if draws > 1 else "."
    heads = columns(*labels, left=["Questions", "Removed", loss])
    return Table("Multiple choice", heads, tuple(rows), note)


def _scored(item: Choices, name: str, scores: Sequence[Scored]) -> Row:
    """One row; several draws as their mean with the lowest and the highest."""
    several = len(scores) > 1
    after, change = (
        _range([getattr(score, part) for score in scores]) for part in ("after", "change")
    )
    spared = sum(score.spared for score in scores)
    verdict = f"in {spared} of {len(scores)}" if several else _yes(scores[0])
    return row(
        fmt.task_name(item.data),
        name,
        fmt.count(item.n),
        fmt.accuracy(scores[0].before),
        fmt.accuracy(after),
        fmt.points(change, digits=1),
        verdict,
    )


def _range(draws: Sequence[Estimate]) -> Estimate:
    """The only draw with its interval, or the mean with the lowest and the highest."""
    if len(draws) == 1:
        return draws[0]
    values = [draw.value for draw in draws]
    return Estimate(sum(values) / len(values), min(values), max(values))


def _yes(score: Scored) -> str:
    return "yes" if score.spared else "no"


def _choices_rest(found: Sequence[Choices]) -> Table | None:
    rows = [
        row(
            fmt.task_name(item.data),
            "circuit" if item.kind == "source" else f"random {item.draw + 1}",
            _SCORES[name],
            fmt.accuracy(score.before),
            fmt.accuracy(score.after),
            fmt.points(score.change, digits=1),
            fmt.p_value(score.p),
            fmt.plain(item.log_prob, signed=True, digits=3),
        )
        for item in found
        for name, score in item.scores.items()
    ]
    if not rows:
        return None
    words = ("Questions", "Removed", "Score")
    labels = (*words, "Before", "After", "Change", "p value", "Log probability, nats")
    note = "p: McNemar's test. Log probability: mean change of the right choice."
    return Table("Multiple choice by draw", columns(*labels, left=words), tuple(rows), note)


# -------------------------------------------------------------------------- what tuning did to it


def _changed(found: Tuned) -> tuple[str, ...]:
    return tuple(line for variant in found.variants for line in _told(variant, found))


def _told(variant: Variant, found: Tuned) -> tuple[str, ...]:
    before, after = (fmt.effect_in_words("logit_diff", Estimate(t)) for t in variant.total)
    half = "held-out" if found.split == "test" else found.split
    first = (
        f"Variant {variant.name} ({len(variant.tuned)} heads): on {found.pairs} {half} pairs "
        f"({found.groups} groups) accuracy goes from {fmt.accuracy(variant.before)} to "
        f"{fmt.accuracy(variant.after)}, what the corruption does from {before} to {after}; "
        f"{variant.grew} of {variant.tested} heads grew and {variant.shrank} shrank at a "
        f"false-discovery rate of {variant.false_discovery:.0%}."
    )
    lines = [first]
    if variant.against:
        gap = fmt.effect_in_words("logit_diff", variant.against.difference)
        lines.append(
            f"Its tuned heads change by {fmt.number(variant.against.tuned, 2)} logits on average, "
            f"all others by {fmt.number(variant.against.others, 2)}: a difference of {gap}, "
            f"p = {fmt.p_value(variant.against.p)}."
        )
    if variant.overlaps:
        parts = [
            f"{o.common} of {o.k} (Jaccard index {o.jaccard:.2f}, resampled pairs alone "
            f"{o.noise:.2f})"
            for o in variant.overlaps
        ]
        lines.append(f"Strongest heads before and after have in common: {', '.join(parts)}.")
    return tuple(lines)


def _changes(heads: Sequence[HeadChange], variant: Variant) -> Table:
    tuned = {head.id for head in variant.tuned}
    shares = any(head.share for head in heads)
    rows = []
    for head in heads[:_CHANGES]:
        cells = [
            head.id,
            "yes" if head.id in tuned else "",
            fmt.effect("logit_diff", Estimate(head.before)),
            fmt.effect("logit_diff", Estimate(head.after)),
            fmt.effect("logit_diff", head.change),
            head.direction,
            fmt.p_value(head.p_adjusted),
        ]
        if shares:
            share = head.share and fmt.plain(head.share.scaled(100.0), signed=True)
            cells.append(share or MISSING)
        rows.append(row(*cells, strong=head.id in tuned))
    whole = heads == variant.tuned
    labels = ["Head", "Tuned", "Before", "After", "Change", "Direction", "p value"]
    labels += ["Change of share, pts"] if shares else []
    note = (
        "Direct effects in logits; negative supports the answer, so a head that grew became more "
        "negative. p is corrected over all heads."
    )
    note += " Share: of what the corruption does in the same model." if shares else ""
    title = "The tuned heads" if whole else "Largest changes of direct effects"
    table_columns = columns(*labels, left=["Tuned", "Direction"], code=["Head"])
    return Table(title, table_columns, tuple(rows), "" if whole else note)
