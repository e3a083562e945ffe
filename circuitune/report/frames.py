"""Checked reading of parquet files: every complaint names the file and the column."""

import math
import re
from collections.abc import Collection, Mapping, Sequence

import pandas as pd

from circuitune.report.estimate import Estimate
from circuitune.report.fields import Source


def read_table(
    source: Source,
    columns: Sequence[str],
    *,
    numbers: Collection[str],
    optional: Collection[str] = (),
    fractions: Collection[str] = (),
) -> pd.DataFrame:
    """A parquet file whose columns hold what they must.

    Args:
        source: The file.
        columns: Those that must be there.
        numbers: Columns that hold a number in every row, where they are there.
        optional: Columns that hold a number or nothing.
        fractions: Columns whose numbers must lie between 0 and 1.

    Raises:
        UserError: The file cannot be read, or a column is absent or holds something else.
    """
    try:
        frame = pd.read_parquet(source.path)
    except (OSError, ValueError) as error:
        reason = re.sub(r"\s+", " ", str(error))
        raise source.fault("be a readable parquet file", f"reading failed ({reason})") from error
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise source.fault(f"have the columns {', '.join(columns)}", f"'{missing[0]}' is absent")
    for name in frame.columns if len(frame) else ():
        if name in numbers or name in optional:
            _check_numbers(source, frame[name], name in optional, name in fractions)
    return frame


def estimate(row: Mapping[str, object], name: str, low: str, high: str) -> Estimate | None:
    """The number in column `name` with the ends of its interval; None where it is missing."""
    value, *ends = (_number(row[column]) for column in (name, low, high))
    if value is None:
        return None
    return Estimate(value, *ends) if None not in ends else Estimate(value)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _check_numbers(source: Source, column: pd.Series, optional: bool, fraction: bool) -> None:
    name = column.name
    if optional and column.isna().all():
        return
    if not pd.api.types.is_numeric_dtype(column):
        raise source.fault(f"hold numbers in column '{name}'", f"found {column.dtype}")
    if not optional and column.isna().any():
        raise source.fault(f"hold a number in every row of '{name}'", "one is missing")
    if fraction and not column.dropna().between(0, 1).all():
        raise source.fault(f"hold fractions between 0 and 1 in '{name}'", "one is outside")
