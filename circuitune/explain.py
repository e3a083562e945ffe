"""The stage that tells what the key heads and the MLPs do, on the held-out half.

It writes a folder ``explain``. Means are over pairs; ``low`` and ``high`` are 95 % intervals that
resample groups of pairs; ``n`` counts pairs. Tables, one row each:

``attention.parquet``: attention weight from END (see `circuitune.attention`; a description, no
evidence). ``component`` is a head, a layer (``layer 20``: its other heads) or ``all heads``;
``set`` is ``key``, ``graph`` (a head of the graph that is not key), ``layer`` or ``all``, the last
two being controls; ``role`` of the tokens; ``mean``, ``low``, ``high`` of the weight; ``uniform``,
what equal attention to all tokens would give; ``brings``, what the graph says that the head brings
to the answer (absent without a graph); ``n``.

``readout.parquet``: what a head writes at END, in logits (`circuitune.readout`). ``component``;
``set``; ``run`` is ``clean``, ``corrupt`` or ``difference`` (clean minus corrupt); ``token`` is
``answer``, ``operand 1``, ``operand 2`` or ``other`` (mean over the other admissible answers);
``mean``, ``low``, ``high``, ``n``.

``mlps.parquet``: ``layer``; ``measure`` is ``effect`` (exact direct effect on the logit
difference, negative supports the answer) or ``cosine``; ``of``, for a cosine, is ``input`` (the
residual stream), ``output`` (what the MLP adds) or ``sum``; ``token``, for a cosine, is what the
unembedding row is of, as above (``other`` is the control); ``mean``, ``low``, ``high``, ``n``. Rows
of the unembedding are taken with the gain of the final norm, as the model reads them.

``lens.parquet``: the logit lens. ``layer``; ``after`` is ``attention`` or ``mlp``; ``token`` is
``answer``, ``operand 1``, ``operand 2``, ``answer - 1`` or ``answer + 1``; ``rank`` (one more than
the number of tokens with a larger logit) and ``probability`` among all tokens, each with ``_low``
and ``_high``; ``n``.

``neurons.parquet``: neurons of the MLPs that are strongest on the ``select`` half. ``component``;
``neuron``; ``estimate``, the gradient estimate on the ``select`` half that chose it; ``mean``,
``low``, ``high`` of its exact direct effect; ``share`` of its MLP's effect; ``clean`` and
``corrupt``, its mean activations; ``tokens``, those that its output row promotes where it is more
active in the clean run (else those that it would); ``n``.

``explain.json`` holds two labels of each head with their confidence, ``label`` by where it looks
and ``effect_label`` by what it brings to the answer. They may differ: what a head reads at a token
need not be that token. It also holds the layers between which the answer rises, one example prompt,
and under ``notes`` why a table lacks something. Own pairs have no operands: their roles are
``before``, ``changed``, ``after`` and ``end``.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuitune import attention, neurons, readout
from circuitune.attention import Label, vote
from circuitune.components import Circuit, Component, Head, Mlp, check_components, parse_component
from circuitune.config import ExplainConfig
from circuitune.effects import EffectTable
from circuitune.errors import UserError
from circuitune.graph import BRINGS
from circuitune.models import Model
from circuitune.pairs import PairSet
from circuitune.patching import EndStates, end_states, finish, first_choice
from circuitune.prompts import prefill
from circuitune.readout import Frozen, Stream
from circuitune.runs import damaged, read_circuit, write_json
from circuitune.stats import resample_counts
from circuitune.subjects import OPERANDS, SPREAD, Means, Subject, kinds_of, look_at
from circuitune.tasks import sweep
from circuitune.writing import Writing, encode_text

COLUMNS = {
    "attention": ("component", "set", "role", *SPREAD, "uniform", "brings"),
    "readout": ("component", "set", "run", "token", *SPREAD),
    "mlps": ("layer", "measure", "of", "token", *SPREAD),
    "lens": (
        *("layer", "after", "token", "rank", "rank_low", "rank_high"),
        *("probability", "probability_low", "probability_high", "n"),
    ),
    "neurons": (
        *("component", "neuron", "estimate", *SPREAD),
        *("share", "clean", "corrupt", "tokens"),
    ),
}
# The answer rises between these shares of the way from its probability after the first layer
# to its largest one.
STARTED, ENDED = 0.1, 0.9
RISE = (
    "mean probability of the answer by the logit lens after each layer: start and end are the "
    f"first layers with {STARTED:.0%} and {ENDED:.0%} of its rise, inflection is the layer between "
    "them in which it rises most"
)
EFFECT_RULE = (
    "the difference (of an operand, of the operator) of whose whole effect on the answer the "
    f"head's direct effect is the largest share, other below {BRINGS:.0%}; confidence as above"
)
# Pairs of the select half that choose neurons.
SCREENED = 16
# Tokens shown at each layer of the example.
SHOWN = 5


def explain(model: Model, config: ExplainConfig, run: Path, work: Path) -> None:
    """The stage: attention, readout, MLPs, logit lens and neurons; writes the folder ``explain``.

    Args:
        model: the model.
        config: options.
        run: the run directory, read for pairs, effects and the circuit.
        work: where the folder is written.

    Raises:
        UserError: the circuit has no heads, or its task no held-out pairs.
    """
    record, circuit = read_circuit(run)
    check_components(circuit.heads, model.layers, model.heads)
    heads, graph = chosen(record)
    pair_set = PairSet.load(run)
    subject = look_at(
        model, pair_set, record["task"], "test", most=config.prompts, seed=config.seed
    )
    means = Means(subject.task.pairs.groups, config.seed, config.draws)
    told = {str(head): _told(head, kind, graph) for head, kind in heads.items()}
    for name, label in effect_labels(record, run, pair_set, means).items():
        if name in told:
            told[name] |= {"effect_label": label.name, "effect_confidence": label.confidence}
    notes: dict[str, str] = {}

    def attempt(name: str, make: Callable[[], Any]) -> Any:
        """A part of the result, or a note where the model or the pairs do not allow it."""
        try:
            return make()
        except UserError as error:
            notes[name] = str(error)
            return None

    stream = attempt("readout", lambda: readout.stream(model, subject.task.clean))
    norm = stream and attempt("readout", lambda: _final_norm(model, subject, stream))
    rows = {
        "attention": attempt("attention", lambda: attention_rows(model, subject, told, means)),
        "readout": norm
        and attempt("readout", lambda: readout_rows(model, subject, norm, told, means, config.top)),
        "mlps": effect_rows(model, subject, means),
        "neurons": attempt(
            "neurons", lambda: neuron_rows(model, pair_set, subject, norm, run, means, config)
        ),
    }
    rows["mlps"] += cosine_rows(model, subject, stream, norm, means) if norm else []
    rows["lens"], probability = lens_rows(model, subject, stream, means)
    content = {
        "task": record["task"],
        "model": model.source,
        "split": "test",
        **subject.facts,
        "label_rule": attention.RULE,
        "effect_label_rule": EFFECT_RULE,
        "heads": [{"id": name} | facts for name, facts in told.items()],
        "rise": {"rule": RISE} | rise(probability, means),
        "example": example(model, pair_set, subject),
        "notes": notes,
    }
    _write(work / "explain", rows, content)


def _write(
    folder: Path, rows: Mapping[str, list[dict[str, Any]] | None], content: dict[str, Any]
) -> None:
    """The tables and the summary; a table that could not be made has no rows."""
    folder.mkdir()
    for name, own in rows.items():
        frame = pd.DataFrame(own or [], columns=list(COLUMNS[name]))
        frame.to_parquet(folder / f"{name}.parquet", index=False)
    write_json(folder / "explain.json", content)


def _told(head: Head, kind: str, graph: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What is known of a head before anything is measured."""
    node = graph.get(str(head), {})
    return {"set": kind} | {key: node[key] for key in ("brings", "passes_on") if key in node}


