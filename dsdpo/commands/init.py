"""`dsdpo init FOLDER`: a run of your own to start from: run file, DeepSpeed JSONs and start script.

What no option says is asked for in a terminal. Nothing is overwritten without --force.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from dsdpo.atomic import write_text
from dsdpo.commands.parsing import user_path
from dsdpo.config.load import Help, RunParser, check_run
from dsdpo.config.shipped import SHIPPED, deepspeed_jsons, recipes
from dsdpo.config.yaml_file import read_yaml
from dsdpo.errors import ConfigError

# What a reference strategy starts from, unless a recipe is named.
OF_STRATEGY = {
    "separate": "separate",
    "adapter": "adapter",
    "precomputed": "precomputed",
    "trdpo": "trdpo",
    "trdpo_adapter": "trdpo_adapter",
    "policy_snapshot": "trdpo_snapshot",
}
STRATEGIES = {
    "separate": "a second model beside the policy, partitioned or offloaded as its own JSON says",
    "adapter": "train LoRA; the policy without it is the reference: no further memory",
    "precomputed": "a pass over all pairs before training, kept on disk: no further memory",
    "trdpo": "a second model that moves towards the policy every so many steps",
    "trdpo_adapter": "the same with LoRA: a second adapter that moves",
    "policy_snapshot": "the policy as it was every so many steps, without a copy",
}
LAUNCHERS = ("local", "slurm", "ssh")
OF_ITS_MODEL = ("pad_token", "revision", "tokenizer", "chat_template", "allow_pickle", "trust_remote_code")
RUN_FILE, SCRIPT, POLICY, REFERENCE = "run.yaml", "train.sh", "policy.json", "reference.json"
LOCAL = """#!/usr/bin/env bash
# The run on this machine, one process a GPU; settings may follow, as in: ./train.sh --loss.beta 0.2
set -euo pipefail
cd "$(dirname "$0")"
exec deepspeed --num_gpus {gpus} --log_level=error --module dsdpo train run.yaml "$@"
"""
HEADER = """# Written by dsdpo init from the recipe {recipe}. Paths are relative to this folder.
#   dsdpo train run.yaml --dry-run      checks everything, prints the plan, loads no model
#   {start}
#   dsdpo train --help-section loss     what the settings of a section mean, and which others there are
"""


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    given = arguments(argv)
    asks = sys.stdin.isatty() and sys.stdout.isatty()
    if asks and given.recipe is None and given.strategy is None:
        ask_strategy(given)
    recipe, path = recipe_of(given)
    if asks:
        ask(given, read_yaml(path))
    if missing := [f"--{name}" for name in ("model", "data") if not getattr(given, name)]:
        raise ConfigError(f"init: {' and '.join(missing)} missing: say what to train and on which pairs")
    files = make_files(given, recipe, read_yaml(path))
    folder = given.folder
    old = [name for name in files if (folder / name).exists()]
    if old and not given.force:
        raise ConfigError(f"init: {folder} has {', '.join(old)} already: give another folder, or --force")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_text(folder / name, text)
            if name.endswith(".sh"):
                (folder / name).chmod(0o755)
        # Checked as it stands there: what it names is looked for as `dsdpo train` will.
        check_run(read_yaml(folder / RUN_FILE), {}, source=folder / RUN_FILE, folder=folder)
    except OSError as error:
        raise ConfigError(f"init: {folder} cannot be written ({error}): give another folder") from error
    print(f"wrote {', '.join(str(folder / name) for name in files)}\n")
    print(f"next  cd {folder} && dsdpo train {RUN_FILE} --dry-run\nthen  {start_command(given.launcher, given.nodes)}")
    return 0


def arguments(argv: list[str]) -> argparse.Namespace:
    """The arguments, checked. Raises `ConfigError`; exits on --help."""
    parser = RunParser(prog="dsdpo init", description=__doc__, formatter_class=Help, allow_abbrev=False)
    parser.add_argument("folder", type=user_path, help="folder to write into")
    parser.add_argument("--recipe", help=f"run to start from: {', '.join(recipes())}")
    parser.add_argument("--strategy", choices=OF_STRATEGY, help="of the reference, in place of a recipe")
    parser.add_argument("--model", help="folder or Hub id of the model to train")
    parser.add_argument("--reference", help="folder or Hub id of the reference model; default: the model itself")
    parser.add_argument("--data", help="file, folder or Hub id of the pairs to train on")
    parser.add_argument("--eval", help="the same of held-out pairs; default: none")
    parser.add_argument("--gpus", type=int, help="processes on each machine; default: one a GPU, 2 without GPU")
    parser.add_argument("--nodes", type=int, default=1, help="machines; default: 1")
    parser.add_argument(
        "--launcher", choices=LAUNCHERS, help="what starts it; default: local, ssh for several machines"
    )
    parser.add_argument("--deepspeed", choices=deepspeed_jsons(), help="the policy's DeepSpeed JSON")
    parser.add_argument(
        "--reference-deepspeed", choices=deepspeed_jsons("reference"), help="the reference's, where it has an engine"
    )
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    given = parser.parse_args(argv)
    given.launcher = given.launcher or ("local" if given.nodes == 1 else "ssh")
    for name in ("gpus", "nodes"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise ConfigError(f"init: --{name} is {value}: give 1 or more")
    if given.launcher == "local" and given.nodes > 1:
        raise ConfigError(f"init: --nodes {given.nodes} needs --launcher ssh or slurm")
    if given.recipe and given.strategy:
        raise ConfigError("init: --recipe and --strategy both say what to start from: keep one")
    return given


def recipe_of(given: argparse.Namespace) -> tuple[str, Path]:
    """Name and file of the recipe to start from. Raises `ConfigError` for one that there is not."""
    name = (given.recipe or OF_STRATEGY[given.strategy or "separate"]).removesuffix(".yaml")
    if name not in recipes():
        raise ConfigError(f"init: no recipe {name}; there are {', '.join(recipes())}")
    return name, recipes()[name]


def ask_strategy(given: argparse.Namespace) -> None:
    """Ask in the terminal where the reference's log-probs come from. Raises `ConfigError` for what is none of them."""
    print("where the reference's log-probs come from:")
    for name, what in STRATEGIES.items():
        print(f"  {name:<17}{what}")
    given.strategy = answer_to("strategy", "strategy", "separate")
    if given.strategy not in OF_STRATEGY:
        raise ConfigError(f"init: strategy: there is no {given.strategy!r}; there are {', '.join(OF_STRATEGY)}")


