"""Path effects against plain hooks one path at a time, and identities that must hold.

All architectures are compared in test_path_families.py.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from circuitune.components import Embedding, Head, Mlp, Receiver, Sender, all_components
from circuitune.effects import METRICS, measure
from circuitune.errors import UserError
from circuitune.models import Model, wrap
from circuitune.patching import direct_effects, end_states, prefill
from circuitune.paths import Paths, path_effects
from circuitune.sites import attend, record
from tests.conftest import byte_tokenizer, tiny_hf
from tests.planted import CARRIERS, build
from tests.reference.slow_paths import slow_path_logits

CANDIDATES = list(range(16, 26))
WINDOWS = {
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
CASES: dict[str, dict[str, object]] = {
    "llama": {"attention_bias": True},
    "qwen3": {},
    "gemma3_text": WINDOWS | {"query_pre_attn_scalar": 5},
}
RECEIVERS = tuple(
    Receiver(head, kind) for head in (Head(1, 2), Head(3, 1), Head(3, 3)) for kind in "qkv"
)
MLPS = tuple(Receiver(Mlp(layer), "in") for layer in (0, 3))
LENGTHS = (6, 8, 6, 7)
# Ragged, in two places for one, and empty for one.
ROLES = {"operands": [[1, 3], [2], [], [-3]], "last": [[-1]] * 4}


def pairs(seed: int, lengths: tuple[int, ...] = LENGTHS) -> tuple[list[list[int]], list[list[int]]]:
    """Random clean and corrupt prompts; the first token is common, the second never is."""
    rng = random.Random(seed)
    clean = [[rng.randrange(256) for _ in range(length)] for length in lengths]
    return clean, [
        [*tokens[:1], (tokens[1] + 1) % 256]
        + [rng.choice([token, rng.randrange(256)]) for token in tokens[2:]]
        for tokens in clean
    ]


def options(paths: Paths, seed: int = 0) -> tuple[list[list[int]], list[list[int]], Paths, dict]:
    """Prompts and the other arguments of `path_effects`."""
    answers = np.arange(len(LENGTHS)) % len(CANDIDATES)
    return *pairs(seed), paths, {"candidates": CANDIDATES, "answers": answers}


def slow(
    model: Model, paths: Paths, example: int, role: str, path: tuple[Sender, Receiver]
) -> dict[str, float]:
    """Every metric of one path by the reference."""
    clean, corrupt, _, others = options(paths)
    share = model.heads // model.kv_heads
    heads: Sequence[int] = []
    if isinstance(path[1].part, Head):
        start = path[1].part.index // share * share
        group = paths.kv == "group" and path[1].kind != "q"
        heads = range(start, start + share) if group else [path[1].part.index]
    places = [place % len(clean[example]) for place in paths.roles[role][example]]
    logits = slow_path_logits(
        model, clean[example], corrupt[example], *path, places=places, read=heads
    )
    values = measure(
        logits[None, CANDIDATES].double().numpy(), others["answers"][example : example + 1]
    )
    return {metric: float(value[0]) for metric, value in values.items()}


@pytest.mark.parametrize(
    ("family", "kv_heads", "kv"),
    [
        ("llama", 4, "head"),
        ("llama", 2, "group"),
        ("qwen3", 2, "head"),
        ("gemma3_text", 1, "group"),
    ],
)
def test_fast_equals_slow(tiny: Callable[..., Model], family: str, kv_heads: int, kv: str) -> None:
    model = tiny(family, num_key_value_heads=kv_heads, **CASES[family])
    paths = Paths(RECEIVERS, roles=ROLES, kv=kv)
    *given, others = options(paths)
    table = path_effects(model, *given, **others)
    assert table.senders == (Embedding(), *all_components(3, model.heads))
    assert all(table.patched[metric].shape == (9, 2, 16, 4) for metric in METRICS)
    effects = np.abs(table.effect())
    assert (effects > 1e-3).mean() > 0.2  # what is compared is not nothing
    filled = np.argwhere(effects != 0).tolist()
    for r, p, s, example in random.Random(kv_heads).sample(filled, 9):
        path = table.senders[s], table.receivers[r]
        for metric, value in slow(model, paths, example, table.roles[p], path).items():
            assert abs(table.patched[metric][r, p, s, example] - value) < 1e-9, (path, metric)


def test_what_cannot_be_reached_is_exactly_unchanged(tiny: Callable[..., Model]) -> None:
    """The same level and later, a query behind END, a role that does not occur: zero, both ways."""
    model = tiny("qwen3")
    paths = Paths((*RECEIVERS, *MLPS), all_components(model.layers, model.heads), ROLES)
    *given, others = options(paths)
    table = path_effects(model, *given, **others)
    effects = table.effect()
    checked = 0
    for r, receiver in enumerate(table.receivers):
        for p, role in enumerate(table.roles):
            for s, sender in enumerate(table.senders):
                mlp = receiver.kind == "in" and isinstance(sender, Head)
                blocked = sender.layer >= receiver.layer + mlp
                blocked |= receiver.kind in ("q", "in") and role == "operands"
                for example in range(len(LENGTHS)):
                    none = blocked or not ROLES[role][example]
                    assert (effects[r, p, s, example] == 0) == none
                    if none and checked % 40 == 0:
                        path = sender, receiver
                        value = slow(model, paths, example, role, path)["logit_diff"]
                        assert abs(value - table.clean["logit_diff"][example]) < 1e-12
                    checked += none


def test_clean_into_clean_is_exactly_nothing(tiny: Callable[..., Model]) -> None:
    clean, _, paths, others = options(Paths((*RECEIVERS, *MLPS)))
    table = path_effects(tiny("llama"), clean, clean, paths, **others)
    assert all((table.effect(metric) == 0).all() for metric in METRICS)


def test_a_patch_of_the_same_value_is_nothing(tiny: Callable[..., Model]) -> None:
    """The embedding of a token that does not differ goes the whole way and changes nothing."""
    clean, corrupt, _, others = options(Paths(RECEIVERS))
    corrupt = [[one[0], one[1] + 1, *one[2:]] for one in clean]
    paths = Paths(RECEIVERS, [Embedding()], {"same": [[2, 3, -1]] * 4, "other": [[1]] * 4})
    effects = path_effects(tiny("llama"), clean, corrupt, paths, **others).effect()
    keys_and_values = [row for row, receiver in enumerate(RECEIVERS) if receiver.kind != "q"]
    assert np.abs(effects[:, 0]).max() < 1e-12
    assert (np.abs(effects[keys_and_values, 1]) > 1e-6).all()


def test_low_precision_weights_leave_no_rounding() -> None:
    """All is computed in float32: a patch of the same value would else change the last bits."""
    model = wrap(tiny_hf("llama").bfloat16(), byte_tokenizer(), source="tiny bfloat16")
    clean, _, _, others = options(Paths(RECEIVERS))
    corrupt = [[one[0], one[1] + 1, *one[2:]] for one in clean]
    roles = {"same": [[2, 3, -1]] * 4, "other": [[1, -1]] * 4}
    paths = Paths((*RECEIVERS, *MLPS), [Embedding(), Mlp(0)], roles)
    effects = np.abs(path_effects(model, clean, corrupt, paths, **others).effect())
    assert effects[:, 0, 0].max() < 1e-5
    assert (effects[1:3, 1, 0] > 1e-4).all()
    assert all(weight.dtype == torch.bfloat16 for weight in model.hf.parameters())


def test_order_and_batching_change_nothing(
    tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("qwen3", num_key_value_heads=1)
    receivers = (*RECEIVERS[5:], MLPS[1])
    clean, corrupt, paths, others = options(Paths(receivers, roles=ROLES, kv="group"))
    whole = path_effects(model, clean, corrupt, paths, **others)
    monkeypatch.setattr("circuitune.paths.PROMPTS_PER_BATCH", 1)
    monkeypatch.setattr("circuitune.paths.ATTENTION_TOKENS", 1)
    monkeypatch.setattr("circuitune.patching.REPLAY_ROWS", 1)
    prompts, senders = [2, 0, 3, 1], [Mlp(2), Embedding(), Head(2, 0), Mlp(0), Head(0, 3)]
    part = path_effects(
        model,
        [clean[place] for place in prompts],
        [corrupt[place] for place in prompts],
        Paths(
            receivers[::-1],
            senders,
            {role: [ROLES[role][place] for place in prompts] for role in ("last", "operands")},
            kv="group",
        ),
        **others | {"answers": others["answers"][prompts]},
    )
    rows = [whole.senders.index(sender) for sender in senders]
    for metric in METRICS:
        expected = whole.patched[metric][::-1, ::-1][:, :, rows][..., prompts]
        np.testing.assert_allclose(part.patched[metric], expected, atol=1e-11, rtol=0)
        np.testing.assert_allclose(part.clean[metric], whole.clean[metric][prompts], atol=1e-11)


def test_by_default_a_sender_is_patched_everywhere(tiny: Callable[..., Model]) -> None:
    model = tiny("llama")
    clean, corrupt, paths, others = options(Paths(RECEIVERS))
    table = path_effects(model, clean, corrupt, paths, **others)
    roles = {"all": [list(range(len(tokens))) for tokens in clean]}
    named = path_effects(model, clean, corrupt, replace(paths, roles=roles), **others)
    assert table.roles == ("all",)
    np.testing.assert_array_equal(table.effect(), named.effect())
    queries = Paths([receiver for receiver in RECEIVERS if receiver.kind == "q"])
    alone = path_effects(model, clean, corrupt, queries, **others)  # END is enough for these
    np.testing.assert_allclose(alone.effect(), table.effect()[::3], atol=1e-12)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_shared_key_matters_to_its_group(tiny: Callable[..., Model], kv_heads: int) -> None:
    model = tiny("llama", num_key_value_heads=kv_heads)
    *given, others = options(Paths(RECEIVERS))
    alone, group = (
        path_effects(model, *given[:2], Paths(RECEIVERS, kv=kv), **others).effect()
        for kv in ("head", "group")
    )
    for row, receiver in enumerate(RECEIVERS):
        same = kv_heads == 4 or receiver.kind == "q"
        assert np.array_equal(alone[row], group[row]) == same, str(receiver)


def test_paths_of_a_planted_model() -> None:
    """Uniform attention and no MLPs: a value is all that a head reads, and it adds up."""
    planted = build(3)
    model = planted.model
    roles = {"start": [[0]], "carrier": [[1]], "noise": [[2]], "all": [[0, 1, 2]]}
    heads = [part for part in all_components(2, 4) if isinstance(part, Head)]
    table = path_effects(
        model,
        planted.clean,
        planted.corrupt,
        Paths(
            [Receiver(head, "v") for head in heads],
            roles={role: places * len(planted.clean) for role, places in roles.items()},
        ),
        candidates=CARRIERS,
        answers=planted.answers,
    )
    direct = direct_effects(
        model,
        end_states(model, prefill(model, planted.clean)),
        end_states(model, prefill(model, planted.corrupt)),
        candidates=CARRIERS,
        answers=planted.answers,
        senders=heads,
    )
    embed = table.effect()[:, :, 0].mean(axis=-1)
    for row, head in enumerate(heads):
        receiver = table.receivers[row]
        # All that feeds a head, taken one by one, is its whole direct effect (logits are linear).
        fed = table.patched["relative_logit"][row, 3] - table.clean["relative_logit"]
        whole = direct.patched["relative_logit"][row] - direct.clean["relative_logit"]
        np.testing.assert_allclose(fed.sum(axis=0), whole, atol=1e-6)
        assert (table.into(receiver, "all").effect() == 0).all() or head.layer == 1
        working = head in planted.heads
        assert (embed[row, 1] < -0.1) == working, str(head)
        if working:
            assert abs(embed[row, 2]) < 1e-6
            assert embed[row, 1] == pytest.approx(embed[row, 3], abs=1e-6)


def test_a_table_can_be_ranked_and_written(tiny: Callable[..., Model]) -> None:
    *given, others = options(Paths(RECEIVERS, roles=ROLES))
    table = path_effects(tiny("llama"), *given, **others)
    receiver = RECEIVERS[5]
    fed = table.into(receiver, "last")
    assert fed.components == all_components(3, 4)
    np.testing.assert_array_equal(fed.effect("prob"), table.effect("prob")[5, 1, 1:])
    frame = table.to_frame()
    assert len(frame) == 3 * 9 * 2 * 16 * 4
    row = frame.query("receiver == '3.1.v' and role == 'last' and metric == 'relative_logit'")
    row = row.query("sender == 'mlp.1' and example == 2").iloc[0]
    sender = table.senders.index(Mlp(1))
    assert row.patched == table.patched["relative_logit"][5, 1, sender, 2]
    assert row.effect == pytest.approx((row.patched - row.clean) / row.clean)
    assert str(receiver) == "3.1.v"
    assert str(Embedding()) == "embed"


def test_the_model_is_left_as_it_was(tiny: Callable[..., Model]) -> None:
    model = tiny("gemma3_text")
    tokens = torch.tensor(pairs(0)[0][:1])
    before = model.hf(tokens).logits
    *given, others = options(Paths(RECEIVERS))
    path_effects(model, *given, **others)
    assert all("forward" not in vars(module) for module in model.hf.modules())
    assert not any(
        [module._forward_hooks or module._forward_pre_hooks for module in model.hf.modules()]
    )
    assert torch.equal(model.hf(tokens).logits, before)


@pytest.mark.parametrize("family", list(CASES))
def test_attention_alone_is_the_attention_of_the_model(
    tiny: Callable[..., Model], family: str
) -> None:
    model = tiny(family, **CASES[family])
    tokens = torch.tensor(pairs(0, (8, 8, 8))[0])
    with record(model, where="all") as trace:
        model.trunk(input_ids=tokens, use_cache=False)
    assert trace.mlp[0].shape == (3, 8, model.d_model)
    for layer in range(model.layers):
        z = attend(model, layer, trace.entry[layer], {})
        torch.testing.assert_close(z, trace.z[layer], atol=1e-12, rtol=0)


def test_an_output_that_is_not_used_is_an_error(tiny: Callable[..., Model]) -> None:
    model = tiny("llama")
    hidden = torch.zeros(1, 3, model.d_model).double()
    with pytest.raises(RuntimeError, match=r"not: \['mlp'\]"):
        attend(model, 1, hidden, {"mlp": hidden})
    assert "forward" not in vars(model.part(1, "mlp"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corrupt": lambda own: [*own[:2], own[2][1:], own[3]]}, "pair 2 has 6 and 5"),
        ({"corrupt": lambda own: own[1:]}, "found 4 and 3"),
        ({"roles": {"operator": [[1]] * 3}}, "operator has 3"),
        ({"roles": {"operator": [[1], [2], [6], [1]]}}, r"names \[6\] in prompt 2 of 6 tokens"),
        ({"receivers": [Receiver(Head(1, 4), "q")]}, "found 1.4"),
        ({"senders": [Mlp(7)]}, "found mlp.7"),
        ({"receivers": []}, "found 0 and 4"),
    ],
)
def test_what_does_not_fit_is_refused(
    tiny: Callable[..., Model], change: dict[str, object], message: str
) -> None:
    clean, corrupt, paths, others = options(Paths(RECEIVERS))
    if alter := change.pop("corrupt", None):
        corrupt = alter(corrupt)
    with pytest.raises(UserError, match=message):
        path_effects(tiny("llama"), clean, corrupt, replace(paths, **change), **others)


def test_real_model_fast_equals_slow(smollm2: Model) -> None:
    """Paths of SmolLM2 into its strongest head and an MLP, within 1e-4 logits."""
    texts = [f"Math:\n{sum_} = " for sum_ in ("3 + 5", "4 + 2", "3 @ 5", "4 @ 2")]
    tokens = [smollm2.tokenizer(text).input_ids for text in texts]
    digits = [smollm2.tokenizer(str(digit)).input_ids[0] for digit in range(10)]
    receivers = [*(Receiver(Head(14, 2), kind) for kind in "qkv"), Receiver(Mlp(16), "in")]
    senders = [Embedding(), Head(8, 3), Mlp(10), Mlp(13)]
    roles = {"before": [list(range(len(tokens[0]) - 1))] * 2, "end": [[-1]] * 2}
    paths = Paths(receivers, senders, roles)
    table = path_effects(
        smollm2, tokens[:2], tokens[2:], paths, candidates=digits, answers=np.array([8, 6])
    )
    assert np.abs(table.effect()).max() > 0.01
    for r, p, s in [(0, 1, 1), (1, 0, 0), (1, 1, 2), (2, 0, 3), (3, 1, 1)]:
        example = s % 2
        places = [place % len(tokens[0]) for place in roles[table.roles[p]][example]]
        expected = slow_path_logits(
            smollm2,
            *(tokens[example], tokens[example + 2], senders[s], receivers[r]),
            places=places,
            read=[2],
        )
        found = table.patched["relative_logit"][r, p, s, example]
        assert abs(found - float(expected[digits][[8, 6][example]])) < 1e-4
