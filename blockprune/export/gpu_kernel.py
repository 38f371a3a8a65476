# ruff: noqa: PLR0917  (kernels of Triton take everything by position)
"""The product with a block-sparse weight on a GPU, in Triton, two ways; `gpu` calls them, and alone needs to import them.

Each makes one tile: some rows of a band times ``BATCH`` rows of x. A band's kept columns are a dense matrix; of x they are picked.
"""

import triton
import triton.language as tl


@triton.jit
def tile_of(n, rows, HEIGHT: tl.constexpr, TALL: tl.constexpr, BATCH: tl.constexpr, BANDS_FIRST: tl.constexpr):
    """Which band, which of its rows, which rows of x."""
    parts: tl.constexpr = (HEIGHT + TALL - 1) // TALL
    if BANDS_FIRST:  # neighbours share rows of x
        across = tl.cdiv(rows, HEIGHT) * parts
        part, tile = tl.program_id(0) % across, tl.program_id(0) // across
    else:  # neighbours share the band
        tiles = tl.cdiv(n, BATCH)
        part, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    return part // parts, part % parts * TALL, tile


@triton.jit
def times(sums, a, b, WIDEN: tl.constexpr):
    if WIDEN:  # the interpreter's tl.dot takes bfloat16 for integers (triton-lang/triton issue 11584)
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def write(out, bias, sums, n, rows, row, inside, tile, BATCH: tl.constexpr, TURNED: tl.constexpr):
    if TURNED:
        sums = sums.T
    if bias is not None:
        sums += tl.load(bias + row, mask=inside, other=0).to(tl.float32)[None, :]
    i = tl.arange(0, BATCH)
    out += tile.to(tl.int64) * BATCH * rows + i[:, None] * rows + row[None, :]
    tl.store(out, sums.to(out.dtype.element_ty), mask=(tile * BATCH + i < n)[:, None] & inside[None, :])


@triton.jit
def gathered(
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
    TALL: tl.constexpr,  # rows of a band in the tile, a power of two, 16 or more
    BATCH: tl.constexpr,  # rows of x in the tile
    COLUMNS: tl.constexpr,  # kept columns a step
    ALIGNED: tl.constexpr,  # so many kept columns are neighbours in x, and start at a multiple
    TURNED: tl.constexpr,  # out^T is made, where that fits the matrix units better
    BANDS_FIRST: tl.constexpr,
    FAR: tl.constexpr,  # x is so large, and turned, that 32 bits do not count its columns
    WIDEN: tl.constexpr,
):
    """Any block: each kept column has an address of its own."""
    band, part, tile = tile_of(n, rows, HEIGHT, TALL, BATCH, BANDS_FIRST)
    block = tl.load(crow + band)
    begin = tl.load(before + band) if RAGGED else block * WIDTH
    end = tl.load(before + band + 1) if RAGGED else tl.load(crow + band + 1) * WIDTH
    count, high = (end - begin).to(tl.int32), tl.minimum(HEIGHT, rows - band * HEIGHT) if LOWER else HEIGHT
    i, r = tl.arange(0, BATCH), tl.arange(0, TALL)
    some, inside = tile * BATCH + i < n, part + r < high
    values += begin * HEIGHT + part
    x += tile.to(tl.int64) * BATCH * x_row
    sums = tl.zeros((TALL, BATCH) if TURNED else (BATCH, TALL), tl.float32)
    for start in range(0, count, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        here = k < count
        column = tl.load(col + block + k // WIDTH, mask=here, other=0) * WIDTH + k % WIDTH
        column = tl.max_contiguous(tl.multiple_of(column, ALIGNED), ALIGNED)
        if FAR:
            column = column.to(tl.int64)
        if TURNED:
            ws = tl.load(values + k[None, :] * high + r[:, None], mask=here[None, :] & inside[:, None], other=0)
            xs = tl.load(x + i[None, :] * x_row + column[:, None] * x_column, mask=some[None, :] & here[:, None], other=0)
            sums = times(sums, ws, xs, WIDEN)
        else:
            ws = tl.load(values + k[:, None] * high + r[None, :], mask=here[:, None] & inside[None, :], other=0)
            xs = tl.load(x + i[:, None] * x_row + column[None, :] * x_column, mask=some[:, None] & here[None, :], other=0)
            sums = times(sums, xs, ws, WIDEN)
    write(out, bias, sums, n, rows, band * HEIGHT + part + r, inside, tile, BATCH, TURNED)


@triton.jit
def boxes(
    x,
    values,
    crow,
    col,
    bias,
    out,
    n,
    rows,
    HEIGHT: tl.constexpr,  # a power of two that divides the rows
    WIDTH: tl.constexpr,  # likewise, of the columns
    BATCH: tl.constexpr,
    TURNED: tl.constexpr,
    BANDS_FIRST: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Wide blocks: x and the kept columns are fetched by the block, by the copy engine of recent GPUs, through tensor descriptors."""
    band, _, tile = tile_of(n, rows, HEIGHT, HEIGHT, BATCH, BANDS_FIRST)
    sums = tl.zeros((HEIGHT, BATCH) if TURNED else (BATCH, HEIGHT), tl.float32)
    for block in range(tl.load(crow + band).to(tl.int32), tl.load(crow + band + 1).to(tl.int32)):
        xs = x.load([tile * BATCH, tl.load(col + block) * WIDTH])
        ws = values.load([block * WIDTH, 0])
        sums = times(sums, ws.T, xs.T, WIDEN) if TURNED else times(sums, xs, ws, WIDEN)
    r = tl.arange(0, HEIGHT)
    write(out, bias, sums, n, rows, band * HEIGHT + r, r < HEIGHT, tile, BATCH, TURNED)
