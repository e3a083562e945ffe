"""One training loop for every method, on the Hugging Face Trainer.

The Trainer sees the trained parameters alone, so optimiser, checkpoints and all-reduce hold
nothing else; what a step computes is in `circuitune.supervised`. A run that was killed goes on
from its last checkpoint, and ends bit by bit as if it had not been.

Weight decay is decoupled (Loshchilov and Hutter 2019) and pulls towards the values at the start:
towards zero for a delta, towards the base's weights for parameters that train in place (L2-SP, Li
et al. 2018).

Files of a run: ``log.jsonl`` (a line per step), ``checkpoint-N`` (the last one alone), and, if it
is wished for, ``tensorboard``.
"""

import hashlib
import importlib.util
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from circuitune import ranks
from circuitune.errors import UserError
from circuitune.examples import IGNORED
from circuitune.memory import used
from circuitune.models import Model
from circuitune.runs import digest, write_json
from circuitune.supervised import Course, LoopConfig, Supervised, TrainingSet, collate

LOG, RECORD, WATCH, KEPT = "log.jsonl", "record.json", "watch.json", "kept.safetensors"
PARTIAL = ".partial"  # a checkpoint while it is written
# Options that change how a run goes, not what it gives; a resumed run may have others.
FREE = ("save_every", "checkpointing", "tensorboard")
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class Monitor:
    """What is measured while training, and when training stops for it.

    Attributes:
        evaluate: gives values by name for the model as it is after a step; it runs on the first
            process, without gradients.
        every: steps between evaluations; the last step is always evaluated.
        budget: the most that the value ``kl`` may be, nats per token. Training stops when it is
            passed, and the last evaluated state within the budget is put back.
        patience: training stops when ``watch`` has not risen in so many evaluations, and the best
            state (within the budget) is put back, also at the end of all steps; 0 for never.
        watch: the value that should rise.
    """

    evaluate: Callable[[int], dict[str, float]]
    every: int
    budget: float | None = None
    patience: int = 0
    watch: str = "exact"


@dataclass(frozen=True)
class Outcome:
    """What one training run gave; the trained values are in the parameters.

    Attributes:
        losses: of every step, nats per supervised token, the weighted KL included.
        steps: how many steps ran.
        kept: the step whose values are in the parameters; 0 for those at the start.
        stopped: why training ended.
        seconds: of all steps, those of earlier processes that were killed included.
        tokens: tokens that were trained on, without padding; a text counts each time.
        evaluations: values of each evaluation, and its ``step``.
    """

    losses: list[float]
    steps: int
    kept: int
    stopped: Literal["steps", "budget", "patience"]
    seconds: float
    tokens: int
    evaluations: list[dict[str, Any]]


