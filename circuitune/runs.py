"""The run directory: manifest, stages, and resuming by content hash. No torch.

A stage writes into a hidden folder inside the run directory; when it has finished, its files are
renamed into place and recorded in ``manifest.json`` with their sha256. A stage is skipped when
its options, its model, the content of its input files and the content of its outputs are what
they were. A stage that was interrupted goes on where it was, if it keeps its `Progress`.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from circuitune import __version__
from circuitune.components import Circuit
from circuitune.errors import UserError

MANIFEST = "manifest.json"
PAIRS = ("pairs.jsonl", "selection.json")
# Files of a checkpoint that make the model, and how much of a long one is read to know it again.
MODEL_FILES = (".safetensors", ".gguf", ".json", ".txt", ".model", ".jinja")
SAMPLES, SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True)
class Stage:
    """What a stage reads and writes, as paths inside the run directory.

    ``optional`` are inputs that it does without where they are absent.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    optional: tuple[str, ...] = ()


STAGES = {
    stage.name: stage
    for stage in (
        Stage("pairs", (), PAIRS),
        Stage("locate", PAIRS, ("effects.parquet", "circuit.json", "paths.parquet")),
        Stage(
            "validate",
            (*PAIRS, "effects.parquet", "circuit.json"),
            ("knockout.parquet", "validate.json"),
        ),
        Stage(
            "explain", (*PAIRS, "effects.parquet", "circuit.json", "paths.parquet"), ("explain",)
        ),
        Stage(
            "transfer",
            (*PAIRS, "effects.parquet", "circuit.json"),
            ("transfer.parquet", "transfer.json"),
            ("tuned", "tune.json"),
        ),
        Stage(
            "tune",
            (*PAIRS, "effects.parquet", "circuit.json"),
            ("tuned", "tune.json"),
            ("paths.parquet",),
        ),
        Stage("evaluate", (*PAIRS, "tuned", "tune.json"), ("eval.json", "samples.parquet")),
        # Of a model alone: the run directory holds nothing else.
        Stage("benchmark", (), ("eval.json", "samples.parquet")),
    )
}


# Beginnings of names of what a stage keeps while it runs, or leaves when it is interrupted.
PARTS = tuple(f".{name}-" for name in STAGES)


