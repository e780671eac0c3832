"""Numbers in FP8 (e4m3): rows of activations and frozen NF4 weights, each in one pass over memory.

A value in e4m3 has 3 bits after the leading one and reaches from 2**-9 to 448, so every row gets a scale of its own that puts its
largest value at 448. Each function has a Triton kernel for CUDA GPUs and the same arithmetic in plain torch for everything else.
Knows nothing of layers, models or settings.
"""

import os

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch for CPUs come without it
    triton = None

E4M3, LARGEST = torch.float8_e4m3fn, 448.0
LEAST = 2.0**-100  # a row whose values are all smaller is taken as this large, so that its scale is a normal float32
NESTED_BLOCK = 256  # constants of quantisation blocks that share a constant of theirs (arXiv:2305.14314)
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it where a kernel is defined
_WRITTEN = torch.float32 if _INTERPRETED else E4M3  # the interpreter rounds to e4m3 without carry: PyTorch does it then


def has_kernels(device: torch.device) -> bool:
    """Whether the Triton kernels run on a device."""
    return triton is not None and (device.type == "cuda" or _INTERPRETED)


# rows of activations and gradients


def rows_to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds rows to FP8, each with its own scale.

    Args:
        x: `(rows, columns)`.

    Returns:
        `(rows, columns)` in e4m3, and `(rows, 1)` float32 scales: their product is `x` up to rounding. A row with a value that
        is not finite has no finite product.
    """
    if has_kernels(x.device) and not torch.compiler.is_compiling():  # a compiler fuses the torch code with what made x
        return _rows_by_kernel(x)
    values = x.float()
    largest = values.abs().amax(-1, keepdim=True).clamp(min=LEAST)
    return (values * (LARGEST / largest)).clamp(-LARGEST, LARGEST).to(E4M3), largest / LARGEST


def _rows_by_kernel(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.contiguous()
    rows, columns = x.shape
    out = torch.empty(rows, columns, dtype=_WRITTEN, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    width = triton.next_power_of_2(columns)
    _rows_kernel[(rows,)](x, out, scales, columns, WIDTH=width, num_warps=4 if width <= 4096 else 16)
    return out.to(E4M3), scales


# frozen weights


def nf4_to_fp8(
    packed: torch.Tensor,
    constants: torch.Tensor,
    inverse: torch.Tensor,
    code: torch.Tensor,
    nested_code: torch.Tensor | None,
    nested_constants: torch.Tensor | None,
    offset: torch.Tensor | None,
    shape: list[int],
    transposed: bool,
) -> torch.Tensor:
    """Unpacks 4-bit weights into FP8, in the layout that one of the two multiplications needs.

    Args:
        packed: two weights a byte, the first in the upper half; any shape, in the order of the rows.
        constants: one a quantisation block of a row: float32, or 8 bits where they are quantised themselves.
        inverse: 1 / scale of each row, `(rows,)`, or where transposed of each column, `(columns,)`; float32.
        code: `(16,)`, the value of each 4-bit number.
        nested_code, nested_constants, offset: `(256,)`, one a nested block, and a scalar: how constants in 8 bits are read.
        shape: `(rows, columns)` of the weights; a row holds whole quantisation blocks.
        transposed: whether the result is `(columns, rows)`.

    Returns:
        e4m3, contiguous.
    """
    if has_kernels(packed.device):
        return _weights_by_kernel(
            packed, constants, inverse, code, nested_code, nested_constants, offset, shape, transposed
        )
    values = nf4_values(packed, constants, code, nested_code, nested_constants, offset, shape)
    values *= inverse if transposed else inverse[:, None]
    values = values.clamp_(-LARGEST, LARGEST).to(E4M3)
    return values.t().contiguous() if transposed else values


def nf4_values(
    packed: torch.Tensor,
    constants: torch.Tensor,
    code: torch.Tensor,
    nested_code: torch.Tensor | None,
    nested_constants: torch.Tensor | None,
    offset: torch.Tensor | None,
    shape: list[int],
) -> torch.Tensor:
    """Unpacks 4-bit weights in plain torch: `(rows, columns)` in float32, the arguments as in `nf4_to_fp8`."""
    numbers = packed.view(torch.uint8).flatten()
    values = code[torch.stack([numbers >> 4, numbers & 15], dim=1).flatten().int()]
    blocks = constants.numel()
    if nested_code is not None and nested_constants is not None and offset is not None:
        which = torch.arange(blocks, device=constants.device) // NESTED_BLOCK
        constants = nested_code[constants.int()] * nested_constants[which] + offset
    return (values.view(blocks, -1) * constants[:, None]).view(*shape)


def _weights_by_kernel(
    packed: torch.Tensor,
    constants: torch.Tensor,
    inverse: torch.Tensor,
    code: torch.Tensor,
    nested_code: torch.Tensor | None,
    nested_constants: torch.Tensor | None,
    offset: torch.Tensor | None,
    shape: list[int],
    transposed: bool,
) -> torch.Tensor:
    rows, columns = shape
    block = rows * columns // constants.numel()
    out = torch.empty((columns, rows) if transposed else (rows, columns), dtype=_WRITTEN, device=packed.device)
    # Along what is contiguous in the result a program writes at least 128 bytes.
    tile_rows, tile_blocks = (128, 1) if transposed else (32, max(1, 256 // block))
    grid = (triton.cdiv(rows, tile_rows), triton.cdiv(columns, tile_blocks * block))
    nested = nested_code is not None
    _weights_kernel[grid](
        packed.view(torch.uint8),
        constants,
        inverse,
        code,
        nested_code if nested else code,
        nested_constants if nested else code,
        offset if nested else code,
        out,
        rows,
        columns,
        BLOCK=block,
        NESTED=nested,
        NESTED_BLOCK=NESTED_BLOCK,
        TRANSPOSED=transposed,
        TILE_ROWS=tile_rows,
        TILE_BLOCKS=tile_blocks,
        num_warps=4,
    )
    return out.to(E4M3)


if triton is not None:

    @triton.jit
    def _rows_kernel(x, out, scales, columns, WIDTH: tl.constexpr):
        """One program a row. A value that is not finite becomes NaN, since the largest is infinite or the value itself is NaN."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, WIDTH)
        inside = column < columns
        values = tl.load(x + row * columns + column, mask=inside, other=0.0).to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(values), axis=0), 7.888609052210118e-31)  # LEAST
        tl.store(scales + row, largest / 448.0)
        tl.store(out + row * columns + column, (values * (448.0 / largest)).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _weights_kernel(
        packed,
        constants,
        inverse,
        code,
        nested_code,
        nested_constants,
        offset,
        out,
        rows,
        columns,
        BLOCK: tl.constexpr,
        NESTED: tl.constexpr,
        NESTED_BLOCK: tl.constexpr,
        TRANSPOSED: tl.constexpr,
        TILE_ROWS: tl.constexpr,
        TILE_BLOCKS: tl.constexpr,
    ):
        """One program a tile of whole quantisation blocks: bytes are `(rows, blocks, BLOCK / 2)`, weights `(rows, columns)`."""
        row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
        block = tl.program_id(1) * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
        in_row = columns // BLOCK
        place = row[:, None] * in_row + block[None, :]
        inside = (row[:, None] < rows) & (block[None, :] < in_row)
        if NESTED:
            constant = tl.load(nested_code + tl.load(constants + place, mask=inside, other=0).to(tl.int32))
            constant = constant * tl.load(nested_constants + place // NESTED_BLOCK, mask=inside, other=0.0)
            constant = constant + tl.load(offset)
        else:
            constant = tl.load(constants + place, mask=inside, other=0.0)
        pair = tl.arange(0, BLOCK // 2)
        numbers = tl.load(
            packed + place[:, :, None] * (BLOCK // 2) + pair[None, None, :], mask=inside[:, :, None], other=0
        ).to(tl.int32)
        first = tl.load(code + (numbers >> 4)) * constant[:, :, None]
        second = tl.load(code + (numbers & 15)) * constant[:, :, None]
        values = tl.reshape(tl.join(first, second), (TILE_ROWS, TILE_BLOCKS * BLOCK))
        column = tl.program_id(1) * (TILE_BLOCKS * BLOCK) + tl.arange(0, TILE_BLOCKS * BLOCK)
        here = (row[:, None] < rows) & (column[None, :] < columns)
        if TRANSPOSED:
            values = values * tl.load(inverse + column, mask=column < columns, other=0.0)[None, :]
            place_out = column[:, None] * rows + row[None, :]
            tl.store(out + place_out, tl.trans(values.to(out.dtype.element_ty)), mask=tl.trans(here))
        else:
            values = values * tl.load(inverse + row, mask=row < rows, other=0.0)[:, None]
            tl.store(out + row[:, None] * columns + column[None, :], values.to(out.dtype.element_ty), mask=here)
