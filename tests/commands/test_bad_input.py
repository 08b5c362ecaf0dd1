"""Whatever is wrong with the input: exit code 2, one clear message on rank 0, soon, and no rank left hanging."""

from __future__ import annotations

import re
import socket
import sys
from pathlib import Path

import pytest

from tests.commands.bad_input import CASES, DATA, DEEPSPEED, MODEL, RUN_FILE, UNFIT_MODEL, Case, write
from tests.commands.processes import DSDPO, WAITED, finish, launcher, main_here
from tests.ranks import run_ranks
from tests.warm import warm_dsdpo, warm_python

HANG_S = 240  # 15 s on a machine of one's own, minutes on a crowded one
BY_NAME = {case.name: case for case in CASES}
# Ranks have nothing to agree on before DeepSpeed is asked about its JSONs.
BEFORE_RANKS_MEET = RUN_FILE
ON_RANKS = [BY_NAME["unknown key"], *DEEPSPEED, *MODEL, *DATA, BY_NAME["missing tensor"]]
# Through real processes: before torch is imported, and after.
AS_PROCESSES = ["unknown section", "no tokenizer"]
UNDER_THE_LAUNCHER = ["unknown key", "one bad row under data.strict"]


def test_at_least_twenty_different_cases() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 20
    assert len({case.mentions for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", BEFORE_RANKS_MEET, ids=str)
def test_refused_before_ranks_meet(case: Case, inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from dsdpo.__main__ import in_process_group, main

    arguments = write(case, tmp_path, inputs)
    capfd.readouterr()
    code = main(arguments)
    output, errors = capfd.readouterr()
    assert_says(case, errors)
    assert (code, output) == (2, "")
    assert not in_process_group()


@pytest.mark.parametrize("case", ON_RANKS, ids=str)
def test_every_rank_refuses_and_rank_0_says_why(case: Case, inputs: Path, tmp_path: Path) -> None:
    answers = run_ranks(2, main_here, write(case, tmp_path, inputs))
    assert [code for code, _, _ in answers] == [2, 2]
    assert_says(case, answers[0][2])
    assert [output for _, output, _ in answers] == ["", ""]
    assert answers[1][2] == ""


@pytest.mark.parametrize("case", UNFIT_MODEL, ids=str)
def test_models_that_are_not_what_a_run_needs(case: Case, inputs: Path, tmp_path: Path) -> None:
    [(code, output, errors)] = run_ranks(1, main_here, write(case, tmp_path, inputs))
    assert code == 2
    assert_says(case, errors)
    assert output == "" or case.options == ()  # what is found once the model is loaded comes after the plan


def test_half_precision_that_the_device_does_not_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some CPUs do."""
    from deepspeed.accelerator import get_accelerator

    from dsdpo.config.model import ModelConfig
    from dsdpo.engine.load import refuse_on_device
    from dsdpo.errors import ConfigError

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    with pytest.raises(ConfigError, match=r"model\.dtype: float16 does not run on \w+ devices; set it to bfloat16"):
        refuse_on_device(ModelConfig(path="m", dtype="float16"))


def assert_says(case: Case, errors: str) -> None:
    """One message, whole, and nothing beside it."""
    errors = WAITED.sub("", errors)
    assert errors.startswith("dsdpo: "), errors
    assert errors.count("dsdpo: ") == 1
    for mention in case.mentions:
        assert mention in errors
    assert "Traceback" not in errors
    assert len(errors) < 1000, "a message that nobody reads"
    assert not re.search(r"\b(WARNING|INFO)\b", errors)


@pytest.mark.parametrize("name", AS_PROCESSES)
def test_as_a_real_process(name: str, inputs: Path, tmp_path: Path) -> None:
    case = BY_NAME[name]
    answer = finish([*DSDPO, *write(case, tmp_path, inputs)], limit_s=HANG_S)
    assert answer.returncode == 2
    assert_says(case, answer.stderr)
    assert answer.stdout == ""


@pytest.mark.parametrize("name", UNDER_THE_LAUNCHER)
def test_under_the_deepspeed_launcher(name: str, inputs: Path, tmp_path: Path) -> None:
    case = BY_NAME[name]
    python = sys.executable if name == "unknown key" else warm_python()
    answer = finish([*launcher(python=python), *write(case, tmp_path, inputs)], limit_s=HANG_S)
    assert answer.returncode != 0
    said = answer.stdout + answer.stderr
    assert said.count(case.mentions[0]) == 1, said
    assert "dsdpo (rank" not in said
    assert "Traceback" not in said
    assert "terminate called" not in said


def test_an_error_on_another_rank_only_is_reported_by_it(inputs: Path, tmp_path: Path) -> None:
    """Rank 1 on a node without the run file: rank 0 waits for it in vain, so rank 1 speaks."""
    command = [*warm_dsdpo(), "train", str(tmp_path / "nowhere.yaml")]
    answer = finish(command, limit_s=HANG_S, RANK="1", WORLD_SIZE="2", LOCAL_RANK="0")
    assert answer.returncode == 2
    assert answer.stderr.startswith(f"dsdpo (rank 1 on {socket.gethostname()}): ")
    assert "nowhere.yaml" in answer.stderr


def test_wrong_setting_is_told_without_importing_torch(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("modell: {}\n")
    code = "import sys, dsdpo.__main__ as m; code = m.main(sys.argv[1:]); print('torch' in sys.modules); sys.exit(code)"
    answer = finish([sys.executable, "-c", code, "train", str(tmp_path / "run.yaml")], limit_s=HANG_S)
    assert (answer.returncode, answer.stdout) == (2, "False\n")
