"""`dsdpo merge ADAPTER BASE --out FOLDER`: a LoRA adapter merged into its base model, as a model folder."""

from __future__ import annotations

import time

from dsdpo.commands.model_arguments import MergeArguments
from dsdpo.console import quiet_libraries, say
from dsdpo.run.merge import merge_folders


def main(given: MergeArguments) -> int:
    """Run the command; the exit code."""
    quiet_libraries(verbose=False)
    started, output = time.monotonic(), given.output
    streamed = merge_folders(
        given.adapter,
        given.base,
        output.folder,
        memory_bytes=output.memory_bytes,
        shard_bytes=output.shard_bytes,
    )
    how = "" if streamed else " (whole in memory: the adapter is more than products added to linear weights)"
    say(f"merged model in {output.folder}, {time.monotonic() - started:.0f} s{how}")
    return 0
