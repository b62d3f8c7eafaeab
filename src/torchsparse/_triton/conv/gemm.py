"""Forward and input gradient: masked implicit GEMM.

One program owns BM rows and BN channels of the output. It visits the taps that any of its rows
has, gathers the input rows under a tap and multiplies them with that tap's weights. Rows are
sorted beforehand so that rows of one tile have similar taps (`order.py`).

The loop is written for Triton's pipeliner: one flat loop over taps and channel blocks, in which
the rows to gather are carried from one iteration to the next. Loading them where they are used,
or advancing under an ``if``, would leave no copy in flight (docs/how-it-works).
"""

# The checker does not see what Triton's compiler makes of these functions.
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from torchsparse._triton.primitives import bit_count, lowest_bit, real_rows

__all__ = ["dense_kernel", "gemm_kernel", "narrow_kernel", "sum_kernel", "turn_kernel"]


@triton.jit
def _finish(
    acc, rows, cols, live, bias, mean, var, gamma, beta, eps, residual, slope, CO: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """`_recipe.Epilogue`, after a bias. NORM: 0 = none, 1 = plain, 2 = with gamma and beta."""
    if BIAS:
        acc += tl.load(bias + cols, mask=cols < CO, other=0.0).to(tl.float32)[None, :]
    if NORM > 0:
        scale = tl.load(var + cols, mask=cols < CO, other=1.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(scale + eps)
        shift = -tl.load(mean + cols, mask=cols < CO, other=0.0).to(tl.float32)
        if NORM == 2:
            scale *= tl.load(gamma + cols, mask=cols < CO, other=0.0).to(tl.float32)
        acc = (acc + shift[None, :]) * scale[None, :]
        if NORM == 2:
            acc += tl.load(beta + cols, mask=cols < CO, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        at = rows[:, None] * CO + cols[None, :]
        acc += tl.load(residual + at, mask=live, other=0.0).to(acc.dtype)
    if ACT == 1:  # ReLU; NaN stays NaN
        acc = tl.where(acc < 0, 0.0, acc)
    if ACT == 2:
        acc = tl.where(acc < 0, acc * slope, acc)
    return acc


@triton.jit
def _add_taps(
    acc, x, w, table, m, first_tap, held, first_col, cols, cnt, M, w_tap, w_in, w_out,
    K: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr, BK: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Add the products of the taps in mask ``m``, the first ``cnt`` of them."""
    NK: tl.constexpr = (CI + BK - 1) // BK
    EVEN: tl.constexpr = CI % BK == 0
    rk = tl.arange(0, BK)
    last = K - 1
    tap = tl.minimum(first_tap + lowest_bit(m), last)
    idx = tl.load(table + tap.to(tl.int64) * M, mask=held, other=-1)
    for it in range(cnt * NK):
        kk = it % NK
        k = kk * BK + rk
        source = x + idx.to(tl.int64)[:, None] * CI + k[None, :]
        if EVEN:
            a = tl.load(source, mask=(idx >= 0)[:, None], other=0.0)
        else:
            a = tl.load(source, mask=(idx >= 0)[:, None] & (k < CI)[None, :], other=0.0)
        slice_ = last - tap if REVERSE else tap
        if BLOCKS == 1:
            b = w.load([slice_ * CI + kk * BK, first_col])
        elif BLOCKS == 2:  # columns beyond CO are those of another tap, and not stored
            b = w.load([slice_ * CO + first_col, kk * BK]).T
        else:
            weights = w + slice_.to(tl.int64) * w_tap + k[:, None] * w_in + cols[None, :] * w_out
            if EVEN:
                b = tl.load(weights, mask=(cols < CO)[None, :], other=0.0)
            else:
                b = tl.load(weights, mask=(k < CI)[:, None] & (cols < CO)[None, :], other=0.0)
        m = tl.where(kk == NK - 1, m & (m - 1), m)
        tap = tl.minimum(first_tap + lowest_bit(m), last)
        idx = tl.load(table + tap.to(tl.int64) * M, mask=held, other=-1)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _with_padding(acc, there, live, rm, cols, limit, M, CO):
    """What is stored where: zeros in rows of padding, which sums over all rows may then count."""
    if limit is not None:
        acc = tl.where(live[:, None], acc, 0.0)
        there = (rm < M)[:, None] & (cols < CO)[None, :]
    return acc, there


@triton.jit
def _rows_of(rm, live, rows, limit, SORTED: tl.constexpr):
    """Where the positions ``rm`` of a table belong in the result, read from its order: padding
    stays where it is."""
    if SORTED and limit is not None:
        rows = tl.where(live, rows, rm)
    return rows.to(tl.int64)


@triton.jit(do_not_specialize=["M", "T"])
def gemm_kernel(
    x, w, out, table, order, masks, limit, bias, mean, var, gamma, beta, eps, residual, slope,
    M, T, w_tap, w_in, w_out,
    K: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr,
    OWN: tl.constexpr, SORTED: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCKS: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """out[order[m]] = epilogue(sum over taps k of x[table[k, m]] @ w[k]).

    BLOCKS: w is a matrix that the GPU's copy engine reads in blocks, which costs threads nothing:
    1 = [K CI, CO], 2 = [K CO, CI]; CI is a multiple of BK. 0 = it is given by its address.

    With SPLITS > 1, program (., s) adds share s of the taps, as far as its tile has them, and out
    is [SPLITS, M, CO] float32 without epilogue: `sum_kernel` finishes. OWN: each share has its own
    order of the rows. Rows from ``limit`` on are padding, have no place, and get zeros: the table
    gives them no neighbours, so that nothing waits for ``limit`` before the sums are there.
    """
    COLS: tl.constexpr = (CO + BN - 1) // BN
    WORDS: tl.constexpr = (K + 31) // 32
    tl.static_assert(BM % 64 == 0, "masks describe 64 rows")
    PARTS: tl.constexpr = BM // 64
    pid, split = tl.program_id(0), tl.program_id(1)
    if SPLITS > 1:  # the shares of a tile start together, so that tiles of padding start last
        number = pid + split * tl.num_programs(0)
        pid, split = number // SPLITS, number % SPLITS
    tile = pid // COLS
    first_col = (pid % COLS) * BN
    cols = first_col + tl.arange(0, BN)
    rm = tile * BM + tl.arange(0, BM)
    real = real_rows(M, limit)
    held = rm < M
    if OWN:
        masks += split.to(tl.int64) * WORDS * T
        if SORTED:
            order += split.to(tl.int64) * T * 64
    rows = rm
    if SORTED:
        rows = tl.load(order + rm, mask=held, other=0)
    table += rm
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for word in range(WORDS):
        m = tl.load(masks + word * T + tile * PARTS).to(tl.uint32, bitcast=True)
        for part in tl.static_range(1, PARTS):
            inside = tile * PARTS + part < T
            more = tl.load(masks + word * T + tile * PARTS + part, mask=inside, other=0)
            m |= more.to(tl.uint32, bitcast=True)
        if SPLITS > 1 and not OWN:
            # Not a share of the tile's own taps: these depend on the order of rows of equal keys,
            # and a row must always add the same products.
            begin = tl.minimum(tl.maximum(K * split // SPLITS - word * 32, 0), 32)
            end = tl.minimum(tl.maximum(K * (split + 1) // SPLITS - word * 32, 0), 32)
            one = tl.full((), 1, tl.uint64)
            m &= ((one << end.to(tl.uint64)) - (one << begin.to(tl.uint64))).to(tl.uint32)
        cnt = bit_count(m)
        acc = _add_taps(
            acc, x, w, table, m, word * 32, held, first_col, cols, cnt, M, w_tap, w_in, w_out,
            K, CI, CO, BK, REVERSE, PRECISION, BLOCKS,
        )  # fmt: skip
    live = rm < real
    rows = _rows_of(rm, live, rows, limit, SORTED)
    there = live[:, None] & (cols < CO)[None, :]
    if SPLITS > 1:
        out += split.to(tl.int64) * M * CO
    else:
        acc = _finish(
            acc, rows, cols, there, bias, mean, var, gamma, beta, eps, residual, slope, CO,
            BIAS, NORM, RESIDUAL, ACT,
        )  # fmt: skip
        acc, there = _with_padding(acc, there, live, rm, cols, limit, M, CO)
    tl.store(out + rows[:, None] * CO + cols[None, :], acc.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["M"])
def sum_kernel(
    partial, out, limit, bias, mean, var, gamma, beta, eps, residual, slope, M,
    CO: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """out[m] = epilogue(sum over s of partial[s, m]), in the order of s."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    real = real_rows(M, limit)
    inside = (rm < M)[:, None] & (cols < CO)[None, :]
    rows = rm.to(tl.int64)
    at = rows[:, None] * CO + cols[None, :]
    size = tl.cast(M, tl.int64) * CO
    # Of padding nothing was written: what is read there is garbage, and gives way to zeros below.
    acc = tl.load(partial + at, mask=inside, other=0.0).to(tl.float32)
    for part in range(1, PARTS):
        acc += tl.load(partial + part * size + at, mask=inside, other=0.0)
    live = rm < real
    there = live[:, None] & (cols < CO)[None, :]
    acc = _finish(
        acc, rows, cols, there, bias, mean, var, gamma, beta, eps, residual, slope, CO,
        BIAS, NORM, RESIDUAL, ACT,
    )  # fmt: skip
    acc, there = _with_padding(acc, there, live, rm, cols, limit, M, CO)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["M"])
def dense_kernel(
    x, w, out, limit, bias, mean, var, gamma, beta, eps, residual, slope, M, w_in, w_out,
    CI: tl.constexpr, CO: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """out[m] = epilogue(x[m] @ w)."""
    COLS: tl.constexpr = (CO + BN - 1) // BN
    EVEN: tl.constexpr = CI % BK == 0
    tile = tl.program_id(0) // COLS
    cols = (tl.program_id(0) % COLS) * BN + tl.arange(0, BN)
    rm = tile * BM + tl.arange(0, BM)
    rows = rm.to(tl.int64)
    live = rm < real_rows(M, limit)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, CI, BK):
        k = start + tl.arange(0, BK)
        source = x + rows[:, None] * CI + k[None, :]
        weights = w + k[:, None] * w_in + cols[None, :] * w_out
        if EVEN:
            a = tl.load(source, mask=live[:, None], other=0.0)
            b = tl.load(weights, mask=(cols < CO)[None, :], other=0.0)
        else:
            a = tl.load(source, mask=live[:, None] & (k < CI)[None, :], other=0.0)
            b = tl.load(weights, mask=(k < CI)[:, None] & (cols < CO)[None, :], other=0.0)
        acc = tl.dot(a, b, acc)
    there = live[:, None] & (cols < CO)[None, :]
    acc = _finish(
        acc, rows, cols, there, bias, mean, var, gamma, beta, eps, residual, slope, CO,
        BIAS, NORM, RESIDUAL, ACT,
    )  # fmt: skip
    acc, there = _with_padding(acc, there, live, rm, cols, limit, M, CO)
    tl.store(out + rows[:, None] * CO + cols[None, :], acc.to(out.dtype.element_ty), mask=there)


@triton.jit
def turn_kernel(
    w, out, w_tap, w_in, w_out, CI: tl.constexpr, CO: tl.constexpr, BI: tl.constexpr,
    BO: tl.constexpr,
):  # fmt: skip
    """out[k, j, i] = w[k, i, j]."""
    COLS: tl.constexpr = (CO + BO - 1) // BO
    tap = tl.program_id(0).to(tl.int64)
    i = (tl.program_id(1) // COLS) * BI + tl.arange(0, BI)
    j = (tl.program_id(1) % COLS) * BO + tl.arange(0, BO)
    there = (i < CI)[:, None] & (j < CO)[None, :]
    block = tl.load(w + tap * w_tap + i[:, None] * w_in + j[None, :] * w_out, mask=there)
    there = (j < CO)[:, None] & (i < CI)[None, :]
    tl.store(out + tap * (CI * CO) + j[:, None] * CI + i[None, :], tl.trans(block), mask=there)


@triton.jit(do_not_specialize=["M"])
def narrow_kernel(
    x, w, out, table, order, limit, bias, mean, var, gamma, beta, eps, residual, slope,
    M, w_tap, w_in, w_out,
    K: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SORTED: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """The same for few input channels: taps and channels are one axis of the product.

    A row of the left operand is the concatenation of its neighbours; no tap is skipped, and the
    whole sum takes K CI / BK steps. It needs no sorted rows, but what is sorted for wider layers
    serves as well, and the table as it was found need not be kept.
    """
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    real = real_rows(M, limit)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, K * CI, BK):
        flat = start + tl.arange(0, BK)
        tap, c = flat // CI, flat % CI
        inside = flat < K * CI
        at = rm[:, None] + tap[None, :].to(tl.int64) * M
        idx = tl.load(table + at, mask=(rm < M)[:, None] & inside[None, :], other=-1)
        a = tl.load(x + idx.to(tl.int64) * CI + c[None, :], mask=idx >= 0, other=0.0)
        slice_ = K - 1 - tap if REVERSE else tap
        weights = w + slice_[:, None].to(tl.int64) * w_tap + c[:, None] * w_in
        there = inside[:, None] & (cols < CO)[None, :]
        b = tl.load(weights + cols[None, :] * w_out, mask=there, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    live = rm < real
    there = live[:, None] & (cols < CO)[None, :]
    rows = rm
    if SORTED:
        rows = tl.load(order + rm, mask=live, other=0)
    rows = _rows_of(rm, live, rows, limit, SORTED)
    acc = _finish(
        acc, rows, cols, there, bias, mean, var, gamma, beta, eps, residual, slope, CO,
        BIAS, NORM, RESIDUAL, ACT,
    )  # fmt: skip
    acc, there = _with_padding(acc, there, live, rm, cols, limit, M, CO)
    tl.store(out + rows[:, None] * CO + cols[None, :], acc.to(out.dtype.element_ty), mask=there)
