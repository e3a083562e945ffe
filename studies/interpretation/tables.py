"""Collect the runs of `run.py` into NAME.json, and write all tables to ``docs/findings-NAME.md``.

    python studies/interpretation/tables.py --name smollm2 --runs runs/interpretation
    python studies/interpretation/tables.py --name smollm2        # from the committed NAME.json

``docs/findings.md`` shows some of the tables of both models.

Every number is on the held-out half, with the 95 % interval that the run gives. Averages over
layer-matched random sets have the interval of a mean over sets.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from circuitune.stats import bootstrap_mean

HERE = Path(__file__).parent
OPERATORS = ("add", "sub", "mul", "div")
SIGNS = {"add": "+", "sub": "−", "mul": "×", "div": "÷", "all": "all four"}  # noqa: RUF001
STABLE = 0.95
BY = ("iterated", "greedy", "mask", "single_pass")


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------- collecting


def rate(row: pd.Series) -> dict[str, Any]:
    """Accuracy of one knockout and its change from the intact model, with intervals."""
    names = ("accuracy", "low", "high", "change", "change_low", "change_high")
    found = {name: round(float(row[name]), 4) for name in names if name in row.index}
    return found | {"n": int(row["n"])}


def over_sets(rows: pd.DataFrame) -> dict[str, Any]:
    """Mean accuracy over random sets, with the interval of the mean and the lowest set."""
    item = bootstrap_mean(rows["accuracy"].to_numpy(), rng=np.random.default_rng(0))
    names = ("accuracy", "low", "high")
    values = dict(zip(names, (item.estimate, item.low, item.high), strict=True))
    values["least"] = float(rows["accuracy"].min())
    return {name: round(float(value), 4) for name, value in values.items()} | {"sets": len(rows)}


def at_end(run: Path) -> pd.DataFrame:
    """Knockouts by mean at END."""
    table = pd.read_parquet(run / "knockout.parquet")
    return table[(table["ablation"] == "mean") & (table["where"] == "end")]


def knockouts(run: Path, task: str) -> list[dict[str, Any]]:
    """Per size what is left of the run's own task, with the controls."""
    table = at_end(run)
    table = table[(table["task"] == task) & (table["k"] > 0)]
    found = []
    for k, rows in table.groupby("k"):
        sets = {name: rows[rows["set"] == name] for name in ("top", "single_pass", "least")}
        item = {name: rate(own.iloc[0]) for name, own in sets.items() if len(own)}
        for name in ("matched", "random"):
            item[name] = over_sets(rows[rows["set"] == name])
        found.append({"k": int(k)} | item)
    return found


def elsewhere(run: Path, task: str, k: int) -> dict[str, Any]:
    """What the first k heads leave of every other task."""
    table = at_end(run)
    rows = table[(table["set"] == "top") & (table["k"] == k) & (table["task"] != task)]
    return {row["task"]: rate(row) for _, row in rows.iterrows()}


def attention(run: Path) -> dict[str, dict[str, list[float]]]:
    """Attention from END by role, of key heads and of the average head: mean, low, high."""
    table = pd.read_parquet(run / "explain" / "attention.parquet")
    table = table[table["set"].isin(["key", "all"])]
    return {
        name: {
            row["role"]: [round(float(row[key]), 4) for key in ("mean", "low", "high")]
            for _, row in rows.iterrows()
        }
        for name, rows in table.groupby("component", sort=False)
    }


def mlps(run: Path) -> dict[str, Any]:
    """Direct effect of each MLP, and how the cosines of input and output with tokens move."""
    table = pd.read_parquet(run / "explain" / "mlps.parquet")
    effect = table[table["measure"] == "effect"].sort_values("layer")
    found: dict[str, Any] = {
        "effect": [
            [round(float(row[key]), 4) for key in ("mean", "low", "high")]
            for _, row in effect.iterrows()
        ]
    }
    cosines = table[table["measure"] == "cosine"]
    for (of, token), rows in cosines.groupby(["of", "token"]):
        means = rows.sort_values("layer")["mean"]
        found[f"{of} {token}"] = [round(float(value), 4) for value in means]
    return found


