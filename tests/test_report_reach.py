"""The report on `transfer.json` and joint selection: its numbers are those of the files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from circuitune.errors import UserError
from circuitune.report import summarise, write_report
from circuitune.report.proposing import Enough
from circuitune.report.reaching import RANDOM, Reached
from circuitune.report.tables import Table
from tests.fixture_reach import (
    ASKED,
    CHANGES,
    DRAWS,
    GOAL,
    KEPT,
    PROPOSERS,
    QUESTIONS,
    SHARED,
    SPARED,
    TARGETS,
    K,
    kept,
    left_of,
    make_joint,
    write_transfer,
)
from tests.fixture_run import SIZE, write_run
from tests.reading import Page, edit_json, edit_table, printed, read_page

MATRIX, PROPOSED = "How far it reaches", "Which set is enough"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run by joint selection with a transfer; tests only read it."""
    run = write_run(tmp_path_factory.mktemp("runs") / "whole")
    make_joint(run, SIZE)
    write_transfer(run)
    return run


@pytest.fixture(scope="module")
def page(whole: Path) -> Page:
    """The page of the finished run."""
    return read_page(whole)


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to change; without a report."""
    ignored = shutil.ignore_patterns("report.html")
    return Path(shutil.copytree(whole, tmp_path / "run", ignore=ignored))


def reached(run: Path) -> Reached:
    """The tables of the transfer."""
    found = summarise(run).reached
    assert found is not None
    return found


def enough(run: Path) -> Enough:
    """The section on joint selection."""
    found = summarise(run).enough
    assert found is not None
    return found


def cells(table: Table | None) -> list[list[str]]:
    """The texts of a table, intervals included."""
    assert table is not None
    return [[str(cell) for cell in row.cells] for row in table.rows]


# ------------------------------------------------------------------------------------ the matrix


def test_tiles_hold_the_accuracies_families_apart(page: Page) -> None:
    heat, numbers = page.figure("reach")["data"]
    drawn = [value for line in heat["z"] for value in line if value is not None]
    random = 100 * (left_of("", "add") + 0.03125)  # the mean of three draws
    wanted = [100 * left_of(source, target) for source in KEPT for target in KEPT]
    assert drawn == pytest.approx([*wanted, *[random] * len(KEPT)])
    assert (numbers["x"][0], numbers["y"][0]) == (0, 0)
    assert numbers["text"].count("12") == len(KEPT)  # 12.5 %, each by its own heads
    # A gap after each of own, arithmetic and word problem; the random row stands apart as well.
    assert [len(heat["x"]), len(heat["y"])] == [1 + len(KEPT) + 3, 1 + len(KEPT) + 1 + 4]
    titles = [note["text"] for note in page.figure("reach")["layout"]["annotations"]]
    assert titles == ["own", "arithmetic", "word problem", "control"]


def test_hover_gives_interval_count_and_heads(page: Page) -> None:
    heat, _ = page.figure("reach")["data"]
    first, crossed, *_ = heat["text"][0]
    assert "12 % [2, 22]" in first
    assert f"of {ASKED} answers survive" in first
    assert first.endswith("20.8 17.2 14.6")
    assert "<b>multiplication</b>, heads of addition" in crossed
    assert f"mean of {DRAWS} draws" in heat["text"][-1][0]


def test_own_heads_are_outlined(page: Page) -> None:
    assert len(page.figure("reach")["layout"]["shapes"]) == len(KEPT)


def test_the_matrix_stands_in_numbers_with_intervals(whole: Path) -> None:
    first, *_, last = cells(reached(whole).matrix)
    assert first[:3] == ["addition", "12 % [2, 22]", "38 % [28, 48]"]
    assert first[-1] == "100 % [90, 100]"
    assert last[0] == RANDOM
    assert last[1].startswith("93 % [9")


def test_the_compact_table_has_three_columns(whole: Path) -> None:
    rows = {row[0]: row[1:] for row in cells(reached(whole).compact)}
    assert next(iter(rows)) == "addition"
    crossed, own, random = rows["copying a word"]
    assert (crossed[:5], own[:4], random[:4]) == ("100 %", "12 %", "93 %")


def test_tasks_near_chance_and_unanswered_ones_are_named(page: Page) -> None:
    assert "may be luck: SVAMP (14 of 60 right, 12 have the commonest)." in page.text
    assert "Too few right answers to measure: powers (2 of 48 right" in page.text


def test_only_overlap_with_the_own_task_is_listed(whole: Path) -> None:
    rows = {row[0]: row[1:] for row in cells(reached(whole).shared)}
    assert list(rows) == ["multiplication", "sums with carry", "copying a word"]
    shared, mean, high, _ = SHARED["mul"]
    assert rows["multiplication"] == [f"{shared} of 10", f"{mean:.1f}", str(high), "0.021"]
    assert rows["sums with carry"][-1] == "2e\u22126"


def test_choices_stand_beside_random_draws(whole: Path, page: Page) -> None:
    circuit, random, circuit_bbh, _ = cells(reached(whole).choices)
    change = CHANGES["commonsense_qa"][0]
    assert circuit[:4] == ["CommonsenseQA", "circuit", str(QUESTIONS), "41 % [35, 47]"]
    assert circuit[-1] == "yes"
    assert change[1] > -0.02
    assert random[-1] == "in 1 of 2"
    assert random[-2] == "\u22120.5 pts [\u22121.0, 0.0]"  # lowest and highest of two draws
    assert circuit_bbh[-2:] == ["\u22123.1 pts [\u22125.5, \u22121.2]", "no"]
    assert "mean of 2 draws [lowest, highest]" in page.text
    rest = cells(reached(whole).choices_rest)
    assert len(rest) == 2 * sum(map(len, CHANGES.values()))


def test_what_tuning_did_is_told_with_intervals(whole: Path, page: Page) -> None:
    found = reached(whole)
    first, *_ = cells(found.changes)
    gap = "\u22120.90 [\u22121.00, \u22120.80]"
    assert first == ["20.8", "yes", "\u22122.10", "\u22123.00", gap, "grew", "0.003", *first[7:]]
    assert first[7] == "+3 [+1, +5]"
    assert [row[0] for row in cells(found.tuned)] == ["20.8", "17.2"]
    assert "2 of 270 heads grew and 1 shrank" in page.text
    assert "Variant random (2 heads)" in page.text
    told = "change by 0.55 logits on average, all others by 0.02: a difference of 0.53 logits"
    assert page.text.count(told) == 1  # the random variant has no comparison


def test_a_note_says_why_tuning_is_not_compared(run: Path) -> None:
    note = {"note": "nothing is tuned yet: `circuitune tune RUN`, then transfer again"}
    edit_json(run / "transfer.json", lambda content: content | {"tuned": note})
    found = reached(run)
    assert found.changes is None
    assert f"What tuning did to the heads: {note['note']}." in read_page(run).text
    assert "nothing is tuned yet" in printed(run, 100)


def test_parts_that_are_absent_are_left_out(run: Path) -> None:
    (run / "transfer.parquet").unlink()
    why = "they need data sets: give --data-dir"

    def reduce(content: dict) -> dict:
        less = {name: content[name] for name in ("task", "k", "tasks")}
        return less | {"overlap": [], "choices": [], "notes": {"data": why}}

    edit_json(run / "transfer.json", reduce)
    found, page = reached(run), read_page(run)
    assert (found.matrix, found.compact, found.shared, found.choices) == (None,) * 4
    assert "reach-data" not in page.data
    assert why in page.text
    assert "may be luck" in page.text


def test_older_runs_have_no_such_sections(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    page = read_page(run)
    assert (summarise(run).reached, summarise(run).enough) == (None, None)
    assert MATRIX not in page.text
    assert PROPOSED not in page.text


def test_tasks_cannot_become_markup(run: Path) -> None:
    evil = "</script><b>evil</b>"
    for name in ("transfer.parquet", "knockout.parquet"):
        edit_table(run / name, lambda t: t.assign(task=t["task"].replace("copy_word", evil)))
    for name in ("transfer.json", "circuit.json"):
        text = (run / name).read_text().replace('"copy_word"', json.dumps(evil))
        (run / name).write_text(text)
    html = write_report(run).read_text(encoding="utf-8")
    assert "<b>evil" not in html
    assert "<b>evil</b>" in Page(html).text


# ---------------------------------------------------------------------------- which set is enough


def test_goal_choice_and_outcome_are_told(whole: Path, page: Page) -> None:
    goal, choice = map(str, enough(whole).told)
    assert goal.startswith("Goal: at most 30 % of the right answers to each of addition and mult")
    assert "copying a word and capitals lose at most 5.0 pts on average" in goal
    assert "Of 20 proposed sets 3 reach it" in goal
    assert "1\u202f234 sets were knocked out" in goal
    assert choice.startswith(f"Chosen: {SIZE} heads by greedy search, the smallest that does.")
    left = kept("greedy", SIZE, "mul", "test")
    assert left > GOAL["left"]
    assert f"the goal is missed: {100 * left:.0f} % [" in choice
    assert "spared tasks lose 4.5 pts" in choice
    assert PROPOSED in page.text


def test_a_goal_that_holds_is_told(run: Path) -> None:
    def halve(table: pd.DataFrame) -> pd.DataFrame:
        target = (table["set"] == "proposal") & table["task"].isin(TARGETS)
        return table.assign(
            **{c: table[c].mask(target, table[c] / 2) for c in ("accuracy", "low", "high")}
        )

    edit_table(run / "knockout.parquet", halve)
    assert "On the held-out half the goal holds" in str(enough(run).told[1])


def test_proposals_of_the_chosen_size_stand_beside_each_other(whole: Path) -> None:
    table = enough(whole).beside
    rows = cells(table)
    assert [row[0] for row in rows][:2] == ["iterated patching", "greedy search"]
    assert [row.strong for row in table.rows] == [False, True, False, False]
    worst = max(kept("mask", SIZE, task, "test") for task in TARGETS)
    lost = 1 - sum(kept("mask", SIZE, task, "select") for task in SPARED) / len(SPARED)
    assert rows[2][2].startswith(f"{100 * worst:.0f} % [")
    assert rows[2][3] == f"{100 * lost:.1f} pts"
    assert len(enough(whole).every.rows) == 5 * len(PROPOSERS)


def test_the_chosen_set_is_shown_task_by_task(whole: Path) -> None:
    rows = cells(enough(whole).chosen)
    assert [row[1] for row in rows] == ["target", "target", "spared", "spared"]
    assert rows[2][2:] == ["97 %", "97 % [89, 100]", "\u22123.0 pts"]


def test_both_halves_are_drawn_and_the_choice_is_ringed(page: Page) -> None:
    traces = page.figure("proposals")["data"]
    greedy = [trace for trace in traces if trace["name"] == "greedy search"]
    assert len(greedy) == 4  # two panels, two halves
    left = [trace for trace in greedy if trace["xaxis"] == "x"]
    for trace, split in zip(left, ("select", "test"), strict=True):
        wanted = [
            100 * max(kept("greedy", k, task, split) for task in TARGETS) for k in range(1, 6)
        ]
        assert trace["y"] == pytest.approx(wanted)
        assert trace["line"]["dash"] == ("solid" if split == "test" else "dot")
    ring = next(trace for trace in traces if trace["name"] == "chosen")
    assert (ring["x"], ring["y"]) == ([SIZE], pytest.approx([left[1]["y"][SIZE - 1]]))


def test_proposals_are_no_curve_of_their_own(whole: Path, tmp_path: Path) -> None:
    """The knockout chart is that of the run without the proposals."""
    plain = read_page(write_run(tmp_path / "run"))
    assert read_page(whole).figure("knockout") == plain.figure("knockout")


def test_before_validate_only_the_select_half_is_there(run: Path) -> None:
    (run / "knockout.parquet").unlink()
    (run / "validate.json").unlink()
    found, page = enough(run), read_page(run)
    assert f"not measured yet, `circuitune validate {run}` does" in found.note
    assert found.note in page.text
    assert found.chosen is None
    assert not any("held out" in column.label for column in found.beside.columns)
    assert "On the held-out half" not in str(found.told[1])


def test_the_rule_is_printed_without_its_proposals(page: Page) -> None:
    rule = page.text.partition("rule of the circuit")[2]
    assert "goalleft 0.3, harm 0.05, reached True" in rule.replace(" goal ", "goal")
    assert "targetsadd, mul" in rule.replace("targets ", "targets")
    assert "'heads'" not in page.text


# ---------------------------------------------------------------------------- errors and terminal


def _one_place(**changes: object) -> Callable[[dict], dict]:
    return lambda content: content | {"tasks": [content["tasks"][0] | changes]}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_one_place(correct=-1), "a whole number of at least 0 as 'correct'"),
        (_one_place(heads=["x"]), "components like"),
        (lambda c: {k: v for k, v in c.items() if k != "k"}, "hold 'k' in it"),
        (
            lambda c: c | {"choices": [c["choices"][0] | {"log_prob": [1.0]}]},
            "a number and the ends of its interval",
        ),
        (
            lambda c: c | {"choices": [c["choices"][0] | {"log_prob": [0.0, 1.0, -1.0]}]},
            "at most `high`",
        ),
    ],
)
def test_a_malformed_transfer_is_told_in_one_sentence(
    run: Path, change: Callable[[dict], dict], told: str
) -> None:
    edit_json(run / "transfer.json", change)
    with pytest.raises(UserError, match=r"transfer\.json must") as caught:
        write_report(run)
    assert told in str(caught.value)
    assert f"run `circuitune transfer {run}` again." in str(caught.value)


def test_a_malformed_proposal_names_locate(run: Path) -> None:
    def spoil(content: dict) -> dict:
        content["rule"]["proposals"][0]["accuracy"]["add"] = 1.5
        return content

    edit_json(run / "circuit.json", spoil)
    with pytest.raises(UserError, match=r"'proposals'\[0\] of 'rule', but .*`circuitune locate"):
        write_report(run)


@pytest.mark.parametrize("width", [80, 100])
def test_terminal_holds_both_sections_within_its_width(whole: Path, width: int) -> None:
    text = printed(whole, width)
    assert max(map(len, text.splitlines())) <= width
    assert f"Right answers left without {K} heads" in text
    assert f"Proposed sets of {SIZE} heads" in text
    assert "Largest changes of direct effects" in text
    if width == 100:
        own = text.partition("Goal:")[2]
        assert "\u2026" not in own  # nothing is cut off
