"""The Triton kernels of block-sparse products; `launch` calls them.

Every product walks a step table: where the next K-step of the dense operand and of the values
starts. The next step's places are loop-carried, not loaded where they are used: Triton's pipeliner
then gives both operands `stages` buffers instead of one. All offsets are multiples of 16 elements.

Constants: PRECISION is the `input_precision` of `tl.dot`, UPCAST multiplies in float32 (Triton's
interpreter has no bfloat16).
"""

import triton
import triton.language as tl


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):
    """Return v after an activation of `ACTIVATIONS`, in float32; NaN stays NaN."""
    if ACTIVATION == "relu":
        v = tl.where(v < 0.0, 0.0, v)
    elif ACTIVATION == "gelu":
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh z) is sigmoid(2 z), here with z = sqrt(2 / pi) (v + 0.044715 v^3).
        v = v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    elif ACTIVATION == "silu":
        v = v * tl.sigmoid(v)
    return v


@triton.jit(do_not_specialize=["tokens", "tiles"])
def multiply(
    dense,
    values,
    starts,
    order,
    dense_steps,
    value_steps,
    bias,
    result,
    tokens,
    tiles,
    dense_stride,
    result_stride,
    TOKEN_TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    K_STRIDE: tl.constexpr,
    N_STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write `activate(sum over steps of dense[:, at:at+STEP] @ block + bias)`, one tile a program.

    dense [tokens, K], result [tokens, tiles * WIDTH]. A step's block is
    `values[step + k * K_STRIDE + n * N_STRIDE]`: with strides (1, block_in) the forward product,
    with (block_in, 1) and the transposed table the input gradient.
    """
    # Programs start in this order: groups of GROUP output tiles, longest first; inside a group all
    # token tiles, so that the group's values and the tokens at hand stay in the L2 cache.
    program = tl.program_id(0)
    token_tiles = tl.cdiv(tokens, TOKEN_TILE)
    first = program // (GROUP * token_tiles) * GROUP
    size = tl.minimum(tiles - first, GROUP)
    inside = program % (GROUP * token_tiles)
    tile = tl.load(order + first + inside % size)
    token = (inside // size) * TOKEN_TILE + tl.arange(0, TOKEN_TILE)
    n = tl.arange(0, WIDTH)
    k = tl.arange(0, STEP)
    live = token[:, None] < tokens

    low = tl.load(starts + tile)
    high = tl.load(starts + tile + 1)
    dense_base = dense + token.to(tl.int64)[:, None] * dense_stride + k[None, :]
    value_base = values + k[:, None] * K_STRIDE + n[None, :] * N_STRIDE
    dense_at = tl.multiple_of(tl.load(dense_steps + low), 16)
    value_at = tl.multiple_of(tl.load(value_steps + low), 16)
    total = tl.zeros((TOKEN_TILE, WIDTH), tl.float32)
    for step in range(low, high):
        dense_next = tl.multiple_of(tl.load(dense_steps + step + 1), 16)
        value_next = tl.multiple_of(tl.load(value_steps + step + 1), 16)
        a = tl.load(dense_base + dense_at, mask=live, other=0.0)
        w = tl.load(value_base + value_at)
        if UPCAST:
            a = a.to(tl.float32)
            w = w.to(tl.float32)
        total = tl.dot(a, w, total, input_precision=PRECISION)
        dense_at = dense_next
        value_at = value_next

    place = tile * WIDTH + n
    if HAS_BIAS:
        total += tl.load(bias + place).to(tl.float32)[None, :]
    total = activate(total, ACTIVATION)
    out = result + token.to(tl.int64)[:, None] * result_stride + place[None, :]
    tl.store(out, total.to(result.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["tokens"])
def multiply_few_tokens(
    dense,
    values,
    starts,
    dense_steps,
    value_steps,
    partial_sums,
    tokens,
    dense_stride,
    TOKEN_TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    K_STRIDE: tl.constexpr,
    N_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write the product of one share of a tile's steps: partial_sums [shares, tokens, N] float32.

    Few tokens make few tiles, so the steps are shared out too. The values are the left operand:
    their side of the matrix instruction is the wide one.
    """
    tile = tl.program_id(0)
    share = tl.program_id(1)
    token = tl.arange(0, TOKEN_TILE)
    n = tl.arange(0, WIDTH)
    k = tl.arange(0, STEP)
    live = token[None, :] < tokens

    low = tl.load(starts + tile)
    high = tl.load(starts + tile + 1)
    length = tl.cdiv(high - low, tl.num_programs(1))
    low = tl.minimum(low + share * length, high)
    high = tl.minimum(low + length, high)
    dense_base = dense + token.to(tl.int64)[None, :] * dense_stride + k[:, None]
    value_base = values + k[None, :] * K_STRIDE + n[:, None] * N_STRIDE
    dense_at = tl.multiple_of(tl.load(dense_steps + low), 16)
    value_at = tl.multiple_of(tl.load(value_steps + low), 16)
    total = tl.zeros((WIDTH, TOKEN_TILE), tl.float32)
    for step in range(low, high):
        dense_next = tl.multiple_of(tl.load(dense_steps + step + 1), 16)
        value_next = tl.multiple_of(tl.load(value_steps + step + 1), 16)
        w = tl.load(value_base + value_at)
        a = tl.load(dense_base + dense_at, mask=live, other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            w = w.to(tl.float32)
        total = tl.dot(w, a, total, input_precision=PRECISION)
        dense_at = dense_next
        value_at = value_next

    row = (share * tokens + token).to(tl.int64) * (tl.num_programs(0) * WIDTH)
    tl.store(partial_sums + row[None, :] + (tile * WIDTH + n)[:, None], total, mask=live)


@triton.jit(do_not_specialize=["tokens", "shares"])
def add_partial_sums(
    partial_sums,
    bias,
    result,
    tokens,
    shares,
    width,
    TILE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Write `activate(sum of partial_sums [shares, tokens, width] + bias)`, added in order."""
    token = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    live = n < width
    total = tl.zeros((TILE,), tl.float32)
    for share in range(shares):
        row = partial_sums + (share * tokens + token) * width
        total += tl.load(row + n, mask=live, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=live, other=0.0).to(tl.float32)
    total = activate(total, ACTIVATION)
    tl.store(result + token * width + n, total.to(result.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["tokens"])
def weight_gradient(
    gradient,
    x,
    gradient_columns,
    x_columns,
    value_places,
    result,
    tokens,
    share_size,
    gradient_stride,
    x_stride,
    ROWS: tl.constexpr,
    SLOT: tl.constexpr,
    SLOTS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    SWAP: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write `gradient^T x` over one share of the tokens for SLOTS blocks of one row tile.

    gradient [tokens, N], x [tokens, K], result [shares, share_size]. The blocks' columns of x lie
    side by side in one product, so the tile of the gradient is read once for all of them. A slot
    without a block has a negative value place. SWAP puts x on the left: its side is then the
    wider, which Hopper's matrix instruction wants.
    """
    group = tl.program_id(0)
    share = tl.program_id(1)
    m = tl.arange(0, ROWS)
    wide = tl.arange(0, SLOTS * SLOT)
    slot = group * SLOTS + wide // SLOT
    inside = wide % SLOT
    row = tl.multiple_of(tl.load(gradient_columns + group), 16) + m
    # Without the hint that SLOT columns lie together, x would be read element by element.
    column = tl.load(x_columns + slot) + inside
    column = tl.max_contiguous(tl.multiple_of(column, SLOT), SLOT)
    place = tl.load(value_places + slot)

    steps = tl.cdiv(tokens, STEP)
    length = tl.cdiv(steps, tl.num_programs(1))
    low = tl.minimum(share * length, steps)
    high = tl.minimum(low + length, steps)
    if SWAP:
        total = tl.zeros((SLOTS * SLOT, ROWS), tl.float32)
    else:
        total = tl.zeros((ROWS, SLOTS * SLOT), tl.float32)
    for step in range(low, high):
        token = step * STEP + tl.arange(0, STEP)
        live = token < tokens
        g_base = gradient + token.to(tl.int64) * gradient_stride
        x_base = x + token.to(tl.int64) * x_stride
        if SWAP:
            left = tl.load(x_base[None, :] + column[:, None], mask=live[None, :], other=0.0)
            right = tl.load(g_base[:, None] + row[None, :], mask=live[:, None], other=0.0)
        else:
            left = tl.load(g_base[None, :] + row[:, None], mask=live[None, :], other=0.0)
            right = tl.load(x_base[:, None] + column[None, :], mask=live[:, None], other=0.0)
        if UPCAST:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision=PRECISION)

    out = result + share.to(tl.int64) * share_size
    values = total.to(result.dtype.element_ty)
    if SWAP:
        at = (place + inside)[:, None] + m[None, :] * BLOCK_IN
        tl.store(out + at, values, mask=(place >= 0)[:, None])
    else:
        at = (place + inside)[None, :] + m[:, None] * BLOCK_IN
        tl.store(out + at, values, mask=(place >= 0)[None, :])
