"""`dsdpo train RUN.yaml`: a run from its settings to an exported model, told top to bottom."""

from __future__ import annotations

import json
import platform
import re
import sys
from contextlib import closing
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsdpo.config.load import check_deepspeed_files, dump_yaml, load_run, run_parser
from dsdpo.console import quiet_libraries, say

STOPPED = 75  # exit code: saved and stopped early, to be started again with --resume auto (EX_TEMPFAIL)

if TYPE_CHECKING:
    from dsdpo.run.plan import Plan


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    parser = run_parser("dsdpo train", "Train a policy on preference pairs, anchored to a reference model.")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan and stop")
    parser.add_argument("--verbose", action="store_true", help="show what DeepSpeed and transformers have to say")
    argv = [re.sub(r"^--resume(?==|$)", "--checkpoint.resume", word) for word in argv]
    run, flags = load_run(argv, parser)
    check_deepspeed_files(run)

    # torch, transformers and DeepSpeed take seconds to import, which a wrong setting need not wait for.
    from dsdpo.run.plan import plan_run
    from dsdpo.run.summary import describe_plan

    quiet_libraries(verbose=flags.verbose)
    plan = plan_run(run, run_file=flags.run)
    say(describe_plan(plan))
    if flags.dry_run:
        return 0
    from dsdpo.training.lost_ranks import watched_ranks

    with watched_ranks(lost_after=run.distributed.lost_after):
        return train(plan)


def train(plan: Plan) -> int:
    """Build both engines, train, evaluate, save and export; the exit code. Collective."""
    from dsdpo.engine.build import device
    from dsdpo.objective.losses import make_loss
    from dsdpo.run.models import build_policy_and_reference
    from dsdpo.run.performance import measured
    from dsdpo.run.plan import make_output_folder
    from dsdpo.run.resume import begin, checkpoint_to_resume, save
    from dsdpo.run.summary import describe_results
    from dsdpo.training import loop
    from dsdpo.training.cadence import Cadence
    from dsdpo.training.evaluate import evaluate
    from dsdpo.training.export import export_model
    from dsdpo.training.metrics import Meter
    from dsdpo.training.nonfinite import record_skipped
    from dsdpo.training.saver import Saver
    from dsdpo.training.stop import StopRequest, record_stop
    from dsdpo.training.tracking import Tracker

    run, due, meter = plan.run, Cadence.of(plan.run, plan.total_steps), Meter()
    checkpoint = checkpoint_to_resume(plan)
    folder = make_output_folder(run, keep=checkpoint is not None)
    stop = StopRequest(folder, deadline=run.checkpoint.deadline, device=device())
    record_settings(plan, folder)
    policy, reference = build_policy_and_reference(plan)
    state, identity = begin(checkpoint, plan, folder, policy=policy, reference=reference, meter=meter)
    loss_fn = make_loss(run.loss)
    tracker = Tracker(run, folder, facts={"reference_identity": identity})

    def evaluate_now() -> None:
        if plan.evaluation is not None:
            tracker.log(state.step, evaluate(policy, reference, loss_fn, plan.held_out_windows(device())))

    parts = {"tracker": tracker, "policy": policy, "reference": reference, "meter": meter}
    saver = Saver(partial(save, plan, folder, state, **parts), run.checkpoint)
    if state.step == 0 and due.evaluate(0):
        evaluate_now()
    with stop, closing(plan.training_windows(device(), state.step)) as windows:
        reason = loop.train(
            policy,
            reference,
            loss_fn,
            windows,
            state=state,
            due=due,
            tracker=tracker,
            meter=meter,
            perf=measured(run, policy, reference),
            evaluate=evaluate_now,
            save=saver,
            skipped=partial(record_skipped, folder, run),
            stop=stop.reason,
        )
    if reason is None:
        export_model(policy, plan.tokenizer, run, folder / "model", metrics=tracker.last_evaluation)
    saver.settle()
    ended = record_stop(folder, reason=reason, step=state.step) if reason else describe_results(folder)
    tracker.close()
    say(ended)
    return STOPPED if reason else 0


def record_settings(plan: Plan, folder: Path) -> None:
    """Write the resolved settings, both DeepSpeed configs and the environment into the run folder. Collective."""
    import torch

    from dsdpo.distributed import all_or_none, rank, world_size

    packages = ("deepspeed", "transformers", "peft", "datasets", "dsdpo")
    environment: dict[str, Any] = {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "world_size": world_size(),
        "versions": {"torch": torch.__version__} | {name: version(name) for name in packages},  # with its CUDA build
    }
    with all_or_none():
        if rank() == 0:
            (folder / "config.yaml").write_text(dump_yaml(plan.run), encoding="utf-8")
            files = {"deepspeed.json": plan.policy_config, "environment.json": environment}
            if plan.reference.own_engine:
                files["deepspeed_reference.json"] = plan.reference_config
            for name, content in files.items():
                (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
