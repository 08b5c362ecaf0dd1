"""`dsdpo estimate RUN.yaml`: what a run takes under each pair of DeepSpeed JSONs, and what to change if none fits."""

from __future__ import annotations

import json

from dsdpo.commands.arguments import EstimateArguments
from dsdpo.console import is_main, launched, quiet_libraries, say
from dsdpo.errors import ConfigError
from dsdpo.estimate.hardware import hardware
from dsdpo.estimate.seconds import Machine
from dsdpo.run.estimate import Subject, forecast_of, subject_of, this_machine, with_files
from dsdpo.run.estimate_advice import advise
from dsdpo.run.estimate_report import Row, as_json, best_of, describe_advice, details, overview
from dsdpo.run.notes import idle_ranks


def main(given: EstimateArguments) -> int:
    """Run the command; the exit code."""
    quiet_libraries(verbose=False)
    if not is_main():  # started under a launcher: one process is enough, the others say nothing
        return 0
    machine = machine_of(given)
    subject = subject_of(given.run, given.run_file, tokens=given.tokens, ranks=machine.ranks)
    rows = [row_of(subject, machine, policy, reference) for policy in given.policies for reference in given.references]
    if all(row.forecast is None for row in rows):
        raise ConfigError("\n".join(dict.fromkeys(row.refused for row in rows)))
    best = best_of(rows)
    advice = []
    if not best.fits:
        advice = advise(
            with_files(subject, best.policy, given.references[rows.index(best) % len(given.references)]), machine
        )
    if given.as_json:
        print(json.dumps(as_json(rows, machine, advice), indent=1))
        return 0
    say(overview(rows, machine))
    say()
    say(details(best))
    for line in idle_ranks(given.run, machine.ranks):
        say(f"  {line}")
    if not best.fits:
        say()
        say(describe_advice(advice, best))
    return 0


def machine_of(given: EstimateArguments) -> Machine:
    """What the run is to run on, as the options say; else this machine with the ranks that were started."""
    ranks = given.ranks or launched().world_size
    per_node = given.per_node or (min(8, ranks) if given.ranks else launched().local_size)
    host = given.host_memory * 2**30 if given.host_memory else None
    if given.gpu is None:
        return this_machine(ranks=ranks, per_node=per_node, host_memory=host)
    gpu = hardware(given.gpu, ranks_per_node=min(per_node, ranks))
    return Machine(gpu, ranks, min(per_node, ranks), host)


def row_of(subject: Subject, machine: Machine, policy: str, reference: str | None) -> Row:
    """The forecast under two JSONs, or what is wrong with them."""
    names = (policy, reference or ("derived" if subject.reference.own_engine else "none"))
    try:
        return Row(*names, forecast_of(with_files(subject, policy, reference), machine))
    except ConfigError as error:
        return Row(*names, None, str(error))
