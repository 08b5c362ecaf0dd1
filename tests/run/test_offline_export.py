"""A checkpoint becomes the model that the live policy was, whoever saved it, within the memory that is stated."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.adapters import continued_adapter
from tests.commands.processes import environment_of
from tests.runs import settings, train_on

LORA = {"lora": {"r": 4, "lora_alpha": 16}}
# Policy's stage, ranks, and settings of the model: every stage, several numbers of ranks, both kinds of weights.
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "zero1-bf16": ("zero1", 2, {"dtype": "bfloat16"}),
    "zero1": ("zero1", 3, {}),
    "zero2": ("zero2", 2, {}),
    "zero3": ("zero3", 3, {}),
    "offload": ("zero3_offload", 2, {"dtype": "bfloat16"}),
    "adapter-zero3": ("zero3", 2, LORA),
    "quantized-zero3": ("zero3", 2, {**LORA, "quantization": {"bits": 4}}),
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def trained(stage: str, ranks: int, model: dict[str, Any], folder: Path, inputs: Path, **more: Any) -> Path:
    """A run folder with two checkpoints and what the live policy exported after the second."""
    run = settings(
        folder,
        inputs,
        policy_zero=stage,
        reference_zero=None if "lora" in model else "zero0",
        **{
            "model": model,
            "train": {"max_steps": 2},
            "checkpoint": {"every_steps": 1},
            "optimizer": {"weight_decay": 0.1},  # two groups of parameters
            "export": {"merge_adapter": True} if "lora" in model else {},
            **more,
        },
    )
    train_on(ranks, run)
    return Path(run["output_dir"])


def exported(run: Path, out: Path, which: str = "last", **options: Any) -> Path:
    from dsdpo.run.finished import open_run
    from dsdpo.run.offline_export import export_checkpoint
    from dsdpo.run.saved import choose_checkpoint

    found = open_run(run)
    export_checkpoint(found, choose_checkpoint(found, which), out, **options)
    return out


@pytest.mark.parametrize("case", CASES)
def test_exported_checkpoint_is_the_live_policy(case: str, inputs: Path, tmp_path: Path) -> None:
    stage, ranks, model = CASES[case]
    if "quantization" in model:
        pytest.importorskip("bitsandbytes")
    run = trained(stage, ranks, model, tmp_path, inputs)
    small = {"memory_bytes": 16 * 500, "shard_bytes": 30_000}  # several files, and pieces smaller than weights
    pairs = [(run / "model", exported(run, tmp_path / "out", **small))]
    if "lora" in model:
        pairs.append((run / "merged", exported(run, tmp_path / "merged", merge=True, **small)))
        assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 1
    for live, out in pairs:
        ours, theirs = weights(out), weights(live)
        assert ours.keys() == theirs.keys()
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)
        for name in ("config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json"):
            assert (out / name).exists() == (live / name).exists()
            if (live / name).exists() and name != "adapter_config.json":
                assert json.loads((out / name).read_text()) == json.loads((live / name).read_text())
    start = weights(inputs / "model")
    if "lora" not in model:
        out = tmp_path / "out"
        assert any((weights(out)[name].float() - start[name]).abs().max() > 1e-4 for name in start), "nothing trained"
        first = weights(exported(run, tmp_path / "first", "1"))
        assert any((first[name] != weights(out)[name]).any() for name in first), "both steps have the same weights"
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(pairs[-1][1])  # also from several files


def test_adapter_that_training_went_on_with_is_exported_and_merged(inputs: Path, tmp_path: Path) -> None:
    adapter = continued_adapter(tmp_path, inputs, use_rslora=True, rank_pattern={"q_proj": 2})
    run = trained("zero3", 1, {"lora": {"path": adapter}}, tmp_path, inputs)
    merged = weights(exported(run, tmp_path / "merged", merge=True))
    assert weights(exported(run, tmp_path / "out")).keys() == weights(run / "model").keys()
    for name, value in weights(run / "merged").items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-6)

    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32)
    by_peft = peft.PeftModel.from_pretrained(base, run / "model").merge_and_unload().state_dict()
    for name, value in merged.items():
        torch.testing.assert_close(value, by_peft[name], rtol=0, atol=1e-6)


MEASURE = """
import re, sys
from pathlib import Path
from dsdpo.run.finished import open_run
from dsdpo.run.offline_export import export_checkpoint

def kib(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

run, bound = open_run(sys.argv[1]), int(sys.argv[2])
step = run.folder.checkpoints / "step-000001"
export_checkpoint(run, step, Path(sys.argv[3]), memory_bytes=bound)  # imports, and whatever is allocated once
peaks = []
for _ in range(2):  # the least of them: the allocator and the kernel may keep pages for themselves
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = kib("VmRSS")
    export_checkpoint(run, step, Path(sys.argv[3]), memory_bytes=bound)
    peaks.append((kib("VmHWM") - before) * 1024)
print(peaks)
print(min(peaks))
"""


def test_memory_stays_under_its_bound_for_a_model_ten_times_as_large(inputs: Path, tmp_path: Path) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process is read from Linux's /proc")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    bound = 8 * 2**20
    config = AutoConfig.from_pretrained(inputs / "model")
    config.update({"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 7})
    lm = AutoModelForCausalLM.from_config(config).float()
    lm.save_pretrained(tmp_path / "big")
    AutoTokenizer.from_pretrained(inputs / "model").save_pretrained(tmp_path / "big")
    size = sum(parameter.numel() * 4 for parameter in lm.parameters())
    assert size >= 10 * bound
    del lm
    run = settings(
        tmp_path,
        inputs,
        policy_zero="zero2",
        reference_zero=None,
        model={"path": str(tmp_path / "big")},
        loss={"type": "simpo"},
        train={"max_steps": 1},
        checkpoint={"every_steps": 1},
    )
    train_on(1, run)
    said = subprocess.run(
        [sys.executable, "-c", MEASURE, run["output_dir"], str(bound), str(tmp_path / "out")],
        capture_output=True, text=True, timeout=300,
        env={**environment_of(), "MALLOC_MMAP_THRESHOLD_": "65536"},  # freed memory is given back at once
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    taken = int(said.stdout.splitlines()[-1])
    print(f"{taken / 2**20:.1f} MiB taken, {bound / 2**20:.0f} MiB allowed, {size / 2**20:.0f} MiB of weights")
    assert taken < bound
    theirs = weights(tmp_path / "run" / "model")
    assert all(torch.equal(value, theirs[name]) for name, value in weights(tmp_path / "out").items())
