"""DeepSpeed JSONs: what is filled in, what is refused, and that DeepSpeed itself agrees."""

import json
from pathlib import Path

import pytest

from dsdpo.config.run import RunConfig
from dsdpo.engine.optimizer_limits import optimizer_kind
from dsdpo.engine.zero_config import (
    needed_ops,
    offload_device,
    read_deepspeed_json,
    resolve_policy_config,
    resolve_reference_config,
    stage,
)
from dsdpo.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "ds_configs"
POLICIES = sorted(CONFIGS.glob("*.json"))
REFERENCES = sorted(CONFIGS.glob("reference/*.json"))
NVME = {"device": "nvme", "nvme_path": "/nvme"}


def make_run(**sections):
    needed = {"model": {"path": "m"}, "data": {"train": "d"}, "deepspeed": "ds.json", "output_dir": "out"}
    return RunConfig.model_validate(needed | sections)


def policy(raw, run=None, *, world_size=2, total_steps=100):
    raw = {"zero_optimization": {"stage": 3}} | raw
    return resolve_policy_config(
        raw,
        source="ds.json",
        run=run or make_run(),
        world_size=world_size,
        hidden_size=64,
        total_steps=total_steps,
        run_source="run.yaml",
    )


def reference(raw, policy_config=None, run=None, *, world_size=2):
    return resolve_reference_config(
        raw,
        source="ref.json",
        run=run or make_run(),
        policy_config=policy_config or policy({}, run),
        world_size=world_size,
        hidden_size=64,
    )


def refusal(resolve, *args, **kwargs):
    with pytest.raises(ConfigError) as refused:
        resolve(*args, **kwargs)
    return str(refused.value)


def autos(block):
    if isinstance(block, dict):
        return [found for value in block.values() for found in autos(value)]
    return [block] if block == "auto" else []


class TestShippedConfigs:
    """Every file in ds_configs, for a bf16 and an fp32 run."""

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    @pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.stem)
    def test_policy_is_accepted_by_deepspeed(self, path, dtype):
        run = make_run(model={"path": "m", "dtype": dtype})
        config = policy(read_deepspeed_json(path), run, world_size=1)
        assert autos(config) == []
        accepted = deepspeed_config(config)
        assert accepted.bfloat16_config.enabled == (dtype == "bfloat16")
        assert accepted.zero_optimization_stage == stage(config) == int(path.stem[4])
        assert accepted.gradient_clipping == run.optimizer.max_grad_norm
        assert not accepted.managed_gradient_accumulation

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    @pytest.mark.parametrize("path", REFERENCES, ids=lambda path: path.stem)
    def test_reference_is_accepted_by_deepspeed(self, path, dtype):
        run = make_run(model={"path": "m", "dtype": dtype})
        config = reference(read_deepspeed_json(path), policy({}, run), run, world_size=1)
        assert autos(config) == []
        accepted = deepspeed_config(config)
        assert accepted.bfloat16_config.enabled == (dtype == "bfloat16")
        assert accepted.zero_optimization_stage == stage(config) == int(path.stem[4])

    @pytest.mark.parametrize("own", REFERENCES, ids=lambda path: path.stem)
    @pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.stem)
    def test_every_policy_goes_with_every_reference(self, path, own):
        config = policy(read_deepspeed_json(path))
        deepspeed_config(reference(None, config, world_size=1))
        assert stage(reference(read_deepspeed_json(own), config)) == int(own.stem[4])


