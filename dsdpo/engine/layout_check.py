"""A look before training at what no source code can promise: that a model gives packed pairs their padded log-probs."""

from __future__ import annotations

import torch

from dsdpo.data.steps import BatchSource
from dsdpo.distributed import max_over_ranks
from dsdpo.engine.build import device
from dsdpo.engine.scoring_mode import scoring
from dsdpo.engine.types import InferenceEngine
from dsdpo.errors import ConfigError
from dsdpo.objective.logps import ROUNDING, pair_logps

# A response of few tokens has few over which rounding averages out: one logit of 30 in bfloat16 is off by up to 0.06.
SPARE_TOKENS = 128


def check_layout(engine: InferenceEngine, windows: BatchSource, *, dtype: str) -> None:
    """Score a few pairs, the longest and the shortest among them, in both layouts. Collective.

    Raises `ConfigError` on all ranks if on any they differ by more than rounding in `dtype`. Does nothing for padded
    batches. A policy must have had its warm-up pass: see `warm_up`.
    """
    if windows.layout == "padded":
        return
    with scoring(engine):
        ours, plain = (pair_logps(engine, windows.sample(layout).to(device())) for layout in ("packed", "padded"))
    packed, padded = (torch.cat([logps.chosen, logps.rejected]) for logps in (ours, plain))
    tokens = torch.cat([plain.chosen_tokens, plain.rejected_tokens])
    allowed = ROUNDING[dtype] * (padded.abs() + tokens + SPARE_TOKENS)
    # A padded answer that is not finite says nothing of the layout; training stops at it and names the pair.
    wrong = padded.isfinite() & ~((packed - padded).abs() <= allowed)
    if max_over_ranks(int(wrong.any()), device()):
        worst = int(((packed - padded).abs() / allowed).nan_to_num(torch.inf).where(wrong, -1.0).argmax())
        raise ConfigError(
            f"data.layout: {type(engine.module.lm).__name__} gives a response of {tokens[worst]} tokens "
            f"{packed[worst]:.4f} nats in the packed layout and {padded[worst]:.4f} in the padded one, where rounding "
            f"in {dtype} explains {allowed[worst]:.4f}: set data.layout to padded, and please report the model"
        )
