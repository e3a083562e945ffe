"""The report: its numbers come from the run, its page stands alone, its errors are sentences."""

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import circuitune.report
from circuitune.errors import UserError
from circuitune.report import summarise, write_report
from tests.fixture_run import CHOSEN, EXAMPLES, STAGES, write_run
from tests.reading import Page, edit_json, edit_table, headline, printed, read_page


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


def test_page_is_well_formed_and_loads_nothing(page: Page) -> None:
    assert page.open == []
    assert page.addresses == []
    assert "link" not in page.tags
    assert "@import" not in "".join(page.styles)
    assert "url(" not in "".join(page.styles)
    assert page.policy.startswith("default-src 'none'")


def test_same_run_gives_the_same_bytes(whole: Path) -> None:
    first = write_report(whole).read_bytes()
    assert write_report(whole).read_bytes() == first


def test_headline_quotes_the_knockout_table(whole: Path, page: Page) -> None:
    table = pd.read_parquet(whole / "knockout.parquet").query("task == 'add'")
    table = table.query("ablation == 'mean' and where == 'end'")
    top = table.query("set == 'top'").set_index("k")
    k = json.loads((whole / "circuit.json").read_text())["size"]
    matched = table.query("set == 'matched' and k == @k")["accuracy"].mean()
    ends = f"[{top.low[k] * 100:.0f}, {top.high[k] * 100:.0f}]"
    sentence = f"Removing {k} of 270 heads takes addition from 100 % [96, 100] to "
    assert f"{sentence}{top.accuracy[k] * 100:.0f} % {ends}" in page.text
    assert f"layer-matched random heads leave {matched * 100:.0f} %" in page.text


def test_headline_follows_the_knockout_table(run: Path) -> None:
    before = headline(run)

    def halve(table: pd.DataFrame) -> pd.DataFrame:
        top = (table["set"] == "top") & (table["k"] > 0) & (table["task"] == "add")
        table.loc[top, ["accuracy", "low", "high"]] = (0.25, 0.21, 0.31)
        return table

    edit_table(run / "knockout.parquet", halve)
    assert "Removing 3 of 270 heads" in headline(run)
    assert "to 25 % [21, 31];" in headline(run)
    assert "to 25 % [21, 31];" not in before


def test_headline_follows_the_evaluation(run: Path) -> None:
    def change(records: list[dict]) -> list[dict]:
        for record in records:
            if (record["task"], record["metric"]) == ("arithmetic", "exact_match"):
                value = {"base": 0.2, "precise": 0.77, "random": 0.21}.get(record["variant"], 0.5)
                record.update(value=value, low=value - 0.03, high=value + 0.03)
        return records

    edit_json(run / "eval.json", change)
    assert "Tuning 5 heads (0.27 % of the parameters)" in headline(run)
    assert "from 20 % [17, 23] to 77 % [74, 80]" in headline(run)
    assert "random heads reach 21 % [18, 24]" in headline(run)
    assert "perplexity changes by +0.12 % [+0.04, +0.20]." in headline(run)


def test_headline_counts_components_when_an_mlp_is_among_them(run: Path) -> None:
    def add_mlp(circuit: dict) -> dict:
        circuit["components"].insert(0, {"id": "mlp.20", "estimate": -3.0, "round": 1})
        return circuit

    edit_json(run / "circuit.json", add_mlp)
    assert "of 300 components takes" in headline(run)
    assert "layer-matched random components leave" in headline(run)


