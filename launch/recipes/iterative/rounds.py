"""Rounds of generating, labelling and training, each from the model of the one before (iterative DPO).

python launch/recipes/iterative/rounds.py RUN.yaml --prompts prompts.jsonl --rounds 3 --folder runs/rounds \
    --generate "python my_generate.py --model {model} --prompts {prompts} --out {out} --round {round}"

The hand-off is one file, `generations.jsonl`: a line {"prompt": ..., "completions": [...], "scores": [...]} for each
prompt, whose best and worst completion make a pair. Whatever writes it may generate: a server, a library, another
machine.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from dsdpo import DsdpoError, Run, read_result
from dsdpo.errors import ConfigError, DataError
from dsdpo.run_folder import RunFolder

SHOWN = ("eval/loss", "eval/rewards/accuracies", "eval/rewards/margins")


def main() -> int:
    """All rounds; the exit code: 2 for wrong input, else that of the command that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run file that every round trains with; its model.path is the start")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON Lines, handed to --generate as it is")
    parser.add_argument("--generate", required=True, help="command that writes {out}; {model}, {prompts}, {round}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reference", choices=("last", "first"), default="last", help="whose weights anchor a round")
    parser.add_argument(
        "--keep", help="condition of dsdpo score, from the second round on, for a pair to be trained on"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/rounds"))
    parser.add_argument(
        "--launcher", default=f"{sys.executable} -m", help="default: one process; or deepspeed ... --module"
    )
    given, settings = parser.parse_known_args()
    try:
        if given.rounds < 1:
            raise ConfigError(f"--rounds is {given.rounds}: give 1 or more")
        if not given.prompts.is_file():
            raise ConfigError(f"--prompts: {given.prompts} does not exist")
        start = Run(given.run).settings.model.path
        rows = [one_round(number, start, given, settings) for number in range(1, given.rounds + 1)]
    except DsdpoError as error:
        print(f"rounds: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"rounds: {shlex.join(map(str, error.cmd))} ended with {error.returncode}", file=sys.stderr)
        return error.returncode
    (given.folder / "rounds.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(report(rows))
    return 0


def one_round(number: int, start: str, given: argparse.Namespace, settings: list[str]) -> dict[str, Any]:
    """Generate, perhaps filter, and train; what the round was. A round that is done already is only read."""
    folder = given.folder / f"round-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    policy = start if number == 1 else model_of(given.folder / f"round-{number - 1}" / "run")
    reference = start if given.reference == "first" else policy
    pairs = folder / "generations.jsonl"
    if not pairs.is_file():
        values = {"model": policy, "prompts": str(given.prompts), "out": str(pairs), "round": str(number)}
        words = [word.format(**values) for word in shlex.split(given.generate)]
        subprocess.run(words, check=True)
    check(pairs)
    dsdpo = [*shlex.split(given.launcher), "dsdpo"]
    output = folder / "run"
    if given.keep and number > 1:  # before the second round the policy is the start, so that all rewards are 0
        kept = folder / "kept.jsonl"
        if not kept.is_file():
            words = ["score", str(given.run), "--model.path", policy, "--reference", start, "--data", str(pairs)]
            words += ["--keep", given.keep, "--out", str(folder / "scores.parquet"), "--rows", str(kept)]
            subprocess.run([*dsdpo, *words, "--output_dir", str(output), *settings], check=True)
        pairs = kept
    if not (output / "model").is_dir():
        words = ["train", str(given.run), "--model.path", policy, "--data.train", str(pairs), "--resume", "auto"]
        words += [] if given.reference == "last" else ["--reference.path", reference]
        subprocess.run([*dsdpo, *words, "--output_dir", str(output), *settings], check=True)
    identity = json.loads((output / "identity.json").read_text())
    result = read_result(output)
    return {
        "round": number,
        "policy": policy,
        "reference": reference,
        "reference_weights": identity["weights"],
        "steps": result.step,
        **{name: result.last_evaluation[name] for name in SHOWN if name in result.last_evaluation},
    }


def model_of(run: Path) -> str:
    """The model that a round has made, whole. Raises `ConfigError` for an adapter alone."""
    files = RunFolder(run)
    if not (files.model / "adapter_config.json").is_file():
        return str(files.model)
    if not files.merged.is_dir():
        raise ConfigError(
            f"{files.model} is an adapter, and the next round starts from a model: add --export.merge_adapter true"
        )
    return str(files.merged)


def check(path: Path) -> None:
    """Raise `DataError` unless the file is what a round takes from whoever generates."""
    if not path.is_file():
        raise DataError(f"{path} was not written by --generate")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            good = len(row["completions"]) == len(row["scores"]) > 1 and bool(row["prompt"])
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            raise DataError(
                f"{path}:{number}: give an object with prompt, completions (two or more) and as many scores"
            )


def report(rows: list[dict[str, Any]]) -> str:
    """The rounds as a table: whose weights anchored each, and the held-out pairs after it."""
    lines = [
        f"{'round':>5}  {'steps':>5}  {'reference weights':<18}{'loss':>9}{'accuracy':>10}{'margin':>9}  reference"
    ]
    for row in rows:
        figures = "".join(
            f"{row.get(name, float('nan')):>{width}.4f}" for name, width in zip(SHOWN, (9, 10, 9), strict=True)
        )
        weights = str(row["reference_weights"])[:12]
        lines.append(f"{row['round']:>5}  {row['steps']:>5}  {weights:<18}{figures}  {row['reference']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
