"""Scoring: reading answers, greedy generation, paired records, drift."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from circuitune.components import Head
from circuitune.errors import UserError
from circuitune.evaluate import (
    accuracy_records,
    drift,
    drift_records,
    generate,
    read_answer,
    retention_text,
)
from circuitune.models import Model
from circuitune.problems import Operator, Problem
from circuitune.slices import attached, head_slices, load_delta, save_delta
from circuitune.tune import training_text


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("8", 8),
        (" 12\n", 12),
        ("-3 and", -3),
        ("12.", 12),
        ("12.5", None),
        ("1,200", None),
        ("so 8", None),
        ("", None),
        ("007\n", 7),
    ],
)
def test_read_answer(text: str, answer: int | None) -> None:
    assert read_answer(text) == answer


def test_generation_equals_one_prompt_at_a_time(tiny: Callable[..., Model]) -> None:
    model = tiny()
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5], [40, 41], [1, 2, 3, 4, 5, 6]]
    together = generate(model, prompts, new_tokens=4)
    for prompt, text in zip(prompts, together, strict=True):
        tokens = list(prompt)
        for _ in range(4):
            tokens.append(int(model.hf(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == model.tokenizer.eos_token_id:
                break
        expected = model.tokenizer.decode(tokens[len(prompt) :])
        assert text.startswith(expected)


def make_delta(model: Model, folder: Path, size: float):
    """A constant delta on two heads, saved and read back."""
    with attached(model, head_slices(model, [Head(2, 0), Head(3, 1)])) as views:
        deltas = {part: torch.full_like(view, size) for part, view in views.items()}
    save_delta(folder, model, deltas, {})
    return load_delta(folder)


def test_drift_is_zero_for_a_zero_delta_and_right_for_another(
    tiny: Callable[..., Model], tmp_path: Path
) -> None:
    model = tiny()
    (tmp_path / "zero").mkdir()
    (tmp_path / "some").mkdir()
    deltas = {
        "zero": make_delta(model, tmp_path / "zero", 0.0),
        "some": make_delta(model, tmp_path / "some", 0.05),
    }
    text = retention_text(None)[:3]
    measured = drift(model, deltas, text, width=20)
    np.testing.assert_allclose(measured["zero"][:, 1], measured["base"][:, 1], atol=1e-9)
    np.testing.assert_allclose(measured["zero"][:, 2], 0.0, atol=1e-9)
    assert (measured["some"][:, 2] > 1e-6).all()
    tokens = torch.tensor([model.tokenizer(text[0]).input_ids[:20]])
    plain = model.hf(tokens).logits[0, :-1].log_softmax(dim=-1)
    loss = -plain.gather(-1, tokens[0, 1:, None]).sum()
    assert measured["base"][0, 0] == 19
    assert measured["base"][0, 1] == pytest.approx(float(loss), abs=1e-9)


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


def test_retention_text_is_not_training_text(tmp_path: Path) -> None:
    assert not set(retention_text(None)) & set(training_text())
    assert len(retention_text(None)) == 100
    with pytest.raises(UserError, match="--retention must be a readable"):
        retention_text(str(tmp_path / "absent.txt"))
    (tmp_path / "short.txt").write_text("too short\n")
    with pytest.raises(UserError, match="at least ten lines"):
        retention_text(str(tmp_path / "short.txt"))