class _Journal(TrainerCallback):
    """Writes a line of JSON per step, moves the progress bar, and stops what has exploded."""

    def __init__(self, course: Course, folder: Path, device: torch.device) -> None:
        self.course, self.path, self.device = course, folder / LOG, device
        self.before, self.peak, self.took = 0.0, 0, 0.0
        self.bar: Any = None
        self.board: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Drop lines of steps that are run again, and one that was cut off."""
        self.started = self.mark = time.monotonic()
        lines = self.path.read_text().split("\n") if self.path.exists() else []
        kept = [line for line in lines if line.endswith("}")][: state.global_step]
        self.before = json.loads(kept[-1])["seconds"] if kept else 0.0
        first = ranks.rank() == 0
        self.bar = tqdm(
            desc="tune",
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            disable=None if first else True,
        )
        if first:
            self._sweep()
            self.path.write_text("".join(f"{line}\n" for line in kept))
            if self.course.config.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(self.path.parent / "tensorboard")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Take the time before evaluations."""
        self.took = time.monotonic() - self.mark

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Called after every step, on every process with the same numbers."""
        if "loss" not in logs:  # the summary of the whole run
            return
        step = state.global_step
        if not (math.isfinite(logs["loss"]) and math.isfinite(logs["grad_norm"])):
            raise UserError(
                f"Training must keep loss and gradients finite, step {step} gave loss "
                f"{logs['loss']:.4g} and gradient norm {logs['grad_norm']:.4g}; lower the "
                "learning rate."
            )
        now, cuda = time.monotonic(), self.device.type == "cuda"
        self.peak = max(self.peak, used(self.device))
        line = {name: logs[name] for name in ("loss", "learning_rate", "grad_norm")} | {
            "tokens_per_second": round(self.course.tokens(range(step - 1, step)) / self.took, 1),
            "seconds": round(self.before + now - self.started, 3),
            "memory": torch.cuda.max_memory_allocated(self.device) if cuda else self.peak,
        }
        self.mark = now
        self.bar.update()
        self.bar.set_postfix(loss=line["loss"], tokens=f"{line['tokens_per_second']:.0f}/s")
        if ranks.rank() == 0:
            self._write(json.dumps({"step": step, **line}) + "\n")
        for name, value in line.items() if self.board else ():
            self.board.add_scalar(name, value, step)

    def _write(self, line: str) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise UserError(
                f"The log must be written to {self.path}, that failed ({error.strerror}); free "
                "some room and start again, the last checkpoint is intact."
            ) from error

    def close(self) -> None:
        """Leave the bar and the board, and nothing that is half written."""
        for shown in (self.bar, self.board):
            if shown is not None:
                shown.close()
        if ranks.rank() == 0:
            self._sweep()

    def _sweep(self) -> None:
        """Remove a checkpoint that was being written when a run was killed."""
        shutil.rmtree(self.path.parent / PARTIAL, ignore_errors=True)


class _Decay(TrainerCallback):
    """Pulls parameters towards what they were at the start, before each optimiser step."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.decay, self.parameters = decay, parameters
        self.start = [p.detach().clone() if p.any() else None for p in parameters]

    @torch.no_grad()
    def on_pre_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
        """As AdamW decays, with the learning rate of this step."""
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for parameter, start in zip(self.parameters, self.start, strict=True):
            share = rates[id(parameter)] * self.decay
            if start is None:
                parameter.mul_(1 - share)
            else:
                parameter.lerp_(start, share)


