"""Weights of a response's tokens in its summed log-prob, by their place in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsdpo.config.loss import LossConfig
from dsdpo.data.batch import PreferenceBatch


@dataclass(frozen=True)
class TokenWeights:
    """How much each token of a response counts; for policy and reference alike."""

    ld_alpha: float | None = None
    """LD-DPO (Liu et al. 2024, arXiv 2409.06411, eq. 9): of tokens beyond the length that both responses have."""
    decay: float | None = None
    """D2PO (Shao et al. 2025, arXiv 2502.14340): token t counts decay to the power t."""

    @classmethod
    def of(cls, loss: LossConfig) -> TokenWeights | None:
        """Those that a loss asks for; None where all tokens count alike."""
        return None if loss.token_weights is None else cls(loss.ld_alpha, loss.decay)

    def __call__(self, batch: PreferenceBatch) -> Tensor:
        """(N,) float64, of the batch's targets."""
        places, counts = places_in_response(batch)
        weights = torch.ones(len(places), dtype=torch.float64, device=places.device)
        if self.ld_alpha is not None:
            shortest = counts.view(batch.group_size, -1).amin(0).repeat(batch.group_size)
            weights = torch.where(places < shortest[batch.response], weights, weights * self.ld_alpha)
        if self.decay is not None:
            weights = weights * self.decay ** places.double()
        return weights


def places_in_response(batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    """(N,) int64 place of each target in its response, counted from 0, and (nB,) int64 targets of each response.

    A response's targets stand together, in order.
    """
    counts = torch.zeros(batch.num_responses, dtype=torch.int64, device=batch.response.device)
    counts.index_add_(0, batch.response, torch.ones_like(batch.response))
    index = torch.arange(len(batch.response), device=batch.response.device)
    first = torch.full_like(counts, len(index)).scatter_reduce_(0, batch.response, index, "amin")
    return index - first[batch.response], counts
