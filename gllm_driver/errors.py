"""Typed errors. Each one knows how far its damage reaches (see docs/architecture.md, "Errors").

Load errors end the load, request errors end one request, backend errors end the process's use of one device.
"""

from __future__ import annotations

from pathlib import Path


class GllmError(Exception):
    """Base of every error this package raises on purpose. `str(error)` is one line and says what to do."""


class ContractError(GllmError):
    """An op was called with arrays that do not fit its contract (a bug in the caller, found before anything runs)."""

    def __init__(self, op: str, arg: str, problem: str) -> None:
        super().__init__(f"{op}: {arg} {problem}")
        self.op = op
        self.arg = arg


class ModelFormatError(GllmError):
    """A model file is broken, or holds something this version cannot read. The load fails; nothing else does."""

    def __init__(
        self, problem: str, *, path: Path | str | None = None, tensor: str | None = None, offset: int | None = None
    ) -> None:
        where = [str(path)] if path is not None else []
        if tensor is not None:
            where.append(f"tensor {tensor!r}")
        if offset is not None:
            where.append(f"at byte {offset}")
        super().__init__(f"{', '.join(where)}: {problem}" if where else problem)
        self.path = Path(path) if path is not None else None
        self.tensor = tensor
        self.offset = offset


class HubError(GllmError):
    """A model could not be fetched from the hub (offline, unknown id, no permission)."""


class WriteError(GllmError):
    """An output file cannot be written: no space, no permission, something is there already. Nothing of it is left."""


class RequestError(GllmError):
    """One request is wrong: empty prompt, token id out of range, contradictory sampling options."""


class CapacityError(RequestError):
    """One request needs more memory or context than there is."""


class StoreError(GllmError):
    """Bytes of a KV store, or the store itself, are of no use. It costs a cache miss and never more.

    `reason` is one word to count by (kv/store/base.py, REASONS).
    """

    def __init__(self, reason: str, problem: str) -> None:
        super().__init__(problem)
        self.reason = reason


class UnsupportedError(GllmError):
    """The feature exists in the protocol but this backend, or this version, does not have it."""


class BackendError(GllmError):
    """A device cannot be used, or failed while it was used."""


class BackendUnavailableError(BackendError):
    """The device asked for cannot be used here; `reason` says why in one phrase."""

    def __init__(self, device: str, reason: str) -> None:
        super().__init__(f"device {device!r} is not usable: {reason}")
        self.device = device
        self.reason = reason


class DriverError(BackendError):
    """A call to the CUDA driver failed; `explanation` says what that means and what to do."""

    def __init__(self, code: int, name: str, call: str, explanation: str) -> None:
        super().__init__(f"{call} failed with {name} ({code}): {explanation}")
        self.code = code
        self.name = name
        self.call = call
        self.explanation = explanation


class OutOfDeviceMemory(DriverError):  # noqa: N818
    """The device has no room for an allocation. Nothing else is lost."""


class NoKernelImage(DriverError):  # noqa: N818
    """No shipped binary runs on this device's architecture."""


class ContextLost(DriverError):  # noqa: N818
    """A kernel failed in a way that ends this process's use of the device: every later call fails the same way."""


class CubinError(BackendError):
    """A kernel binary, or the manifest that describes them, is damaged, foreign or from another version."""
