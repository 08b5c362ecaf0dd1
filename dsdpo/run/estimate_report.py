"""Forecasts in words, tables and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsdpo.estimate.forecast import Forecast
from dsdpo.estimate.memory import PARTS
from dsdpo.estimate.seconds import Machine
from dsdpo.run.estimate_advice import Advice

GIB = 2**30
PLACES = ("device", "host", "nvme")
LEAST_SECONDS = 0.02  # of arithmetic in a step: below, starting its kernels takes longer


@dataclass(frozen=True)
class Row:
    """A pair of DeepSpeed JSONs: what the run would take with them, or why it cannot be."""

    policy: str
    reference: str
    forecast: Forecast | None
    refused: str = ""

    @property
    def fits(self) -> bool:
        """Whether the run could be started so."""
        return self.forecast is not None and self.forecast.fits


def best_of(rows: Sequence[Row]) -> Row:
    """The fastest that fits, else the one that comes nearest; at least one has a forecast."""
    known = [(row, row.forecast) for row in rows if row.forecast is not None]
    fitting = [(row, found) for row, found in known if found.fits]
    if fitting:  # of those that take as long, the one that leaves most memory
        return min(fitting, key=lambda entry: (float(f"{entry[1].time.total:.2g}"), entry[1].device))[0]
    return max(known, key=lambda entry: entry[1].headroom)[0]


def in_three_lines(found: Forecast, machine: Machine) -> list[tuple[str, str]]:
    """What a dry run says of memory and time, as rows of its plan."""
    fits = "fits" if found.headroom >= 0 else "DOES NOT FIT"
    lacking = found.host_capacity is not None and found.host_node > found.host_capacity
    host = f" of {size(found.host_capacity or 0)}: DOES NOT FIT" if lacking else " of host memory a node"
    return [
        (
            "memory",
            f"{gib(found.device)} of {gib(found.capacity)} GiB on a rank ({machine.gpu.name}) at most, in "
            f"{found.phase}: {fits}",
        ),
        (
            "host, disk",
            f"{size(found.host_node)}{host}, {size(found.checkpoint)} a checkpoint, "
            f"{size(found.copy_node)} of host memory to write it in the background"
            + (f", {size(found.nvme_node)} of NVMe a node" if found.nvme_node else ""),
        ),
        ("speed", _speed(found)),
    ]


def _speed(found: Forecast) -> str:
    """What the arithmetic of a step says of its time, where it is most of it."""
    if found.time.total < LEAST_SECONDS:
        return "not forecast: the model is so small that starting kernels, not arithmetic, takes most of a step"
    return (
        f"{found.time.total:.3g} s a step, {rate(found.pairs_per_second)} pairs/s if kernels reach 40 % of the "
        "device's peak (dsdpo estimate has the details)"
    )


def overview(rows: Sequence[Row], machine: Machine) -> str:
    """All pairs of JSONs, the best marked."""
    best = best_of(rows)
    heads = ("policy", "reference", "fits", "GiB a rank", "left", "host GiB", "NVMe GiB", "s a step", "pairs/s")
    lines = [heads]
    for row in rows:
        names = (short(row.policy), short(row.reference))
        if (found := row.forecast) is None:
            lines.append((*names, "refused", row.refused.splitlines()[0], "", "", "", "", ""))
            continue
        fits = "yes, fastest" if row is best else "yes"
        if not found.fits:
            fits = "no" if found.headroom < 0 else "no, host memory"
        lines.append(
            (
                *names,
                fits,
                gib(found.device),
                gib(found.headroom),
                gib(found.host_node),
                gib(found.nvme_node),
                f"{found.time.total:.3g}",
                rate(found.pairs_per_second),
            )
        )
    widths = [max(len(line[at]) for line in lines if at != 3 or line[2] != "refused") for at in range(len(heads))]
    text = [
        "  ".join(
            word.ljust(width) if at < 3 or line[2] == "refused" else word.rjust(width)
            for at, (word, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    title = (
        f"{machine.ranks} x {machine.gpu.name} ({gib(machine.gpu.memory)} GiB), "
        f"{machine.nodes} node{'s' if machine.nodes > 1 else ''}; host and NVMe GiB are a node's"
    )
    return "\n".join([title, "", *text])


def details(row: Row) -> str:
    """One forecast by part, in GiB on a rank."""
    found = row.forecast
    assert found is not None
    engines = (("policy", found.policy), ("reference", found.reference))
    columns = [
        (name, place, amounts)
        for name, amounts in engines
        for place in PLACES
        if any(where == place and size for (_, where), size in amounts.items())
    ]
    heads = [f"{name}, {place}" for name, place, _ in columns]
    width = max([len(head) for head in heads], default=0)
    lines = [
        f"{short(row.policy)} beside {short(row.reference)}, GiB on a rank while a device holds most ({found.phase}):",
        "",
    ]
    lines.append(" " * 18 + "".join(head.rjust(width + 2) for head in heads))
    for part in PARTS:
        sizes = [amounts.get((part, place), 0.0) for _, place, amounts in columns]
        if any(sizes):
            lines.append(f"  {part:<16}" + "".join((gib(size) if size else "-").rjust(width + 2) for size in sizes))
    lines.append("")
    lines.append("  by phase: " + ", ".join(f"{name} {gib(size)}" for name, size in found.phases.items()))
    made = found.training_pass
    lines.append(
        f"  a micro-batch: layers keep {gib(made.kept)}, a layer at work takes {gib(made.layers)} more or the output "
        f"head {gib(made.head)}" + (f"; {gib(made.on_host)} go to the host" if made.on_host else "")
    )
    time = found.time
    parts = {
        "policy": time.policy, "reference": time.reference, "collectives": time.collectives,
        "to and from host and disk": time.offload, "optimizer": time.optimizer,
    }  # fmt: skip
    lines.append(f"  seconds of a step: {time.total:.3g} ("
                 + ", ".join(f"{name} {seconds:.3g}" for name, seconds in parts.items() if seconds)
                 + "; collectives run beside arithmetic where overlap_comm allows)")  # fmt: skip
    lines.append(f"  on disk: {gib(found.checkpoint)} GiB a checkpoint, {gib(found.model)} GiB the trained model")
    lines.append(
        f"  to write a checkpoint in the background: {gib(found.copy_node)} GiB of host memory on rank 0's node besides"
    )
    return "\n".join(lines)


def describe_advice(advice: Sequence[Advice], best: Row) -> str:
    """What to change in `best`, or that nothing helps."""
    if not advice and best.forecast is not None and best.forecast.headroom >= 0:
        return "no change that dsdpo knows makes it fit: take nodes with more memory, or a smaller model"
    if not advice:
        return "no change that dsdpo knows makes it fit: take a smaller model or shorter pairs (data.max_length)"
    lines = ["to make it fit, the smallest change first:"]
    for one in advice:
        found = one.forecast
        after = f"{gib(found.device)} of {gib(found.capacity)} GiB, {found.time.total:.3g} s a step"
        lines.append(f"  {'; and '.join(one.changes)} ({after})")
    return "\n".join(lines)


def as_json(rows: Sequence[Row], machine: Machine, advice: Sequence[Advice]) -> dict[str, Any]:
    """Everything, in bytes and seconds."""
    return {
        "machine": asdict(machine),
        "best": (lambda row: [row.policy, row.reference])(best_of(rows)),
        "fits": any(row.fits for row in rows),
        "rows": [
            {"policy": row.policy, "reference": row.reference, "fits": row.fits}
            | ({"refused": row.refused} if row.forecast is None else forecast_json(row.forecast))
            for row in rows
        ],
        "advice": [{"changes": list(one.changes), **forecast_json(one.forecast)} for one in advice],
    }


def forecast_json(found: Forecast) -> dict[str, Any]:
    """A forecast in bytes and seconds."""
    amounts = [
        {"engine": engine, "part": part, "place": place, "bytes": size}
        for engine, of_engine in (("policy", found.policy), ("reference", found.reference))
        for (part, place), size in of_engine.items()
    ]
    return {
        "phase": found.phase,
        "phases": dict(found.phases),
        "training_pass": asdict(found.training_pass),
        "amounts": amounts,
        "device_bytes": found.device,
        "device_capacity": found.capacity,
        "headroom_bytes": found.headroom,
        "host_bytes_per_rank": found.host_rank,
        "host_bytes_per_node": found.host_node,
        "nvme_bytes_per_node": found.nvme_node,
        "checkpoint_bytes": found.checkpoint,
        "checkpoint_copy_bytes_per_node": found.copy_node,
        "model_bytes": found.model,
        "seconds": asdict(found.time),
        "pairs_per_second": found.pairs_per_second,
    }


def short(path: str) -> str:
    """The file, with its folder where that is one for references."""
    parts = Path(path).parts
    return "/".join(parts[-2:] if parts[-2:-1] == ("reference",) else parts[-1:])


def gib(size: float) -> str:
    """Bytes as GiB, with as many digits as tell something."""
    value = size / GIB
    return f"{value:.1f}" if abs(value) >= 0.095 or value == 0 else f"{value:.3f}"


def size(of: float) -> str:
    """Bytes in the unit that tells something."""
    return f"{gib(of)} GiB" if of >= 0.1 * GIB else f"{of / 2**20:.1f} MiB"


def rate(value: float) -> str:
    """A number in three digits, or whole where it has more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