def _final_norm(model: Model, subject: Subject, stream: Stream) -> Frozen:
    return readout.final_norm(model, subject.task.clean, stream.after[-1])


def chosen(record: Mapping[str, Any]) -> tuple[dict[Head, str], dict[str, dict[str, Any]]]:
    """Key heads, then other heads of the graph, each with its set; and the nodes of the graph.

    Raises:
        UserError: there is no head.
    """
    circuit = Circuit.from_json(dict(record))
    key = circuit.heads[: max(1, circuit.size)]
    if not key:
        raise UserError(
            "An explanation needs at least one key head, circuit.json has none; locate with "
            "a larger --most."
        )
    graph = {node["id"]: node for node in record.get("graph", {}).get("nodes", ())}
    parts = [parse_component(name) for name in graph]
    heads = dict.fromkeys(key, "key")
    heads |= {p: "graph" for p in parts if isinstance(p, Head) and p not in heads}
    return heads, graph


def effect_labels(
    record: Mapping[str, Any], run: Path, pair_set: PairSet, means: Means
) -> dict[str, Label]:
    """The label of each head of the graph by what it brings to the answer, see `EFFECT_RULE`.

    Empty without a graph.
    """
    try:
        values = pd.read_parquet(run / "paths.parquet")
    except (OSError, ValueError) as error:
        raise damaged(run / "paths.parquet", error) from error
    totals = record.get("graph", {}).get("totals", {})
    if values.empty or not totals:
        return {}
    groups = [pair.group for pair in pair_set.pairs if pair.task == record["task"]]
    values = values[(values["stage"] == "direct") & (values["split"] == "test")]
    labels = {}
    for name, own in values.groupby("sender", sort=False):
        table = own.pivot(index="example", columns="contrast", values="effect")
        columns = {c: table[c].to_numpy() / whole for c, whole in totals.items() if whole}
        columns["other"] = np.full(len(table), BRINGS)
        own_groups = [groups[place] for place in table.index]
        kinds = dict.fromkeys(OPERANDS, "operand")
        labels[name] = vote(columns, own_groups, rng=means.rng, draws=means.draws, kinds=kinds)
    return labels


