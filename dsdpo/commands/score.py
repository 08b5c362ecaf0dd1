"""`dsdpo score RUN|MODEL --data FILE --out F.parquet`: log-probs, rewards and margin of each pair, as a table.

On any number of ranks: `deepspeed --num_gpus 8 --module dsdpo score RUN --data FILE --out F.parquet`.
"""

from __future__ import annotations

from typing import Any

from dsdpo.commands.target import ScoreArguments
from dsdpo.console import counted, quiet_libraries, say
from dsdpo.distributed import all_or_none, rank
from dsdpo.engine.build import device
from dsdpo.errors import StoppedError
from dsdpo.run import scores
from dsdpo.run.finished import open_run
from dsdpo.run.judge import judged
from dsdpo.run.plan import Plan
from dsdpo.run.reward_bench import section_scores
from dsdpo.stop_request import STOPPED, StopRequest
from dsdpo.stop_signals import noted_signals
from dsdpo.training.lost_ranks import watched_ranks


def main(given: ScoreArguments) -> int:
    """Run the command; the exit code."""
    quiet_libraries(verbose=given.verbose)
    target = given.target
    finished = None if target.folder is None else open_run(target.folder)
    stop = StopRequest(None, deadline=None, device=device())
    try:
        with (
            noted_signals(),
            watched_ranks(lost_after=target.run.distributed.lost_after),
            judged(target.run, finished, checkpoint=given.checkpoint) as what,
        ):
            table, plan = scores.score_judged(
                what, target.sources, run_file=target.name, stop=stop, tokens=given.tokens, by=given.by
            )
            facts = {"policy": what.name, "reference": what.reference and what.reference.path,
                     "beta": what.loss(what.run).beta(what.loss_step), "loss": what.run.loss.types}  # fmt: skip
            with all_or_none():
                if rank() == 0:
                    _report(table, plan, given, facts=facts)
    except StoppedError as stopped:
        say(f"stopped by {stopped}; what was scored is stored, go on with the same command")
        return STOPPED
    return 0


def _report(table: scores.Table, plan: Plan, given: ScoreArguments, *, facts: dict[str, Any]) -> None:
    """Write the files and say what the scores say, on rank 0."""
    sources = given.target.sources
    kept = scores.keep_rows(table, given.condition)
    scores.write_table(table, given.out, kept, facts=facts)
    say(scores.summary(table, kept if given.condition else None))
    if given.by:
        shares = scores.say_groups(table, scores.values_of(sources, plan, given.by))
        if given.rewardbench:
            for section, share in section_scores(shares).items():
                say(f"{section:<30}{share:>8.1%}")
    if given.rows is not None:
        count = scores.write_rows(sources, plan, kept, given.rows)
        say(f"rows     {given.rows} ({counted(count, 'row')})")
    say(f"scores   {given.out}")
