"""`dsdpo export RUN --out FOLDER`: a checkpoint of a run, stopped or finished, as a Hugging Face model folder."""

from __future__ import annotations

import time
from pathlib import Path

from dsdpo.commands.model_arguments import ExportArguments
from dsdpo.console import counted, quiet_libraries, say
from dsdpo.run.offline_export import export_checkpoint
from dsdpo.run.saved import choose_checkpoint
from dsdpo.training.hub import check_hub_id, push_folder


def main(given: ExportArguments) -> int:
    """Run the command; the exit code."""
    quiet_libraries(verbose=False)
    started, run, output = time.monotonic(), given.run, given.output
    if given.push_to_hub:
        check_hub_id(given.push_to_hub, key="--push-to-hub")
    checkpoint = choose_checkpoint(run, given.checkpoint)
    export_checkpoint(
        run,
        checkpoint,
        output.folder,
        dtype=given.dtype,
        merge=given.merge,
        memory_bytes=output.memory_bytes,
        shard_bytes=output.shard_bytes,
    )
    seconds = time.monotonic() - started
    say(f"{checkpoint.name} of {run.folder} is in {output.folder}: {describe(output.folder)}, {seconds:.0f} s")
    if given.push_to_hub:
        say(f"uploaded to {push_folder(output.folder, given.push_to_hub, private=not given.public)}")
    return 0


def describe(folder: Path) -> str:
    """Weight files and bytes of an exported folder."""
    files = list(folder.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    return f"{counted(len(files), 'weight file')}, {f'{size / 1e9:.2f} GB' if size >= 1e8 else f'{size / 1e6:.1f} MB'}"