class TestFilling:
    def test_sizes_follow_transformers_trainer(self):
        keys = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
        zero = policy({"zero_optimization": {"stage": 3} | dict.fromkeys(keys, "auto")})["zero_optimization"]
        assert [zero[key] for key in keys] == [64 * 64, 3686, 640]  # h^2, int(0.9 h^2), 10 h
        assert set(policy({})["zero_optimization"]) == {"stage"}  # not filled where absent

    @pytest.mark.parametrize(("ranks", "group"), [("2 of 4", 2), ("4 of 4", 1), ("3 of 4", 1), ("8 of 64", 8)])
    def test_second_shards_stay_on_a_node(self, ranks: str, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
        of_a_node, _, all_of_them = ranks.partition(" of ")
        for name, value in {"RANK": "0", "WORLD_SIZE": all_of_them, "LOCAL_WORLD_SIZE": of_a_node}.items():
            monkeypatch.setenv(name, value)
        raw = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "auto"}}
        assert policy(raw, world_size=int(all_of_them))["zero_optimization"]["zero_hpz_partition_size"] == group
        assert reference(raw, world_size=int(all_of_them))["zero_optimization"]["zero_hpz_partition_size"] == 1

    def test_batch_triple_is_bookkeeping_and_dsdpo_owns_the_boundary(self):
        config = policy({"train_batch_size": 64, "train_micro_batch_size_per_gpu": "auto"}, world_size=8)
        triple = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        assert [config[key] for key in triple] == [8, 1, 1]
        assert config["managed_gradient_accumulation"] is False

    def test_clipping_is_always_written_because_deepspeed_clips_by_default(self):
        assert policy({}, make_run(optimizer={"max_grad_norm": 0}))["gradient_clipping"] == 0

    @pytest.mark.parametrize(
        ("dtype", "enabled"),
        [("bfloat16", (True, False)), ("float16", (False, True)), ("float32", (False, False))],
    )
    @pytest.mark.parametrize("raw", [{}, {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}])
    def test_precision_is_the_models(self, raw, dtype, enabled):
        config = policy(raw, make_run(model={"path": "m", "dtype": dtype}))
        assert (config["bf16"]["enabled"], config["fp16"]["enabled"]) == enabled

    @pytest.mark.parametrize("params", [None, {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}])
    def test_optimizer_block(self, params):
        run = make_run(optimizer={"learning_rate": 3e-6, "weight_decay": 0.1, "adam_beta2": 0.95})
        block = {"type": "AdamW"} | ({"params": params} if params else {})
        config = policy({"optimizer": block}, run)
        assert config["optimizer"]["params"] == {"lr": 3e-6, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
        assert "zero_allow_untested_optimizer" not in config
        assert policy({})["zero_allow_untested_optimizer"] is True

    def test_scheduler_block(self):
        run = make_run(optimizer={"learning_rate": 3e-6, "warmup_ratio": 0.1})
        config = policy({"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}}}, run)
        assert config["scheduler"]["params"] == {
            "warmup_min_lr": 0,
            "warmup_max_lr": 3e-6,
            "warmup_num_steps": 10,
            "total_num_steps": 100,
            "warmup_type": "linear",
        }

    def test_a_scheduler_block_takes_no_kwargs_of_ours(self):
        options = {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 1.0}}
        raw = {"scheduler": {"type": "WarmupCosineLR"}}
        assert "optimizer.lr_scheduler_kwargs of run.yaml has no effect" in refusal(
            policy, raw, make_run(optimizer=options)
        )

    def test_before_the_data_is_read_steps_are_not_compared(self):
        raw = {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 70}}}
        assert policy(raw, total_steps=None)["scheduler"]["params"]["total_num_steps"] == 70
        assert "total_num_steps is 70" in refusal(policy, raw, total_steps=100)

    def test_the_json_itself_is_not_changed_and_a_resolved_one_resolves_to_itself(self):
        raw = read_deepspeed_json(CONFIGS / "zero3_offload.json")
        before = json.dumps(raw)
        config = policy(raw)
        assert json.dumps(raw) == before
        assert policy(config) == config
        own = reference(read_deepspeed_json(CONFIGS / "reference/zero3.json"))
        assert reference(own) == own

    def test_optimizers_of_torch_are_let_into_zero_and_lion_gets_the_runs_betas(self):
        assert policy({"optimizer": {"type": "SGD"}})["zero_allow_untested_optimizer"] is True
        config = policy({"optimizer": {"type": "Lion", "params": {"betas": "auto"}}})
        assert config["optimizer"]["params"]["betas"] == [0.9, 0.999]

    def test_throughput_timer_which_waits_for_the_device_is_off_unless_asked_for(self):
        assert policy({})["timers"] == {"throughput": {"enabled": False}}
        asked = {"timers": {"throughput": {"enabled": True}}}
        assert policy(asked)["timers"] == asked["timers"]

    def test_stated_values_are_kept(self):
        raw = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8}, "steps_per_print": 10}
        config = policy(raw)
        assert config["zero_optimization"] == raw["zero_optimization"]
        assert config["steps_per_print"] == 10


