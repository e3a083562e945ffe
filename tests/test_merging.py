"""Merged checkpoints and adapters: exact, proven byte by byte, and undone without a trace."""

import json
import resource
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from circuitune import bases, cli, models, tensorfiles
from circuitune.components import Head, Mlp
from circuitune.deltas import load_delta, save_delta, save_tensors
from circuitune.errors import UserError
from circuitune.exporting import export_lora
from circuitune.merging import merge, revert
from circuitune.models import Model
from circuitune.slices import Slice, attached, head_slices, mlp_slices
from circuitune.tensorfiles import TensorFile, cast, files_of, first_difference, widened_header
from circuitune.verifying import verify
from tests.conftest import byte_tokenizer, tiny_hf
from tests.reference.slow_merging import merged_tensors, tensors_of
from tests.test_bad_input import contents

HEADS = [Head(1, 0), Head(2, 1), Head(2, 3)]
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2": {},
    "gpt2": {},
    "phi3": {"pad_token_id": 0},
    "gemma3_text": {},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OUT = "model.layers.2.self_attn.o_proj.weight"
FREE = "model.layers.0.mlp.up_proj.weight"


def make_base(folder: Path, family: str, dtype: torch.dtype, **overrides: object) -> Path:
    """A tiny checkpoint in several shards, with the files that chat models have."""
    hf = tiny_hf(family, **FAMILIES.get(family, {}), **overrides).to(dtype)
    hf.save_pretrained(folder, max_shard_size="20KB")
    byte_tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    (folder / "LICENSE").write_text("free\n")
    return folder


def random_delta(
    folder: Path, model: Model, parts: list[Slice], *, biases: bool = True
) -> dict[Slice, Tensor]:
    """A delta of random values on disk; without biases theirs are zero."""
    generator = torch.Generator().manual_seed(3)
    parameters = dict(model.hf.named_parameters())
    deltas = {}
    for part in parts:
        name = part.key(model).partition("#")[0]
        shape = parameters[name][part.place(model)].shape
        value = torch.randn(shape, generator=generator) * 0.05
        deltas[part] = value if biases or part.leaf == "weight" else torch.zeros(shape)
    folder.mkdir()
    save_delta(folder, model, deltas, {"method": "precise", "components": list(map(str, HEADS))})
    return deltas


Pair = tuple[Path, Path]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Pair]:
    """Base and delta of a family and type, made once; nobody writes into them."""
    known: dict[tuple[str, str], Pair] = {}

    def make(family: str = "llama", dtype: str = "float32") -> Pair:
        if (family, dtype) not in known:
            folder = tmp_path_factory.mktemp(f"{family}-{dtype}")
            base = make_base(folder / "base", family, DTYPES[dtype])
            model = models.load(str(base), device="cpu", dtype="float32")
            random_delta(folder / "delta", model, head_slices(model, HEADS, "qkvo"), biases=True)
            known[family, dtype] = base, folder / "delta"
        return known[family, dtype]

    return make


Made = Callable[..., Pair]


