"""Unknown keys: other programs' names get ours or a plain no, slips of the fingers get the right word, no others do."""

from __future__ import annotations

import dataclasses
import re

import pytest

from dsdpo.config.foreign_names import FOREIGN
from dsdpo.config.load import dotted_keys
from dsdpo.config.unknown_keys import about_unknown

KEYS = dotted_keys()
TRL = """
model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout dataset_num_proc max_length truncation_mode
padding_free pad_to_multiple_of precompute_ref_log_probs precompute_ref_batch_size loss_type loss_weights ld_alpha
f_divergence_type f_alpha_divergence_coef label_smoothing beta use_weighting discopop_tau activation_offloading
sync_ref_model ref_model_mixup_alpha ref_model_sync_steps pad_token model_name_or_path model_revision dtype
attn_implementation use_peft lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters
lora_modules_to_save lora_task_type use_rslora use_dora load_in_8bit load_in_4bit bnb_4bit_quant_type
use_bnb_nested_quant bnb_4bit_quant_storage dataset_name dataset_config dataset_train_split dataset_test_split
dataset_streaming ignore_bias_buffers generate_during_eval rpo_alpha reference_free max_prompt_length
"""
OTHERS = """
pretrain ref_pretrain micro_train_batch_size train_batch_size max_epochs max_len zero_stage l2 nll_loss_coef
save_path ckpt_path prompt_key chosen_key rejected_key adam_offload use_wandb max_norm aux_loss_coef zpg
finetuning_type lora_rank template cutoff_len val_size pref_beta pref_loss pref_ftx plot_loss
preprocessing_num_workers overwrite_cache quantization_bit base_model sequence_len micro_batch_size num_epochs
val_set_size wandb_project dataset_prepared_path flash_attention evals_per_epoch saves_per_epoch sample_packing
adapter rl dpo_beta load_in_4bit
rope_scaling shift_attn mixture_of_depths padding_value padding_side save_optimizer_state max_shard_size
colocate_all_models base_model_attribute_name weight_decay_rate simpo orpo apo_zero bco_pair orpo_beta gamma nll_weight
"""


def transformers_names() -> list[str]:
    from transformers import TrainingArguments

    return [field.name for field in dataclasses.fields(TrainingArguments)]


@pytest.mark.parametrize("section", ["", "optimizer.", "model."])
def test_every_name_of_trl_and_transformers_gets_an_answer(section: str) -> None:
    for name in [*transformers_names(), *TRL.split(), *OTHERS.split()]:
        key = section + name
        if key in KEYS or name == "local_rank":  # which is the launcher's
            continue
        answer = about_unknown(key, KEYS)
        own = [setting for setting in KEYS if setting.split(".")[-1] == name]
        assert answer, key
        if own and name not in FOREIGN:
            assert own[0] in answer, f"{key}{answer}"
        else:
            assert name in FOREIGN, f"{key}{answer}: a resemblance is no answer"


def test_an_answer_names_settings_that_exist_or_says_there_is_none() -> None:
    setting = re.compile(
        r"\b(?:model|data|loss|reference|optimizer|batch|train|evaluation|checkpoint|tracking)\.[a-z0-9_.]*[a-z0-9]"
    )
    for name in FOREIGN:
        answer = about_unknown(name, KEYS)
        assert {key for key in setting.findall(answer) if "json" not in key} <= set(KEYS), answer
        assert re.match(r"; (use|give|did you mean|there is none|it belongs into)", answer), answer
        assert name not in KEYS, "a setting of ours needs no translation"


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("loss.betta", "; did you mean loss.beta?"),
        ("losss", "; did you mean loss?"),
        ("model.revison", "; did you mean model.revision?"),
        ("wieght_decay", "; did you mean optimizer.weight_decay?"),
        ("optimizer.learing_rate", "; did you mean optimizer.learning_rate?"),
        ("train.max_lenght", "; did you mean data.max_length?"),
        ("every_step", "; did you mean evaluation.every_steps, checkpoint.every_steps or tracking.every_steps?"),
        ("learning-rate", "; did you mean optimizer.learning_rate?"),
        ("Beta", "; did you mean loss.beta?"),
        ("optimizer.lr", "; did you mean optimizer.learning_rate?"),
        ("loss.rpo_alfa", ""),
        ("frobnicate", ""),
        ("bf15", ""),
        ("rl2", ""),
        ("data.type", ""),
    ],
)
def test_only_misspellings_get_a_suggestion(key: str, answer: str) -> None:
    assert about_unknown(key, [name for name in KEYS if name != "loss.rpo_alpha"]) == answer


def test_an_option_is_answered_with_an_option() -> None:
    assert about_unknown("lr", KEYS, shown=lambda key: f"--{key}") == "; did you mean --optimizer.learning_rate?"
    assert "--batch.pairs_per_step" in about_unknown("train_batch_size", KEYS, shown=lambda key: f"--{key}")
