"""What the screen shows: warnings of the libraries below us, one bar, and our own lines on rank 0."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TextIO

from dsdpo.accelerator import choose_accelerator
from dsdpo.errors import ConfigError

log = logging.getLogger(__name__)

_quiet = threading.Event()
_amount: list[str] = []  # how much is done of what is being waited for, if that is known
SILENCE_S = {True: 2.0, False: 20.0}  # in a terminal and elsewhere, before it is said what is being waited for
LIBRARIES = ("transformers", "datasets", "accelerate")  # DeepSpeed's own logger: engine/build.py


# How else than by RANK and WORLD_SIZE (deepspeed, torchrun) a process is told who it is, most telling first: MPI's
# launchers may run inside a Slurm job, whose variables are then about something else.
LAUNCHERS: tuple[tuple[str, str, tuple[str, ...], tuple[str, ...], tuple[str, ...]], ...] = (
    ("Open MPI", "OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",), ("OMPI_COMM_WORLD_LOCAL_RANK",),
     ("OMPI_COMM_WORLD_LOCAL_SIZE",)),
    ("MVAPICH", "MV2_COMM_WORLD_RANK", ("MV2_COMM_WORLD_SIZE",), ("MV2_COMM_WORLD_LOCAL_RANK",),
     ("MV2_COMM_WORLD_LOCAL_SIZE",)),
    ("MVAPICH", "MVP_COMM_WORLD_RANK", ("MVP_COMM_WORLD_SIZE",), ("MVP_COMM_WORLD_LOCAL_RANK",),
     ("MVP_COMM_WORLD_LOCAL_SIZE",)),
    ("MPI (PMI)", "PMI_RANK", ("PMI_SIZE", "WORLD_SIZE"), ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID"),
     ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "LOCAL_SIZE")),
    ("Slurm", "SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), ("SLURM_LOCALID",),
     ("SLURM_NTASKS_PER_NODE",)),
)  # fmt: skip


@dataclass(frozen=True)
class Launched:
    """Who this process is among those that were started together."""

    by: str
    rank: int
    world_size: int
    local_rank: int
    local_size: int


def launched() -> Launched:
    """What the environment says of this process: deepspeed's, torchrun's, MPI's and Slurm's words; alone without any.

    Raises `ConfigError` for words that contradict each other or that say only a part, with which several processes
    would each take itself for the whole run.
    """
    if "RANK" in os.environ:
        size = _whole_number(("WORLD_SIZE",))
        if size is None:
            raise ConfigError(
                f"RANK is {os.environ['RANK']} in the environment, but WORLD_SIZE is not set: start with deepspeed, "
                "torchrun or srun, or set both, with MASTER_ADDR and MASTER_PORT, for each process"
            )
        own, place = _whole_number(("RANK",)) or 0, _whole_number(("LOCAL_RANK",)) or 0
        return _checked("RANK", own, size, place, ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"), "RANK")
    for by, rank_name, size_names, local_names, local_size_names in LAUNCHERS:
        rank, size = _whole_number((rank_name,)), _whole_number(size_names)
        if rank is None or (size or 1) == 1:
            continue
        assert size is not None
        if by == "Slurm" and not {"SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "MASTER_ADDR"} & os.environ.keys():
            raise ConfigError(
                f"this shell belongs to a Slurm job of {counted(size, 'task')} (SLURM_NTASKS), but srun did not start "
                "this process: start with srun, as launch/slurm.sbatch does, or alone with RANK=0 WORLD_SIZE=1 before "
                "the command"
            )
        local = _whole_number(local_names)
        if local is None:
            raise ConfigError(
                f"{rank_name} is {rank} of {size} processes ({by}), but none of {', '.join(local_names)} is set, which "
                "say the process's place on its node: set RANK, WORLD_SIZE and LOCAL_RANK for each process"
            )
        return _checked(by, rank, size, local, local_size_names, rank_name)
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "MVP_COMM_WORLD_SIZE", "PMI_SIZE"):
        if (_whole_number((name,)) or 1) > 1:
            raise ConfigError(
                f"{name} is {os.environ[name]} in the environment, but no variable says which of the processes this "
                "is: set RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT too, or start with deepspeed, torchrun or srun"
            )
    if (_whole_number(("PMIX_RANK",)) or 0) > 0:
        raise ConfigError(
            f"PMIX_RANK is {os.environ['PMIX_RANK']}: other processes were started beside this one, but nothing says "
            "how many. Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for each, or use srun or mpirun"
        )
    return Launched("nobody", 0, 1, 0, 1)


def _checked(by: str, rank: int, size: int, local: int, local_size_names: Sequence[str], name: str) -> Launched:
    if rank >= size:
        there_are = "there is" if size == 1 else "there are"
        raise ConfigError(
            f"{name} is {rank}, but {there_are} {counted(size, 'process', 'processes')} only, counted from 0"
        )
    return Launched(by, rank, size, local, _whole_number(local_size_names) or 1)


def _whole_number(names: Sequence[str]) -> int | None:
    """The first of these variables that is set. Raises `ConfigError` for what is no whole number."""
    for name in names:
        value = os.environ.get(name)
        if value is None or not value.strip():
            continue
        if not value.strip().isdecimal():
            raise ConfigError(f"{name} is {value!r} in the environment, but must be a whole number")
        return int(value)
    return None


def restarts_ranks() -> bool:
    """Whether torchrun starts the ranks again when one of them ends with another exit code than 0."""
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "")
    return restarts.isdecimal() and int(restarts) > 0


def is_main() -> bool:
    """True on the process that speaks; known from the launcher's environment before any process group exists."""
    return launched_rank() == "0"


