"""What autograd keeps for the backward pass, held in host memory, with copies beside the computation.

torch's own `save_on_cpu` copies on the stream that computes, which stands still meanwhile. Here a second stream copies
what was kept to the host while the next layers compute, and in the backward pass brings back what will be asked for
next while the present layer computes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Kept:
    """One tensor on the host, and the one that was kept before it, which a backward pass asks for after it."""

    def __init__(self, tensor: Tensor, copies: _Copies, before: _Kept | None) -> None:
        self.device, self.before, self._copies = tensor.device, before, copies
        self._ahead: Tensor | None = None  # on the device again, before it is asked for
        self._host = copies.to_host(tensor)

    def fetch(self) -> None:
        """Bring the tensor back to its device, ahead of when it is needed."""
        if self._ahead is None:
            self._ahead = self._copies.to_device(self._host, self.device)

    def take(self) -> Tensor:
        """The tensor, on its device; the one before it is fetched meanwhile."""
        self.fetch()
        found, self._ahead = self._ahead, None
        assert found is not None
        self._copies.await_arrival(found)
        if self.before is not None:
            self.before.fetch()
        return found


class _Copies:
    """Copies between a device and the host, in order, on a CUDA stream of their own; elsewhere at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def _beside(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def to_host(self, tensor: Tensor) -> Tensor:
        """A copy in pinned memory, queued behind what computes the tensor."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with self._beside():
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._stream is not None)
            host.copy_(tensor, non_blocking=True)
        if self._stream is not None:
            tensor.record_stream(self._stream)  # its memory is not given away before the copy is done
        return host

    def to_device(self, host: Tensor, device: torch.device) -> Tensor:
        """A copy on the device, queued behind the one that brought it to the host."""
        with self._beside():
            return host.to(device, non_blocking=True)

    def await_arrival(self, tensor: Tensor) -> None:
        """Let the present stream compute with the tensor only once it has arrived; the host does not wait."""
        if self._stream is not None:
            present = torch.cuda.current_stream(tensor.device)
            present.wait_stream(self._stream)
            tensor.record_stream(present)


class kept_on_host(saved_tensors_hooks):  # noqa: N801 (a context manager, as torch's own)
    """A block whose operations on `device` keep their tensors for the backward pass on the host."""

    def __init__(self, device: torch.device) -> None:
        copies = _Copies(device)
        last: _Kept | None = None

        def pack(tensor: Tensor) -> Any:
            nonlocal last
            last = _Kept(tensor, copies, last)
            return last

        super().__init__(pack, _Kept.take)
