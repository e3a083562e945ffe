"""Path effects of every architecture against plain hooks: fused, shared, parallel, expert."""

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from circuitune.components import Embedding, Head, Mlp, Receiver, Sender, all_components
from circuitune.effects import PathTable, measure
from circuitune.errors import UserError
from circuitune.models import Model, wrap
from circuitune.paths import Paths, path_effects
from tests.conftest import byte_tokenizer, tiny_hf
from tests.reference.slow_paths import slow_path_logits
from tests.test_families import CASES, make

CANDIDATES = list(range(16, 26))
RECEIVERS = (
    Receiver(Head(1, 1), "q"),
    *(Receiver(Head(2, 3), kind) for kind in "qkv"),
    *(Receiver(Mlp(layer), "in") for layer in (0, 2)),
)
ROLES = {"operands": [[1, 3], [2]], "rest": [[2, 4, -1], [-2, -1]]}
ANSWERS = np.array([3, 7])


def pairs() -> tuple[list[list[int]], list[list[int]]]:
    """Two random pairs that differ from the second token on, longer than the windows."""
    rng = random.Random(5)
    clean = [[rng.randrange(256) for _ in range(length)] for length in (6, 8)]
    return clean, [[tokens[0], *(255 - token for token in tokens[1:])] for tokens in clean]


def effects(model: Model, paths: Paths) -> PathTable:
    return path_effects(model, *pairs(), paths, candidates=CANDIDATES, answers=ANSWERS)


def slow(
    model: Model, paths: Paths, role: str, path: tuple[Sender, Receiver], example: int
) -> dict[str, np.ndarray]:
    """Every metric of one path by the reference."""
    one, other = (prompts[example] for prompts in pairs())
    read: Sequence[int] = []
    if isinstance(path[1].part, Head):
        share = model.heads // model.kv_heads if path[1].kind in ("k", "v") else 1
        group = path[1].part.index // share * share
        read = range(group, group + share) if paths.kv == "group" else [path[1].part.index]
    places = [place % len(one) for place in paths.roles[role][example]]
    logits = slow_path_logits(model, one, other, *path, places=places, read=read)
    return measure(logits[None, CANDIDATES].double().numpy(), ANSWERS[example : example + 1])


def check(model: Model, paths: Paths, *, seed: int) -> None:
    """One path into each receiver from each kind of sender equals the reference."""
    table, rng = effects(model, paths), random.Random(seed)
    assert table.effect()[:, :, 0].any(axis=(1, 2)).all(), "the embeddings reach all receivers"
    for r, receiver in enumerate(table.receivers):
        for kind in (Embedding, Head, Mlp):
            rows = np.argwhere(np.abs(table.effect()[r]) > 1e-7).tolist()
            rows = [row for row in rows if isinstance(table.senders[row[1]], kind)]
            assert rows or receiver.layer == 0, (receiver, kind)
            for p, s, example in rng.sample(rows, min(len(rows), 1)):
                path = table.senders[s], receiver
                for metric, value in slow(model, paths, table.roles[p], path, example).items():
                    found = table.patched[metric][r, p, s, example]
                    assert abs(found - value[0]) < 1e-9, (path, metric)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and softmax of most models round to float32; here they keep float64."""
    monkeypatch.setattr(torch, "float32", torch.float64)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("exact")
def test_fast_equals_slow(case: str) -> None:
    model = make(case)
    check(model, Paths(RECEIVERS, roles=ROLES), seed=len(case))
    if model.family.fused and model.kv_heads < model.heads:  # others in test_paths.py
        shared = [receiver for receiver in RECEIVERS if receiver.kind in ("k", "v")]
        check(model, Paths(shared, roles=ROLES, kv="group"), seed=len(case))


def test_every_fused_layout_is_tried() -> None:
    """One key-value head, as many as heads, and between; side by side and head by head."""
    found = {
        (model.family.layout, model.kv_heads) for model in map(make, CASES) if model.family.fused
    }
    assert found == {(layout, heads) for layout in ("stacked", "grouped") for heads in (2, 4)} | {
        ("grouped", 1)
    }


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        ("neox, parallel", {"layout": "stacked"}),
        ("gpt2", {"layout": "grouped"}),
        ("falcon, new", {"layout": "stacked"}),
        ("olmo2", {"qkv": None}),
        ("phi3, windows", {"layout": None}),
        ("llama", {"key": "self_attn.o_proj"}),
        ("llama", {"qkv": ("self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj")}),
    ],
)
def test_a_record_that_is_not_known_to_fit_must_show_it(case: str, wrong: dict[str, str]) -> None:
    """A change of a head's query, key or value must move this head (its group) and no other."""
    model = make(case)
    guess = replace(model, family=replace(model.family, proven=False))
    receivers = [Receiver(Head(1, 2), "q"), Receiver(Head(1, 2), "k"), Receiver(Mlp(1), "in")]
    expected = effects(model, Paths(receivers)).effect()
    np.testing.assert_array_equal(effects(guess, Paths(receivers)).effect(), expected)
    broken = replace(guess, family=replace(guess.family, **wrong))
    with pytest.raises(UserError, match=r"in an unknown way; measure .* paths into MLPs"):
        effects(broken, Paths(receivers))
    assert effects(broken, Paths(receivers[2:])).effect().any()


