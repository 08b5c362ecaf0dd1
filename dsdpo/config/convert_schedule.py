"""The schedule of another program's run as ours: learning rate, optimizer, when to evaluate and when to save."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import ValidationError

from dsdpo.config.conversion import OFF, Conversion
from dsdpo.config.optimizer import NO_ADAFACTOR, OPTIMIZERS, OptimizerConfig


def schedule(found: Conversion) -> None:
    """Learning rate, when to evaluate and when to save."""
    if found.theirs.get("warmup_steps") not in OFF and found.theirs.get("warmup_steps") != 0:
        found.theirs.pop("warmup_ratio", None)
    steps = found.theirs.get("warmup_steps")
    if isinstance(steps, float) and 0 < steps < 1:  # transformers 5 takes a share here
        found.put("optimizer.warmup_ratio", found.take("warmup_steps"), "warmup_steps")
    optimizer(found)
    learning_rate(found)
    for strategy, steps_name, key in (
        ("eval_strategy", "eval_steps", "evaluation.every_steps"),
        ("save_strategy", "save_steps", "checkpoint.every_steps"),
    ):
        how, value = (
            found.take(strategy, "evaluation_strategy" if "eval" in strategy else strategy),
            found.take(steps_name),
        )
        if isinstance(value, float) and value < 1:
            found.leave(steps_name, value, f"a share of all steps: give {key} as a number of steps")
        elif value is not None and how not in ("no", "epoch"):
            found.put(key, max(0, int(value)), steps_name)
        elif how == "no":
            if key.startswith("checkpoint") or "eval" in found.run.get("data", {}):
                found.put(key, 0, strategy)
        elif how == "epoch":
            found.leave(strategy, how, f"give {key} as a number of steps")


def optimizer(found: Conversion) -> None:
    """transformers' `optim`, as TRL, axolotl and LLaMA-Factory have it, and what goes with it."""
    name, muon = found.take("optim", "optimizer"), found.take("use_muon")
    if name is None and not muon:
        return
    theirs = "muon" if muon else str(name)
    bare = re.sub(r"^paged_|_(torch|hf|bnb|apex|fused|xla|npu|32bit|8bit|4bit)", "", theirs)
    kind = "adamw_8bit" if bare == "adamw" and "8bit" in theirs else bare
    if kind == "adafactor":
        found.leave("optim", theirs, NO_ADAFACTOR.partition(": ")[0] + "; adamw is used")
        return
    if kind not in OPTIMIZERS:
        found.leave("optim", theirs, f"adamw is used; optimizer.type has {', '.join(OPTIMIZERS)}")
        return
    if kind != "adamw":
        found.put("optimizer.type", kind, "use_muon" if muon else "optim")
    if re.search(r"4bit", theirs) or (kind == "lion" and "8bit" in theirs):
        found.leave("optim", theirs, f"{kind} with states of 32 bits is used")
    if kind == "lion" and "adam_beta2" not in found.theirs:
        found.put("optimizer.adam_beta2", 0.999, "transformers' default of adam_beta2")
    if kind == "muon" and (norm := found.take("max_grad_norm")):
        found.leave("max_grad_norm", norm, "muon's updates do not depend on the size of gradients")


def learning_rate(found: Conversion) -> None:
    """How the learning rate falls, and to what."""
    kind = found.take("lr_scheduler_type", "lr_scheduler", "lr_schedule")
    given = found.take("lr_scheduler_kwargs")
    ratio = found.take("cosine_min_lr_ratio", "min_lr_ratio")  # axolotl's, OpenRLHF's
    if isinstance(given, str):  # on a command line
        try:
            given = json.loads(given)
        except ValueError:
            given = {given: None}
    options = dict(given) if isinstance(given, dict) else {}
    if ratio and kind in ("cosine", "cosine_with_min_lr"):
        kind = "cosine_with_min_lr"
        options = {"min_lr_rate": ratio, **options}
    if kind is None and not options:
        return
    kind = kind or "linear"  # transformers' default
    if options and not not_taken(found, kind, {}) and (problem := not_taken(found, kind, options)):
        found.leave("lr_scheduler_kwargs", options, problem)
        options = {}
    if problem := not_taken(found, kind, options):
        found.leave("lr_scheduler_type", f"{kind} {options or ''}", problem)
        return
    found.put("optimizer.lr_scheduler_type", kind, "lr_scheduler_type")
    if options:
        found.put("optimizer.lr_scheduler_kwargs", options, "lr_scheduler_kwargs")
    if kind == "constant":  # whose warm-up transformers leaves out
        for name in ("warmup_steps", "warmup_ratio", "lr_warmup_ratio", "lr_warmup_steps"):
            found.theirs.pop(name, None)
            found.defaults.pop(name, None)


def not_taken(found: Conversion, kind: Any, options: dict[str, Any]) -> str | None:
    """Why a schedule of theirs is none of ours, None where it is."""
    settings = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": options}
    rate = found.theirs.get("learning_rate")
    try:
        OptimizerConfig.model_validate(settings | ({"learning_rate": rate} if isinstance(rate, float) else {}))
    except ValidationError as error:
        detail = error.errors()[0]
        message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "takes")
        place = ".".join(map(str, ("optimizer", *detail["loc"])))
        return message if detail["type"] == "value_error" else f"{place} {message}"
    return None
