"""Options of every stage: one frozen dataclass each is the Python call, the flags and the YAML.

This file imports nothing heavy, so that ``circuitune --help`` is instant. A field name means the
same in every stage that has it; its help text gives the unit and the off-value.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from circuitune.errors import UserError


def option(default: Any, text: str) -> Any:
    """A dataclass field with its one-line help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class PairsConfig:
    """Make clean/corrupt prompt pairs and keep those that the model answers."""

    operators: tuple[str, ...] = option(
        ("add", "sub", "mul", "div"),
        "Operators; the first one is the task that heads are chosen on.",
    )
    per_split: int = option(72, "Most pairs per operator in each half (select, test).")
    prefix: str | None = option(
        None, "Text before every prompt; by default the best of a few is kept."
    )
    pairs: str | None = option(None, "Your own pairs (JSON lines: clean, corrupt, answer) instead.")
    correct_only: bool = option(False, "With --pairs: keep only pairs that the model answers.")
    seed: int = option(0, "Seed of every random choice.")


@dataclass(frozen=True)
class LocateConfig:
    """Measure the direct effect of every head and MLP and choose a circuit."""

    most: int = option(13, "Most heads that the iterated selection ranks.")
    draws: int = option(2000, "Bootstrap draws behind each interval.")
    seed: int = option(0, "Seed of every random choice.")


@dataclass(frozen=True)
class ValidateConfig:
    """Knock out the top k heads, and random heads as a control, on the held-out half."""

    sizes: tuple[int, ...] = option((1, 2, 3, 5, 8, 13), "Numbers of heads to knock out.")
    controls: int = option(10, "Random sets per size, of each kind (layer-matched, anywhere).")
    seed: int = option(0, "Seed of every random choice.")


@dataclass(frozen=True)
class TuneConfig:
    """Tune only slices of the chosen heads, and of random heads as a control."""

    heads: int = option(5, "Number of heads to tune.")
    steps: int = option(150, "Optimiser steps.")
    batch_size: int = option(32, "Problems per step.")
    learning_rate: float = option(1e-3, "Peak learning rate of AdamW (linear decay).")
    weight_decay: float = option(0.0, "Decay of the deltas, that is towards the base weights.")
    keep: float = option(1.0, "Weight of the KL to the base on plain text; 0 turns it off.")
    tune_operators: tuple[str, ...] = option(("add", "sub", "mul"), "Operators that are trained.")
    digits: int = option(2, "Most digits of an operand.")
    precision: str = option("auto", "float32, bfloat16, or auto: bfloat16 where it is fast.")
    seed: int = option(0, "Seed of every random choice.")


@dataclass(frozen=True)
class EvaluateConfig:
    """Exact match on held-out problems, and what tuning did to plain English."""

    problems: int = option(300, "Held-out problems.")
    retention: str | None = option(
        None, "Text file for perplexity and KL; by default the one that ships."
    )
    seed: int = option(0, "Seed of every random choice.")


def overrides(config_class: type, values: dict[str, Any]) -> Any:
    """Build a stage's config from loose values, lists made tuples.

    Raises:
        UserError: a name is unknown or a value has the wrong type.
    """
    known = {item.name: item for item in fields(config_class)}
    for name, value in values.items():
        if name not in known:
            raise UserError(
                f"An option must be one of {', '.join(known)}, found {name!r}; correct the name."
            )
        kind = known[name].type
        wanted = type(known[name].default)
        if isinstance(known[name].default, tuple):
            values[name] = tuple(value) if isinstance(value, list | tuple) else (value,)
        elif value is not None and wanted is not type(None) and not isinstance(value, wanted):
            if wanted is float and isinstance(value, int):
                values[name] = float(value)
            else:
                raise UserError(f"{name} must be of type {kind}, found {value!r}; correct it.")
    return config_class(**values)
