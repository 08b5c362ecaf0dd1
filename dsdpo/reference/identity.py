"""What a reference's log-probs come from, and the digest of the weights that were really loaded.

The digest is a sum over elements, so every rank adds up its own shards: each element contributes a 64-bit hash
(splitmix64: Steele, Lea & Flood 2014) of its bits, its place in the tensor and the tensor's name, under two seeds.
Neither the number of ranks nor the ZeRO stage nor where shards lie has any part in it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PretrainedConfig

from dsdpo.atomic import digest_of
from dsdpo.config.model import ModelConfig
from dsdpo.data.render import Renderer
from dsdpo.data.tokenize import template_digest, tokenizer_digest
from dsdpo.data.types import Tokenizer
from dsdpo.distributed import world_size
from dsdpo.engine.build import device
from dsdpo.engine.shards import local_shards
from dsdpo.objective.logps import LOGPS_VERSION, ResponseScorer
from dsdpo.reference.run_plan import RunPlan

# Elements hashed at once. On a CPU the working memory, 24 bytes each, should fit the cache: twice as fast as 1 << 20.
CHUNK_CPU, CHUNK = 1 << 16, 1 << 22
# Names that wrappers put around a model's own.
WRAPPERS = re.compile(r"^(module\.|lm\.|base_model\.model\.)+|(\.base_layer|\.original_module|\._orig_mod)(?=\.)")
ADAPTER_PART = re.compile(r"\.(?P<part>lora_[A-Za-z_]+|modules_to_save)\.(?P<adapter>[^.]+)(?=\.|$)")
ADAPTER_SCALING = ("lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
WEYL, ODD = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95
# Configuration that says where a model came from or how it is run, not what it computes.
NOT_ARCHITECTURE = (
    "_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "_commit_hash",
    "_attn_implementation", "_attn_implementation_autoset",
)  # fmt: skip


@dataclass(frozen=True)
class ReferenceIdentity:
    """Which reference some log-probs, or a checkpoint, belong to."""

    weights: str  # digest of all parameters and saved buffers as loaded
    architecture: str  # digest of the model's configuration
    dtype: str  # that the weights are held, and computed, in
    tokenizer: str  # digest
    template: str  # digest of the chat template
    max_length: int  # truncation, in tokens
    logps_version: int  # of the code that computes log-probs
    path: str  # where the weights came from
    revision: str | None  # commit, where the source has any
    strategy: str
    sync: str | None  # how the reference has moved; null: not at all
    token_weights: str | None = None  # by which tokens count in a response's sum; null: all alike
    date: str | None = None  # YYYY-MM-DD, what the chat template was told; not known where a template asks for none
    # Of a reference with the policy's weights in fewer bits: how far from it at step 0 (`self_check.measured_bias`).
    bias: dict[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """All fields; the date only where the template writes one, the bias only where there is one."""
        return {name: value for name, value in asdict(self).items() if name not in LATER or value is not None}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> ReferenceIdentity:
        """Raises TypeError where `content` is no identity."""
        known = {field.name for field in fields(cls)}
        found = set(content) | {"token_weights", *LATER}  # which identities of older versions do not have
        if found != known:
            raise TypeError(f"not a reference identity: {sorted(found ^ known)}")
        return cls(**content)

    def key(self) -> str:
        """The name of everything that decides a pair's log-probs, 32 hex digits."""
        decisive = {name: getattr(self, name) for name in DECISIVE}
        if self.token_weights is not None:
            decisive["token_weights"] = self.token_weights
        return digest_of(decisive)[:32]

    def differences(self, other: ReferenceIdentity, among: Sequence[str] = ()) -> list[str]:
        """One text for each field that differs, this identity's value first; of all fields, or `among` these.

        Dates differ where both are known: identities of older versions have none, whatever the template was told. The
        bias follows from the other fields but for the rounding of a device: see `drift`.
        """
        known = [field.name for field in fields(self) if field.name not in LATER or (self.date and other.date)]
        names = among or [name for name in known if name != "bias"]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return [f"{name} ({_short(ours)}, not {_short(theirs)})" for name, ours, theirs in pairs if ours != theirs]

    def drift(self, saved: ReferenceIdentity) -> str | None:
        """What to say where the bias is another than it was by more than a tenth of its spread over responses."""
        if self.bias is None or saved.bias is None:
            return None
        if abs(self.bias["mean"] - saved.bias["mean"]) <= 0.1 * saved.bias["spread"]:
            return None
        return (
            f"the reference in fewer bits was {saved.bias['mean']:+.3f} nats off when training began, and is "
            f"{self.bias['mean']:+.3f} now with the same weights: something computes it otherwise (device, versions)"
        )

    def describe(self) -> str:
        """The identity in one line."""
        revision = f" at {self.revision[:12]}" if self.revision else ""
        moved = f", {self.sync}" if self.sync else ""
        weights = f"weights {self.weights[:12]}"
        return f"{self.path}{revision}, {self.dtype}, {self.strategy}{moved}, {weights}{bias_text(self.bias)}"


def bias_text(bias: Mapping[str, float] | None) -> str:
    """What a reference in fewer bits is off by; nothing for one that is not."""
    if bias is None:
        return ""
    return (
        f"; in fewer bits: a response gets {bias['mean']:+.3f} nats on average beside the policy's "
        f"({bias['size_per_token']:.4f} a token, spread {bias['spread']:.3f}), so the first loss is not ln 2"
    )


