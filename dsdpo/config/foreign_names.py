"""What settings of TRL, transformers, OpenRLHF, LLaMA-Factory, axolotl and DeepSpeed are called here.

A line holds the names of one thing, separated by spaces, and what to do. Of several
advices, separated by |, the first counts whose settings this version has; where it has none of them, so it says.
"""

from __future__ import annotations

from dsdpo.config.loss import LOSSES

_NONE = "there is none: "
_JSON = "it belongs into the DeepSpeed JSON that deepspeed names"

_TABLE = {
    # model
    "model_name_or_path model_name pretrain base_model model_id base_model_name_or_path model.name": "use model.path",
    "model_revision revision_of_model": "use model.revision",
    "torch_dtype param_dtype bf16 fp16 pure_bf16 bfloat16 float16 precision mixed_precision": "use model.dtype "
    "(bfloat16, float16 or float32); the DeepSpeed JSON's bf16 and fp16 blocks may say auto",
    "flash_attn flash_attention flash_attn_2 use_flash_attention_2 attn_impl attention sdp_attention "
    "xformers_attention eager_attention": "use model.attn_implementation, e.g. sdpa or flash_attention_2",
    "activation_checkpointing gradient_checkpoint disable_gradient_checkpointing": "use model.gradient_checkpointing",
    "tiled_mlp tiled_mlp_num_shards tiled_mlp_use_original_mlp sequence_tiled_compute": "use model.mlp_tile_tokens",
    "gradient_checkpointing_kwargs activation_checkpointing_kwargs gradient_checkpointing_use_reentrant "
    "use_reentrant_gc": _NONE + "checkpointing is non-reentrant; model.gradient_checkpointing switches it",
    "tokenizer_name tokenizer_name_or_path tokenizer_config tokenizer_path": "use model.tokenizer",
    "template chat_template_path chat_template_jinja tokenizer_chat_template input_template": "use "
    "model.chat_template (a Jinja file), or nothing for the tokenizer's own",
    "apply_chat_template": _NONE + "rows that hold messages get the chat template, rows of text stay as they are",
    "load_in_4bit load_in_8bit quantization_bit quantization_method bnb_4bit_quant_type use_bnb_nested_quant "
    "bnb_4bit_quant_storage bnb_4bit_compute_dtype qlora quantization_type double_quantization": "use "
    "model.quantization, e.g. {bits: 4, type: nf4, double: true}",
    "use_peft finetuning_type adapter lora_on": "use model.lora, e.g. {r: 16}; without it all weights are trained",
    "lora_r lora_rank": "use model.lora.r",
    "lora_model_dir adapter_name_or_path adapter_path peft_path": "use model.lora.path",
    "lora_target_modules lora_target lora_target_linear": "use model.lora.target_modules",
    "lora_modules_to_save additional_target": "use model.lora.modules_to_save",
    "lora_task_type lora_target_parameters task_type": _NONE + "model.lora has peft.LoraConfig's fields, and the task "
    "is causal language modelling",
    "enable_liger_kernel liger_plugin use_liger liger_rope liger_rms_norm liger_glu_activation": "use "
    "model.use_liger_kernel",
    "use_unsloth liger_kernel_config disable_dropout": _NONE + "dropout is off, logits are never held whole; "
    "model.use_liger_kernel has Liger compute norms, rotary embeddings and MLPs",
    "neftune_noise_alpha noisy_embedding_alpha": _NONE + "no noise is added to embeddings",
    "model_init_kwargs ref_model_init_kwargs low_cpu_mem_usage device_map": _NONE + "weights are loaded into the ZeRO "
    "partitions; see model.dtype, model.revision and model.attn_implementation",
    "router_aux_loss_coef aux_loss_coef output_router_logits": "use model.router_aux_loss_coef",
    "rope_scaling rope_theta rope_factor": _NONE + "RoPE is what the model's config.json says",
    "shift_attn mixture_of_depths use_llama_pro infer_dtype": _NONE + "the model computes what its config.json says",
    "peft_init_lora_weights": "use model.lora.init_lora_weights",
    "model_type tokenizer_type is_llama_derived_model is_mistral_derived_model": _NONE
    + "classes are found by config.json and tokenizer_config.json",
    "image_max_pixels video_max_pixels freeze_vision_tower": _NONE + "models of text alone are trained",
    "use_cache": _NONE + "training keeps no key-value cache",
    "resize_vocab resize_token_embeddings_to_32x new_special_tokens special_tokens add_special_tokens": _NONE
    + "give a model whose embedding has a row for each token; model.pad_token chooses the padding",
    # data
    "dataset dataset_name dataset_name_or_path datasets train_file train_dataset train_data data_path preference_data "
    "prompt_data": "use data.train",
    "dataset_dir": "give the path of the files in data.train",
    "eval_dataset test_dataset test_datasets eval_file validation_file val_dataset test_data": "use data.eval",
    "dataset_config dataset_config_name subset dataset_subset": "use data.train with {path: ..., name: ...}",
    "dataset_train_split train_split split": "use data.train with {path: ..., split: ...}",
    "dataset_test_split eval_split test_split": "use data.eval with {path: ..., split: ...}",
    "val_set_size val_size eval_ratio": "use data.eval with {path: ..., split: 'train[95%:]'}, and 'train[:95%]' in "
    "data.train",
    "max_samples num_samples max_train_samples max_eval_samples": "use data.train with {path: ..., split: "
    "'train[:1000]'}",
    "mix_strategy interleave_probs probs dataset_probs prompt_data_probs": "use data.train, a list of {path, weight}",
    "dataset_exact_deduplication": _NONE + "dsdpo inspect counts doubled pairs",
    "streaming dataset_streaming": _NONE + "rows are tokenized once and kept; data.cache_dir says where",
    "prompt_key chosen_key rejected_key prompt_column chosen_column rejected_column input_key field_messages "
    "message_property_mappings columns": "use data.train with {path: ..., columns: {chosen: ...}}",
    "cutoff_len sequence_len max_len max_seq_length max_seq_len model_max_length": "use data.max_length",
    "max_completion_length max_target_length max_source_length label_pad_token_id": _NONE
    + "data.max_length limits prompt and one response together",
    "padding_value pad_token_id padding_side truncation_side padding": _NONE + "pairs are packed without padding, or "
    "padded where it does not count; data.truncation says which end of a prompt is kept",
    "tools tool_format": _NONE + "a row's own column tools goes to the chat template",
    "chat_template_args template_kwargs": "use data.chat_template_kwargs",
    "truncation_mode": "use data.truncation",
    "max_prompt_length": "use data.max_prompt_length",
    "sample_packing sample_packing_group_size packing packing_samples neat_packing padding_free pad_to_sequence_len "
    "pad_to_multiple_of group_by_length length_column_name train_sampling_strategy eval_sample_packing "
    "use_dynamic_batch": "use data.layout (auto packs pairs without padding and balances them over ranks)",
    "preprocessing_num_workers dataset_processes dataset_preparation_workers preprocessing_workers": "use "
    "data.dataset_num_proc",
    "dataset_prepared_path tokenized_path": "use data.cache_dir",
    "overwrite_cache preprocessing_batch_size": _NONE + "what lies in data.cache_dir is found by what it is made of",
    "shuffle_dataset disable_shuffling shuffle_merged_datasets dataloader_shuffle": "use data.shuffle",
    "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
    "dataloader_multiprocessing_context dataloader_in_order dataloader_drop_last remove_unused_columns": _NONE
    + "batches are made ahead by themselves, every pair is used and columns beyond the known ones are ignored",
    "train_on_inputs mask_prompt train_on_prompt ignore_bias_buffers label_names": _NONE
    + "the loss is over response tokens only",
    "enable_thinking": "use data.chat_template_kwargs",
    # loss
    "loss_type pref_loss rl dpo_loss_type": "use loss.type",
    "dpo_beta pref_beta rl_beta": "use loss.beta",
    "label_smoothing_factor dpo_label_smoothing": "use loss.label_smoothing",
    "gamma simpo_margin": "use loss.simpo_gamma with loss.type simpo",
    "length_normalization length_normalized average_log_prob": "use loss.type sigmoid_norm",
    "kto_chosen_weight kto_desirable_weight": "use loss.desirable_weight",
    "kto_rejected_weight kto_undesirable_weight": "use loss.undesirable_weight",
    "kto_lambda kto_ftx": _NONE + "loss.type kto has loss.desirable_weight and loss.undesirable_weight",
    "orpo_beta orpo_alpha": "use loss.beta with loss.type orpo",
    "loss_weights": "use loss.weights",
    "rpo_alpha nll_loss_coef nll_weight nll_loss_weight pref_ftx dpo_ftx sft_weight sft_loss_weight": "use "
    "loss.rpo_alpha (weight of the chosen responses' own log-likelihood)",
    "cpo_simpo_gamma": "use loss.type simpo with loss.simpo_gamma",
    "dpop_lambda": "use loss.dpop_lambda",
    "f_divergence_type f_alpha_divergence_coef f_divergence": "use loss.f_divergence_type",
    "discopop_tau": "use loss.discopop_tau",
    "ld_alpha": "use loss.ld_alpha",
    "use_weighting": "use loss.use_weighting",
    "reference_free ref_free": "use reference.strategy none with a loss that needs no reference",
    "pref_bco_weight": "use loss.type [sigmoid, bco_pair] with loss.weights",
    # reference
    "ref_model ref_model_name_or_path ref_pretrain reference_model ref_model_path": "use reference.path",
    "ref_model_revision": "use reference.revision",
    "ref_model_adapters ref_adapter_name model_adapter_name force_use_ref_model": "use reference.adapter (initial or "
    "base) with reference.strategy adapter",
    "ref_offload offload_ref cpu_offload_ref": "use reference.deepspeed with a JSON that offloads, such as "
    "ds_configs/reference/zero3_offload.json",
    "precompute_ref_log_probs precompute_ref_logprobs precompute_reference_log_probs": "use reference.strategy "
    "precomputed",
    "base_model_attribute_name": _NONE + "the reference is found without it",
    "precompute_ref_batch_size ref_batch_size": "use reference.score_tokens, a number of tokens",
    # optimizer
    "lr peak_lr actor_learning_rate": "use optimizer.learning_rate",
    "lr_scheduler scheduler lr_schedule": "use optimizer.lr_scheduler_type",
    "cosine_min_lr_ratio min_lr min_lr_ratio lr_min min_lr_rate": "use optimizer.lr_scheduler_kwargs, as "
    "{min_lr_rate: 0.1} with optimizer.lr_scheduler_type cosine_with_min_lr",
    "cosine_constant_lr_ratio": "use optimizer.lr_scheduler_type; none stays at its end's rate for a while",
    "lr_warmup_ratio warmup_proportion warmup": "use optimizer.warmup_ratio",
    "num_warmup_steps lr_warmup_steps": "use optimizer.warmup_steps",
    "optim optimizer_name optim_args optim_target_modules": "use optimizer.type (AdamW if left out) | "
    "there is none: AdamW, or the optimizer block of the DeepSpeed JSON that deepspeed names",
    "use_muon": "use optimizer.type muon",
    "adam_betas betas": "use optimizer.adam_beta1 and optimizer.adam_beta2",
    "beta1": "use optimizer.adam_beta1",
    "beta2": "use optimizer.adam_beta2",
    "l2 wd weight_decay_rate adam_weight_decay": "use optimizer.weight_decay",
    "max_norm grad_clip gradient_clipping max_gradient_norm clip_grad": "use optimizer.max_grad_norm",
    "adam_offload offload_optimizer cpu_offload": "use zero_optimization.offload_optimizer in the DeepSpeed JSON, as "
    "in ds_configs/zero3_offload.json",
    "loraplus_lr_ratio loraplus_lr_embedding embedding_learning_rate use_galore use_badam use_apollo": _NONE
    + "one learning rate serves all weights",
    # batch
    "per_device_train_batch_size micro_train_batch_size micro_batch_size per_gpu_train_batch_size": "use "
    "batch.pairs_per_micro_batch, or rather batch.tokens_per_micro_batch; batch.pairs_per_step is the size of a step "
    "over all ranks",
    "train_batch_size global_batch_size batch_size": "use batch.pairs_per_step (pairs of one step, over all ranks)",
    "gradient_accumulation_steps accumulated_gradient grad_accum": _NONE + "it follows from batch.pairs_per_step, the "
    "number of ranks and the micro-batch size",
    "per_device_eval_batch_size eval_batch_size micro_eval_batch_size": _NONE + "evaluation fills "
    "batch.tokens_per_micro_batch as training does",
    "train_max_tokens_per_gpu max_tokens_per_micro_batch max_tokens_per_gpu": "use batch.tokens_per_micro_batch",
    "auto_find_batch_size average_tokens_across_devices": _NONE + "set batch.tokens_per_micro_batch; the gradient is "
    "the mean over the pairs of a step, however they are cut",
    # train
    "num_epochs max_epochs epochs n_epochs": "use train.num_train_epochs",
    "num_steps total_steps max_train_steps": "use train.max_steps",
    "data_seed random_seed": "use train.seed",
    "full_determinism deterministic": _NONE + "a run is reproducible from train.seed on the same ranks",
    "torch_compile_backend torch_compile_mode": _NONE + "model.torch_compile compiles each layer with torch's defaults",
    "tf32 use_cpu no_cuda": _NONE + "a GPU is used if there is one; start with --device cpu to leave it alone",
    "torch_empty_cache_steps": _NONE + "memory is freed where an engine ends",
    "freeze_layers freeze_trainable_layers unfrozen_parameters freezing_actor_steps": _NONE + "train a part of the "
    "weights with model.lora and its modules_to_save",
    # evaluation
    "eval_steps": "use evaluation.every_steps",
    "evals_per_epoch": "use evaluation.every_steps, a number of optimizer steps",
    "eval_strategy evaluation_strategy do_eval": "use data.eval (null: none) with evaluation.every_steps",
    "eval_on_start eval_first_step": "use evaluation.at_start",
    "eval_delay eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics "
    "batch_eval_metrics prediction_loss_only bf16_full_eval fp16_full_eval compute_metrics": _NONE + "evaluation "
    "gives loss and reward metrics of data.eval, summed on the devices",
    "generate_during_eval num_eval_samples eval_samples eval_table_size": "use evaluation.samples",
    # checkpoint, export
    "save_steps": "use checkpoint.every_steps",
    "saves_per_epoch": "use checkpoint.every_steps, a number of optimizer steps",
    "save_optimizer_state save_optim": _NONE + "a checkpoint holds all that a resumed run needs",
    "max_shard_size save_max_shard_size": _NONE + "dsdpo export has --shard-gb",
    "save_torch_dtype save_dtype export_dtype": _NONE + "the exported model has model.dtype; dsdpo export has --dtype",
    "save_total_limit max_ckpt_num keep_last_n_checkpoints": "use checkpoint.keep_last",
    "save_strategy save_only_model save_on_each_node save_safetensors enable_jit_checkpoint": _NONE
    + "checkpoint.every_steps says when (0: never); the model is exported as safetensors at the end",
    "load_best_model_at_end metric_for_best_model greater_is_better": "use checkpoint.keep_best and "
    "checkpoint.best_metric",
    "resume_from_checkpoint load_checkpoint auto_resume_from_checkpoints resume": "use checkpoint.resume, or --resume",
    "ckpt_path save_path output_path save_dir logging_dir": "use output_dir",
    "overwrite_output": "use overwrite_output_dir",
    "merge_lora merge_adapter_after_training save_merged": "use export.merge_adapter",
    "hub_model_id": "use export.push_to_hub, whose value is the repository's name",
    "hub_private_repo": "use export.hub_private",
    "hub_token hub_strategy hub_always_push hub_revision": _NONE + "export.push_to_hub uploads model/ once, at the "
    "end, with the token that hf auth login keeps",
    "ignore_data_skip restore_callback_states_from_checkpoint": _NONE + "a resumed run goes on exactly where it was",
    # tracking
    "logging_steps log_interval": "use tracking.every_steps",
    "report_to use_wandb log_with": "use tracking.wandb, e.g. {project: dpo}, for Weights & Biases; metrics.jsonl is "
    "always written",
    "wandb_project project": "use tracking.wandb.project",
    "wandb_entity wandb_org": "use tracking.wandb.entity",
    "wandb_name wandb_run_name run_name wandb_run_id": "use tracking.wandb.name",
    "wandb_group": "use tracking.wandb.group",
    "use_tensorboard": "use tracking.tensorboard",
    "tensorboard_dir": _NONE + "tracking.tensorboard writes to tensorboard/ of the run folder",
    "use_mlflow use_swanlab use_comet use_trackio trackio_space_id trackio_bucket_id "
    "trackio_static_space_id mlflow_tracking_uri": _NONE + "metrics.jsonl is always written, and "
    "tracking.wandb sends to Weights & Biases",
    "logging_strategy logging_first_step logging_nan_inf_filter log_on_each_node include_num_input_tokens_seen "
    "skip_memory_metrics log_level log_level_replica disable_tqdm plot_loss include_tokens_per_second": _NONE
    + "see tracking.every_steps, --verbose and dsdpo plot",
    "profiler profile_steps profiling_steps": "use tracking.profile_steps",
    # distributed and DeepSpeed
    "ddp_timeout ddp_timeout_seconds timeout": "use distributed.timeout_minutes, in minutes",
    "sequence_parallel_size context_parallel_size ring_attn_size cp_size ulysses_size sequence_parallel_degree": "use "
    "distributed.sequence_parallel",
    "fsdp fsdp_config fsdp_version ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
    "ddp_static_graph ddp_backend accelerator_config parallelism_config tensor_parallel_size ds_tensor_parallel_size "
    "num_processes num_gpus world_size nproc_per_node num_machines": _NONE
    + "the launcher starts the ranks and DeepSpeed's JSON partitions the model",
    "deepspeed_config ds_config deepspeed_config_file": "use deepspeed",
    "zero_stage stage zpg overlap_comm zero_optimization offload_param zero3_init_flag zero3_save_16bit_model "
    "train_micro_batch_size_per_gpu allgather_bucket_size reduce_bucket_size wall_clock_breakdown "
    "deepcompile": _JSON,
    "colocate_all_models colocate_actor_ref ref_num_nodes ref_num_gpus_per_node": _NONE + "policy and reference share "
    "the ranks",
    "do_train do_predict debug": _NONE + "dsdpo train trains, and evaluates where data.eval is given",
}
FOREIGN = {name: f"use loss.type {name}" for name in LOSSES} | {
    name: advice for names, advice in _TABLE.items() for name in names.split()
}