def launched_rank() -> str:
    """This process among all, as the launcher says."""
    try:
        return str(launched().rank)
    except ConfigError:
        return os.environ.get("RANK", "0")


def say(text: str = "") -> None:
    """Print on rank 0, unless the user wants it quiet."""
    if is_main() and not _quiet.is_set():
        print(text, flush=True)


def wrapped(text: str, *, indent: int = 2, stream: TextIO | None = None) -> str:
    """The text in lines that fit the terminal, all but the first indented; elsewhere as it is: a log is searched."""
    if not (stream or sys.stdout).isatty():
        return text
    width = max(40, shutil.get_terminal_size((80, 24)).columns)
    return textwrap.fill(text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def be_quiet() -> None:
    """From now on only say warnings and errors in this process."""
    _quiet.set()


def is_quiet() -> bool:
    """Whether only warnings and errors are wanted."""
    return _quiet.is_set()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A block that may take long: if it does, rank 0 says what is being done and for how long, until it is over.

    In a terminal that is a line that counts seconds and goes away; in a log file a line after 20 s, 40 s, 80 s, ...
    With `--verbose` every rank says afterwards how long it took.
    """
    started = time.monotonic()
    with _told(what) if is_main() and not _quiet.is_set() else nullcontext():
        yield
    log.info("%s: %.2f s", what, time.monotonic() - started)


@contextmanager
def _told(what: str) -> Iterator[None]:
    over = threading.Event()
    teller = threading.Thread(target=_tell, args=(what, over), name="waiting", daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()
        _amount.clear()


def tell_amount(done: float, total: float, *, seconds: float) -> None:
    """Have the line of `waiting` say how many bytes there are by now, and at what rate."""
    rate = f", {done / seconds / 1e9:.1f} GB/s" if seconds >= 1 else ""
    _amount[:] = [f": {done / 1e9:.1f} of {total / 1e9:.1f} GB{rate}"]


def _tell(what: str, over: threading.Event) -> None:
    watched, started = sys.stderr.isatty(), time.monotonic()
    pause_s = SILENCE_S[watched]
    while not over.wait(pause_s):
        seconds = time.monotonic() - started
        amount = "".join(_amount)
        if watched:
            sys.stderr.write(f"\r{what}{amount} ... {seconds:.0f} s\x1b[K")
            pause_s = 1.0
        else:
            sys.stderr.write(f"{what}{amount} ... {seconds:.0f} s\n")
            pause_s = seconds
        sys.stderr.flush()
    if watched and time.monotonic() - started >= SILENCE_S[watched]:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def quiet_libraries(*, verbose: bool) -> None:
    """Keep DeepSpeed, transformers and the like to warnings, and other ranks than 0 to errors.

    With `verbose`, everything is shown on every rank.
    """
    level = logging.INFO if verbose else logging.WARNING if is_main() else logging.ERROR
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    import datasets
    import transformers

    choose_accelerator(computes=False)
    logger = transformers.utils.logging
    logger.set_verbosity(level)
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(level)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    logging.getLogger("torch").setLevel(max(level, logging.WARNING))  # its compiler's INFO would bury all others
    if not verbose:
        logger.disable_progress_bar()
        if not (is_main() and sys.stderr.isatty()):
            datasets.disable_progress_bars()  # a bar is for someone who watches
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="torch|deepspeed")


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number and what it counts: 1 step, 1,728 pairs."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def every(number: int, noun: str) -> str:
    """How often something happens: every step, every 100 steps."""
    return f"every {noun}" if number == 1 else f"every {counted(number, noun)}"


def written_time(seconds: float) -> str:
    """45 s, 12 min 30 s, 3 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