def write_json(path: Path, content: Any) -> None:
    """Write JSON to a temporary file beside ``path``, then rename it into place."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    _replace(path, text.encode())


def _replace(path: Path, content: bytes) -> None:
    # Not tempfile: its files are readable by their owner alone.
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def read_manifest(run: Path) -> dict[str, Any]:
    """The manifest of a run directory.

    Raises:
        UserError: there is none, or it is damaged.
    """
    try:
        manifest = json.loads((run / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"A run directory must hold {MANIFEST}, {run} does not; start with "
            f"`circuitune locate MODEL --out {run}`."
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{run / MANIFEST} must be readable JSON, it is not ({error}); start a new run."
        ) from error
    parts = ("model", "load", "config", "stages")
    if not isinstance(manifest, dict) or not all(isinstance(manifest.get(p), dict) for p in parts):
        raise UserError(
            f"{run / MANIFEST} must give {', '.join(parts)}, it does not; start a new run in "
            "another folder."
        )
    return manifest


def fingerprint(model: str) -> str:
    """A text that changes when the model behind a name changes, without reading its weights."""
    if model.startswith("package:"):
        package = model.removeprefix("package:")
        try:
            return f"{package}=={importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            return model
    path = Path(model).expanduser()
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []
    facts = [(str(f.relative_to(path)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(repr((model, facts)).encode()).hexdigest() if facts else model


def identity(model: str) -> str:
    """A text that is the same for a copy of a model, and differs for another one in its place.

    Of files it is a hash of names, sizes and contents; of long files a sample is read, spread
    evenly, since other weights differ nearly everywhere. The name of a hub model is its own.
    """
    path = Path(model).expanduser()
    if not path.exists():
        return fingerprint(model)
    files = [path] if path.is_file() else sorted(path.iterdir())
    known = hashlib.sha256()
    for file in files:
        if file.suffix in MODEL_FILES and file.is_file():
            known.update(repr((file.name, file.stat().st_size)).encode())
            known.update(_sample(file))
    return known.hexdigest()


def _sample(path: Path) -> bytes:
    """The content of a file, or evenly spread parts of a long one."""
    size = path.stat().st_size
    if size <= SAMPLES * SAMPLE_BYTES:
        return path.read_bytes()
    parts = []
    with path.open("rb") as file:
        for number in range(SAMPLES):
            file.seek(number * (size - SAMPLE_BYTES) // (SAMPLES - 1))
            parts.append(file.read(SAMPLE_BYTES))
    return b"".join(parts)


@contextmanager
def opened(
    run: Path, model: str, options: dict[str, Any], command: Sequence[str]
) -> Iterator[None]:
    """Make a run directory for a model, or continue one, while a command runs its stages.

    After an exception before any stage has finished, the directory is as it was, or absent.

    Args:
        run: the directory.
        model: name of the model.
        options: how it is loaded (device, dtype).
        command: the command line, kept for the report.

    Raises:
        UserError: the directory cannot be written or belongs to another model.
    """
    manifest = run / MANIFEST
    # os.path, since Path.exists raises where the parent may not be entered.
    absent = [folder for folder in (run, *run.parents) if not os.path.exists(folder)]
    before = manifest.read_bytes() if os.path.isfile(manifest) else None
    finished = {} if before is None else read_manifest(run)["stages"]
    try:
        _create(run, model, options, command)
        yield
    except BaseException:
        if os.path.isfile(manifest) and read_manifest(run)["stages"] == finished:
            if before is None:
                manifest.unlink()
            else:
                _replace(manifest, before)
        for folder in absent:
            with suppress(OSError):  # it holds something by now
                folder.rmdir()
        raise


def _create(run: Path, model: str, options: dict[str, Any], command: Sequence[str]) -> None:
    try:
        run.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run):
            pass
    except OSError as error:
        raise UserError(
            f"--out must be a folder that can be written, {run} cannot ({error.strerror}); "
            "choose another folder."
        ) from error
    if (run / MANIFEST).exists():
        manifest = read_manifest(run)
        if model not in (found := manifest["model"].get("id", ""), os.path.abspath(found)):
            raise UserError(
                f"A run directory belongs to one model, {run} holds {found}; choose another --out."
            )
    elif not all(path.name.startswith(PARTS) for path in run.iterdir()):
        raise UserError(
            f"--out must be a new folder or a run directory, {run} holds other files; choose "
            "another --out."
        )
    else:
        manifest = {"model": {"id": model}, "config": {}, "stages": {}}
    manifest |= {
        "circuitune": __version__,
        "command": shlex.join(command),
        "load": options,
        "versions": versions(),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
    }
    write_json(run / MANIFEST, manifest)


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("torch", "transformers", "accelerate", "numpy", "tokenizers", "safetensors")
    found = {}
    for name in names:
        if importlib.util.find_spec(name):
            found[name] = importlib.metadata.version(name)
    return {"python": platform.python_version(), **found}


# Options that name a file of the user's, at most one a stage.
FILES = ("pairs", "data", "retention")


def digest(path: Path) -> str:
    """Sha256 of a file, or of the names and contents of a folder; empty if absent."""
    if path.is_dir():
        parts = [
            f"{f.relative_to(path)}:{digest(f)}" for f in sorted(path.rglob("*")) if f.is_file()
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stage_key(run: Path, stage: Stage, config: Any) -> str:
    """Content hash of everything that a stage's result depends on."""
    manifest = read_manifest(run)
    inputs = {name: digest(run / name) for name in (*stage.inputs, *stage.optional)}
    extra = next(filter(None, (getattr(config, name, None) for name in FILES)), None)
    content = {
        "stage": stage.name,
        "config": asdict(config),
        "model": fingerprint(manifest["model"]["id"]),
        # A bound on memory changes how results are made, not what they are.
        "load": {key: manifest["load"].get(key) for key in ("device", "dtype")},
        "inputs": inputs,
        "file": digest(Path(extra)) if extra else "",
        "circuitune": __version__,
    }
    folder = getattr(config, "data_dir", None)
    if folder and os.path.isdir(folder):
        content["data"] = fingerprint(folder)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_done(run: Path, stage: Stage, config: Any) -> bool:
    """Whether the stage's recorded result is still what these options and inputs would give."""
    entry = read_manifest(run)["stages"].get(stage.name)
    if entry is None or entry["hash"] != stage_key(run, stage, config):
        return False
    return all(digest(run / name) == entry["outputs"].get(name) for name in stage.outputs)