def answer_to(name: str, question: str, default: str) -> str:
    """What is typed, or what stands in brackets. Raises `ConfigError` where nobody answers."""
    try:
        return input(f"{question} [{default}]: ").strip() or default
    except EOFError:
        raise ConfigError(f"init: no answer for --{name}") from None


def ask(given: argparse.Namespace, recipe: dict[str, Any]) -> None:
    """Ask in the terminal for what no option said; return takes what stands in brackets."""
    questions = [
        ("model", "model to train (folder or Hub id)", recipe["model"]["path"]),
        ("data", "preference pairs (file, folder or Hub id)", sources_text(recipe["data"]["train"])),
        ("eval", "held-out pairs", "none"),
        ("gpus", "processes on each machine", str(gpus_here())),
    ]
    for name, question, default in questions:
        if getattr(given, name) is not None:
            continue
        answer = answer_to(name, question, default)
        if name == "gpus":
            if not answer.isdecimal() or int(answer) < 1:
                raise ConfigError(f"init: {question}: {answer!r} is no number of processes")
            given.gpus = int(answer)
        else:
            setattr(given, name, None if name == "eval" and answer == "none" else answer)


def make_files(given: argparse.Namespace, recipe: str, run: dict[str, Any]) -> dict[str, str]:
    """The files to write, by name."""
    files = {}
    data, model, reference = run["data"], run["model"], run.setdefault("reference", {})
    if given.model != model["path"]:
        for key in OF_ITS_MODEL:
            model.pop(key, None)
        for key in ("path", "revision"):
            reference.pop(key, None)
    model["path"] = from_anywhere(given.model)
    if given.reference:
        reference["path"] = from_anywhere(given.reference)
    if given.data != sources_text(data["train"]):
        data["train"] = from_anywhere(given.data)
        data.pop("eval", None)
    if given.eval:
        data["eval"] = from_anywhere(given.eval)
    if not data.get("eval"):
        without_evaluation(run)
    chosen = given.deepspeed or Path(run["deepspeed"]).stem
    files[POLICY], run["deepspeed"] = deepspeed_jsons()[chosen].read_text(encoding="utf-8"), POLICY
    own = given.reference_deepspeed or (Path(reference["deepspeed"]).stem if "deepspeed" in reference else None)
    if own:
        files[REFERENCE] = deepspeed_jsons("reference")[own].read_text(encoding="utf-8")
        reference["deepspeed"] = REFERENCE
    run["output_dir"] = "output"
    run.get("tracking", {}).pop("wandb", None)  # an account of one's own
    if not run.get("tracking", True):
        del run["tracking"]
    files |= start_files(given)
    header = HEADER.format(recipe=recipe, start=start_command(given.launcher, given.nodes))
    return {RUN_FILE: header + yaml.safe_dump(run, sort_keys=False, allow_unicode=True, width=120), **files}


