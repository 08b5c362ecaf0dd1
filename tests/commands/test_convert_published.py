"""`dsdpo convert` on the settings of the examples that TRL, alignment-handbook, axolotl and LLaMA-Factory publish."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsdpo.__main__ import main
from dsdpo.config.load import load_run, run_parser

FOREIGN = Path(__file__).parent / "foreign"
HANDBOOK = """
model_name_or_path: org/sft
bf16: true
beta: 0.01
do_eval: true
eval_steps: 100
gradient_accumulation_steps: 2
gradient_checkpointing_kwargs: {use_reentrant: false}
hub_model_id: me/dpo
learning_rate: 5.0e-7
log_level: info
lr_scheduler_type: cosine
max_length: 1024
max_prompt_length: 512
num_train_epochs: 1
output_dir: data/dpo
per_device_train_batch_size: 8
per_device_eval_batch_size: 8
push_to_hub: true
save_strategy: "steps"
save_steps: 100
save_total_limit: 1
warmup_ratio: 0.1
"""
MIXER = """
dataset_mixer: {org/first: 1.0, org/second: 0.5}
dataset_splits: [train_prefs, test_prefs]
evaluation_strategy: steps
"""
AXOLOTL = """
base_model: org/model
chat_template: llama3
sequence_len: 4096
sample_packing: false
pad_to_sequence_len: true
lora_r: 32
lora_alpha: 16
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
warmup_steps: 10
weight_decay: 0.0
wandb_project:
lora_model_dir:
output_dir: ./outputs/out
"""
FACTORY = """
model_name_or_path: org/model
trust_remote_code: true
do_train: true
pref_beta: 0.1
dataset_dir: data
template: qwen3_nothink
cutoff_len: 2048
max_samples: 1000
dataloader_num_workers: 4
output_dir: saves/dpo
save_steps: 500
plot_loss: true
save_only_model: false
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
"""
SCRIPT = """
accelerate launch examples/dpo.py \\
    --dataset_name org/pairs --dataset_streaming --model_name_or_path org/model \\
    --learning_rate 5.0e-6 --num_train_epochs 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 8 \\
    --eval_strategy steps --eval_steps 50 --output_dir out --no_remove_unused_columns \\
    --use_peft --lora_r 32 --lora_alpha 16 --lora_target_modules q_proj, v_proj \\
    --loss_type sigmoid bco_pair sft --loss_weights 0.8 0.2 1.0
"""
# Program, its settings, what has to come of them by dotted name, and the settings without a counterpart.
CASES: dict[str, tuple[str, str, dict[str, Any], set[str]]] = {
    "handbook, a mixture with held-out rows split off": (
        "trl",
        HANDBOOK + """
torch_dtype: null
dataset_mixture:
  datasets:
    - {id: org/pairs, config: default, split: train_prefs, columns: [chosen, rejected], weight: 1.0}
  test_split_size: 2000
