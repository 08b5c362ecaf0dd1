"""Looking at ZeRO-3 shards: what belongs to a parameter, and what only fills a rank's part up."""

from __future__ import annotations

import torch

from tests.ranks import run_ranks


def test_padding_is_no_part_of_the_weights() -> None:
    assert run_ranks(3, names_with_nan_here) == [([], ["weight"])] * 3


def names_with_nan_here() -> tuple[list[str], list[str]]:
    """Which parameters hold NaN: with NaN in the padding alone, then in one element too. 7 elements on 3 ranks: 9."""
    import deepspeed

    from dsdpo.engine.shards import nonfinite_parameters, writable_shard

    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 3, "zero_optimization": {"stage": 3}}):
        layer = torch.nn.Linear(7, 1, bias=False)
    found = []
    for first_of_last in (1.0, float("nan")):
        with torch.no_grad(), writable_shard(layer.weight) as (own, start):
            layer.weight.ds_tensor.fill_(float("nan"))
            own.fill_(first_of_last if start == 6 else 1.0)
        found.append(nonfinite_parameters(layer))
    return found[0], found[1]