class _Watch(TrainerCallback):
    """Evaluates, decides when to stop, and keeps the state to be put back."""

    def __init__(self, parameters: Sequence[nn.Parameter], monitor: Monitor | None) -> None:
        self.parameters, self.monitor = parameters, monitor
        self.state: dict[str, Any] = {"evaluations": [], "kept": 0, "best": -math.inf, "since": 0}
        self.stopped = "steps"
        keeps = monitor is not None and (monitor.patience or monitor.budget is not None)
        self.kept = self._copied() if keeps else []

    def _copied(self) -> list[Tensor]:
        return [parameter.detach().to("cpu", copy=True) for parameter in self.parameters]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Evaluate where it is due; a stop comes again after a resume, so it is not saved."""
        step, monitor = state.global_step, self.monitor
        if monitor is None or (step % monitor.every and step != state.max_steps):
            return
        devices = {p.device for p in self.parameters if p.device.type != "cpu"}
        with torch.no_grad(), torch.random.fork_rng(devices):
            found = ranks.first(lambda: monitor.evaluate(step))
        values = {name: float(value) for name, value in found.items()}
        self.state["evaluations"].append({"step": step, **values})
        self._judge(step, values, monitor)
        if self.stopped != "steps":
            control.should_training_stop, control.should_save = True, False

    def _judge(self, step: int, values: Mapping[str, float], monitor: Monitor) -> None:
        needed = {monitor.watch} if monitor.patience else set()
        needed |= set() if monitor.budget is None else {"kl"}
        if needed - values.keys():
            raise UserError(
                f"What stops training must be measured, {', '.join(sorted(needed))} of "
                f"{', '.join(sorted(values))}; watch another value."
            )
        if monitor.budget is not None and not values["kl"] <= monitor.budget:
            self.stopped = "budget"
        elif not monitor.patience or values[monitor.watch] > self.state["best"]:
            best = values[monitor.watch] if monitor.patience else self.state["best"]
            self.state |= {"best": best, "since": 0, "kept": step}
            self.kept = self._copied() if self.kept else []
        else:
            self.state["since"] += 1
            if self.state["since"] >= monitor.patience:
                self.stopped = "patience"

    @torch.no_grad()
    def finish(self, step: int) -> int:
        """Put the kept state back if there is a reason to; gives the step it is from."""
        if self.kept and (self.stopped != "steps" or (self.monitor and self.monitor.patience)):
            for parameter, value in zip(self.parameters, self.kept, strict=True):
                parameter.copy_(value)
            return self.state["kept"]
        return step

    def save(self, folder: Path) -> None:
        """Into a checkpoint."""
        write_json(folder / WATCH, self.state)
        save_file({str(number): value for number, value in enumerate(self.kept)}, folder / KEPT)

    def load(self, folder: Path) -> None:
        """From a checkpoint."""
        self.state = json.loads((folder / WATCH).read_text(encoding="utf-8"))
        kept = load_file(folder / KEPT)
        self.kept = [kept[str(number)] for number in range(len(kept))]


class _Loop(Trainer):
    """The Trainer with examples in their given order, and checkpoints that are whole or absent."""

    def __init__(self, folder: Path, record: dict[str, Any], watch: _Watch, **rest: Any) -> None:
        self.folder, self.record, self.watch = folder, record, watch
        self.in_place = record["options"]["in_place"]
        # Known before a checkpoint is loaded: what trains in place does not start at zero.
        self.places = {id(p) for p in watch.parameters if self.in_place != 1 and p.any()}
        super().__init__(**rest)
        self.remove_callback(PrinterCallback)

    def create_optimizer(self, model: Any = None) -> Any:
        """Split off the parameters that train in place, with a learning rate of their own."""
        optimizer = super().create_optimizer(model)
        for group in list(optimizer.param_groups):
            placed = [p for p in group["params"] if id(p) in self.places]
            if placed:
                group["params"] = [p for p in group["params"] if id(p) not in self.places]
                rest = {name: value for name, value in group.items() if name != "params"}
                rate = group["lr"] * self.in_place
                optimizer.add_param_group(rest | {"params": placed, "lr": rate})
        return optimizer

    def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def _get_output_dir(self, *_: Any, **__: Any) -> str:
        return str(self.folder / PARTIAL)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        name = f"checkpoint-{self.state.global_step}"
        work = self.folder / PARTIAL / name
        try:
            super()._save_checkpoint(*args, **kwargs)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.watch.save(work)
                files = {file.name: digest(file) for file in sorted(work.iterdir())}
                write_json(work / RECORD, self.record | {"files": files})
                older = checkpoints(self.folder)
                os.replace(work, self.folder / name)
                for path in older:
                    shutil.rmtree(path, ignore_errors=True)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(work, ignore_errors=True)
            raise UserError(
                f"A checkpoint must be written to {self.folder}, that failed "
                f"({str(error)[:120]}); free some room and start again, the last checkpoint is "
                "intact."
            ) from error


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints of a run, the oldest first."""
    found = folder.glob("checkpoint-*")
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def train(
    model: Model,
    parameters: Sequence[nn.Parameter],
    data: TrainingSet,
    config: LoopConfig,
    folder: Path,
    *,
    facts: Mapping[str, Any] | None = None,
    monitor: Monitor | None = None,
) -> Outcome:
    """Train parameters in place; go on from the last checkpoint in the folder if there is one.

    Args:
        model: the model, frozen but for ``parameters``.
        parameters: what trains, attached to the model and as it is before the first step.
        data: what it trains on.
        config: options.
        folder: for the log and the checkpoints; another run needs another one.
        facts: what else a resumed run must have in common, as JSON values (keys of the slices).
        monitor: what is evaluated, and when that stops training.

    Raises:
        UserError: an option or an example does not fit, the loss became NaN or infinite, the disk
            is full, or the folder holds a checkpoint of another run.
    """
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    arguments = _arguments(model, data, config, folder)
    record = _record(model, parameters, data, config, facts or {})
    watch, course = _Watch(parameters, monitor), Course(data, config)
    journal = _Journal(course, folder, model.device)
    decay = [_Decay(parameters, config.weight_decay)] if config.weight_decay else []
    found = checkpoints(folder)[-1:]
    for path in found:
        _check(path, record)
        watch.load(path)
    trainer = _Loop(
        folder,
        record,
        watch,
        model=Supervised(model, parameters, data, config),
        args=arguments,
        train_dataset=course,
        data_collator=collate,
        callbacks=[journal, *decay, watch],
    )
    with ranks.in_step(), closing(journal):
        trainer.train(resume_from_checkpoint=str(found[0]) if found else None)
    steps = trainer.state.global_step
    return Outcome(
        losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        steps=steps,
        kept=watch.finish(steps),
        stopped=watch.stopped,
        seconds=journal.before + time.monotonic() - began,
        tokens=course.tokens(range(steps)),
        evaluations=watch.state["evaluations"],
    )


