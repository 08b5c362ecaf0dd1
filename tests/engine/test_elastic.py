"""Fewer ranks than a run wants, and what torchrun's elastic agents do about it."""

from __future__ import annotations

import os
import signal
import socket
import threading

import pytest

from dsdpo.config.run import DistributedConfig
from dsdpo.console import Launched
from dsdpo.engine.elastic import check_ranks, shares_store
from dsdpo.errors import ConfigError, TrainingError
from dsdpo.stop_request import STOPPED, stop_code
from dsdpo.stop_signals import noted_signals
from tests.commands.processes import free_port
from tests.ranks import run_ranks

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
        check_ranks(DistributedConfig.model_construct(min_ranks=3, timeout_minutes=0.001), TWO)


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


def meets(port: str) -> list[str]:
    """Who this rank meets, started by an agent that has counted as many restarts as the rank's number."""
    from dsdpo.distributed import rank
    from dsdpo.engine.meeting import meet

    changes = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RESTART_COUNT": str(rank())}
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        for name, value in changes.items():
            environment.setenv(name, value)
        return meet(Launched("RANK", rank(), 2, 0, 1), limit_s=30)


def test_ranks_of_agents_that_count_restarts_otherwise_meet() -> None:
    """Of two agents that lose the ranks of a third, one sees its own rank fail and counts that; the other does not."""
    assert run_ranks(2, meets, str(free_port())) == [[socket.gethostname()] * 2] * 2