def operator(runs: Path, name: str) -> dict[str, Any]:
    """Everything of one operator's two runs."""
    run = runs / name
    circuit, judged = read(run / "circuit.json"), read(run / "validate.json")
    told = read(run / "explain" / "explain.json")
    key = circuit["significance"]["key"]
    heads = [item["id"] for item in key if not item["id"].startswith("mlp")]
    return {
        "pairs": read(run / "selection.json")["tasks"][name],
        "total_effect": circuit["significance"]["total_effect"],
        "key_heads": heads,
        "key_mlps": [item["id"] for item in key if item["id"].startswith("mlp")],
        "paper_cut": circuit["single_pass"]["key_heads"],
        "circuit": [item["id"] for item in circuit["components"]][: circuit["size"]],
        "knockout": knockouts(run, name),
        "elsewhere": elsewhere(run, name, circuit["size"]),
        "faithfulness": judged["faithfulness"],
        "completeness": judged["completeness"]["mean_absolute_difference"],
        "labels": [
            {key: item.get(key) for key in ("id", "set", "label", "confidence")}
            for item in told["heads"]
        ],
        "attention": attention(run),
        "rise": {place: told["rise"][place] for place in ("start", "inflection", "end")},
        "mlps": mlps(run),
        "example": told["example"],
        "joint": joint(runs / f"{name}-joint"),
    }


def joint(run: Path) -> dict[str, Any] | None:
    """Joint selection: every proposal on both halves, and the chosen set with its controls."""
    if not (run / "knockout.parquet").is_file():
        return None
    circuit, manifest = read(run / "circuit.json"), read(run / "manifest.json")
    rule, table = circuit["rule"], at_end(run)
    chosen = [item["id"] for item in circuit["components"]]
    matched = table[(table["set"] == "matched") & (table["k"] == len(chosen))]
    top = table[(table["set"] == "top") & (table["k"] == len(chosen))]
    proposals = []
    for item in rule["proposals"]:
        own = table[(table["set"] == "proposal") & (table["source"] == item["by"])]
        own = own[own["k"] == item["k"]]
        test = {row["task"]: rate(row) for _, row in own.iterrows()}
        select = {task: round(value, 4) for task, value in item["accuracy"].items()}
        kept = {name: item[name] for name in ("by", "k", "heads", "reached")}
        proposals.append(kept | {"select": select, "test": test})
    return {
        "heads": chosen,
        "targets": rule["targets"],
        "spared": rule["spared"],
        "goal": rule["goal"],
        "by": rule["by"],
        "evaluated_sets": rule["evaluated_sets"],
        "seconds": manifest["stages"]["locate"]["seconds"],
        "test": {row["task"]: rate(row) for _, row in top.iterrows()},
        "matched": over_sets(matched),
        "proposals": proposals,
    }


def transfer(run: Path) -> dict[str, Any] | None:
    """The transfer matrix, if it was made."""
    if not (run / "transfer.json").is_file():
        return None
    content, table = read(run / "transfer.json"), pd.read_parquet(run / "transfer.parquet")
    sources = table[table["set"] == "source"]
    matched = table[table["set"] == "matched"]
    return {
        "k": content["k"],
        "tasks": content["tasks"],
        "cells": [
            {"source": row["source"], "target": row["task"]} | rate(row)
            for _, row in sources.iterrows()
        ],
        "matched": {task: over_sets(rows) for task, rows in matched.groupby("task", sort=False)},
        "overlap": content["overlap"],
        "choices": content["choices"],
    }


def collect(runs: Path) -> dict[str, Any]:
    """The content of NAME.json."""
    manifest = read(runs / "add" / "manifest.json")
    return {
        "model": {**manifest["model"], "id": Path(manifest["model"]["id"]).name},
        "versions": manifest["versions"],
        "operators": {name: operator(runs, name) for name in OPERATORS},
        "all": joint(runs / "all-joint"),
        "transfer": transfer(runs / "add"),
    }


# ----------------------------------------------------------------------------------------- tables


