"""Options of every stage: one frozen dataclass each is the Python call, the flags and the YAML.

This file imports nothing heavy, so that ``circuitune --help`` is instant. A field name means the
same in every stage that has it; its help text gives the unit and the off-value.
"""

import difflib
import re
from contextlib import suppress
from dataclasses import Field, dataclass, field, fields
from typing import Any, get_args

from circuitune.errors import UserError

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def option(
    default: Any,
    text: str,
    *,
    least: int | None = None,
    below: int | None = None,
    among: tuple[str, ...] = (),
) -> Any:
    """A dataclass field with its one-line help text, and what its value may be.

    Args:
        default: its default.
        text: the help.
        least: for a number: it may not be less.
        below: for a number: it must be less.
        among: for text: what it may be; of several values each.
    """
    bounds = {"least": least, "below": below, "among": among}
    return field(default=default, metadata={"help": text, **bounds})


@dataclass(frozen=True)
class PairsConfig:
    """Make clean/corrupt prompt pairs and keep those that the model answers."""

    operators: tuple[str, ...] = option(
        ("add", "sub", "mul", "div"),
        "Operators; the first one is the task that heads are chosen on.",
    )
    per_split: int = option(72, "Most pairs per operator in each half (select, test).", least=8)
    prefix: str | None = option(
        None, "Text before every prompt; by default the best of a few is kept."
    )
    pairs: str | None = option(None, "Your own pairs (JSON lines: clean, corrupt, answer) instead.")
    correct_only: bool = option(False, "With --pairs: keep only pairs that the model answers.")
    seed: int = option(0, "Seed of every random choice.", least=0)


@dataclass(frozen=True)
class LocateConfig:
    """Measure the direct effect of every head and MLP and choose a circuit."""

    rule: str = option(
        "iterated",
        "How heads are chosen: iterated, single (one sweep), paper (see --cut) or joint (a "
        "small set that destroys --targets and spares control tasks; slower).",
        among=("iterated", "single", "paper", "joint"),
    )
    most: int = option(13, "Most heads that are ranked.", least=1)
    cut: float = option(
        -0.05, "With --rule paper: heads whose mean relative logit effect is below this."
    )
    race: float = option(
        0.0,
        "Confidence with which each selection may stop measuring weak heads early; 0 is exact.",
        least=0,
        below=1,
    )
    screen: int = option(
        0,
        "Measure only this many heads a round, the best by a gradient estimate; 0 is all.",
        least=0,
    )
    exact: bool = option(False, "All heads on all pairs, whatever --race and --screen say.")
    targets: tuple[str, ...] = option(
        (), "With --rule joint: tasks to destroy, of those in the pairs; by default the first."
    )
    left: float = option(
        0.3, "With --rule joint: most accuracy that may be left of a target.", least=0, below=1
    )
    harm: float = option(
        0.03, "With --rule joint: most accuracy that control tasks may lose.", least=0, below=1
    )
    share: float = option(
        0.02, "With --rule joint: largest share of all heads, at least 2 heads.", least=0, below=1
    )
    graph: bool = option(True, "Trace who feeds the chosen heads, down to the tokens.")
    draws: int = option(2000, "Bootstrap draws behind each interval.", least=100)
    seed: int = option(0, "Seed of every random choice.", least=0)


@dataclass(frozen=True)
class ValidateConfig:
    """Knock out the top k heads, and random heads as a control, on the held-out half."""

    sizes: tuple[int, ...] = option(
        (1, 2, 3, 5, 8, 13), "Numbers of heads to knock out; the circuit's own is added.", least=1
    )
    controls: int = option(
        10, "Random sets per size, of each kind (layer-matched, anywhere).", least=0
    )
    ablations: tuple[str, ...] = option(
        ("mean", "zero", "resample"),
        "Ablations at the circuit's own size; all sizes have the mean at END.",
        among=("mean", "zero", "resample"),
    )
    where: tuple[str, ...] = option(
        ("end", "all"),
        "Where these ablate: at END, at all positions (slower), or both.",
        among=("end", "all"),
    )
    control_tasks: bool = option(
        True, "Also copying and capitals: spared by the circuit, with circuits of their own."
    )
    seed: int = option(0, "Seed of every random choice.", least=0)


