"""Every command: what it is for, who checks its command line, and what it does with ranks and GPUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dsdpo.commands import arguments, model_arguments, target


@dataclass(frozen=True)
class Command:
    """A command, whose `main` stands in the module of its name in this folder."""

    summary: str
    # Checks the command line, before the module is imported: torch, DeepSpeed and transformers take seconds that a
    # typing error need not wait for. None: `main` does, in a module that imports none of them.
    parse: Callable[[list[str]], Any] | None = None
    computes: bool = False  # on a GPU, if there is one: refused where torch cannot use it
    meets: bool = False  # ranks meet from the start on: they note signals until then, and tell each other of errors


COMMANDS = {
    "train": Command(
        "train a policy on preference pairs: dsdpo train RUN.yaml", arguments.train, computes=True, meets=True
    ),
    "init": Command("write a run file, DeepSpeed JSONs and a start script to begin with: dsdpo init FOLDER"),
    "convert": Command("make a run file of another program's settings: dsdpo convert --from trl FILE"),
    "prepare": Command(
        "tokenize a run's data, on a machine without a GPU if need be: dsdpo prepare RUN.yaml", arguments.prepare
    ),
    "estimate": Command(
        "will it fit, and how fast? no GPU needed: dsdpo estimate RUN.yaml --ranks 8 --gpu h100",
        arguments.estimate,
        meets=True,
    ),
    "precompute": Command(
        "score all pairs with the reference, for training to find: dsdpo precompute RUN.yaml",
        arguments.precompute,
        computes=True,
        meets=True,
    ),
    "inspect": Command("a run's pairs as they are trained on: dsdpo inspect RUN.yaml", arguments.inspect),
    "evaluate": Command(
        "held-out metrics of a trained policy: dsdpo evaluate RUN|MODEL --data FILE", target.evaluate, computes=True
    ),
    "score": Command(
        "log-probs, rewards and margins of pairs as a table: dsdpo score RUN|MODEL --data FILE --out F.parquet",
        target.score,
        computes=True,
    ),
    "export": Command(
        "write a checkpoint of a run as a model folder: dsdpo export RUN --out FOLDER", model_arguments.export
    ),
    "merge": Command(
        "merge a LoRA adapter into its base model: dsdpo merge ADAPTER BASE --out FOLDER", model_arguments.merge
    ),
    "doctor": Command(
        "look for what would stop or slow a run, on all nodes: dsdpo doctor [RUN.yaml]", arguments.doctor, meets=True
    ),
    "demo": Command("make a small model and data set, train on two ranks and show what happened"),
    "compare": Command(
        "try a run under several DeepSpeed JSONs, or finished runs side by side: dsdpo compare RUN.yaml|RUN ...",
        arguments.compare,
        meets=True,
    ),
    "plot": Command("draw the metrics of runs: dsdpo plot RUN ..."),
    "report": Command("runs side by side as one page: dsdpo report RUN ... --html FILE"),
    "completion": Command("print a script that completes commands and settings: dsdpo completion bash"),
}
