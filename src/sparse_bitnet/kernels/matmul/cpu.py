"""int8 × ternary on a CPU from packed bytes, and their layouts; the arithmetic is in ``native/``.

**Two bits.** The bytes of ``formats.two_bit``, with rows in panels of 32: four bytes of each, then
the next four of each. Byte i of a row holds weights 4i to 4i + 3, so shifting by 0, 2, 4, 6 and
masking gives four vectors of codes T + 1, for weights 4i, 4i + 1, 4i + 2, 4i + 3. Activations are
dealt into the same four planes once a token, while they are quantized. Then ``vpdpbusd`` multiplies
four unsigned codes of each of sixteen rows with four signed activations, and Σ Xq leaves at the
end: Σ T·x = Σ code·x − Σ x. A row's sum stays in its lane, a panel is read from end to end, and
eight tokens share what was unpacked. Rows as they are stored took twice as long for eight tokens.

**Six bits for four weights**, 1.5 a weight: a group with at most two non-zeros is one of 33, so 2:4
(and 1:4, 2:8, …) can be read so. One byte permutation looks up 64 groups at once; needs AVX-512
with VBMI.

**Bytes.** Dense int8, for a head of eight bits.

**Floats.** A head in float32, bfloat16 or float16, as it is: PyTorch's product of one token with it
takes two to four times as long as reading it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from sparse_bitnet.core.errors import WeightError
from sparse_bitnet.core.ternary import check_row
from sparse_bitnet.formats import two_bit
from sparse_bitnet.kernels import native
from sparse_bitnet.kernels.library import register
from sparse_bitnet.kernels.native.pages import use_large_pages
from sparse_bitnet.kernels.registry import Backend, TernaryWeight, register_backend

PANEL = 32
"""Rows of a panel, padded with zeros."""
WORD = {"two-bit": 4, "six-bit": 3}
"""Bytes of a row that stand together, for sixteen weights."""
LONGEST_ROW = 2**16
"""Products of bytes, (w + 128)·x, are summed in int32: 255·128·2¹⁶ fits."""
MOST_BYTE_TOKENS = 8
FLOAT_LAYOUTS = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
ZEROS = 0x55
"""Four weights of zero, in two bits each."""


def packed_shape(layout: str, out_features: int, in_features: int) -> tuple[int, ...]:
    """Of a weight: ``[panels, words of a row, bytes]``, or ``[out, in]`` of bytes."""
    if layout == "bytes":
        return out_features, in_features
    return -(-out_features // PANEL), -(-in_features // 16), PANEL * WORD[layout]


def serves_bytes(x_q: Tensor, weight: Tensor, most_tokens: int = MOST_BYTE_TOKENS) -> bool:
    """Whether products of so few tokens with a dense int8 weight are computed here."""
    columns = x_q.shape[-1]
    return (
        x_q.device.type == "cpu"
        and 0 < columns < LONGEST_ROW
        and x_q.numel() <= most_tokens * columns
        and weight.shape == (weight.shape[0], columns)
        and weight.is_contiguous()
        and _has_path()
    )


@torch.compiler.assume_constant_result
def _has_path() -> bool:
    return native.path() != native.REFERENCE


def pack(ternary: Tensor, stored: Tensor | None = None) -> tuple[Tensor, str]:
    """The layout that the path in use reads fastest: ``(bytes, layout)``.

    Args:
        ternary: int8 ``[out, in]``.
        stored: the same as bytes of ``formats.two_bit``, if the caller has them.
    """
    packed = pack_two_bit(two_bit.pack(ternary) if stored is None else stored)
    six_bit = pack_six_bit(packed) if native.reads_six_bit() else None
    chosen, layout = (packed, "two-bit") if six_bit is None else (six_bit, "six-bit")
    use_large_pages(chosen)
    return chosen, layout


def unpack(packed: Tensor, layout: str, out_features: int, in_features: int) -> Tensor:
    """The inverse of :func:`pack`: int8 ``[out, in]``."""
    if layout == "six-bit":
        packed = unpack_six_bit(packed)
    rows = packed.unflatten(-1, (PANEL, -1)).transpose(1, 2).flatten(-2).flatten(0, 1)
    return two_bit.unpack(rows[:out_features, : two_bit.packed_length(in_features)], in_features)


def pack_two_bit(stored: Tensor) -> Tensor:
    """uint8 ``[out, bytes]`` of ``formats.two_bit`` → :func:`packed_shape` of two-bit."""
    out, length = stored.shape
    padded = torch.nn.functional.pad(stored, (0, -length % 4, 0, -out % PANEL), value=ZEROS)
    words = padded.unflatten(-1, (-1, 4)).unflatten(0, (-1, PANEL))
    return words.transpose(1, 2).flatten(-2).contiguous()


@cache
def _groups() -> Tensor:
    """uint8 ``[33]``: the two-bit bytes with at most two non-zeros, ascending, as in native.cpp."""
    codes = torch.arange(256).unsqueeze(-1) >> torch.tensor(two_bit.SHIFTS) & 3
    fits = (codes != 3).all(-1) & ((codes != 1).sum(-1) <= 2)
    return fits.nonzero().squeeze(-1).to(torch.uint8)


def pack_six_bit(packed: Tensor) -> Tensor | None:
    """:func:`pack_two_bit`'s → six bits a group; None where one has more than two non-zeros."""
    groups = _groups()
    index_of = torch.full((256,), 255, dtype=torch.uint8)
    index_of[groups.long()] = torch.arange(len(groups), dtype=torch.uint8)
    out = packed.new_empty((*packed.shape[:-1], PANEL * WORD["six-bit"]))
    for first in range(0, packed.shape[0], 2):  # panels that fit the cache
        index = index_of[packed[first : first + 2].int()]
        if index.numel() and int(index.max()) == 255:
            return None
        a, b, c, d = index.unflatten(-1, (-1, 4)).unbind(-1)
        three = (a | b << 6, b >> 2 | c << 4, c >> 4 | d << 2)
        out[first : first + 2] = torch.stack(three, -1).flatten(-2)
    return out


