"""Flash attention in Triton whose factor of q k is the row's multiplier, float32 inside the kernel; gradients included.

A row sees a half-open range of keys: that is all the kernels know of causality, windows and
documents, and loops run over that range only. z is q k scale before the multiplier m, S = m z,
P = softmax(S). The forward keeps zbar_i = sum_j P_ij z_ij, so that the gradient of the multiplier is
centred, dm_i = sum_j dS_ij (z_ij - zbar_i): what rounding adds to a whole row of dS drops out.

Shapes: N queries, S keys, D head size of query and key, E of value; BLOCK_M rows and BLOCK_N keys
make a tile.
"""

import triton
import triton.language as tl


@triton.jit
def keys_of_rows(
    rows, START, END, num_queries, num_keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr
):
    """Return the first key that each row sees and the one after the last."""
    if PACKED:
        first, stop = tl.load(START + rows), tl.load(END + rows)
    else:
        first, stop = rows * 0, rows * 0 + num_keys
    position = rows + (num_keys - num_queries)
    if WINDOW:
        first = tl.maximum(first, position - window + 1)
    if CAUSAL:
        stop = tl.minimum(stop, position + 1)
    return first, stop


@triton.jit
def rows_of_keys(
    keys, START, END, num_queries, num_keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr
):
    """Return the first row that sees each key and the one after the last."""
    if PACKED:
        first, stop = tl.load(START + keys), tl.load(END + keys)
    else:
        first, stop = keys * 0, keys * 0 + num_queries
    own_row = keys - (num_keys - num_queries)
    if CAUSAL:
        first = tl.maximum(first, own_row)
    if WINDOW:
        stop = tl.minimum(stop, own_row + window)
    return first, stop


@triton.jit
def loop_bounds(first, stop, BLOCK: tl.constexpr, PART: tl.constexpr):
    """Return the bounds of one of three loops: the blocks that lie in all ranges (1), and those before (0) and after (2)."""
    lo = tl.min(first, 0) // BLOCK * BLOCK
    hi = tl.max(stop, 0)
    full_lo = (tl.max(first, 0) + BLOCK - 1) // BLOCK * BLOCK
    full_hi = tl.maximum(tl.min(stop, 0), 0) // BLOCK * BLOCK
    some = full_lo < full_hi
    full_lo, full_hi = tl.where(some, full_lo, lo), tl.where(some, full_hi, lo)
    if PART == 0:
        begin, end = lo, full_lo
    elif PART == 1:
        begin, end = full_lo, full_hi
    else:
        begin, end = full_hi, hi
    return begin, end


@triton.jit
def load_rows(X, index, stride, stride_d, seen, SIZE: tl.constexpr, MASKED: tl.constexpr):
    """Load rows of a matrix; hidden rows are zeros."""
    pointers = X + index.to(tl.int64)[:, None] * stride + tl.arange(0, SIZE)[None, :] * stride_d
    return tl.load(pointers, mask=seen[:, None], other=0.0) if MASKED else tl.load(pointers)


@triton.jit
def store_rows(X, index, stride, stride_d, seen, x, SIZE: tl.constexpr):
    """Round and store rows of a matrix."""
    pointers = X + index.to(tl.int64)[:, None] * stride + tl.arange(0, SIZE)[None, :] * stride_d
    tl.store(pointers, x.to(X.dtype.element_ty), mask=seen[:, None])