class TestRefusals:
    @pytest.mark.parametrize(
        ("raw", "message"),
        [
            (
                {"zero_optimization": {"stage": 3, "stage3_param_persistance_threshold": 0}},
                "ds.json: zero_optimization.stage3_param_persistance_threshold is not a DeepSpeed key; "
                "did you mean stage3_param_persistence_threshold?",
            ),
            ({"zero_optimisation": {"stage": 3}}, "did you mean zero_optimization?"),
            ({"gradient_cliping": 1.0}, "did you mean gradient_clipping?"),
            ({"zero_optimization.stage3_max_live_parameters": 0}, "is a dotted key, which DeepSpeed ignores"),
            ({"bf16": {"enable": True}}, "bf16.enable is not a DeepSpeed key; did you mean enabled?"),
            ({"amp": {"enabled": True}}, "amp was removed from DeepSpeed"),
            ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "mics_shard_size was removed"),
            ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}}, "reduce_bucket_size is 0, but must be 1 or"),
            ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 1e30}}, "but it takes a whole number"),
            ({"gradient_clipping": float("nan")}, "gradient_clipping is NaN, but it takes a number"),
            ({"compile": {"disable": False, "backend": "inductor"}}, "compile.disable was removed from DeepSpeed"),
            ({"timers": {"throughput": {"enable": False}}}, "did you mean enabled?"),
            ({"csv_monitor": {"path": "x"}}, "csv_monitor.path is not a DeepSpeed key"),
            ({"comms_logger": {"enabled": "yes"}}, "comms_logger.enabled is"),
            ({"prescale_gradients": True}, "prescale_gradients is true, which stage 3 refuses with reduce_scatter"),
            ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor is 2.0, which stage 3 refuses"),
            ({"optimizer": {"type": "Muon", "params": {}}}, 'write "reduce_scatter": false, or use stage 1 or 2'),
            ({"checkpoint": {"writer": {"type": "FAST"}}}, "checkpoint.writer is"),
            ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal is true, but must be false"),
            ({"checkpoint": {"checkpoint_serialization": True}}, "checkpoint.checkpoint_serialization is true"),
            ({"torch_autocast": {"enabled": True, "dtype": "int8"}}, 'allowed: "bfloat16", "float16"'),
            ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, 'write offload_optimizer: {"device": "cpu"}'),
            ({"zero_optimization": True}, "zero_optimization is true, but it takes a block"),
            ({"zero_optimization": "auto"}, 'zero_optimization is "auto", but it takes a block'),
            ({"zero_optimization": {"stage": "3"}}, 'stage is "3", but it takes a whole number without quotes'),
            ({"zero_optimization": {"stage": 4}}, "stage is 4; allowed: 0, 1, 2, 3"),
            ({"zero_optimization": {"stage": "auto"}}, 'zero_optimization.stage is "auto", but nothing in the run'),
            ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage is 0"),
            ({"zero_optimization": {}}, "zero_optimization.stage is 0"),
            ({"zero_optimization": {"stage": 3, "sub_group_size": 1.5}}, "takes a whole number"),
            ({"zero_optimization": {"stage": 3, "overlap_comm": "no"}}, "takes true or false"),
            ({"zero_optimization": {"stage": 1, "overlap_comm": True}}, "at stages 2 and 3 only"),
            ({"zero_optimization": {"stage": 3, "offload_param": {"device": "gpu"}}}, '"none", "cpu", "nvme"'),
            ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param needs stage 3"),
            ({"zero_optimization": {"stage": 2, "offload_optimizer": NVME}}, "nvme needs stage 3"),
            ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "nvme_path is missing"),
            ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}}, "divide the 2 ranks"),
            ({"zero_optimization": {"stage": 2, "zenflow": {}}}, "zero_optimization.zenflow is not supported"),
            ({"managed_gradient_accumulation": True}, "must be false"),
            ({"compile": {"deepcompile": True}}, "compile.deepcompile is true, but must be false"),
            ({"bf16": {"check_grad_overflow": False}}, "bf16.check_grad_overflow is false, but must be true"),
            ({"sequence_parallel_size": 2}, "must be 1"),
            (
                {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
                "offload_optimizer.ratio is 0.5, with which DeepSpeed leaves a part of Adam's state out",
            ),
            ({"optimizer": {"type": "AdmW"}}, "optimizer.type AdmW is neither DeepSpeed's nor torch's"),
            ({"optimizer": {"params": {}}}, "optimizer.type is missing"),
            ({"scheduler": {"type": "WarmupLr"}}, "did you mean WarmupLR?"),
            ({"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1}}}, "use gradient_clipping"),
        ],
    )
    def test_what_deepspeed_would_ignore_or_refuse_late(self, raw, message):
        assert message in refusal(policy, raw)

    def test_a_reference_cannot_follow_weights_that_deepspeed_mixes_up(self):
        raw = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}
        policy(raw)
        moving = make_run(reference={"sync_ref_model": True})
        assert "round_robin_gradients is true" in refusal(policy, raw, moving)

    @pytest.mark.parametrize(
        ("raw", "keys"),
        [
            ({"fp16": {"enabled": True}}, ["fp16.enabled is true", "model.dtype bfloat16"]),
            ({"bf16": {"enabled": False}}, ["bf16.enabled is false", "model.dtype bfloat16"]),
            ({"gradient_clipping": 0.5}, ["gradient_clipping is 0.5", "optimizer.max_grad_norm 1.0"]),
            (
                {"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}},
                ["optimizer.params.lr is 1e-05", "optimizer.learning_rate 1e-06"],
            ),
            (
                {"scheduler": {"type": "WarmupLR"}},
                ["scheduler.type is WarmupLR", "optimizer.lr_scheduler_type linear", "constant_with_warmup"],
            ),
            ({"train_batch_size": 32}, ["train_batch_size is 32", "batch.pairs_per_step 64"]),
            (
                {"train_micro_batch_size_per_gpu": 4},
                ["train_micro_batch_size_per_gpu is 4", "batch.tokens_per_micro_batch"],
            ),
            ({"gradient_accumulation_steps": 8}, ["gradient_accumulation_steps is 8", "batch.pairs_per_step"]),
        ],
    )
    def test_contradictions_name_both_files_and_keys(self, raw, keys):
        message = refusal(policy, raw)
        for text in ["ds.json: ", "run.yaml", *keys]:
            assert text in message

    def test_agreeing_values_are_no_contradiction(self):
        run = make_run(batch={"pairs_per_micro_batch": 4}, optimizer={"learning_rate": 1e-5})
        raw = {
            "train_batch_size": 64,
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1,
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
        }
        policy(raw, run)

    def test_everything_wrong_is_said_at_once(self):
        assert len(refusal(policy, {"gradient_cliping": 1, "zero_optimization": {"stage": "3"}}).splitlines()) == 2
        assert len(refusal(policy, {"gradient_clipping": 0.5, "train_batch_size": 3}).splitlines()) == 2

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (b'{\n"bf16": {},\n}', "ds.json:3: not valid JSON"),
            (b'{"bf16": {"enabled": true, "enabled": false}}', "ds.json: the key enabled stands twice"),
            (b"[1]", "ds.json: holds [1]"),
            (bytes(range(128, 256)), "ds.json: not a text file"),
            (b"[" * 50_000 + b"]" * 50_000, "ds.json: blocks stand inside blocks too deep"),
            (b'{"gradient_clipping": 1' + b"0" * 5000 + b"}", "ds.json: not a DeepSpeed JSON: Exceeds the limit"),
            (b'{"a": ' * 50_000 + b"1" + b"}" * 50_000, "ds.json: blocks stand inside blocks too deep"),
        ],
    )
    def test_a_file_that_is_no_deepspeed_json(self, tmp_path, text, message):
        path = tmp_path / "ds.json"
        path.write_bytes(text)
        assert message in refusal(read_deepspeed_json, path)

    def test_a_byte_order_mark_is_no_mistake(self, tmp_path):
        path = tmp_path / "ds.json"
        path.write_bytes(b'\xef\xbb\xbf{"zero_optimization": {"stage": 3}}')
        assert stage(read_deepspeed_json(path)) == 3

    def test_a_missing_file(self, tmp_path):
        assert "none.json: cannot be read" in refusal(read_deepspeed_json, tmp_path / "none.json")


