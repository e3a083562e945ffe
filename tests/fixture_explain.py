"""The folder `explain`, `validate.json` and the further knockouts of a synthetic run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

ROLES = ("start", "operand 1", "operator", "operand 2", "end", "other")
KINDS = ("answer", "operand 1", "operand 2", "answer - 1", "answer + 1")
CONTROLS = ("copy_number", "capital")
PAIRS, GROUPS, TEST = 40, 10, 96
# Head: where it looks, what it brings, tokens that it writes.
HEADS = {
    "20.8": ("operand 1", ["operand 1"], "operand", ["3", "4", " five", "\n"]),
    "17.2": ("operand 2", ["operand 2"], "operand", ["7", "8", " nine"]),
    "14.6": ("operator", [], "other", [" +", " plus", "<b>"]),
}
TURNS = {"start": (20, 19, 21), "inflection": (22, 21, 23), "end": (26, 25, 28)}
FAITHFUL, NOTHING, INCOMPLETE = (0.62, 0.51, 0.71), (0.04, -0.03, 0.09), (0.83, 0.61, 1.12)


def write_explanation(run: Path, layers: int, *, seed: int = 5) -> None:
    """Write the folder `explain` of a run with `layers` layers."""
    rng = np.random.default_rng(seed)
    folder = run / "explain"
    folder.mkdir(exist_ok=True)
    for name, rows in (
        ("attention", _attention(rng)),
        ("readout", _readout(rng)),
        ("mlps", _mlps(rng, layers)),
        ("lens", _lens(layers)),
        ("neurons", _neurons(rng)),
    ):
        pd.DataFrame(rows).to_parquet(folder / f"{name}.parquet", index=False)
    text = json.dumps(_told(layers), indent=1, ensure_ascii=False)
    (folder / "explain.json").write_text(text, encoding="utf-8")


def _spread(mean: float, half: float) -> dict[str, Any]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": PAIRS}


def _attention(rng: np.random.Generator) -> list[dict[str, Any]]:
    looks = {name: (role, "key") for name, (role, *_) in HEADS.items()}
    looks |= {"12.4": ("operand 2", "graph"), "layer 20": ("start", "layer")}
    rows = []
    for name, (most, kind) in {**looks, "all heads": ("start", "all")}.items():
        rest = rng.dirichlet(np.ones(len(ROLES))) * 0.4
        for role, share in zip(ROLES, rest, strict=True):
            facts = {"component": name, "set": kind, "role": role, "uniform": 1 / len(ROLES)}
            rows.append(facts | {"brings": None} | _spread(0.6 * (role == most) + share, 0.01))
    return rows


def _readout(rng: np.random.Generator) -> list[dict[str, Any]]:
    return [
        {"component": name, "set": "key", "run": run, "token": token}
        | _spread(float(rng.normal(0.5, 0.3)), 0.1)
        for name in HEADS
        for run in ("clean", "corrupt", "difference")
        for token in (*KINDS[:3], "other")
    ]


def _mlps(rng: np.random.Generator, layers: int) -> list[dict[str, Any]]:
    rows = []
    for layer in range(layers):
        facts = {"layer": layer, "measure": "effect", "of": None, "token": None}
        rows.append(facts | _spread(-2.0 * float(np.exp(-(((layer - 22) / 3) ** 2))), 0.2))
        for of in ("input", "output", "sum"):
            for token in (*KINDS[:3], "other"):
                facts = {"layer": layer, "measure": "cosine", "of": of, "token": token}
                rows.append(facts | _spread(float(rng.normal(0.1, 0.02)), 0.01))
    return rows


def _lens(layers: int) -> list[dict[str, Any]]:
    rows = []
    for after in ("attention", "mlp"):
        for place, token in enumerate(KINDS):
            for layer in range(layers):
                late = 1 / (1 + np.exp(-(layer - 23.0)))
                chance = 0.7 * late if token == "answer" else 0.05 * late
                rank = 1 + (30 + 20 * place) * (1 - late)
                facts = {"layer": layer, "after": after, "token": token, "n": PAIRS}
                for name, value in (("rank", rank), ("probability", chance)):
                    facts |= {name: value, f"{name}_low": 0.8 * value, f"{name}_high": 1.2 * value}
                rows.append(facts)
    return rows


def _neurons(rng: np.random.Generator) -> list[dict[str, Any]]:
    return [
        {"component": mlp, "neuron": 100 * place + 7, "estimate": -1.0 / (place + 1)}
        | _spread(-0.9 / (place + 1), 0.05)
        | {"share": 0.3, "clean": float(rng.normal(4, 1)), "corrupt": 0.5}
        | {"tokens": ["seven", " eight", "<i>"]}
        for mlp in ("mlp.22", "mlp.24")
        for place in range(8)
    ]


def _told(layers: int) -> dict[str, Any]:
    heads = [
        {
            "id": name,
            "set": "key",
            "brings": brings,
            "passes_on": [],
            "effect_label": does,
            "effect_confidence": 0.97,
            "label": role.split()[0],
            "confidence": 0.88,
            "writes": tokens,
            "writes_more": tokens[::-1],
        }
        for name, (role, brings, does, tokens) in HEADS.items()
    ]
    steps = [
        {
            "layer": layer,
            "top": [{"token": token, "probability": p} for token, p in ((" ", 0.6), ("7", 0.2))],
            "tokens": {kind: {"rank": 40 - layer, "probability": 0.01} for kind in KINDS},
        }
        for layer in range(layers)
    ]
    turns = {n: dict(zip(("layer", "low", "high"), ends, strict=True)) for n, ends in TURNS.items()}
    tokens = dict(zip(KINDS, "74368", strict=True))
    return {
        "task": "add",
        "pairs": PAIRS,
        "groups": GROUPS,
        "heads": [*heads, heads[0] | {"id": "12.4", "set": "graph"}],
        "rise": {"rule": "as measured", **turns},
        "example": {"prompt": "Math:\n4 + 3 = ", "tokens": tokens, "layers": steps},
        "notes": {},
    }


# -------------------------------------------------------------------------------- validate.json


def _interval(value: float, low: float, high: float) -> dict[str, Any]:
    return {"estimate": value, "low": low, "high": high, "n": TEST}


def judgement(heads: Sequence[str]) -> dict[str, Any]:
    """The content of `validate.json`; the last head does nothing beside the circuit."""

    def kept(share: tuple[float, float, float]) -> dict[str, Any]:
        rate = _interval(0.41, 0.3, 0.52)
        difference, divergence = _interval(0.4, 0.1, 0.7), _interval(1.2, 1.0, 1.4)
        kept = {"logit_diff": difference, "accuracy": rate, "kl": divergence}
        return kept | {"share": _interval(*share)}

    def without(place: int) -> dict[str, Any]:
        gap = _interval(-0.5 * place, -0.5 * place - 0.2, -0.5 * place + 0.2)
        return {"removed": [heads[place]], "circuit": -1.0, "model": 0.0, "difference": gap}

    return {
        "task": "add",
        "heads": list(heads),
        "pairs": TEST,
        "groups": 24,
        "clean": _interval(3.1, 2.8, 3.4),
        "corrupt": _interval(-2.4, -2.7, -2.1),
        "faithfulness": {"circuit": kept(FAITHFUL), "nothing": kept(NOTHING)},
        "completeness": {
            "mean_absolute_difference": _interval(*INCOMPLETE),
            "subsets": [without(place) for place in range(len(heads))],
        },
        "minimality": [
            {
                "id": name,
                "from_circuit": _interval(-0.3, -0.4, -0.2 + 0.5 * (name == heads[-1])),
                "from_model": _interval(-0.9, -1.2, -0.6),
            }
            for name in heads
        ],
        "controls": [
            {"task": name, **_rate(0.62, 0.51, 0.72), "kept": True, "shared": place}
            for place, name in enumerate(CONTROLS)
        ]
        + [{"task": "copy_word", **_rate(0.05, 0.02, 0.12), "kept": False}],
        "without_donor": 0,
    }


def _rate(rate: float, low: float, high: float) -> dict[str, float]:
    return {"rate": rate, "low": low, "high": high}


def further(task: str, size: int) -> pd.DataFrame:
    """Rows of `knockout.parquet`: other ablations at one size, and the control tasks."""
    rows = []

    def add(kind: str, asked: str, accuracy: float, **facts: object) -> None:
        row = {"set": kind, "k": size, "draw": 0, "ablation": "mean", "where": "end"}
        ends = {"low": max(0.0, accuracy - 0.06), "high": min(1.0, accuracy + 0.04)}
        lost = 1.0 - accuracy
        spread = {"kl": 2.0 * lost, "kl_low": 1.7 * lost, "kl_high": 2.3 * lost}
        row |= {"task": asked, "accuracy": accuracy, "n": TEST, "logit_diff": 1.0, "source": task}
        rows.append(row | ends | spread | facts)

    kinds = [(a, w) for w in ("end", "all") for a in ("mean", "zero", "resample")]
    for place, (ablation, where) in enumerate(kinds):
        for kind, rate in (("top", 0.03), ("matched", 0.93), ("least", 0.88)):
            if (ablation, where) != ("mean", "end") or kind == "least":
                source = "" if kind == "matched" else task
                rate_here = rate + 0.01 * place
                add(kind, task, rate_here, ablation=ablation, where=where, source=source)
    for draw, name in enumerate(CONTROLS):
        add("top", name, 0.9 - 0.1 * draw)
        add("other_task", name, 0.1, source=name, draw=draw)
        add("other_task", task, 0.8 + 0.1 * draw, source=name, draw=draw)
    return pd.DataFrame(rows)