@pytest.mark.parametrize("family", ["starcoder2", "cohere", "olmo3", "persimmon"])
@pytest.mark.usefixtures("exact")
def test_an_unknown_architecture(family: str) -> None:
    """Either its heads are apart, or paths into them are refused; into MLPs they are exact."""
    sizes = {"hidden_size": 32} if family == "persimmon" else {}
    hf = tiny_hf(family, num_hidden_layers=3, pad_token_id=0, **sizes)
    model = wrap(hf, byte_tokenizer(), source=family)
    if family in ("olmo3", "persimmon"):
        with pytest.raises(UserError, match=rf"{family} \(type {family}\) keeps them"):
            effects(model, Paths(RECEIVERS))
    else:
        check(model, Paths(RECEIVERS, roles=ROLES), seed=0)
    check(model, Paths(RECEIVERS[-2:], roles=ROLES), seed=0)


@pytest.mark.parametrize(
    ("case", "parallel"),
    [
        ("neox, parallel", True),
        ("neox, sequential", False),
        ("gptj", True),
        ("falcon, new", True),
        ("falcon, sequential", False),
        ("olmo2", False),
    ],
)
def test_heads_feed_the_mlp_of_their_layer_unless_parallel(case: str, parallel: bool) -> None:
    model = make(case)
    paths = Paths([Receiver(Mlp(1), "in")], all_components(3, 4), ROLES)
    table = effects(model, paths)
    for row, part in enumerate(table.senders):
        below = part.layer < 1 or (part.layer == 1 and isinstance(part, Head) and not parallel)
        assert table.effect()[0, 1, row].all() == below, str(part)
        assert not table.effect()[0, 0, row].any()  # the role does not hold END
        if part == Head(1, 0):
            value = slow(model, paths, "rest", (part, table.receivers[0]), 0)["logit_diff"][0]
            assert (abs(value - table.clean["logit_diff"][0]) > 1e-6) == below
    top = effects(model, Paths(paths.receivers))
    assert top.senders == (Embedding(), *all_components(1, 4), *(Head(1, at) for at in range(4)))


@pytest.mark.parametrize("receiver", [Receiver(Mlp(1), "q"), Receiver(Head(1, 1), "in")])
def test_names_that_do_not_fit_are_refused(receiver: Receiver) -> None:
    with pytest.raises(UserError, match=f"found {receiver.kind!r} of {receiver.part}"):
        effects(make("llama"), Paths([receiver]))


def test_names() -> None:
    assert [str(receiver) for receiver in RECEIVERS[3:]] == ["2.3.v", "mlp.0.in", "mlp.2.in"]
    assert [receiver.layer for receiver in RECEIVERS] == [1, 2, 2, 2, 0, 2]