# Fields that are there only where there is something to say.
LATER = ("date", "bias")
# Fields that decide log-probs. The rest says where the same weights lay and what they were used for; the date is in the
# tokens, by which the store knows a pair.
DECISIVE = ("weights", "architecture", "dtype", "tokenizer", "template", "max_length", "logps_version")


def identify_reference(plan: RunPlan, module: ResponseScorer, *, adapter: str | None) -> ReferenceIdentity:
    """Which reference stands in `module`, as it is when training starts; `adapter` is its own, if any. Collective."""
    sync = plan.reference.sync
    return identify(
        module,
        model=plan.reference.model,
        tokenizer=plan.tokenizer,
        max_length=plan.run.data.max_length,
        strategy=plan.reference.strategy,
        engine_config=plan.reference_config,
        adapter=adapter,
        sync=f"moves every {sync.every} steps, alpha {sync.alpha}" if sync else None,
        token_weights=plan.run.loss.token_weights,
        date=plan.run.data.date,
    )


def identify(
    module: ResponseScorer,
    *,
    model: ModelConfig,
    tokenizer: Tokenizer,
    max_length: int,
    strategy: str,
    engine_config: dict[str, Any] | None = None,
    adapter: str | None = None,
    sync: str | None = None,
    token_weights: str | None = None,
    date: str | None = None,
) -> ReferenceIdentity:
    """The identity of the reference whose weights stand in `module`, a `ResponseScorer`. Collective.

    `adapter` is peft's name of the adapter that belongs to the reference; others in the module do not count. `date`
    counts if the chat template asks for it.
    """
    config = module.lm.config
    casts = (engine_config or {}).get("torch_autocast", {})
    autocast = f", autocast {casts['dtype']}" if casts.get("enabled") else ""
    products = ", products in e4m3" if model.quantization is not None and model.quantization.bits == 8 else ""
    return ReferenceIdentity(
        weights=weights_digest(module, adapter=adapter),
        architecture=architecture_digest(
            config,
            module.lm.peft_config[adapter] if adapter else None,
            rope_choice=getattr(module.lm, "rope_choice", None),
        ),
        dtype=model.dtype + autocast + products,
        tokenizer=tokenizer_digest(tokenizer)[:32],
        template=template_digest(tokenizer)[:32],
        max_length=max_length,
        logps_version=LOGPS_VERSION,
        path=model.path,
        revision=getattr(config, "_commit_hash", None) or model.revision,
        strategy=strategy,
        sync=sync,
        token_weights=token_weights,
        date=date if Renderer(tokenizer).asks_for_date else None,
    )


def architecture_digest(config: PretrainedConfig, adapter: Any = None, *, rope_choice: str | None = None) -> str:
    """Hash over what configurations of model and adapter say beside the weights: RoPE, norms, soft-caps, scaling.

    `rope_choice` says which factors of RoPE the run has, for a model where they depend on the longest pair.
    """
    content = {key: value for key, value in config.to_diff_dict().items() if key not in NOT_ARCHITECTURE}
    if rope_choice is not None:
        content["rope_choice"] = rope_choice
    if adapter is not None:
        content |= {key: getattr(adapter, key) for key in ADAPTER_SCALING}
    return digest_of(content)[:32]


@torch.no_grad()
def weights_digest(module: nn.Module, *, adapter: str | None = None) -> str:
    """128 bits over every parameter and saved buffer, in hex, computed where the shards lie. Collective.

    Names of wrappers do not count, so the same weights agree inside a policy, a reference or below an adapter. Of
    adapters only `adapter` counts, under any name.
    """
    total = torch.zeros(2, dtype=torch.int64, device=device())
    for name, shard, start in local_shards(module):
        own = WRAPPERS.sub("", name)
        part = ADAPTER_PART.search(own)
        if part is None or part["adapter"] == adapter:
            total += _shard_hash(ADAPTER_PART.sub(r".\g<part>", own), shard, start)
    if world_size() > 1:
        dist.all_reduce(total)
    return "".join(f"{value % 2**64:016x}" for value in total.tolist())


def _shard_hash(name: str, shard: Tensor, start: int) -> Tensor:
    """(2,) int64: for each seed the sum over elements of mix(hash(name) + WEYL * place ^ ODD * bits), modulo 2^64."""
    seeds = [int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") for seed in (1, 2)]
    sums = torch.zeros(2, dtype=torch.int64, device=device())
    bits = shard.contiguous().view(BITS[shard.element_size()])
    chunk = CHUNK_CPU if device().type == "cpu" else CHUNK
    for first in range(0, len(bits), chunk):
        part = bits[first : first + chunk].to(device()).to(torch.int64)
        places = torch.arange(start + first, start + first + len(part), device=device()).mul_(_signed(WEYL))
        for index, seed in enumerate(seeds):
            sums[index] += _mix((places + _signed(seed)).bitwise_xor_(part * _signed(ODD))).sum()
    return sums


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finalizer, in place; int64 arithmetic wraps modulo 2^64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x.bitwise_xor_(_shift_right(x, shift)).mul_(_signed(factor))
    return x.bitwise_xor_(_shift_right(x, 31))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """A logical shift: torch's own carries the sign along."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if re.fullmatch("[0-9a-f]{32}", text) else text