""",
        {"data.train": {"path": "org/pairs", "name": "default", "split": "train_prefs[:-2000]", "weight": 1.0},
         "data.eval": {"path": "org/pairs", "name": "default", "split": "train_prefs[-2000:]", "weight": 1.0},
         "batch.pairs_per_step": 32, "export.push_to_hub": "me/dpo", "loss.beta": 0.01, "model.lora": None},
        {"dataset_mixture.test_split_size"},
    ),
    "handbook, QLoRA on splits of two sets": (
        "trl",
        HANDBOOK + MIXER + "use_peft: true\nload_in_4bit: true\nlora_r: 128\noptim: paged_adamw_32bit",
        {"data.train": [{"path": "org/first", "split": "train_prefs", "weight": 1.0},
                        {"path": "org/second", "split": "train_prefs", "weight": 0.5}],
         "data.eval": [{"path": "org/first", "split": "test_prefs"}, {"path": "org/second", "split": "test_prefs"}],
         "model.quantization": {"bits": 4}, "model.lora.r": 128, "evaluation.every_steps": 100},
        set(),
    ),
    "handbook, RMSprop and saving by epochs": (
        "trl",
        HANDBOOK.replace('"steps"', "epoch") + MIXER + "optim: rmsprop",
        {"model.quantization": None}, {"optim", "save_strategy"},
    ),
    "handbook, SmolLM3": (
        "trl",
        HANDBOOK.replace("save_steps: 100", "save_steps: 0.5").replace("cosine", "cosine_with_min_lr")
        + "dataset_name: org/pairs\nloss_type: apo_zero\npadding_free: true\neval_strategy: 'no'\n"
        "lr_scheduler_kwargs: {min_lr_rate: 0.1}\nuse_liger_kernel: true\nreport_to: [wandb]",
        {"loss.type": "apo_zero", "tracking.wandb": {}, "data.layout": None, "data.eval": None,
         "optimizer.lr_scheduler_type": "cosine_with_min_lr", "optimizer.lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"save_steps"},
    ),
    "handbook, ORPO": (
        "trl",
        "model_name_or_path: org/base\nuse_flash_attention_2: true\ndataset_mixer: {org/pairs: 1.0}\nbeta: 0.05\n"
        'chat_template: "{% for message in messages %}\\n{{ message }}{% endfor %}"\nlr_scheduler_type: inverse_sqrt\n'
        "report_to: [tensorboard, wandb]\nsave_strategy: 'no'\nper_device_train_batch_size: 8\nwarmup_steps: 100",
        {"model.attn_implementation": "flash_attention_2", "tracking.tensorboard": True, "checkpoint.every_steps": 0,
         "optimizer.warmup_steps": 100, "data.train": [{"path": "org/pairs", "weight": 1.0}]},
        {"chat_template"},
    ),
    "TRL, a script with several losses": (
        "trl", SCRIPT,
        {"loss.type": ["sigmoid", "bco_pair", "sft"], "loss.weights": [0.8, 0.2, 1.0], "model.lora.lora_alpha": 16,
         "model.lora.target_modules": ["q_proj", "v_proj"], "batch.pairs_per_step": 32, "evaluation.every_steps": 50},
        {"dataset_streaming", "no_remove_unused_columns"},
    ),
    "axolotl, DPO with LoRA on messages": (
        "axolotl",
        AXOLOTL + """
rl: dpo
load_in_8bit: true
adapter: lora
model_type: LlamaForCausalLM
special_tokens: {pad_token: "<|pad|>", eos_token: "<|eot|>"}
datasets:
  - path: org/pairs
    type: chat_template.default
    field_messages: conversation
    field_chosen: better
    message_property_mappings: {role: role, content: content}
    roles: {user: [user]}
