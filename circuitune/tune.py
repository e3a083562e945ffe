"""The stage that tunes: chosen parts of the model, and controls on the same data.

A method is what is trainable (`circuitune.methods`); data, loss and loop are the same for all.
Each variant is kept as soon as it is trained, and a stage that was killed goes on with the last
checkpoint of the variant that it was at.
"""

import copy
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from circuitune import methods, ranks
from circuitune.answering import exact_match
from circuitune.config import TuneConfig
from circuitune.deltas import COMPONENTS, load_delta, save_tensors
from circuitune.errors import UserError
from circuitune.examples import (
    Example,
    arithmetic_example,
    digest,
    overlap,
    preview,
    text_examples,
    to_examples,
)
from circuitune.exercises import exercises
from circuitune.methods import Method
from circuitune.models import Model
from circuitune.pairs import PairSet
from circuitune.picking import pick_heads, pick_mlps
from circuitune.plan import Workload, plan
from circuitune.prefix import TEXT_TOKENS, own_text, text_rows, training_text
from circuitune.problems import Problem, completion
from circuitune.rates import own_rate
from circuitune.retention import base_text, drift_now
from circuitune.runs import STAGES, lasting, write_json
from circuitune.slices import Form, collateral, head_gains
from circuitune.supervised import TEXT_ROWS, LoopConfig, training_set
from circuitune.texts import read_training_data
from circuitune.training import Monitor, Outcome, train
from circuitune.writing import Writing

# Paragraphs that watch the forget budget while training; the anchor does not see them.
WATCHED_TEXTS = 20


@dataclass(frozen=True)
class Lessons:
    """What is trained on, the same for every method.

    Attributes:
        examples: the texts.
        watch: problems that are answered while training.
        writing: how the run writes problems.
        facts: where the texts come from, counts, and their digest.
        rows: token ids of plain text on which the model is held to the base.
    """

    examples: list[Example]
    watch: list[Problem]
    writing: Writing
    facts: dict[str, Any]
    rows: list[list[int]] = field(default_factory=list)


def tune(model: Model, config: TuneConfig, run: Path, work: Path) -> None:
    """The stage: train every method on the same data; writes ``tuned/`` and ``tune.json``.

    The first method's delta lies in ``tuned/``, the others in folders of their names below it.
    Several processes share each batch; what they must agree on is decided by the first one, which
    alone writes.

    Raises:
        UserError: the weights cannot be tuned, an option or the data are unusable, the loss became
            NaN, or the disk is full. Then the run is as it was.
    """
    _check(model, config)
    lessons = lessons_for(model, PairSet.load(run), config)
    if config.data and ranks.rank() == 0:
        tqdm.write(lessons.facts["said"], file=sys.stderr)
    trained = in_precision(model, training_precision(model, config.precision))
    heads = ranks.first(
        lambda: pick_heads(trained, run, config.heads, rule=config.pick, examples=lessons.examples)
    )
    mlps = pick_mlps(run, config.mlps)
    kept = ranks.first(lambda: lasting(run, STAGES["tune"], config))
    rows = ranks.first(lambda: anchor_rows(trained, config, kept / "anchor.json"))
    lessons = replace(lessons, rows=rows)
    variants: dict[str, Any] = {}
    for place, name in enumerate(config.methods):
        rng = np.random.default_rng(config.seed)
        method = methods.build(name, model, heads, mlps, config.form, rng)
        folder = kept / name
        if not ranks.first((folder / COMPONENTS).is_file):
            folder.mkdir(exist_ok=True)
            save_variant(model, trained, method, lessons, config, folder)
        target = work / "tuned" / name if place else work / "tuned"
        # Read by the first process alone: when it is done with the last one, the folder goes.
        variants[name] = ranks.first(partial(_collect, folder, target))
    content = {
        "variants": variants,
        "rule": f"Heads picked by: {config.pick}.",
        "data": lessons.facts,
        "precision": str(trained.dtype).removeprefix("torch."),
    }
    write_json(work / "tune.json", content)


def _collect(folder: Path, target: Path) -> dict[str, Any]:
    """Take over what a variant leaves: its delta, record and logs, no checkpoints; its facts."""
    facts = load_delta(folder).facts
    target.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_file() and not path.name.startswith("."):
            try:
                os.link(path, target / path.name)  # a delta of all parameters is large
            except OSError:
                shutil.copy2(path, target / path.name)
    if (folder / "tensorboard").is_dir():
        shutil.copytree(folder / "tensorboard", target / "tensorboard", dirs_exist_ok=True)
    return facts


