"""What devices can hold and do, by name: memory, peak arithmetic and the speed of what they are connected by.

Makers' data sheets, of the common form in servers. Bandwidths are of one direction. A name that a user gives is a key
of `GPUS` or what CUDA calls a device, which is found by its words.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

from dsdpo.config.load import did_you_mean
from dsdpo.errors import ConfigError

GB = 1e9


@dataclass(frozen=True)
class Hardware:
    """One device of a kind, and its share of its node."""

    name: str
    memory: float  # bytes that a process can have of it
    tflops: float  # dense 16-bit matrix products, 10^12 operations a second
    memory_speed: float  # bytes a second
    link: float  # to the other devices of its node, bytes a second
    network: float  # to other nodes, bytes a second
    words: str = ""  # of CUDA's name for it, as a regular expression
    host: float = 25 * GB  # to the memory of its node, bytes a second
    is_cpu: bool = False  # then what is offloaded stays in the same memory


def _gpu(
    name: str,
    words: str,
    gib: float,
    tflops: float,
    memory: float,
    link: float,
    network: float = 12.5,
    host: float = 25,
) -> Hardware:
    return Hardware(name, gib * 2**30, tflops, memory * GB, link * GB, network * GB, words, host * GB)


# GiB that CUDA shows, TFLOP/s, GB/s of memory, GB/s to its neighbours, GB/s to other nodes, GB/s to the host. Of two
# that fit CUDA's name the first counts.
_TABLE = (
    _gpu("gb200", "GB200", 184.0, 2500, 8000, 900, 50, 200),
    _gpu("b200", "B200", 178.3, 2250, 8000, 900, 50, 50),
    _gpu("h200-nvl", "H200 NVL", 139.8, 835, 4800, 450, 50, 50),
    _gpu("h200", "H200", 139.8, 989, 4800, 450, 50, 50),
    _gpu("gh200", "GH200", 94.5, 989, 4000, 450, 50, 400),
    _gpu("h100-nvl", "H100 NVL", 93.1, 835, 3900, 300, 50, 50),
    _gpu("h100-pcie", "H100 PCIe", 79.1, 756, 2000, 50, 25, 50),
    _gpu("h100", "H100", 79.1, 989, 3350, 450, 50, 50),
    _gpu("h800", "H800", 79.1, 989, 3350, 200, 50, 50),
    _gpu("h20", "H20", 95.1, 148, 4000, 450, 50, 50),
    _gpu("a100", "A100.*80GB", 79.1, 312, 2000, 300, 25),
    _gpu("a100-40gb", "A100", 39.4, 312, 1555, 300, 25),
    _gpu("a800", "A800", 79.1, 312, 2000, 200, 25),
    _gpu("l40s", "L40S", 44.4, 362, 864, 25),
    _gpu("l40", "L40", 44.4, 181, 864, 25),
    _gpu("l4", "L4", 22.0, 121, 300, 25),
    _gpu("a10g", "A10G", 22.0, 70, 600, 25),
    _gpu("a10", "A10", 22.0, 125, 600, 25),
    _gpu("a30", "A30", 23.5, 165, 933, 25),
    _gpu("a40", "A40", 44.4, 149.7, 696, 25),
    _gpu("a6000", "RTX A6000", 47.4, 154.8, 768, 25),
    _gpu("rtx6000-ada", "RTX 6000 Ada", 47.4, 364, 960, 25),
    _gpu("rtx5090", "RTX 5090", 31.4, 209.5, 1792, 50, 12.5, 50),
    _gpu("rtx4090", "RTX 4090", 23.5, 165.2, 1008, 25),
    _gpu("rtx3090", "RTX 3090", 23.6, 71, 936, 25),
    _gpu("v100", "V100", 31.7, 125, 900, 150, 12.5, 12),
    _gpu("t4", "T4", 14.6, 65, 320, 12, 12.5, 12),
    _gpu("mi300x", "MI300X", 191.5, 1307, 5300, 448, 50, 50),
)  # fmt: skip
GPUS = {gpu.name: gpu for gpu in _TABLE}
CPU = Hardware("cpu", 0.0, 0.2, 50 * GB, 5 * GB, 1 * GB, host=20 * GB, is_cpu=True)


def gpu_called(cuda_name: str) -> Hardware | None:
    """The device that CUDA gives this name, None for one that is not in the table."""
    return next((gpu for gpu in _TABLE if re.search(rf"\b{gpu.words}\b", cuda_name, re.IGNORECASE)), None)


def peak_tflops(cuda_name: str) -> float | None:
    """What a device of that name can do at most, None where that is not known."""
    found = gpu_called(cuda_name)
    return None if found is None else found.tflops


def hardware(name: str, *, ranks_per_node: int) -> Hardware:
    """The device of this name in `GPUS` or CUDA's for it, or `cpu`: this machine's memory, shared by a node's ranks.

    Raises `ConfigError` for names that are not known.
    """
    wanted = name.strip().lower().replace("_", "-").replace(" ", "-")
    if wanted == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return replace(CPU, memory=memory / ranks_per_node)
    found = GPUS.get(wanted) or gpu_called(wanted.replace("-", " "))
    if found is None:
        raise ConfigError(
            f"--gpu {name!r} is not a device of the table, which has {', '.join([*GPUS, 'cpu'])}"
            f"{did_you_mean(wanted, GPUS)}"
        )
    return found
