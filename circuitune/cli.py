"""The command line: one command per stage; `circuitune.recipes` reads the options.

Nothing heavy is imported before a command runs, and a stage that is already done does not even
load the model.
"""

import importlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from circuitune import __version__, ranks, runs
from circuitune import config as configs
from circuitune.errors import UserError
from circuitune.recipes import IMPLEMENTATION, stage_options, with_options

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Stages of `circuitune run`; transfer takes its time and is asked for by itself.
DEFAULT_STAGES = ("pairs", "locate", "validate", "explain", "tune", "evaluate")

# Stages on which several processes work together (`circuitune.ranks`); the first one does others.
SHARED = ("locate", "validate", "tune")
# Commands that a launcher may start.
LAUNCHED = (*SHARED, "run")

SELFTEST = "circuitune.selftest"

ModelName = Annotated[
    str, typer.Argument(help="Hub id, checkpoint folder, .gguf file, or package:NAME.")
]
RunFolder = Annotated[Path, typer.Argument(help="Run directory made by `circuitune locate`.")]
Out = Annotated[Path, typer.Option("--out", help="Run directory to write.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file with options; flags win over it.")
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...; auto takes a GPU.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Dtype of the weights while measuring.")]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory", help="Bound such as 1.5GiB; a larger model is read layer by layer."
    ),
]


class LoadedModel:
    """The run's model, loaded when the first stage needs it."""

    def __init__(self, name: str, options: dict[str, str | None]) -> None:
        """Remember what to load."""
        self.name = name
        self.options = options
        self._model: Any = None

    def __call__(self) -> Any:
        """The model; loaded once."""
        if self._model is None:
            say(f"loading {self.name}")
            models = importlib.import_module("circuitune.models")
            own = {"device": ranks.device(self.options["device"])}
            model = models.load(self.name, **self.options | own)
            if not model.family.proven:
                say(f"self-test passed: {importlib.import_module(SELFTEST).prove(model)}")
            self._model = model
        return self._model


def say(text: str) -> None:
    """One line for the user on standard error."""
    typer.echo(text, err=True)


def run_stage(name: str, run: Path, options: Any, model: LoadedModel) -> None:
    """Run one stage, or say that its result is still good.

    Of several processes the first one alone decides and touches the run directory; those stages
    that are not `SHARED` it also computes alone, while the others wait.
    """
    stage = runs.STAGES[name]

    def is_done() -> bool:
        runs.require_inputs(run, stage)
        return runs.is_done(run, stage, options)

    def compute() -> None:
        path, function = IMPLEMENTATION[name][0].split(":")
        with _writing(run, stage, options) as work:
            getattr(importlib.import_module(path), function)(loaded, options, run, work)

    if ranks.first(is_done):
        say(f"{name}: done before, nothing changed")
        return
    loaded = model()
    stages = ranks.first(lambda: runs.read_manifest(run))["stages"]
    for earlier, by in ranks.first(lambda: runs.outdated(run, stages)).items():
        if set(runs.STAGES[earlier].outputs) & set(stage.inputs):
            say(
                f"{earlier} was run before {by} was run anew, and is used as it is; `circuitune "
                f"{earlier} {run}` makes it anew"
            )
    ranks.first(lambda: runs.note_model(run, loaded.describe()))
    if name in SHARED:
        compute()
    else:
        ranks.first(compute)
    seconds = ranks.first(lambda: runs.read_manifest(run)["stages"][name]["seconds"])
    say(f"{name}: {seconds:.0f} s")


@contextmanager
def _writing(run: Path, stage: runs.Stage, options: Any) -> Iterator[Path]:
    """A folder for a stage's files; only what the first process writes is kept."""
    if ranks.rank() == 0:
        processes = ranks.world() if stage.name in SHARED else 1
        with runs.writing(run, stage, options, processes=processes) as work:
            yield work
    else:
        with tempfile.TemporaryDirectory(prefix="circuitune-") as work:
            yield Path(work)


def _tell(run: Path) -> None:
    """What the run shows by now, and what comes next, in a few lines."""
    told = importlib.import_module("circuitune.report").summarise(run)
    for line in (*told.headline, *told.outdated):
        typer.echo(str(line))
    if told.steps:
        typer.echo(f"next: {told.steps[0].command}")


def _open(run: Path) -> LoadedModel:
    manifest = ranks.first(lambda: runs.read_manifest(run))
    return LoadedModel(manifest["model"]["id"], manifest["load"])


@contextmanager
def _create(model: str, out: Path, options: dict[str, str | None]) -> Iterator[LoadedModel]:
    first = ranks.rank() == 0
    if os.path.exists(os.path.expanduser(model)):  # the run may be gone on with from elsewhere
        model = os.path.abspath(os.path.expanduser(model))
    with runs.opened(out, model, options, runs.command_line()) if first else nullcontext():
        yield LoadedModel(model, options)


def _version(wanted: bool | None) -> None:
    if wanted:
        typer.echo(f"circuitune {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool | None,
        typer.Option("--version", help="Show the version.", callback=_version, is_eager=True),
    ] = None,
) -> None:
    """Find the heads with which a language model calculates, prove it, and tune only them."""


