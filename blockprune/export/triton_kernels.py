# ruff: noqa: PLR0917  (kernels of Triton take everything by position)
"""The Triton kernels of the product with a block-sparse weight. Only `triton_launch` imports them, because Triton may not be installed.

A program computes one tile of the output: ``TILE_BATCH`` rows of x times some rows of a block row. The kept columns of a block row are a
dense matrix ``[columns, height]``; the same columns of x are gathered.
"""

import triton
import triton.language as tl


@triton.jit
def tile_position(n, rows, HEIGHT: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_BATCH: tl.constexpr, BLOCK_ROWS_FIRST: tl.constexpr):
    """The block row of this program, the first of its rows that the tile covers, and the number of the tile along x's rows."""
    parts: tl.constexpr = (HEIGHT + TILE_ROWS - 1) // TILE_ROWS
    if BLOCK_ROWS_FIRST:  # consecutive programs share rows of x
        across = tl.cdiv(rows, HEIGHT) * parts
        part, tile = tl.program_id(0) % across, tl.program_id(0) // across
    else:  # consecutive programs share the block row
        tiles = tl.cdiv(n, TILE_BATCH)
        part, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    return part // parts, part % parts * TILE_ROWS, tile


@triton.jit
def multiply_add(sums, a, b, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter's tl.dot takes bfloat16 for integers (triton-lang/triton issue 11584)
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def store_tile(out, bias, sums, n, rows, row, inside, tile, TILE_BATCH: tl.constexpr, TRANSPOSED: tl.constexpr):
    if TRANSPOSED:
        sums = sums.T
    if bias is not None:
        sums += tl.load(bias + row, mask=inside, other=0).to(tl.float32)[None, :]
    i = tl.arange(0, TILE_BATCH)
    out += tile.to(tl.int64) * TILE_BATCH * rows + i[:, None] * rows + row[None, :]
    tl.store(out, sums.to(out.dtype.element_ty), mask=(tile * TILE_BATCH + i < n)[:, None] & inside[None, :])


@triton.jit
def gather_kernel(
    x,
    values,
    crow,
    col,
    columns_before,
    bias,
    out,
    n,
    rows,
    x_row_stride,
    x_column_stride,
    HEIGHT: tl.constexpr,  # of a stored block
    WIDTH: tl.constexpr,
    SHORT_LAST_ROW: tl.constexpr,  # the last block row has fewer rows
    RAGGED_COLUMNS: tl.constexpr,  # the last block of a row may be narrower; `columns_before` counts the kept columns before each block row
    TILE_ROWS: tl.constexpr,  # rows of a block row in the tile: a power of two, 16 or more
    TILE_BATCH: tl.constexpr,  # rows of x in the tile
    STEP_COLUMNS: tl.constexpr,  # kept columns per step
    CONTIGUOUS: tl.constexpr,  # so many kept columns are neighbours in x, and the first is a multiple of it
    TRANSPOSED: tl.constexpr,  # the transposed output is computed, where that fits the matrix units better
    BLOCK_ROWS_FIRST: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,  # the offsets of x's columns exceed 32 bits
    UPCAST: tl.constexpr,
):
    """Blocks of any size: each kept column has an address of its own."""
    block_row, part, tile = tile_position(n, rows, HEIGHT, TILE_ROWS, TILE_BATCH, BLOCK_ROWS_FIRST)
    block = tl.load(crow + block_row)
    begin = tl.load(columns_before + block_row) if RAGGED_COLUMNS else block * WIDTH
    end = tl.load(columns_before + block_row + 1) if RAGGED_COLUMNS else tl.load(crow + block_row + 1) * WIDTH
    count, height = (end - begin).to(tl.int32), tl.minimum(HEIGHT, rows - block_row * HEIGHT) if SHORT_LAST_ROW else HEIGHT
    i, r = tl.arange(0, TILE_BATCH), tl.arange(0, TILE_ROWS)
    valid_batch, valid_row = tile * TILE_BATCH + i < n, part + r < height
    values += begin * HEIGHT + part
    x += tile.to(tl.int64) * TILE_BATCH * x_row_stride
    sums = tl.zeros((TILE_ROWS, TILE_BATCH) if TRANSPOSED else (TILE_BATCH, TILE_ROWS), tl.float32)
    for start in range(0, count, STEP_COLUMNS):
        k = start + tl.arange(0, STEP_COLUMNS)
        valid = k < count
        column = tl.load(col + block + k // WIDTH, mask=valid, other=0) * WIDTH + k % WIDTH
        column = tl.max_contiguous(tl.multiple_of(column, CONTIGUOUS), CONTIGUOUS)
        if INT64_OFFSETS:
            column = column.to(tl.int64)
        if TRANSPOSED:
            ws = tl.load(values + k[None, :] * height + r[:, None], mask=valid[None, :] & valid_row[:, None], other=0)
            xs = tl.load(
                x + i[None, :] * x_row_stride + column[:, None] * x_column_stride, mask=valid_batch[None, :] & valid[:, None], other=0
            )
            sums = multiply_add(sums, ws, xs, UPCAST)
        else:
            ws = tl.load(values + k[:, None] * height + r[None, :], mask=valid[:, None] & valid_row[None, :], other=0)
            xs = tl.load(
                x + i[:, None] * x_row_stride + column[None, :] * x_column_stride, mask=valid_batch[:, None] & valid[None, :], other=0
            )
            sums = multiply_add(sums, xs, ws, UPCAST)
    store_tile(out, bias, sums, n, rows, block_row * HEIGHT + part + r, valid_row, tile, TILE_BATCH, TRANSPOSED)


@triton.jit
def tma_kernel(
    x,
    values,
    crow,
    col,
    bias,
    out,
    n,
    rows,
    HEIGHT: tl.constexpr,  # of a stored block: a power of two that divides the rows
    WIDTH: tl.constexpr,  # likewise, of the columns
    TILE_BATCH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_ROWS_FIRST: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Wide blocks: the tensor memory accelerator (TMA) of recent GPUs fetches x and the kept columns one block at a time."""
    block_row, _, tile = tile_position(n, rows, HEIGHT, HEIGHT, TILE_BATCH, BLOCK_ROWS_FIRST)
    sums = tl.zeros((HEIGHT, TILE_BATCH) if TRANSPOSED else (TILE_BATCH, HEIGHT), tl.float32)
    for block in range(tl.load(crow + block_row).to(tl.int32), tl.load(crow + block_row + 1).to(tl.int32)):
        xs = x.load([tile * TILE_BATCH, tl.load(col + block) * WIDTH])
        ws = values.load([block * WIDTH, 0])
        sums = multiply_add(sums, ws.T, xs.T, UPCAST) if TRANSPOSED else multiply_add(sums, xs, ws, UPCAST)
    r = tl.arange(0, HEIGHT)
    store_tile(out, bias, sums, n, rows, block_row * HEIGHT + r, r < HEIGHT, tile, TILE_BATCH, TRANSPOSED)
