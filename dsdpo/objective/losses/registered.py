"""Losses of a user's own, registered from Python under a name that `loss.type` then takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from dsdpo.config.loss import COMMON, LOSSES, LossConfig, LossKind, ReferenceUse
from dsdpo.errors import ConfigError
from dsdpo.objective.logps import PairLogps
from dsdpo.objective.losses.step import StepPairs

LossFunction = Callable[..., Tensor]
Function = TypeVar("Function", bound=LossFunction)

GIVEN = ("beta", "step", "margin")  # what a loss of pairs may ask for by the name of a parameter
REGISTERED: dict[str, LossFunction] = {}


@overload
def register_loss(function: Function, /) -> Function: ...


@overload
def register_loss(*, name: str | None = ..., reference: ReferenceUse = ...) -> Callable[[Function], Function]: ...


def register_loss(
    function: Function | None = None, /, *, name: str | None = None, reference: ReferenceUse = "needed"
) -> Function | Callable[[Function], Function]:
    """Make a function of log-probs a loss: a decorator, with or without arguments.

        @register_loss
        def squared(policy, reference, *, beta, target=1.0):
            h = (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)
            return (beta * h - target) ** 2

    `policy` and `reference` are `PairLogps` of B pairs; the function returns (B,), one value per pair, with gradient.
    Of its other parameters, `beta` is the step's beta, `margin` (B,) the data's margin column, which the data must then
    have, and `step` the `StepPairs` of the whole step on all ranks. A parameter with a default is an option, set by
    `loss.options`. `name` is the function's own unless given; `reference` says whether the loss needs one ("needed"),
    can do without ("optional") or never looks at it ("unused"). All ranks must register the same losses; registering a
    name again replaces it. Raises `ConfigError` for a name or signature that cannot be used.
    """

    def register(given: Function) -> Function:
        own = str(name or getattr(given, "__name__", ""))
        kind = kind_of(own, given, reference)
        LOSSES[own], REGISTERED[own] = kind, given
        return given

    return register if function is None else register(function)


def kind_of(name: str, function: LossFunction, reference: ReferenceUse) -> LossKind:
    """What a loss takes and needs, read off its signature. Raises `ConfigError`."""
    if not name.isidentifier():
        raise ConfigError(f"register_loss: {name!r} is no name for a loss: give one of letters, digits and _ as name=")
    if name in LOSSES and name not in REGISTERED:
        raise ConfigError(f"register_loss: {name} is a loss of dsdpo: give yours another name")
    if reference not in ("needed", "optional", "unused"):
        raise ConfigError(f"register_loss: {name}: reference is {reference!r}: give needed, optional or unused")
    parameters = list(inspect.signature(function).parameters.values())
    if [each.name for each in parameters[:2]] != ["policy", "reference"]:
        raise ConfigError(
            f"register_loss: {name} must take (policy, reference, *, ...), the PairLogps of both, as its first two "
            f"parameters; it takes ({', '.join(each.name for each in parameters)})"
        )
    others = [each for each in parameters[2:] if each.name not in GIVEN]
    for each in others:
        if each.kind in (each.VAR_KEYWORD, each.VAR_POSITIONAL):
            raise ConfigError(f"register_loss: {name} takes {each}: name each option, with a default")
        if each.default is each.empty:
            raise ConfigError(
                f"register_loss: {name} takes {each.name}, which is neither one of {', '.join(GIVEN)} nor has a "
                "default, as an option must"
            )
    names = {each.name for each in parameters}
    return LossKind(
        reference=reference,
        common=COMMON,
        beta="beta" in names,
        column="margin" if "margin" in names else None,
        step_logps="step" in names,
        own={each.name: each.default for each in others},
    )


def check_registered(loss: LossConfig) -> None:
    """Try the registered losses of a run on three made-up pairs. Raises `ConfigError` for what training cannot use."""
    for name in loss.types:
        if name in REGISTERED:
            _try(name, REGISTERED[name], {key: loss.options[key] for key in LOSSES[name].own if key in loss.options})


def _try(name: str, function: LossFunction, options: dict[str, Any]) -> None:
    """Raise `ConfigError` unless the loss gives one finite value per pair, with a gradient."""
    tokens = torch.tensor([3, 4, 5])
    chosen = torch.tensor([-3.0, -5.0, -6.0], requires_grad=True)
    policy = PairLogps(chosen, torch.tensor([-4.0, -4.5, -9.0], requires_grad=True), tokens, tokens)
    reference = PairLogps(torch.tensor([-3.5, -5.5, -6.5]), torch.tensor([-4.2, -4.0, -8.0]), tokens, tokens)
    all_of_it = {"beta": 0.1, "margin": torch.ones(3), "step": StepPairs.of(policy, reference)}
    given = {key: value for key, value in all_of_it.items() if key in inspect.signature(function).parameters}
    try:
        values = function(policy, reference, **given, **options)
    except Exception as error:
        raise ConfigError(
            f"loss.type {name} failed on three made-up pairs: {type(error).__name__}: {error}. Mend the function that "
            "was registered"
        ) from error
    if not isinstance(values, Tensor) or values.shape != (3,):
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ConfigError(
            f"loss.type {name} gave {got} for 3 pairs: return a tensor (B,) with one value per pair; dsdpo takes the "
            "mean over all pairs of a step"
        )
    if not bool(torch.isfinite(values).all()):
        raise ConfigError(f"loss.type {name} gave {values.tolist()} for three made-up pairs: all must be finite")
    if not values.requires_grad:
        raise ConfigError(f"loss.type {name} has no gradient: compute it from policy.chosen and policy.rejected")
