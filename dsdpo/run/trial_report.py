"""Trials in a table beside their forecasts, as JSON, and as a suggestion for the run file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from dsdpo.estimate.forecast import Forecast
from dsdpo.estimate.seconds import Machine
from dsdpo.run.estimate_report import GIB, forecast_json, gib, short
from dsdpo.run.trial_process import Outcome

HEADS = ("policy", "reference", "fits", "GiB a rank", "(est.)", "host GiB", "(est.)", "s a step", "(est.)", "pairs/s",
         "gathers")  # fmt: skip
ALIKE = 0.02  # of pairs/s, within which the trial that takes less memory is better


@dataclass(frozen=True)
class Tried:
    """A pair of DeepSpeed JSONs, how its trial ended and what the forecast says of it."""

    policy: str
    reference: str | None  # None: the run's own, or derived from the policy's
    outcome: Outcome
    forecast: Forecast | None

    def describe(self, own: str) -> str:
        """zero2.json beside reference/zero0.json; `own` is what the reference has where no JSON is named."""
        return f"{short(self.policy)} beside {short(self.reference or own)}"


def best_of(tried: Sequence[Tried]) -> Tried | None:
    """The fastest, of those as fast the one that leaves most memory; None if no trial came to its end."""
    done = [(one, one.outcome.figures) for one in tried if one.outcome.figures is not None]
    if not done:
        return None
    most = max(figures.pairs_per_second for _, figures in done)
    fast = [entry for entry in done if entry[1].pairs_per_second >= (1 - ALIKE) * most]
    return min(fast, key=lambda entry: entry[1].device_bytes)[0]


def host_forecast(found: Forecast, machine: Machine) -> float:
    """Bytes of host memory of the trial's ranks; on a CPU what they compute with is there too."""
    ranks = min(machine.ranks, machine.per_node)
    return found.device * ranks if machine.gpu.is_cpu else found.host_node


def table(tried: Sequence[Tried], machine: Machine, *, own: str) -> str:
    """All trials, the best marked, and below them why some have no figures."""
    best = best_of(tried)
    lines = [HEADS, *(cells(one, machine, own=own, best=one is best) for one in tried)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(HEADS))]
    text = [
        "  ".join(
            word.ljust(width) if at < 3 else word.rjust(width)
            for at, (word, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    reasons = [f"{one.describe(own)}: {one.outcome.reason}" for one in tried if not one.outcome.fits]
    return "\n".join([*text, *([""] if reasons else []), *reasons])


def cells(one: Tried, machine: Machine, *, own: str, best: bool) -> tuple[str, ...]:
    """One row of the table."""
    figures, found = one.outcome.figures, one.forecast
    ended = "yes, fastest" if best else one.outcome.ended
    estimated = ("-",) * 3 if found is None else (
        gib(found.device), gib(host_forecast(found, machine)), f"{found.time.total:.3g}"
    )  # fmt: skip
    measured = ("-",) * 5 if figures is None else (
        gib(figures.device_bytes), gib(figures.host_bytes), f"{figures.seconds:.3g}",
        f"{figures.pairs_per_second:.3g}", f"{figures.gathers:.0f}",
    )  # fmt: skip
    beside = [word for pair in zip(measured[:3], estimated, strict=True) for word in pair]
    return (short(one.policy), short(one.reference or own), ended, *beside, *measured[3:])


def as_json(tried: Sequence[Tried], machine: Machine) -> dict[str, Any]:
    """Everything, in bytes and seconds."""
    best = best_of(tried)
    return {
        "machine": asdict(machine),
        "best": None if best is None else [best.policy, best.reference],
        "rows": [
            {
                "policy": one.policy,
                "reference": one.reference,
                "ended": one.outcome.ended,
                "fits": one.outcome.fits,
                **({"reason": one.outcome.reason} if one.outcome.figures is None else asdict(one.outcome.figures)),
                "estimate": None if one.forecast is None else forecast_json(one.forecast)
                | {"host_bytes": host_forecast(one.forecast, machine)},
            }
            for one in tried
        ],
    }  # fmt: skip


def suggestion(best: Tried, machine: Machine, *, run_file: str, steps: int) -> str:
    """The lines for the run file, with what was measured above them."""
    figures = best.outcome.figures
    assert figures is not None
    lines = {"deepspeed": best.policy} | ({"reference": {"deepspeed": best.reference}} if best.reference else {})
    return (
        f"# For {run_file}: the fastest that fits, tried for {steps} steps on {machine.ranks} x {machine.gpu.name}:\n"
        f"# {figures.seconds:.3g} s a step, {figures.pairs_per_second:.3g} pairs/s, "
        f"{figures.device_bytes / GIB:.2f} GiB a rank, {figures.host_bytes / GIB:.2f} GiB of host memory\n"
        + yaml.safe_dump(lines, sort_keys=False)
    )
