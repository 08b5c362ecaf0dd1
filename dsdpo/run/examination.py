"""`dsdpo doctor` on all ranks: what each node finds about itself, and what only several can find out together."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsdpo.config.run import RunConfig
from dsdpo.disks import find_disk
from dsdpo.distributed import all_or_none, barrier, by_host, gather_objects, learn_hosts, local_rank, world_size
from dsdpo.errors import ConfigError, DsdpoError
from dsdpo.run.agreement import agree, code_digest, installed, skew
from dsdpo.run.health import Finding, folders, node_findings
from dsdpo.run.links import link_findings
from dsdpo.run.plan import ask_deepspeed, check_inputs, nearest_existing, shared_configs


def examine(run: RunConfig | None, run_file: Path | None) -> list[Finding]:
    """Everything found, the same on all ranks. Collective."""
    learn_hosts()
    found: list[Finding] = []
    configs: tuple[dict[str, Any], ...] = ()
    if run is not None:
        configs, problem = try_run(run, run_file or Path("the run"))
        found.append(problem or Finding("ok", "the run", "settings, models, DeepSpeed JSONs and output_dir are sound"))
    own = node_findings(run, configs) if local_rank() == 0 else []
    found += merged(gather_objects(own))
    found += [*_unlike_packages(), *_clocks(), *_sharing(run)]
    return found + link_findings()


def try_run(run: RunConfig, run_file: Path) -> tuple[tuple[dict[str, Any], ...], Finding | None]:
    """The run's resolved DeepSpeed configs, and what would stop it before its data is read. Collective."""
    try:
        with all_or_none():
            _, models, _, tokenizer = check_inputs(run, run_file, ranks=world_size(), writes_output=True)
        agree(run, tokenizer, models)
        hidden_size = int(models["model.path"].get_text_config().hidden_size)
        configs = shared_configs(run, run_file, hidden_size=hidden_size, total_steps=None)
        ask_deepspeed(run, configs)
        return configs, None
    except DsdpoError as error:
        return (), Finding("red", "the run", str(error))


def merged(by_rank: list[list[Finding]]) -> list[Finding]:
    """The findings of all nodes, alike ones as one with all their hosts."""
    ranks: dict[Finding, list[int]] = {}
    for rank, findings in enumerate(by_rank):
        for finding in findings:
            ranks.setdefault(finding, []).append(rank)
    nodes = sum(bool(findings) for findings in by_rank)
    return [
        replace(finding, where="" if len(theirs) == nodes else by_host(theirs)) for finding, theirs in ranks.items()
    ]


def _unlike_packages() -> Iterator[Finding]:
    """Code and packages that are not the same on all ranks. Collective."""
    own = {"dsdpo's code": code_digest()}
    own |= {name: installed(name) for name in ("torch", "deepspeed", "transformers", "peft")}
    every = gather_objects(own)
    for name in own:
        having: dict[str, list[int]] = {}
        for rank, versions in enumerate(every):
            having.setdefault(versions[name], []).append(rank)
        if len(having) > 1:
            value = ", ".join(f"{version} on {by_host(ranks)}" for version, ranks in having.items())
            yield Finding("red", name, value, "install the same on every node")


def _clocks() -> Iterator[Finding]:
    """Clocks that are not the same. Collective."""
    barrier()
    lines = list(skew(gather_objects(time.clock_gettime(time.CLOCK_REALTIME))))
    for line in lines:
        yield Finding("yellow", "clock", line.removeprefix("clocks: "), "set them by NTP: logs are hard to compare")
    if not lines and world_size() > 1:
        yield Finding("ok", "clock", "all ranks agree within 5 s")


def _sharing(run: RunConfig | None) -> Iterator[Finding]:
    """Which of a run's folders all nodes share. Collective."""
    if world_size() == 1:
        return
    for name, folder in folders(run).items():
        try:
            disk = find_disk(nearest_existing(folder), key=name)
        except ConfigError:
            continue  # said as a disk that cannot be written
        value = "one disk for all ranks" if disk.shared else f"disks of their own: {disk.describe()}"
        yield Finding("ok", f"sharing of {name}", value)