def _arguments(
    model: Model, data: TrainingSet, config: LoopConfig, folder: Path
) -> TrainingArguments:
    """The Trainer's settings, after a look at what a user may have got wrong."""
    pieces = config.accumulate * ranks.world()
    if config.batch_size % pieces:
        raise UserError(
            f"A batch must fall into equal pieces, {config.batch_size} examples do not into "
            f"{pieces} (accumulation times processes); choose a multiple of {pieces}."
        )
    if config.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise UserError(
            "A log for TensorBoard needs the package tensorboard, it is not installed; "
            "`pip install tensorboard`, or leave the option out."
        )
    for place, example in enumerate(data.examples):
        if all(label == IGNORED for label in example.labels[1:]):
            raise UserError(
                "Each training text must have a supervised token after its first, number "
                f"{place + 1} has none; leave it out."
            )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size // pieces,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.learning_rate,
        weight_decay=0.0,  # `_Decay` does it
        max_grad_norm=config.max_grad_norm,
        # The first step of a warmup has rate 0: of a single step nothing would come.
        warmup_steps=min(math.ceil(config.warmup * config.steps), config.steps - 1),
        lr_scheduler_type=SCHEDULES[config.schedule],
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 1,
        report_to=[],
        remove_unused_columns=False,
        use_cpu=model.device.type == "cpu",
        seed=config.seed,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
    )
    # Several GPUs in one process would make the Trainer copy the trained parameters to each of
    # them, without the model that they belong to; asking for the device first settles the number.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _record(
    model: Model,
    parameters: Sequence[nn.Parameter],
    data: TrainingSet,
    config: LoopConfig,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """What a checkpoint must agree on with the run that goes on from it, as JSON values."""
    names = {id(parameter): name for name, parameter in model.hf.named_parameters()}
    start = hashlib.sha256()
    for parameter in parameters:
        flat = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        start.update(flat.numpy().data)
    options = {name: value for name, value in asdict(config).items() if name not in FREE}
    record = {
        "trained parameters": [[names.get(id(p), ""), *p.shape] for p in parameters],
        "values at the start": start.hexdigest(),
        "training data": data.digest(),
        "options": options,
        "method": dict(facts),
    }
    return json.loads(json.dumps(record))


def _check(path: Path, record: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that is damaged or of another run.

    Raises:
        UserError: it is.
    """
    try:
        found = json.loads((path / RECORD).read_text(encoding="utf-8"))
        damaged = [name for name, known in found["files"].items() if digest(path / name) != known]
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        found, damaged = {}, [RECORD]
    if damaged:
        raise UserError(
            f"A checkpoint must be as it was written, {path / damaged[0]} is not; delete {path} "
            "to start anew."
        )
    for what, value in record.items():
        if found.get(what) != value:
            raise UserError(
                f"A run must go on as it began, the {what} of {path} are others; delete {path} to "
                "start anew."
            )