def test_a_circuit_without_components_is_reported_as_such(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", stages=())
    edit_json(run / "circuit.json", lambda circuit: {**circuit, "components": []})
    assert "No component was chosen for addition" in read_page(run).text


def test_prompts_may_hold_any_line_separator(run: Path) -> None:
    lines = (run / "pairs.jsonl").read_text().split("\n")
    pair = json.loads(lines[0]) | {"template": "one\u2028two\u0085three"}
    text = "\n".join([json.dumps(pair, ensure_ascii=False), *lines[1:]])
    (run / "pairs.jsonl").write_text(text, encoding="utf-8")
    assert "Removing 3 of 270 heads" in headline(run)


def test_a_ranking_without_a_circuit_is_reported_as_such(run: Path) -> None:
    edit_json(run / "circuit.json", lambda circuit: {**circuit, "size": 0})
    assert "No circuit was found for addition: no number of the" in headline(run)
    assert "Removing" not in headline(run)
    assert "carry" not in headline(run)


def test_stages_of_an_earlier_circuit_are_told_in_page_and_terminal(run: Path) -> None:
    assert "run anew" not in read_page(run).text
    digest = hashlib.sha256((run / "circuit.json").read_bytes()).hexdigest()
    for known, stale in ((digest, False), ("0" * 64, True)):
        edit_json(
            run / "manifest.json",
            lambda content, known=known: {
                **content,
                "stages": {"tune": {"inputs": {"circuit.json": known}}},
            },
        )
        text = "tune was run before locate was run anew: its numbers are of what locate had made"
        assert (text in read_page(run).text) == stale
        assert (text in " ".join(printed(run, width=120).split())) == stale


def test_pairs_that_are_not_answered_are_told(run: Path) -> None:
    answered = "Only problems that the model answers are kept"
    for correct in (10_000, 0):

        def answer(selection: dict, correct: int = correct) -> dict:
            for task in selection["tasks"].values():
                task["correct"] = correct
            return selection

        edit_json(run / "selection.json", answer)
        text = read_page(run).text
        assert (answered in text) == (correct > 0)
        assert ("All pairs are kept, also those" in text) == (correct == 0)


def test_heatmap_holds_the_mean_effects(whole: Path, page: Page) -> None:
    effects = pd.read_parquet(whole / "effects.parquet").query("metric == 'logit_diff'")
    means = effects.groupby("component")["effect"].mean()
    heat = page.figure("effects")["data"][0]
    assert len(heat["z"]) == 9
    for head, line in enumerate(heat["z"]):
        expected = [means[f"{layer}.{head}"] for layer in range(30)]
        np.testing.assert_allclose(line, expected, atol=1e-12)
    assert heat["zmax"] == -heat["zmin"] == pytest.approx(np.abs(heat["z"]).max())
    assert "20.8</b>, rank 1<br>logit difference: \u2212" in heat["text"][8][20]


def test_heatmap_marks_the_chosen_heads_with_their_rank(page: Page) -> None:
    ranks = next(trace for trace in page.figure("effects")["data"] if trace.get("mode") == "text")
    marked = zip(ranks["x"], ranks["y"], ranks["text"], strict=True)
    expected = {(int(i.split(".")[0]), int(i.split(".")[1]), str(n)) for n, i in _numbered(CHOSEN)}
    assert {(x, y, text) for x, y, text in marked} == expected


def _numbered(ids: tuple[str, ...]) -> list[tuple[int, str]]:
    return list(enumerate(ids, start=1))


def test_intervals_resample_grouped_pairs_together(run: Path) -> None:
    def double(table: pd.DataFrame) -> pd.DataFrame:
        # Two copies of each example: as one group they carry half the information.
        twin = table["example"] - table["example"] % 2
        keys = [table["component"], table["metric"], twin]
        return table.assign(effect=table.groupby(keys)["effect"].transform("first"))

    edit_table(run / "effects.parquet", double)
    grouped = _first_sweep(run)
    lines = [json.loads(line) for line in (run / "pairs.jsonl").read_text().splitlines()]
    (run / "pairs.jsonl").write_text(
        "\n".join(json.dumps({**pair, "group": str(n)}) for n, pair in enumerate(lines))
    )
    assert _first_sweep(run) < 0.85 * grouped


def _first_sweep(run: Path) -> float:
    """Width of the first component's interval in the first sweep."""
    interval = summarise(run).ranking.rows[0].cells[4].interval
    low, high = (float(end.replace("\u2212", "-")) for end in interval.strip("[]").split(", "))
    return high - low


def test_components_that_were_measured_on_fewer_examples_keep_their_mean(run: Path) -> None:
    effects = pd.read_parquet(run / "effects.parquet")
    late = (effects["component"] == "20.8") & (effects["example"] >= 10)
    effects[~late].to_parquet(run / "effects.parquet")
    own = effects.query("component == '20.8' and metric == 'logit_diff' and example < 10")
    heat = read_page(run).figure("effects")["data"][0]
    assert heat["z"][8][20] == pytest.approx(own["effect"].mean())


def test_random_sets_show_their_draws_and_the_mean_over_them(whole: Path, page: Page) -> None:
    table = pd.read_parquet(whole / "knockout.parquet").query("task == 'add' and set == 'matched'")
    table = table.query("ablation == 'mean' and where == 'end'")
    traces = page.figure("knockout")["data"]
    line = next(t for t in traces if t.get("name") == "random, same layers")
    dots = next(t for t in traces if t["legendgroup"] == "matched" and t["mode"] == "markers")
    means = table.groupby("k")["accuracy"].mean() * 100
    np.testing.assert_allclose(line["y"][1:], means.to_numpy())
    assert line["x"][0] == 0
    assert sorted(dots["y"]) == pytest.approx(sorted(table["accuracy"] * 100))


def test_draws_that_all_agree_do_not_claim_certainty(run: Path) -> None:
    def agree(table: pd.DataFrame) -> pd.DataFrame:
        random = (table["set"] == "matched") & (table["task"] == "add")
        table.loc[random, ["accuracy", "low", "high"]] = (1.0, 0.96, 1.0)
        return table

    edit_table(run / "knockout.parquet", agree)
    assert "layer-matched random heads leave 100 % [96, 100]" in headline(run)


def test_different_ablations_are_never_joined(run: Path) -> None:
    before = headline(run)

    def add_zero(table: pd.DataFrame) -> pd.DataFrame:
        return pd.concat([table.assign(ablation="zero", accuracy=0.5), table])

    edit_table(run / "knockout.parquet", add_zero)
    assert headline(run) == before


def test_every_kind_of_row_has_its_place(run: Path) -> None:
    """Other ablations are left out of the curves, further sets and control tasks are in them."""
    before = headline(run)

    def extend(table: pd.DataFrame) -> pd.DataFrame:
        top = table[(table["set"] == "top") & (table["task"] == "add") & (table["k"].isin([1, 3]))]
        further = [top.assign(ablation="zero"), top.assign(where="all"), top.assign(set="least")]
        for draw, name in enumerate(("copy_number", "capital")):
            further += [
                top.assign(task=name, accuracy=1.0),
                top.assign(set="other_task", draw=draw, source=name),
                top.assign(set="other_task", draw=draw, source=name, task=name),
            ]
        return pd.concat([table, *further], ignore_index=True)

    edit_table(run / "knockout.parquet", extend)
    assert headline(run) == before
    page = read_page(run)
    names = {trace.get("name") for trace in page.figure("knockout")["data"]}
    assert {"least important", "circuits of other tasks"} <= names
    assert "its own circuit" not in names
    others = page.figure("others")
    titles = [note["text"] for note in others["layout"]["annotations"]]
    assert titles[-2:] == ["copying a number", "capitals"]
    # In its own task the circuit of a control task is not that of another one.
    names = {trace.get("name") for trace in others["data"]}
    assert "its own circuit" in names
    assert "circuits of other tasks" not in names


def test_other_tasks_have_a_panel_each(page: Page) -> None:
    titles = [note["text"] for note in page.figure("others")["layout"]["annotations"]]
    assert titles[:4] == ["subtraction", "multiplication", "division", "copying"]
    assert titles[4:] == ["copying a number", "capitals"]


def test_every_measurement_is_on_the_page(whole: Path) -> None:
    table = summarise(whole).measurements
    assert table is not None
    assert len(table.rows) == len(json.loads((whole / "eval.json").read_text()))


def test_tuning_table_has_a_row_per_variant_and_marks_differences(whole: Path) -> None:
    table = summarise(whole).tuning
    assert table is not None
    names = [row.cells[0].text for row in table.rows]
    assert names == ["base", "random", "precise", "precise - random"]
    place = [column.label for column in table.columns].index("Arithmetic")
    assert table.rows[-1].cells[place].text.startswith("+")
    assert table.rows[-1].cells[place].text.endswith(" pts")


@pytest.mark.parametrize(
    ("stages", "figures", "commands"),
    [
        ((), set(), {"validate", "explain", "tune", "evaluate"}),
        (("validate",), {"knockout", "others"}, {"explain", "tune", "evaluate"}),
        (("explain",), {"attention", "lens", "mlps"}, {"validate", "tune", "evaluate"}),
        (("validate", "tune"), {"knockout", "others"}, {"explain", "evaluate"}),
        (
            STAGES,
            {"attention", "lens", "mlps", "knockout", "others", "tuning"},
            set(),
        ),
        (("evaluate",), {"tuning"}, {"validate", "explain", "tune"}),
    ],
)
def test_missing_stages_are_named_with_their_command(
    tmp_path: Path, stages: tuple[str, ...], figures: set[str], commands: set[str]
) -> None:
    run = write_run(tmp_path / "run", stages=stages)
    page = read_page(run)
    assert {name.removesuffix("-data") for name in page.data} == figures | {"effects", "feeds"}
    for stage in STAGES:
        command = f"circuitune {stage} {run}"
        assert (f"Not run yet. {command}" in page.text) == (stage in commands)
        assert (command in printed(run, 400)) == (stage in commands)


def test_one_task_alone_is_enough(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tasks=("add",))
    edit_table(run / "knockout.parquet", lambda table: table[table["task"] == "add"])
    page = read_page(run)
    assert "others-data" not in page.data
    assert "takes addition from" in page.text


def test_own_pairs_need_no_selection(run: Path) -> None:
    (run / "selection.json").unlink()
    pairs = summarise(run).pairs
    assert [cell.text for cell in pairs.rows[0].cells] == ["addition", str(EXAMPLES), str(EXAMPLES)]
    assert "Prefixes tried" not in read_page(run).text


def test_names_from_the_run_cannot_become_markup(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    run = write_run(tmp_path / "run", model=evil)
    edit_table(run / "knockout.parquet", lambda t: t.assign(task=t.task.replace("copy", evil)))
    html = write_report(run).read_text(encoding="utf-8")
    page = Page(html)
    assert "<script>alert(1)" not in html
    assert f"Addition in {evil}" in page.text
    assert page.open == []
    assert page.figure("others")["layout"]["annotations"][3]["text"].startswith("&lt;/script&gt;")


def _without(key: str) -> Callable[[dict], dict]:
    return lambda values: {name: value for name, value in values.items() if name != key}


def _first_component(**changes: object) -> Callable[[dict], dict]:
    def change(circuit: dict) -> dict:
        circuit["components"][0].update(changes)
        return circuit

    return change


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("circuit.json", _without("components"), "must hold 'components' in it, but found only"),
        ("circuit.json", _first_component(id="head 3"), 'found "head 3"'),
        ("circuit.json", _first_component(id="30.0"), "30 layers and 9 heads, but found '30.0'"),
        ("circuit.json", _first_component(estimate="strong"), "'estimate' of 'components'[0]"),
        ("circuit.json", _first_component(low=5.0, high=1.0), "at most `high`"),
        ("manifest.json", _without("model"), "must hold 'model'"),
        ("eval.json", lambda records: {"records": records}, "must hold a list of records"),
        ("eval.json", lambda records: [{**records[0], "value": float("nan")}], "a finite number"),
        ("tune.json", lambda _: {"variants": {"precise": {}}}, "'components'"),
        ("selection.json", _without("tasks"), "must hold 'tasks'"),
    ],
)
def test_malformed_json_is_told_in_one_sentence(
    run: Path, name: str, change: Callable[[object], object], told: str
) -> None:
    edit_json(run / name, change)
    _fails(run, told, run / name)


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("effects.parquet", lambda t: t.drop(columns="effect"), "'effect' is absent"),
        ("effects.parquet", lambda t: t.assign(component="12-3"), "found '12-3'"),
        ("effects.parquet", lambda t: t.assign(component="2.9"), "one comes twice"),
        ("effects.parquet", lambda t: t.assign(effect="x"), "numbers in column 'effect'"),
        ("effects.parquet", lambda t: t.assign(effect=np.nan), "every row of 'effect'"),
        ("effects.parquet", lambda t: t.iloc[:0], "at least one row"),
        ("knockout.parquet", lambda t: t.assign(accuracy=14.0), "between 0 and 1 in 'accuracy'"),
        ("knockout.parquet", lambda t: t.drop(columns="task"), "'task' is absent"),
    ],
)
def test_malformed_tables_are_told_in_one_sentence(
    run: Path, name: str, change: Callable[[pd.DataFrame], pd.DataFrame], told: str
) -> None:
    edit_table(run / name, change)
    _fails(run, told, run / name)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("circuit.json", b'{"components": [', "must be JSON"),
        ("pairs.jsonl", b'{"clean": "1 + 1 = "}\n', "must hold 'corrupt' in line 1"),
        ("pairs.jsonl", b"\n", "at least one pair"),
        ("manifest.json", b"\xff\xfe\x00", "readable UTF-8 text"),
        ("manifest.json", b"[1, 2]", "an object as it, but found [1, 2]"),
        ("effects.parquet", b"no parquet", "a readable parquet file"),
        ("knockout.parquet", b"", "a readable parquet file"),
    ],
)
def test_unreadable_files_are_told_in_one_sentence(
    run: Path, name: str, content: bytes, told: str
) -> None:
    (run / name).write_bytes(content)
    _fails(run, told, run / name)


