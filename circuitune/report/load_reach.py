"""Reading of `transfer.json` and of the record of joint selection in `circuit.json`."""

from collections.abc import Sequence

import pandas as pd

from circuitune.report.fields import Item, Source
from circuitune.report.reach import (
    Against,
    Choices,
    HeadChange,
    Joint,
    Overlap,
    Place,
    Proposal,
    Scored,
    Shared,
    Transfer,
    Tuned,
    Variant,
)


def load_transfer(source: Source, rows: pd.DataFrame | None) -> Transfer:
    """How far a circuit reaches.

    Args:
        source: `transfer.json`.
        rows: `transfer.parquet`, None where it is not there.

    Raises:
        UserError: The file is malformed.
    """
    top = source.item(source.parse(source.text()))
    notes = top.child("notes") if top.values.get("notes") else None
    return Transfer(
        task=top.text("task"),
        k=top.count("k"),
        places=tuple(_place(item) for item in top.children("tasks")),
        rows=rows,
        overlap=tuple(_shared(item) for item in _children(top, "overlap")),
        choices=tuple(_choices(item) for item in _children(top, "choices")),
        tuned=_tuned(top.child("tuned")) if top.values.get("tuned") else None,
        notes={name: notes.text(name) for name in notes.values} if notes else {},
    )


def load_joint(rule: Item, chosen: Sequence[str]) -> Joint | None:
    """What joint selection proposed; None where another rule chose the circuit.

    Args:
        rule: The field `rule` of `circuit.json`.
        chosen: The components of the circuit.

    Raises:
        UserError: The record is malformed.
    """
    if "proposals" not in rule.values:
        return None
    goal, by = rule.child("goal"), rule.text("by")
    proposals = tuple(_proposal(item) for item in rule.children("proposals"))
    intact = rule.child("intact") if "intact" in rule.values else None
    same = (p for p in proposals if p.by == by and set(p.heads) == set(chosen))
    return Joint(
        targets=tuple(str(name) for name in rule.sequence("targets")),
        spared=tuple(str(name) for name in rule.sequence("spared")),
        intact={name: intact.fraction(name).value for name in intact.values} if intact else {},
        left=goal.fraction("left").value,
        harm=goal.fraction("harm").value,
        evaluated=rule.count("evaluated_sets"),
        proposals=proposals,
        chosen=next(same, None),
    )


def _children(item: Item, key: str) -> tuple[Item, ...]:
    return item.children(key) if item.values.get(key) else ()


def _proposal(item: Item) -> Proposal:
    accuracy = item.child("accuracy")
    return Proposal(
        by=item.text("by"),
        heads=item.components("heads"),
        accuracy={name: accuracy.fraction(name).value for name in accuracy.values},
        reached=bool(item.values.get("reached")),
    )


def _place(item: Item) -> Place:
    given = "one_token" if "one_token" in item.values else "tried"
    known = "commonest" in item.values
    return Place(
        task=item.text("task"),
        family=item.text("family"),
        of=item.count(given) if given in item.values else 0,
        correct=item.count("correct") if "correct" in item.values else 0,
        commonest=item.count("commonest") if known else None,
        near_chance=bool(item.values.get("near_chance")),
        kept=bool(item.values.get("kept")),
        heads=item.components("heads"),
    )


def _shared(item: Item) -> Shared:
    return Shared(
        tasks=(item.text("a"), item.text("b")),
        k=item.count("k"),
        shared=item.count("shared"),
        expected=item.number("expected"),
        high=item.count("high"),
        p=item.number("p"),
    )


def _choices(item: Item) -> Choices:
    return Choices(
        data=item.text("data"),
        kind=item.text("set"),
        draw=item.count("draw"),
        n=item.count("n"),
        margin=item.number("margin"),
        scores={name: _scored(item.child(name)) for name in ("acc", "acc_norm")},
        log_prob=item.triple("log_prob"),
    )


def _scored(item: Item) -> Scored:
    return Scored(
        before=item.triple("before"),
        after=item.triple("after"),
        change=item.triple("change"),
        p=item.number("p"),
        spared=bool(item.values.get("non_inferior")),
    )


def _tuned(item: Item) -> Tuned:
    if "note" in item.values:
        return Tuned("", 0, 0, (), item.text("note"))
    return Tuned(
        split=item.text("split"),
        pairs=item.count("pairs"),
        groups=item.count("groups"),
        variants=tuple(_variant(name, own) for name, own in item.named("variants").items()),
    )


def _variant(name: str, item: Item) -> Variant:
    accuracy, total = item.child("accuracy"), item.child("total_effect")
    against = "tuned_against_others"
    return Variant(
        name=name,
        before=accuracy.triple("before"),
        after=accuracy.triple("after"),
        total=(total.number("before"), total.number("after")),
        tested=item.count("tested"),
        grew=item.count("grew"),
        shrank=item.count("shrank"),
        false_discovery=item.number("false_discovery"),
        heads=tuple(_change(child) for child in item.children("heads")),
        tuned=tuple(_change(child) for child in item.children("tuned")),
        overlaps=tuple(_overlap(child) for child in _children(item, "overlap")),
        against=_against(item.child(against)) if item.values.get(against) else None,
    )


def _change(item: Item) -> HeadChange:
    return HeadChange(
        id=item.component("id"),
        before=item.number("before"),
        after=item.number("after"),
        change=item.triple("change"),
        p_adjusted=item.number("p_adjusted"),
        direction=item.text("direction"),
        share=item.triple("share_change") if "share_change" in item.values else None,
    )


def _overlap(item: Item) -> Overlap:
    return Overlap(
        item.count("k"), item.count("common"), item.number("jaccard"), item.number("noise")
    )


def _against(item: Item) -> Against:
    return Against(
        tuned=item.number("tuned"),
        others=item.number("others"),
        difference=item.triple("difference"),
        p=item.number("p"),
    )
