"""Backends of the product with packed ternary weights: one for each kind of device.

A backend keeps a weight in one layout, two bits a weight (or fewer), and multiplies every token
count by it. It says in its own file which devices it serves, and registers itself there. So a new
backend is one file, and its import in ``matmul/__init__.py``:

=============  ===========================  =====================================================
backend        device                       layout
=============  ===========================  =====================================================
hopper         sm_90, with NVRTC            two bits, in the order of wgmma's fragments, or of
                                            wgmma.sp's where a weight keeps 2:4
triton         other GPUs from sm_80 on     two bits, rows of 64-weight blocks
native         CPU, where it was compiled   two bits, panels of 32 rows; six for four weights of 2:4
reference      everything else              int8
=============  ===========================  =====================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_bitnet.core.errors import BackendError
from sparse_bitnet.kernels.platform import usable_device
from sparse_bitnet.kernels.quantize_activations import quantize_activations


class Backend(ABC):
    """A layout of ternary weights on some devices, and the product with them."""

    name: str
    rank: int
    """Of backends that serve a device the one with the lowest rank is used."""

    @abstractmethod
    def serves(self, device: torch.device) -> bool:
        """True if this backend multiplies on that device."""

    @abstractmethod
    def reason(self, device: torch.device) -> str:
        """Why it serves that device, for people."""

    @abstractmethod
    def pack(self, ternary: Tensor, stored: Tensor | None) -> tuple[Tensor, str]:
        """A weight in the backend's layout, and the layout's name.

        Args:
            ternary: int8 ``[out, in]`` with values in {−1, 0, 1}.
            stored: the same as bytes of ``formats.two_bit``, if the caller has them.
        """

    @abstractmethod
    def unpack(self, weight: TernaryWeight) -> Tensor:
        """The inverse of :meth:`pack`: int8 ``[out, in]``."""

    @abstractmethod
    def multiply(
        self,
        x_q: Tensor,
        x_scale: Tensor,
        weight: TernaryWeight,
        bias: Tensor | None,
        out_dtype: torch.dtype,
        residual: Tensor | None,
    ) -> Tensor:
        """As :func:`integer_linear`."""

    def linear(
        self, x: Tensor, weight: TernaryWeight, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        """As :func:`ternary_linear`; a backend that quantizes while it multiplies has its own."""
        x_q, x_scale = quantize_activations(x)
        return self.multiply(x_q, x_scale, weight, bias, out_dtype, None)


BACKENDS: dict[str, Backend] = {}


def register_backend(backend: Backend) -> None:
    """Make a backend known; every file of a backend ends with this."""
    BACKENDS[backend.name] = backend


def backend_of(device: torch.device) -> Backend:
    """The backend that serves a device."""
    return min((b for b in BACKENDS.values() if b.serves(device)), key=lambda b: b.rank)


def explain(device: str | None = None) -> str:
    """Which backend multiplies by packed weights on a device, and why.

    Args:
        device: the first CUDA device if left out, or CPU where there is none.

    Raises:
        ConfigError: if the device cannot be used.
    """
    where = usable_device(device)
    backend = backend_of(where)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else str(where)
    return f"{name}: packed weights are multiplied by {backend.name} ({backend.reason(where)})"


@dataclass(frozen=True)
class TernaryWeight:
    """One ternary weight on one device, in the layout of its backend; see :func:`prepare`.

    Attributes:
        packed: the weight's bytes, in ``layout``.
        w_scale: float32 ``[out]``, γ of every row.
    """

    backend: str
    packed: Tensor
    layout: str
    w_scale: Tensor
    out_features: int
    in_features: int

    @property
    def device(self) -> torch.device:
        return self.w_scale.device

    def unpack(self) -> Tensor:
        """int8 ``[out, in]``."""
        return BACKENDS[self.backend].unpack(self)


def prepare(
    ternary: Tensor,
    w_scale: Tensor,
    stored: Tensor | None = None,
    backend: str | None = None,
) -> TernaryWeight:
    """Pack a ternary weight for the device that it is on.

    Args:
        ternary: int8 ``[out, in]`` with values in {−1, 0, 1}.
        w_scale: float32 ``[out]``, γ of every row.
        stored: the same weight as bytes of ``formats.two_bit``, if the caller has them.
        backend: instead of the device's.
    """
    ternary = ternary.contiguous()
    chosen = BACKENDS[backend] if backend else backend_of(ternary.device)
    packed, layout = chosen.pack(ternary, stored)
    # Contiguous now: a kernel reads scales before the one ahead of it has ended, which a copy made
    # for the call would be.
    return TernaryWeight(chosen.name, packed, layout, w_scale.contiguous(), *ternary.shape)


def ternary_linear(
    x: Tensor,
    weight: TernaryWeight,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Y = X @ (γT)ᵀ + bias through int8 activations.

    Args:
        x: ``[..., in]``, float.
        weight: of :func:`prepare`.
        bias: ``[out]`` or None.
        out_dtype: of the result; ``x.dtype`` if left out.

    Returns:
        ``[..., out]``.
    """
    return BACKENDS[weight.backend].linear(x, weight, bias, out_dtype or x.dtype)


def integer_linear(
    x_q: Tensor,
    x_scale: Tensor,
    weight: TernaryWeight,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    residual: Tensor | None = None,
) -> Tensor:
    """Y = (Xq @ (γT)ᵀ) · x_scale + bias [+ residual], of activations that are integers already.

    Args:
        x_q: int8 ``[..., in]``, of any number of bits up to eight.
        x_scale: float32 ``[..., 1]``.
        weight, bias, out_dtype: as of :func:`ternary_linear`.
        residual: ``[..., out]`` of ``out_dtype``, added to Y once Y has been rounded.

    Returns:
        ``[..., out]``.

    Raises:
        BackendError: for a residual of another shape or dtype.
    """
    shape = (*x_q.shape[:-1], weight.out_features)
    if residual is not None and (residual.shape != shape or residual.dtype != out_dtype):
        raise BackendError(
            f"residual: {tuple(residual.shape)} of {residual.dtype}, but it is added to a result "
            f"{tuple(shape)} of {out_dtype}; give it that shape and dtype"
        )
    return BACKENDS[weight.backend].multiply(x_q, x_scale, weight, bias, out_dtype, residual)