@app.command("check")
def check(
    model: ModelName,
    device: Device = "auto",
    dtype: Dtype = "float32",
    max_memory: MaxMemory = None,
) -> None:
    """Before you start: family, self-test, digits, prompt prefix, memory and time of a sweep."""
    options = {"device": device, "dtype": dtype, "max_memory": max_memory}
    loaded = LoadedModel(model, options)()
    facts = loaded.describe()
    typer.echo("  ".join(f"{name} {value}" for name, value in facts.items()))
    report = importlib.import_module(SELFTEST).prove(loaded)
    typer.echo(f"self-test passed: {report}")
    pairs = importlib.import_module("circuitune.pairs")
    for line in pairs.preflight(loaded, configs.PairsConfig()):
        typer.echo(line)


@app.command("run")
@with_options(*DEFAULT_STAGES)
def run_all(
    model: ModelName,
    out: Out,
    values: dict[str, Any],
    config: ConfigFile = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    max_memory: MaxMemory = None,
) -> None:
    """Everything in order: pairs, locate, validate, explain, tune, evaluate, report."""
    options = stage_options(values | {"config": config}, *DEFAULT_STAGES)
    load = {"device": device, "dtype": dtype, "max_memory": max_memory}
    with _create(model, out, load) as loaded:
        for name, option in zip(DEFAULT_STAGES, options, strict=True):
            run_stage(name, out, option, loaded)
    ranks.first(lambda: report(out))


@app.command("locate")
@with_options("pairs", "locate")
def locate_command(
    model: ModelName,
    out: Out,
    values: dict[str, Any],
    config: ConfigFile = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    max_memory: MaxMemory = None,
) -> None:
    """Make pairs, measure every head and MLP, choose the circuit. Makes the run directory."""
    pairs, locate = stage_options(values | {"config": config}, "pairs", "locate")
    load = {"device": device, "dtype": dtype, "max_memory": max_memory}
    with _create(model, out, load) as loaded:
        run_stage("pairs", out, pairs, loaded)
        run_stage("locate", out, locate, loaded)
    ranks.first(lambda: _tell(out))


@app.command("validate")
@with_options("validate")
def validate_command(run: RunFolder, values: dict[str, Any], config: ConfigFile = None) -> None:
    """Knock out the chosen heads on the held-out half, next to random heads."""
    (options,) = stage_options(values | {"config": config}, "validate")
    run_stage("validate", run, options, _open(run))
    ranks.first(lambda: _tell(run))


@app.command("explain")
@with_options("explain")
def explain_command(run: RunFolder, values: dict[str, Any], config: ConfigFile = None) -> None:
    """What the chosen heads look at and write, and what the MLPs make of it."""
    (options,) = stage_options(values | {"config": config}, "explain")
    run_stage("explain", run, options, _open(run))
    ranks.first(lambda: _tell(run))


@app.command("transfer")
@with_options("transfer")
def transfer_command(run: RunFolder, values: dict[str, Any], config: ConfigFile = None) -> None:
    """Knock out heads found on one task in all others; compare the tuned model's effects."""
    (options,) = stage_options(values | {"config": config}, "transfer")
    run_stage("transfer", run, options, _open(run))
    ranks.first(lambda: _tell(run))


@app.command("tune")
@with_options("tune")
def tune_command(
    run: RunFolder,
    values: dict[str, Any],
    config: ConfigFile = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show data, mask and cost; train nothing.")
    ] = False,
) -> None:
    """Tune slices of the chosen heads, and of random heads as a control."""
    (options,) = stage_options(values | {"config": config}, "tune")
    if dry_run:
        from rich.console import Console

        runs.require_inputs(run, runs.STAGES["tune"])
        model = _open(run)()
        for line in importlib.import_module("circuitune.tune").outlook(model, options, run):
            if ranks.rank() == 0:
                Console().print(line, markup=False, highlight=False, soft_wrap=True)
        return
    run_stage("tune", run, options, _open(run))
    ranks.first(lambda: _tell(run))