@dataclass(frozen=True)
class ExplainConfig:
    """Tell what the key heads and MLPs do: attention, logit lens, neurons, on the held-out half."""

    prompts: int = option(48, "Most pairs of the held-out half that are looked at.", least=8)
    top: int = option(8, "Tokens that are listed for a head or a neuron.", least=1)
    mlps: int = option(3, "Strongest MLPs whose neurons are measured; 0 is none.", least=0)
    neurons: int = option(20, "Neurons that are measured in each of these MLPs.", least=1)
    draws: int = option(2000, "Bootstrap draws behind each interval.", least=100)
    seed: int = option(0, "Seed of every random choice.", least=0)


@dataclass(frozen=True)
class TransferConfig:
    """Knock out heads found on one task in all others, and see what tuning did to the heads."""

    tasks: tuple[str, ...] = option(
        ("all",), "Tasks beside the run's own, see `circuitune.sources`; all, or none."
    )
    data_dir: str | None = option(
        None, "Folder with public data sets, or `hub`; by default word problems are left out."
    )
    heads: int = option(0, "Heads that each task gives; 0 takes the circuit's number.", least=0)
    overlap: int = option(10, "Heads of each task that are compared with each other's.", least=1)
    per_split: int = option(32, "Most pairs per task in each half (select, test).", least=8)
    controls: int = option(5, "Layer-matched random sets that are knocked out too.", least=0)
    questions: int = option(
        300, "Multiple-choice questions per data set with --data-dir; 0 is none.", least=0
    )
    seed: int = option(0, "Seed of every random choice.", least=0)


@dataclass(frozen=True)
class TuneConfig:
    """Tune only slices of the chosen heads, and of random heads as a control."""

    methods: tuple[str, ...] = option(
        ("precise", "random"),
        "What is trained, one after the other: precise, random (as many heads of the same layers), "
        "layers, lora, lora_heads, full.",
        among=("precise", "random", "layers", "lora", "lora_heads", "full"),
    )
    heads: int = option(5, "Number of heads to tune.", least=1)
    mlps: int = option(0, "Whole MLPs to tune, those with the strongest effects.", least=0)
    pick: str = option(
        "direct",
        "How heads are picked: direct, circuit, upstream, gradient or cost.",
        among=("direct", "circuit", "upstream", "gradient", "cost"),
    )
    form: str = option(
        "qo",
        "Tuned parts of a head: qo, or qkvo (shared keys and values too).",
        among=("qo", "qkvo"),
    )
    data: str | None = option(
        None, "Training texts (JSON lines, JSON, CSV, parquet, hub:NAME) instead of arithmetic."
    )
    max_tokens: int = option(512, "With --data: longer texts are cut.", least=8)
    tune_operators: tuple[str, ...] = option(("add", "sub", "mul"), "Operators that are trained.")
    digits: int = option(2, "Most digits of an operand.", least=1)
    replay: float = option(0.0, "Share of training texts that are plain English.", least=0, below=1)
    steps: int = option(150, "Optimiser steps.", least=1)
    batch_size: int = option(32, "Texts per step.", least=1)
    accumulate: int = option(1, "Pieces of a batch that run one after another.", least=1)
    learning_rate: float = option(
        0.0, "Peak learning rate of AdamW; 0 takes the method's own.", least=0
    )
    mlp_rate: float = option(0.1, "Learning rate of MLPs, as a share of the heads'.", least=0)
    weight_decay: float = option(0.0, "Decay towards the base weights.", least=0)
    keep: float = option(
        8.0, "Weight of the KL to the base on plain text; 0 turns it off.", least=0
    )
    head_scale: bool = option(False, "Scale gradients by heads per layer over tuned heads in it.")
    precision: str = option(
        "auto",
        "float32, bfloat16, or auto: bfloat16 where it is fast.",
        among=("auto", "float32", "bfloat16"),
    )
    cache: bool = option(True, "Compute what enters the lowest tuned layer once, on disk.")
    checkpointing: bool = option(False, "Save memory: run tuned layers twice.")
    forget_budget: float = option(
        0.0,
        "Stop when the KL to the base on plain text passes this, nats a token; 0 never.",
        least=0,
    )
    evaluate_every: int = option(0, "Steps between evaluations while training; 0 is none.", least=0)
    patience: int = option(
        0, "Stop when so many evaluations bring no better answers; 0 never.", least=0
    )
    save_every: int = option(
        50, "Steps between checkpoints that a killed run resumes from.", least=0
    )
    tensorboard: bool = option(False, "Write TensorBoard logs beside log.jsonl.")
    seed: int = option(0, "Seed of every random choice.", least=0)


