"""Evaluation: records checked by hand, and every variant of a run found."""

from pathlib import Path

import numpy as np
import pytest

from circuitune.deltas import tuned_variants
from circuitune.errors import UserError
from circuitune.evaluate import accuracy_records, drift_records, rivals
from circuitune.problems import Operator, Problem


def test_drift_records_by_hand() -> None:
    base = np.array([[2.0, 4.0, 0.0]] * 5)
    tuned = np.array([[2.0, 4.2, 0.02]] * 5)
    records = {
        (r["variant"], r["metric"]): r for r in drift_records({"base": base, "t": tuned}, seed=0)
    }
    assert records["base", "perplexity"]["value"] == pytest.approx(np.exp(2.0))
    assert records["t", "perplexity_change"]["value"] == pytest.approx(np.exp(0.1) - 1)
    assert records["t", "kl"]["value"] == pytest.approx(0.01)
    assert records["t", "kl"]["low"] == pytest.approx(0.01)


def test_accuracy_records_by_hand() -> None:
    problems = [Problem(Operator.ADD, a, 1) for a in range(10)]
    problems += [Problem(Operator.MUL, a, 2) for a in range(10)]
    base = np.array([True] * 2 + [False] * 18)
    precise = np.array([True] * 6 + [False] * 4 + [True] * 3 + [False] * 7)
    records = accuracy_records({"base": base, "precise": precise}, problems, seed=0)
    by = {(r["task"], r["variant"], r["metric"]): r for r in records}
    assert by["arithmetic", "base", "exact_match"]["value"] == pytest.approx(0.1)
    assert by["add", "precise", "exact_match"]["value"] == pytest.approx(0.6)
    assert by["mul", "precise", "exact_match_gain"]["value"] == pytest.approx(0.3)
    gain = by["arithmetic", "precise", "exact_match_gain"]
    assert gain["value"] == pytest.approx(0.35)
    assert gain["low"] < 0.35 < gain["high"]
    assert gain["n"] == 20


def test_precise_is_compared_with_every_other_variant() -> None:
    assert rivals(["base", "precise", "random", "full"]) == ["random", "full"]
    assert rivals(["base", "full"]) == []
    problems = [Problem(Operator.ADD, a, 1) for a in range(8)]
    hits = {
        "base": np.zeros(8, bool),
        "precise": np.ones(8, bool),
        "full": np.arange(8) < 4,
    }
    by = {
        (r["task"], r["variant"], r["metric"]): r for r in accuracy_records(hits, problems, seed=0)
    }
    assert by["add", "precise - full", "exact_match"]["value"] == pytest.approx(0.5)
    assert ("add", "precise - base", "exact_match") not in by


def test_a_run_without_tuned_heads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `circuitune tune` first"):
        tuned_variants(tmp_path)