def percent(item: dict[str, Any] | None) -> str:
    """An accuracy with its interval."""
    if item is None:
        return ""
    return f"{item['accuracy']:.0%} [{100 * item['low']:.0f}, {100 * item['high']:.0f}]"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a markdown table."""
    lines = ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]
    return [re.sub(r"(?<=\d)%", " %", line) for line in lines]


def at_size(item: dict[str, Any], k: int) -> dict[str, Any]:
    """The knockouts of one size."""
    return next((own for own in item["knockout"] if own["k"] == k), {})


def components(content: dict[str, Any]) -> list[str]:
    """Number and share of key components, and their knockout against controls."""
    count = content["model"]["layers"] * content["model"]["heads"]
    head = ["", "answered", "key heads", "MLPs", "paper's cut", "circuit", "left without it"]
    head += ["single pass", "matched random", "faithful alone"]
    rows = []
    for name, item in content["operators"].items():
        k, pairs = len(item["circuit"]), item["pairs"]
        own, share = at_size(item, k), item["faithfulness"]["circuit"]["share"]
        rows.append(
            [
                SIGNS[name],
                percent(pairs | {"accuracy": pairs["rate"]}),
                f"{len(item['key_heads'])} ({len(item['key_heads']) / count:.1%})",
                str(len(item["key_mlps"])),
                str(item["paper_cut"]),
                f"{k} ({k / count:.1%}): {', '.join(item['circuit'])}",
                percent(own.get("top")),
                percent(own.get("single_pass")),
                percent(own.get("matched")),
                "" if share is None else percent(share | {"accuracy": share["estimate"]}),
            ]
        )
    return table(head, rows)


def looks(content: dict[str, Any]) -> list[str]:
    """Attention from END by role, mean over the key heads, and how stable their labels are."""
    roles = ["operand 1", "operator", "operand 2", "start", "end", "other"]
    rows, every = [], []
    for name, item in content["operators"].items():
        labels = [own for own in item["labels"] if own["set"] == "key" and own["label"]]
        every += labels
        for own in labels:
            weights = item["attention"][own["id"]]
            cells = [
                "{:.2f} [{:.2f}, {:.2f}]".format(*weights[r]) if r in weights else "" for r in roles
            ]
            label = f"{own['label']} ({own['confidence']:.0%})"
            rows.append([SIGNS[name], own["id"], label, *cells])
        average = item["attention"]["all heads"]
        cells = [
            "{:.2f} [{:.2f}, {:.2f}]".format(*average[r]) if r in average else "" for r in roles
        ]
        rows.append([SIGNS[name], "all heads", "", *cells])
    stable = sum(own["confidence"] >= STABLE for own in every)
    mean = float(np.mean([own["confidence"] for own in every])) if every else float("nan")
    note = f"{stable} of {len(every)} labels have a confidence of {STABLE:.0%}; mean {mean:.1%}."
    return [*table(["", "head", "label", *roles], rows), "", note]


def loss(test: dict[str, Any], tasks: list[str]) -> float:
    """What tasks lose on average; a gain in one makes up for no loss in another."""
    lost = [max(0.0, -test[task]["change"]) for task in tasks]
    return float(np.mean(lost)) if lost else float("nan")


def change(item: dict[str, Any]) -> str:
    """A change of accuracy in points, with its interval."""
    return "{change:+.1%} [{change_low:+.1%}, {change_high:+.1%}]".format(**item).replace("%", "")


def chosen(content: dict[str, Any]) -> list[str]:
    """The sets that joint selection chose, on the held-out half."""
    items = {name: item["joint"] for name, item in content["operators"].items()}
    rows = []
    for name, item in (items | {"all": content["all"]}).items():
        if item is None:
            continue
        test = item["test"]
        left = [percent(test[task]) for task in item["targets"]]
        if name == "all":
            left = [
                f"{SIGNS[task]} {text}" for task, text in zip(item["targets"], left, strict=True)
            ]
        each = [f"{task} {change(test[task])}" for task in item["spared"]]
        reached = "yes" if item["goal"]["reached"] else "no"
        cells = [SIGNS[name], f"{len(item['heads'])}: {', '.join(item['heads'])}", item["by"]]
        cells += [reached, "; ".join(left), percent(item["matched"])]
        rows.append([*cells, f"{loss(test, item['spared']):.1%}", "; ".join(each)])
    head = ["", "heads", "proposed by", "goal on the select half", "left", "matched random"]
    return table([*head, "control tasks lose", "their change, points"], rows)


def by_size(content: dict[str, Any], part: str) -> list[str]:
    """What every proposer's set leaves of the targets, and what it costs the control tasks."""
    item = content["all"] if part == "all" else content["operators"][part]["joint"]
    proposals = {(own["by"], own["k"]): own["test"] for own in item["proposals"]}
    sizes = sorted({k for _, k in proposals})
    rows = []
    for by in BY:
        cells = []
        for k in sizes:
            test = proposals[by, k]
            if len(item["targets"]) == 1:
                left = percent(test[item["targets"][0]])
            else:
                left = " ".join(f"{test[task]['accuracy']:.0%}" for task in item["targets"])
            cells.append(f"{left}; {loss(test, item['spared']):.0%}")
        rows.append([by, *cells])
    return table([SIGNS[part], *(f"{k} head{'s' * (k > 1)}" for k in sizes)], rows)


