"""What every part of a run's settings is made of."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo


def _beside_run_file(path: str, info: ValidationInfo) -> str:
    """The path as given if it exists from here, else the same path beside the run file, else as given."""
    folder = (info.context or {}).get("folder")
    if folder is None or os.path.exists(path):
        return path
    beside = os.path.join(folder, path)
    return beside if os.path.exists(beside) else path


# A file or folder, or for models and data also a Hub id: so a path that is nowhere stays as it is.
PathText = Annotated[str, Field(min_length=1), AfterValidator(_beside_run_file)]


class Section(BaseModel):
    """Settings that belong together; unknown keys are refused and values never change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )
