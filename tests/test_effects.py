"""Metrics by hand, the sign of an effect, and the table's life on disk."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from circuitune.components import Head, Mlp
from circuitune.effects import METRICS, EffectTable, measure
from circuitune.errors import UserError
from circuitune.stats import bootstrap_means

PARTS = (Head(1, 0), Mlp(0), Head(0, 3))
logits = arrays(float, (3, 4), elements=st.floats(-1e4, 1e4))
answers = arrays(int, 3, elements=st.integers(0, 3))


@pytest.fixture
def table() -> EffectTable:
    """Three senders on four examples with three candidates."""
    rng = np.random.default_rng(0)
    clean, patched = rng.normal(size=(4, 3)), rng.normal(size=(3, 4, 3))
    return EffectTable.from_logits(PARTS, clean, patched, np.array([0, 2, 1, 1]))


def test_metrics_of_one_row_by_hand() -> None:
    values = measure(np.log([[6.0, 1.0, 3.0]]), np.array([0]))
    assert values["logit_diff"] == pytest.approx([np.log(6.0 / 4.0)])
    assert values["prob"] == pytest.approx([0.6])
    assert values["relative_logit"] == pytest.approx([np.log(6.0)])


def test_each_example_is_read_at_its_own_answer() -> None:
    row = np.log([6.0, 1.0, 3.0])
    values = measure(np.stack([row, row, row]), np.array([2, 0, 1]))
    assert values["prob"] == pytest.approx([0.3, 0.6, 0.1])
    batched = measure(np.stack([[row, row, row]] * 2), np.array([2, 0, 1]))
    assert batched["prob"] == pytest.approx(np.array([[0.3, 0.6, 0.1]] * 2))


@given(logits, answers, st.floats(-1e3, 1e3))
def test_prob_is_the_logistic_of_logit_diff_and_neither_sees_an_offset(
    values: np.ndarray, right: np.ndarray, offset: float
) -> None:
    """Warnings are errors here, hence nothing overflows either."""
    found = measure(values, right)
    shifted = measure(values + offset, right)
    assert shifted["logit_diff"] == pytest.approx(found["logit_diff"], abs=1e-7, rel=1e-7)
    weights = np.exp(values - values.max(axis=1, keepdims=True))
    share = weights / weights.sum(axis=1, keepdims=True)
    assert found["prob"] == pytest.approx(share[np.arange(3), right], abs=1e-12)
    odds = np.clip(found["logit_diff"], -30, 30)
    logistic = 1 / (1 + np.exp(-odds))
    assert found["prob"] == pytest.approx(logistic, abs=1e-12)


def test_losing_the_answer_is_a_negative_effect() -> None:
    clean = np.array([[4.0, 1.0], [1.0, 2.0]])
    worse = np.array([[3.0, 1.0], [1.0, 1.0]])
    better = np.array([[5.0, 1.0], [1.0, 4.0]])
    answers = np.array([0, 1])
    table = EffectTable.from_logits(PARTS[:2], clean, np.stack([better, worse]), answers)
    assert table.effect("logit_diff") == pytest.approx(np.array([[1.0, 2.0], [-1.0, -1.0]]))
    assert table.effect("relative_logit") == pytest.approx(np.array([[0.25, 1.0], [-0.25, -0.5]]))
    assert (np.sign(table.effect("prob")) == [[1, 1], [-1, -1]]).all()
    assert table.mean("relative_logit") == pytest.approx([0.625, -0.375])
    assert table.rank() == [PARTS[1], PARTS[0]]


def test_relative_logit_divides_by_a_negative_logit_as_the_paper_does() -> None:
    table = EffectTable.from_logits(
        PARTS[:1], np.array([[-2.0, 0.0]]), np.array([[[-1.0, 0.0]]]), np.array([0])
    )
    assert table.effect("relative_logit") == pytest.approx(np.array([[-0.5]]))
    assert table.effect("logit_diff") == pytest.approx(np.array([[1.0]]))


def test_rank_keeps_the_order_of_ties() -> None:
    same = np.zeros((3, 1, 2))
    table = EffectTable.from_logits(PARTS, np.ones((1, 2)), same, np.array([0]))
    assert table.rank() == list(PARTS)


def test_select_takes_rows_in_the_order_given(table: EffectTable) -> None:
    part = table.select([PARTS[2], PARTS[0]])
    assert part.components == (PARTS[2], PARTS[0])
    for metric in METRICS:
        assert np.array_equal(part.effect(metric), table.effect(metric)[[2, 0]])


def test_intervals_are_those_of_the_effects(table: EffectTable) -> None:
    groups = ["a", "a", "b", "c"]
    found = table.intervals("prob", rng=np.random.default_rng(1), groups=groups, draws=150)
    wanted = bootstrap_means(
        table.effect("prob"), rng=np.random.default_rng(1), groups=groups, draws=150
    )
    assert found == wanted
    assert [item.estimate for item in found] == pytest.approx(table.mean("prob").tolist())


def test_the_file_is_tidy(table: EffectTable) -> None:
    frame = table.to_frame()
    columns = ["component", "layer", "example", "metric", "clean", "patched", "effect"]
    assert list(frame.columns) == columns
    assert not frame.duplicated(["component", "example", "metric"]).any()
    assert len(frame) == 3 * 4 * 3
    row = frame.query("component == '0.3' and example == 2 and metric == 'prob'").iloc[0]
    assert row["layer"] == 0
    assert row["clean"] == table.clean["prob"][2]
    assert row["patched"] == table.patched["prob"][2, 2]
    assert row["effect"] == row["patched"] - row["clean"]


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_table_survives_its_file(table: EffectTable, tmp_path: Path, shuffled: bool) -> None:
    path = tmp_path / "effects.parquet"
    frame = table.to_frame()
    if shuffled:
        frame = frame.iloc[np.random.default_rng(0).permutation(len(frame))]
    frame.to_parquet(path, index=False)
    loaded = EffectTable.load(path)
    assert set(loaded.components) == set(PARTS)
    assert shuffled or loaded.components == PARTS
    for metric in METRICS:
        assert np.array_equal(loaded.clean[metric], table.clean[metric])
        assert np.array_equal(loaded.select(PARTS).patched[metric], table.patched[metric])
        assert np.array_equal(loaded.select(PARTS).effect(metric), table.effect(metric))


def test_a_file_that_is_no_table_is_refused(table: EffectTable, tmp_path: Path) -> None:
    path = tmp_path / "effects.parquet"
    with pytest.raises(UserError, match="run `circuitune locate` to make it"):
        EffectTable.load(path)
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match="must be a readable parquet file"):
        EffectTable.load(path)
    table.to_frame().drop(columns=["patched", "metric"]).to_parquet(path)
    with pytest.raises(UserError, match=r"lacks the columns \['metric', 'patched'\]"):
        EffectTable.load(path)
    pd.DataFrame({"component": ["1.x"], "example": [0], "metric": ["prob"], "clean": [0.0]}).assign(
        patched=0.0
    ).to_parquet(path)
    with pytest.raises(UserError, match="numbers start at zero"):
        EffectTable.load(path)
