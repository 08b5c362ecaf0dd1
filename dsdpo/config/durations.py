"""Lengths of time in a run's settings, read the same from YAML and from the command line."""

from __future__ import annotations

import math
import re
from datetime import timedelta
from typing import Annotated, Any

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

# Slurm's ways of writing a time limit, but for its bare number of minutes: a bare number is seconds here.
_CLOCK = re.compile(r"(?:(?P<days>\d+)-)?(?P<fields>\d+(?::\d+){0,2}(?:\.\d+)?)")
_ALLOWED = "write it as HH:MM:SS, MM:SS, D-HH:MM:SS or a number of seconds"


def read_duration(value: Any) -> Any:
    """What stands for a length of time as a timedelta: seconds, [[HH:]MM:]SS, D-HH[:MM[:SS]] or ISO 8601 (PT30S).

    A YAML 1.1 reader makes 720 of 12:00, so two fields are minutes and seconds wherever they stand. Raises
    `PydanticCustomError`; what is no number or text is left to pydantic.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return value
    seconds = _seconds(value.strip()) if isinstance(value, str) else float(value) if abs(value) < 1e15 else math.inf
    if seconds is None:
        return value  # ISO 8601, which pydantic reads
    if math.isnan(seconds):
        raise PydanticCustomError("duration", f"not a length of time; {_ALLOWED}")
    if seconds < 0:
        raise PydanticCustomError("duration", "a length of time is not negative")
    try:
        return timedelta(seconds=seconds)
    except OverflowError:
        raise PydanticCustomError("duration", "longer than can be waited for") from None


def _seconds(text: str) -> float | None:
    """The seconds that a text stands for: NaN if it is none, None for ISO 8601."""
    if re.fullmatch(r"-?P.+", text):
        return None
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text):
        return float(text)
    match = _CLOCK.fullmatch(text)
    if match is None:
        return math.nan
    fields = [float(field) for field in match["fields"].split(":")]
    if match["days"] is not None:  # from the left: hours, minutes, seconds
        hours, minutes, seconds = [*fields, 0.0, 0.0][:3]
    else:
        hours, minutes, seconds = [0.0, 0.0, *fields][-3:]
    too_large = (len(fields) > 1 and seconds >= 60) or (len(fields) > 2 and minutes >= 60)
    if too_large or (match["days"] is not None and hours >= 24):
        return math.nan
    return 86400 * float(match["days"] or 0) + 3600 * hours + 60 * minutes + seconds


def _read_positive(value: Any) -> Any:
    length = read_duration(value)
    if isinstance(length, timedelta) and not length:
        raise PydanticCustomError("duration", "a length of time above 0 is needed here")
    return length


Duration = Annotated[timedelta, BeforeValidator(read_duration)]
PositiveDuration = Annotated[timedelta, BeforeValidator(_read_positive)]
