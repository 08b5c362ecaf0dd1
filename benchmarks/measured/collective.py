"""A measured collective: the same gather or all-reduce again and again, each one a step of the recorder.

python -m benchmarks.measured.collective KIND BYTES                          (one rank, by RANK and its kin)
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist

from benchmarks.harness.recorder import Recorder

KINDS = ("gather", "all-reduce")


def main(kind: str, size: int) -> None:
    """Go on until the recorder ends the process. `size`: bytes of the whole tensor."""
    recorder = Recorder()
    dist.init_process_group("gloo")
    ranks = int(os.environ["WORLD_SIZE"])
    whole = torch.ones(max(1, size // 4 // ranks) * ranks)
    own = whole[: len(whole) // ranks].clone()
    while True:
        if kind == "gather":
            dist.all_gather_into_tensor(whole, own)
        else:
            dist.all_reduce(whole)
        recorder.step()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
