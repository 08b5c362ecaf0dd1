"""Which device a command computes on, and why a GPU of this machine is not used, found out without using it."""

from __future__ import annotations

import argparse
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsdpo.errors import ConfigError

DEVICES = ("auto", "cpu")
CHOICE = "DS_ACCELERATOR"  # DeepSpeed's variable: ranks that a launcher starts from this process inherit it
NVIDIA, AMD = "NVIDIA", "AMD"
HIDING = {NVIDIA: ("CUDA_VISIBLE_DEVICES",), AMD: ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")}
# Oldest Linux driver for each major version of CUDA: NVIDIA, CUDA compatibility, table of minor version compatibility.
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}


class Device(argparse.Action):
    """`--device cpu`: compute on the CPU, here and in every process started from here."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            **{
                **options,
                "choices": DEVICES,
                "default": argparse.SUPPRESS,
                "help": "cpu: leave GPUs alone; auto, the default: a GPU if there is one",
            }
        )

    def __call__(self, parser: object, namespace: object, value: object, option: str | None = None) -> None:
        if value == "cpu":
            os.environ[CHOICE] = "cpu"


@dataclass(frozen=True)
class Machine:
    """The GPUs that the kernel of this machine knows."""

    maker: str
    names: tuple[str, ...]  # one for each GPU; the maker's where the driver does not say more
    driver: str | None  # its version

    def describe(self) -> str:
        """2 NVIDIA GPUs (NVIDIA H100 80GB HBM3)."""
        kinds = ", ".join(sorted(set(self.names)))
        return f"{len(self.names)} {self.maker} GPU{'s' * (len(self.names) > 1)}" + (
            f" ({kinds})" if kinds != self.maker else ""
        )


@dataclass(frozen=True)
class Build:
    """What the installed torch was built for."""

    version: str
    cuda: str | None
    hip: str | None


def choose_accelerator(*, computes: bool) -> None:
    """Tell DeepSpeed where it runs if that is a CPU, before it is imported: it would look for a GPU, and say so.

    For a command that `computes`, raises `ConfigError` where this machine has a GPU that torch cannot use, unless the
    user asked for the CPU by `--device cpu`, `DS_ACCELERATOR=cpu` or by hiding all GPUs.
    """
    quiet_imports()
    import torch

    if computes and (reason := unusable_gpu()) is not None:
        raise ConfigError(reason)
    if CHOICE not in os.environ and not torch.accelerator.is_available():
        os.environ[CHOICE] = "cpu"
        _chosen_here.add("cpu")


_chosen_here: set[str] = set()  # what this module put into CHOICE because there was nothing else, and nobody asked for


def unusable_gpu() -> str | None:
    """Why this machine's GPU is not used and what to do; None where it is, there is none, or the user wants the CPU."""
    import torch

    if torch.accelerator.is_available() or (CHOICE in os.environ and not _chosen_here):
        return None
    machine = gpus_of_machine()
    if machine is None or hidden(machine.maker):
        return None
    build = Build(str(torch.__version__), torch.version.cuda, torch.version.hip)
    return why_unusable(machine, build, error=_cuda_error(build))


def gpus_of_machine(root: Path = Path("/")) -> Machine | None:
    """What the drivers of NVIDIA or AMD list below /proc and /sys, None without any."""
    cards = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    nodes = sorted(node for node in (root / "dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", node.name))
    if cards or nodes:
        found = [re.search(r"Model:\s*(.+)", card.read_text(errors="replace")) for card in cards]
        names = [match.group(1).strip() if match else NVIDIA for match in found] or [NVIDIA] * len(nodes)
        return Machine(NVIDIA, tuple(names), _nvidia_driver(root))
    count = sum(
        bool(re.search(r"^simd_count [1-9]", properties.read_text(errors="replace"), re.MULTILINE))
        for properties in (root / "sys/class/kfd/kfd/topology/nodes").glob("*/properties")
    )
    return Machine(AMD, (AMD,) * count, None) if count else None


def _nvidia_driver(root: Path) -> str | None:
    try:
        text = (root / "proc/driver/nvidia/version").read_text(errors="replace")
    except OSError:
        return None
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", text)
    return found.group(1) if found else None


def hidden(maker: str) -> bool:
    """Whether the environment hides every GPU, as `CUDA_VISIBLE_DEVICES=` does."""
    return any(os.environ.get(name, "all").strip() in ("", "-1", "none") for name in HIDING[maker])


def why_unusable(machine: Machine, build: Build, *, error: str | None) -> str:
    """One line: what was found, why torch cannot use it, what to install. `error` is what CUDA itself said."""
    if machine.maker == AMD:
        built = build.hip is not None
        reason = f"its runtime does not start ({error})" if built else f"torch {build.version} is not built for ROCm"
        remedy = (
            "check the driver with rocminfo" if built else "install torch built for ROCm (pytorch.org, Get started)"
        )
    elif build.cuda is None:
        reason = f"torch {build.version} is built without CUDA"
        remedy = "install torch built for CUDA (pytorch.org, Get started)"
    elif (oldest := too_old(machine.driver, build.cuda)) is not None:
        reason = f"its driver {machine.driver} is too old for torch {build.version}, which needs {oldest} or later"
        remedy = "update the driver, or install torch built for an older CUDA (pytorch.org, Previous versions)"
    else:
        reason = f"CUDA does not start with torch {build.version} (CUDA {build.cuda}, driver {machine.driver}): {error}"
        remedy = "check with nvidia-smi, and in a container that it was started with the GPUs"
    return f"this machine has {machine.describe()}, but {reason}: {remedy}; or give --device cpu to compute on the CPU"


def too_old(driver: str | None, cuda: str) -> int | None:
    """The oldest driver for this CUDA where the one at hand is older still."""
    oldest = OLDEST_DRIVER.get(int(cuda.split(".")[0]))
    if driver is None or oldest is None or int(driver.split(".")[0]) >= oldest:
        return None
    return oldest


def _cuda_error(build: Build) -> str | None:
    """The first line of what CUDA or ROCm says when it is started."""
    if build.cuda is None and build.hip is None:
        return None
    import torch

    try:
        torch.cuda.init()
    except Exception as error:  # its kinds differ by version
        return (str(error).splitlines() or [type(error).__name__])[0]
    return "no device answers"


def check_share(ranks: int, devices: int, visible: str | None) -> None:
    """Refuse more ranks of a node than it has devices; with a single one each may have been given its own.

    `ranks` and `devices` are this node's, `visible` the value of CUDA_VISIBLE_DEVICES. Raises `ConfigError`.
    """
    if 1 < devices < ranks:
        shown = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
        raise ConfigError(
            f"{ranks} ranks were started on this node, but {devices} GPUs are visible{shown}: start {devices} "
            f"(deepspeed --num_gpus {devices}, torchrun --nproc_per_node {devices}), or show more"
        )


def quiet_imports() -> None:
    """Keep libraries from warnings while they are imported that no user of ours can do anything about."""
    # A CUDA toolkit on a machine without a GPU is no reason to warn of every import that looks for a compiler.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # Imported by peft where it is installed, it tells of a kernel that it would have looked for on the Hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