def _check(model: Model, config: TuneConfig) -> None:
    if model.offloaded or model.quantised:
        raise UserError(
            f"Tuning needs all weights in memory as plain numbers, those of {model.source} are "
            f"{'quantised' if model.quantised else 'read when they are used'}; start the run with "
            "an unquantised checkpoint and without --max-memory."
        )
    known = list(methods.METHODS)
    if not set(config.methods) <= set(known) or len(set(config.methods)) < len(config.methods):
        raise UserError(
            f"--methods must be some of {', '.join(known)}, each once, found "
            f"{', '.join(config.methods)}; correct it."
        )
    if model.device.type == "cuda" and model.device.index and ranks.world() == 1:
        raise UserError(
            f"Tuning runs on the first GPU that it sees, the run is on {model.device}; set "
            f"CUDA_VISIBLE_DEVICES={model.device.index} and start with --device cuda."
        )
    if config.form not in get_args(Form):
        raise UserError(
            f"--form must be {' or '.join(get_args(Form))}, found {config.form!r}; use one of them."
        )
    if config.replay >= 1:
        raise UserError(f"--replay must be below 1, found {config.replay}; choose a smaller share.")
    stops = config.forget_budget or config.patience
    if stops and not config.evaluate_every:
        raise UserError(
            "--forget-budget and --patience need evaluations while training, found "
            "--evaluate-every 0; give a number of steps."
        )


# ------------------------------------------------------------------------------------- the data


def lessons_for(model: Model, pair_set: PairSet, config: TuneConfig) -> Lessons:
    """Training texts of a run: generated arithmetic or a file, and plain text for replay.

    Raises:
        UserError: the data are unusable.
    """
    selection = pair_set.selection
    writing = Writing(selection["prefix"], selection["spaced_answer"])
    drawn = exercises(
        pair_set,
        config.tune_operators,
        digits=config.digits,
        n=0 if config.data else config.steps * config.batch_size,
        seed=config.seed,
        watch=config.evaluate_every > 0,
    )
    longest = min(config.max_tokens, model.context or config.max_tokens)
    if config.data:
        texts = read_training_data(config.data, seed=config.seed)
        encoded = to_examples(model.tokenizer, texts, max_tokens=longest)
        known, warning = contamination(texts.questions, drawn.test, writing)
        said = f"{texts.announcement} {encoded.summary} {warning}"
        examples = list(encoded.examples)
        facts = {"source": config.data, "said": said, "overlap": known} | encoded.facts
    else:
        examples = [arithmetic_example(model.tokenizer, p, writing) for p in drawn.train]
        facts = {"source": "generated arithmetic", "said": "Generated arithmetic."}
    if config.replay:
        count = round(len(examples) * config.replay / (1 - config.replay))
        plain = text_examples(model.tokenizer, training_text(), max_tokens=longest)
        examples += [plain[place % len(plain)] for place in range(count)]
        facts["replayed"] = count
    return Lessons(
        examples, drawn.watch, writing, facts | {"texts": len(examples), "digest": digest(examples)}
    )


def contamination(
    questions: Sequence[str], held_out: Sequence[Problem], writing: Writing
) -> tuple[dict[str, int], str]:
    """How many training texts are problems that evaluation asks, and one sentence about it.

    A problem may stand there as an expression, with the equals sign, as it is asked, or with its
    answer; see `circuitune.examples.overlap` for what is the same. In other words it is not found.

    Args:
        questions: the problem of each training text.
        held_out: all problems that `circuitune evaluate` may ask.
        writing: how it asks them.

    Returns:
        ``exact``, ``normalised`` and ``contained``, training texts that are such problems, each
        counted once; ``problems``, how many of them they are; ``held_out``, how many there are.
    """
    spelled = [(str(item), text) for item in held_out for text in _spellings(item, writing)]
    found = overlap(questions, [text for _, text in spelled])
    kinds: dict[int, str] = {}
    for kind in ("contained", "normalised", "exact"):  # the last one stays
        kinds |= {item.train: kind for item in found if item.kind == kind}
    counts = {
        kind: list(kinds.values()).count(kind) for kind in ("exact", "normalised", "contained")
    }
    problems, asked = {spelled[item.test][0] for item in found}, len(set(map(str, held_out)))
    facts = counts | {"problems": len(problems), "held_out": asked}
    if not found:
        return facts, f"None of the {asked} problems that evaluation may ask is among them."
    told = ", ".join(f"{number} {kind}" for kind, number in counts.items() if number)
    return facts, (
        f"{len(kinds)} training texts ({told}) are {len(problems)} of the {asked} problems that "
        "evaluation may ask: leave them out, or do not trust its gain on arithmetic."
    )


