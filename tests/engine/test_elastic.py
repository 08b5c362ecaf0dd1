"""Fewer ranks than a run wants, and what torchrun's elastic agents do about it."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from dsdpo.config.run import DistributedConfig
from dsdpo.console import Launched
from dsdpo.engine.elastic import check_ranks, shares_store
from dsdpo.errors import ConfigError, TrainingError
from dsdpo.stop_request import STOPPED, stop_code
from dsdpo.stop_signals import noted_signals

TWO = Launched("RANK", 0, 2, 0, 1)


@pytest.fixture
def restarting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun --max-restarts tells its ranks."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "5")


def test_too_few_ranks_are_refused_where_nobody_starts_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS", raising=False)
    assert check_ranks(DistributedConfig(min_ranks=2, timeout_minutes=1), TWO) == 2
    with pytest.raises(ConfigError, match=r"2 ranks started, of at least 3 \(distributed.min_ranks\)"):
        check_ranks(DistributedConfig(min_ranks=3, timeout_minutes=1), TWO)


def test_too_few_ranks_wait_until_torchrun_ends_them(restarting: None, capfd: pytest.CaptureFixture[str]) -> None:
    with noted_signals():
        agent = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
        agent.start()
        with pytest.raises(TrainingError, match="ended while waiting"):
            check_ranks(DistributedConfig(min_ranks=3, timeout_minutes=5), TWO)
    assert "waiting for more nodes to join" in capfd.readouterr().err


def test_too_few_ranks_do_not_wait_for_ever(restarting: None) -> None:
    with pytest.raises(TrainingError, match=r"no node joined for 0\.001 minutes"):
        check_ranks(DistributedConfig(min_ranks=3, timeout_minutes=0.001), TWO)


def test_stop_that_torchrun_would_undo_ends_with_0(monkeypatch: pytest.MonkeyPatch, restarting: None) -> None:
    assert [stop_code(reason) for reason in ("SIGTERM", "SIGUSR1", "checkpoint.deadline")] == [STOPPED, 0, 0]
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert stop_code("SIGUSR1") == STOPPED


@pytest.mark.parametrize(
    ("agents", "shared", "warned"), [("2", "True", True), ("1", "True", False), ("2", "False", False)]
)
def test_shared_store_is_noticed(
    agents: str, shared: str, warned: bool, monkeypatch: pytest.MonkeyPatch, restarting: None
) -> None:
    monkeypatch.setenv("GROUP_WORLD_SIZE", agents)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
    assert shares_store() is warned