# --------------------------------------------------------------------------------- the tables


def attention_rows(
    model: Model,
    subject: Subject,
    told: dict[str, dict[str, Any]],
    means: Means,
) -> list[dict[str, Any]]:
    """Rows of ``attention.parquet``; labels and means of each head are added to ``told``.

    Raises:
        UserError: the prompts have no roles, or the model does not give its attention weights.
    """
    if subject.found is None:
        raise UserError(f"Attention by role needs roles, the pairs have {subject.facts['roles']}")
    looks = attention.look(model, subject.found.prompts)
    heads = _heads(told)
    sets: list[tuple[str, str, np.ndarray]] = [
        (str(head), kind, looks.of(head)) for head, kind in heads.items()
    ]
    key = [head for head, kind in heads.items() if kind == "key"]
    for layer in sorted({head.layer for head in key}):
        others = [i for i in range(model.heads) if Head(layer, i) not in key]
        if others:
            sets.append((f"layer {layer}", "layer", looks.weights[layer, others].mean(axis=0)))
    sets.append(("all heads", "all", looks.weights.mean(axis=(0, 1))))
    uniform = looks.uniform.mean(axis=0)
    rows = []
    for name, kind, weights in sets:
        brings = told.get(name, {}).get("brings")
        facts = {"component": name, "set": kind}
        facts["brings"] = None if brings is None else ", ".join(brings)
        for role, spread, share in zip(looks.roles, means.of(weights.T), uniform, strict=True):
            rows.append(facts | {"role": role, "uniform": float(share)} | spread)
    for head in heads:
        label = looks.label(head, rng=means.rng, draws=means.draws)
        told[str(head)] |= {
            "label": label.name,
            "confidence": label.confidence,
            "attention": dict(zip(looks.roles, looks.of(head).mean(axis=0).tolist(), strict=True)),
        }
    return rows


def _heads(told: Mapping[str, Mapping[str, Any]]) -> dict[Head, str]:
    """The heads that are told about, each with its set."""
    parts = {parse_component(name): facts["set"] for name, facts in told.items()}
    return {part: kind for part, kind in parts.items() if isinstance(part, Head)}


def readout_rows(
    model: Model,
    subject: Subject,
    norm: Frozen,
    told: dict[str, dict[str, Any]],
    means: Means,
    top: int,
) -> list[dict[str, Any]]:
    """Rows of ``readout.parquet``; the tokens that each head writes are added to ``told``."""
    task, kinds = subject.task, kinds_of(subject)
    rows = []
    for head, kind in _heads(told).items():
        clean = readout.head_writes(model, task.clean, head)
        corrupt = readout.head_writes(model, task.clean, head, task.corrupt.z[head.layer])
        runs = {"clean": clean, "corrupt": corrupt, "difference": clean - corrupt}
        for run, written in runs.items():
            logits = readout.contributions(model, norm, written, task.pairs.candidates)
            values = logits.double().cpu().numpy()
            each = np.stack([(values * weights).sum(axis=1) for weights in kinds.values()])
            for token, spread in zip(kinds, means.of(each), strict=True):
                facts = {"component": str(head), "set": kind, "run": run, "token": token}
                rows.append(facts | spread)
        told[str(head)] |= {
            "writes": readout.top_tokens(model, norm(clean).mean(dim=0), top),
            "writes_more": readout.top_tokens(model, norm(clean - corrupt).mean(dim=0), top),
        }
    return rows