class TestReference:
    @pytest.mark.parametrize(("theirs", "ours"), [(1, 0), (2, 0), (3, 3)])
    def test_derived_stage(self, theirs, ours):
        assert stage(reference(None, policy({"zero_optimization": {"stage": theirs}}))) == ours

    def test_derived_config_holds_nothing_of_training(self):
        raw = {
            "optimizer": {"type": "AdamW"},
            "scheduler": {"type": "WarmupDecayLR"},
            "data_types": {"grad_accum_dtype": "fp32"},
            "tensorboard": {"enabled": True},
            "bf16": {"enabled": True, "bf16_master_weights_and_grads": True},
            "zero_optimization": {
                "stage": 3,
                "stage3_max_live_parameters": 7,
                "zero_hpz_partition_size": 2,
                "offload_optimizer": {"device": "cpu"},
                "offload_param": {"device": "cpu", "pin_memory": False},
            },
        }
        assert reference(None, policy(raw)) == {
            "bf16": {"enabled": True},
            "fp16": {"enabled": False},
            "train_batch_size": 2,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "zero_optimization": {
                "stage": 3,
                "stage3_max_live_parameters": 7,
                "offload_param": {"device": "cpu", "pin_memory": False},
            },
        }

    def test_derived_swap_files_have_a_folder_of_their_own(self):
        theirs = policy({"zero_optimization": {"stage": 3, "offload_param": NVME}})
        assert reference(None, theirs)["zero_optimization"]["offload_param"]["nvme_path"] == "/nvme/reference"
        assert theirs["zero_optimization"]["offload_param"]["nvme_path"] == "/nvme"

    @pytest.mark.parametrize(
        ("raw", "message"),
        [
            ({"zero_optimization": {"stage": 1}}, "ref.json: zero_optimization.stage 1 needs an optimizer"),
            ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage 2 needs an optimizer"),
            ({"zero_optimization": {"stage": 0, "offload_param": {"device": "cpu"}}}, "offload_param needs stage 3"),
            ({"optimizer": {"type": "AdamW"}}, "optimizer has no place in a reference"),
            ({"scheduler": {"type": "WarmupLR"}}, "scheduler has no place in a reference"),
            ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, "has no place"),
            ({"fp16": {"enabled": True}}, "model.dtype bfloat16"),
            ({"train_micro_batch_size_per_gpu": 8}, "reference.score_tokens"),
            ({"zero_optimization": {"stage": 3, "offload_param": NVME | {"nvme_path": "/nvme/"}}}, "the policy's too"),
            ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "that group only once"),
            (
                {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
                "torch_autocast.enabled is true, but the policy",
            ),
            (
                {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
                "zero_quantized_weights is true, but",
            ),
            ({"data_types": {"buffer_dtype": "fp32"}}, "would differ before any training"),
        ],
    )
    def test_refusals(self, raw, message):
        theirs = policy({"zero_optimization": {"stage": 3, "offload_param": NVME, "zero_hpz_partition_size": 2}})
        assert message in refusal(reference, raw, theirs)

    def test_numerics_that_only_the_policy_states_are_the_references_too(self):
        autocast = {"enabled": True, "dtype": "bfloat16"}
        theirs = policy(
            {"torch_autocast": autocast, "data_types": {"grad_accum_dtype": "fp32", "buffer_dtype": "bf16"}}
        )
        config = reference({"zero_optimization": {"stage": 0}}, theirs)
        assert config["torch_autocast"] == autocast
        assert config["data_types"] == {"buffer_dtype": "bf16"}

    def test_quantized_weights_cannot_be_taken_over_at_stage_0(self):
        theirs = policy({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}})
        assert reference({"zero_optimization": {"stage": 3}}, theirs)["zero_optimization"]["zero_quantized_weights"]
        assert "zero_quantized_weights is null" in refusal(reference, {"zero_optimization": {"stage": 0}}, theirs)

    def test_what_only_training_needs_is_left_out(self):
        raw = {
            "gradient_clipping": "auto",
            "steps_per_print": 10,
            "wall_clock_breakdown": True,
            "train_batch_size": "auto",
        }
        config = reference({"zero_optimization": {"stage": 3}, **raw})
        assert not {"gradient_clipping", "steps_per_print", "wall_clock_breakdown"} & config.keys()


