"""Options from flags and YAML: right types, tuples from lists, and clear refusals."""

from dataclasses import asdict, dataclass, fields
from typing import get_args

import pytest
import yaml

from circuitune import config, picking, selection
from circuitune.config import LocateConfig, PairsConfig, TuneConfig, ValidateConfig, overrides
from circuitune.errors import UserError
from circuitune.knockout import ABLATIONS, PLACES
from circuitune.methods import METHODS
from circuitune.recipes import IMPLEMENTATION, stage_options
from circuitune.slices import Form

CLASSES = [config_class for _, config_class in IMPLEMENTATION.values()]


@pytest.mark.parametrize("config_class", CLASSES)
def test_defaults_pass_their_own_checks(config_class: type) -> None:
    assert overrides(config_class, {}) == config_class()
    assert overrides(config_class, asdict(config_class())) == config_class()


def test_values_take_the_type_of_their_field() -> None:
    tuned = overrides(TuneConfig, {"keep": 2, "tune_operators": "add", "steps": 3})
    assert tuned == TuneConfig(keep=2.0, tune_operators=("add",), steps=3)
    assert isinstance(tuned.keep, float)
    assert overrides(ValidateConfig, {"sizes": [3, 1]}).sizes == (3, 1)
    assert overrides(PairsConfig, {"prefix": None}).prefix is None
    assert overrides(PairsConfig, {"prefix": ""}).prefix == ""


def test_names_and_rates_are_taken_as_people_write_them() -> None:
    """With dashes, as flags have them; 3e-3 is text in YAML."""
    recipe = yaml.safe_load("{learning-rate: 3e-3, batch-size: 4}")
    assert overrides(TuneConfig, recipe) == TuneConfig(learning_rate=3e-3, batch_size=4)


def test_named_choices_are_those_of_the_modules() -> None:
    known = {
        "rule": selection.RULES,
        "ablations": ABLATIONS,
        "where": PLACES,
        "methods": METHODS,
        "pick": picking.RULES,
        "form": get_args(Form),
    }
    found = {item.name: item.metadata["among"] for kind in CLASSES for item in fields(kind)}
    for name, choices in known.items():
        assert set(found[name]) == set(choices), name


def test_the_given_values_are_left_alone() -> None:
    values = {"sizes": [3, 1]}
    overrides(ValidateConfig, values)
    assert values == {"sizes": [3, 1]}


@pytest.mark.parametrize(
    ("config_class", "values", "says"),
    [
        (LocateConfig, {"mots": 3}, "one of rule, most, .*, found 'mots'; write most"),
        (LocateConfig, {"most": "3"}, "most must be a whole number, found '3'; correct it"),
        (LocateConfig, {"most": 3.0}, "most must be a whole number, found 3.0; correct it"),
        (LocateConfig, {"most": True}, "most must be a whole number, found True; correct it"),
        (LocateConfig, {"most": None}, "most must be a whole number, found None; correct it"),
        (LocateConfig, {"most": 0}, "most must be at least 1, found 0; choose more"),
        (LocateConfig, {"seed": -1}, "seed must be at least 0, found -1; choose more"),
        (TuneConfig, {"keep": "much"}, "keep must be a number, found 'much'; correct it"),
        (TuneConfig, {"keep": True}, "keep must be a number, found True; correct it"),
        (TuneConfig, {"keep": -0.1}, "keep must be at least 0, found -0.1; choose more"),
        (TuneConfig, {"keep": float("nan")}, "keep must be at least 0, found nan; choose more"),
        (LocateConfig, {"race": 1}, "race must be below 1, found 1; choose less"),
        (TuneConfig, {"nothing_like_it": 1}, "An option of tune .*; correct the name"),
        (TuneConfig, {"pick": "luck"}, "pick must be one of direct, .*, found 'luck'; correct it"),
        (TuneConfig, {"methods": ["lora", "all"]}, "methods must be one of .*, found 'all'"),
        (PairsConfig, {"correct_only": 1}, "correct_only must be true or false, found 1"),
        (PairsConfig, {"pairs": 1}, "pairs must be text, found 1; correct it"),
        (ValidateConfig, {"sizes": [1, "2"]}, "one or more values, each a whole number, found"),
        (ValidateConfig, {"sizes": [True]}, "one or more values, each a whole number, found"),
        (ValidateConfig, {"sizes": []}, "one or more values, each a whole number, found"),
        (ValidateConfig, {"sizes": [2, 0]}, "sizes must be at least 1"),
    ],
)
def test_wrong_values_are_refused(config_class: type, values: dict, says: str) -> None:
    with pytest.raises(UserError, match=says.replace("[", r"\[")):
        overrides(config_class, values)


def test_a_field_of_a_new_kind_is_checked_too() -> None:
    @dataclass(frozen=True)
    class Own:
        share: float = config.option(0.5, "A share.")

    assert overrides(Own, {"share": -3}) == Own(-3.0)
    with pytest.raises(UserError, match="share must be a number"):
        overrides(Own, {"share": "half"})


def test_one_flag_speaks_to_every_stage_that_has_it() -> None:
    pairs, locate = stage_options({"seed": 4, "most": 2, "prefix": None}, "pairs", "locate")
    assert (pairs, locate) == (PairsConfig(seed=4), LocateConfig(seed=4, most=2))
