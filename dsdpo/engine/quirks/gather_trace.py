"""ZeRO-3's gathers: how many there are, and two orders of them in one engine.

A second order keeps prefetching alive where passes visit other modules.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

log = logging.getLogger(__name__)

GATHER = "_PartitionedParameterCoordinator__all_gather_params_"


@dataclass
class Gathered:
    """What ZeRO-3 has made whole on this rank since the process started, all engines together."""

    parameters: int = 0
    bytes: int = 0  # of the whole parameters, in the type they are sent in


GATHERED = Gathered()


@dataclass
class Stalls:
    """How long passes on this rank have waited for gathers, which come when the slowest rank is there for them.

    On a CUDA device that is the time its computing stands still, by events that are read only when asked for.
    """

    on: bool = False  # whether to count now
    seconds: float = 0.0
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """A block that does nothing but wait."""
        if not self.on:
            yield
        elif torch.cuda.is_available():
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            yield
            after.record()
            self.events.append((before, after))
        else:
            began = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - began

    def take(self) -> float:
        """The seconds since the last taking. Waits for the device."""
        if self.events:
            self.events[-1][1].synchronize()
        total = self.seconds + sum(before.elapsed_time(after) for before, after in self.events) / 1000.0
        self.seconds, self.events = 0.0, []
        return total


STALLS = Stalls()


def count_gathers(coordinator: Any) -> None:
    """Have a ZeRO-3 coordinator add what it gathers to `GATHERED`, and its waiting to `STALLS`.

    This costs a look at each parameter's status, and no wait. DeepSpeed's own comms logger would wait for the device
    after every single collective and keep each one's duration for ever (0.19, `deepspeed.comm.comm.timed_op`), and it
    does not know the engines apart.
    """
    gather = getattr(type(coordinator), GATHER, None)
    if gather is None:
        log.warning("this DeepSpeed gathers in another way than 0.19: comm/gathers and comm/gathered_gib stay 0")
        return

    def counted(parameters: Any, *arguments: Any, **options: Any) -> None:
        for parameter in parameters:
            if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE:
                GATHERED.parameters += 1
                GATHERED.bytes += parameter.ds_numel * parameter.element_size()
        getattr(type(coordinator), GATHER)(coordinator, parameters, *arguments, **options)

    def fetch(*arguments: Any, **options: Any) -> None:
        with STALLS.counted():
            type(coordinator).fetch_sub_module(coordinator, *arguments, **options)

    setattr(coordinator, GATHER, counted)
    coordinator.fetch_sub_module = fetch


def count_gathers_of(engine: DeepSpeedEngine) -> None:
    """The same for an engine, if it is at stage 3."""
    offload = _zero3_offload(engine)
    if offload is not None:
        count_gathers(offload.param_coordinator)


def _zero3_offload(engine: DeepSpeedEngine) -> Any:
    """What holds a stage-3 engine's coordinator, of a training engine or of one that only answers; else None."""
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    return offload if hasattr(offload, "param_coordinator") else None


class SecondOrder:
    """A second record of the order in which a ZeRO-3 engine gathers its parameters; nothing under other stages.

    DeepSpeed records the modules of one pass and prefetches by that record in later ones. A pass that leaves adapters
    out departs from it: the record is thrown away, and with one such pass per step it is never complete again. So
    those passes get a coordinator, DeepSpeed's holder of the record, of their own. Every hook asks the engine for its
    coordinator anew, and all other state lies in the parameters, so between passes one may stand in for the other.

    To an order belongs what modules were seen to read of others: a LoRA layer looks at the dtype of its active
    adapter's lora_A, and from then on fetches it. With a second adapter it would fetch what is not in the record, on
    which DeepSpeed stops with a "tracing error".

    Reaches into DeepSpeed 0.19 (`DeepSpeedZeRoOffload.param_coordinator`, `Module._external_params`). Where it does
    not find what it needs, it warns and `shared` is true: all passes then have one record, which is slower with the
    same results where adapters are left out, and not possible where a second one takes their place.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._offload: Any = _zero3_offload(engine)
        self._other: PartitionedParameterCoordinator | None = None
        self._other_externals: dict[Any, dict[int, Any]] = {}  # of modules that have any, in the order not in use
        if self._offload is not None:
            try:
                self._modules = list(self._offload.module.modules())
                assert all(isinstance(module._external_params, dict) for module in self._modules)
                self._other = _new_coordinator(self._offload)
            except (AttributeError, TypeError) as error:
                log.warning("this DeepSpeed keeps one order of gathers only (%s): less is prefetched", error)

    @property
    def shared(self) -> bool:
        """True if passes that should be recorded apart are not."""
        return self._offload is not None and self._other is None

    @contextmanager
    def recorded_apart(self) -> Iterator[None]:
        """A block of whole passes that follow, or at first record, the second order. Collective under ZeRO-3."""
        if self._other is None:
            yield
            return
        first = self._offload.param_coordinator
        _end_pass(first)
        self._offload.param_coordinator = self._other
        self._swap_externals()
        try:
            yield
            _end_pass(self._other)
        finally:
            self._swap_externals()
            self._offload.param_coordinator = first

    def _swap_externals(self) -> None:
        in_use = {module: module._external_params for module in self._modules if module._external_params}
        for module in in_use.keys() | self._other_externals.keys():
            module._external_params = self._other_externals.get(module, {})
        self._other_externals = in_use


def _new_coordinator(offload: Any) -> PartitionedParameterCoordinator:
    """Another coordinator for the same parameters, made as `DeepSpeedZeRoOffload.__init__` makes its own."""
    coordinator = PartitionedParameterCoordinator(
        prefetch_bucket_sz=offload._prefetch_bucket_sz,
        max_reuse_distance_in_numel=offload._max_reuse_distance_in_numel,
        max_available_parameters_in_numel=offload._max_available_parameters_in_numel,
        allgather_stream=offload._DeepSpeedZeRoOffload__allgather_stream,
        inflight_param_registry=offload.module.ds_inflight_param_registry,
        prefetch_nvme=offload.offload_device == OffloadDeviceEnum.nvme,
        timers=offload.timers,
        zero_quantized_weights=offload.zero_quantized_weights,
        fast_sharding_for_leaf_module=offload.fast_sharding_for_leaf_module,
        log_trace_cache_warnings=offload.log_trace_cache_warnings,
    )
    count_gathers(coordinator)
    return coordinator


def _end_pass(coordinator: PartitionedParameterCoordinator) -> None:
    """What else the start of the next pass would do: wait for what is in flight, complete a record just made."""
    if coordinator.is_invalid_trace():
        # A reset would start a recording, which the next pass would then find to be empty.
        coordinator._clean_inflight_param_registry()
    else:
        coordinator.reset_step()
