"""The trained model into the run folder: whole or not at all, tried again where the disk is full."""

from __future__ import annotations

import gc
import logging
import tempfile
import time
from pathlib import Path

from safetensors import SafetensorError

from dsdpo.atomic import delete, partial_path
from dsdpo.console import say
from dsdpo.distributed import all_or_none, broadcast_object, on_some_ranks, rank
from dsdpo.errors import DsdpoError, TrainingError
from dsdpo.run.best import restore_best
from dsdpo.run.finite_weights import check_trained
from dsdpo.run.run import Run
from dsdpo.training.checkpoint import whole_checkpoints
from dsdpo.training.export import export_model
from dsdpo.training.hub import push_folder

log = logging.getLogger(__name__)


def export_trained(run: Run) -> None:
    """Write what was trained to `model`, and `merged` if asked for, in place of what may be there. Collective.

    A failure is tried again as often and with the same pauses as a checkpoint. If none succeeds and no whole checkpoint
    holds the weights, they go to the system's folder for temporary files. Raises `TrainingError`, and earlier if no
    step was taken or the weights are not finite.
    """
    if run.policy.skipped_steps >= run.state.step > 0:
        raise TrainingError(
            f"none of the {run.state.step} steps could be taken, as no gradient was finite: nothing was trained, and "
            f"nothing is exported; see {run.folder.nonfinite}"
        )
    metrics = restore_best(run) if run.plan.run.export.which == "best" else run.tracker.last_evaluation
    check_trained(run.policy, run.plan.run)
    settings = run.plan.run.checkpoint
    for attempt in range(1, settings.save_attempts + 1):
        error = try_to_export(run, run.folder.exporting, metrics)
        if error is None:
            put_in_place(run)
            push(run)
            return
        pause_s = settings.save_pause.total_seconds() if attempt < settings.save_attempts else 0.0
        if rank() == 0:
            log.warning("NOT EXPORTED: %s. %s", error, f"Make room: tried again in {pause_s:g} s" if pause_s else "")
        time.sleep(pause_s)
    raise TrainingError(f"{run.folder.model} could not be written: {error}. {where_the_weights_are(run, metrics)}")


def try_to_export(run: Run, parent: Path, metrics: dict[str, float]) -> str | None:
    """Write `model` and perhaps `merged` into an empty folder `parent`; what went wrong, if anything. Collective."""
    try:
        with all_or_none():
            if rank() == 0:
                delete(parent)
                parent.mkdir()
        plan = run.plan
        reference = run.reference.identity
        export_model(
            run.policy,
            plan.tokenizer,
            plan.run,
            parent / run.folder.model.name,
            metrics=metrics,
            identity=None if reference is None else reference.to_json(),
        )
        return None
    except (OSError, SafetensorError, DsdpoError) as caught:  # the first two on rank 0, of which the others are told
        error = broadcast_object(str(caught))
    gc.collect()  # tracebacks hold files open, and those take up room
    if rank() == 0:
        delete(parent)
    return error


def push(run: Run) -> None:
    """Upload `model` where the run asks for it. Collective. Raises `TrainingError` where the Hub does not take it."""
    settings = run.plan.run.export
    if (name := settings.push_to_hub) is not None:
        address = on_some_ranks(rank() == 0, lambda: push_folder(run.folder.model, name, private=settings.hub_private))
        say(f"uploaded to {address}")


def put_in_place(run: Run) -> None:
    """Give what was exported its names; the old goes only then. Collective."""
    with all_or_none():
        if rank() == 0:
            for final in (run.folder.model, run.folder.merged):
                new, old = run.folder.exporting / final.name, partial_path(final)
                if new.exists():
                    delete(old)
                    if final.exists():
                        final.rename(old)
                    new.rename(final)
                    delete(old)
                elif run.plan.run.overwrite_output_dir:
                    delete(final)  # of an earlier run
            delete(run.folder.exporting)


def where_the_weights_are(run: Run, metrics: dict[str, float]) -> str:
    """What holds the weights that could not be exported, and what to do. Collective."""
    whole = broadcast_object(whole_checkpoints(run.folder.checkpoints) if rank() == 0 else [])
    if whole and int(whole[-1].name.removeprefix("step-")) == run.state.step:
        return f"{whole[-1]} has everything: make room, and start again with --resume auto, which exports it"
    elsewhere = broadcast_object(Path(tempfile.mkdtemp(prefix="dsdpo-model-")) if rank() == 0 else Path())
    if (error := try_to_export(run, elsewhere, metrics)) is None:
        return f"It is in {elsewhere} instead: move it from there, which may be emptied at the next start"
    return f"Nor could {elsewhere}: {error}. The weights are lost; earlier checkpoints are intact"
