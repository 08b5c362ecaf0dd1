"""`dsdpo evaluate RUN|MODEL --data FILE`: held-out metrics of a trained policy, or of a model beside a reference.

The same numbers as in training, under the run's loss and against its reference, on any number of ranks:
`deepspeed --num_gpus 8 --module dsdpo evaluate RUN --data FILE`.
"""

from __future__ import annotations

from dsdpo.atomic import write_json
from dsdpo.commands.target import EvaluateArguments
from dsdpo.console import quiet_libraries, say
from dsdpo.distributed import rank
from dsdpo.run.evaluation import evaluate_judged
from dsdpo.run.finished import open_run
from dsdpo.run.judge import judged
from dsdpo.training.jsonl import without_nan
from dsdpo.training.lost_ranks import watched_ranks


def main(given: EvaluateArguments) -> int:
    """Run the command; the exit code."""
    quiet_libraries(verbose=given.verbose)
    target = given.target
    finished = None if target.folder is None else open_run(target.folder)
    with (
        watched_ranks(lost_after=target.run.distributed.lost_after),
        judged(target.run, finished, checkpoint=given.checkpoint) as what,
    ):
        metrics = evaluate_judged(what, target.sources, run_file=target.name)
    if rank() == 0:
        say("\n".join(f"{name.removeprefix('eval/'):<40}{value:>14.6g}" for name, value in metrics.items()))
        if given.out is not None:
            answer = {"policy": what.name, "step": what.step, "metrics": without_nan(metrics)}
            write_json(given.out, answer | {"data": [source.path for source in target.sources]})
            say(f"written to {given.out}")
    return 0