val_set_size: 0.05
optimizer: adamw_bnb_8bit
evals_per_epoch: 4
dataset_exact_deduplication: true
""",
        {"data.train": {"path": "org/pairs", "columns": {"prompt": "conversation", "chosen": "better"},
                        "split": "train[:95%]"},
         "data.text": "chat", "model.lora.target_modules": "all-linear", "model.pad_token": "<|pad|>",
         "batch.pairs_per_step": 16, "tracking.wandb": None, "model.quantization": None,
         "optimizer.type": "adamw_8bit"},
        {"special_tokens", "chat_template", "load_in_8bit", "val_set_size", "evals_per_epoch",
         "dataset_exact_deduplication"},
    ),
    "axolotl, KTO with QLoRA": (
        "axolotl",
        AXOLOTL + "rl: kto\nrl_beta: 0.5\nkto_desirable_weight: 0.2\nload_in_4bit: true\nadapter: qlora\n"
        "strict: false\ndatasets: [{path: org/rated, type: llama3.ultra, split: train}]\nval_set_size: 0.0\nfsdp:",
        {"loss.type": "kto", "loss.beta": 0.5, "loss.desirable_weight": 0.2, "model.quantization": {"bits": 4},
         "data.strict": None, "data.text": "chat"},
        {"chat_template"},
    ),
    "axolotl, ORPO under its own DeepSpeed JSON": (
        "axolotl",
        AXOLOTL + "rl: orpo\norpo_alpha: 0.1\nsdp_attention: true\nuse_tensorboard: true\n"
        "deepspeed: deepspeed_configs/zero3_bf16_cpuoffload_all.json\n"
        "datasets: [{ds_type: json, data_files: [data/orpo.jsonl], type: chat_template.argilla}]",
        {"loss.type": "orpo", "loss.beta": 0.1, "deepspeed": "ds_configs/zero3_offload.json",
         "data.train": "data/orpo.jsonl", "model.attn_implementation": "sdpa", "tracking.tensorboard": True},
        {"chat_template", "deepspeed"},
    ),
    "axolotl, SimPO": (
        "axolotl",
        AXOLOTL + "rl: simpo\nrl_beta: 2.0\ncpo_alpha: 0.9\nsimpo_gamma: 1.0\n"
        "datasets: [{path: org/pairs, type: chatml.intel}]",
        {"loss.type": ["simpo", "sft"], "loss.weights": [1.0, 0.9], "loss.simpo_gamma": 1.0, "loss.beta": 2.0},
        {"chat_template"},
    ),
    "LLaMA-Factory, DPO with LoRA": (
        "llamafactory",
        FACTORY + "stage: dpo\nfinetuning_type: lora\nlora_rank: 8\nlora_target: all\npref_loss: sigmoid\n"
        "dataset: dialogues\ndeepspeed: examples/deepspeed/ds_z2_config.json",
        {"model.lora": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}, "data.text": "chat",
         "data.train": {"path": "data/dialogues.json", "columns": {"prompt": "conversations"},
                        "split": "train[:1000]"},
         "deepspeed": "ds_configs/zero2.json", "batch.pairs_per_step": 16},
        {"chat_template", "ddp_timeout", "deepspeed"},
    ),
    "LLaMA-Factory, KTO": (
        "llamafactory", FACTORY + "stage: kto\nfinetuning_type: full\ndataset: rated",
        {"loss.type": "kto", "model.lora": None,
         "data.train": {"path": "data/rated.json", "columns": {"completion": "messages"},
                        "split": "train[:1000]"}},
        {"chat_template", "ddp_timeout"},
    ),
    "LLaMA-Factory, what cannot be: OFT, images": (
        "llamafactory",
        FACTORY + "stage: dpo\nfinetuning_type: oft\noft_block_size: 32\ndataset: dialogues\nimage_max_pixels: 262144",
        {"model.lora": None},
        {"chat_template", "adapter", "oft_block_size", "image_max_pixels", "ddp_timeout"},
    ),
}  # fmt: skip


def at(run: dict[str, Any], name: str) -> Any:
    """A setting by its dotted name, None where it is not there."""
    found: Any = run
    for part in name.split("."):
        found = None if found is None else found.get(part)
    return found


@pytest.mark.parametrize("name", CASES)
def test_published_settings_become_a_run_that_is_checked(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, text, expected, without = CASES[name]
    monkeypatch.chdir(tmp_path)
    Path("data").symlink_to(FOREIGN / "data")
    file = Path("theirs.sh" if text is SCRIPT else "theirs.yaml")
    file.write_text(text)
    assert main(["convert", "--from", program, str(file), "--gpus", "2", "--json"]) == 0
    run, said = yaml.safe_load(Path("run.yaml").read_text()), json.loads(capsys.readouterr().out)
    assert {key: at(run, key) for key in expected} == expected
    assert {each["theirs"].split(":")[0] for each in said["left"]} == without
    settings, _ = load_run(["run.yaml"], run_parser("dsdpo train", ""))
    assert settings.model.path.startswith("org/")
