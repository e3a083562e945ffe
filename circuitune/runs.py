"""The run directory: manifest, stages, and resuming by content hash. No torch.

A stage writes into a hidden folder inside the run directory; when it has finished, its files are
renamed into place and recorded in ``manifest.json`` with their sha256. A stage is skipped when
its options, its model, the content of its input files and the content of its outputs are what
they were.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from circuitune import __version__
from circuitune.errors import UserError

MANIFEST = "manifest.json"
PAIRS = ("pairs.jsonl", "selection.json")


@dataclass(frozen=True)
class Stage:
    """What a stage reads and writes, as paths inside the run directory."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


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
        Stage("tune", (*PAIRS, "effects.parquet", "circuit.json"), ("tuned", "tune.json")),
        Stage("evaluate", (*PAIRS, "tuned", "tune.json"), ("eval.json",)),
    )
}


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
        if manifest["model"].get("id") != model:
            raise UserError(
                f"A run directory belongs to one model, {run} holds {manifest['model'].get('id')}; "
                "choose another --out."
            )
    elif any(run.iterdir()):
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
    inputs = {name: digest(run / name) for name in stage.inputs}
    extra = getattr(config, "pairs", None) or getattr(config, "retention", None)
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
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_done(run: Path, stage: Stage, config: Any) -> bool:
    """Whether the stage's recorded result is still what these options and inputs would give."""
    entry = read_manifest(run)["stages"].get(stage.name)
    if entry is None or entry["hash"] != stage_key(run, stage, config):
        return False
    return all(digest(run / name) == entry["outputs"].get(name) for name in stage.outputs)


def require_inputs(run: Path, stage: Stage) -> None:
    """Refuse to start a stage whose input files another stage has yet to write.

    Raises:
        UserError: an input is missing.
    """
    for name in stage.inputs:
        if not (run / name).exists():
            maker = next(other.name for other in STAGES.values() if name in other.outputs)
            maker = "locate MODEL --out" if maker in ("pairs", "locate") else maker
            raise UserError(
                f"`circuitune {stage.name}` needs {name}, {run} does not hold it; run "
                f"`circuitune {maker} {run}` first."
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
            "seconds": round(time.monotonic() - started, 2),
            "processes": processes,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "outputs": {name: digest(run / name) for name in stage.outputs},
        }
        write_json(run / MANIFEST, manifest)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def note_model(run: Path, facts: dict[str, Any]) -> None:
    """Record the model's sizes in the manifest."""
    manifest = read_manifest(run)
    manifest["model"] = facts
    write_json(run / MANIFEST, manifest)


def command_line() -> list[str]:
    """The command as the user typed it, with the program's short name."""
    return ["circuitune", *sys.argv[1:]]