@dataclass(frozen=True)
class EvaluateConfig:
    """Exact match on held-out problems, what tuning did to plain English, and benchmarks."""

    suite: str | None = option(
        None,
        "Benchmarks too: paper (word problems, MMLU, CommonsenseQA, BBH, WikiText), "
        "word-problems, retention, or tasks with commas.",
    )
    data_dir: str | None = option(
        None, "Folder with the data sets of the suite; by default the Hugging Face hub."
    )
    limit: int = option(0, "Most questions of a benchmark, drawn at random; 0 asks all.", least=0)
    shots: int = option(
        -1, "Solved examples before a question; -1 takes each task's own.", least=-1
    )
    chat: bool = option(False, "Ask benchmarks through the tokenizer's chat template.")
    problems: int = option(300, "Held-out problems.", least=1)
    retention: str | None = option(
        None, "Text file for perplexity and KL; by default the one that ships."
    )
    seed: int = option(0, "Seed of every random choice.", least=0)


def overrides(config_class: type, values: dict[str, Any]) -> Any:
    """Build a stage's config from loose values, lists made tuples.

    Raises:
        UserError: a name is unknown, or a value has the wrong type or is too small.
    """
    known = {item.name: item for item in fields(config_class)}
    given = {str(name).replace("-", "_"): value for name, value in values.items()}  # as flags are
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            stage = config_class.__name__.removesuffix("Config").lower()
            raise UserError(
                f"An option of {stage} must be one of {', '.join(known)}, found {name!r}; "
                f"{f'write {near[0]}' if near else 'correct the name'}."
            )
    return config_class(**{name: _checked(known[name], value) for name, value in given.items()})


def _checked(item: Field, value: Any) -> Any:
    """A value as its field wants it: the field's type, or a tuple of its items' type."""
    if value is None and item.default is None:
        return None
    several = isinstance(item.default, tuple)
    # tuple[int, ...] and str | None name their type first
    kind = (get_args(item.type) or (item.type,))[0]
    parts = value if several and isinstance(value, list | tuple) else (value,)
    parts = tuple(_number(part) if kind is float else part for part in parts)
    if (not parts and item.default) or not all(type(part) is kind for part in parts):
        wanted = f"one or more values, each {KINDS[kind]}" if several else KINDS[kind]
        raise UserError(f"{item.name} must be {wanted}, found {value!r}; correct it.")
    least, below, among = (item.metadata[name] for name in ("least", "below", "among"))
    if least is not None and not min(parts) >= least:
        raise UserError(f"{item.name} must be at least {least}, found {value}; choose more.")
    if below is not None and not max(parts) < below:
        raise UserError(f"{item.name} must be below {below}, found {value}; choose less.")
    if among and not set(parts) <= set(among):
        wrong = next(part for part in parts if part not in among)
        raise UserError(
            f"{item.name} must be one of {', '.join(among)}, found {wrong!r}; correct it."
        )
    return parts if several else parts[0]


def _number(value: Any) -> Any:
    """A float of a whole number, and of text such as 3e-3, which is no number in YAML."""
    if type(value) is int:
        return float(value)
    if type(value) is str:
        with suppress(ValueError):
            return float(value)
    return value


def parse_size(text: str) -> int:
    """Bytes of ``1.5GiB``, ``800M`` or ``2 GB`` (units are powers of 1024).

    Raises:
        UserError: the text is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?\s*", text.upper())
    if not match or not float(match[1]):
        raise UserError(
            f"--max-memory must be a size such as 1.5GiB or 800M, found {text!r}; correct it."
        )
    return int(float(match[1]) * UNITS[match[2]])
