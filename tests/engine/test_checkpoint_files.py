"""What DeepSpeed leaves out when it loads its own checkpoint."""

from __future__ import annotations

import torch

from tests.ranks import run_ranks

UPDATES = 60


def weights_after(away_at: int | None, *, counted: bool) -> torch.Tensor:
    """A few weights after `UPDATES` of DeepSpeed's CPU Adam, with its state saved and loaded once on the way."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    from dsdpo.engine.quirks.checkpoint_files import count_through

    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(50))
    optimizer = DeepSpeedCPUAdam([weight], lr=1e-2)
    for update in range(UPDATES):
        if update == away_at:
            state = optimizer.state_dict()
            optimizer = DeepSpeedCPUAdam([weight], lr=1e-2)
            optimizer.load_state_dict(state)
            if counted:
                count_through(optimizer)
        weight.grad = torch.randn(50)
        optimizer.step()
    return weight.detach()


def compare() -> tuple[list[bool], list[bool]]:
    from dsdpo.engine.quirks.compiled_ops import prepare_ops

    prepare_ops({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    whole = weights_after(None, counted=True)
    moments = (2, 5, 40)
    return (
        [torch.equal(weights_after(at, counted=True), whole) for at in moments],
        [torch.equal(weights_after(at, counted=False), whole) for at in moments],
    )


def test_cpu_adam_resumes_bit_for_bit() -> None:
    counted, not_counted = run_ranks(1, compare)[0]
    assert all(counted)
    assert not any(not_counted), "DeepSpeed has come to do this itself: count_through can go"
