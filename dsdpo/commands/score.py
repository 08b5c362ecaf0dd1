"""`dsdpo score RUN|MODEL --data FILE --out F.parquet`: log-probs, rewards and margin of each pair, as a table.

On any number of ranks: `deepspeed --num_gpus 8 --module dsdpo score RUN --data FILE --out F.parquet`.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsdpo.accelerator import choose_accelerator
from dsdpo.commands.arguments import RunParser, user_path
from dsdpo.commands.target import Target, load_target, target_parser
from dsdpo.config.run import RunConfig
from dsdpo.console import counted, quiet_libraries, say
from dsdpo.data.condition import SCORES, Condition
from dsdpo.errors import ConfigError

if TYPE_CHECKING:
    from dsdpo.run.plan import Plan
    from dsdpo.run.scores import Table


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    target, given = load_target(argv, _parser())
    condition = _checked(given)
    if given.tokens and target.run.distributed.sequence_parallel > 1:
        raise ConfigError("--tokens: needs whole rows on each rank: add --distributed.sequence_parallel 1")
    if given.rewardbench:
        target, given.by = _as_reward_bench(target), "subset"
    choose_accelerator(computes=True)
    quiet_libraries(verbose=given.verbose)

    from dsdpo.distributed import all_or_none, rank
    from dsdpo.engine.build import device
    from dsdpo.errors import StoppedError
    from dsdpo.run.finished import open_run
    from dsdpo.run.judge import judged
    from dsdpo.run.scores import score_judged
    from dsdpo.stop_request import STOPPED, StopRequest
    from dsdpo.stop_signals import noted_signals
    from dsdpo.training.lost_ranks import watched_ranks

    finished = None if target.folder is None else open_run(target.folder)
    stop = StopRequest(None, deadline=None, device=device())
    try:
        with (
            noted_signals(),
            watched_ranks(lost_after=target.run.distributed.lost_after),
            judged(target.run, finished, checkpoint=given.checkpoint) as what,
        ):
            table, plan = score_judged(
                what, target.sources, run_file=target.name, stop=stop, tokens=given.tokens, by=given.by
            )
            facts = {"policy": what.name, "reference": what.reference and what.reference.path,
                     "beta": what.loss(what.run).beta(what.loss_step), "loss": what.run.loss.types}  # fmt: skip
            with all_or_none():
                if rank() == 0:
                    _report(table, plan, target, given, condition, facts=facts)
    except StoppedError as stopped:
        say(f"stopped by {stopped}; what was scored is stored, go on with the same command")
        return STOPPED
    return 0


def _parser() -> RunParser:
    parser = target_parser("dsdpo score", __doc__)
    add = parser.add_argument
    add("--out", type=user_path, required=True, metavar="F.parquet", help="table to write, a row for each pair")
    add("--tokens", action="store_true", help="also the id and log-prob of each token of the responses")
    add("--keep", metavar="CONDITION", help="write only pairs for which this is true, e.g. 'margin > 0.1 and right'")
    add(
        "--rows", type=user_path, metavar="F.jsonl", help="also write the kept pairs' rows as they stood in their files"
    )
    add("--by", metavar="COLUMN", help="also say the share of right pairs by what this column of the rows holds")
    add("--rewardbench", action="store_true", help="the data is RewardBench's: say its sections (by subset)")
    return parser


def _checked(given: Namespace) -> Condition | None:
    for name, path, suffix in (("--out", given.out, ".parquet"), ("--rows", given.rows, ".jsonl")):
        if path is None:
            continue
        if path.suffix != suffix or path.is_dir():
            raise ConfigError(f"{name}: {path} is no {suffix} file; give a path that ends so")
        if not path.absolute().parent.is_dir():
            raise ConfigError(f"{name}: there is no folder {path.absolute().parent}; make it, or choose another")
    for path in given.data or ():
        if given.rows is not None and given.rows.resolve() == Path(path).expanduser().resolve():
            raise ConfigError(f"--rows: {path} is read; choose another file")
    if given.rewardbench and given.by:
        raise ConfigError("--by and --rewardbench both group the pairs: keep one")
    if given.keep is None:
        return None
    condition = Condition(given.keep, key="--keep")
    condition.check_columns(SCORES)
    return condition


def _as_reward_bench(target: Target) -> Target:
    """The target with RewardBench's texts put into the chat template; of a Hub id or folder the split `filtered`."""
    data = target.run.data.model_copy(update={"text": "chat"})
    run: RunConfig = target.run.model_copy(update={"data": data})
    sources = [
        source if source.split or Path(source.path).expanduser().is_file()
        else source.model_copy(update={"split": "filtered"})
        for source in target.sources
    ]  # fmt: skip
    return Target(run, target.folder, sources, target.name)


def _report(
    table: Table, plan: Plan, target: Target, given: Namespace, condition: Condition | None, *, facts: dict[str, Any]
) -> None:
    """Write the files and say what the scores say, on rank 0."""
    from dsdpo.run import scores
    from dsdpo.run.reward_bench import section_scores

    kept = scores.keep_rows(table, condition)
    scores.write_table(table, given.out, kept, facts=facts)
    say(scores.summary(table, kept if condition else None))
    if given.by:
        shares = scores.say_groups(table, scores.values_of(target.sources, plan, given.by))
        if given.rewardbench:
            for section, share in section_scores(shares).items():
                say(f"{section:<30}{share:>8.1%}")
    if given.rows is not None:
        count = scores.write_rows(target.sources, plan, kept, given.rows)
        say(f"rows     {given.rows} ({counted(count, 'row')})")
    say(f"scores   {given.out}")
