"""What the screen shows: warnings of the libraries below us, one bar, and our own lines on rank 0."""

from __future__ import annotations

import logging
import os
import sys
import warnings

LIBRARIES = ("transformers", "datasets", "accelerate")  # DeepSpeed's own logger: engine/build.py


def is_main() -> bool:
    """True on the process that speaks; known from the launcher's environment before any process group exists."""
    return launched_rank() == "0"


def launched_rank() -> str:
    """This process among all, as the launcher says."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))


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
    import datasets
    import torch
    import transformers

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # said here, DeepSpeed need not warn that it found nothing else
        # A CUDA toolkit on a machine without a GPU is no reason to warn of every import that looks for a compiler.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    logger = transformers.utils.logging
    logger.set_verbosity(level)
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(level)
    logging.getLogger("torch").setLevel(max(level, logging.WARNING))  # its compiler's INFO would bury all others
    if not verbose:
        logger.disable_progress_bar()
        if not (is_main() and sys.stderr.isatty()):
            datasets.disable_progress_bars()  # a bar is for someone who watches
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="torch|deepspeed")
