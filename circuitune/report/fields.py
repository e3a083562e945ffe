"""Typed reading of JSON: every complaint names the file, the field and the command that helps."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from circuitune.errors import UserError
from circuitune.report.estimate import Estimate

COMPONENT = re.compile(r"(?P<layer>\d+)\.(?P<head>\d+)|mlp\.(?P<mlp>\d+)")
_T = TypeVar("_T")
_KINDS = {str: "a text", int: "a whole number", dict: "an object", list: "a list"}


@dataclass(frozen=True)
class Source:
    """A file of the run directory, and the command that writes it anew.

    Attributes:
        path: The file.
        command: A command line to recommend when the file is broken.
    """

    path: Path
    command: str

    def fault(self, must: str, found: str) -> UserError:
        """The error "PATH must ..., but found ...; run `...` again"."""
        return UserError(f"{self.path} must {must}, but {found}; run `{self.command}` again.")

    def text(self) -> str:
        """The whole file as UTF-8 text.

        Raises:
            UserError: The file cannot be read.
        """
        try:
            return self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise self.fault("be readable UTF-8 text", f"reading it failed ({error})") from error

    def parse(self, text: str, where: str = "it") -> object:
        """`text` as JSON; `where` names it in the error.

        Raises:
            UserError: It is not JSON.
        """
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise self.fault("be JSON", f"{where} is not ({error})") from error

    def item(self, value: object, name: str = "it") -> "Item":
        """A JSON object of this file, for reading its fields; `name` says where it stands."""
        if not isinstance(value, dict):
            raise self.fault(f"hold an object as {name}", f"found {_shown(value)}")
        return Item(self, name, value)


@dataclass(frozen=True)
class Item:
    """One JSON object of a file. Every reader raises `UserError` when the field is wrong."""

    source: Source
    name: str
    values: Mapping[str, object]

    def text(self, key: str) -> str:
        """A text field."""
        return self._typed(key, str)

    def count(self, key: str) -> int:
        """A whole number, at least 0."""
        value = self._typed(key, int)
        if isinstance(value, bool) or value < 0:
            raise self._fault(key, "a whole number of at least 0", value)
        return value

    def number(self, key: str) -> float:
        """A finite number."""
        value = self._get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._fault(key, "a number", value)
        if not math.isfinite(value):
            raise self._fault(key, "a finite number", value)
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A number, or None where the field is absent, null or not finite."""
        value = self.values.get(key)
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return None
        return self.number(key)

    def estimate(self, key: str) -> Estimate:
        """The number `key` with `low` and `high` beside it, where they are given."""
        low, high = self.optional_number("low"), self.optional_number("high")
        if low is not None and high is not None and low > high:
            raise self._fault("low", "at most `high`", low)
        return Estimate(self.number(key), low, high)

    def triple(self, key: str) -> Estimate:
        """A list of a number and the ends of its interval; ends may be null or not finite."""
        values = self.sequence(key)
        if len(values) != 3:
            raise self._fault(key, "a number and the ends of its interval", values)
        names = ("value", "low", "high")
        given = dict(zip(names, values, strict=True))
        return Item(self.source, self._path(key), given).estimate("value")

    def fraction(self, key: str) -> Estimate:
        """An estimate between 0 and 1."""
        estimate = self.estimate(key)
        if not 0 <= estimate.value <= 1:
            raise self._fault(key, "a fraction between 0 and 1", estimate.value)
        return estimate

    def component(self, key: str) -> str:
        """A component such as `12.3` or `mlp.7`."""
        return self._as_component(self._get(key), key)

    def components(self, key: str) -> tuple[str, ...]:
        """A list of components."""
        return tuple(self._as_component(value, key) for value in self.sequence(key))

    def sequence(self, key: str) -> Sequence[object]:
        """A list of anything."""
        return self._typed(key, list)

    def mapping(self, key: str) -> Mapping[str, object]:
        """An object of anything."""
        return self._typed(key, dict)

    def child(self, key: str) -> "Item":
        """The object in field `key`."""
        return self.source.item(self._get(key), self._path(key))

    def children(self, key: str) -> tuple["Item", ...]:
        """The objects of the list in field `key`."""
        return tuple(
            self.source.item(value, self._path(key, f"[{index}]"))
            for index, value in enumerate(self.sequence(key))
        )

    def named(self, key: str) -> Mapping[str, "Item"]:
        """The objects of the object in field `key`, by name."""
        return {
            str(name): self.source.item(value, f"{self._path(key)}.{name}")
            for name, value in self.mapping(key).items()
        }

    def _get(self, key: str) -> object:
        if key not in self.values:
            held = ", ".join(f"'{name}'" for name in self.values) or "nothing"
            raise self.source.fault(f"hold '{key}' in {self.name}", f"found only {held}")
        return self.values[key]

    def _typed(self, key: str, kind: type[_T]) -> _T:
        value = self._get(key)
        if not isinstance(value, kind):
            raise self._fault(key, _KINDS[kind], value)
        return value

    def _as_component(self, value: object, key: str) -> str:
        if not isinstance(value, str) or COMPONENT.fullmatch(value) is None:
            raise self._fault(key, "components like '12.3' or 'mlp.7'", value)
        return value

    def _fault(self, key: str, must: str, value: object) -> UserError:
        return self.source.fault(f"hold {must} as {self._path(key)}", f"found {_shown(value)}")

    def _path(self, key: str, place: str = "") -> str:
        return f"'{key}'{place}" if self.name == "it" else f"'{key}'{place} of {self.name}"


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."
