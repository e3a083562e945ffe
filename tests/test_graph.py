"""Chains against plain hooks; the graph of a model whose parts are known.

The planted model answers with the first operand if there is a plus. Of its two layers of three
heads, 0.1 takes the first operand to END, 0.2 the plus; the key head 1.0 reads the operand there
by its value, and by its query whether there is a plus (if not, it looks everywhere). All other
heads read tokens too, and write where nobody reads.
"""

import json
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from circuitune.chains import Chain, Runs, Whole, chain_effects, run_contrasts
from circuitune.components import Embedding, Head, Mlp, Receiver, parse_component
from circuitune.effects import measure
from circuitune.errors import UserError
from circuitune.graph import Graph, trace
from circuitune.models import Model, wrap
from circuitune.pairs import Pair, encode
from circuitune.paths import Paths, path_effects
from circuitune.problems import Operator, enumerate_problems, templates
from tests.conftest import byte_tokenizer
from tests.planted import FLAT_NORM
from tests.reference import slow_chains
from tests.reference.slow_chains import slow_chain_logits

CANDIDATES = list(range(16, 26))
CLEAN = [[7, 1, 2, 3, 4, 5], [7, 9, 8, 7, 6, 5, 4], [7, 3, 1, 4, 1, 5]]
CORRUPT = [[7, 2, 2, 9, 4, 5], [7, 9, 1, 7, 2, 5, 4], [7, 8, 1, 4, 2, 6]]
ANSWERS = np.array([0, 4, 7])
PLACES = (((1,), (2,), (1,)), ((3, -1), (4, 5), (-1,)))
SENDERS = (Embedding(), Head(0, 1), Mlp(0), Head(1, 3), Mlp(2))
RECEIVERS = tuple(Receiver(Head(2, 1), kind) for kind in "qkv")
GIVEN = {"candidates": CANDIDATES, "answers": ANSWERS}


