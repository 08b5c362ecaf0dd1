# Settings as OpenRLHF's DPO scripts have them.
MODEL=org/model-8b
deepspeed --module openrlhf.cli.train_dpo \
   --pretrain $MODEL \
   --ref_pretrain org/reference-8b \
   --dataset org/mixture \
   --chosen_key better \
   --rejected_key worse \
   --apply_chat_template \
   --max_len 8192 \
   --micro_train_batch_size 1 \
   --train_batch_size 256 \
   --max_epochs 1 \
   --learning_rate 5e-7 \
   --l2 0.01 \
   --zero_stage 3 \
   --adam_offload \
   --ref_offload \
   --beta 0.1 \
   --nll_loss_coef 0.2 \
   --bf16 \
   --gradient_checkpointing \
   --packing_samples \
   --save_steps -1 \
   --logging_steps 1 \
   --eval_steps -1 \
   --save_path ./checkpoint/dpo \
   --use_wandb $WANDB_TOKEN
