"""`dsdpo merge ADAPTER BASE --out FOLDER`: a LoRA adapter merged into its base model, as a model folder."""

from __future__ import annotations

import time
from pathlib import Path

from dsdpo.accelerator import choose_accelerator
from dsdpo.commands.arguments import new_folder, path_or_id, plain_parser, user_path
from dsdpo.console import quiet_libraries, say


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    parser = plain_parser("dsdpo merge", __doc__)
    parser.add_argument("adapter", metavar="ADAPTER", type=user_path, help="adapter folder, such as model/ of a run")
    parser.add_argument("base", metavar="BASE", help="folder or Hub id of the model that it was trained on")
    parser.add_argument("--out", type=user_path, required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16",
                        help="of the merged weights; default: bfloat16")  # fmt: skip
    parser.add_argument("--revision", help="Hub branch, tag or commit of BASE")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with BASE")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in FOLDER")
    parser.add_argument("--memory", type=int, default=256, metavar="MIB", help="for weights on their way; default: 256")
    parser.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="size of a file; default: 5")
    given = parser.parse_args(argv)
    if given.memory < 1 or not 0 < given.shard_gb < float("inf"):
        parser.error("--memory and --shard-gb must be above 0")

    choose_accelerator(computes=False)
    from dsdpo.config.model import ModelConfig
    from dsdpo.run.merge import merge_folders

    quiet_libraries(verbose=False)
    started = time.monotonic()
    model = ModelConfig(
        path=given.base, revision=given.revision, dtype=given.dtype, trust_remote_code=given.trust_remote_code
    )
    out = new_folder(
        given.out, overwrite=given.overwrite, inputs=[given.adapter, Path(path_or_id(given.base)).expanduser()]
    )
    streamed = merge_folders(
        given.adapter, model, out, memory_bytes=given.memory * 2**20, shard_bytes=int(given.shard_gb * 1e9)
    )
    how = "" if streamed else " (whole in memory: the adapter is more than products added to linear weights)"
    say(f"merged model in {out}, {time.monotonic() - started:.0f} s{how}")
    return 0
