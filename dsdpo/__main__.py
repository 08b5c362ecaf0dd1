"""`dsdpo COMMAND ...`, or under a launcher `deepspeed --module dsdpo COMMAND ...`."""

from __future__ import annotations

import atexit
import importlib
import os
import socket
import sys
import time
import traceback
from contextlib import nullcontext
from typing import NoReturn

from dsdpo.accelerator import choose_accelerator, quiet_imports
from dsdpo.commands.table import COMMANDS
from dsdpo.config.shipped import page
from dsdpo.config.unknown_keys import did_you_mean
from dsdpo.console import Launched, be_quiet, is_main, launched, launched_rank, waiting, wrapped
from dsdpo.errors import ConfigError, DsdpoError, LostRankError, TrainingError
from dsdpo.stop_signals import noted_signals

BAD_INPUT = 2  # exit codes
FAILED = 1
INTERRUPTED = 130  # as a shell says it of SIGINT
HEAD_START_S = 8.0  # of rank 0, when ranks find a mistake before they are connected
ELSEWHERE_S = 300.0  # the same where rank 0 is on another node, with a launcher that does not end this one
PARTING_S = 8.0  # that a rank waits for the others to have said what they have to say


def entry() -> NoReturn:
    """Run a command and end the process with its exit code, whatever threads of libraries are still at work."""
    waits = True
    try:
        code = main()
    except SystemExit as asked:  # argparse's, after --help
        code = asked.code if isinstance(asked.code, int) else FAILED if asked.code else 0
    except KeyboardInterrupt:
        code, waits = INTERRUPTED, False
    except BrokenPipeError:  # whoever read our output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code, waits = FAILED, False
    except BaseException:
        traceback.print_exc()
        code, waits = FAILED, False  # the others may be waiting for this rank: they must see it go
    if "torch" not in sys.modules:
        sys.exit(code)
    end_process(code, waits=waits)


def end_process(code: int, *, waits: bool) -> NoReturn:
    """End this process as Python would, but without taking the interpreter apart.

    A thread that comes back from a library's C++ while Python 3.11 finalizes is unwound through functions that must not
    unwind: `terminate called without an active exception`, and SIGABRT in place of the exit code. gloo, TCPStore,
    pyarrow and DeepSpeed all have such threads. What libraries registered for the end (W&B closes its files there) is
    run first. With `waits` ranks leave together, rank 0 last: it keeps the store, and launchers end all ranks as soon
    as one is gone.
    """
    try:
        if waits and in_process_group():
            from dsdpo.distributed import part

            part(PARTING_S)
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # a closed pipe
            continue
    os._exit(code)


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit code: 0 done, 1 training failed, 2 the input is wrong (and said so on rank 0)."""
    argv = sys.argv[1:] if argv is None else argv
    # The deepspeed launcher puts its own argument first.
    launcher = [word for word in argv[:1] if word.startswith("--local_rank")]
    name, *rest = argv[len(launcher) :] or ["--help"]
    if name in ("--version", "-V", "version"):
        print(versions())
        return 0
    try:
        os.getcwd()
    except FileNotFoundError:
        say_on_one_rank(
            ConfigError("the folder that this was started in is gone: cd to one that is there"), connects=False
        )
        return BAD_INPUT
    if name in ("-h", "--help", "help"):
        print(__doc__, *(f"  {each:<12}{COMMANDS[each].summary}" for each in COMMANDS), sep="\n")
        print(f"\neach one's options: dsdpo COMMAND --help; documentation: {page('README.md')}")
        return 0
    if name not in COMMANDS:
        near = did_you_mean(name, COMMANDS) or "."
        say_on_one_rank(ConfigError(f"no command {name!r}{near} There are {', '.join(COMMANDS)}"), connects=False)
        return BAD_INPUT
    command = COMMANDS[name]
    try:
        quiet_imports()
        # Settings are checked before torch is imported, and signals noted from before that on.
        given = command.parse(rest) if command.parse else rest
        with noted_signals() if command.meets else nullcontext():
            if command.parse:
                choose_accelerator(computes=command.computes)
            if getattr(given, "quiet", False):
                be_quiet()
            with waiting("loading torch, transformers and DeepSpeed"):
                module = importlib.import_module(f"dsdpo.commands.{name}")
            code: int = module.main(given)
            leave_process_group()
        return code
    except LostRankError as error:
        print(f"dsdpo ({this_rank()}): {error}", file=sys.stderr, flush=True)
        end_process(FAILED, waits=False)
    except DsdpoError as error:
        say_on_one_rank(error, connects=command.meets)
        return FAILED if isinstance(error, TrainingError) else BAD_INPUT


def say_on_one_rank(error: DsdpoError, *, connects: bool) -> None:
    """Print an error once, although ranks that are not connected may each be the only one to know of it.

    Then the others are told where they wait for this rank, if the command `connects` its ranks. A rank that finds rank
    0 gone speaks itself, in case that was for another reason.
    """
    if is_main():
        lines = [wrapped(line, indent=7, stream=sys.stderr) for line in f"dsdpo: {error}".splitlines()]
        print("\n".join(lines), file=sys.stderr, flush=True)
    if error.agreed or in_process_group():
        return
    began = time.monotonic()
    told = connects and told_elsewhere(error)
    if not told and not is_main():
        time.sleep(max(0.0, HEAD_START_S - (time.monotonic() - began)))  # launchers end all ranks when rank 0 goes
        print(f"dsdpo ({this_rank()}): {error}", file=sys.stderr, flush=True)


def told_elsewhere(error: DsdpoError) -> bool:
    """Tell the ranks that wait for this one of an error; whether that was needed and reached them."""
    try:
        who = launched()
    except ConfigError:
        who = Launched("nobody", 0, 1, 0, 1)
    if isinstance(error, TrainingError) or who.world_size == 1:
        return False
    if who.rank == 0 and who.local_size == who.world_size:
        return False  # the launcher ends the others as soon as this process is gone
    from dsdpo.engine.start import tell_others

    return tell_others(error, limit_s=HEAD_START_S if who.local_size == who.world_size else ELSEWHERE_S)


def this_rank() -> str:
    """This process among all, with its host."""
    return f"rank {launched_rank()} on {socket.gethostname()}"


def versions() -> str:
    """This version of dsdpo and those of what it stands on, read without importing them."""
    from importlib.metadata import version

    return "\n".join(f"{name} {version(name)}" for name in ("dsdpo", "torch", "deepspeed", "transformers", "peft"))


def in_process_group() -> bool:
    """Whether this process has met the other ranks; never imports torch for the answer."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def leave_process_group() -> None:
    """Take the process group down in order, once all ranks are done. Collective."""
    if in_process_group():
        distributed = sys.modules["torch.distributed"]
        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    entry()
