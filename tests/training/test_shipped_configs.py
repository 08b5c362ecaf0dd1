"""Every DeepSpeed JSON in ds_configs/ trains in bf16, each of policy and reference beside one of the other."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.runs import losses, settings, train_on

FOLDER = ROOT / "ds_configs"
# NVMe needs libaio and a disk; see tests/engine/test_zero_config.py for what is asked of those files.
POLICIES = sorted(path.name for path in FOLDER.glob("*.json") if "nvme" not in path.name)
REFERENCES = sorted(path.name for path in (FOLDER / "reference").glob("*.json") if "nvme" not in path.name)


def losses_of(policy: str, reference: str, inputs: Path, folder: Path, dtype: str = "bfloat16") -> list[float]:
    run = settings(
        folder,
        inputs,
        model={"dtype": dtype},
        reference={"deepspeed": str(FOLDER / "reference" / reference)},
        train={"max_steps": 3},
        optimizer={"learning_rate": 3e-3, "lr_scheduler_type": "constant"},
        deepspeed=str(FOLDER / policy),
    )
    return losses(train_on(2, run))


@pytest.fixture(scope="module")
def in_float32(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses_of("zero1.json", "zero0.json", inputs, tmp_path_factory.mktemp("float32"), "float32")


# Policy and reference meet in shared settings alone (test_zero_matrix.py), so each policy beside one reference will do.
BESIDE = [(policy, REFERENCES[index % len(REFERENCES)]) for index, policy in enumerate(POLICIES)]


@pytest.mark.parametrize(("policy", "reference"), BESIDE)
def test_bf16(policy: str, reference: str, inputs: Path, in_float32: list[float], tmp_path: Path) -> None:
    found = losses_of(policy, reference, inputs, tmp_path)
    # The reference scores both micro-batches in one pass, which rounds otherwise: ln 2 only to 1e-5 here.
    assert found[0] == pytest.approx(math.log(2), abs=1e-4)
    assert found == pytest.approx(in_float32, abs=2e-3)  # 3e-4 seen; bf16 has 8 bits of mantissa
    assert found[-1] < math.log(2) - 0.01, "nothing was learned, so nothing was compared"
