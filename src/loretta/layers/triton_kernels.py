"""The thin products of the two layers as Triton kernels: each reads the wide matrices once.

Only :mod:`loretta.layers.fused`, which holds their plain twins, launches them. Numbers of a row are adjacent in memory.
Sums are taken in float32 and in a fixed order, so that results repeat to the last bit: where several programs
contribute to one number, they write their parts side by side, and :func:`sum_parts` adds them up.

Axes: B rows, I input features, O output features, H width, R inner size, b bottleneck. Masked loads pad
inner sizes to powers of two of at least 16, as the tensor cores want.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs that fill a large GPU about twice; a constant, so that results do not depend on the device
MANY = 512
MOST_PARTS = 32


@triton.jit
def _load(base, row, column, n_rows, n_columns, step):
    """A block of a matrix, zeros beyond its edges."""
    inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    return tl.load(base + row.to(tl.int64)[:, None] * step + column[None, :], mask=inside, other=0.0)


@triton.jit
def _store(base, values, row, column, n_rows, n_columns, step):
    inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    at = base + row.to(tl.int64)[:, None] * step + column[None, :]
    tl.store(at, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _sum_of_rows(parts, n_parts, n_rows, ROWS: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr):
    """This program's rows of the sum of ``parts`` (parts, B, RANK)."""
    at = tl.program_id(0) * ROWS * RANK + tl.arange(0, ROWS * RANK)
    total = tl.zeros([ROWS * RANK], tl.float32)
    for first in range(0, n_parts, PARTS):
        part = first + tl.arange(0, PARTS)
        total += tl.sum(_load(parts, part, at, n_parts, n_rows * RANK, n_rows * RANK), axis=0)
    return tl.reshape(total, [ROWS, RANK])


