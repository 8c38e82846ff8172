# mypy: disable-error-code="no-untyped-def,assignment"
"""One query a sequence, many keys: the cache is split over the GPU, then the parts are joined.

A sequence has few key heads (4 in a 7B Qwen2.5), so a program for each would leave most of a GPU
idle. Each program takes one key head and a share of the cache, for all query heads of that key head
at once (they are the rows of the product, padded to 16), and keeps a running softmax:

    m = max score, l = Σ exp(score − m), y = Σ exp(score − m) · v        (Milakov, Gimelshein 2018)

A second kernel joins the shares of a head: y = Σ exp(mᵢ − m) · yᵢ / Σ exp(mᵢ − m) · lᵢ. Blocks of
the cache that nobody sees are not read, so a cache that is longer than the text costs little.

Keys and values but those of the newest token have been in memory for long: a program has its first
block of them fetched into L2 while the kernel ahead of it still runs (``kernels/pdl.py``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_bitnet.kernels import pdl
from sparse_bitnet.kernels.pdl import fetch, fetch_where, wait

JOIN_WARPS = 4
SCANNED = 1024  # flags looked at once for the first and the last key that is seen
FILLED = 256  # key heads of a batch, from which on their caches are not cut
ONE_WAVE = 264  # two programs for each multiprocessor of an H100 or H200
FEWEST_ROWS = 16  # of a tensor core's product
JOINED = 16  # shares added at once
LINE = 128  # bytes
LEAST = tl.constexpr(-1e30)  # finite, below every score; a share that sees nothing keeps it


@triton.jit
def _fetch_block(
    ptr,
    key_stride,
    width,
    keys,
    seen_at,
    LANES: tl.constexpr,
    LINES: tl.constexpr,
    MASKED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Ask for these rows of a cache, those that are seen."""
    lines = tl.minimum(tl.arange(0, LINES) * LANES, width - 1)
    at = ptr + keys.to(tl.int64)[:, None] * key_stride + lines[None, :]
    if MASKED:
        fetch_where(at, tl.broadcast_to(seen_at[:, None], at.shape), PDL)
    else:
        fetch(at, PDL)


