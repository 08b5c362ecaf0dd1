"""Every causal language model type of transformers, built tiny with other than default scales: ours against its own.

    python -m tests.survey_models [TYPE ...]

For each type of `AutoModelForCausalLM` that can be built small, the log-probs of random pairs by `ResponseScorer`,
padded and where the model takes it packed, are compared with the model's own `.logits`, one sequence at a time. A type
is right (within 1e-5 a nat), refused with a reason, or wrong; any wrong one ends with exit code 1.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dsdpo.data.batch import collate_padded
from dsdpo.data.packed_layout import collate_packed
from dsdpo.data.pairs import Group
from dsdpo.errors import ConfigError
from dsdpo.objective.attention import NAMES
from dsdpo.objective.logps import ResponseScorer
from dsdpo.objective.packed_support import packed_refusal
from tests.tiny import FAMILY_EXTRAS, SMALL, plain_logps, random_pairs

# Numbers of a configuration that bound its size, by the words in their names.
SIZES: dict[str, int] = {
    "vocab": 97,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "num_layers": 2,
    "n_layers": 2,
    "num_blocks": 2,
}
# Scales and caps that are 1 or absent by default: as they are, a mistake about them would not show.
UNUSUAL = {
    "logit_scale": 0.37,
    "logits_scaling": 1.7,
    "lm_head_multiplier": 0.43,
    "final_logit_softcapping": 3.0,
    "logits_soft_cap": 3.0,
    "output_logit_soft_cap": 3.0,
    "output_multiplier": 0.6,
    "logits_mup_width_multiplier": 1.9,
    "unpadded_vocab_size": 90,
    "embedding_multiplier": 1.3,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.7,
}
# What single types need to be small, or to be built at all, whatever the tables above say.
MORE: dict[str, dict[str, Any]] = {
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_chunk_size": 16,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32},
    "xlstm": {"num_heads": 4, "chunk_size": 16, "embedding_dim": 32},
    "mamba2": {"num_heads": 8, "expand": 2, "state_size": 8, "n_groups": 2, "chunk_size": 16},
    "falcon": {"head_dim": None},
}


@dataclass(frozen=True)
class Finding:
    """What became of one type."""

    family: str
    outcome: str  # right, refused, wrong, not built
    note: str = ""


def survey(families: list[str]) -> Iterator[Finding]:
    """One finding for each type."""
    for family in families:
        try:
            lm = small_lm(family)
        except Exception as error:  # whatever a type's own checks of its configuration raise
            yield Finding(family, "not built", f"{type(error).__name__}: {error}".splitlines()[0][:90])
            continue
        yield compare(family, lm)


def small_lm(family: str) -> Any:
    """A tiny random model of a type, with `UNUSUAL` values where its configuration knows the names."""
    kind = CONFIG_MAPPING[family]
    known = vars(kind())
    text = known.get("text_config")
    wanted = {**SMALL, **{name: value for name, value in UNUSUAL.items() if name in known}}
    wanted |= FAMILY_EXTRAS.get(family, {}) | {name: value for name, value in SIZES.items() if name in known}
    wanted = {name: value for name, value in (wanted | MORE.get(family, {})).items() if value is not None}
    if text is not None:
        config = kind(text_config={**{k: v for k, v in text.to_dict().items() if k not in SMALL}, **wanted})
    else:
        config = kind(**wanted)
    if sum(p.numel() for p in _on_meta(config).parameters()) > 20e6:
        raise ValueError("too large")
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return lm


def _on_meta(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def compare(family: str, lm: Any) -> Finding:
    """Ours against the model's own logits."""
    pairs = random_pairs(4, seed=1, vocab=80)
    try:
        truth = torch.cat(plain_logps(lm, pairs))
    except Exception as error:
        return Finding(family, "not built", f"its own forward: {type(error).__name__}: {error}".splitlines()[0][:90])
    tokens = torch.tensor([len(pair.responses[side]) for side in (0, 1) for pair in pairs])
    notes = []
    try:
        scorer = ResponseScorer(lm)
        own = worst_alone(scorer, pairs, truth, tokens)
        if worst(scorer, pairs, truth, tokens) > 1e-4 >= own:
            return Finding(family, "refused", "at start: other log-probs than its own logits without padding")
        notes.append(f"own {own:.1e}")
        notes.append(f"padded {worst(scorer, pairs, truth, tokens):.1e}")
        if packed_refusal(lm.config) is None:
            lm.set_attn_implementation(NAMES["auto"])
            notes.append(f"packed {worst(scorer, pairs, truth, tokens, packed=True):.1e}")
    except ConfigError as refusal:
        return Finding(family, "refused", str(refusal).splitlines()[0][:110])
    except Exception as error:
        return Finding(family, "wrong", f"{type(error).__name__}: {error}".splitlines()[0][:110])
    right = all(float(note.split()[1]) <= 1e-5 for note in notes)
    return Finding(family, "right" if right else "wrong", ", ".join(notes))


@torch.no_grad()
def worst(scorer: Any, pairs: list[Group], truth: Any, tokens: Any, *, packed: bool = False) -> float:
    """The largest error per nat and token."""
    batch = collate_packed(pairs) if packed else collate_padded(pairs, pad_token_id=0)
    return float(((scorer(batch) - truth).abs() / (truth.abs() + tokens)).max())


@torch.no_grad()
def worst_alone(scorer: Any, pairs: list[Group], truth: Any, tokens: Any) -> float:
    """The same of the model's own logits as the check at start takes them: one sequence, without padding."""
    alone = [Group.of(0, pair.prompt, pair.responses[side]) for side in (0, 1) for pair in pairs]
    own = torch.cat([scorer(collate_padded([one], pad_token_id=0), own_logits=True) for one in alone])
    return float(((own - truth).abs() / (truth.abs() + tokens)).max())


def main(families: list[str]) -> int:
    """Print a line for each type and the counts; 1 if any is wrong."""
    outcomes: Counter[str] = Counter()
    for finding in survey(families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)):
        outcomes[finding.outcome] += 1
        print(f"{finding.outcome:9} {finding.family:24} {finding.note}", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())))
    return int(outcomes["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
