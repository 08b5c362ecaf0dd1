"""What CONTRIBUTING says of extending dsdpo, done: each test adds to a copy of the package and trains with it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import dsdpo
from tests.commands.processes import environment_of
from tests.runs import metrics, settings
from tests.warm import warm_dsdpo

STRATEGY = '''
"""A reference under which every token is equally likely."""

import math

import torch

from dsdpo.objective.logps import PairLogps
from dsdpo.reference.base import Reference


class UniformReference(Reference):
    def __init__(self, vocabulary):
        self.per_token = -math.log(vocabulary)

    @classmethod
    def build(cls, plan, policy):
        return cls(policy.module.lm.config.vocab_size)

    def score(self, batches):
        answers = []
        for batch in batches:
            chosen, rejected = torch.bincount(batch.response, minlength=2 * batch.num_pairs).chunk(2)
            answers.append(PairLogps(chosen * self.per_token, rejected * self.per_token, chosen, rejected))
        return answers
'''


LOSS = '''


def squared(policy: PairLogps, reference: PairLogps, *, beta: float | Tensor, squared_target: float) -> Tensor:
    """The squared distance of the margin from a target."""
    h = (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)
    return (beta * h - squared_target) ** 2
'''


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package that a test may change."""
    copy = tmp_path / "copy" / "dsdpo"
    shutil.copytree(Path(dsdpo.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def add_line(path: Path, after: str, line: str) -> None:
    """Insert a line below the only one that begins with `after`."""
    lines = path.read_text().splitlines(keepends=True)
    [place] = [index for index, text in enumerate(lines) if text.startswith(after)]
    lines.insert(place + 1, line + "\n")
    path.write_text("".join(lines))


def train(package: Path, run: dict[str, Any]) -> list[dict[str, float]]:
    """Train with the changed package, in a process of its own; the training rows of its metrics."""
    path = package.parent / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    done = subprocess.run(
        [*warm_dsdpo(), "train", str(path)],
        cwd=package.parent,
        env=environment_of(PYTHONPATH=str(package.parent)),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return [row for row in metrics(Path(run["output_dir"])) if "loss" in row]


def test_a_reference_strategy_is_a_class_and_a_line(package: Path, inputs: Path, tmp_path: Path) -> None:
    (package / "reference" / "uniform.py").write_text(STRATEGY)
    add_line(
        package / "config" / "reference.py",
        "STRATEGIES: dict[str, Strategy] = {",
        '    "uniform": Strategy(StrategySettings, "dsdpo.reference.uniform:UniformReference"),',
    )
    run = settings(
        tmp_path, inputs, policy_zero="zero2", reference_zero=None,
        reference={"strategy": "uniform"}, train={"max_steps": 2},
    )  # fmt: skip
    rows = train(package, run)
    assert len(rows) == 2
    # An untrained model is nearly uniform: its log-ratios are small, but not zero as against a copy of itself.
    assert all(0 < abs(row["reference/drift"]) < 0.1 * abs(row["logps/chosen"]) for row in rows)


def test_a_loss_is_a_function_a_line_and_its_option(package: Path, inputs: Path, tmp_path: Path) -> None:
    functions = package / "objective" / "losses" / "margins.py"
    functions.write_text(functions.read_text() + LOSS)
    settings_file = package / "config" / "loss.py"
    add_line(settings_file, "LOSSES: dict[str, LossKind] = {", '    "squared": LossKind(("squared_target",)),')
    add_line(settings_file, '    """The preference loss', "    squared_target: PositiveFloat = 1.0")
    run = settings(
        tmp_path, inputs, policy_zero="zero2", reference_zero=None,
        loss={"type": "squared", "squared_target": 3.0}, train={"max_steps": 2},
    )  # fmt: skip
    rows = train(package, run)
    # Policy and reference start alike, h = 0: the loss is 3 squared.
    assert rows[0]["loss"] == pytest.approx(9.0, abs=1e-4)
    assert rows[1]["loss"] != pytest.approx(9.0, abs=1e-4)
