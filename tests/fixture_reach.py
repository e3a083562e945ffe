"""`transfer.json` with its matrix and the record of joint selection, of a synthetic run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

# Task: its family, prompts that were asked, right ones and those with the commonest answer.
PLACES = {
    "add": ("own", 288, 159, None),
    "mul": ("own", 279, 213, None),
    "carry": ("arithmetic", 72, 28, 8),
    "power": ("arithmetic", 48, 2, 9),
    "svamp": ("word problem", 60, 14, 12),
    "copy_word": ("control", 48, 37, 4),
}
KEPT = tuple(name for name in PLACES if name != "power")
K, ASKED, DRAWS, QUESTIONS = 3, 32, 3, 300
SHARED = {"mul": (4, 1.56, 4, 0.021), "carry": (7, 1.2, 3, 2e-6), "copy_word": (1, 0.8, 2, 0.62)}
# Change of accuracy with its interval: the heads of the task, then three random draws.
CHANGES = {
    "commonsense_qa": ((-0.003, -0.014, 0.008), (-0.01, -0.03, 0.0), (0.0, -0.01, 0.02)),
    "bbh": ((-0.031, -0.055, -0.012), (0.02, -0.01, 0.03), (-0.01, -0.02, 0.01)),
}
TARGETS, SPARED = ("add", "mul"), ("copy_word", "capital")
PROPOSERS = ("iterated", "greedy", "mask", "single_pass")
GOAL = {"left": 0.3, "harm": 0.05}


def left_of(source: str, target: str) -> float:
    """The accuracy that the heads of a task leave of another; an empty source is random."""
    if not source:
        return 0.9
    related = {*PLACES} - {"copy_word"}
    if source == target:
        return 0.125
    return 0.375 if {source, target} <= related else 1.0


def write_transfer(run: Path) -> None:
    """Write `transfer.parquet` and `transfer.json`."""
    rows = [
        _row(kind, source, target, draw)
        for target in KEPT
        for kind, source, draw in (
            ("top", "add", 0),
            *(("source", source, 0) for source in KEPT),
            *(("matched", "", draw) for draw in range(DRAWS)),
        )
    ]
    pd.DataFrame(rows).to_parquet(run / "transfer.parquet", index=False)
    content = {
        "task": "add",
        "k": K,
        "ablation": "mean over the corrupt prompts of each target, test half, at END",
        "tasks": [_place(name) for name in PLACES],
        "overlap": [
            {"a": "add", "b": name, "k": 10, "shared": n, "expected": mean, "high": high, "p": p}
            for name, (n, mean, high, p) in SHARED.items()
        ]
        + [{"a": "mul", "b": "carry", "k": 9, "shared": 9, "expected": 2, "high": 3, "p": 0.5}],
        "choices": [
            _choices(data, draw, change)
            for data, changes in CHANGES.items()
            for draw, change in enumerate(changes)
        ],
        "tuned": _tuned(),
        "notes": {},
    }
    (run / "transfer.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def _row(kind: str, source: str, target: str, draw: int) -> dict[str, Any]:
    intact = kind == "top"
    rate = 1.0 if intact else left_of(source, target) + 0.03125 * draw
    return {
        "set": kind,
        "k": 0 if intact else K,
        "draw": draw,
        "ablation": "mean",
        "where": "end",
        "task": target,
        "accuracy": rate,
        "n": ASKED,
        "low": max(0.0, rate - 0.1),
        "high": min(1.0, rate + 0.1),
        "logit_diff": 6.0 * rate - 3.0,
        "kl": 1.0 - rate,
        "kl_low": 0.9 - 0.9 * rate,
        "kl_high": 1.1 - 1.1 * rate,
        "source": source,
        "heads": "" if intact else "20.8 17.2 14.6",
    }


def _place(name: str) -> dict[str, Any]:
    family, asked, right, commonest = PLACES[name]
    facts = {"task": name, "family": family, "tried": asked + 7, "correct": right}
    if commonest is not None:
        facts |= {"one_token": asked, "commonest": commonest, "near_chance": right < 20}
    heads = ["20.8", "17.2", "14.6"] if name in KEPT else []
    return facts | {"kept": name in KEPT, "heads": heads, "ranked": heads}


def _choices(data: str, draw: int, change: tuple[float, float, float]) -> dict[str, Any]:
    before = [0.41, 0.35, 0.47]
    score = {
        "before": before,
        "after": [value + change[0] for value in before],
        "change": list(change),
        "p": 0.34,
        "non_inferior": change[1] > -0.02,
    }
    kind = "matched" if draw else "source"
    facts = {"data": data, "set": kind, "source": "" if draw else "add", "draw": max(0, draw - 1)}
    facts |= {"heads": ["20.8"], "n": QUESTIONS, "margin": 0.02, "log_prob": [-0.02, -0.05, 0.01]}
    return facts | {"acc": score, "acc_norm": score}


def _tuned() -> dict[str, Any]:
    def changed(name: str, before: float, after: float) -> dict[str, Any]:
        gap = after - before
        grew = "grew" if gap < 0 else "shrank"
        record = {"id": name, "before": before, "after": after, "direction": grew}
        record |= {"change": [gap, gap - 0.1, gap + 0.1], "p_adjusted": 0.003}
        return record | {
            "share_before": 0.2,
            "share_after": 0.23,
            "share_change": [0.03, 0.01, 0.05],
        }

    heads = [changed("20.8", -2.1, -3.0), changed("17.2", -1.3, -1.1), changed("9.4", 0.0, -0.1)]
    rates = {"before": [0.5, 0.4, 0.6], "after": [0.8, 0.7, 0.9], "change": [0.3, 0.2, 0.4]}
    variant = {
        "accuracy": rates,
        "total_effect": {"before": -5.4, "after": -7.9},
        "tested": 270,
        "false_discovery": 0.05,
        "grew": 2,
        "shrank": 1,
        "heads": heads,
        "tuned": heads[:2],
        "overlap": [{"k": 5, "common": 4, "jaccard": 0.67, "noise": 0.81}],
        "tuned_against_others": {
            "tuned": 0.55,
            "others": 0.02,
            "difference": [0.53, 0.41, 0.66],
            "p": 0.0012,
        },
    }
    facts = {"task": "add", "split": "test", "pairs": 40, "groups": 10, "metric": "logit_diff"}
    bare = variant | {"tuned_against_others": None, "grew": 9}
    return facts | {"variants": {"precise": variant, "random": bare}}


def joint_rule(chosen: Sequence[str]) -> dict[str, Any]:
    """The record of joint selection; `greedy` proposed the chosen set."""
    proposals = [
        {
            "by": by,
            "k": k,
            "heads": list(chosen) if (by, k) == ("greedy", len(chosen)) else _heads(by, k),
            "accuracy": {name: kept(by, k, name, "select") for name in (*TARGETS, *SPARED)},
            "logit_diff": dict.fromkeys((*TARGETS, *SPARED), 0.5),
            "loss": 0.4,
            "reached": by == "greedy" and k >= len(chosen),
        }
        for by in PROPOSERS
        for k in range(1, 6)
    ]
    return {
        "name": "joint selection by exact knockouts of sets",
        "metric": "accuracy",
        "ablation": "mean over the corrupt prompts of each task, at END",
        "targets": list(TARGETS),
        "spared": list(SPARED),
        "pairs": dict.fromkeys((*TARGETS, *SPARED), 24),
        "goal": GOAL | {"reached": True},
        "by": "greedy",
        "evaluated_sets": 1234,
        "proposals": proposals,
        "curve": [{"heads": 0, "accuracy": 1.0}],
    }


def kept(by: str, k: int, task: str, split: str) -> float:
    """The accuracy that a proposal leaves, a little more on the held-out half."""
    if task in SPARED:
        return 1.0 - 0.01 * k * (1 + (task == "capital"))
    speed = 1.0 - 0.15 * PROPOSERS.index(by)
    rest = float(np.exp(-speed * k / (1.6 if task == "add" else 2.0)))
    return min(1.0, rest + 0.05 * (split == "test"))


def _heads(by: str, k: int) -> list[str]:
    return [f"{5 + PROPOSERS.index(by)}.{place}" for place in range(k)]


def proposals_table() -> pd.DataFrame:
    """The rows `proposal` of `knockout.parquet`."""
    rates = [
        (by, k, task, kept(by, k, task, "test"))
        for by in PROPOSERS
        for k in range(1, 6)
        for task in (*TARGETS, *SPARED)
    ]
    return pd.DataFrame(
        {
            "set": "proposal",
            "k": k,
            "draw": 0,
            "ablation": "mean",
            "where": "end",
            "task": task,
            "accuracy": rate,
            "n": ASKED,
            "low": max(0.0, rate - 0.08),
            "high": min(1.0, rate + 0.08),
            "logit_diff": 6.0 * rate - 3.0,
            "source": by,
        }
        for by, k, task, rate in rates
    )


def make_joint(run: Path, size: int) -> None:
    """Turn a run into one by joint selection."""
    path = run / "circuit.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["rule"] = joint_rule([part["id"] for part in content["components"][:size]])
    path.write_text(json.dumps(content), encoding="utf-8")
    if (run / "knockout.parquet").is_file():
        table = pd.read_parquet(run / "knockout.parquet")
        whole = pd.concat([table, proposals_table()], ignore_index=True)
        whole.to_parquet(run / "knockout.parquet")
