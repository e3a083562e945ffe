"""Tune slices of chosen heads, and nothing else; the same on random heads as a control.

One training path for every method: a method is a list of slices. The deltas are fp32 parameters
over a frozen base; backward stops at the lowest tuned layer; the hidden states that enter it are
computed once per problem; logits exist at supervised positions only. The loop is the Hugging Face
Trainer's.
"""

import copy
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from circuitune.components import Circuit, Component, Head
from circuitune.config import TuneConfig
from circuitune.effects import EffectTable
from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.pairs import PairSet, Writing, encode_text, pad, shipped_paragraphs
from circuitune.patching import unembed
from circuitune.problems import Operator, Problem, completion, sample_problems
from circuitune.prompts import pad_left
from circuitune.runs import read_circuit, write_json
from circuitune.sites import resume, states_entering
from circuitune.slices import Slice, attached, head_slices, save_delta, trainable
from circuitune.validate import matched_heads

PREFIX_BATCH = 64
# Test problems are drawn first; training never holds an operand pair of any of them.
TEST_RESERVE = 600
TEXT_TOKENS = 40  # length of a row of plain text
TEXT_ROWS = 3  # rows of plain text per step
OWN_TEXTS = 4  # texts that the base writes after each opening
IGNORED = -100  # label of positions without a loss, the convention of torch's cross entropy


@dataclass(frozen=True)
class Example:
    """One training text: its tokens and, from ``start`` on, the tokens that are supervised."""

    tokens: list[int]
    start: int


@dataclass(frozen=True)
class Outcome:
    """What one training run gave."""

    deltas: dict[Slice, Tensor]
    seconds: float
    tokens: int
    losses: list[float]


def held_out_problems(
    pair_set: PairSet, operators: Sequence[str], *, digits: int, n: int, seed: int
) -> list[Problem]:
    """Test problems: their one-digit operand pairs lie in the held-out half of the run."""
    from_file = set(pair_set.selection["select_groups"])
    chosen = [Operator.parse(text) for text in operators]
    return sample_problems(chosen, digits=digits, n=n, seed=seed + 1, exclude=from_file)


def training_problems(
    pair_set: PairSet, test: Sequence[Problem], config: TuneConfig
) -> list[Problem]:
    """Training problems: no operand pair of the test problems or of the run's held-out half."""
    kept_out = set(pair_set.selection["held_out_groups"]) | {problem.group for problem in test}
    operators = [Operator.parse(text) for text in config.tune_operators]
    return sample_problems(
        operators,
        digits=config.digits,
        n=config.steps * config.batch_size,
        seed=config.seed + 2,
        exclude=kept_out,
    )


def to_example(model: Model, problem: Problem, writing: Writing) -> Example:
    """Prompt, answer and a line break, which tells the model to stop; loss on the last two."""
    prompt, answer = writing.write(*completion(problem))
    whole = encode_text(model.tokenizer, prompt + answer + "\n")
    start = len(encode_text(model.tokenizer, prompt))
    if whole[:start] != encode_text(model.tokenizer, prompt):
        raise UserError(
            f"A prompt must keep its tokens when the answer follows, {prompt!r} does not; use a "
            "tokenizer that writes numbers digit by digit."
        )
    return Example(whole, start)


