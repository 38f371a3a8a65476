# ruff: noqa: PLR0917  (kernels of Triton take everything by position)
"""The product with a block-sparse weight on a GPU, in Triton; `gpu` calls it, and alone needs to import it."""

import triton
import triton.language as tl


@triton.jit
def product(
    x,
    values,
    crow,
    col,
    before,
    bias,
    out,
    n,
    rows,
    x_row,
    x_column,
    HEIGHT: tl.constexpr,  # of a stored block
    WIDTH: tl.constexpr,
    LOWER: tl.constexpr,  # the last band is lower
    RAGGED: tl.constexpr,  # the last block of a band may be narrower: `before` says how many kept columns lie before each band
    ODD: tl.constexpr,  # a band may keep an odd number of columns
    TALL: tl.constexpr,  # rows of a band in the tile, a power of two, 16 or more
    BATCH: tl.constexpr,  # rows of x in the tile
    COLUMNS: tl.constexpr,  # kept columns a step
    ALIGNED: tl.constexpr,  # so many kept columns are neighbours in x, and start at a multiple
    WIDEN: tl.constexpr,  # the interpreter's tl.dot takes bfloat16 for integers (triton-lang/triton issue 11584)
):
    """One band times ``BATCH`` rows of x: its kept columns are a dense matrix, and the columns of x that it meets are gathered."""
    bands = tl.cdiv(rows, HEIGHT)
    band = tl.program_id(0) % bands  # neighbours share rows of x
    i = (tl.program_id(0) // bands).to(tl.int64) * BATCH + tl.arange(0, BATCH)
    high = tl.minimum(HEIGHT, rows - band * HEIGHT) if LOWER else HEIGHT
    block = tl.load(crow + band)
    begin = tl.load(before + band) if RAGGED else block * WIDTH
    end = tl.load(before + band + 1) if RAGGED else tl.load(crow + band + 1) * WIDTH
    count = (end - begin).to(tl.int32)
    values += begin * HEIGHT
    x += i[:, None] * x_row
    pair, pairs, both = tl.arange(0, COLUMNS // 2), count // 2, tl.arange(0, 2 * TALL)
    sums = tl.zeros((BATCH, TALL), tl.float32)
    for start in range(0, pairs * 2, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        column = tl.load(col + block + k // WIDTH, mask=k < pairs * 2, other=0) * WIDTH + k % WIDTH
        column = tl.max_contiguous(tl.multiple_of(column, ALIGNED), ALIGNED).to(tl.int64)
        xs = tl.load(x + column[None, :] * x_column, mask=(i < n)[:, None] & (k < pairs * 2)[None, :], other=0)  # [BATCH, COLUMNS]
        p = start // 2 + pair
        ws = tl.load(values + p[:, None] * (2 * high) + both[None, :], mask=(p < pairs)[:, None] & (both < 2 * high)[None, :], other=0)
        ws = ws.reshape(COLUMNS // 2, TALL, 2).permute(0, 2, 1).reshape(COLUMNS, TALL)
        if WIDEN:
            xs, ws = xs.to(tl.float32), ws.to(tl.float32)
        sums = tl.dot(xs, ws, sums, input_precision="ieee")
    r = tl.arange(0, TALL)
    if ODD and count % 2:
        k = count - 1
        column = (tl.load(col + block + k // WIDTH) * WIDTH + k % WIDTH).to(tl.int64)
        last = tl.load(x + column * x_column, mask=(i < n)[:, None], other=0)  # [BATCH, 1]
        sums += last.to(tl.float32) * tl.load(values + k * high + r[None, :], mask=(r < high)[None, :], other=0).to(tl.float32)
    row = band * HEIGHT + r
    if bias is not None:
        sums += tl.load(bias + row, mask=r < high, other=0).to(tl.float32)[None, :]
    tl.store(out + i[:, None] * rows + row[None, :], sums.to(out.dtype.element_ty), mask=(i < n)[:, None] & (r < high)[None, :])
