"""The model that is trained: its weights, precision, adapter, attention and tokenizer."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, PositiveInt, model_validator

from dsdpo.config.lora import LoraConfig
from dsdpo.config.quantization import QuantizationConfig
from dsdpo.config.section import PathText, Section


class ModelConfig(Section):
    """The policy: which weights training starts from and how they are held."""

    path: PathText
    """Folder or Hub id of the model to train."""
    revision: str | None = None
    """Hub branch, tag or commit of the model; null: the default branch."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of forward and backward; must agree with the bf16 and fp16 blocks of the DeepSpeed JSONs."""
    attn_implementation: str = "auto"
    """transformers' name of the attention (sdpa, eager, flash_attention_2, ...); auto lets transformers choose."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: about a third more compute for far less memory."""
    activation_offloading: bool = False
    """Keep what gradient checkpointing does not recompute, each block's input, in pinned host memory; copied beside the
    computation."""
    mlp_tile_tokens: PositiveInt | None = None
    """Tokens of a row that a layer's MLP computes at a time, so that no other inner activations are in memory; costs
    one more pass through the MLPs. null: the whole row."""
    torch_compile: bool = False
    """Compile each decoder layer with torch.compile; the first steps wait for it. Policy and reference alike."""
    use_liger_kernel: bool = False
    """Compute norms, rotary embeddings and gated MLPs by Liger's kernels, on a GPU. Policy and reference alike."""
    output_head: Literal["chunked", "fused"] = "chunked"
    """What turns hidden states into log-probs. chunked: torch's products, some tokens at a time; fused: Triton kernels
    without logits in memory, for a GPU. Policy and reference alike."""
    lora: LoraConfig | None = None
    """Train an adapter in place of all weights: peft.LoraConfig's fields, or {path: adapter folder}."""
    quantization: QuantizationConfig | None = None
    """Hold the base weights below the adapter in 4 bits (QLoRA), e.g. {bits: 4}; needs bitsandbytes."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    allow_pickle: bool = False
    """Also take weights from pytorch_model.bin where there are no *.safetensors; reading a pickle can run code."""
    tokenizer: PathText | None = None
    """Folder or Hub id of another tokenizer; null: the model's own."""
    chat_template: PathText | None = None
    """Jinja file used as chat template; null: the tokenizer's own."""
    router_aux_loss_coef: NonNegativeFloat | None = 0.0
    """Mixtures of experts: weight of the load-balancing loss of a step's tokens; 0: none; null: the model's own, as TRL
    has it. docs/models.md says why there is none by default."""
    pad_token: str | None = None
    """Token to pad with; null: the tokenizer's own, else its end of sequence, else id 0. Nothing attends to it."""

    @model_validator(mode="after")
    def _trains_something(self) -> ModelConfig:
        if self.quantization is not None and self.quantization.bits == 8:
            raise ValueError("model.quantization.bits 8 is for models that do not train: see reference.quantization")
        if self.quantization is not None and self.lora is None:
            raise ValueError("model.quantization: weights in 4 bits do not train; set model.lora, or leave it out")
        if self.quantization is not None and self.lora is not None and self.lora.use_dora:
            raise ValueError(
                "model.quantization and model.lora.use_dora do not go together, as DoRA takes the norms of whole "
                "weights: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _can_be_compiled(self) -> ModelConfig:
        if self.torch_compile and not self.gradient_checkpointing:
            raise ValueError(
                "model.torch_compile needs model.gradient_checkpointing, without which compiled code asks for weights "
                "that ZeRO-3 has given back: set that to true, or leave torch_compile out"
            )
        for name in ("quantization", "mlp_tile_tokens", "lora"):
            if self.torch_compile and getattr(self, name) is not None:
                raise ValueError(f"model.torch_compile and model.{name} do not go together: leave one of them out")
        if self.torch_compile and self.use_liger_kernel:
            raise ValueError("model.torch_compile and model.use_liger_kernel do the same twice: leave one of them out")
        return self

    @model_validator(mode="after")
    def _offloads_little(self) -> ModelConfig:
        if self.activation_offloading and not self.gradient_checkpointing:
            raise ValueError(
                "model.activation_offloading true without model.gradient_checkpointing would move every activation to "
                "the host and back: set model.gradient_checkpointing to true, or leave activation_offloading out"
            )
        return self