# Whole files that circulate, as their projects ship or document them.
AUTO_16_BIT = {"fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16,
                        "hysteresis": 2, "min_loss_scale": 1}, "bf16": {"enabled": "auto"}}  # fmt: skip
AUTO_BATCH = dict.fromkeys(
    ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
)
STAGE_3_AUTO = {
    "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9,
    "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}  # fmt: skip
STAGE_2 = {
    "stage": 2, "allgather_partitions": True, "allgather_bucket_size": 5e8, "overlap_comm": True,
    "reduce_scatter": True, "reduce_bucket_size": 5e8, "contiguous_gradients": True, "round_robin_gradients": True,
}  # fmt: skip
CIRCULATING = {
    "LLaMA-Factory z2": AUTO_BATCH | AUTO_16_BIT | {
        "zero_allow_untested_optimizer": True, "zero_optimization": STAGE_2,
    },
    "LLaMA-Factory z3": AUTO_BATCH
    | AUTO_16_BIT
    | {"zero_allow_untested_optimizer": True, "zero_optimization": STAGE_3_AUTO},
    "axolotl zero3_bf16": {
        "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True, **AUTO_BATCH,
        "zero_optimization": STAGE_3_AUTO | {"sub_group_size": 0, "stage3_max_live_parameters": 0,
                                             "stage3_max_reuse_distance": 0},
        "bf16": {"enabled": True}, "steps_per_print": 2000, "wall_clock_breakdown": False,
    },
    "transformers z3": AUTO_BATCH | AUTO_16_BIT | {
        "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
        "zero_optimization": STAGE_3_AUTO, "steps_per_print": 2000, "wall_clock_breakdown": False,
    },
    "OpenRLHF train": {
        "steps_per_print": 100, "gradient_clipping": 1.0, "prescale_gradients": False, "wall_clock_breakdown": False,
        "data_types": {"grad_accum_dtype": "fp32"}, "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3, "offload_param": {"device": "none"}, "sub_group_size": "auto",
            "stage3_max_live_parameters": "auto", "stage3_max_reuse_distance": "auto",
            "stage3_param_persistence_threshold": "auto", "stage3_prefetch_bucket_size": "auto",
            "reduce_bucket_size": "auto", "zero_hpz_partition_size": 1, "zero_quantized_weights": False,
            "zero_quantized_gradients": False,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("raw", CIRCULATING.values(), ids=CIRCULATING)
def test_files_that_circulate_resolve_and_keep_what_they_state(raw):
    config = policy(raw)
    assert autos(config) == []
    for key, value in raw["zero_optimization"].items():
        assert value == "auto" or config["zero_optimization"][key] == value
    deepspeed_config(policy(raw, world_size=1))
    derived = reference(None, config)
    assert autos(derived) == []
    assert "optimizer" not in derived


@pytest.mark.parametrize(
    ("raw", "ops", "devices"),
    [
        ({}, set(), ("none", "none")),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, {"cpu_adam"}, ("none", "cpu")),
        (
            {"zero_optimization": {"stage": 3, "offload_param": NVME, "offload_optimizer": NVME}},
            {"cpu_adam", "async_io"},
            ("nvme", "nvme"),
        ),
        ({"optimizer": {"type": "AdamW"}}, {"fused_adam"}, ("none", "none")),
        ({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, set(), ("none", "none")),
        ({"optimizer": {"type": "SGD"}}, set(), ("none", "none")),
    ],
)
def test_needed_ops_and_devices(raw, ops, devices):
    config = policy(raw)
    assert needed_ops(config) == ops
    assert (offload_device(config, "param"), offload_device(config, "optimizer")) == devices


def deepspeed_config(config):
    from deepspeed.runtime.config import DeepSpeedConfig

    return DeepSpeedConfig(config)


CPU = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
NVME_STATES = {"stage": 3, "offload_optimizer": NVME}


def with_optimizer(kind, **options):
    return make_run(optimizer={"type": kind, **options})


@pytest.mark.parametrize(
    ("kind", "options", "params", "ops"),
    [
        ("lion", {}, {"betas": [0.9, 0.99]}, set()),
        ("sgd", {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "nesterov": True}, set()),
        ("adamw_8bit", {"adam_epsilon": 1e-6}, {"betas": [0.9, 0.999], "eps": 1e-6}, set()),
        (
            "muon",
            {"adam_learning_rate": 1e-5},
            {"momentum": 0.95, "betas": [0.9, 0.999], "eps": 1e-8, "adam_lr": 1e-5, "torch_adam": True},
            set(),
        ),
    ],
)
def test_the_runs_optimizer_stands_in_the_resolved_config(kind, options, params, ops):
    run = with_optimizer(kind, **options)
    config = policy({}, run)
    assert config["optimizer"]["params"] == {"lr": 1e-6, "weight_decay": 0.0, **params}
    assert optimizer_kind(config) == kind
    assert needed_ops(config) == ops
    assert policy(config, run) == config, "a resolved config is not one for the same run"
    if kind == "muon":
        assert config["zero_optimization"]["reduce_scatter"] is False
        assert "reduce_scatter" not in policy({"zero_optimization": {"stage": 2}}, run)["zero_optimization"]
    if kind == "lion":
        assert needed_ops(policy({"zero_optimization": CPU}, run)) == {"cpu_lion"}


@pytest.mark.parametrize(
    ("kind", "raw", "message"),
    [
        ("lion", {"optimizer": {"type": "AdamW"}}, "optimizer.type is AdamW, but run.yaml has optimizer.type lion"),
        ("adamw", {"optimizer": {"type": "SGD"}}, "optimizer.type is SGD, but run.yaml has optimizer.type adamw"),
        (
            "sgd",
            {"optimizer": {"type": "SGD", "params": {"dampening": 0.1}}},
            "params.dampening has no effect",
        ),
        ("sgd", {"optimizer": {"type": "SGD", "params": {"momentum": 0.5}}}, "run.yaml has optimizer.momentum 0.0"),
        ("lion", {"zero_optimization": NVME_STATES}, "device is nvme, which keeps states of adamw only"),
        (
            "adamw_8bit",
            {"zero_optimization": CPU},
            "unpacks all 8-bit states for each step of",
        ),
        ("muon", {"zero_optimization": {"stage": 3, "reduce_scatter": True}}, 'write "reduce_scatter": false'),
        (
            "muon",
            {"zero_optimization": {"stage": 2, "reduce_scatter": True}, "data_types": {"grad_accum_dtype": "float32"}},
            "at stage 2 with data_types.grad_accum_dtype fp32 loses gradients",
        ),
        ("muon", {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "muon has not been shown to work"),
        ("muon", {"zero_optimization": {"save_muon_momentum_buffer_in_memory": True}}, "in_memory is true, with which"),
        ("muon", {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "muon has not been shown to work"),
        (
            "sgd",
            {"bf16": {"bf16_master_weights_and_grads": True}},
            "DeepSpeed has for adamw only, not for",
        ),
        (None, {"optimizer": {"type": "Adafactor"}}, "is not adafactor under ZeRO"),
        (
            None,
            {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Muon", "params": {}}},
            "set optimizer.max_grad_norm of the run to 0, not 1",
        ),
    ],
)
def test_what_does_not_go_with_an_optimizer_is_refused(kind, raw, message):
    said = refusal(policy, raw, with_optimizer(kind))
    assert message in said
    assert "ds.json: " in said


def test_the_runs_optimizer_may_stand_in_the_json_too():
    config = policy({"optimizer": {"type": "SGD", "params": {"momentum": "auto"}}}, with_optimizer("sgd", momentum=0.9))
    assert config["optimizer"]["params"]["momentum"] == 0.9
    assert policy({"optimizer": {"type": "AdamW"}}, with_optimizer("adamw"))["optimizer"]["type"] == "AdamW"
    assert "optimizer" not in policy({}, with_optimizer("adamw"))
