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

SHOWN = ("eval/loss", "eval/rewards/accuracies", "eval/rewards/margins")


def main() -> int:
    """All rounds; the exit code: 2 for wrong input, else that of the command that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run file that every round trains with; its model.path is the start")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON Lines, handed to --generate as it is")
    parser.add_argument("--generate", required=True, help="command that writes {out}; {model}, {prompts}, {round}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reference", choices=("last", "first"), default="last", help="whose weights anchor a round")
    parser.add_argument("--keep", help="condition of dsdpo score under which a pair is trained on")
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
    policy = start if number == 1 else str(given.folder / f"round-{number - 1}" / "run" / "model")
    reference = start if given.reference == "first" else policy
    pairs = folder / "generations.jsonl"
    if not pairs.is_file():
        values = {"model": policy, "prompts": str(given.prompts), "out": str(pairs), "round": str(number)}
        words = [word.format(**values) for word in shlex.split(given.generate)]
        subprocess.run(words, check=True)
    check(pairs)
    dsdpo = [*shlex.split(given.launcher), "dsdpo"]
    if given.keep:
        kept = folder / "kept.jsonl"
        words = ["score", policy, "--reference", reference, "--data", str(pairs), "--keep", given.keep]
        subprocess.run([*dsdpo, *words, "--out", str(folder / "scores.parquet"), "--rows", str(kept)], check=True)
        pairs = kept
    output = folder / "run"
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