def _spellings(problem: Problem, writing: Writing) -> list[str]:
    """The ways in which an arithmetic problem may stand in a file."""
    prompt, answer = completion(problem)
    bare = {str(problem), prompt.rstrip(" =")}  # a product has two signs
    spelled = [f"{text}{end}" for text in sorted(bare) for end in ("", " =", f" = {answer}")]
    return [*spelled, writing.write(prompt, answer)[0].strip()]


def anchor_rows(model: Model, config: TuneConfig, path: Path) -> list[list[int]]:
    """Plain text on which every method is held to the base; none without ``--keep``.

    It is kept in a file: what the model writes itself depends on the number of threads, and a
    killed stage must go on with the same text.
    """
    if not config.keep:
        return []
    if not path.is_file():
        paragraphs = training_text()[WATCHED_TEXTS if config.evaluate_every else 0 :]
        write_json(path, text_rows(model, paragraphs, own_text(model, seed=config.seed)))
    return json.loads(path.read_text(encoding="utf-8"))


def in_precision(model: Model, dtype: torch.dtype) -> Model:
    """The model itself, or a copy in another dtype."""
    if model.dtype == dtype:
        return model
    # Cast one by one, so that there is no second copy of all in the first dtype.
    cast = {id(p): nn.Parameter(p.to(dtype), requires_grad=False) for p in model.hf.parameters()}
    twin = copy.deepcopy(model.hf, cast)
    if model.device.type == "cpu":
        # torch's fused attention has a slow bfloat16 backward pass on CPUs (3x the whole step).
        twin.set_attn_implementation("eager")
    return replace(model, hf=twin)


def training_precision(model: Model, wanted: str) -> torch.dtype:
    """The dtype of the frozen base while training; ``auto`` takes bfloat16 where it is fast.

    Raises:
        UserError: the name is not float32, bfloat16 or auto.
    """
    if wanted == "auto":
        if model.device.type == "cuda":
            fast = torch.cuda.is_bf16_supported()
        else:
            # Private probes, and absent from some builds: without them, stay with float32.
            probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
            fast = any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
        return torch.bfloat16 if fast else torch.float32
    if wanted not in ("float32", "bfloat16"):
        raise UserError(f"precision must be float32, bfloat16 or auto, found {wanted!r}.")
    return getattr(torch, wanted)


def outlook(model: Model, config: TuneConfig, run: Path) -> list[Any]:
    """What `tune` would do: the data, one text with its supervised tokens marked, and the cost.

    Returns:
        lines for the terminal, plain or rich text.

    Raises:
        UserError: as `tune`, before anything is trained.
    """
    _check(model, config)
    lessons = lessons_for(model, PairSet.load(run), config)
    dtype = training_precision(model, config.precision)
    heads = pick_heads(model, run, config.heads, rule=config.pick, examples=lessons.examples)
    sizes = [len(example.tokens) - 1 for example in lessons.examples]
    supervised = float(np.mean([example.supervised for example in lessons.examples]))
    work = Workload(
        tokens=round(float(np.mean(sizes)) * config.batch_size),
        supervised=round(supervised * config.batch_size),
        length=round(float(np.mean(sizes))),
        steps=config.steps,
        anchor_tokens=TEXT_ROWS * TEXT_TOKENS if config.keep else 0,
        pieces=config.accumulate,
        stored=sum(sizes),
        checkpointing=config.checkpointing,
    )
    lines = [lessons.facts["said"], preview(model.tokenizer, lessons.examples[0])]
    for name in config.methods:
        rng = np.random.default_rng(config.seed)
        mlps = pick_mlps(run, config.mlps)
        method = methods.build(name, model, heads, mlps, config.form, rng)
        cached = config.cache and method.prefix and method.lowest > 0
        parts = ", ".join(map(str, (*method.heads, *method.mlps)))
        lines += ["", *plan(model, method, work, cached=cached, dtype=dtype).lines()]
        lines += [f"learning rate: {loop_config(model, config, name).learning_rate:g} at its peak"]
        lines += [f"components: {parts}"] if parts else []
    return lines