def both_runs(model: Model) -> list[Runs]:
    """The runs of the prompts above."""
    return run_contrasts(model, CLEAN, {"one": CORRUPT})["one"]


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("kind", ["q", "k", "v"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_chains_equal_plain_hooks(
    tiny: Callable[..., Model], family: str, kind: str, kv_heads: int
) -> None:
    model = tiny(family, num_key_value_heads=kv_heads)
    at = ((3, 4), (5,), (2, 4)) if kind != "q" else ((3, 5), (5, 6), (5,))
    then = Receiver(Head(3, 2), kind)
    chains = [Chain(SENDERS, places, one, at, then) for one in RECEIVERS for places in PLACES]
    effects = np.stack(chain_effects(model, both_runs(model), chains, **GIVEN))
    assert (np.abs(effects) > 1e-5).mean() > 0.1
    compared = 0
    for c, s, example in np.ndindex(effects.shape):
        if (c + s + example) % 5:
            continue
        own = ANSWERS[example : example + 1]
        hops = [(chains[c].receiver, chains[c].places), (then, at)]
        logits = slow_chain_logits(
            model,
            CLEAN[example],
            CORRUPT[example],
            SENDERS[s],
            [(into, [place % len(CLEAN[example]) for place in at[example]]) for into, at in hops],
        )
        plain = slow_chains.run(model, CLEAN[example], {})["logits"][0, -1]
        patched, clean = (
            measure(values[None, CANDIDATES].double().numpy(), own)["logit_diff"][0]
            for values in (logits, plain)
        )
        assert abs(effects[c, s, example] - (patched - clean)) < 1e-9
        compared += 1
    assert compared > 8


def test_a_chain_of_one_head_is_a_path(tiny: Callable[..., Model]) -> None:
    model = tiny("llama")
    roles = {"early": PLACES[0], "late": PLACES[1]}
    paths = path_effects(model, CLEAN, CORRUPT, Paths(RECEIVERS, SENDERS, roles), **GIVEN)
    chains = [Chain(SENDERS, places, one) for one in RECEIVERS for places in PLACES]
    found = chain_effects(model, both_runs(model), chains, **GIVEN)
    expected = paths.effect().reshape(len(chains), len(SENDERS), -1)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_the_only_sender_is_the_whole_of_what_arrives(tiny: Callable[..., Model]) -> None:
    """Below layer 0 there is the embedding alone."""
    model = tiny("llama")
    receivers = [Receiver(Head(0, 1), kind) for kind in "qkv"]
    senders = (Embedding(), Whole(), Mlp(3))
    chains = [Chain(senders, places, one) for one in receivers for places in PLACES]
    effects = np.stack(chain_effects(model, both_runs(model), chains, **GIVEN))
    assert np.abs(effects).max() > 1e-3
    np.testing.assert_allclose(effects[:, 0], effects[:, 1], atol=1e-12)
    assert np.abs(effects[:, 2]).max() < 1e-12  # it lies above


def test_batches_change_nothing(
    tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, then = tiny("llama"), Receiver(Head(3, 2), "v")
    chains = [Chain(SENDERS, PLACES[0], one, PLACES[1], then) for one in RECEIVERS]
    chains += [Chain(SENDERS[::-1], PLACES[1], Receiver(Head(1, 1), "v"))]
    whole = chain_effects(model, both_runs(model), chains, **GIVEN)
    monkeypatch.setattr("circuitune.chains.ATTENTION_TOKENS", 1)
    monkeypatch.setattr("circuitune.chains.STATE_NUMBERS", 1)
    monkeypatch.setattr("circuitune.chains.PROMPTS_PER_RUN", 1)
    parts = chain_effects(model, both_runs(model), chains[::-1], **GIVEN)
    for one, other in zip(whole, parts[::-1], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-10)


# ------------------------------------------------------------------------------ planted model

OPERAND, PLUS, ANSWER, NOWHERE, CONST = (
    slice(258, 268),
    slice(268, 269),
    slice(269, 279),
    slice(279, 287),
    slice(287, 288),
)
WIDTH, D_HEAD, SHARP = 288, 24, 12.0
KEY, CARRIES_OPERAND, CARRIES_PLUS = Head(1, 0), Head(0, 1), Head(0, 2)


def _planted() -> Model:
    tokenizer = byte_tokenizer()
    digits = [tokenizer(str(digit)).input_ids[0] for digit in range(10)]
    plus = tokenizer("+").input_ids[0]
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=WIDTH,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=D_HEAD,
        tie_word_embeddings=False,
        rms_norm_eps=FLAT_NORM**2,
    )
    hf = LlamaForCausalLM(config).double()
    turns = hf.model.rotary_emb.inv_freq.double()

    def look_back(layer: int, index: int, distance: int, source: slice, strength: float) -> None:
        """Attend to the token so many places before, if `source` is in the residual stream."""
        rows = slice(index * D_HEAD, (index + 1) * D_HEAD)
        attention = hf.model.layers[layer].self_attn
        angle = turns * distance
        attention.q_proj.weight[rows, source] = (
            strength * torch.cat([angle.cos(), -angle.sin()])[:, None]
        )
        attention.k_proj.weight[rows, CONST] = torch.cat([torch.ones_like(angle), 0 * angle])[
            :, None
        ]

    def carry(layer: int, index: int, read: list[int], write: slice, sizes: torch.Tensor) -> None:
        """Copy what is at some directions of the residual stream to others."""
        attention, start = hf.model.layers[layer].self_attn, index * D_HEAD
        for row, (place, size) in enumerate(zip(read, sizes, strict=True)):
            attention.v_proj.weight[start + row, place] = size
            attention.o_proj.weight[write.start + row, start + row] = 1.0

    sizes = 1 + 0.1 * torch.arange(10).double()  # so that effects differ between prompts
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            parameter.fill_(FLAT_NORM if "norm" in name else 0.0)
        hf.model.embed_tokens.weight[:, :258] = torch.eye(258)
        hf.model.embed_tokens.weight[:, CONST] = 1.0
        hf.lm_head.weight[digits, ANSWER] = 4 * torch.eye(10).double()
        look_back(0, CARRIES_OPERAND.index, 7, CONST, SHARP)
        carry(0, CARRIES_OPERAND.index, digits, OPERAND, sizes)
        look_back(0, CARRIES_PLUS.index, 5, CONST, SHARP)
        carry(0, CARRIES_PLUS.index, [plus], PLUS, torch.ones(1))
        look_back(1, KEY.index, 0, PLUS, SHARP)
        carry(1, KEY.index, list(range(OPERAND.start, OPERAND.stop)), ANSWER, sizes.flip(0))
        for layer, index in ((0, 0), (1, 1), (1, 2)):
            carry(layer, index, digits[:8], NOWHERE, sizes[:8])
    return wrap(hf, tokenizer, source="planted")


def planted_pairs() -> list[Pair]:
    """All sums up to nine as `a + b = `, half of the operand pairs for each half."""
    template = templates(Operator.ADD)[0]
    pairs = []
    for problem in enumerate_problems(Operator.ADD, low=1, high=9, max_answer=9):
        clean, corrupt = template.render(problem)
        split = "select" if (problem.a * problem.b + problem.a + problem.b) % 2 else "test"
        pairs.append(Pair(clean, corrupt, str(problem.a), "add", template.id, split, problem.group))
    return pairs


@pytest.fixture(scope="module")
def planted() -> Graph:
    """The graph of the planted model."""
    answers = [str(digit) for digit in range(10)]
    return trace(_planted(), planted_pairs(), [KEY], answers=answers, rng=np.random.default_rng(0))


def test_the_planted_heads_are_named_with_what_they_bring(planted: Graph) -> None:
    assert {str(node.part): (node.brings, node.passes_on) for node in planted.nodes} == {
        "0.1": ((), ("operand 1",)),
        "0.2": ((), ("operator",)),
        "1.0": (("operand 1", "operator"), ()),
    }
    assert [str(node.part) for node in planted.nodes if node.key] == ["1.0"]


def test_planted_edges_are_clear_of_zero_and_nothing_else_is_found(planted: Graph) -> None:
    found = {
        (str(e.sender), e.way.role, str(e.way.receiver), e.way.contrast, str(e.way.then)): e.effect
        for e in planted.edges
    }
    assert set(found) == {
        ("0.1", "end", "1.0.v", "operand 1", "None"),
        ("embed", "operand 1", "0.1.v", "operand 1", "1.0.v"),
        ("0.2", "end", "1.0.q", "operator", "None"),
        ("embed", "operator", "0.2.v", "operator", "1.0.q"),
    }
    for effect in found.values():
        assert effect.low < effect.estimate < effect.high < 0
        assert effect.p_adjusted < 1e-3
        assert effect.share == pytest.approx(1.0, abs=0.05)


def test_values_per_example_give_the_numbers_of_the_graph(planted: Graph) -> None:
    values = planted.values
    assert set(values["stage"]) == {"direct", "door", "edge"}
    tested = values[values["split"] == "test"]
    pairs = planted_pairs()
    assert all(pairs[place].split == "test" for place in tested["example"].unique())
    for edge in (*planted.edges, *planted.doors):
        record = edge.to_json()
        own = tested[tested["stage"] == ("door" if record["sender"] == "all" else "edge")]
        for name in ("sender", "role", "receiver", "contrast", "at", "then"):
            wanted = record[name]
            own = own[own[name].isna() if wanted is None else own[name] == wanted]
        assert len(own) == planted.facts["prompts"]
        assert own["effect"].mean() == pytest.approx(record["estimate"], abs=1e-12)
    for node in planted.nodes:
        for name, effect in node.effects.items():
            own = tested[(tested["stage"] == "direct") & (tested["sender"] == str(node.part))]
            mean = own[own["contrast"] == name]["effect"].mean()
            assert mean == pytest.approx(effect.estimate, abs=1e-12)


def test_the_record_is_plain_and_says_what_it_rests_on(planted: Graph) -> None:
    record = json.loads(json.dumps(planted.to_json(), allow_nan=False))
    assert record["contrasts"] == ["operand 1", "operator", "operand 2"]
    assert record["totals"]["operand 1"] < 0
    assert abs(record["totals"]["operand 2"]) < 0.01 * abs(record["totals"]["operand 1"])
    assert record["given"] == 36
    assert record["dropped"]
    assert record["groups"] <= record["prompts"] <= 32
    assert record["tests"]["edges"] >= len(record["edges"])
    chain = next(edge for edge in record["edges"] if edge["receiver"] == "0.2.v")
    assert (chain["at"], chain["then"]) == ("end", "1.0.q")


def own_pairs(count: int, groups: int) -> list[Pair]:
    """A user's pairs of words, without a template."""
    return [
        Pair(
            f"{chr(97 + n % 26)}{n % 7}x{n % 5} ",
            f"{chr(97 + n % 26)}{(n + 3) % 7}y{n % 5} ",
            str(n % 7),
            "mine",
            "own",
            ("select", "test")[n % 2],
            f"{n % 2}-{n % groups}",
        )
        for n in range(count)
    ]


def test_own_pairs_have_one_contrast(tiny: Callable[..., Model]) -> None:
    model, heads, given = tiny("llama"), [Head(3, 1), Head(2, 0)], {"draws": 100, "prompts": 12}
    graph, again = (
        trace(model, own_pairs(48, 11), heads, rng=np.random.default_rng(0), **given)
        for _ in range(2)
    )
    assert graph.contrasts == ("changed",)
    assert graph.facts["prompts"] == 12
    assert {str(node.part) for node in graph.nodes if node.key} == {"3.1", "2.0"}
    roles = set(graph.values[graph.values["effect"] != 0]["role"])
    assert roles == {"changed", "after", "end"}  # before the change, nothing differs
    assert again.to_json() == graph.to_json()
    pd.testing.assert_frame_equal(again.values, graph.values)


def test_an_edge_of_the_graph_equals_plain_hooks(tiny: Callable[..., Model]) -> None:
    """From the pairs to the number, with places and runs found anew by the reference."""
    model, pairs = tiny("llama"), own_pairs(48, 11)
    graph = trace(model, pairs, [Head(3, 1)], rng=np.random.default_rng(0), draws=100, prompts=8)
    values = graph.values
    paths = values[(values["stage"] == "edge") & values["then"].isna() & (values["effect"] != 0)]
    encoded = encode(model.tokenizer, pairs)
    for _, row in paths.sample(6, random_state=1).iterrows():
        clean, corrupt = encoded.clean[row["example"]], encoded.corrupt[row["example"]]
        head, _, kind = row["receiver"].rpartition(".")
        sender = Embedding() if row["sender"] == "embed" else parse_component(row["sender"])
        differs = [i for i in range(len(clean)) if clean[i] != corrupt[i]]
        last = len(clean) - 1
        places = {"changed": differs, "end": [last]}.get(row["role"])
        places = places or [i for i in range(differs[0], last) if i not in differs]
        hop = (Receiver(parse_component(head), kind), places)
        logits = slow_chain_logits(model, clean, corrupt, sender, [hop])
        plain = slow_chains.run(model, clean, {})["logits"][0, -1]
        own = encoded.answers[[row["example"]]]
        choice = list(encoded.candidates)
        after, before = (
            measure(values[None, choice].double().numpy(), own)["logit_diff"][0]
            for values in (logits, plain)
        )
        assert row["effect"] == pytest.approx(after - before, abs=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": []}, "at least one key head, found none"),
        ({"heads": [Head(4, 0)]}, "found 4.0"),
        ({"pairs": own_pairs(48, 11)[::2]}, "two groups in each half, found 0 of 0 in test"),
        ({"pairs": own_pairs(48, 1)}, "two groups in each half"),
    ],
)
def test_what_cannot_be_traced_is_refused(
    tiny: Callable[..., Model], change: dict[str, object], message: str
) -> None:
    given = {"pairs": own_pairs(48, 11), "heads": [Head(3, 1)]} | change
    with pytest.raises(UserError, match=message):
        trace(tiny("llama"), given["pairs"], given["heads"], rng=np.random.default_rng(0))


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        (Chain((Mlp(9),), PLACES[0], RECEIVERS[0]), "found mlp.9"),
        (Chain((Mlp(0),), PLACES[0], Receiver(Mlp(2), "in")), "found mlp.2.in"),
        (Chain((Mlp(0),), PLACES[0], Receiver(Head(9, 0), "q")), "found 9.0"),
    ],
)
def test_chains_that_do_not_exist_are_refused(
    tiny: Callable[..., Model], chain: Chain, message: str
) -> None:
    model = tiny("llama")
    with pytest.raises(UserError, match=message):
        chain_effects(model, both_runs(model), [chain], **GIVEN)


def test_prompts_of_other_lengths_are_refused(tiny: Callable[..., Model]) -> None:
    with pytest.raises(UserError, match="as many tokens"):
        run_contrasts(tiny("llama"), CLEAN, {"one": [tokens[1:] for tokens in CORRUPT]})