class Supervised(nn.Module):
    """The model from a layer upwards with its training loss, as the Trainer wants it."""

    def __init__(self, model: Model, layer: int, keep: float) -> None:
        """Keep the model out of the parameter list except for what is trainable.

        Args:
            model: the model with deltas attached.
            layer: the lowest tuned layer; inputs are the hidden states that enter it.
            keep: weight of the KL to the base on plain text, 0 for none.
        """
        super().__init__()
        self.deltas = nn.ParameterList(trainable(model))
        self._model = (model,)  # in a tuple: the frozen base is not this module's state
        self._layer = layer
        self._keep = keep

    def forward(
        self,
        input_ids: Int[Tensor, "batch token"],
        labels: Int[Tensor, "batch token"],
        hidden: Float[Tensor, "batch token d_model"],
        text_ids: Int[Tensor, "text text_token"],
        text_hidden: Float[Tensor, "text text_token d_model"],
        text_final: Float[Tensor, "text text_token d_model"],
    ) -> dict[str, Tensor]:
        """Cross entropy of the answers plus the weighted KL to the base, nats per token."""
        (model,) = self._model
        chosen = labels != IGNORED
        states = self._final_states(input_ids, hidden)
        loss = nn.functional.cross_entropy(unembed(model, states[chosen]), labels[chosen])
        if self._keep:
            now = unembed(model, self._final_states(text_ids, text_hidden)).log_softmax(dim=-1)
            base = unembed(model, text_final).log_softmax(dim=-1)
            loss = loss + self._keep * (base.exp() * (base - now)).sum(dim=-1).mean()
        return {"loss": loss}

    def _final_states(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        (model,) = self._model
        with resume(model, self._layer, hidden):
            return model.hf.base_model(input_ids=tokens, use_cache=False).last_hidden_state


@dataclass(frozen=True)
class PlainText:
    """Plain text on which the tuned model is held to the base (never the text of evaluation).

    Attributes:
        tokens: token ids, all rows of one length.
        hidden: hidden states that enter the lowest tuned layer.
        final: final hidden states of the base.
    """

    tokens: Int[Tensor, "text text_token"]
    hidden: Float[Tensor, "text text_token d_model"]
    final: Float[Tensor, "text text_token d_model"]


# Openings for text that the base writes itself: numbers that are no sums, which tuning on sums
# would otherwise pull towards answers, and which the shipped paragraphs do not hold.
OPENINGS = (
    "In 19",
    "The population was ",
    "Born on 3 ",
    "The album sold ",
    "Chapter 2",
    "The final score was 3",
    "It was built in 18",
    "The road is ",
    "Add 2 cups of ",
    "Version 1.",
    "The first of 12 ",
    "At 7:",
    "Price: $",
    "The team won ",
    "On page 4",
    "Between 20",
)


@torch.no_grad()
def own_text(model: Model, *, seed: int) -> list[list[int]]:
    """Rows of `TEXT_TOKENS` tokens that the model writes after each of `OPENINGS`, sampled."""
    settings = GenerationConfig(
        max_new_tokens=TEXT_TOKENS,
        min_new_tokens=TEXT_TOKENS,
        do_sample=True,
        top_k=0,
        num_return_sequences=OWN_TEXTS,
        pad_token_id=model.tokenizer.eos_token_id or 0,
        eos_token_id=model.tokenizer.eos_token_id,
    )
    rows: list[list[int]] = []
    with torch.random.fork_rng(devices=[] if model.device.type == "cpu" else [model.device]):
        torch.manual_seed(seed)
        tokens, mask = pad_left([encode_text(model.tokenizer, text) for text in OPENINGS])
        written = model.hf.generate(
            tokens.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
        )
    padding = (mask == 0).sum(dim=1).repeat_interleave(OWN_TEXTS).tolist()
    for row, skip in zip(written.tolist(), padding, strict=True):
        rows.append(row[skip : skip + TEXT_TOKENS])
    return rows


@torch.no_grad()
def plain_text(
    model: Model, paragraphs: Sequence[str], layer: int, own: Sequence[list[int]] = ()
) -> PlainText:
    """Run the base over paragraphs of at least `TEXT_TOKENS` tokens, and over its own text."""
    rows = [encode_text(model.tokenizer, text)[:TEXT_TOKENS] for text in paragraphs]
    rows = [row for pair in zip_longest(rows, own) for row in pair if row]
    tokens = torch.tensor([row for row in rows if len(row) == TEXT_TOKENS], device=model.device)
    hidden = states_entering(model, layer, tokens)
    with resume(model, layer, hidden):
        final = model.hf.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    return PlainText(tokens, hidden, final)


@torch.no_grad()
def prefix_states(
    model: Model, examples: Sequence[Example], layer: int
) -> list[Float[Tensor, "token d_model"]]:
    """Hidden states that enter ``layer`` for each example; exact, since below nothing trains."""
    entering: list[Tensor] = [torch.empty(0)] * len(examples)
    order = sorted(range(len(examples)), key=lambda place: len(examples[place].tokens))
    for first in range(0, len(order), PREFIX_BATCH):
        places = order[first : first + PREFIX_BATCH]
        tokens = pad([examples[place].tokens[:-1] for place in places], 0).to(model.device)
        hidden = states_entering(model, layer, tokens)
        for row, place in enumerate(places):
            entering[place] = hidden[row, : len(examples[place].tokens) - 1].clone()
    return entering


def collate(items: Sequence[dict[str, Any]], text: PlainText) -> dict[str, Tensor]:
    """A batch for `Supervised`: inputs, next-token labels, hidden states, and plain text.

    The text rows are a function of the batch's first items, so a run can be repeated exactly.
    """
    examples: list[Example] = [item["example"] for item in items]
    labels = [
        [IGNORED] * (example.start - 1) + example.tokens[example.start :] for example in examples
    ]
    rows = [item["place"] % len(text.tokens) for item in items[:TEXT_ROWS]]
    return {
        "text_ids": text.tokens[rows],
        "text_hidden": text.hidden[rows],
        "text_final": text.final[rows],
        "input_ids": pad([example.tokens[:-1] for example in examples], 0),
        "labels": pad(labels, IGNORED),
        "hidden": nn.utils.rnn.pad_sequence([item["hidden"] for item in items], batch_first=True),
    }


class LossLog(TrainerCallback):
    """Write every logged step as a line of JSON and keep the losses."""

    def __init__(self, path: Path) -> None:
        """Log to ``path``."""
        self.path = path
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Called by the Trainer."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


@dataclass(frozen=True)
class TrainingSet:
    """Everything that enters the lowest tuned layer, computed once; shared by all variants."""

    layer: int
    items: list[dict[str, Any]]
    text: PlainText
    tokens: int


def training_set(
    model: Model, examples: Sequence[Example], layer: int, *, seed: int = 0
) -> TrainingSet:
    """Run the frozen layers below ``layer`` over the examples and the plain text."""
    entering = prefix_states(model, examples, layer)
    items = [
        {"example": example, "hidden": entering[place], "place": place}
        for place, example in enumerate(examples)
    ]
    tokens = sum(len(example.tokens) - 1 for example in examples)
    text = plain_text(model, training_text(), layer, own_text(model, seed=seed))
    return TrainingSet(layer, items, text, tokens)


def train(
    model: Model, parts: Sequence[Slice], data: TrainingSet, config: TuneConfig, work: Path
) -> Outcome:
    """Train deltas for the given slices.

    Args:
        model: the model in its training precision; left exactly as it was.
        parts: what is trainable, at or above the layer of ``data``.
        data: what enters that layer.
        config: options.
        work: folder for the Trainer's files and ``log.jsonl``.

    Raises:
        UserError: the loss became NaN or infinite.
    """
    started = time.monotonic()
    log = LossLog(work / "log.jsonl")
    with attached(model, parts) as views:
        trainer = Trainer(
            model=Supervised(model, data.layer, config.keep),
            args=training_arguments(model, config, work),
            train_dataset=data.items,
            data_collator=partial(collate, text=data.text),
            callbacks=[log],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        deltas = {part: view.detach().clone() for part, view in views.items()}
    if not all(torch.isfinite(value).all() for value in deltas.values()):
        raise UserError(
            f"Training must keep the loss finite, it did not (last losses {log.losses[-3:]}); "
            "lower --learning-rate."
        )
    return Outcome(deltas, time.monotonic() - started, data.tokens, log.losses)


def training_text() -> list[str]:
    """The half of the shipped paragraphs that training may see; evaluation uses the other."""
    return shipped_paragraphs()[0::2]


def training_arguments(model: Model, config: TuneConfig, work: Path) -> TrainingArguments:
    """The Trainer's settings: AdamW, linear decay after a short warm-up, no checkpoints."""
    return TrainingArguments(
        output_dir=str(work / "trainer"),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=max(1, config.steps // 20),
        lr_scheduler_type="linear",
        logging_steps=max(1, config.steps // 20),
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        use_cpu=model.device.type == "cpu",
        seed=config.seed,
        data_seed=config.seed,
        disable_tqdm=not sys.stderr.isatty(),
        dataloader_pin_memory=False,
    )


def training_precision(model: Model, wanted: str) -> torch.dtype:
    """The dtype of the frozen base while training; ``auto`` takes bfloat16 where it is fast.

    Raises:
        UserError: the name is not float32, bfloat16 or auto.
    """
    if wanted == "auto":
        if model.device.type == "cuda":
            fast = torch.cuda.is_bf16_supported()
        else:
            # A private probe, and absent from some builds: without it, stay with float32.
            fast = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
        return torch.bfloat16 if fast else torch.float32
    if wanted not in ("float32", "bfloat16"):
        raise UserError(f"precision must be float32, bfloat16 or auto, found {wanted!r}.")
    return getattr(torch, wanted)


def choose_heads(circuit: Circuit, effects: EffectTable, count: int) -> tuple[Head, ...]:
    """The heads to tune: the strongest direct effects of the single sweep, by logit difference.

    ``docs/log.md`` holds the comparison with the iterated knockout set and with random heads.
    """
    ranked = [part for part in effects.rank("logit_diff") if isinstance(part, Head)]
    if len(ranked) < count:
        raise UserError(f"--heads must be at most {len(ranked)}, found {count}; choose fewer.")
    return tuple(ranked[:count])


def tune(model: Model, config: TuneConfig, run: Path, work: Path) -> None:
    """The stage: train chosen and random heads on the same data, write ``tuned/``, ``tune.json``.

    The random heads are matched by layer, so both runs cost the same per step.
    """
    if model.offloaded or model.quantised:
        raise UserError(
            f"Tuning needs all weights in memory as plain numbers, those of {model.source} are "
            f"{'quantised' if model.quantised else 'read when they are used'}; start the run with "
            "an unquantised checkpoint and without --max-memory."
        )
    pair_set = PairSet.load(run)
    selection = pair_set.selection
    writing = Writing(selection["prefix"], selection["spaced_answer"])
    test = held_out_problems(
        pair_set, config.tune_operators, digits=config.digits, n=TEST_RESERVE, seed=config.seed
    )
    problems = training_problems(pair_set, test, config)
    random.Random(config.seed).shuffle(problems)
    examples = [to_example(model, problem, writing) for problem in problems]
    _, circuit = read_circuit(run)
    chosen = choose_heads(circuit, EffectTable.load(run / "effects.parquet"), config.heads)
    rng = np.random.default_rng(config.seed)
    methods = {"precise": chosen, "random": matched_heads(chosen, model.heads, rng)}
    precision = training_precision(model, config.precision)
    trained = in_precision(model, precision)
    variants = {}
    data = training_set(trained, examples, min(head.layer for head in chosen), seed=config.seed)
    (work / "tuned").mkdir()
    for name, heads in methods.items():
        folder = work / "tuned" if name == "precise" else work / "tuned" / name
        folder.mkdir(exist_ok=True)
        parts = head_slices(model, heads)
        outcome = train(trained, parts, data, config, work)
        facts = describe(model, name, heads, outcome, config)
        save_delta(folder, model, outcome.deltas, facts)
        (work / "log.jsonl").rename(folder / "log.jsonl")
        variants[name] = facts
    rule = "Heads: the strongest direct effects on the first task, one sweep, by logit difference."
    content = {"variants": variants, "rule": rule, "precision": str(precision).split(".")[-1]}
    write_json(work / "tune.json", content)


def in_precision(model: Model, dtype: torch.dtype) -> Model:
    """The model itself, or a copy in another dtype."""
    if next(model.hf.parameters()).dtype == dtype:
        return model
    twin = copy.deepcopy(model.hf).to(dtype)
    if model.device.type == "cpu":
        # torch's fused attention has a slow bfloat16 backward pass on CPUs (3x the whole step).
        twin.set_attn_implementation("eager")
    return replace(model, hf=twin)


def describe(
    model: Model, method: str, heads: Sequence[Component], outcome: Outcome, config: TuneConfig
) -> dict[str, Any]:
    """Facts of one variant for ``tune.json`` and ``components.json``."""
    count = sum(value.numel() for value in outcome.deltas.values())
    return {
        "method": method,
        "components": [str(head) for head in heads],
        "parameters": count,
        "share": count / model.parameters,
        "steps": config.steps,
        "lr": config.learning_rate,
        "seconds": round(outcome.seconds, 1),
        "tokens_per_second": round(outcome.tokens / outcome.seconds, 1),
        "lowest_layer": min(head.layer for head in heads),
        "loss_first": outcome.losses[0],
        "loss_last": outcome.losses[-1],
        "options": asdict(config),
    }