# ---------------------------------------------------------------------------------- one variant


def save_variant(
    model: Model,
    trained: Model,
    method: Method,
    lessons: Lessons,
    config: TuneConfig,
    folder: Path,
) -> None:
    """Train a method and write its delta.

    Args:
        model: the base, whose tensors the delta's record names.
        trained: the same in the precision of training.
        method: what is trainable.
        lessons: the data.
        config: options.
        folder: where checkpoints, log and delta are written.
    """
    loop = loop_config(model, config, method.name)
    outcome, tensors = train_method(trained, method, lessons, loop, config, folder)
    if not all(torch.isfinite(value).all() for value in tensors.values()):
        raise UserError(
            f"Training must keep the loss finite, it did not (last losses {outcome.losses[-3:]}); "
            "lower --learning-rate."
        )
    facts = describe(model, method, outcome, config)
    facts["parameters"] = count = sum(value.numel() for value in tensors.values())
    facts["share"] = count / model.parameters
    facts |= {"lr": loop.learning_rate, "data": lessons.facts}
    ranks.first(lambda: save_tensors(folder, model, tensors, facts))


def loop_config(model: Model, config: TuneConfig, method: str) -> LoopConfig:
    """Options of the loop for a method; its own learning rate where none is given."""
    return LoopConfig(
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate or own_rate(model, method),
        in_place=config.mlp_rate if method in ("precise", "random") else 1.0,
        accumulate=config.accumulate,
        weight_decay=config.weight_decay,
        keep=config.keep,
        seed=config.seed,
        save_every=config.save_every,
        checkpointing=config.checkpointing,
        tensorboard=config.tensorboard,
    )


def train_method(
    trained: Model,
    method: Method,
    lessons: Lessons,
    loop: LoopConfig,
    config: TuneConfig,
    folder: Path,
) -> tuple[Outcome, dict[str, Tensor]]:
    """Train what a method makes trainable; gives the outcome and the delta's tensors by key."""
    data = training_set(
        trained,
        lessons.examples,
        method.lowest,
        prefix=method.prefix,
        cache=folder.parent / "prefix" if config.cache else None,
        rows=lessons.rows,
    )
    watched = monitor(trained, method, lessons, config)
    gains = head_gains(trained, method.parts) if config.head_scale else None
    with methods.attached(trained, method, gains) as live:
        parts = [part.key(trained) for part in method.parts] or live.names
        facts = {"method": method.name, "parts": parts}
        outcome = train(trained, live.parameters, data, loop, folder, facts=facts, monitor=watched)
        return outcome, live.tensors()


def monitor(trained: Model, method: Method, lessons: Lessons, config: TuneConfig) -> Monitor | None:
    """What is measured while training: right answers, and the KL to the base on plain text."""
    if not config.evaluate_every:
        return None
    text = base_text(
        trained,
        training_text()[:WATCHED_TEXTS],
        layer=method.lowest if method.prefix else 0,
        copy_head=not method.prefix,
    )

    def measured(_: int) -> dict[str, float]:
        hits = exact_match(trained, lessons.watch, lessons.writing)
        tokens, _loss, kl = drift_now(trained, text, anew=not method.prefix).sum(axis=0)
        return {"exact": float(hits.mean()), "kl": float(kl / tokens)}

    return Monitor(
        evaluate=measured,
        every=config.evaluate_every,
        budget=config.forget_budget or None,
        patience=config.patience,
    )


def describe(model: Model, method: Method, outcome: Outcome, config: TuneConfig) -> dict[str, Any]:
    """Facts of one variant for ``tune.json`` and ``components.json``."""
    shares = config.form == "qkvo" and method.heads and method.lora is None
    shared = collateral(model, method.heads) if shares else ()
    return {
        "method": method.name,
        "components": [str(part) for part in (*method.heads, *method.mlps)],
        "collateral": [str(head) for head in shared],
        "steps": outcome.steps,
        "kept_step": outcome.kept,
        "stopped": outcome.stopped,
        "seconds": round(outcome.seconds, 1),
        "tokens_per_second": round(outcome.tokens / outcome.seconds, 1),
        "lowest_layer": method.lowest,
        "loss_first": float(np.mean(outcome.losses[:5])),
        "loss_last": float(np.mean(outcome.losses[-5:])),
        "evaluations": outcome.evaluations,
        "options": asdict(config),
    }