def matrix(content: dict[str, Any]) -> list[str]:
    """The transfer matrix: rows are sources, columns targets."""
    found = content["transfer"]
    cells = {(cell["source"], cell["target"]): cell for cell in found["cells"]}
    targets = list(dict.fromkeys(cell["target"] for cell in found["cells"]))
    sources = list(dict.fromkeys(cell["source"] for cell in found["cells"]))
    rows = [
        [source, *(percent(cells[source, target]).replace("%", "") for target in targets)]
        for source in sources
    ]
    last = [percent(found["matched"][target]).replace("%", "") for target in targets]
    return table(["from \\ to, %", *targets], [*rows, ["matched random", *last]])


def spared(content: dict[str, Any]) -> list[str]:
    """Multiple choice before and after the knockout."""
    rows = []
    for item in content["transfer"]["choices"]:
        acc = item["acc_norm"]
        change = "{:+.1%} [{:+.1%}, {:+.1%}]".format(*acc["change"])
        before = "{:.1%} [{:.1%}, {:.1%}]".format(*acc["before"])
        own = item["source"] if item["set"] == "source" else f"matched random {item['draw'] + 1}"
        shown = "yes" if acc["non_inferior"] else "no"
        rows.append([item["data"], own, str(item["n"]), before, change, shown])
    return table(["data", "heads out", "questions", "accuracy", "change", "loses < 2 points"], rows)


HEADINGS = {
    "components": (
        "Key heads move the logit difference by at least 2 % of what the whole corruption "
        "does, at a false-discovery rate of 5 % over all components. The circuit is the "
        "iterated one, *left without it* what its mean ablation at END leaves of the right "
        "answers, *single pass* as many heads by the paper's ranking, *matched random* ten "
        "sets of the same layers, *faithful alone* the share of the logit difference that is "
        "kept when all other heads are ablated."
    ),
    "attention": (
        "Mean attention from END by role; the role label with the share of bootstrap "
        "resamples that agree."
    ),
    "joint selection": (
        "Chosen on the select half: at most 2 % of the heads (at least two) that leave at "
        "most 30 % of the operator while copying and capitals lose at most 3 points on "
        "average, on all prompts, right or wrong. All numbers are of the held-out half; "
        "matched random: 50 sets, mean."
    ),
    "transfer": (
        "Heads of each task (rows) are ablated in every other (columns): per cent of the "
        "right answers that are left. Cells of tasks near chance say little."
    ),
    "choices": (
        "Accuracy per byte of the answer's text before and after heads are mean-ablated at "
        "END and wherever an answer is read."
    ),
}


def tables(content: dict[str, Any]) -> dict[str, list[str]]:
    """All tables by the name of their section."""
    found = {
        "components": components(content),
        "attention": looks(content),
        "joint selection": chosen(content),
    }
    for part in (*OPERATORS, "all"):
        if (content["all"] if part == "all" else content["operators"][part]["joint"]) is not None:
            found[f"every proposal for {SIGNS[part]}"] = by_size(content, part)
    if content["transfer"]:
        found |= {"transfer": matrix(content), "choices": spared(content)}
    return found


def page(name: str, content: dict[str, Any]) -> str:
    """The page with all tables of a model."""
    model = content["model"]
    lines = [f"# All tables of {model['id']}", ""]
    lines += [
        f"{model['layers']} layers of {model['heads']} heads. Made by",
        f"`python studies/interpretation/tables.py --name {name}`; what they say: "
        "[findings](findings.md).",
    ]
    for section, rows in tables(content).items():
        lines += ["", f"## {section[0].upper()}{section[1:]}", ""]
        if section in HEADINGS:
            lines += [HEADINGS[section], ""]
        lines += rows
    return "\n".join(lines) + "\n"


def main() -> None:
    """Collect if runs are given; write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True)
    parser.add_argument("--runs", type=Path)
    given = parser.parse_args()
    path = HERE / f"{given.name}.json"
    if given.runs:
        text = json.dumps(collect(given.runs / given.name), ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
    target = HERE.parents[1] / "docs" / f"findings-{given.name}.md"
    target.write_text(page(given.name, read(path)), encoding="utf-8")
    sys.stdout.write(f"{target}\n")


if __name__ == "__main__":
    main()
