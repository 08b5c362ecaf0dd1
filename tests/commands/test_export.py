"""`dsdpo export` and `dsdpo merge` on a run that was stopped: what they write, what the card says, what they refuse."""

from __future__ import annotations

import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from dsdpo.__main__ import main
from tests.adapters import continued_adapter
from tests.runs import settings, train_on


@pytest.fixture(scope="module")
def run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a LoRA run with two checkpoints, as it is before the end: nothing is exported yet."""
    folder = tmp_path_factory.mktemp("stopped")
    spec = settings(
        folder,
        inputs,
        reference_zero=None,
        model={"lora": {"r": 2}},
        data={"eval": str(inputs / "few.jsonl")},
        train={"max_steps": 2},
        evaluation={"every_steps": 1},
        checkpoint={"every_steps": 1},
    )
    train_on(1, spec)
    shutil.rmtree(folder / "run" / "model")
    return folder / "run"


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one message that a command ends with, exit code 2."""
    capsys.readouterr()
    assert main(list(map(str, argv))) == 2
    said = capsys.readouterr().err
    assert said.count("dsdpo: ") == 1
    assert "Traceback" not in said
    return said


def test_a_stopped_run_becomes_an_adapter_and_a_merged_model(
    run: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run / "config.yaml"), "--out", str(tmp_path / "adapter")]) == 0
    assert main(["export", str(run), "--out", str(tmp_path / "whole"), "--merge"]) == 0
    merged = ["merge", str(tmp_path / "adapter"), str(inputs / "model"), "--out", str(tmp_path / "merged")]
    assert main([*merged, "--dtype", "float32"]) == 0
    from safetensors.torch import load_file

    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "merged"))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert main([*merged, "--overwrite"]) == 0
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    assert "1 weight file" in capsys.readouterr().out


def test_the_card_has_no_path_of_this_machine(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert not re.findall(r"(?<![\w`])/[\w./-]+", card.replace("</", ""))
    identity = json.loads((run / "identity.json").read_text())
    for words in (
        "sigmoid",
        identity["weights"],
        "eval/loss",
        "# license",
        "PeftModel",
        "after step 2",
        "`train.jsonl`",
    ):
        assert words in card


def test_what_export_refuses(run: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert "has no config.yaml" in refused(capsys, "export", inputs, "--out", out)
    assert "is no folder" in refused(capsys, "export", "nowhere", "--out", out)
    assert "--checkpoint 77: there is last, best and, by step, 1, 2" in refused(
        capsys, "export", run, "--out", out, "--checkpoint", 77
    )
    assert "--checkpoint x" in refused(capsys, "export", run, "--out", out, "--checkpoint", "x")
    assert "--out" in refused(capsys, "export", run)
    assert "which is read" in refused(capsys, "export", run, "--out", run)
    assert "which is read" in refused(capsys, "export", run, "--out", run.parent, "--overwrite")
    assert "is not empty" in refused(capsys, "export", run, "--out", inputs)
    assert "is a file" in refused(capsys, "export", run, "--out", inputs / "train.jsonl")
    assert "above 0" in refused(capsys, "export", run, "--out", out, "--memory", 0)
    assert "invalid choice" in refused(capsys, "export", run, "--out", out, "--dtype", "int8")
    assert "no name of a Hub repository" in refused(capsys, "export", run, "--out", out, "--push-to-hub", "a b")
    assert not out.exists()


def test_what_merge_refuses(run: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, model = tmp_path / "out", inputs / "model"
    adapter = continued_adapter(tmp_path, inputs)
    assert "no adapter_config.json" in refused(capsys, "merge", model, model, "--out", out)
    assert "holds an adapter" in refused(capsys, "merge", adapter, adapter, "--out", out)
    config = Path(adapter) / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "r": 3}))
    assert "does not fit" in refused(capsys, "merge", adapter, model, "--out", out)
    assert not out.exists()


def test_a_damaged_checkpoint_is_not_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = next((run / "checkpoints" / "step-000002" / "policy").glob("*optim_states.pt"))
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-1] + b"x")
        assert "is damaged" in refused(capsys, "export", run, "--out", tmp_path / "out")
    finally:
        path.write_bytes(content)


class _Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload of small files needs."""

    files: list[str] = []  # noqa: RUF012 - of the one server of a test

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer: dict[str, Any] = {"url": "https://huggingface.co/user/name", "commitUrl": "https://huggingface.co/user/name/commit/0",
                                  "commitOid": "0", "hookOutput": ""}  # fmt: skip
        if "preupload" in self.path:
            wanted = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted]}
        if "/commit/" in self.path:
            entries = [json.loads(line) for line in body.splitlines()]
            self.files += [entry["value"]["path"] for entry in entries if entry["key"] == "file"]
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *words: object) -> None: ...


def test_a_folder_is_uploaded_only_where_that_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    from dsdpo.errors import TrainingError
    from dsdpo.training import hub

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\n---\n")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with HTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(hub, "HfApi", lambda: huggingface_hub.HfApi(endpoint=address, token="t"))
        assert hub.push_folder(tmp_path, "user/name", private=True)
        server.shutdown()
    assert sorted(_Hub.files) == ["README.md", "config.json"]
    with pytest.raises(TrainingError, match="is written, but could not be uploaded to user/name"):
        hub.push_folder(tmp_path, "user/name", private=True)
