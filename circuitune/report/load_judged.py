"""Reading of `validate.json`."""

from circuitune.report.estimate import Estimate
from circuitune.report.fields import Item, Source
from circuitune.report.findings import ControlTask, Judgement, Kept, Needed, Subset


def load_judgement(source: Source) -> Judgement:
    """Whether the circuit is faithful, complete and minimal.

    Raises:
        UserError: The file is malformed.
    """
    top = source.item(source.parse(source.text()))
    kept, complete = top.child("faithfulness"), top.child("completeness")
    return Judgement(
        heads=top.components("heads"),
        clean=_interval(top, "clean"),
        corrupt=_interval(top, "corrupt"),
        circuit=_kept(kept.child("circuit")),
        nothing=_kept(kept.child("nothing")),
        incomplete=_interval(complete, "mean_absolute_difference"),
        subsets=tuple(
            Subset(
                item.components("removed"),
                item.number("circuit"),
                item.number("model"),
                _interval(item, "difference"),
            )
            for item in complete.children("subsets")
        ),
        minimality=tuple(
            Needed(
                item.component("id"),
                _interval(item, "from_circuit"),
                _interval(item, "from_model"),
            )
            for item in top.children("minimality")
        ),
        controls=tuple(_control(item) for item in top.children("controls"))
        if top.values.get("controls")
        else (),
        pairs=top.count("pairs"),
        groups=top.count("groups"),
    )


def _interval(item: Item, key: str) -> Estimate:
    return item.child(key).estimate("estimate")


def _kept(item: Item) -> Kept:
    return Kept(
        logit_diff=_interval(item, "logit_diff"),
        share=None if item.values.get("share") is None else _interval(item, "share"),
        accuracy=_interval(item, "accuracy"),
    )


def _control(item: Item) -> ControlTask:
    shared = item.optional_number("shared")
    return ControlTask(
        task=item.text("task"),
        rate=item.fraction("rate") if "rate" in item.values else None,
        kept=bool(item.values.get("kept")),
        shared=None if shared is None else int(shared),
    )