@pytest.fixture(scope="session")
def checkpoint(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged tiny Llama in bfloat16, made once; nobody writes into it."""
    out = tmp_path_factory.mktemp("merged") / "out"
    merge(made("llama", "bfloat16")[1], out)
    return out


@pytest.fixture
def spoiled(checkpoint: Path, tmp_path: Path) -> Path:
    """A merged checkpoint to spoil."""
    return Path(shutil.copytree(checkpoint, tmp_path / "spoiled"))


TOKENS = torch.randint(0, 256, (3, 11), generator=torch.Generator().manual_seed(5))


def logits(hf: torch.nn.Module) -> Tensor:
    """Logits on random tokens."""
    with torch.no_grad():
        return hf(input_ids=TOKENS).logits


def live_logits(base: Path, delta: Path) -> Tensor:
    """Logits while the delta is attached as it is in training, beside the frozen weights."""
    model = models.load(str(base), device="cpu", dtype="float32")
    stored = load_delta(delta).tensors
    parts = head_slices(model, HEADS, "qkvo")
    with attached(model, parts) as views:
        for part, view in views.items():
            transposed = view.shape != stored[part.key(model)].shape
            value = stored[part.key(model)]
            with torch.no_grad():
                view.copy_(value.T if transposed else value)
        return logits(model.hf)


def flip(file: Path, at: int) -> None:
    """Change one bit of a file."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def holder(folder: Path, name: str) -> TensorFile:
    """The shard with a tensor."""
    return next(file for file in files_of(folder) if name in file.tensors)


def spoil(folder: Path, name: str, index: int) -> None:
    """Change one bit of one number of a tensor."""
    file = holder(folder, name)
    span = file.tensors[name]
    flip(file.path, span.start + index * span.item)


# ---------------------------------------------------------------------------------------- merge


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_checkpoint_is_the_base_and_the_delta(
    made: Made, family: str, dtype: str, tmp_path: Path
) -> None:
    base, delta = made(family, dtype)
    report = merge(delta, tmp_path / "out")
    expected, found = merged_tensors(base, delta), tensors_of(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    changed = {name for name, value in tensors_of(base).items() if not value.equal(found[name])}
    assert set(report.tensors) == changed
    assert report.shards == len(list(base.glob("*.safetensors"))) > 2
    for file in files_of(base):
        assert TensorFile.of(tmp_path / "out" / file.path.name).header == file.header
    tuned = load_delta(delta).tensors
    assert report.numbers == sum(value.numel() for value in tuned.values())
    assert 0.9 * report.numbers < report.changed <= report.numbers
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stock.dtype == DTYPES[dtype]
    distance = (logits(stock.float()) - live_logits(base, delta)).abs().max()
    assert report.difference is not None
    if dtype == "float32":
        assert max(distance, report.difference) <= 1e-5
    else:
        assert 1e-4 < report.difference < 0.5
        assert 1e-4 < distance < 0.5


def test_other_files_are_copied_byte_for_byte(made: Made, checkpoint: Path) -> None:
    base = contents(made("llama", "bfloat16")[0])
    found = contents(checkpoint)
    kept = {name for name in base if not name.endswith(".safetensors")}
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "LICENSE"} <= kept
    assert "model.safetensors.index.json" in kept
    assert all(found[name] == base[name] for name in kept)
    added = {"components.json", "revert/base_slices.safetensors"}
    assert found.keys() - base.keys() == added
    assert (checkpoint.stat().st_mode & 0o777) == (checkpoint.parent.stat().st_mode | 0o055) & 0o777
    modes = {path.stat().st_mode for path in checkpoint.rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_float32_loses_nothing(made: Made, tmp_path: Path) -> None:
    base, delta = made("llama", "bfloat16")
    report = merge(delta, tmp_path / "out", dtype="float32")
    assert report.difference is not None
    assert report.difference <= 1e-5
    expected, found = merged_tensors(base, delta, torch.float32), tensors_of(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert found.keys() == expected.keys()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stock.dtype == torch.float32
    assert (logits(stock) - live_logits(base, delta)).abs().max() <= 1e-5
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
    assert verify(tmp_path / "out", str(base), delta=delta).other_files == (
        "config.json",
        "model.safetensors.index.json",
    )
    revert(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)
    spoil(tmp_path / "out", FREE, 7)
    with pytest.raises(UserError, match=rf"{FREE} in .* differs first at \[0, 7\]"):
        verify(tmp_path / "out", str(base))


@pytest.mark.parametrize("share", [bases.SHARE, 0.0])
def test_float32_leaves_wider_numbers_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """Whether or not the models fit into memory to be run."""
    monkeypatch.setattr(bases, "SHARE", share)
    base = make_base(tmp_path / "base", "llama", torch.float64)
    model = models.load(str(base), device="cpu", dtype="float32")
    random_delta(tmp_path / "delta", model, head_slices(model, HEADS, "qo"))
    merge(tmp_path / "delta", tmp_path / "out", dtype="float32")
    assert {value.dtype for value in tensors_of(tmp_path / "out").values()} == {torch.float64}
    verify(tmp_path / "out", str(base), delta=tmp_path / "delta")


def test_whole_mlps_and_tied_embeddings(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", torch.bfloat16, tie_word_embeddings=True)
    model = models.load(str(base), device="cpu", dtype="float32")
    parts = [*head_slices(model, HEADS), *mlp_slices(model, [Mlp(2)])]
    random_delta(tmp_path / "delta", model, parts)
    merge(tmp_path / "delta", tmp_path / "out")
    expected, found = merged_tensors(base, tmp_path / "delta"), tensors_of(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "lm_head.weight" not in found
    assert verify(tmp_path / "out", str(base), delta=tmp_path / "delta").proof == "delta"
    revert(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)
    with pytest.raises(UserError, match=r"changes the whole of model\.layers\.2\.mlp"):
        export_lora(tmp_path / "delta", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_names_of_old_checkpoints_and_buffers_in_them(made: Made, tmp_path: Path) -> None:
    base, delta = made("gpt2")
    old = Path(shutil.copytree(base, tmp_path / "old"))
    for file in [*old.glob("*.safetensors"), old / "model.safetensors.index.json"]:
        file.unlink()
    tensors = {name.removeprefix("transformer."): v for name, v in tensors_of(base).items()}
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
    save_file(tensors | {"h.0.attn.bias": mask}, old / "model.safetensors", {"format": "pt"})
    report = merge(delta, tmp_path / "out", base=str(old))
    assert "h.1.attn.c_attn.weight" in report.tensors
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (logits(stock) - live_logits(base, delta)).abs().max() <= 1e-5
    assert verify(tmp_path / "out", str(old), delta=delta).touched == len(report.tensors)
    assert verify(delta, str(old)).proof == "nothing"
    revert(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(old)


def test_delta_is_found_in_a_run_directory_and_fits_a_base_loaded_in_16_bits(
    made: Made, tmp_path: Path
) -> None:
    base, _ = made("llama", "bfloat16")
    model = models.load(str(base), device="cpu", dtype="bfloat16")
    (tmp_path / "run").mkdir()
    random_delta(tmp_path / "run" / "tuned", model, head_slices(model, HEADS))
    merge(tmp_path / "run", tmp_path / "out", base=str(base))
    assert verify(tmp_path / "out", str(base), delta=tmp_path / "run").proof == "delta"


def test_nothing_is_run_where_it_does_not_fit(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, delta = made()
    monkeypatch.setattr(bases, "SHARE", 0.0)
    monkeypatch.setattr(models, "load", None)
    assert merge(delta, tmp_path / "out").difference is None
    assert export_lora(delta, tmp_path / "lora").difference is None


# ----------------------------------------------------------------------------------------- LoRA


def in_peft(hf: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """A model with an adapter, as stock PEFT loads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers in an old way
        return PeftModel.from_pretrained(hf, folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_is_exact_in_stock_peft(made: Made, family: str, tmp_path: Path) -> None:
    base, delta = made(family)
    if family in ("qwen2", "gpt2"):
        model = models.load(str(base), device="cpu", dtype="float32")
        parts = head_slices(model, HEADS, "qkvo")
        assert any(part.leaf == "bias" for part in parts)
        with pytest.raises(UserError, match=r"has no place for biases, the delta changes .*bias;"):
            export_lora(delta, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
        delta = tmp_path / "delta"
        random_delta(delta, model, parts, biases=False)
    report = export_lora(delta, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == report.rank
    assert config["rank_pattern"] == config["alpha_pattern"] != {}
    assert config["fan_in_fan_out"] is (family == "gpt2")
    assert config["target_modules"] == sorted(config["target_modules"])
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == 2 * report.modules
    stock = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    before = logits(stock)
    adapted = logits(in_peft(stock, tmp_path / "out"))
    assert (adapted - live_logits(base, delta)).abs().max() <= 1e-5
    assert (adapted - before).abs().max() > 1e-2
    assert report.difference is not None
    assert report.difference <= 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_factors_of_a_lora_baseline(made: Made, family: str, tmp_path: Path) -> None:
    base, _ = made(family)
    model = models.load(str(base), device="cpu", dtype="float32")
    path = "transformer.h.1.mlp.c_fc" if family == "gpt2" else "model.layers.1.mlp.up_proj"
    outputs, inputs = models.projection_shape(model.hf.get_submodule(path))
    generator = torch.Generator().manual_seed(1)
    factors = {
        f"{path}.weight#lora_A": torch.randn(4, inputs, generator=generator) * 0.1,
        f"{path}.weight#lora_B": torch.randn(outputs, 4, generator=generator) * 0.1,
    }
    (tmp_path / "delta").mkdir()
    save_tensors(tmp_path / "delta", model, factors, {"method": "lora"})
    merge(tmp_path / "delta", tmp_path / "out")
    export_lora(tmp_path / "delta", tmp_path / "lora")
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for factor in "AB":
        key = f"base_model.model.{path}.lora_{factor}.weight"
        assert stored[key].equal(factors[f"{path}.weight#lora_{factor}"])
    stock = AutoModelForCausalLM.from_pretrained(base)
    wanted = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert (logits(stock) - wanted).abs().max() > 1e-2
    adapted = logits(in_peft(stock, tmp_path / "lora"))
    assert (adapted - wanted).abs().max() <= 1e-5
    assert verify(tmp_path / "out", str(base), delta=tmp_path / "delta").touched == 1


# --------------------------------------------------------------------------------------- verify


def test_verify_counts_what_it_compared(made: Made, checkpoint: Path) -> None:
    base, delta = made("llama", "bfloat16")
    stored = tensors_of(base)
    numbers = sum(value.numel() for value in load_delta(delta).tensors.values())
    for given, proof in ((None, "digest"), (delta, "delta")):
        report = verify(checkpoint, str(base), delta=given)
        assert report.proof == proof
        assert report.tensors == len(stored)
        assert report.compared == sum(value.nbytes for value in stored.values())
        assert report.inside == 2 * numbers
        assert report.components == ("1.0", "2.1", "2.3")
        assert report.other_files == ()
    alone = verify(delta, str(base))
    assert (alone.proof, alone.inside, alone.touched) == ("nothing", 2 * numbers, report.touched)


@pytest.mark.parametrize("piece", [8, 16 * 2**20])
def test_one_changed_bit_elsewhere_is_found(
    made: Made, spoiled: Path, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorfiles, "PIECE", piece)
    base, delta = made("llama", "bfloat16")
    spoil(spoiled, FREE, 24 * 3 + 5)
    for given in (None, delta):
        with pytest.raises(UserError, match=rf"{FREE} in .* differs first at \[3, 5\]; "):
            verify(spoiled, str(base), delta=given)


def test_one_changed_bit_in_a_tuned_tensor_is_found(made: Made, spoiled: Path) -> None:
    base, delta = made("llama", "bfloat16")
    spoil(spoiled, OUT, 32 * 2 + 3)  # columns 8:16 and 24:32 are tuned
    with pytest.raises(UserError, match=rf"outside .*{OUT} in .* differs first at \[2, 3\]; "):
        verify(spoiled, str(base))
    spoil(spoiled, OUT, 32 * 2 + 3)
    verify(spoiled, str(base))
    spoil(spoiled, OUT, 32 * 2 + 9)
    with pytest.raises(UserError, match=rf"as it was written, {OUT} in .* has other bytes;"):
        verify(spoiled, str(base))
    with pytest.raises(UserError, match=rf"be base \+ delta, {OUT} .* differs first at \[2, 9\];"):
        verify(spoiled, str(base), delta=delta)


def change_shard(folder: Path, name: str, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Write the shard with a tensor anew."""
    path = holder(folder, name).path
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def narrowed(tensors: dict[str, Tensor]) -> None:
    """One tensor of another type."""
    tensors[FREE] = tensors[FREE].half()


def turned(tensors: dict[str, Tensor]) -> None:
    """One tensor of another shape."""
    tensors[FREE] = tensors[FREE].T.contiguous()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda tensors: tensors.pop(FREE), f"{FREE} of .* is missing"),
        (lambda tensors: tensors.update(extra=torch.zeros(2)), "extra of .* is surplus"),
        (narrowed, f"{FREE} of .* is of type F16, not BF16"),
        (turned, rf"{FREE} of .* has the shape \(24, 40\), not \(40, 24\)"),
    ],
)
def test_other_tensors_are_found(
    made: Made, spoiled: Path, change: Callable[[dict[str, Tensor]], None], fault: str
) -> None:
    change_shard(spoiled, FREE, change)
    with pytest.raises(UserError, match=fault):
        verify(spoiled, str(made("llama", "bfloat16")[0]))


def test_tensor_in_another_shard_is_found(made: Made, spoiled: Path) -> None:
    first, second = files_of(spoiled)[:2]
    tensors = load_file(first.path)
    name, value = tensors.popitem()
    save_file(load_file(second.path) | {name: value}, second.path)
    save_file(tensors, first.path)
    with pytest.raises(UserError, match=rf"{name} of .* lies in {second.path.name} compared with"):
        verify(spoiled, str(made("llama", "bfloat16")[0]))


def test_wrong_base_is_refused(made: Made, checkpoint: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", "llama", torch.bfloat16)
    change_shard(other, OUT, lambda tensors: tensors[OUT].add_(1))
    with pytest.raises(UserError, match=rf"--base must be the checkpoint .* {OUT} of .*other"):
        verify(checkpoint, str(other))
    delta = made("llama", "bfloat16")[1]
    for act in (
        lambda: verify(delta, str(other)),
        lambda: merge(delta, tmp_path / "out", base=str(other)),
    ):
        with pytest.raises(UserError, match=rf"only the weights it was trained on, {OUT} of"):
            act()
    with pytest.raises(UserError, match=r"gpt2.* stores no tensor model\.layers"):
        merge(delta, tmp_path / "out", base=str(made("gpt2")[0]))
    assert not (tmp_path / "out").exists()


def redeclared(folder: Path, places: list[str]) -> None:
    """Say other places of one tensor in the record."""
    record = json.loads((folder / "components.json").read_text())
    record["merged"]["tensors"][OUT]["places"] = places
    (folder / "components.json").write_text(json.dumps(record))


def test_declaration_is_held_against_the_delta(made: Made, spoiled: Path) -> None:
    base, delta = made("llama", "bfloat16")
    redeclared(spoiled, ["all"])
    verify(spoiled, str(base))
    with pytest.raises(UserError, match=rf"may declare only places of its delta.* in {OUT}"):
        verify(spoiled, str(base), delta=delta)
    for place in ("cols=8:99", "rows=9:3"):
        redeclared(spoiled, [place])
        with pytest.raises(UserError, match=rf"{OUT} in .* has no {place};"):
            verify(spoiled, str(base))
    redeclared(spoiled, ["cols=8:16"])  # one of the two
    with pytest.raises(UserError, match=rf"outside .*{OUT} in .* differs first at \[0, 24\]"):
        verify(spoiled, str(base))
    redeclared(spoiled, ["somewhere"])
    with pytest.raises(UserError, match="'somewhere' is no place"):
        verify(spoiled, str(base))
    with pytest.raises(UserError, match=r"a merged checkpoint, .* is a delta itself"):
        verify(delta, str(base), delta=delta)


def test_record_without_a_tensor_of_the_delta_is_refused(made: Made, spoiled: Path) -> None:
    base, delta = made("llama", "bfloat16")
    record = json.loads((spoiled / "components.json").read_text())
    del record["merged"]["tensors"][OUT]
    (spoiled / "components.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=rf"must hold its whole delta, .* nothing of {OUT}"):
        verify(spoiled, str(base), delta=delta)
    with pytest.raises(UserError, match=rf"outside .*{OUT} in .* differs first at \[0, 8\]"):
        verify(spoiled, str(base))


def test_cut_shard_is_refused(made: Made, spoiled: Path) -> None:
    path = files_of(spoiled)[1].path
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=f"{path.name} is not .*its size is not what"):
        verify(spoiled, str(made("llama", "bfloat16")[0]))


# --------------------------------------------------------------------------------------- revert


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_revert_is_the_base_byte_for_byte(
    made: Made, family: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bases, "SHARE", 0.0)  # the models need not run
    base, delta = made(family, dtype)
    merge(delta, tmp_path / "out")
    report = revert(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)
    assert report.size == sum(file.stat().st_size for file in base.glob("*.safetensors"))


@pytest.mark.parametrize("name", [FREE, OUT])
def test_revert_refuses_what_has_changed_since(spoiled: Path, tmp_path: Path, name: str) -> None:
    spoil(spoiled, name, 1)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="has changed outside the tuned places since"):
        revert(spoiled, tmp_path / "new" / "back")
    assert contents(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_revert_needs_the_bytes_of_the_base(spoiled: Path, made: Made, tmp_path: Path) -> None:
    slices = spoiled / "revert" / "base_slices.safetensors"
    slices.write_bytes(slices.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"revert/base_slices\.safetensors, .* cannot be read"):
        revert(spoiled, tmp_path / "back")
    with pytest.raises(UserError, match=r"must hold the components\.json that"):
        revert(made("llama", "bfloat16")[0], tmp_path / "back")


def test_revert_refuses_a_damaged_record(made: Made, tmp_path: Path) -> None:
    merge(made("llama", "bfloat16")[1], tmp_path / "out", dtype="float32")
    record = tmp_path / "out" / "components.json"
    facts = json.loads(record.read_text())
    for entry in facts["merged"]["tensors"].values():
        entry["places"] = []
    header = next((tmp_path / "out" / "revert").glob("*.header"))
    header.write_bytes(b"{")
    with pytest.raises(UserError, match=rf"{header.name} must be as `circuitune export` wrote"):
        revert(tmp_path / "out", tmp_path / "back")
    record.write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"has no places"):
        revert(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()


# ------------------------------------------------------------------------------------- refusals


@pytest.fixture
def small_files() -> Iterator[None]:
    """A limit of 8 KiB on every file that is written, as a full disk would set."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("act", [merge, export_lora])
def test_full_disk_leaves_nothing(
    made: Made, tmp_path: Path, act: Callable[[Path, Path], object], request: pytest.FixtureRequest
) -> None:
    delta = made()[1]
    request.getfixturevalue("small_files")
    with pytest.raises(UserError, match=r"on a disk with room, .*/out could not be written"):
        act(delta, tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_told_before_anything_is_written(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    monkeypatch.setattr(shutil, "copyfile", None)
    with pytest.raises(UserError, match=r"could not be written \(\d\.\d\d GB are needed\)"):
        merge(made()[1], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_interrupted_merge_leaves_nothing(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("circuitune.merging.write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        merge(made()[1], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_folder_that_holds_something_is_left_alone(made: Made, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    merge(made()[1], tmp_path / "out")  # empty: fine
    before = contents(tmp_path)
    for act in (merge, export_lora):
        with pytest.raises(UserError, match="must be a new or an empty folder"):
            act(made()[1], tmp_path / "out")
    assert contents(tmp_path) == before


def test_quantised_tensor_is_refused(made: Made, tmp_path: Path) -> None:
    base = Path(shutil.copytree(made()[0], tmp_path / "base"))
    change_shard(base, OUT, lambda tensors: tensors.update({OUT: tensors[OUT].to(torch.int8)}))
    with pytest.raises(UserError, match=rf"plain floating-point numbers, {OUT} in .* type I8;"):
        merge(made()[1], tmp_path / "out", base=str(base))


# -------------------------------------------------------------------------------- files as bytes


def test_widened_header_is_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3, dtype=torch.bfloat16), "a": torch.ones(2, 2), "c": torch.ones(1)}
    save_file(tensors, tmp_path / "narrow")
    header = widened_header(TensorFile.of(tmp_path / "narrow").header)
    tensorfiles.rewrite(TensorFile.of(tmp_path / "narrow"), tmp_path / "wide", header, {})
    found = load_file(tmp_path / "wide")
    assert {name: value.dtype for name, value in found.items()} == dict.fromkeys(
        "abc", torch.float32
    )
    assert all(found[name].equal(value.float()) for name, value in tensors.items())
    assert len(header) % 8 == 0


def test_every_bit_pattern_survives(tmp_path: Path) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for kind, name in ((torch.bfloat16, "BF16"), (torch.float16, "F16")):
        numbers = patterns.view(kind)
        wide = cast(tensorfiles.raw(numbers), name, "F32")
        back = torch.frombuffer(bytearray(cast(wide, "F32", name)), dtype=torch.int16)
        sound = ~numbers.isnan()
        assert back[sound].equal(patterns[sound])
    save_file({"x": patterns.view(torch.bfloat16)}, tmp_path / "a")
    save_file({"x": patterns.view(torch.bfloat16)}, tmp_path / "b")
    a, b = TensorFile.of(tmp_path / "a"), TensorFile.of(tmp_path / "b")
    assert first_difference(a, b, "x") is None  # also where numbers are nan, by their bytes


# -------------------------------------------------------------------------------- the commands


@pytest.fixture
def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    """Run a command in this process; gives exit status and the last line."""

    def call(*words: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["circuitune", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        text = shown.err if stopped.value.code else shown.out
        return int(stopped.value.code or 0), text.strip().splitlines()[-1]

    return call


def test_commands(made: Made, tmp_path: Path, command: Callable[..., tuple[int, str]]) -> None:
    base, delta = made("llama", "bfloat16")
    out = tmp_path / "out"
    status, line = command("export", delta, "--as", "merged", "--out", out)
    assert status == 0
    assert "8 tensors changed in" in line  # q, k, v, o of two layers
    status, line = command("verify", out, "--base", base, "--delta", delta)
    assert status == 0
    assert "1.0, 2.1, 2.3" in line
    assert "base + delta" in line
    assert command("verify", delta, "--base", base)[0] == 0
    assert command("revert", out, "--out", tmp_path / "back")[0] == 0
    assert contents(tmp_path / "back") == contents(base)
    status, line = command("export", delta, "--as", "lora", "--out", tmp_path / "lora")
    assert status == 0
    assert "rank up to 16" in line
    spoil(out, FREE, 0)
    status, line = command("verify", out, "--base", base)
    assert status == 2
    assert line.startswith("circuitune: Every byte outside the declared places must be")
    for words in (("--as", "onnx"), ("--as", "lora", "--dtype", "float32"), ("--dtype", "int8")):
        status, line = command("export", delta, *words, "--out", tmp_path / "no")
        assert status == 2
        assert line.startswith("circuitune: --")
        assert line.endswith(".")
    assert command("export", base, "--as", "merged", "--out", tmp_path / "no")[0] == 2
    assert not (tmp_path / "no").exists()
