"""Preference losses: plain functions of policy and reference log-probs, one value per pair.

Notation in all files: p and r are a response's summed log-probs under policy and reference, n its tokens, c and l mark
chosen and rejected, d = p − r is the log-ratio in nats, h = d_c − d_l, S the log of the sigmoid.
"""

from dsdpo.objective.losses.combined import LossFn, LossInputs, LossOutput, make_loss
from dsdpo.objective.losses.registered import check_registered, register_loss
from dsdpo.objective.losses.step import StepPairs

__all__ = ["LossFn", "LossInputs", "LossOutput", "StepPairs", "check_registered", "make_loss", "register_loss"]
