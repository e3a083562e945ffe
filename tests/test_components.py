"""Names of heads and MLPs, and what is written about chosen ones."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuitune.components import (
    Choice,
    Circuit,
    Component,
    Head,
    Mlp,
    all_components,
    check_components,
    parse_component,
)
from circuitune.errors import UserError

numbers = st.integers(0, 10_000)
parts = st.one_of(st.builds(Head, numbers, numbers), st.builds(Mlp, numbers))
finite = st.floats(allow_nan=False, allow_infinity=False)


def test_heads_and_mlps_are_printed_zero_based() -> None:
    assert str(Head(12, 3)) == "12.3"
    assert str(Mlp(7)) == "mlp.7"
    assert parse_component(" 0.11 ") == Head(0, 11)


@given(parts)
def test_parsing_inverts_printing(part: Component) -> None:
    assert parse_component(str(part)) == part


@pytest.mark.parametrize("text", ["", "12", "12.", ".3", "-1.2", "1.2.3", "mlp7", "MLP.7", "a.b"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"layer\.head .* found .*; numbers start at zero"):
        parse_component(text)


def test_all_components_go_layer_by_layer() -> None:
    names = [str(part) for part in all_components(2, 2)]
    assert names == ["0.0", "0.1", "mlp.0", "1.0", "1.1", "mlp.1"]


@given(parts, st.integers(1, 10_000), st.integers(1, 10_000))
def test_components_must_lie_in_the_model(part: Component, layers: int, heads: int) -> None:
    inside = part.layer < layers and (isinstance(part, Mlp) or part.index < heads)
    if inside:
        check_components([part], layers, heads)
    else:
        with pytest.raises(UserError, match="belongs to this model"):
            check_components([part], layers, heads)


@given(st.lists(st.builds(Choice, parts, finite, finite, finite, st.integers(1, 9))), numbers)
def test_a_circuit_survives_its_file(choices: list[Choice], size: int) -> None:
    circuit = Circuit(tuple(choices), "add", "model", {"name": "rule"}, size)
    record = json.loads(json.dumps(circuit.to_json() | {"further": "keys"}))
    assert Circuit.from_json(record) == circuit
    assert [item["id"] for item in record["components"]] == [str(c.component) for c in choices]


def test_a_circuit_keeps_its_order_and_counts_all_without_a_size() -> None:
    choices = tuple(Choice(part, -1.0, -2.0, 0.0) for part in (Head(5, 1), Mlp(2), Head(0, 3)))
    record = Circuit(choices, "add", "model").to_json()
    del record["size"], record["rule"]
    circuit = Circuit.from_json(record)
    assert circuit.components == (Head(5, 1), Mlp(2), Head(0, 3))
    assert circuit.heads == (Head(5, 1), Head(0, 3))
    assert circuit.size == 3
