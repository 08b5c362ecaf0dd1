"""`dsdpo COMMAND ...`, or under a launcher `deepspeed --module dsdpo COMMAND ...`."""

from __future__ import annotations

import importlib
import sys

from dsdpo.errors import DsdpoError

COMMANDS = {
    "train": "train a policy on preference pairs: dsdpo train RUN.yaml",
    "demo": "make a small model and data set, train on two ranks and show what happened",
    "plot": "draw the metrics of a run: dsdpo plot RUN_FOLDER",
}
BAD_INPUT = 2  # exit code


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit code: 0 done, 2 the input is wrong (and said so on rank 0)."""
    from dsdpo.commands.console import is_main

    argv = sys.argv[1:] if argv is None else argv
    # The deepspeed launcher puts its own argument first.
    launcher = [word for word in argv[:1] if word.startswith("--local_rank")]
    name, *rest = argv[len(launcher) :] or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__, *(f"  {command:<8}{text}" for command, text in COMMANDS.items()), sep="\n")
        return 0
    try:
        if name not in COMMANDS:
            raise DsdpoError(f"no command {name!r}; there are {', '.join(COMMANDS)}")
        code = importlib.import_module(f"dsdpo.commands.{name}").main(rest)
        leave_process_group()
        return code
    except DsdpoError as error:
        if is_main():
            print(f"dsdpo: {error}", file=sys.stderr, flush=True)
        return BAD_INPUT


def leave_process_group() -> None:
    """Part from the other ranks in order: gloo's threads abort a process that ends while they still run."""
    if (distributed := sys.modules.get("torch.distributed")) and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