def without_evaluation(run: dict[str, Any]) -> None:
    """Take out what needs held-out pairs."""
    for section, keys in (
        ("evaluation", ("patience", "metric")), ("checkpoint", ("keep_best", "best_metric")), ("export", ("which",)),
    ):  # fmt: skip
        for key in keys:
            run.get(section, {}).pop(key, None)
    for section in ("evaluation", "export"):
        if not run.get(section, True):
            del run[section]


def start_files(given: argparse.Namespace) -> dict[str, str]:
    """What starts the run, by name."""
    gpus = given.gpus or gpus_here()
    launch = SHIPPED / "launch"
    if given.launcher == "local":
        return {SCRIPT: LOCAL.format(gpus=gpus)}
    if given.launcher == "slurm":
        text = (launch / "slurm.sbatch").read_text(encoding="utf-8")
        for key, value in (("nodes", given.nodes), ("ntasks-per-node", gpus), ("gpus-per-node", gpus)):
            old = next(line for line in text.splitlines() if line.startswith(f"#SBATCH --{key}="))
            text = text.replace(old, f"#SBATCH --{key}={value}")
        return {"train.sbatch": text}
    hosts = "".join(f"machine-{number} slots={gpus}\n" for number in range(1, given.nodes + 1))
    script = (launch / "multi_node.sh").read_text(encoding="utf-8")
    environment = (launch / "deepspeed_env.example").read_text(encoding="utf-8")
    return {SCRIPT: script, "hostfile": hosts, ".deepspeed_env": environment}


def start_command(launcher: str, nodes: int) -> str:
    """What to type to start the run."""
    if launcher == "slurm":
        return "sbatch train.sbatch run.yaml"
    if launcher == "ssh":
        return f"./train.sh run.yaml          (once hostfile names your {nodes} machines)"
    return "./train.sh"


def gpus_here() -> int:
    """GPUs of this machine, by their device files; 2 where there are none: as many processes on the CPU."""
    return len(list(Path("/dev").glob("nvidia[0-9]*"))) or 2


def sources_text(sources: Any) -> str:
    """The first of a run file's sources, as its path."""
    first = sources[0] if isinstance(sources, list) else sources
    return str(first["path"] if isinstance(first, dict) else first)


def from_anywhere(path: str) -> str:
    """A path that is here, absolute; a Hub id as it is."""
    path = os.path.expanduser(path)
    return os.path.abspath(path) if os.path.exists(path) else path
