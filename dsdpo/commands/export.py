"""`dsdpo export RUN --out FOLDER`: a checkpoint of a run, stopped or finished, as a Hugging Face model folder."""

from __future__ import annotations

import time
from pathlib import Path

from dsdpo.accelerator import choose_accelerator
from dsdpo.commands.arguments import new_folder, plain_parser, user_path
from dsdpo.console import counted, quiet_libraries, say

MEMORY = "memory for weights on their way, in MiB; default: 256"


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    parser = plain_parser("dsdpo export", __doc__)
    parser.add_argument("run", metavar="RUN", type=user_path, help="output_dir of a run, or the config.yaml in it")
    parser.add_argument("--out", type=user_path, required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--checkpoint", default="last", help="last, best or a step; default: last")
    parser.add_argument("--merge", action="store_true", help="of an adapter: write the base with it merged in")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="default: the run's model.dtype")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in FOLDER")
    parser.add_argument("--push-to-hub", metavar="ID", help="then upload it to this Hub repository")
    parser.add_argument("--public", action="store_true", help="make a new Hub repository public; default: private")
    parser.add_argument("--memory", type=int, default=256, metavar="MIB", help=MEMORY)
    parser.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="size of a file; default: 5")
    given = parser.parse_args(argv)
    if given.memory < 1 or not 0 < given.shard_gb < float("inf"):
        parser.error("--memory and --shard-gb must be above 0")
    if given.public and not given.push_to_hub:
        parser.error("--public has no effect without --push-to-hub")

    choose_accelerator(computes=False)
    from dsdpo.errors import ConfigError
    from dsdpo.run.finished import open_run
    from dsdpo.run.offline_export import export_checkpoint
    from dsdpo.run.saved import choose_checkpoint
    from dsdpo.training.hub import check_hub_id, push_folder

    quiet_libraries(verbose=False)
    started = time.monotonic()
    run = open_run(given.run)
    if given.merge and run.run.model.lora is None:
        raise ConfigError(f"--merge: {run.folder} trained all weights, so there is no adapter to merge: leave it out")
    out = new_folder(given.out, overwrite=given.overwrite, inputs=[run.folder.path])
    if given.push_to_hub:
        check_hub_id(given.push_to_hub, key="--push-to-hub")
    checkpoint = choose_checkpoint(run, given.checkpoint)
    export_checkpoint(
        run,
        checkpoint,
        out,
        dtype=given.dtype,
        merge=given.merge,
        memory_bytes=given.memory * 2**20,
        shard_bytes=int(given.shard_gb * 1e9),
    )
    say(f"{checkpoint.name} of {run.folder} is in {out}: {describe(out)}, {time.monotonic() - started:.0f} s")
    if given.push_to_hub:
        say(f"uploaded to {push_folder(out, given.push_to_hub, private=not given.public)}")
    return 0


def describe(folder: Path) -> str:
    """Weight files and bytes of an exported folder."""
    files = list(folder.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    return f"{counted(len(files), 'weight file')}, {f'{size / 1e9:.2f} GB' if size >= 1e8 else f'{size / 1e6:.1f} MB'}"
