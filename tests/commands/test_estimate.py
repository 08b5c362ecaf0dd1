"""`dsdpo estimate`: without weights, data or GPUs, for every JSON that is shipped; and what users write wrong."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig

from dsdpo.__main__ import main
from dsdpo.estimate.hardware import hardware
from dsdpo.run.estimate import this_machine

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "ds_configs"
LLAMA_8B = {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 2, "vocab_size": 128256}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over a model that has only its config.json and data that is nowhere."""
    path = tmp_path_factory.mktemp("estimate")
    config = LlamaConfig(**LLAMA_8B, num_attention_heads=8, num_key_value_heads=2, architectures=["LlamaForCausalLM"])
    config.save_pretrained(path / "model")
    run = {
        "model": {"path": str(path / "model")},
        "data": {"train": str(path / "nowhere.jsonl")},
        "deepspeed": str(CONFIGS / "zero3.json"),
        "output_dir": str(path / "run"),
    }
    (path / "run.yaml").write_text(yaml.safe_dump(run))
    return path


def estimate(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> Any:
    words = ["estimate", str(folder / "run.yaml"), "--ranks", "8", "--tokens", "512,256,256", "--json", *options]
    assert main(words) == 0
    return json.loads(capsys.readouterr().out)


def test_every_pair_of_jsons(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policies = [str(CONFIGS / f"{name}.json") for name in ("zero1", "zero2", "zero3", "zero3_offload")]
    references = [str(CONFIGS / "reference" / f"{name}.json") for name in ("zero0", "zero3")]
    found = estimate(folder, capsys, "--gpu", "h100", "--zero", *policies, "--reference-zero", *references)
    rows = {(Path(row["policy"]).stem, Path(row["reference"]).stem): row for row in found["rows"]}
    assert len(rows) == 8
    assert all(row["fits"] for row in rows.values())
    devices = [rows[name, "zero3"]["device_bytes"] for name in ("zero1", "zero2", "zero3", "zero3_offload")]
    assert devices[0] > devices[1]
    assert devices[2] > devices[3]
    assert rows["zero3", "zero0"]["device_bytes"] > rows["zero3", "zero3"]["device_bytes"]
    assert rows["zero3_offload", "zero3"]["host_bytes_per_node"] > rows["zero3", "zero3"]["host_bytes_per_node"]
    fastest = min(rows.values(), key=lambda row: row["seconds"]["total"])
    best = rows[Path(found["best"][0]).stem, Path(found["best"][1]).stem]
    assert best["seconds"]["total"] <= 1.05 * fastest["seconds"]["total"]
    for row in rows.values():
        sizes = [entry["bytes"] for entry in row["amounts"] if entry["place"] == "device"]
        assert sum(sizes) == pytest.approx(row["device_bytes"])


def test_advice_makes_it_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = ("--batch.tokens_per_micro_batch", "400000")
    found = estimate(
        folder, capsys, "--gpu", "t4", *wide, "--model.gradient_checkpointing", "false", "--host-memory", "200"
    )
    assert not found["fits"]
    assert found["advice"]
    assert all(one["device_bytes"] <= one["device_capacity"] for one in found["advice"])
    # Checkpointing alone does not, so smaller micro-batches come first, as large as can be.
    assert found["advice"][0]["changes"] == ["batch.tokens_per_micro_batch: 50000"]


def test_advice_for_a_long_pair_splits_or_tiles_its_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = ("--tokens", "400000,1000,1000", "--data.max_length", "500000", "--batch.tokens_per_micro_batch", "8192")
    found = estimate(folder, capsys, "--gpu", "t4", *long)
    assert not found["fits"]
    changes = [change for one in found["advice"] for change in one["changes"]]
    assert any(change.startswith(("distributed.sequence_parallel", "model.mlp_tile_tokens")) for change in changes), (
        changes
    )
    assert all(one["device_bytes"] <= one["device_capacity"] for one in found["advice"])


def test_it_says_what_does_not_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["estimate", str(folder / "run.yaml"), "--ranks", "8", "--gpu", "h100", "--tokens", "8,8,8"]
    assert main([*words, "--host-memory", "10"]) == 0
    said = capsys.readouterr().out
    assert "no, host memory" in said
    assert "take nodes with more memory" in said


def test_a_step_of_fewer_pairs_than_ranks_takes_as_long_as_a_pair(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few, one_each = (
        estimate(folder, capsys, "--gpu", "h100", "--ranks", "64", "--batch.pairs_per_step", pairs)["rows"][0]
        for pairs in ("8", "64")
    )
    assert few["seconds"]["policy"] == one_each["seconds"]["policy"]
    words = ["estimate", str(folder / "run.yaml"), "--gpu", "h100", "--ranks", "64", "--tokens", "8,8,8"]
    assert main([*words, "--batch.pairs_per_step", "8"]) == 0
    assert "batch.pairs_per_step 8 is less than the 64 pairs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("a100-80gb", "a100"),
        ("RTX 4090", "rtx4090"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("H100_NVL", "h100-nvl"),
    ],
)
def test_a_device_goes_by_the_name_that_cuda_gives_it(given: str, found: str) -> None:
    assert hardware(given, ranks_per_node=1).name == found


def test_a_base_in_4_bits_takes_less(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = ("--gpu", "rtx4090", "--model.lora.r", "8")
    plain, packed = (
        estimate(folder, capsys, *lora, *more)["rows"][0] for more in ((), ("--model.quantization.bits", "4"))
    )
    assert packed["fits"]
    assert packed["device_bytes"] < plain["device_bytes"]
    assert packed["phases"]["loading the policy"] < packed["device_bytes"]
    assert packed["seconds"]["policy"] == plain["seconds"]["policy"]


def test_table_for_people(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", str(folder / "run.yaml"), "--gpu", "a100", "--tokens", "64,32,32"]) == 0
    said = capsys.readouterr().out
    assert "1 x a100 (79.1 GiB)" in said
    assert "yes, fastest" in said
    assert "a micro-batch: layers keep" in said


def test_a_gpu_that_the_table_does_not_have_is_taken_for_an_a100_and_said_to_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(total_memory=2**35))
    found = this_machine(ranks=1, per_node=8).gpu
    assert (found.name, found.memory) == ("NVIDIA X1, speed of an A100", 2**35)
    assert found.tflops == hardware("a100", ranks_per_node=1).tflops


def test_row_that_dsdpo_refuses_is_a_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = folder / "stage0.json"
    bad.write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    found = estimate(folder, capsys, "--gpu", "h100", "--zero", str(bad), str(CONFIGS / "zero2.json"))
    assert "one step late" in found["rows"][0]["refused"]
    assert Path(found["best"][0]).name == "zero2.json"


WRONG = {
    "unknown GPU": (("--gpu", "h1000", "--tokens", "8,8,8"), ("h1000", "did you mean h100?", "a100")),
    "tokens that are words": (("--tokens", "many"), ("--tokens many", "PROMPT,CHOSEN,REJECTED")),
    "too few lengths": (("--tokens", "512,256"), ("512,256", "PROMPT,CHOSEN,REJECTED")),
    "a length of 0": (("--tokens", "512,0,256"), ("512,0,256",)),
    "longer than the run takes": (("--tokens", "9000,256,256"), ("data.max_length", "9,256")),
    "no ranks": (("--ranks", "0", "--tokens", "8,8,8"), ("--ranks is 0",)),
    "ranks in words": (("--ranks", "eight", "--tokens", "8,8,8"), ("--ranks", "eight")),
    "no GPUs in a node": (("--gpus-per-node", "0", "--tokens", "8,8,8"), ("--gpus-per-node is 0",)),
    "no memory": (("--host-memory", "-1", "--tokens", "8,8,8"), ("--host-memory",)),
    "no such JSON": (("--zero", "nowhere.json", "--tokens", "8,8,8"), ("--zero: no file nowhere.json",)),
    "no such reference": (("--reference-zero", "no.json", "--tokens", "8,8,8"), ("--reference-zero: no file no.json",)),
    "reference without an engine": (
        ("--reference-zero", str(CONFIGS / "zero3.json"), "--model.lora.r", "8", "--tokens", "8,8,8"),
        ("reference.strategy adapter", "leave it out"),
    ),
    "no data and no lengths": ((), ("tokenizer", "--tokens 512,256,256")),
    "rows that the ranks cannot share": (
        ("--ranks", "8", "--distributed.sequence_parallel", "3", "--tokens", "8,8,8"),
        ("distributed.sequence_parallel: 3 ranks", "8 ranks"),
    ),
    "rows that the heads cannot share": (
        ("--ranks", "64", "--distributed.sequence_parallel", "64", "--tokens", "8,8,8"),
        ("distributed.sequence_parallel: 64 ranks", "attention heads"),
    ),
    "no model": (("--model.path", "./nowhere", "--tokens", "8,8,8"), ("model.path", "nowhere")),
    "a folder that is not there": (
        ("--model.path", "runs/never-made/model", "--tokens", "8,8,8"),
        ("no folder runs/",),
    ),
    "unknown option": (("--rank", "8", "--tokens", "8,8,8"), ("--rank",)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, mentions = WRONG[name]
    assert main(["estimate", str(folder / "run.yaml"), *options]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("dsdpo: ")
    assert "Traceback" not in errors
    for mention in mentions:
        assert mention in errors


def test_no_config_json(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["estimate", str(folder / "run.yaml"), "--model.path", str(tmp_path), "--tokens", "8,8,8"]
    assert main(words) == 2
    assert "has no config.json" in capsys.readouterr().err