def outdated(run: Path, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Finished stages whose inputs were made anew since, and the stage that made these.

    Args:
        run: the run directory.
        entries: ``stages`` of its manifest; those of older versions do not tell.
    """
    makers = {name: stage.name for stage in reversed(STAGES.values()) for name in stage.outputs}
    found: dict[str, str] = {}
    for stage in STAGES:
        used = entries.get(stage, {}).get("inputs", {})
        changed = [makers[name] for name, known in used.items() if digest(run / name) != known]
        changed += [found[makers[name]] for name in used if makers[name] in found]
        if changed:
            found[stage] = changed[0]
    return found


def require_inputs(run: Path, stage: Stage) -> None:
    """Refuse to start a stage whose input files are absent, or were made with another model.

    Raises:
        UserError: an input is missing, or the files of the model have changed since.
    """
    manifest = read_manifest(run)
    model = manifest["model"].get("id", "")
    now = None
    for name in stage.inputs:
        maker = next(other.name for other in STAGES.values() if name in other.outputs)
        if not (run / name).exists():
            maker = "locate MODEL --out" if maker in ("pairs", "locate") else maker
            raise UserError(
                f"`circuitune {stage.name}` needs {name}, {run} does not hold it; run "
                f"`circuitune {maker} {run}` first."
            )
        made_with = manifest["stages"].get(maker, {}).get("model")
        now = now or identity(model)
        # Of a model that is gone, its name alone is left: loading says so.
        if made_with is not None and now not in (made_with, model):
            raise UserError(
                f"A run must go on with the model that it was made with, {model} has other files "
                f"now than when {name} was made; put the old ones back, or start anew with "
                f"`circuitune locate {model} --out {run}`."
            )


def read_circuit(run: Path) -> tuple[dict[str, Any], Circuit]:
    """The content of ``circuit.json``, and the circuit in it.

    Raises:
        UserError: the file is absent or damaged, or names something that is no component.
    """
    path = run / "circuit.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record, Circuit.from_json(record)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> UserError:
    """The error for a file of a run directory that cannot be read as what it should be."""
    return UserError(
        f"{path} must be as `circuitune locate` wrote it, it cannot be read "
        f"({type(error).__name__}: {str(error)[:120]}); restore the file or run "
        f"`circuitune locate MODEL --out {path.parent}` again."
    )


@contextmanager
def writing(run: Path, stage: Stage, config: Any, *, processes: int = 1) -> Iterator[Path]:
    """Give a stage a folder to write into; on success move its outputs into the run directory.

    After an exception the folder is removed and the run directory is as it was.

    Args:
        run: the run directory.
        stage: the stage.
        config: its options.
        processes: how many work on it; noted, but not hashed, since results do not depend on it.
    """
    key = stage_key(run, stage, config)
    inputs = {name: digest(run / name) for name in (*stage.inputs, *stage.optional)}
    made_with = identity(read_manifest(run)["model"]["id"])
    started = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix=f".{stage.name}-", dir=run))
    try:
        yield work
        for name in stage.outputs:
            if not (work / name).exists():
                raise RuntimeError(f"Stage {stage.name} must write {name}; it did not.")
        for name in stage.outputs:
            if (run / name).is_dir():
                shutil.rmtree(run / name)
            os.replace(work / name, run / name)
        manifest = read_manifest(run)
        manifest["config"][stage.name] = asdict(config)
        manifest["stages"][stage.name] = {
            "hash": key,
            "model": made_with,
            "seconds": round(time.monotonic() - started, 2),
            "processes": processes,
            "inputs": {name: known for name, known in inputs.items() if known},
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "outputs": {name: digest(run / name) for name in stage.outputs},
        }
        write_json(run / MANIFEST, manifest)
        for path in run.glob(f".{stage.name}-parts-*"):  # also of attempts with other options
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@dataclass(frozen=True)
class Progress:
    """Finished parts of a stage, kept in the run directory until the stage is done.

    A stage that was interrupted, or killed, finds them again if nothing that it depends on has
    changed; see `progress`.

    Attributes:
        path: a file of JSON lines, made with the first part; None where this process does not see
            the run directory.
        done: value by name of the part.
    """

    path: Path | None
    done: dict[str, Any]

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The value of a part, plain JSON data: from before, or made now and kept."""
        if name not in self.done:
            line = json.dumps([name, make()])
            # Read back also now, so that a result does not depend on whether it was interrupted.
            self.done[name] = json.loads(line)[1]
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(f"\n{line}")  # first the break: the line before may be cut off
        return self.done[name]

    def forget(self) -> None:
        """Remove the file; the stage has all it needs."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def progress(run: Path, stage: Stage, config: Any, *, process: str = "") -> Progress:
    """The parts of a stage that an interrupted attempt has finished.

    The name of their file tells all that they depend on, see `stage_key`; a line that was cut off
    is left out. `writing` removes the files of all attempts when the stage is done.

    Args:
        run: the run directory.
        stage: the stage.
        config: its options.
        process: name of this process where several share the work, each its own parts.
    """
    if not (run / MANIFEST).is_file():
        return Progress(None, {})
    path = run / f".{stage.name}-parts-{stage_key(run, stage, config)[:20]}{process}.jsonl"
    done: dict[str, Any] = {}
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.split("\n"):
        with suppress(ValueError, TypeError):
            name, value = json.loads(line)
            done[name] = value
    return Progress(path, done)


def lasting(run: Path, stage: Stage, config: Any) -> Path:
    """A folder for checkpoints of a stage, which outlives an interruption.

    Its name tells all that it depends on, as that of `progress`; `writing` removes it when the
    stage is done.
    """
    key = stage_key(run, stage, config)[:20]
    path = run / f".{stage.name}-parts-{key}.d"
    path.mkdir(exist_ok=True)
    return path


def note_model(run: Path, facts: dict[str, Any]) -> None:
    """Record the model's sizes in the manifest."""
    manifest = read_manifest(run)
    manifest["model"] = facts
    write_json(run / MANIFEST, manifest)


def command_line() -> list[str]:
    """The command as the user typed it, with the program's short name."""
    return ["circuitune", *sys.argv[1:]]