def effect_rows(model: Model, subject: Subject, means: Means) -> list[dict[str, Any]]:
    """Rows of ``mlps.parquet`` with the exact direct effects."""
    mlps: list[Component] = [Mlp(layer) for layer in range(model.layers)]
    effects = means.of(sweep(model, subject.task, senders=mlps).effect("logit_diff"))
    return [
        {"layer": layer, "measure": "effect", "of": None, "token": None} | spread
        for layer, spread in enumerate(effects)
    ]


def cosine_rows(
    model: Model, subject: Subject, stream: Stream, norm: Frozen, means: Means
) -> list[dict[str, Any]]:
    """Rows of ``mlps.parquet`` with the cosines."""
    directions = norm.rows(readout.unembedding(model, subject.task.pairs.candidates))
    parts = {"input": stream.middle, "output": stream.mlp, "sum": stream.after}
    rows = []
    for part, values in parts.items():
        each = np.stack(
            [readout.cosines(values, row.expand_as(values[0])) for row in directions], axis=-1
        )
        for token, weights in kinds_of(subject).items():
            found = means.of((each * weights).sum(axis=-1))
            rows += [
                {"layer": layer, "measure": "cosine", "of": part, "token": token} | spread
                for layer, spread in enumerate(found)
            ]
    return rows


def lens_rows(
    model: Model, subject: Subject, stream: Stream | None, means: Means
) -> tuple[list[dict[str, Any]], Float[np.ndarray, "layer example"]]:
    """Rows of ``lens.parquet``, and the answer's probability after each layer."""
    words = np.stack(list(subject.words.values()), axis=1)
    finals = {"mlp": layer_finals(model, subject.task.clean)}
    if stream is not None:
        finals["attention"] = finish(model, stream.middle)
    lenses = {
        after: readout.lens(model, values, np.maximum(words, 0)) for after, values in finals.items()
    }
    rows: list[dict[str, Any]] = []
    for after, found in lenses.items():
        for column, token in enumerate(subject.words):
            there = words[:, column] >= 0
            rank, chance = (
                means.of(np.where(there, values[..., column].astype(float), np.nan))
                for values in (found.rank, found.probability)
            )
            for layer, (one, other) in enumerate(zip(rank, chance, strict=True)):
                facts = {"layer": layer, "after": after, "token": token, "n": one["n"]}
                for name, spread in (("rank", one), ("probability", other)):
                    facts |= {name: spread["mean"]}
                    facts |= {f"{name}_{side}": spread[side] for side in ("low", "high")}
                rows.append(facts)
    return rows, lenses["mlp"].probability[..., list(subject.words).index("answer")]


@torch.no_grad()
def layer_finals(model: Model, states: EndStates) -> Float[Tensor, "layer example width"]:
    """Normed states at END after each layer; after the last it is the model's own final state."""
    return torch.cat([finish(model, states.entry[1:]), states.final[None]])


def _promoted(
    model: Model, norm: Frozen | None, direction: Float[Tensor, " d_model"], count: int
) -> list[str]:
    """Tokens that a direction of the residual stream promotes; none if there is no norm to tell."""
    return readout.top_tokens(model, norm.weigh(direction), count) if norm else []


