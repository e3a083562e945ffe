"""Read and check a run directory; the only part of the report that touches its files."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from circuitune.errors import UserError
from circuitune.report.estimate import Estimate
from circuitune.report.fields import COMPONENT, Item, Source
from circuitune.report.frames import read_table
from circuitune.report.load_explain import load_explanation
from circuitune.report.load_judged import load_judgement
from circuitune.report.load_reach import load_joint, load_transfer
from circuitune.report.records import (
    EMBEDDING,
    Circuit,
    Evaluation,
    FeedEdge,
    FeedEffect,
    FeedNode,
    Feeds,
    Manifest,
    ModelCard,
    Pair,
    Prefix,
    RankedComponent,
    Run,
    Selection,
    SinglePass,
    TaskSelection,
    TunedVariant,
    Tuning,
)
from circuitune.runs import outdated

_EFFECT_COLUMNS = ("component", "layer", "example", "metric", "effect")
_KNOCKOUT_COLUMNS = ("set", "k", "draw", "ablation", "where", "task", "accuracy", "n")
_KNOCKOUT_EXTRAS = ("low", "high", "logit_diff", "kl", "kl_low", "kl_high")
_KNOCKOUT_TEXTS = ("set", "task", "ablation", "where", "source")
_NUMERIC = ("layer", "example", "effect", "noise", "k", "draw", "accuracy", "n")
_STAGES = {
    "knockout.parquet": "validate",
    "validate.json": "validate",
    "explain/explain.json": "explain",
    "transfer.parquet": "transfer",
    "transfer.json": "transfer",
    "tune.json": "tune",
    "eval.json": "evaluate",
}
_UNITS = ("accuracy", "low", "high")


def load(run: Path) -> Run:
    """Read a run directory; what `circuitune locate` writes must be there, the rest may be.

    Raises:
        UserError: The directory or a file that every run has is absent, or a file is malformed.
    """
    if not run.is_dir():
        raise UserError(
            f"The report needs a run directory, but {run} is no folder; "
            f"run `circuitune run MODEL --out {shlex.quote(str(run))}` first."
        )
    files = {
        name: _source(run, name)
        for name in ("manifest.json", "pairs.jsonl", "effects.parquet", "circuit.json")
    }
    for name, source in files.items():
        if not source.path.is_file():
            raise UserError(f"{run} holds no {name}; run `{source.command}` first.")
    manifest = _manifest(files["manifest.json"])
    selection, knockout, judged, explained, reached, matrix, tuning, evaluations = (
        source if source.path.is_file() else None
        for source in (
            _source(run, "selection.json"),
            _source(run, "knockout.parquet"),
            _source(run, "validate.json"),
            _source(run, "explain/explain.json"),
            _source(run, "transfer.json"),
            _source(run, "transfer.parquet"),
            _source(run, "tune.json"),
            _source(run, "eval.json"),
        )
    )
    records = None if evaluations is None else load_evaluations(evaluations)
    circuit = _circuit(files["circuit.json"])
    effects = _effects(files["effects.parquet"])
    named = [part.id for part in circuit.components]
    named += [node.id for node in circuit.feeds.nodes] if circuit.feeds else []
    _check_inside(files["circuit.json"], named, manifest.model)
    _check_inside(files["effects.parquet"], list(effects["component"].unique()), manifest.model)
    return Run(
        path=run,
        manifest=manifest,
        pairs=_pairs(files["pairs.jsonl"]),
        selection=selection and _selection(selection),
        effects=effects,
        circuit=circuit,
        knockout=None if knockout is None else _knockout(knockout),
        judgement=judged and load_judgement(judged),
        explanation=explained and load_explanation(explained),
        transfer=reached and load_transfer(reached, _knockout(matrix) if matrix else None),
        tuning=tuning and _tuning(tuning),
        evaluations=records and tuple(r for r in records if not _is_benchmark(r)),
        benchmarks=tuple(r for r in records or () if _is_benchmark(r)),
        outdated=outdated(run, manifest.stages),
    )


def stage_command(stage: str, run: Path) -> str:
    """The command line that runs one stage of `run`."""
    place = shlex.quote(str(run))
    return f"circuitune {stage} {'MODEL --out ' if stage == 'locate' else ''}{place}"


def _source(run: Path, name: str) -> Source:
    return Source(run / name, stage_command(_STAGES.get(name, "locate"), run))


def _manifest(source: Source) -> Manifest:
    top = source.item(source.parse(source.text()))
    model = top.child("model")
    card = ModelCard(
        id=model.text("id"),
        family=model.text("family"),
        layers=model.count("layers"),
        heads=model.count("heads"),
        kv_heads=model.count("kv_heads"),
        d_head=model.count("d_head"),
        d_model=model.count("d_model"),
        parameters=model.count("parameters"),
        dtype=model.text("dtype"),
    )
    versions = {"circuitune": top.text("circuitune"), **top.mapping("versions")}
    return Manifest(
        command=top.text("command"),
        model=card,
        config={stage: item.values for stage, item in top.named("config").items()},
        versions={name: str(version) for name, version in versions.items()},
        machine=top.mapping("machine"),
        stages={stage: item.values for stage, item in top.named("stages").items()},
    )


def _pairs(source: Source) -> tuple[Pair, ...]:
    pairs = []
    for number, line in enumerate(source.text().split("\n"), start=1):
        if line.strip():
            where = f"line {number}"
            item = source.item(source.parse(line, where), where)
            group = item.values.get("group")
            texts = [item.text(key) for key in ("clean", "corrupt", "answer", "task")]
            pairs.append(
                Pair(
                    *texts,
                    template=str(item.values.get("template", "")),
                    split=item.text("split"),
                    group=None if group is None else str(group),
                )
            )
    if not pairs:
        raise source.fault("hold at least one pair", "it is empty")
    return tuple(pairs)


def _selection(source: Source) -> Selection:
    top = source.item(source.parse(source.text()))
    chosen = top.values.get("prefix")
    return Selection(
        prefixes=tuple(
            Prefix(
                text=item.text("prefix"),
                accuracy=item.fraction("accuracy"),
                n=item.count("n"),
                chosen=item.text("prefix") == chosen,
            )
            for item in top.children("prefixes")
        ),
        answer_policy=top.text("answer_policy"),
        tasks=tuple(
            TaskSelection(
                task=task,
                tried=item.count("tried"),
                correct=item.count("correct"),
                rate=item.fraction("rate"),
                select=item.count("select"),
                test=item.count("test"),
            )
            for task, item in top.named("tasks").items()
        ),
    )


def _ranked(item: Item) -> RankedComponent:
    number = item.optional_number("round")
    return RankedComponent(
        id=item.component("id"),
        effect=item.estimate("estimate"),
        round=None if number is None else int(number),
    )


def _circuit(source: Source) -> Circuit:
    top = source.item(source.parse(source.text()))
    rule = top.child("rule")
    components = tuple(_ranked(item) for item in top.children("components"))
    size = top.optional_number("size")
    single = top.child("single_pass") if top.values.get("single_pass") is not None else None
    noise = top.child("noise") if top.values.get("noise") is not None else None
    graph = top.child("graph") if top.values.get("graph") is not None else None
    untold = graph.text("note") if graph and "note" in graph.values else ""
    return Circuit(
        components=components,
        size=len(components) if size is None else int(size),
        significance=_optional_mapping(top, "significance"),
        stability=_optional_mapping(top, "stability"),
        rule=rule.values,
        joint=load_joint(rule, [part.id for part in components[: int(size or len(components))]]),
        metric=str(rule.values.get("metric", "logit_diff")),
        task=top.text("task"),
        single_pass=None if single is None else _single_pass(single),
        noise={name: noise.number(name) for name in noise.values} if noise else {},
        feeds=_feeds(graph) if graph and not untold else None,
        untold=untold,
    )


def _optional_mapping(item: Item, name: str) -> Mapping[str, object]:
    return item.mapping(name) if item.values.get(name) is not None else {}


def _single_pass(item: Item) -> SinglePass:
    heads = item.optional_number("key_heads")
    return SinglePass(
        metric=item.text("metric"),
        components=tuple(_ranked(child) for child in item.children("components")),
        key_cut=item.optional_number("key_cut"),
        key_heads=None if heads is None else int(heads),
    )


def _feeds(top: Item) -> Feeds:
    """Who feeds the key heads."""
    totals = top.child("totals")
    contrasts = _names(top, "contrasts")
    return Feeds(
        contrasts=contrasts,
        roles=_names(top, "roles"),
        totals={name: totals.number(name) for name in contrasts},
        nodes=tuple(
            FeedNode(
                item.component("id"),
                bool(item.values.get("key")),
                _names(item, "brings"),
                _names(item, "passes_on"),
                {name: _feed_effect(own) for name, own in item.named("effects").items()},
            )
            for item in top.children("nodes")
        ),
        edges=tuple(_feed_edge(item) for item in top.children("edges")),
        prompts=top.count("prompts"),
        given=top.count("given"),
        groups=top.count("groups"),
        dropped={name: top.child("dropped").count(name) for name in top.mapping("dropped")},
        rule=top.text("brings"),
    )


def _names(item: Item, key: str) -> tuple[str, ...]:
    return tuple(str(name) for name in item.sequence(key))


def _feed_effect(item: Item) -> FeedEffect:
    return FeedEffect(item.estimate("estimate"), item.number("p_adjusted"), item.number("share"))


def _feed_edge(item: Item) -> FeedEdge:
    head, _, kind = item.text("receiver").rpartition(".")
    sender = item.text("sender")
    at, then = (item.values.get(key) for key in ("at", "then"))
    known = COMPONENT.fullmatch(sender) or sender == EMBEDDING
    if not known or not COMPONENT.fullmatch(head) or kind not in ("q", "k", "v"):
        raise item.source.fault(
            f"hold edges from a component or {EMBEDDING} to the q, k or v of a head in {item.name}",
            f"found '{sender}' to '{item.text('receiver')}'",
        )
    return FeedEdge(
        sender=sender,
        role=item.text("role"),
        head=head,
        kind=kind,
        contrast=item.text("contrast"),
        at=None if at is None else str(at),
        then=None if then is None else str(then),
        effect=_feed_effect(item),
    )


def _tuning(source: Source) -> Tuning:
    top = source.item(source.parse(source.text()))
    variants = tuple(
        TunedVariant(
            name=name,
            components=item.components("components"),
            parameters=item.count("parameters"),
            share=item.number("share"),
            steps=item.count("steps"),
            lr=item.number("lr"),
            seconds=item.number("seconds"),
            tokens_per_second=item.optional_number("tokens_per_second"),
            loss_first=item.optional_number("loss_first"),
            loss_last=item.optional_number("loss_last"),
        )
        for name, item in top.named("variants").items()
    )
    return Tuning(variants, rule=str(top.values.get("rule", "")))


def load_evaluations(source: Source) -> tuple[Evaluation, ...]:
    """Records of `eval.json`; those of a suite have a kind, or say what is missing.

    Raises:
        UserError: The file cannot be read, or a record is malformed.
    """
    records = source.parse(source.text())
    if not isinstance(records, list):
        raise source.fault("hold a list of records", f"found {type(records).__name__}")
    items = [source.item(record, f"record {place}") for place, record in enumerate(records)]
    return tuple(_evaluation(item) for item in items)


def _evaluation(item: Item) -> Evaluation:
    absent, not_worse = item.text("metric") == "missing", item.values.get("not_worse")
    return Evaluation(
        task=item.text("task"),
        variant=item.text("variant"),
        metric=item.text("metric"),
        estimate=Estimate(0.0) if absent else item.estimate("value"),
        n=item.count("n"),
        kind=str(item.values.get("kind", "")),
        p_holm=item.optional_number("p_holm"),
        not_worse=not_worse if isinstance(not_worse, bool) else None,
        chance=item.optional_number("chance"),
        reason=item.text("reason") if absent else "",
    )


def _is_benchmark(record: Evaluation) -> bool:
    return bool(record.kind or record.reason)


def _effects(source: Source) -> pd.DataFrame:
    frame = _table(source, _EFFECT_COLUMNS)
    names = frame["component"].astype(str)
    unknown = [name for name in names.unique() if COMPONENT.fullmatch(name) is None]
    if unknown:
        raise source.fault("name components like '12.3' or 'mlp.7'", f"found '{unknown[0]}'")
    if frame.duplicated(["component", "example", "metric"]).any():
        raise source.fault("hold one row per component, example and metric", "one comes twice")
    return frame.assign(component=names, metric=frame["metric"].astype(str))


def _knockout(source: Source) -> pd.DataFrame:
    frame = _table(source, _KNOCKOUT_COLUMNS)
    absent = [name for name in _KNOCKOUT_EXTRAS if name not in frame.columns]
    frame = frame.assign(**dict.fromkeys(absent, float("nan")))
    if "source" not in frame.columns:
        frame = frame.assign(source="")
    frame = frame.assign(k=frame["k"].astype(int), n=frame["n"].astype(int))
    texts = {name: frame[name].astype(str) for name in _KNOCKOUT_TEXTS}
    return frame.assign(**texts)


def _table(source: Source, columns: Sequence[str]) -> pd.DataFrame:
    frame = read_table(
        source, columns, numbers=_NUMERIC, optional=_KNOCKOUT_EXTRAS, fractions=_UNITS
    )
    if frame.empty:
        raise source.fault("hold at least one row", "it is empty")
    return frame


def _check_inside(source: Source, names: Sequence[str], model: ModelCard) -> None:
    for name in names:
        match = COMPONENT.fullmatch(name)
        layer = int(match["layer"] or match["mlp"]) if match else model.layers
        head = int(match["head"] or 0) if match else model.heads
        if layer >= model.layers or head >= model.heads:
            raise source.fault(
                f"name components of the model's {model.layers} layers and {model.heads} heads",
                f"found '{name}'",
            )
