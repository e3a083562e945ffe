"""Reading of the folder `explain`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd

from circuitune.report.estimate import Estimate
from circuitune.report.fields import Item, Source
from circuitune.report.findings import (
    Example,
    ExampleLayer,
    Explanation,
    HeadStory,
    Label,
    LensPoint,
    Look,
    MlpFact,
    Neuron,
    Written,
)
from circuitune.report.frames import estimate, read_table

_SPREAD = ("mean", "low", "high")
_RANKS, _CHANCES = ((name, f"{name}_low", f"{name}_high") for name in ("rank", "probability"))
_COLUMNS = {
    "attention": ("component", "set", "role", *_SPREAD, "uniform"),
    "readout": ("component", "run", "token", *_SPREAD),
    "mlps": ("layer", "measure", "of", "token", *_SPREAD),
    "lens": ("layer", "after", "token", *_RANKS, *_CHANCES),
    "neurons": (
        *("component", "neuron", "estimate", *_SPREAD),
        *("share", "clean", "corrupt", "tokens"),
    ),
}
_NUMBERS = ("uniform", "layer", "neuron", "estimate", "share", "clean", "corrupt")
_OPTIONAL = (*_SPREAD, *_RANKS, *_CHANCES)


def load_explanation(source: Source) -> Explanation:
    """The folder of `source`, which is its `explain.json`; a table that is absent has no rows.

    Raises:
        UserError: A file is malformed.
    """
    top = source.item(source.parse(source.text()))
    rows = {name: _rows(source, name) for name in _COLUMNS}
    rise = top.child("rise") if top.values.get("rise") is not None else None
    return Explanation(
        heads=tuple(_head(item) for item in top.children("heads")),
        attention=_attention(rows["attention"]),
        readout=_readout(rows["readout"]),
        mlps=_mlps(rows["mlps"]),
        lens=_lens(rows["lens"]),
        neurons=_neurons(rows["neurons"]),
        rise={
            name: rise.child(name).estimate("layer")
            for name in ("start", "inflection", "end")
            if rise is not None and name in rise.values
        },
        example=_example(top.child("example")) if top.values.get("example") else None,
        notes={str(k): str(v) for k, v in (top.values.get("notes") or {}).items()},
        pairs=top.count("pairs"),
        groups=top.count("groups"),
    )


def _rows(source: Source, name: str) -> Sequence[Mapping[str, object]]:
    table = replace(source, path=source.path.with_name(f"{name}.parquet"))
    if not table.path.is_file():
        return ()
    columns = _COLUMNS[name]
    return read_table(table, columns, numbers=_NUMBERS, optional=_OPTIONAL).to_dict("records")


def _text(value: object) -> str:
    return "" if value is None or value is pd.NA or value != value else str(value)


def _spread(row: Mapping[str, object]) -> Estimate | None:
    return estimate(row, *_SPREAD)


def _attention(rows: Sequence[Mapping[str, object]]) -> tuple[Look, ...]:
    return tuple(
        Look(_text(row["component"]), _text(row["set"]), _text(row["role"]), weight, row["uniform"])
        for row in rows
        if (weight := _spread(row))
    )


def _readout(rows: Sequence[Mapping[str, object]]) -> tuple[Written, ...]:
    return tuple(
        Written(_text(row["component"]), _text(row["run"]), _text(row["token"]), logits)
        for row in rows
        if (logits := _spread(row))
    )


def _mlps(rows: Sequence[Mapping[str, object]]) -> tuple[MlpFact, ...]:
    return tuple(
        MlpFact(row["layer"], _text(row["of"]) or "effect", _text(row["token"]), value)
        for row in rows
        if (value := _spread(row))
    )


def _lens(rows: Sequence[Mapping[str, object]]) -> tuple[LensPoint, ...]:
    return tuple(
        LensPoint(row["layer"], _text(row["token"]), rank, probability)
        for row in rows
        if row["after"] == "mlp"
        if (rank := estimate(row, *_RANKS)) and (probability := estimate(row, *_CHANCES))
    )


def _neurons(rows: Sequence[Mapping[str, object]]) -> tuple[Neuron, ...]:
    return tuple(
        Neuron(
            mlp=_text(row["component"]),
            index=row["neuron"],
            estimate=row["estimate"],
            effect=effect,
            share=row["share"],
            clean=row["clean"],
            corrupt=row["corrupt"],
            tokens=() if row["tokens"] is None else tuple(map(str, row["tokens"])),
        )
        for row in rows
        if (effect := _spread(row))
    )


def _head(item: Item) -> HeadStory:
    return HeadStory(
        id=item.component("id"),
        key=item.values.get("set") == "key",
        brings=_texts(item, "brings") if "brings" in item.values else None,
        looks=_label(item, "label", "confidence"),
        does=_label(item, "effect_label", "effect_confidence"),
        writes=_texts(item, "writes"),
        writes_more=_texts(item, "writes_more"),
    )


def _texts(item: Item, key: str) -> tuple[str, ...]:
    return tuple(map(str, item.sequence(key))) if item.values.get(key) is not None else ()


def _label(item: Item, name: str, confidence: str) -> Label | None:
    if item.values.get(name) is None:
        return None
    return Label(item.text(name), item.fraction(confidence).value)


def _example(item: Item) -> Example:
    return Example(
        prompt=item.text("prompt"),
        tokens={str(kind): str(token) for kind, token in item.mapping("tokens").items()},
        layers=tuple(
            ExampleLayer(
                layer=layer.count("layer"),
                top=tuple(
                    (t.text("token"), t.number("probability")) for t in layer.children("top")
                ),
                ranks={kind: token.count("rank") for kind, token in layer.named("tokens").items()},
            )
            for layer in item.children("layers")
        ),
    )