@triton.jit
def forward_blocks(
    total, mass, moment, top, q, factor, first, stop, lo, hi, K, V, k_s, k_d, v_s, v_e,
    D: tl.constexpr, E: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The online softmax over blocks of keys, with the sum of p z beside the sum of p."""
    low, high = tl.min(first, 0), tl.max(stop, 0)
    for block in range(lo, hi, BLOCK_N):
        keys = block + tl.arange(0, BLOCK_N)
        inside = (keys >= low) & (keys < high)
        k = load_rows(K, keys, k_s, k_d, inside, D, MASKED)
        z = tl.dot(q, tl.trans(k), input_precision="ieee")
        logits = z * factor[:, None]
        if MASKED:
            visible = (keys[None, :] >= first[:, None]) & (keys[None, :] < stop[:, None])
            logits = tl.where(visible, logits, float("-inf"))
        # The maximum of the scaled logits: a negative multiplier makes the smallest z the largest.
        new_top = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(logits - shift[:, None])
        shrink = tl.exp2(top - shift)
        mass = mass * shrink + tl.sum(p, 1)
        moment = moment * shrink + tl.sum(p * z, 1)
        v = load_rows(V, keys, v_s, v_e, inside, E, MASKED)
        total = total * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new_top
    return total, mass, moment, top


@triton.jit
def forward_kernel(
    Q, K, V, M, START, END, OUT, LOGSUMEXP, MEAN_Z,
    q_b, q_h, q_n, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_e, m_b, m_h, m_n, o_b, o_h, o_n, o_e,
    heads, groups, num_queries, num_keys, window, scale,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of rows: the output, log2 of the sum of 2^(logits / log 2), and zbar / scale."""
    blocks = tl.cdiv(num_queries, BLOCK_M)
    index = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = index // heads, index % heads
    # The last rows see most keys, so they go first.
    rows = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < num_queries
    first, stop = keys_of_rows(
        tl.minimum(rows, num_queries - 1), START, END, num_queries, num_keys, window, CAUSAL, WINDOW, PACKED
    )
    alive = inside & (first < stop)
    q = load_rows(Q + batch * q_b + head * q_h, rows, q_n, q_d, alive, D, True)
    m = tl.load(M + batch * m_b + head * m_h + rows.to(tl.int64) * m_n, mask=alive, other=0.0)
    factor = m * (scale * 1.4426950408889634)
    K += batch * k_b + head // groups * k_h
    V += batch * v_b + head // groups * v_h
    total = tl.zeros([BLOCK_M, E], tl.float32)
    mass, moment = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    top = tl.zeros([BLOCK_M], tl.float32) - float("inf")
    for part in tl.static_range(3):
        lo, hi = loop_bounds(first, stop, BLOCK_N, part)
        total, mass, moment, top = forward_blocks(
            total, mass, moment, top, q, factor, first, stop, lo, hi, K, V, k_s, k_d, v_s, v_e, D, E, BLOCK_N, part != 1
        )
    # A row that sees nothing: zeros, and a log-sum-exp under which the backward's P is 0.
    dead = mass == 0
    mass = tl.where(dead, 1.0, mass)
    store_rows(OUT + batch * o_b + head * o_h, rows, o_n, o_e, inside, total / mass[:, None], E)
    of_rows = index * num_queries + rows
    tl.store(LOGSUMEXP + of_rows, tl.where(dead, float("inf"), top + tl.log2(mass)), mask=inside)
    tl.store(MEAN_Z + of_rows, moment / mass, mask=inside)


@triton.jit
def query_blocks(
    dq, dm, q, do, factor, logsumexp, mean_z, row_grad, first, stop, lo, hi, K, V, k_s, k_d, v_s, v_e,
    D: tl.constexpr, E: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The sums over blocks of keys that make dq and dm."""
    low, high = tl.min(first, 0), tl.max(stop, 0)
    for block in range(lo, hi, BLOCK_N):
        keys = block + tl.arange(0, BLOCK_N)
        inside = (keys >= low) & (keys < high)
        k = load_rows(K, keys, k_s, k_d, inside, D, MASKED)
        v = load_rows(V, keys, v_s, v_e, inside, E, MASKED)
        z = tl.dot(q, tl.trans(k), input_precision="ieee")
        logits = z * factor[:, None] - logsumexp[:, None]
        if MASKED:
            visible = (keys[None, :] >= first[:, None]) & (keys[None, :] < stop[:, None])
            logits = tl.where(visible, logits, float("-inf"))
        p = tl.exp2(logits)
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - row_grad[:, None])
        dm += tl.sum(ds * (z - mean_z[:, None]), 1)
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    return dq, dm


@triton.jit
def query_kernel(
    Q, K, V, M, START, END, DO, OUT, LOGSUMEXP, MEAN_Z, ROW_GRAD, DQ, DM,
    q_b, q_h, q_n, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_e, m_b, m_h, m_n, do_b, do_h, do_n, do_e,
    o_b, o_h, o_n, o_e, dq_b, dq_h, dq_n, dq_d,
    heads, groups, num_queries, num_keys, window, scale,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of rows: the gradients of q and m, and <dO, O> of each row for the other kernel."""
    blocks = tl.cdiv(num_queries, BLOCK_M)
    index = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = index // heads, index % heads
    rows = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < num_queries
    first, stop = keys_of_rows(
        tl.minimum(rows, num_queries - 1), START, END, num_queries, num_keys, window, CAUSAL, WINDOW, PACKED
    )
    alive = inside & (first < stop)
    q = load_rows(Q + batch * q_b + head * q_h, rows, q_n, q_d, alive, D, True)
    do = load_rows(DO + batch * do_b + head * do_h, rows, do_n, do_e, alive, E, True)
    o = load_rows(OUT + batch * o_b + head * o_h, rows, o_n, o_e, alive, E, True)
    of_rows = index * num_queries + rows
    row_grad = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(ROW_GRAD + of_rows, row_grad, mask=inside)
    m = tl.load(M + batch * m_b + head * m_h + rows.to(tl.int64) * m_n, mask=alive, other=0.0)
    factor = m * (scale * 1.4426950408889634)
    logsumexp = tl.load(LOGSUMEXP + of_rows, mask=inside, other=float("inf"))
    mean_z = tl.load(MEAN_Z + of_rows, mask=inside, other=0.0)
    K += batch * k_b + head // groups * k_h
    V += batch * v_b + head // groups * v_h
    dq, dm = tl.zeros([BLOCK_M, D], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for part in tl.static_range(3):
        lo, hi = loop_bounds(first, stop, BLOCK_N, part)
        dq, dm = query_blocks(
            dq, dm, q, do, factor, logsumexp, mean_z, row_grad, first, stop, lo, hi,
            K, V, k_s, k_d, v_s, v_e, D, E, BLOCK_N, part != 1,
        )  # fmt: skip
    store_rows(DQ + batch * dq_b + head * dq_h, rows, dq_n, dq_d, inside, dq * (m * scale)[:, None], D)
    tl.store(DM + of_rows, dm * scale, mask=inside)


@triton.jit
def key_blocks(
    dk, dv, k, v, first, stop, lo, hi, Q, DO, M, LOGSUMEXP, ROW_GRAD, q_n, q_d, do_n, do_e, m_n, scale,
    D: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The sums over blocks of rows of one head that make dk and dv."""
    low, high = tl.min(first, 0), tl.max(stop, 0)
    for block in range(lo, hi, BLOCK_M):
        rows = block + tl.arange(0, BLOCK_M)
        inside = (rows >= low) & (rows < high)
        q = load_rows(Q, rows, q_n, q_d, inside, D, MASKED)
        do = load_rows(DO, rows, do_n, do_e, inside, E, MASKED)
        m = tl.load(M + rows.to(tl.int64) * m_n, mask=inside, other=0.0) * scale
        logsumexp = tl.load(LOGSUMEXP + rows, mask=inside, other=float("inf"))
        row_grad = tl.load(ROW_GRAD + rows, mask=inside, other=0.0)
        z = tl.dot(k, tl.trans(q), input_precision="ieee")
        logits = z * (m * 1.4426950408889634)[None, :] - logsumexp[None, :]
        if MASKED:
            visible = (rows[None, :] >= first[:, None]) & (rows[None, :] < stop[:, None])
            logits = tl.where(visible, logits, float("-inf"))
        p = tl.exp2(logits)
        dv += tl.dot(p.to(do.dtype), do, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - row_grad[None, :])
        # The multiplier differs by row: it belongs inside this sum over rows.
        dk += tl.dot((ds * m[None, :]).to(q.dtype), q, input_precision="ieee")
    return dk, dv


@triton.jit
def key_kernel(
    Q, K, V, M, START, END, DO, LOGSUMEXP, ROW_GRAD, DK, DV,
    q_b, q_h, q_n, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_e, m_b, m_h, m_n, do_b, do_h, do_n, do_e,
    dk_b, dk_h, dk_s, dk_d, dv_b, dv_h, dv_s, dv_e,
    heads, groups, num_queries, num_keys, window, scale,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of keys: the gradients of k and v, summed over the rows of all query heads that share it."""
    blocks = tl.cdiv(num_keys, BLOCK_N)
    index = (tl.program_id(0) // blocks).to(tl.int64)
    key_heads = heads // groups
    batch, key_head = index // key_heads, index % key_heads
    keys = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = keys < num_keys
    first, stop = rows_of_keys(
        tl.minimum(keys, num_keys - 1), START, END, num_queries, num_keys, window, CAUSAL, WINDOW, PACKED
    )
    alive = inside & (first < stop)
    k = load_rows(K + batch * k_b + key_head * k_h, keys, k_s, k_d, alive, D, True)
    v = load_rows(V + batch * v_b + key_head * v_h, keys, v_s, v_e, alive, E, True)
    dk, dv = tl.zeros([BLOCK_N, D], tl.float32), tl.zeros([BLOCK_N, E], tl.float32)
    for head in range(key_head * groups, (key_head + 1) * groups):
        q_head = Q + batch * q_b + head * q_h
        do_head = DO + batch * do_b + head * do_h
        m_head = M + batch * m_b + head * m_h
        of_rows = (batch * heads + head) * num_queries
        for part in tl.static_range(3):
            lo, hi = loop_bounds(first, stop, BLOCK_M, part)
            dk, dv = key_blocks(
                dk, dv, k, v, first, stop, lo, hi, q_head, do_head, m_head, LOGSUMEXP + of_rows, ROW_GRAD + of_rows,
                q_n, q_d, do_n, do_e, m_n, scale, D, E, BLOCK_M, part != 1,
            )  # fmt: skip
    store_rows(DK + batch * dk_b + key_head * dk_h, keys, dk_s, dk_d, inside, dk, D)
    store_rows(DV + batch * dv_b + key_head * dv_h, keys, dv_s, dv_e, inside, dv, E)
