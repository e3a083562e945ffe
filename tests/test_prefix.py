"""The cache of hidden states: exact, mapped from disk, and never taken for another one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from circuitune import prefix
from circuitune.errors import UserError
from circuitune.examples import IGNORED, Example
from circuitune.models import Model
from circuitune.prefix import (
    INDEX,
    STATES,
    TEXT_TOKENS,
    PrefixCache,
    build,
    cached_or_built,
    open_cache,
    own_text,
    plain_text,
    prefix_key,
    text_rows,
    training_text,
)
from circuitune.sites import states_entering

LENGTHS = (5, 17, 9, 30, 2, 11, 5)


def texts(seed: int = 0) -> list[Example]:
    """Examples of unequal length; their last token is supervised."""
    chance = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, 256, (n,), generator=chance).tolist() for n in LENGTHS]
    return [Example(row, [IGNORED] * (len(row) - 1) + row[-1:]) for row in rows]


@pytest.fixture
def cache(tiny: Callable[..., Model], tmp_path: Path) -> PrefixCache:
    """The cache of layer 2 of a tiny Llama."""
    return build(tiny(), texts(), 2, tmp_path / "cache")


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
@pytest.mark.parametrize("layer", [1, 3])
def test_states_are_those_of_each_text_alone(
    tiny: Callable[..., Model], tmp_path: Path, family: str, layer: int
) -> None:
    """Also where texts are longer than a sliding window."""
    model = tiny(family, **({"sliding_window": 4} if family == "gemma2" else {}))
    cache = build(model, texts(), layer, tmp_path / "cache")
    assert len(cache) == len(LENGTHS)
    for item, states in zip(texts(), cache, strict=True):
        alone = model.hf(torch.tensor([item.tokens[:-1]]), output_hidden_states=True)
        rounding = 1e-5 if family == "gemma2" else 1e-12  # its norm and softmax are in float32
        wanted = alone.hidden_states[layer][0]
        torch.testing.assert_close(states, wanted, rtol=0, atol=rounding)
        assert states.shape == (len(item.tokens) - 1, model.d_model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_same_batch_gives_the_same_bits(
    tiny: Callable[..., Model], tmp_path: Path, dtype: torch.dtype
) -> None:
    model = tiny()
    model.hf.to(dtype)
    rows = [item.tokens[:9] for item in texts() if len(item.tokens) >= 9]
    cache = build(model, [Example(row, row) for row in rows], 2, tmp_path / "cache")
    with torch.no_grad():
        whole = states_entering(model, 2, torch.tensor(rows)[:, :-1])
    assert all(torch.equal(states, here) for states, here in zip(cache, whole, strict=True))
    assert cache[0].dtype is dtype


def test_texts_are_views_of_one_mapped_file(cache: PrefixCache) -> None:
    storage = cache.states.untyped_storage()
    assert cache[3].untyped_storage().data_ptr() == storage.data_ptr()
    assert (cache.folder / STATES).stat().st_size == storage.nbytes()
    assert str(cache.folder / STATES) in Path("/proc/self/maps").read_text()


def test_a_second_run_finds_the_cache(
    tiny: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cached_or_built(tiny(), texts(), 2, tmp_path)
    other = cached_or_built(tiny(), texts(), 3, tmp_path)
    assert other.folder != first.folder
    monkeypatch.setattr(prefix, "_write", lambda *_: pytest.fail("it is there"))
    again = cached_or_built(tiny(), texts(), 2, tmp_path)
    assert torch.equal(again.states, first.states)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [first.folder.name, other.folder.name]
    )


def nudged(model: Model, layer: int) -> Model:
    """The model with one number of a layer changed by the least possible."""
    weight = model.layer(layer).mlp.down_proj.weight
    with torch.no_grad():
        weight[3, 7] = torch.nextafter(weight[3, 7], weight.new_tensor(9.0))
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda tiny: (nudged(tiny(), 1), texts(), 2),
        lambda tiny: (tiny(seed=1), texts(), 2),
        lambda tiny: (tiny(rms_norm_eps=1e-3), texts(), 2),
        lambda tiny: (tiny(), texts(), 3),
        lambda tiny: (tiny(), texts(1), 2),
        lambda tiny: (tiny(), texts()[::-1], 2),
    ],
    ids=["number", "weights", "config", "layer", "texts", "order"],
)
def test_a_cache_of_something_else_is_refused(
    tiny: Callable[..., Model], cache: PrefixCache, change: Callable[..., tuple]
) -> None:
    key = prefix_key(*change(tiny))
    with pytest.raises(UserError, match="must come from the same weights, layer and training"):
        open_cache(cache.folder, key)


def test_what_lies_above_does_not_matter(tiny: Callable[..., Model], cache: PrefixCache) -> None:
    relabelled = [Example(item.tokens, item.tokens) for item in texts()]
    assert prefix_key(nudged(tiny(), 2), relabelled, 2) == cache.key


def truncate(path: Path) -> None:
    """Cut the last bytes off."""
    path.write_bytes(path.read_bytes()[:-4])


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [STATES, INDEX])
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_a_damaged_cache_is_refused_and_made_anew(
    tiny: Callable[..., Model],
    tmp_path: Path,
    name: str,
    damage: Callable[[Path], None],
) -> None:
    cache = cached_or_built(tiny(), texts(), 2, tmp_path)
    states = cache.states.clone()
    damage(cache.folder / name)
    with pytest.raises(UserError, match="delete the folder"):
        open_cache(cache.folder, cache.key)
    assert torch.equal(cached_or_built(tiny(), texts(), 2, tmp_path).states, states)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tiny: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prefix, "write_json", full)
    with pytest.raises(UserError, match=r"No space left on device\); free some room"):
        build(tiny(), texts(), 2, tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_left_alone(
    tiny: Callable[..., Model], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="must be kept on disk"):
        build(tiny(), texts(), 2, tmp_path / "mine")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]


def test_the_index_says_what_the_file_is(cache: PrefixCache) -> None:
    index = json.loads((cache.folder / INDEX).read_text())
    assert (index["layer"], index["dtype"], index["width"]) == (2, "float64", 24)
    assert index["offsets"][-1] == sum(LENGTHS) - len(LENGTHS)


def test_plain_text_is_what_the_base_makes_of_it(tiny: Callable[..., Model]) -> None:
    model = tiny()
    rows = text_rows(model, training_text()[:3], own_text(model, seed=0)[:2])
    assert [len(row) for row in rows] == [TEXT_TOKENS] * len(rows)
    assert len(rows) >= 3
    text = plain_text(model, rows, 2, prefix=True)
    seen = model.hf(torch.tensor(rows), output_hidden_states=True)
    torch.testing.assert_close(text.hidden, seen.hidden_states[2], rtol=0, atol=1e-12)
    torch.testing.assert_close(text.final, seen.hidden_states[-1], rtol=0, atol=1e-12)
    assert text.head is None
    free = plain_text(model, rows, 0, prefix=False)
    assert free.hidden is None
    assert free.head.weight is not model.hf.lm_head.weight
    with pytest.raises(UserError, match="set keep to 0"):
        plain_text(model, [], 2, prefix=True)


def test_own_text_is_a_function_of_the_seed(tiny: Callable[..., Model]) -> None:
    """And of the model, not of settings that its checkpoint brings."""
    cold = tiny()
    cold.hf.generation_config = GenerationConfig(temperature=0.01, repetition_penalty=3.0)
    one, same, other = (own_text(m, seed=seed) for m, seed in ((tiny(), 0), (cold, 0), (tiny(), 1)))
    assert one == same != other
