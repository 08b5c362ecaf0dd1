"""What every part of a run's settings is made of."""

from __future__ import annotations

import os
import re
import types
from collections.abc import Iterable
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from dsdpo.config.shipped import shipped

NULLS = ("None", "null", "Null", "NULL", "~")
LARGEST_INT = 2**63 - 1  # what a tensor can count to


LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes that Linux takes


def path_trouble(text: str) -> str | None:
    """What makes a text no path on this machine, as the end of a sentence; None if nothing does."""
    try:
        names = os.fsencode(os.path.expanduser(text)).split(b"/")
    except UnicodeEncodeError:
        return "holds half a character, which no file name can"
    if b"\0" in b"/".join(names):
        return "holds a NUL, which no file name can"
    if not text.strip():
        return "is blank"
    if max(map(len, names)) > LONGEST_NAME or len(b"/".join(names)) > LONGEST_PATH:
        return f"is too long: a name has at most {LONGEST_NAME} bytes and a path {LONGEST_PATH}"
    if (variable := re.search(r"\$\{?[A-Za-z_]\w*\}?", text)) and not os.path.exists(text):
        return f"names the environment variable {variable[0]}, which is not filled in here"
    if text.startswith("~") and os.path.expanduser(text) == text:
        return f"names the home folder of a user that this machine does not have, {text.split('/')[0]}"
    return None


def _possible(path: str) -> str:
    if trouble := path_trouble(path):
        raise PydanticCustomError("path", "{trouble}; give another path", {"trouble": f"it {trouble}"})
    return path


def _beside_run_file(path: str, info: ValidationInfo) -> str:
    """The path as given if it exists from here, else beside the run file, else where it came with dsdpo, if at all."""
    path = os.path.expanduser(path)
    folder = (info.context or {}).get("folder")
    if os.path.exists(path):
        return path
    beside = path if folder is None else os.path.join(folder, path)
    return beside if os.path.exists(beside) else str(shipped(path) or path)


# A file or folder, or for models and data also a Hub id: so a path that is nowhere stays as it is.
PathText = Annotated[str, Field(min_length=1), AfterValidator(_possible), AfterValidator(_beside_run_file)]
# A folder that the run may make: from here, never beside the run file.
FolderText = Annotated[str, Field(min_length=1), AfterValidator(_possible), AfterValidator(os.path.expanduser)]


class Section(BaseModel):
    """Settings that belong together; unknown keys are refused and values never change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )

    @field_validator("*", mode="before", check_fields=False)
    @classmethod
    def _means_what_it_says(cls, value: Any, info: ValidationInfo) -> Any:
        """Python and YAML write null, true and numbers in more ways than pydantic keeps apart."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, str) and value in NULLS:
            if _takes(annotation, type(None)):
                return None
            raise PydanticCustomError("null", "this setting has no null; give a value or leave it out")
        if value is None and not _takes(annotation, type(None)):
            raise PydanticCustomError("null", "this setting has no null; give a value or leave it out")
        if _holds_bool(value) and not _takes(annotation, bool):
            raise PydanticCustomError("bool_as_number", "true and false are no values of this setting")
        if isinstance(value, int) and abs(value) > LARGEST_INT:
            raise PydanticCustomError("too_large", "larger than any number that a run could count to")
        return value


def _takes(annotation: Any, kind: type) -> bool:
    """True if a value of this kind may stand somewhere in the annotated type; sections look after their own."""
    if annotation is Any or annotation is kind:
        return True
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return kind is not type(None)
    inner: Iterable[Any] = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _takes(next(iter(inner)), kind)
    if kind is type(None) and get_origin(annotation) not in (Union, types.UnionType):
        return False
    return any(_takes(each, kind) for each in inner if each is not Ellipsis)


def _holds_bool(value: Any) -> bool:
    """True for a boolean, or a list or mapping with one in it."""
    if isinstance(value, dict):
        value = list(value.values())
    return any(isinstance(each, bool) for each in (value if isinstance(value, (list, tuple)) else [value]))
