"""`dsdpo COMMAND ...`, or under a launcher `deepspeed --module dsdpo COMMAND ...`."""

from __future__ import annotations

import importlib
import os
import sys
import time

from dsdpo.errors import DsdpoError, LostRankError, TrainingError

COMMANDS = {
    "train": "train a policy on preference pairs: dsdpo train RUN.yaml",
    "precompute": "score all pairs with the reference, for training to find: dsdpo precompute RUN.yaml",
    "demo": "make a small model and data set, train on two ranks and show what happened",
    "plot": "draw the metrics of a run: dsdpo plot RUN_FOLDER",
}
BAD_INPUT = 2  # exit codes
FAILED = 1
HEAD_START_S = 8.0  # of rank 0, when ranks find a mistake before they are connected


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit code: 0 done, 1 training failed, 2 the input is wrong (and said so on rank 0)."""
    from dsdpo.console import is_main, launched_rank

    argv = sys.argv[1:] if argv is None else argv
    # The deepspeed launcher puts its own argument first.
    launcher = [word for word in argv[:1] if word.startswith("--local_rank")]
    name, *rest = argv[len(launcher) :] or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__, *(f"  {command:<12}{text}" for command, text in COMMANDS.items()), sep="\n")
        return 0
    try:
        if name not in COMMANDS:
            raise DsdpoError(f"no command {name!r}; there are {', '.join(COMMANDS)}")
        code = importlib.import_module(f"dsdpo.commands.{name}").main(rest)
        leave_process_group()
        return code
    except LostRankError as error:
        print(f"dsdpo (rank {launched_rank()}): {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(FAILED)  # what is left of the process group would hang or abort an ordinary exit
    except DsdpoError as error:
        # Once connected, ranks agree on errors. Before that this rank may be the only one to see the mistake: it gives
        # rank 0 the time to say it (whereupon launchers end every rank) and speaks only if nothing came of that.
        if not is_main() and not in_process_group():
            time.sleep(HEAD_START_S)
            print(f"dsdpo (rank {launched_rank()}): {error}", file=sys.stderr, flush=True)
        elif is_main():
            print(f"dsdpo: {error}", file=sys.stderr, flush=True)
        return FAILED if isinstance(error, TrainingError) else BAD_INPUT


def in_process_group() -> bool:
    """Whether this process has met the other ranks; never imports torch for the answer."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def leave_process_group() -> None:
    """Part from the other ranks in order: gloo's threads abort a process that ends while they still run."""
    if in_process_group():
        distributed = sys.modules["torch.distributed"]
        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