def _fails(run: Path, told: str, path: Path) -> None:
    with pytest.raises(UserError) as caught:
        write_report(run)
    message = str(caught.value)
    assert told in message
    assert message.startswith(f"{path} must ")
    assert message.endswith(" again.")
    assert "run `circuitune " in message
    assert "\n" not in message
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("name", ["circuit.json", "manifest.json", "effects.parquet"])
def test_an_absent_file_names_the_command_that_writes_it(run: Path, name: str) -> None:
    (run / name).unlink()
    expected = f"{run} holds no {name}; run `circuitune locate MODEL --out {run}` first."
    with pytest.raises(UserError) as caught:
        summarise(run)
    assert str(caught.value) == expected


def test_a_folder_that_is_not_there_names_the_first_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder; run `circuitune run MODEL --out "):
        summarise(tmp_path / "nothing")


@pytest.mark.parametrize("step", ["os.replace", "pathlib.Path.write_text"])
def test_a_failed_write_leaves_the_old_report(
    run: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = write_report(run)
    old, files = path.read_bytes(), sorted(os.listdir(run))

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    edit_json(run / "circuit.json", _first_component(estimate=-9.0, low=-9.5, high=-8.5))
    monkeypatch.setattr(step, fail)
    with pytest.raises(UserError, match="must be writable, but writing failed"):
        write_report(run)
    assert path.read_bytes() == old
    assert sorted(os.listdir(run)) == files


@pytest.mark.parametrize("width", [80, 120])
def test_terminal_fits_its_width_and_says_the_headline(whole: Path, width: int) -> None:
    text = printed(whole, width)
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    assert headline(whole) in words
    tuning = summarise(whole).tuning
    assert tuning is not None
    assert all(cell.text in words for row in tuning.rows for cell in row.cells[1:])


def test_import_leaves_torch_out() -> None:
    code = (
        "import sys, circuitune.report, circuitune.report.terminal; "
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_report_knows_only_the_run_directory_errors_and_statistics() -> None:
    allowed = ("circuitune.runs", "circuitune.errors", "circuitune.stats", "circuitune.report")
    for path in Path(circuitune.report.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            own = [name for name in names if name.startswith("circuitune")]
            assert all(name.startswith(allowed) for name in own), path.name


# ------------------------------------------------------------------------ who feeds the key heads


def edit_graph(run: Path, change: Callable[[dict], object]) -> None:
    """Change the graph of `circuit.json` in place."""
    path = run / "circuit.json"
    circuit = json.loads(path.read_text())
    change(circuit["graph"])
    path.write_text(json.dumps(circuit))


def lines_of(page: Page) -> list[dict]:
    """The lines of the drawn graph, one for each measured effect."""
    return [
        trace
        for trace in page.figure("feeds")["data"]
        if trace["mode"] == "lines" and trace["x"] != [None]
    ]


def test_every_edge_is_a_line_of_its_size_and_sign(whole: Path, page: Page) -> None:
    graph = json.loads((whole / "circuit.json").read_text())["graph"]
    lines = {line["text"].partition("<br>")[0]: line for line in lines_of(page)}
    arrow = "\u2192"
    assert f"<b>12.4</b> at operand 2 {arrow} <b>17.2.v</b>" in lines
    chain = lines[f"<b>tokens</b> at operand 2 {arrow} <b>12.4.v {arrow} 17.2.v</b>"]
    assert "\u22120.90 logits [\u22121.10, \u22120.70]" in chain["text"]
    assert "share 75 %" in chain["text"]
    larger = lines[f"<b>tokens</b> at operand 1 {arrow} <b>20.8.v</b>"]
    assert larger["line"]["width"] > chain["line"]["width"] > 1
    opposing = lines[f"<b>mlp.9</b> at operand 2 {arrow} <b>17.2.v</b>"]
    assert opposing["line"]["color"] != chain["line"]["color"]
    assert len(lines) == len(graph["edges"]) + 3  # and the three key heads to the answer
    for line in lines.values():
        assert line["y"][0] < line["y"][-1]  # upwards is deeper


def test_a_panel_for_each_contrast_with_what_it_does(page: Page) -> None:
    titles = [note["text"] for note in page.figure("feeds")["layout"]["annotations"]]
    assert titles == [
        "operand 1 differs: \u22125.40 logits",
        "operator differs: \u22123.90 logits",
        "operand 2 differs: \u22125.50 logits",
    ]


def test_sentences_say_which_heads_bring_what(whole: Path, page: Page) -> None:
    first, operator, second = map(str, summarise(whole).brought)
    assert first.startswith("Operand 1 (\u22125.40 logits in all) comes with 20.8 \u22122.20 [")
    assert first.endswith("(its value at operand 1, straight from the tokens).")
    assert "comes with 14.6 \u22120.80" in operator
    assert second.endswith("(its value at operand 2, fed by 12.4).")
    assert "20.8" not in second
    for line in (first, operator, second):
        assert line in page.text
        assert line in " ".join(printed(whole, 100).split())


def test_a_contrast_that_no_head_brings_says_so(run: Path) -> None:
    def change(graph: dict) -> None:
        for node in graph["nodes"]:
            node["brings"] = [name for name in node["brings"] if name != "operator"]

    edit_graph(run, change)
    assert "comes with no single head" in str(summarise(run).brought[1])


def test_nodes_are_listed_with_intervals_key_heads_first(whole: Path) -> None:
    table = summarise(whole).feeding
    assert table is not None
    assert [row.cells[0].text for row in table.rows] == ["20.8", "17.2", "14.6", "12.4", "mlp.24"]
    assert [row.strong for row in table.rows] == [True, True, True, False, False]
    assert table.rows[0].cells[1].text == "operand 1"
    assert table.rows[0].cells[3].interval.startswith("[\u22122.66")
    assert table.rows[3].cells[2].text == "operand 2 to 17.2.v"
    assert table.rows[4].cells[1].text == "operand 1, operator, operand 2"


def test_the_caption_says_what_the_numbers_rest_on(page: Page) -> None:
    assert "over 32 of 96 prompts (12 groups; 5 could not be changed in one" in page.text


def test_older_runs_have_no_such_section(run: Path) -> None:
    edit_json(run / "circuit.json", _without("graph"))
    assert "feeds-data" not in (older := read_page(run)).data
    assert "Who feeds the key heads" not in older.text
    assert summarise(run).brought == ()


def test_a_graph_without_edges_still_lists_its_nodes(run: Path) -> None:
    def change(graph: dict) -> None:
        graph["edges"] = []
        for node in graph["nodes"]:
            node["brings"] = []

    edit_graph(run, change)
    page = read_page(run)
    assert "feeds-data" not in page.data
    assert "Who feeds the key heads" in page.text


def _first_edge(**changes: object) -> Callable[[dict], object]:
    return lambda graph: graph["edges"][0].update(changes)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_first_edge(receiver="20.8"), "found 'embed' to '20.8'"),
        (_first_edge(sender="head 3"), "found 'head 3' to '20.8.v'"),
        (_first_edge(estimate=None), "must hold a number as 'estimate' of 'edges'[0] of 'graph'"),
        (lambda graph: graph.pop("totals"), "must hold 'totals' in 'graph'"),
        (lambda graph: graph["nodes"][0].update(id="30.1"), "30 layers and 9 heads"),
    ],
)
def test_a_malformed_graph_is_told_in_one_sentence(
    run: Path, change: Callable[[dict], object], told: str
) -> None:
    edit_graph(run, change)
    _fails(run, told, run / "circuit.json")


def test_noise_floors_stand_beside_the_effects(whole: Path, page: Page) -> None:
    ranking = summarise(whole).ranking
    assert [column.label for column in ranking.columns][-1] == "Noise floor"
    assert ranking.rows[0].cells[-1].text == "2e\u22126"  # 20/30 of the floor: 1.6e-6
    assert "noise floor 2e\u22126." in ranking.note
    assert "by the same path: at most 2e\u22126 logits" in page.text
    assert "noise floor 2e\u22126" in page.figure("effects")["data"][0]["text"][8][20]


def test_older_runs_have_no_noise_floor(run: Path) -> None:
    edit_json(run / "circuit.json", _without("noise"))
    edit_table(run / "effects.parquet", lambda table: table.drop(columns="noise"))
    page = read_page(run)
    assert "oise floor" not in page.text
    assert len(summarise(run).ranking.columns) == 5


def test_certainty_speaks_only_of_what_was_measured(run: Path) -> None:
    assert circuitune.report.summarise(run).certainty == ()

    path = run / "circuit.json"
    content = json.loads(path.read_text())
    content["significance"] = {
        "tested": 300,
        "significant": 41,
        "false_discovery": 0.05,
        "share_cut": 0.02,
        "total_effect": -9.5,
        "key": [{"id": "20.8", "share": 0.11, "p_adjusted": 0.001}],
    }
    content["stability"] = {
        "k": 5,
        "pairs": 70,
        "bootstrap_jaccard": [0.71, 0.4, 1.0],
        "split_half_jaccard": [0.5, 0.3, 0.7],
        "pairs_for_jaccard_0.8": 280,
    }
    path.write_text(json.dumps(content))
    first, second = circuitune.report.summarise(run).certainty
    assert "41 of 300 components" in first
    assert "20.8 (11%)" in first
    assert "0.71 [0.40, 1.00] on 70 pairs" in second
    assert "0.8 needs about 280 pairs" in second
