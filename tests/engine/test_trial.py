"""What DeepSpeed itself refuses is one message that names the key, before any model loads, on all ranks."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from dsdpo.engine.config_remarks import json_remarks
from dsdpo.engine.zero_limits import MONITORS
from dsdpo.errors import ConfigError
from tests.engine.test_zero_config import make_run, policy, reference
from tests.ranks import run_ranks

Z2: dict[str, Any] = {"zero_optimization": {"stage": 2}}
Z3: dict[str, Any] = {"zero_optimization": {"stage": 3}}
CPU = {"device": "cpu", "pin_memory": False}
# What a policy's JSON holds -> words of the message, None where DeepSpeed takes it.
POLICY: list[tuple[dict[str, Any], tuple[str, ...] | None]] = [
    (Z3, None),
    (Z2 | {"optimizer": {"type": "SGD", "params": {"momentum": 0.9}}}, None),
    (Z2 | {"zero_optimization": {"stage": 2, "offload_optimizer": CPU}}, None),
    (Z2 | {"optimizer": {"type": "Lion", "params": {"betas": "auto"}}}, None),
    (Z2 | {"optimizer": {"type": "SGD", "params": {"velocity": 1}}}, ("optimizer.params", "velocity")),
    (Z2 | {"optimizer": {"type": "Lion", "params": {"eps": 1e-8}}}, ("optimizer.params.eps", "eps")),
    (Z3 | {"optimizer": {"type": "AdamW", "params": {"beta": 1}}}, ("optimizer.params.beta 1", "beta")),
    (Z3 | {"scheduler": {"type": "OneCycle", "params": {}}}, ("scheduler.type", "cycle_min_lr")),
    (Z3 | {"data_types": {"param_dtype": "fp16"}}, ('data_types.param_dtype "fp16"', "conflicts")),
    (Z3 | {"data_types": {"buffer_dtype": "nonsense"}}, ('data_types.buffer_dtype "nonsense"',)),
    (Z2 | {"bf16": {"bf16_optimizer_states": True}}, ("bf16.bf16_optimizer_states true", "requires")),
    (Z3 | {"comms_logger": {"enabled": True, "prof_ops": "all"}}, ('comms_logger.prof_ops "all"', "list")),
    (Z3 | {"log_level": "loud"}, ('log_level "loud"', "debug")),
    *(
        (Z3 | {block: {"enabled": True}}, None if find_spec(package) else (f"{block}.enabled", "not installed"))
        for block, package in MONITORS.items()
    ),
    (Z3 | {"optimizer": {"type": "MuAdam", "params": {}}}, ("MuAdam", "mup")),
    ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, ("zero_quantized_weights true", "CPU")),
    (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/proc/none"}}},
        ("offload_param.nvme_path /proc/none cannot be written",),
    ),
]


def test_what_deepspeed_refuses_is_told_before_a_model_loads() -> None:
    for rank_answers in run_ranks(2, ask_here):
        for (raw, words), answer in zip(POLICY, rank_answers, strict=True):
            if words is None:
                assert answer is None, (raw, answer)
                continue
            assert answer is not None, raw
            assert answer.startswith("ds.json: "), answer
            assert len(answer.splitlines()) == 1
            for word in words:
                assert word in answer, answer


def ask_here() -> list[str | None]:
    import torch

    from dsdpo.engine.trial import check_with_deepspeed

    drawn = torch.random.get_rng_state()
    answers: list[str | None] = []
    for raw, _ in POLICY:
        try:
            check_with_deepspeed(policy(raw), source="ds.json", trains=True)
            answers.append(None)
        except ConfigError as error:
            answers.append(str(error))
    own = reference({"zero_optimization": {"stage": 3, "offload_param": CPU}})
    check_with_deepspeed(own, source="ref.json", trains=False)
    assert torch.equal(drawn, torch.random.get_rng_state())
    return answers


def test_keys_without_effect_are_named() -> None:
    raw = {
        "activation_checkpointing": {"partition_activations": True},
        "comms_logger": {"enabled": True},
        "csv_monitor": {"enabled": True},
        "compile": {"deepcompile": False},
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    }
    said = "\n".join(json_remarks(raw, "ds.json", learning_rate=1e-6))
    for key in raw:
        if key != "zero_optimization":
            assert f"ds.json: {key} " in said
    assert "stage3_gather_16bit_weights_on_model_save has no effect" in said
    quiet = {"comms_logger": {"enabled": False}, "activation_checkpointing": {}, "zero_optimization": {"stage": 3}}
    assert [*json_remarks(quiet, "ds.json", learning_rate=1e-6)] == []


def test_bf16_master_weights_are_warned_of_with_what_survives() -> None:
    """At 5e-7 only weights below 512 * 5e-7 = 2.6e-4 can change: half a spacing of bfloat16 is at least |w| / 512."""
    raw = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}
    (line,) = json_remarks(raw, "ds.json", learning_rate=5e-7)
    assert "WARNING" in line
    assert "5e-07 (optimizer.learning_rate) changes only weights smaller than about 0.0003" in line


def test_one_json_for_both_engines_gives_the_reference_what_it_can_use(tmp_path: Any) -> None:
    from dsdpo.run.plan import resolve_configs

    path = tmp_path / "both.json"
    path.write_text(
        '{"gradient_clipping": "auto", "train_batch_size": "auto", "optimizer": {"type": "AdamW", "params": {"lr": '
        '"auto"}}, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}'
    )
    run = make_run(deepspeed=str(path), reference={"deepspeed": str(path)})
    _, own = resolve_configs(run, "run.yaml", hidden_size=64, total_steps=10, ranks=2)
    assert own["zero_optimization"] == {"stage": 0}
    assert not {"optimizer", "gradient_clipping"} & own.keys()


@pytest.mark.parametrize("key", ["torch_autocast", "data_types"])
def test_a_block_that_is_no_object_is_refused_in_a_reference_too(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is 3, but it takes a block"):
        reference({key: 3, "zero_optimization": {"stage": 3}})
