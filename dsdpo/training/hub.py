"""Upload of a model folder to the Hugging Face Hub, only where a user asks for it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id

from dsdpo.errors import ConfigError, TrainingError


def check_hub_id(name: str, *, key: str) -> None:
    """Raise `ConfigError` unless the name could be a Hub repository's."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"{key}: {name!r} is no name of a Hub repository ({error}); give USER/NAME") from error


def push_folder(folder: Path, name: str, *, private: bool) -> str:
    """Upload a folder to a model repository, made where there is none; its address.

    Raises `TrainingError` where the Hub does not take it: the folder is whole all the same.
    """
    try:
        api = HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="Upload by dsdpo")
        return str(address)
    except Exception as error:  # whatever the Hub's client or the network below it raises
        said = " ".join(str(error).split())[:300]
        raise TrainingError(
            f"{folder} is written, but could not be uploaded to {name}: {said}; log in with hf auth login and repeat "
            f"with: hf upload {name} {folder}"
        ) from error