@triton.jit
def _share_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    seen_ptr,
    out_ptr,
    y_ptr,
    m_ptr,
    l_ptr,
    length,
    share,
    shares,
    scale,
    width,
    key_heads,
    q_batch,
    q_head,
    k_batch,
    k_head,
    k_key,
    v_batch,
    v_head,
    v_key,
    seen_batch,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    LINES: tl.constexpr,
    MASKED: tl.constexpr,
    ALONE: tl.constexpr,
    SCANNED: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(0)  # of all key heads of the batch
    number = tl.program_id(1)
    batch = (head // key_heads).to(tl.int64)
    key_head = head % key_heads
    rows = tl.arange(0, ROWS)
    lanes = tl.arange(0, WIDTH)
    k_ptr += batch * k_batch + key_head * k_head
    v_ptr += batch * v_batch + key_head * v_head
    soon = tl.minimum(number * share + tl.arange(0, BLOCK), length - 1)
    soon_seen = soon  # nothing to look at without a mask
    if MASKED:
        soon_seen = seen_ptr + batch * seen_batch + soon
    _fetch_block(k_ptr, k_key, width, soon, soon_seen, WIDTH // LINES, LINES, MASKED, PDL)
    _fetch_block(v_ptr, v_key, width, soon, soon_seen, WIDTH // LINES, LINES, MASKED, PDL)
    wait(PDL)
    q_at = q_ptr + batch * q_batch + (key_head * GROUP + rows[:, None]) * q_head + lanes[None, :]
    q = tl.load(q_at, mask=(rows[:, None] < GROUP) & (lanes[None, :] < width), other=0.0)
    begin = number * share
    end = tl.minimum(length, begin + share)
    if MASKED:
        # The blocks between the first and the last key that is seen; most caches are longer than
        # what is in them.
        first = end
        last = begin
        for start in range(begin, end, SCANNED):
            keys = start + tl.arange(0, SCANNED)
            flags = tl.load(seen_ptr + batch * seen_batch + keys, mask=keys < end, other=0) != 0
            first = tl.minimum(first, tl.min(tl.where(flags, keys, end)))
            last = tl.maximum(last, tl.max(tl.where(flags, keys + 1, begin)))
        begin += (first - begin) // BLOCK * BLOCK
        end = last
    largest = tl.full((ROWS,), LEAST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    y = tl.zeros((ROWS, WIDTH), tl.float32)
    for block in tl.range(begin, end, BLOCK, num_stages=STAGES):
        keys = block + tl.arange(0, BLOCK)
        seen = keys < end
        inside = seen[:, None] & (lanes[None, :] < width)
        at = keys.to(tl.int64)[:, None]
        k = tl.load(k_ptr + at * k_key + lanes[None, :], mask=inside, other=0.0)
        v = tl.load(v_ptr + at * v_key + lanes[None, :], mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if MASKED:
            flags = tl.load(seen_ptr + batch * seen_batch + keys, mask=seen, other=0)
            seen = seen & (flags != 0)
            v = tl.where(seen[:, None], v, 0.0)  # what is not seen may be anything, even NaN
        scores = tl.where(seen[None, :], scores, -float("inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp(scores - new[:, None])
        shrink = tl.exp(largest - new)
        total = total * shrink + tl.sum(weights, 1)
        y = y * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        largest = new
    real = rows[:, None] < GROUP
    if ALONE:
        at = (head.to(tl.int64) * GROUP + rows[:, None]) * width + lanes[None, :]
        y = (y / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, y, mask=real & (lanes[None, :] < width))
    else:
        part = (head * shares + number).to(tl.int64) * ROWS + rows
        tl.store(m_ptr + part, largest)
        tl.store(l_ptr + part, total)
        tl.store(y_ptr + part[:, None] * WIDTH + lanes[None, :], y, mask=real)


@triton.jit
def _join_kernel(
    y_ptr,
    m_ptr,
    l_ptr,
    out_ptr,
    shares,
    width,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    JOINED: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(0) // GROUP
    row = tl.program_id(0) % GROUP
    first = (head * shares).to(tl.int64) * ROWS + row
    lanes = tl.arange(0, WIDTH)
    wait(PDL)
    largest = tl.full((), LEAST, tl.float32)
    total = tl.zeros((JOINED,), tl.float32)
    y = tl.zeros((JOINED, WIDTH), tl.float32)
    for start in range(0, shares, JOINED):
        number = start + tl.arange(0, JOINED)
        inside = number < shares
        part = first + number * ROWS
        m = tl.load(m_ptr + part, mask=inside, other=-float("inf"))
        more = tl.load(l_ptr + part, mask=inside, other=0.0)
        at = part[:, None] * WIDTH + lanes[None, :]
        values = tl.load(y_ptr + at, mask=inside[:, None], other=0.0)
        new = tl.maximum(largest, tl.max(m, 0))
        shrink = tl.exp(largest - new)
        factor = tl.exp(m - new)  # 0 for a share of which nothing is seen
        total = total * shrink + more * factor
        y = y * shrink + values * factor[:, None]
        largest = new
    at = tl.program_id(0).to(tl.int64) * width + lanes
    result = tl.sum(y, 0) / tl.sum(total, 0)
    tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask=lanes < width)


def _shape(heads: int, length: int) -> tuple[int, int, int, int]:
    """Keys at once, warps, blocks of keys under way, and programs wanted; measured on an H200.

    Where all blocks are under way at the same time, what counts is how soon one is done: four warps
    share it. Otherwise it is how many bytes are asked for ahead, and few warps wait for each other.
    """
    if heads * triton.cdiv(length, 64) <= 2 * ONE_WAVE:
        return 64, 4, 1, ONE_WAVE
    if heads < FILLED:
        return 16, 1, 2, 4 * ONE_WAVE
    return 32, 2, 3, ONE_WAVE


def attend(
    query: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, scale: float
) -> Tensor:
    """Launch both kernels; arguments and result as ``decode_attention`` of this operation."""
    batch, heads, _, width = query.shape
    key_heads, length = keys.shape[1], keys.shape[2]
    query, keys, values = (
        t if t.stride(-1) == 1 else t.contiguous() for t in (query, keys, values)
    )
    group = heads // key_heads
    rows = max(FEWEST_ROWS, triton.next_power_of_2(group))
    padded = triton.next_power_of_2(max(16, width))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out
    block, warps, stages, programs = _shape(batch * key_heads, length)
    blocks = triton.cdiv(length, block)
    shares = max(1, min(blocks, triton.cdiv(programs, batch * key_heads)))
    share = triton.cdiv(blocks, shares) * block
    shares = triton.cdiv(length, share)
    y = m = total = out  # a placeholder where nothing has to be joined
    if shares > 1:
        y = query.new_empty((batch * key_heads * shares * rows, padded), dtype=torch.float32)
        m, total = (y.new_empty(len(y)) for _ in range(2))
    seen_batch = 0
    if seen is not None:
        seen = seen.reshape(seen.shape[0], length).contiguous().view(torch.uint8)
        seen_batch = length if seen.shape[0] > 1 else 0
    precision = "ieee" if query.dtype == torch.float32 else "tf32"
    _share_kernel[(batch * key_heads, shares)](
        query,
        keys,
        values,
        seen,
        out,
        y,
        m,
        total,
        length,
        share,
        shares,
        scale,
        width,
        key_heads,
        *query.stride()[:2],
        *keys.stride()[:3],
        *values.stride()[:3],
        seen_batch,
        GROUP=group,
        ROWS=rows,
        WIDTH=padded,
        BLOCK=block,
        LINES=max(1, padded * keys.element_size() // LINE),
        MASKED=seen is not None,
        ALONE=shares == 1,
        SCANNED=SCANNED,
        STAGES=stages,
        PRECISION=precision,
        num_warps=warps,
        **pdl.launch_options(query),
    )
    if shares == 1:
        return out
    _join_kernel[(batch * heads,)](
        y,
        m,
        total,
        out,
        shares,
        width,
        GROUP=group,
        ROWS=rows,
        WIDTH=padded,
        JOINED=min(JOINED, triton.next_power_of_2(shares)),
        num_warps=JOIN_WARPS,
        **pdl.launch_options(query),
    )
    return out