@app.command("evaluate")
@with_options("evaluate")
def evaluate_command(
    model_or_run: Annotated[
        str, typer.Argument(help="Run directory, or a model as in `circuitune run`.")
    ],
    values: dict[str, Any],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Of a model: folder to write; by default runs/eval-NAME."),
    ] = None,
    config: ConfigFile = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Held-out problems, drift on plain text and benchmarks, base against tuned."""
    (options,) = stage_options(values | {"config": config}, "evaluate")
    run = Path(model_or_run)
    # A folder is a run unless it holds a checkpoint.
    if (run / runs.MANIFEST).is_file() or (run.is_dir() and not (run / "config.json").is_file()):
        if out is not None:
            raise UserError(
                f"--out is for a model alone, {run} is a run directory and its results are "
                "written there; leave --out out."
            )
        run_stage("evaluate", run, options, _open(run))
    else:
        run = (
            out or Path("runs") / f"eval-{re.sub(r'[^A-Za-z0-9.]+', '-', model_or_run).strip('-')}"
        )
        load = {"device": device, "dtype": dtype, "max_memory": None}
        with _create(model_or_run, run, load) as loaded:
            run_stage("benchmark", run, options, loaded)
    _show_benchmarks(run)


def _show_benchmarks(run: Path) -> None:
    """Print the tables of ``eval.json``."""
    if ranks.rank() == 0:
        from rich.console import Console

        from circuitune.report.terminal import render_benchmarks

        Console().print(render_benchmarks(run / "eval.json"))
        typer.echo(str(run / "eval.json"))


Tuned = Annotated[Path, typer.Argument(help="Run directory, or a folder with a delta.")]
Target = Annotated[Path, typer.Option("--out", help="Folder to make.")]


@app.command("export")
def export(
    tuned: Tuned,
    out: Target,
    form: Annotated[str, typer.Option("--as", help="merged or lora.")] = "merged",
    base: Annotated[str | None, typer.Option("--base", help="If it is elsewhere now.")] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of a merged checkpoint: float32, or as stored.")
    ] = None,
) -> None:
    """Write tuned heads as a checkpoint that any program loads, or exactly as a PEFT LoRA."""
    if form not in ("merged", "lora") or (form == "lora" and dtype):
        raise UserError(
            f"--as must be merged or lora, and --dtype is for merged alone, found --as {form}"
            f"{f' --dtype {dtype}' if dtype else ''}; correct it."
        )
    if form == "merged":
        made = importlib.import_module("circuitune.merging").merge(
            tuned, out, base=base, dtype=dtype
        )
        what = (
            f"{len(made.tensors)} tensors changed in {made.shards} file(s), {made.changed:,} of "
            f"{made.numbers:,} tuned numbers differ from the base after rounding"
        )
    else:
        made = importlib.import_module("circuitune.exporting").export_lora(tuned, out, base=base)
        what = f"a LoRA on {made.modules} modules, rank up to {made.rank}"
    told = "not measured, too large" if made.difference is None else f"{made.difference:.2g}"
    typer.echo(
        f"{out}: {what}, {made.size / 2**20:.1f} MiB, largest difference of a logit from the tuned "
        f"model {told}, {made.seconds:.1f} s"
    )


@app.command("verify")
def verify(
    tuned: Annotated[Path, typer.Argument(help="Merged checkpoint, or a folder with a delta.")],
    base: Annotated[str, typer.Option("--base", help="The base model, as in `circuitune run`.")],
    delta: Annotated[
        Path | None, typer.Option("--delta", help="The delta that it was merged from.")
    ] = None,
) -> None:
    """Prove that every byte outside the tuned slices is the base's."""
    found = importlib.import_module("circuitune.verifying").verify(tuned, base, delta=delta)
    if found.proof == "nothing":
        typer.echo(f"{tuned}: {base} holds the {found.touched} tensors that it was trained on")
        return
    inside = {"delta": "base + delta", "digest": "what was written"}[found.proof]
    typer.echo(
        f"{tuned}: {found.tensors} tensors, {found.compared / 2**20:.1f} MiB compared with {base}; "
        f"outside {', '.join(found.components) or 'the slices'} every byte is equal, inside "
        f"({found.inside / 2**20:.2f} MiB of {found.touched} tensors) it is {inside}"
    )
    if found.other_files:
        typer.echo(f"other files that differ: {', '.join(found.other_files)}")


@app.command("revert")
def revert(
    merged: Annotated[Path, typer.Argument(help="Checkpoint made by `circuitune export`.")],
    out: Target,
) -> None:
    """Restore the base from a merged checkpoint, byte for byte."""
    made = importlib.import_module("circuitune.merging").revert(merged, out)
    typer.echo(f"{out}: {made.base}, {made.tensors} tensors restored in {made.shards} file(s)")


@app.command("report")
def report(run: RunFolder) -> None:
    """Print the tables and rebuild report.html from the run directory alone."""
    from rich.console import Console

    from circuitune.report import summarise, write_report
    from circuitune.report.terminal import render

    path = write_report(run)
    Console().print(render(summarise(run)))
    typer.echo(str(path))


def main() -> None:
    """Entry point: a `UserError` becomes one sentence and exit status 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # The inner one speaks before the processes part, the outer one if they did not meet.
    with _sentences(), ranks.together(), _sentences():
        _check_processes(sys.argv[1:])
        app()


def _check_processes(words: list[str]) -> None:
    """Refuse several processes where the command, the first word, cannot use them."""
    alone = words and not words[0].startswith("-") and words[0] not in LAUNCHED
    if alone and ranks.world() > 1:
        raise UserError(
            f"Only {', '.join(LAUNCHED)} work in several processes, {ranks.world()} were started "
            f"for `circuitune {words[0]}`; start it without a launcher."
        )


@contextmanager
def _sentences() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        # Messages quote other libraries, whose own messages may have several lines.
        say(f"circuitune: {' '.join(line.strip() for line in str(error).splitlines())}")
        sys.exit(2)
