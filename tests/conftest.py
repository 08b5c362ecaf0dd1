"""Environment of all tests (CPU, one thread a rank, offline, an extension cache of the project's own) and markers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.markers import MARKERS, markers_of

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")
if os.environ["DS_ACCELERATOR"] == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where Triton is imported


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark each test by what it uses, so that `-m "not ranks and not process"` is the quick half.

    Those marked `nightly` are left out unless `-m` speaks of them.
    """
    for item in items:
        for name in sorted(markers_of(item)):
            item.add_marker(name)
    if "nightly" not in config.option.markexpr:
        nightly = [item for item in items if item.get_closest_marker("nightly")]
        if nightly:
            config.hook.pytest_deselected(items=nightly)
            items[:] = [item for item in items if item not in nightly]


COMPILE = """\
from dsdpo.engine.quirks.compiled_ops import prepare_ops
prepare_ops({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
"""
CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    stay_on_own_cores()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compile DeepSpeed's CPU Adam beside the first tests, if it is not there: ranks would all wait for it later."""
    first = os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0" and not session.config.option.collectonly
    there = Path(os.environ["TORCH_EXTENSIONS_DIR"], "cpu_adam", "cpu_adam.so").exists()
    if not first or there or not any(item.get_closest_marker("ranks") for item in session.items):
        return
    silent = subprocess.DEVNULL
    compiler = subprocess.Popen([sys.executable, "-c", COMPILE], cwd=ROOT, stdout=silent, stderr=silent)
    if CORES:
        os.sched_setaffinity(compiler.pid, CORES)
    session.config.add_cleanup(lambda: compiler.wait())


def stay_on_own_cores() -> None:
    """Give each of several workers of pytest-xdist its part of the cores, for all processes that it starts.

    Ranks that wait for each other thousands of times a second, spread over cores that other workers' ranks use too,
    spend a fifth of their time on waking each other up.
    """
    worker, workers = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if worker and (own := sorted(CORES)[int(worker.removeprefix("gw")) :: workers]):
        os.sched_setaffinity(0, own)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and os.environ["DS_ACCELERATOR"] != "cuda":
        pytest.skip("needs a CUDA device, and make gpu")


@pytest.fixture(scope="session", autouse=True)
def _end_ranks() -> Iterator[None]:
    yield
    from tests.ranks import stop_all

    stop_all()


@pytest.fixture(autouse=True)
def _no_process_group_is_left() -> Iterator[None]:
    """A test that meets other ranks in pytest's own process, be it one rank, would fail others that run after it."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()  # the next test is not to blame
        pytest.fail("a process group is left: run the test on ranks of their own (tests/ranks.py)")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data, a small real model and TRL's trajectories, where they are present."""
    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED}: this test needs the data, model and trajectories kept there")
    return SHARED


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model, tokenizer and rows; tests that write beside them take `inputs`."""
    from tests.runs import demo_inputs

    return demo_inputs(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def inputs(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the demo's model, tokenizer and rows for one module, whose cache of prepared pairs it is too."""
    return Path(shutil.copytree(demo_folder, tmp_path_factory.mktemp("inputs"), dirs_exist_ok=True))