def unpack_six_bit(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack_six_bit`."""
    x, y, z = packed.unflatten(-1, (-1, 3)).unbind(-1)
    index = torch.stack((x, x >> 6 | y << 2, y >> 4 | z << 4, z >> 2), -1).flatten(-2) & 63
    return _groups()[index.int()]


def linear(
    x: Tensor,
    weight: Tensor,
    layout: str,
    w_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    x_scale: Tensor | None = None,
) -> Tensor:
    """Y = X @ (γT)ᵀ + bias, to the last bit what the reference computes.

    Args:
        x: ``[..., in]``, float, quantized to eight bits in the same call; or int8 with ``x_scale``.
        weight: of :func:`packed_shape`, contiguous.
        layout: of the weight: two-bit, six-bit or bytes.
        w_scale: float32 ``[out]``.
        bias: ``[out]`` or None.
        out_dtype: of the result.
        x_scale: float32 ``[..., 1]``.

    Raises:
        WeightError: if the shapes do not fit each other, or a row is too long for int32.
        BackendError: if the path in use does not read the layout.
    """
    return torch.ops.sparse_bitnet.cpu_linear(x, x_scale, weight, layout, w_scale, bias, out_dtype)


def _linear(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    layout: str,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    columns, out = x.shape[-1], w_scale.shape[0]
    expected = packed_shape(layout, out, columns)
    if columns == 0 or weight.shape != expected:
        raise WeightError(
            f"matmul: a {layout} weight [{out}, {columns}] is stored in {list(expected)} bytes, "
            f"not {list(weight.shape)}"
        )
    check_row(columns, "matmul")
    rows = x.reshape(-1, columns)
    if rows.dtype not in native.TYPES:
        rows = rows.float()
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    if bias is not None and (bias.dtype not in native.TYPES or not bias.is_contiguous()):
        bias = bias.float().contiguous()
    if x_scale is not None:
        x_scale = x_scale.reshape(-1).contiguous()
    y_dtype = out_dtype if out_dtype in native.TYPES else torch.float32
    y = x.new_empty((*x.shape[:-1], out), dtype=y_dtype)
    native.linear(rows, x_scale, weight, layout, w_scale.contiguous(), bias, y)
    return y if y_dtype == out_dtype else y.to(out_dtype)


def _fake(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    layout: str,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], w_scale.shape[0]), dtype=out_dtype)


register(
    "cpu_linear(Tensor x, Tensor? x_scale, Tensor weight, str layout, Tensor w_scale, "
    "Tensor? bias, ScalarType out_dtype) -> Tensor",
    _linear,
    _fake,
    device="CPU",
)


MOST_FLOAT_TOKENS = 8
"""Beyond, a product with floats is bound by arithmetic, which PyTorch's library does well."""


def float_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``, by the compiled library for few tokens on a CPU.

    Sums are of float32 there too, in another order. Where gradients, autocast or mixed dtypes are
    asked for, PyTorch's product serves.
    """
    rows = x.numel() // max(1, x.shape[-1])
    if (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and weight.dtype in FLOAT_LAYOUTS
        and weight.is_contiguous()
        and 0 < rows <= MOST_FLOAT_TOKENS
        and 0 < x.shape[-1] == weight.shape[1]
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and _has_path()
    ):
        return torch.ops.sparse_bitnet.cpu_float_linear(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


def _float_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    bias = None if bias is None else bias.contiguous()
    native.linear(rows, None, weight, FLOAT_LAYOUTS[weight.dtype], None, bias, y)
    return y


def _fake_float_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


register(
    "cpu_float_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _float_linear,
    _fake_float_linear,
    device="CPU",
)


class Native(Backend):
    """The compiled library: panels of two bits a weight, or of six for four weights of 2:4."""

    name = "native"
    rank = 1

    def serves(self, device: torch.device) -> bool:
        return device.type == "cpu" and native.path() != native.REFERENCE

    def reason(self, device: torch.device) -> str:
        return native.explanation()

    def pack(self, ternary: Tensor, stored: Tensor | None) -> tuple[Tensor, str]:
        return pack(ternary, stored)

    def unpack(self, weight: TernaryWeight) -> Tensor:
        return unpack(weight.packed, weight.layout, weight.out_features, weight.in_features)

    def multiply(
        self,
        x_q: Tensor,
        x_scale: Tensor,
        weight: TernaryWeight,
        bias: Tensor | None,
        out_dtype: torch.dtype,
        residual: Tensor | None,
    ) -> Tensor:
        y = linear(x_q, weight.packed, weight.layout, weight.w_scale, bias, out_dtype, x_scale)
        return y if residual is None else residual + y

    def linear(
        self, x: Tensor, weight: TernaryWeight, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        """Quantizes while it multiplies."""
        return linear(x, weight.packed, weight.layout, weight.w_scale, bias, out_dtype)


register_backend(Native())
