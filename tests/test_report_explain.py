"""The report on `explain/` and `validate.json`: its numbers are those of the tables."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from circuitune.errors import UserError
from circuitune.report import summarise, write_report
from circuitune.report.explaining import Explained
from circuitune.report.judging import Judged
from circuitune.report.tables import Table
from tests.fixture_explain import (
    CONTROLS,
    FAITHFUL,
    GROUPS,
    HEADS,
    INCOMPLETE,
    KINDS,
    NOTHING,
    PAIRS,
    ROLES,
    TURNS,
)
from tests.fixture_run import LAYERS, SIZE, STAGES, write_run
from tests.reading import Page, edit_json, edit_table, printed, read_page


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests only read it."""
    return write_run(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture(scope="module")
def page(whole: Path) -> Page:
    """The page of the finished run."""
    return read_page(whole)


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to change; without a report."""
    ignored = shutil.ignore_patterns("report.html")
    return Path(shutil.copytree(whole, tmp_path / "run", ignore=ignored))


def explained(run: Path) -> Explained:
    """The tables of the folder `explain`."""
    found = summarise(run).explained
    assert found is not None
    return found


def judged(run: Path) -> Judged:
    """The tables of `validate.json`."""
    found = summarise(run).judged
    assert found is not None
    return found


def cells(table: Table | None) -> dict[str, dict[str, str]]:
    """First cell of a row -> column -> text with its interval."""
    assert table is not None
    names = [column.label for column in table.columns[1:]]
    rows = (dict(zip(names, map(str, row.cells[1:]), strict=True)) for row in table.rows)
    return dict(zip((row.cells[0].text for row in table.rows), rows, strict=True))


def percent(row: pd.Series, name: str = "mean", low: str = "low", high: str = "high") -> str:
    """What a row of fractions reads as, in whole percent."""
    ends = ", ".join(signed(f"{100 * row[end]:.0f}") for end in (low, high))
    return f"{signed(f'{100 * row[name]:.0f}')} % [{ends}]"


def signed(text: str) -> str:
    """The true minus sign, and no zero below zero."""
    return "0" if text == "-0" else text.replace("-", "\u2212")


# ------------------------------------------------------------------------- what the heads look at


def test_attention_is_drawn_as_it_was_measured(whole: Path, page: Page) -> None:
    table = pd.read_parquet(whole / "explain" / "attention.parquet")
    figure = page.figure("attention")
    assert [note["text"] for note in figure["layout"]["annotations"]] == list(ROLES)
    dots = [trace for trace in figure["data"] if trace.get("name") == "key head"]
    for role, trace in zip(ROLES, dots, strict=True):
        own = table[(table["role"] == role) & (table["set"] == "key")]
        assert figure["layout"]["yaxis"]["ticktext"] == list(own["component"])
        np.testing.assert_allclose(trace["x"], 100 * own["mean"], rtol=1e-4)
        whisker = 100 * (own["high"] - own["mean"])
        np.testing.assert_allclose(trace["error_x"]["array"], whisker, rtol=1e-3)
    lines = [trace for trace in figure["data"] if trace["mode"] == "lines"]
    means = [trace["x"][0] for trace in lines if trace["name"] == "mean of all heads"]
    every = table[table["set"] == "all"]["mean"]
    np.testing.assert_allclose(means, 100 * every, rtol=1e-4)
    equal = [trace["x"][0] for trace in lines if trace["name"].startswith("equal")]
    np.testing.assert_allclose(equal, [100 / len(ROLES)] * len(ROLES), rtol=1e-4)


def test_attention_stands_in_numbers_beside_its_controls(whole: Path) -> None:
    table = pd.read_parquet(whole / "explain" / "attention.parquet")
    shown = cells(explained(whole).attention)
    assert list(shown) == [
        *HEADS,
        "other heads of layer 20",
        "mean of all heads",
        "equal to all tokens",
    ]
    row = table[(table["component"] == "17.2") & (table["role"] == "operand 2")].iloc[0]
    assert shown["17.2"]["Operand 2"] == percent(row)
    assert shown["equal to all tokens"]["Operand 2"] == "17 %"


def test_heads_have_both_labels_and_their_tokens(whole: Path, page: Page) -> None:
    shown = cells(explained(whole).heads)
    assert list(shown) == list(HEADS)
    assert shown["14.6"]["By attention"] == "operator 88 %"
    assert shown["14.6"]["By effect"] == "other 97 %"
    assert shown["14.6"]["Brings"] == "nothing that passes"
    assert shown["20.8"]["Brings"] == "operand 1"
    assert shown["20.8"]["Writes"] == "3  4  \u2423five  \\n"
    assert "no evidence that this matters" in page.text
    assert f"over {PAIRS} held-out pairs ({GROUPS} groups)" in page.text


def test_readout_has_an_interval_in_every_cell(whole: Path) -> None:
    table = pd.read_parquet(whole / "explain" / "readout.parquet")
    shown = explained(whole).readout
    assert shown is not None
    assert len(shown.rows) == 2 * len(HEADS)
    assert all(cell.interval for row in shown.rows for cell in row.cells[2:])
    own = table[(table["component"] == "20.8") & (table["run"] == "clean")]
    assert str(shown.rows[0].cells[2]).startswith(signed(f"{own['mean'].iloc[0]:.2f} ["))


# --------------------------------------------------------------------------- how the answer forms


def test_lens_is_drawn_after_each_layer_with_bands(whole: Path, page: Page) -> None:
    table = pd.read_parquet(whole / "explain" / "lens.parquet").query("after == 'mlp'")
    traces = page.figure("lens")["data"]
    for kind in KINDS:
        own = table[table["token"] == kind]
        lines = [t for t in traces if t["legendgroup"] == kind and t["mode"] == "lines"]
        bands = [t for t in traces if t["legendgroup"] == kind and t["mode"] == "none"]
        for name, unit, line, band in zip(
            ("probability", "rank"), (100, 1), lines, bands, strict=True
        ):
            np.testing.assert_allclose(line["y"], unit * own[name], rtol=1e-4)
            np.testing.assert_allclose(band["y"][:LAYERS], unit * own[f"{name}_high"], rtol=1e-4)
    uprights = {shape["x0"] for shape in page.figure("lens")["layout"]["shapes"]}
    assert uprights == {layer for layer, _, _ in TURNS.values()}
    assert "start 20 [19, 21], inflection 22 [21, 23], end 26 [25, 28]" in page.text


def test_turns_quote_lens_and_mlps(whole: Path) -> None:
    lens = pd.read_parquet(whole / "explain" / "lens.parquet")
    mlps = pd.read_parquet(whole / "explain" / "mlps.parquet")
    shown = cells(explained(whole).forms)
    assert len(shown) == 4
    row = lens.query("after == 'mlp' and token == 'answer' and layer == 22").iloc[0]
    chance = percent(row, "probability", "probability_low", "probability_high")
    assert shown["rises most after"]["Probability"] == chance
    assert shown["rises most after"]["Layer"] == "22 [21, 23]"
    effect = mlps.query("measure == 'effect' and layer == 22").iloc[0]
    value, low, high = (signed(f"{effect[name]:.2f}") for name in ("mean", "low", "high"))
    assert shown["rises most after"]["Effect of its MLP"] == f"{value} [{low}, {high}]"
    assert shown["is given after"]["Layer"] == str(LAYERS - 1)


def test_mlps_are_drawn_with_their_control(whole: Path, page: Page) -> None:
    table = pd.read_parquet(whole / "explain" / "mlps.parquet")
    figure = page.figure("mlps")
    bars = next(trace for trace in figure["data"] if trace["type"] == "bar")
    np.testing.assert_allclose(bars["y"], table.query("measure == 'effect'")["mean"], rtol=1e-4)
    controls = [t for t in figure["data"] if t.get("name") == "other" and t["mode"] == "lines"]
    for of, trace in zip(("input", "output"), controls, strict=True):
        own = table[(table["of"] == of) & (table["token"] == "other")]
        np.testing.assert_allclose(trace["y"], own["mean"], rtol=1e-4)


def test_example_shows_the_layers_around_the_rise(whole: Path, page: Page) -> None:
    found = explained(whole)
    shown, rest = cells(found.example), cells(found.example_rest)
    assert list(shown) == [str(layer) for layer in range(17, LAYERS)]
    assert list(rest) == [str(layer) for layer in range(17)]
    assert shown["24"]["1"] == "\u2423 60 %"
    assert shown["24"]["Rank of 7 (answer)"] == "16"
    assert "One prompt: Math: 4 + 3 =" in page.text


def test_neurons_stand_in_the_order_of_the_half_that_chose_them(whole: Path) -> None:
    table = pd.read_parquet(whole / "explain" / "neurons.parquet")
    best = table.sort_values("estimate", kind="stable").head(10)
    shown = explained(whole).neurons
    assert shown is not None
    names = [f"{row.component} #{row.neuron}" for row in best.itertuples()]
    assert [row.cells[0].text for row in shown.rows] == names
    assert str(shown.rows[0].cells[1]) == "\u22120.90 [\u22120.95, \u22120.85]"
    assert shown.rows[0].cells[-1].text == "seven  \u2423eight  <i>"


# ------------------------------------------------------------------------------ is it the circuit


def test_ablations_are_those_of_the_table(whole: Path) -> None:
    table = pd.read_parquet(whole / "knockout.parquet").query("k == @SIZE and task == 'add'")
    accuracy, divergence = cells(judged(whole).accuracy), cells(judged(whole).divergence)
    assert len(accuracy) == len(divergence) == 6
    labels = {"top": "Circuit", "matched": "Random, same layers", "least": "Least important"}
    for ablation in ("zero", "resample"):
        for where, place in (("end", "at END"), ("all", "everywhere")):
            own = table[(table["ablation"] == ablation) & (table["where"] == where)]
            for kind, label in labels.items():
                row = own[own["set"] == kind].iloc[0]
                name = f"{ablation}, {place}"
                assert accuracy[name][label] == percent(row, "accuracy")
                ends = f"[{row.kl_low:.3f}, {row.kl_high:.3f}]"
                assert divergence[name][label] == f"{row.kl:.3f} {ends}"
    draws = table.query("set == 'matched' and ablation == 'mean' and where == 'end'")["accuracy"]
    found = accuracy["mean, at END"]["Random, same layers"]
    assert found.startswith(f"{100 * draws.mean():.0f} % [")
    note = judged(whole).accuracy.note
    assert "mean of 10 draws by mean at END, one draw else." in note


def test_control_tasks_are_spared_and_hit_by_their_own_circuit(whole: Path) -> None:
    shown = cells(judged(whole).controls)
    row = shown["copying a number"]
    assert row["Left without the circuit of addition"] == "90 % [84, 94]"
    assert row["Left without its own circuit"] == "10 % [4, 14]"
    assert row["Addition left without its circuit"] == "80 % [74, 84]"
    assert row["Heads shared"] == "0"
    assert row["Answered"].startswith("62 % [")  # 60 of 96
    assert shown["capitals"]["Addition left without its circuit"] == "90 % [84, 94]"
    assert shown["copying a word"]["Left without its own circuit"] == "\u2013"
    assert len(shown) == len(CONTROLS) + 1
    assert "Too few right answers to measure: copying a word." in judged(whole).controls.note


def test_criteria_quote_validate_json(whole: Path, page: Page) -> None:
    shown = cells(judged(whole).criteria)
    share, nothing = (
        dict(zip(("mean", "low", "high"), v, strict=True)) for v in (FAITHFUL, NOTHING)
    )
    assert shown["Faithfulness"]["Value"] == percent(pd.Series(share))
    assert percent(pd.Series(nothing)) in shown["Faithfulness"]["Reading"]
    value, low, high = INCOMPLETE
    assert shown["Completeness"]["Value"] == f"{value} [{low}, {high}]"
    assert "In 2 of 3 the circuit falls further" in shown["Completeness"]["Reading"]
    assert shown["Minimality"]["Value"] == "2 of 3"
    assert cells(judged(whole).heads)["14.6"]["Beside the circuit"].endswith("0.30]")
    assert len(judged(whole).subsets.rows) == 3
    assert "Intact: 3.10 logits [2.80, 3.40]" in page.text


# ----------------------------------------------------------------------------------- what is absent


def test_older_runs_without_validate_json_say_how_to_get_it(run: Path) -> None:
    (run / "validate.json").unlink()
    old = ["source", "kl", "kl_low", "kl_high"]
    edit_table(run / "knockout.parquet", lambda t: t[t["ablation"] == "mean"].drop(columns=old))
    edit_table(run / "knockout.parquet", lambda t: t[(t["where"] == "end")])
    edit_table(run / "knockout.parquet", lambda t: t[t["set"] != "other_task"])
    text = read_page(run).text
    assert f"not measured yet, `circuitune validate {run}` does." in text
    assert "Control tasks" not in text
    assert "Right answers with" not in text


def test_without_control_tasks_there_is_no_table_of_them(run: Path) -> None:
    edit_json(run / "validate.json", lambda v: v | {"controls": []})
    edit_table(run / "knockout.parquet", lambda t: t[t["set"] != "other_task"])
    assert judged(run).controls is None
    assert "Control tasks" not in read_page(run).text


def test_a_share_without_a_scale_is_told(run: Path) -> None:
    def change(content: dict) -> dict:
        for kept in content["faithfulness"].values():
            kept["share"] = None
        return content

    edit_json(run / "validate.json", change)
    row = cells(judged(run).criteria)["Faithfulness"]
    assert row["Value"] == "\u2013"
    assert "too little away to give a share" in row["Reading"]


def test_own_pairs_without_roles_say_why(run: Path) -> None:
    """Only the answer is watched; attention has no roles, and nothing was traced."""
    folder, why = run / "explain", "Attention by role needs roles, the pairs have none: <b>own</b>"

    def change(told: dict) -> dict:
        gone = {"label", "confidence", "brings", "effect_label", "effect_confidence"}
        heads = [{k: v for k, v in head.items() if k not in gone} for head in told["heads"]]
        example = told["example"] | {"tokens": {"answer": "7"}}
        for layer in example["layers"]:
            layer["tokens"] = {"answer": layer["tokens"]["answer"]}
        notes = {"attention": why, "neurons": "A mixture of experts has no single projection"}
        return told | {"heads": heads, "example": example, "notes": notes}

    edit_json(folder / "explain.json", change)
    for name in ("attention", "neurons"):
        edit_table(folder / f"{name}.parquet", lambda t: t.iloc[:0].astype(object))
    keep = ["answer", "other"]
    for name in ("readout", "mlps", "lens"):
        edit_table(folder / f"{name}.parquet", lambda t: t[t.token.isna() | t.token.isin(keep)])
    page, found = read_page(run), explained(run)
    assert "attention-data" not in page.data
    assert "<b>own</b>" in page.text
    assert "Neurons: A mixture of experts" in page.text
    assert "Neurons: A mixture of experts" in " ".join(printed(run, 100).split())
    assert found.attention is found.neurons is None
    assert [column.label for column in found.heads.columns] == [
        "Head",
        "Writes",
        "More than corrupt",
    ]
    assert "Operand 1" not in [column.label for column in found.forms.columns]


def test_nothing_but_the_lens_is_enough(run: Path) -> None:
    for name in ("attention", "readout", "mlps", "neurons"):
        (run / "explain" / f"{name}.parquet").unlink()
    edit_json(run / "explain" / "explain.json", lambda told: told | {"heads": [], "example": None})
    page = read_page(run)
    assert "lens-data" in page.data
    assert "mlps-data" not in page.data
    assert "One prompt" not in page.text
    assert "The key heads in words" not in printed(run, 100)


def test_a_token_that_no_pair_has_is_left_out(run: Path) -> None:
    """Where no answer has a neighbour, its rows are empty."""

    def empty(table: pd.DataFrame) -> pd.DataFrame:
        gone = table["token"] == "answer + 1"
        columns = [c for c in table.columns if c.startswith(("rank", "probability"))]
        table.loc[gone, columns] = None
        return table.assign(n=table["n"].where(~gone, 0))

    edit_table(run / "explain" / "lens.parquet", empty)
    names = {trace.get("name") for trace in read_page(run).figure("lens")["data"]}
    assert "answer + 1" not in names
    assert "answer \u2212 1" in names


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("lens.parquet", lambda t: t.drop(columns="rank"), "'rank' is absent"),
        ("attention.parquet", lambda t: t.assign(mean="x"), "numbers in column 'mean'"),
        ("neurons.parquet", lambda t: t.assign(share=np.nan), "every row of 'share'"),
    ],
)
def test_malformed_tables_name_the_stage(
    run: Path, name: str, change: Callable[[pd.DataFrame], pd.DataFrame], told: str
) -> None:
    path = run / "explain" / name
    edit_table(path, change)
    with pytest.raises(UserError) as raised:
        write_report(run)
    assert told in str(raised.value)
    assert str(raised.value).startswith(f"{path} must")
    assert f"`circuitune explain {run}`" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "key", "stage"),
    [("explain/explain.json", "heads", "explain"), ("validate.json", "faithfulness", "validate")],
)
def test_a_field_that_is_absent_names_the_stage(run: Path, name: str, key: str, stage: str) -> None:
    edit_json(run / name, lambda content: {k: v for k, v in content.items() if k != key})
    with pytest.raises(UserError, match=f"must hold '{key}'.*circuitune {stage} "):
        write_report(run)


# ---------------------------------------------------------------------------------- size and width


@pytest.mark.parametrize("width", [80, 100])
def test_terminal_holds_the_tables_within_its_width(whole: Path, width: int) -> None:
    text = printed(whole, width)
    assert max(map(len, text.splitlines())) <= width
    for title in ("The key heads in words", "The answer by the logit lens", "Faithful, complete"):
        assert title in text
    assert f"Right answers with {SIZE} heads removed" in text
    if width == 100:
        explained_part = text.partition("The key heads in words")[2].partition("Accuracy on")[0]
        assert "\u2026" not in explained_part  # nothing is cut off


def test_the_page_grows_by_little(whole: Path, tmp_path: Path) -> None:
    without = write_run(tmp_path / "run", stages=[s for s in STAGES if s != "explain"])
    sizes = [write_report(run).stat().st_size for run in (whole, without)]
    assert 0 < sizes[0] - sizes[1] < 400_000


def test_tokens_cannot_become_markup(whole: Path, page: Page) -> None:
    html = (whole / "report.html").read_text(encoding="utf-8")
    assert "<i>" in page.text  # as text
    assert "<i>" not in html
    assert json.loads((whole / "explain" / "explain.json").read_text())["notes"] == {}