@triton.jit
def _project(
    x, a, parts, n_rows, n_in, x_step, rank, tiles,
    ROWS: tl.constexpr, RANK: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """A part of ``x A``: some rows, summed over some columns of x."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part, r = tl.program_id(1), tl.arange(0, RANK)
    h = tl.zeros([ROWS, RANK], tl.float32)
    for tile in range(part * tiles, (part + 1) * tiles):
        column = tile * IN + tl.arange(0, IN)
        x_block = _load(x, row, column, n_rows, n_in, x_step)
        h = tl.dot(x_block, _load(a, column, r, n_in, rank, rank), h, input_precision="ieee")
    _store(parts + part.to(tl.int64) * n_rows * RANK, h, row, r, n_rows, RANK, RANK)


@triton.jit
def _add_product(
    out, base, h, b, row, n_rows, n_out, out_step, base_step, rank, tiles,
    RANK: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """``base + h B`` for some rows and this program's share of the columns."""
    r = tl.arange(0, RANK)
    for tile in range(tl.program_id(1) * tiles, (tl.program_id(1) + 1) * tiles):
        column = tile * OUT + tl.arange(0, OUT)
        y = _load(base, row, column, n_rows, n_out, base_step).to(tl.float32)
        y = tl.dot(h, _load(b, r, column, rank, n_out, n_out), y, input_precision="ieee")
        _store(out, y, row, column, n_rows, n_out, out_step)


@triton.jit
def _add_update(
    parts, b, y, h_out, n_parts, n_rows, n_out, y_step, rank, tiles,
    ROWS: tl.constexpr, RANK: tl.constexpr, OUT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row, r = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, RANK)
    h = _sum_of_rows(parts, n_parts, n_rows, ROWS, RANK, PARTS).to(h_out.dtype.element_ty)
    if tl.program_id(1) == 0:
        _store(h_out, h, row, r, n_rows, rank, rank)
    _add_product(y, y, h, b, row, n_rows, n_out, y_step, y_step, rank, tiles, RANK, OUT)


@triton.jit
def _add_bottleneck(
    parts, y, one_left, mid, one_up, mid_up, up, out, t_out, u_out,
    n_parts, n_rows, width, y_step, inner_left, bottleneck, inner_up, tiles,
    ROWS: tl.constexpr, LEFT: tl.constexpr, MID: tl.constexpr, UP: tl.constexpr, OUT: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c, b, d = tl.arange(0, LEFT), tl.arange(0, MID), tl.arange(0, UP)
    dtype = out.dtype.element_ty
    t = _sum_of_rows(parts, n_parts, n_rows, ROWS, LEFT, PARTS)
    t = (t + tl.load(one_left + c, mask=c < inner_left, other=0.0).to(tl.float32)[None, :]).to(dtype)
    z = tl.dot(t, _load(mid, c, b, inner_left, bottleneck, bottleneck), input_precision="ieee")
    activated = tl.where(z < 0, 0.0, z).to(dtype)
    u = tl.dot(activated, _load(mid_up, b, d, bottleneck, inner_up, inner_up), input_precision="ieee")
    u = (u + tl.load(one_up + d, mask=d < inner_up, other=0.0).to(tl.float32)[None, :]).to(dtype)
    if tl.program_id(1) == 0:
        _store(t_out, t, row, c, n_rows, inner_left, inner_left)
        _store(u_out, u, row, d, n_rows, inner_up, inner_up)
    _add_product(out, y, u, up, row, n_rows, width, width, y_step, inner_up, tiles, UP, OUT)


@triton.jit
def _project_row(x, a, n_in, rank, RANK: tl.constexpr, IN: tl.constexpr):
    """``x A`` of one row, in every program again: it takes less time than another launch."""
    r, total = tl.arange(0, RANK), tl.zeros([IN, RANK], tl.float32)
    for first in range(0, n_in, IN):
        column = first + tl.arange(0, IN)
        x_block = tl.load(x + column, mask=column < n_in, other=0.0).to(tl.float32)
        total += x_block[:, None] * _load(a, column, r, n_in, rank, rank).to(tl.float32)
    return tl.sum(total, axis=0)


@triton.jit
def _row_product(values, matrix, column, n_rows, n_columns, ROWS: tl.constexpr):
    """A row of numbers times some columns of a small matrix."""
    block = _load(matrix, tl.arange(0, ROWS), column, n_rows, n_columns, n_columns).to(tl.float32)
    return tl.sum(values.to(tl.float32)[:, None] * block, axis=0)


@triton.jit
def _update_row(
    x, a, b, y, h_out, n_in, n_out, rank,
    RANK: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    column, r = tl.program_id(0) * OUT + tl.arange(0, OUT), tl.arange(0, RANK)
    h = _project_row(x, a, n_in, rank, RANK, IN).to(h_out.dtype.element_ty)
    if tl.program_id(0) == 0:
        tl.store(h_out + r, h, mask=r < rank)
    before = tl.load(y + column, mask=column < n_out, other=0.0).to(tl.float32)
    after = before + _row_product(h, b, column, rank, n_out, RANK)
    tl.store(y + column, after.to(y.dtype.element_ty), mask=column < n_out)


@triton.jit
def _bottleneck_row(
    y, left, one_left, mid, one_up, mid_up, up, out, t_out, u_out, width, inner_left, bottleneck, inner_up,
    LEFT: tl.constexpr, MID: tl.constexpr, UP: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * OUT + tl.arange(0, OUT)
    c, b, d = tl.arange(0, LEFT), tl.arange(0, MID), tl.arange(0, UP)
    dtype = out.dtype.element_ty
    t = _project_row(y, left, width, inner_left, LEFT, IN)
    t = (t + tl.load(one_left + c, mask=c < inner_left, other=0.0).to(tl.float32)).to(dtype)
    z = _row_product(t, mid, b, inner_left, bottleneck, LEFT)
    u = _row_product(tl.where(z < 0, 0.0, z).to(dtype), mid_up, d, bottleneck, inner_up, MID)
    u = (u + tl.load(one_up + d, mask=d < inner_up, other=0.0).to(tl.float32)).to(dtype)
    if tl.program_id(0) == 0:
        tl.store(t_out + c, t, mask=c < inner_left)
        tl.store(u_out + d, u, mask=d < inner_up)
    before = tl.load(y + column, mask=column < width, other=0.0).to(tl.float32)
    after = before + _row_product(u, up, column, inner_up, width, UP)
    tl.store(out + column, after.to(dtype), mask=column < width)


@triton.jit
def _grad_of_right(
    g, b, h, h_parts, b_parts, n_rows, n_out, g_step, rank, chunk,
    ROWS: tl.constexpr, RANK: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """``g B^T`` from a tile of columns, and ``h^T g`` from a chunk of rows."""
    tile, part, r = tl.program_id(0), tl.program_id(1), tl.arange(0, RANK)
    column = tile * OUT + tl.arange(0, OUT)
    right = _load(b, r, column, rank, n_out, n_out)
    last = tl.minimum((part + 1) * chunk, n_rows)
    grad = tl.zeros([RANK, OUT], tl.float32)
    for first in range(part * chunk, last, ROWS):
        row = first + tl.arange(0, ROWS)
        g_block = _load(g, row, column, last, n_out, g_step)
        back = tl.dot(g_block, tl.trans(right), input_precision="ieee")
        _store(h_parts + tile.to(tl.int64) * n_rows * RANK, back, row, r, last, RANK, RANK)
        grad = tl.dot(tl.trans(_load(h, row, r, last, rank, rank)), g_block, grad, input_precision="ieee")
    _store(b_parts + part.to(tl.int64) * rank * n_out, grad, r, column, rank, n_out, n_out)


@triton.jit
def _grad_of_left(
    x, a, dh, base, out, a_parts, n_rows, n_in, x_step, dh_step, base_step, out_step, rank, chunk,
    ROWS: tl.constexpr, RANK: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """``base + dh A^T``, and ``x^T dh`` from a chunk of rows."""
    part, r = tl.program_id(1), tl.arange(0, RANK)
    column = tl.program_id(0) * IN + tl.arange(0, IN)
    left = _load(a, column, r, n_in, rank, rank)
    last = tl.minimum((part + 1) * chunk, n_rows)
    grad = tl.zeros([IN, RANK], tl.float32)
    for first in range(part * chunk, last, ROWS):
        row = first + tl.arange(0, ROWS)
        dh_block = _load(dh, row, r, last, rank, dh_step)
        below = _load(base, row, column, last, n_in, base_step).to(tl.float32)
        below = tl.dot(dh_block, tl.trans(left), below, input_precision="ieee")
        _store(out, below, row, column, last, n_in, out_step)
        x_block = _load(x, row, column, last, n_in, x_step)
        grad = tl.dot(tl.trans(x_block), dh_block, grad, input_precision="ieee")
    _store(a_parts + part.to(tl.int64) * n_in * rank, grad, column, r, n_in, rank, rank)


@triton.jit
def _grad_of_middle(
    u_parts, t, mid, mid_up, dt, parts, n_parts, n_rows, inner_left, bottleneck, inner_up,
    ROWS: tl.constexpr, LEFT: tl.constexpr, MID: tl.constexpr, UP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The gradient of t from that of u (in parts), and the middle matrices' gradients from some rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c, b, d = tl.arange(0, LEFT), tl.arange(0, MID), tl.arange(0, UP)
    dtype = dt.dtype.element_ty
    du_rounded = _sum_of_rows(u_parts, n_parts, n_rows, ROWS, UP, PARTS).to(dtype)
    t_block = _load(t, row, c, n_rows, inner_left, inner_left)
    down = _load(mid, c, b, inner_left, bottleneck, bottleneck)
    back = _load(mid_up, b, d, bottleneck, inner_up, inner_up)
    z = tl.dot(t_block, down, input_precision="ieee")
    activated = tl.where(z < 0, 0.0, z).to(dtype)
    dz = tl.dot(du_rounded, tl.trans(back), input_precision="ieee")
    dz = tl.where(z > 0, dz, 0.0).to(dtype)
    _store(dt, tl.dot(dz, tl.trans(down), input_precision="ieee"), row, c, n_rows, inner_left, inner_left)
    here = parts + tl.program_id(0).to(tl.int64) * bottleneck * (inner_left + inner_up)
    grad_mid = tl.dot(tl.trans(t_block), dz, input_precision="ieee")
    _store(here, grad_mid, c, b, inner_left, bottleneck, bottleneck)
    grad_up = tl.dot(tl.trans(activated), du_rounded, input_precision="ieee")
    _store(here + inner_left * bottleneck, grad_up, b, d, bottleneck, inner_up, inner_up)


@triton.jit
def _sum_parts(parts, out, n_parts, length, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n_parts, PARTS):
        total += tl.sum(_load(parts, first + tl.arange(0, PARTS), at, n_parts, length, length), axis=0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < length)


def add_update(x_BI: Tensor, a_IR: Tensor, b_RO: Tensor, y_BO: Tensor) -> Tensor:
    """Write ``y + (x A) B`` into y. Returns ``x A`` (B, R)."""
    (n_rows, rank), n_out = (len(x_BI), len(b_RO)), b_RO.shape[1]
    h_BR = x_BI.new_empty(n_rows, rank)
    if n_rows == 1:
        _update_row[(_ceil(n_out, _ROW_OUT),)](
            x_BI, a_IR, b_RO, y_BO, h_BR, x_BI.shape[1], n_out, rank,
            RANK=triton.next_power_of_2(rank), IN=_row_in(x_BI.shape[1]), OUT=_ROW_OUT, num_warps=_ROW_WARPS,
        )  # fmt: skip
        return h_BR
    parts = project(x_BI, a_IR)
    rows, tiles, shares = _shares(n_rows, n_out)
    _add_update[(_ceil(n_rows, rows), shares)](
        parts, b_RO, y_BO, h_BR, len(parts), n_rows, n_out, y_BO.stride(0), rank, tiles,
        ROWS=rows, RANK=_padded(rank), OUT=_OUT, PARTS=_parts(len(parts)), num_warps=4,
    )  # fmt: skip
    return h_BR


def add_bottleneck(y_BH: Tensor, factors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """``y + (one_D + relu((one_C + y L) M) N) U``, and the two small matrices t (B, C) and u (B, D) within."""
    one_C, left_HC, mid_Cb, one_D, mid_bD, up_DH = factors
    (n_rows, width), (inner_left, bottleneck), inner_up = y_BH.shape, mid_Cb.shape, mid_bD.shape[1]
    out_BH = y_BH.new_empty(n_rows, width)
    t_BC, u_BD = y_BH.new_empty(n_rows, inner_left), y_BH.new_empty(n_rows, inner_up)
    if n_rows == 1:
        left, mid, inner = (triton.next_power_of_2(size) for size in (inner_left, bottleneck, inner_up))
        _bottleneck_row[(_ceil(width, _ROW_OUT),)](
            y_BH, left_HC, one_C, mid_Cb, one_D, mid_bD, up_DH, out_BH, t_BC, u_BD, width, inner_left, bottleneck,
            inner_up, LEFT=left, MID=mid, UP=inner, IN=_row_in(width), OUT=_ROW_OUT, num_warps=_ROW_WARPS,
        )  # fmt: skip
        return out_BH, t_BC, u_BD
    parts = project(y_BH, left_HC)
    rows, tiles, shares = _shares(n_rows, width)
    _add_bottleneck[(_ceil(n_rows, rows), shares)](
        parts, y_BH, one_C, mid_Cb, one_D, mid_bD, up_DH, out_BH, t_BC, u_BD,
        len(parts), n_rows, width, y_BH.stride(0), inner_left, bottleneck, inner_up, tiles,
        ROWS=rows, LEFT=_padded(inner_left), MID=_padded(bottleneck), UP=_padded(inner_up), OUT=_OUT,
        PARTS=_parts(len(parts)), num_warps=4,
    )  # fmt: skip
    return out_BH, t_BC, u_BD


def project(x_BI: Tensor, a_IR: Tensor) -> Tensor:
    """``x A`` in parts (parts, B, R) of float32, R padded by zeros."""
    (n_rows, n_in), rank = x_BI.shape, a_IR.shape[1]
    rows, columns = (64 if n_rows > 32 else 32), 64
    tiles = _ceil(n_in, columns)
    per_part = max(_ceil(tiles, MOST_PARTS), tiles * _ceil(n_rows, rows) // MANY)
    parts = x_BI.new_empty(_ceil(tiles, per_part), n_rows, _padded(rank), dtype=torch.float32)
    _project[(_ceil(n_rows, rows), len(parts))](
        x_BI, a_IR, parts, n_rows, n_in, x_BI.stride(0), rank, per_part,
        ROWS=rows, RANK=_padded(rank), IN=columns, num_warps=4, num_stages=3,
    )  # fmt: skip
    return parts


def grad_of_right(g_BO: Tensor, b_RO: Tensor, h_BR: Tensor) -> tuple[Tensor, Tensor]:
    """``g B^T`` in parts (parts, B, R) of float32, R padded by zeros, and ``h^T g`` (R, O)."""
    (n_rows, n_out), rank = g_BO.shape, b_RO.shape[0]
    width = 64 if n_rows <= 1024 else 128
    tiles = _ceil(n_out, width)
    rows, chunk, chunks = _chunks(n_rows, tiles)
    h_parts = g_BO.new_empty(tiles, n_rows, _padded(rank), dtype=torch.float32)
    b_parts = g_BO.new_empty(chunks, rank, n_out, dtype=torch.float32 if chunks > 1 else b_RO.dtype)
    _grad_of_right[(tiles, chunks)](
        g_BO, b_RO, h_BR, h_parts, b_parts, n_rows, n_out, g_BO.stride(0), rank, chunk,
        ROWS=rows, RANK=_padded(rank), OUT=width, num_warps=4, num_stages=3,
    )  # fmt: skip
    return h_parts, sum_parts(b_parts, b_RO.dtype)


def grad_of_left(x_BI: Tensor, a_IR: Tensor, dh_BR: Tensor, base_BI: Tensor, out_BI: Tensor) -> Tensor:
    """Write ``base + dh A^T`` into out, which may be base. Returns ``x^T dh`` (I, R). dh may have more columns."""
    (n_rows, n_in), rank = x_BI.shape, a_IR.shape[1]
    width = 64
    tiles = _ceil(n_in, width)
    rows, chunk, chunks = _chunks(n_rows, tiles)
    a_parts = x_BI.new_empty(chunks, n_in, rank, dtype=torch.float32 if chunks > 1 else a_IR.dtype)
    _grad_of_left[(tiles, chunks)](
        x_BI, a_IR, dh_BR, base_BI, out_BI, a_parts,
        n_rows, n_in, x_BI.stride(0), dh_BR.stride(0), base_BI.stride(0), out_BI.stride(0), rank, chunk,
        ROWS=rows, RANK=_padded(rank), IN=width, num_warps=8, num_stages=3,
    )  # fmt: skip
    return sum_parts(a_parts, a_IR.dtype)


def grad_of_middle(u_parts: Tensor, t_BC: Tensor, mid_Cb: Tensor, mid_bD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of t (B, C) and of the two middle matrices, from the gradient of u in parts (parts, B, D)."""
    n_parts, n_rows, _ = u_parts.shape
    (inner_left, bottleneck), inner_up = mid_Cb.shape, mid_bD.shape[1]
    rows = 16 if n_rows <= 2048 else 64
    programs = max(1, _ceil(n_rows, rows))  # without rows one program writes the zeros
    dt_BC = torch.empty_like(t_BC)
    parts = t_BC.new_empty(programs, bottleneck * (inner_left + inner_up), dtype=torch.float32)
    _grad_of_middle[(programs,)](
        u_parts, t_BC, mid_Cb, mid_bD, dt_BC, parts, n_parts, n_rows, inner_left, bottleneck, inner_up,
        ROWS=rows, LEFT=_padded(inner_left), MID=_padded(bottleneck), UP=_padded(inner_up),
        PARTS=_parts(n_parts), num_warps=4,
    )  # fmt: skip
    grads = sum_parts(parts, mid_Cb.dtype)
    split = inner_left * bottleneck
    return dt_BC, grads[:split].view_as(mid_Cb), grads[split:].view_as(mid_bD)


def sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the first axis, in float32 and in a fixed order, in the dtype given."""
    if len(parts) == 1 and parts.dtype == dtype:
        return parts[0]
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    _sum_parts[(_ceil(out.numel(), 64),)](parts, out, len(parts), out.numel(), BLOCK=64, PARTS=64, num_warps=4)
    return out


_OUT = 128
_ROW_IN, _ROW_OUT, _ROW_WARPS = 2048, 64, 8  # where there is but one row, as in decoding


def _row_in(n_in: int) -> int:
    return min(_ROW_IN, triton.next_power_of_2(n_in))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _parts(n_parts: int) -> int:
    """How many parts are added up at once."""
    return min(16, triton.next_power_of_2(n_parts))


def _shares(n_rows: int, n_out: int) -> tuple[int, int, int]:
    """Rows per program, tiles of columns per program, and how many programs share the columns of the same rows."""
    rows, tiles = (32 if n_rows <= 2048 else 64), _ceil(n_out, _OUT)
    blocks = max(1, _ceil(n_rows, rows))
    per_share = _ceil(tiles, max(1, min(tiles, MANY // 2 // blocks)))
    return rows, per_share, _ceil(tiles, per_share)


def _chunks(n_rows: int, tiles: int) -> tuple[int, int, int]:
    """Rows per block, rows per chunk, chunks. One chunk needs no sum; more are made where one leaves the GPU idle."""
    if n_rows == 0 or (n_rows <= 512 and tiles >= 32):
        return 128, n_rows, 1
    chunks = max(1, min(MANY // tiles, _ceil(n_rows, 64)))
    chunk = _ceil(_ceil(n_rows, chunks), 64) * 64
    return 64, chunk, _ceil(n_rows, chunk)