def neuron_rows(
    model: Model,
    pair_set: PairSet,
    subject: Subject,
    norm: Frozen | None,
    run: Path,
    means: Means,
    config: ExplainConfig,
) -> list[dict[str, Any]]:
    """Rows of ``neurons.parquet``: chosen on the select half, measured on the test half.

    Raises:
        UserError: the MLPs have no single down projection, or weights are offloaded.
    """
    table = EffectTable.load(run / "effects.parquet")
    mlps = [part for part in table.components if isinstance(part, Mlp)]
    own = table.select(mlps).mean()
    strongest = [mlps[row] for row in np.argsort(-np.abs(own), kind="stable")[: config.mlps]]
    screened = look_at(
        model, pair_set, subject.name, "select", most=SCREENED, seed=config.seed
    ).task
    rows: list[dict[str, Any]] = []
    for mlp in strongest:
        layer = mlp.layer
        estimate = neurons.screen(model, screened, layer)
        best = np.argsort(-np.abs(estimate), kind="stable")[: config.neurons].tolist()
        effects = neurons.neuron_effects(model, subject.task, layer, best)
        whole = float(sweep(model, subject.task, senders=[mlp]).mean()[0])
        clean, corrupt = (
            neurons.activations(model, states, layer)[:, best].mean(dim=0).tolist()
            for states in (subject.task.clean, subject.task.corrupt)
        )
        outputs = neurons.output_rows(model, layer, best)
        for place, (neuron, spread) in enumerate(zip(best, means.of(effects), strict=True)):
            sign = 1 if clean[place] >= corrupt[place] else -1
            rows.append(
                {"component": str(mlp), "neuron": neuron, "estimate": float(estimate[neuron])}
                | spread
                | {"share": spread["mean"] / whole if whole else 0.0}
                | {"clean": clean[place], "corrupt": corrupt[place]}
                | {"tokens": _promoted(model, norm, sign * outputs[place], config.top)}
            )
    return rows


# -------------------------------------------------------------------------------- the summary


def rise(probability: Float[np.ndarray, "layer example"], means: Means) -> dict[str, Any]:
    """The layers between which the answer rises, see `RISE`, each with its interval."""
    counts = resample_counts(
        probability.shape[1], draws=means.draws, rng=means.rng, groups=means.groups
    )
    drawn = np.array([_points(curve) for curve in (probability @ counts.T / counts.sum(1)).T])
    low, high = np.quantile(drawn, (0.025, 0.975), axis=0, method="nearest").astype(int)
    points = _points(probability.mean(axis=1))
    return {
        name: {"layer": int(points[place]), "low": int(low[place]), "high": int(high[place])}
        for place, name in enumerate(("start", "inflection", "end"))
    }


def _points(curve: Float[np.ndarray, " layer"]) -> tuple[int, int, int]:
    """Start, inflection and end of a rise."""
    share = (curve - curve[0]) / max(curve.max() - curve[0], 1e-30)
    start, end = (int((share >= cut).argmax()) for cut in (STARTED, ENDED))
    steps = np.diff(share, prepend=share[0])
    return start, start + int(steps[start : end + 1].argmax()), end


def example(model: Model, pair_set: PairSet, subject: Subject) -> dict[str, Any]:
    """One prompt through the logit lens: ``4 + 3 =`` if the model answers it, else a pair.

    ``layers`` gives, after each layer, the most probable tokens, and rank and probability of the
    tokens that are watched.
    """
    prompt, words = _written(model, pair_set, subject) or (None, {})
    if prompt is None:
        prompt = model.tokenizer.decode(subject.task.pairs.clean[0])
        tokens = subject.task.pairs.clean[0]
        words = {name: int(ids[0]) for name, ids in subject.words.items() if ids[0] >= 0}
    else:
        tokens = encode_text(model.tokenizer, prompt)
    finals = layer_finals(model, end_states(model, prefill(model, [tokens])))
    found = readout.lens(model, finals, np.array([list(words.values())]))
    layers = []
    for layer in range(model.layers):
        watched = {
            name: {
                "rank": int(found.rank[layer, 0, column]),
                "probability": float(found.probability[layer, 0, column]),
            }
            for column, name in enumerate(words)
        }
        top = readout.first_tokens(model, finals[layer, 0], SHOWN)
        layers.append({"layer": layer, "top": top, "tokens": watched})
    shown = {name: model.tokenizer.decode([token]) for name, token in words.items()}
    return {"prompt": prompt, "tokens": shown, "layers": layers}


def _written(
    model: Model, pair_set: PairSet, subject: Subject
) -> tuple[str, dict[str, int]] | None:
    """The prompt of Zhang et al. (2024, section 4) and its tokens, if the model answers it."""
    chosen = pair_set.selection
    if "add" not in pair_set.tasks or "spaced_answer" not in chosen or len(subject.digits) < 10:
        return None
    prompt, _ = Writing(chosen["prefix"], chosen["spaced_answer"]).write("4 + 3 = ", "7")
    states = end_states(model, prefill(model, [encode_text(model.tokenizer, prompt)]))
    if int(first_choice(model, states.final)[0]) != subject.digits[7]:
        return None
    values = {"answer": 7, "operand 1": 4, "operand 2": 3, "answer - 1": 6, "answer + 1": 8}
    return prompt, {name: subject.digits[value] for name, value in values.items()}
