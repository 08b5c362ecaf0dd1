"""What the screen shows: warnings of the libraries below us, one bar, and our own lines on rank 0."""

from __future__ import annotations

import logging
import os
import warnings

LIBRARIES = ("DeepSpeed", "deepspeed", "transformers", "datasets", "torch", "accelerate")


def is_main() -> bool:
    """True on the process that speaks; known from the launcher's environment before any process group exists."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def say(text: str = "") -> None:
    """Print on rank 0."""
    if is_main():
        print(text, flush=True)


def quiet_libraries(*, verbose: bool) -> None:
    """Keep DeepSpeed, transformers and the like to warnings, and other ranks than 0 to errors.

    With `verbose`, everything is shown on every rank.
    """
    level = logging.INFO if verbose else logging.WARNING if is_main() else logging.ERROR
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    import torch
    import transformers

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # said here, DeepSpeed need not warn that it found nothing else
    logger = transformers.utils.logging
    logger.set_verbosity(level)
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(level)
    if not verbose:
        logger.disable_progress_bar()
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="torch|deepspeed")
