"""The bodies of decode's kernels, as plain functions: this module can be imported where there is no Triton.

`triton_launch.py` makes kernels of them when they are first launched. Names in capitals are compiled in. A pointer may be
None; what would use it is then no part of the compiled kernel. A body calls Triton's own operations only: any other function
would have to be a kernel already when this module is imported.
"""

from __future__ import annotations

try:
    import triton.language as tl
except ImportError:  # Nothing here is called then. transformers demands no module that is imported in a try block.
    tl = None


def advance(
    key,
    value,
    alpha,
    omega,
    cos,
    sin,
    leaving_cos,
    leaving_sin,
    tokens,
    slots,
    near,
    place,
    table,
    kept,
    sums,
    decisions,
    granted_place,
    granted,
    granted_count,
    cursor,
    overflow,
    length,
    key_sequence,
    key_head,
    value_sequence,
    value_head,
    alpha_sequence,
    alpha_head,
    omega_sequence,
    omega_head,
    cos_sequence,
    leaving_sequence,
    near_sequence,
    near_head,
    table_sequence,
    table_head,
    kept_sequence,
    kept_head,
    sums_sequence,
    sums_head,
    decisions_sequence,
    decisions_head,
    granted_sequence,
    granted_most,
    count_sequence,
    cells,
    pages,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    LANES: tl.constexpr,
    WINDOW: tl.constexpr,
    MERGES: tl.constexpr,
    ABSORBS: tl.constexpr,
    CLEARS_LAST: tl.constexpr,
    PAGE: tl.constexpr,
    CODED: tl.constexpr,
    NEAR_PAGES: tl.constexpr,
    NEAR_PAGES_PADDED: tl.constexpr,
    NEAR_PAGE: tl.constexpr,
    NEAR_STRIDE: tl.constexpr,
    CELLS_PER_BLOCK: tl.constexpr,
):
    """One token of one row takes effect; one program per (sequence, KV head). See triton.py: advance."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    seen = tl.load(tokens + sequence).to(tl.int32)
    if seen <= 0:
        # No sequence at all: a captured graph may have more of them than the batch of the moment.
        tl.store(length + sequence * HEADS + head, 0)
        return
    before = seen - 1
    at = sequence.to(tl.int64)
    if place is not None:
        at = tl.load(place + sequence).to(tl.int64)
    head_at = head.to(tl.int64)
    sequence_at = sequence.to(tl.int64)
    table += at * table_sequence + head_at * table_head
    kept += at * kept_sequence + head_at * kept_head
    near += at * near_sequence + head_at * near_head
    base: tl.constexpr = WINDOW + 1 if ABSORBS else WINDOW
    # Where pages hold codes, those of kept slots come after NEAR_PAGES others, and count from the first kept slot on.
    beside: tl.constexpr = base if CODED else 0
    first_page: tl.constexpr = NEAR_PAGES if CODED else 0

    # The decision that takes effect, and its token: the one that leaves the ring, or the new one where there is no ring.
    asks = tl.load(alpha + sequence_at * alpha_sequence + head_at * alpha_head)
    # A sequence's first token has nothing to merge into.
    is_merged, is_not_merged = (asks != 0) & (before > 0), (asks == 0) | (before == 0)
    weight = tl.load(omega + sequence_at * omega_sequence + head_at * omega_head).to(tl.float32)
    if WINDOW > 0:
        ring = before % WINDOW
        leaves = before >= WINDOW
        decisions += at * decisions_sequence + head_at * decisions_head + ring
        # A product, since 0 - 0 would lose the sign of a weight of zero.
        decided = tl.where(is_merged, weight, weight * -1.0)
        waited = tl.load(decisions, mask=leaves, other=0.0)
        sign = waited.to(tl.int32, bitcast=True)
        appends, joins = leaves & (sign < 0), leaves & (sign >= 0)
        weight = tl.abs(waited)
    else:
        leaves = before >= 0
        appends, joins = is_not_merged, is_merged

    # The length of the row's list. What was left in memory by another sequence is not read, and no count leaves the table.
    count = tl.where(before > 0, tl.load(kept).to(tl.int32), 0)
    count = tl.minimum(tl.maximum(count, 0), (pages - first_page) * PAGE)
    length_before = tl.where(count > 0, base + count, tl.minimum(before, WINDOW))
    count_after = count + appends.to(tl.int32)
    length_after = tl.where(count_after > 0, base + count_after, tl.minimum(seen, WINDOW))

    # At most one page is new: a list grows by one or two slots, and a page has more. Only those of the ring that are beside
    # pages of codes come all at once.
    new_page = -1
    new_cell = -1
    if cursor is not None:
        opened = (tl.maximum(length_before - beside, 0) + PAGE - 1) // PAGE
        fresh = (length_after - beside > opened * PAGE).to(tl.int32)
        opened += first_page
        if NEAR_PAGES > 0:
            begins = before == 0
            opened, fresh = tl.where(begins, 0, opened), tl.where(begins, NEAR_PAGES, fresh)
        if fresh > 0:
            granted_at = at
            if granted_place is not None:
                granted_at = tl.load(granted_place + at).to(tl.int64)
            count_at = granted_at * count_sequence
            limit = tl.minimum(tl.load(granted_count + count_at).to(tl.int32), granted_most) * CELLS_PER_BLOCK
            limit = tl.where(opened < pages, limit, 0)
            number = tl.atomic_add(cursor + count_at, fresh)
            taken = tl.where(number >= 0, tl.minimum(tl.maximum(limit - number, 0), fresh), 0)
            list_at = granted_at * granted_sequence
            block = tl.load(granted + list_at + number // CELLS_PER_BLOCK, mask=taken > 0, other=0)
            new_page = opened
            new_cell = tl.where(taken > 0, block.to(tl.int32) * CELLS_PER_BLOCK + number % CELLS_PER_BLOCK, -1)
            if NEAR_PAGES > 1:
                # The others; nobody reads their entries before.
                j = 1 + tl.arange(0, NEAR_PAGES_PADDED)
                others = number + j
                block = tl.load(granted + list_at + others // CELLS_PER_BLOCK, mask=j < taken, other=0)
                cell = block.to(tl.int32) * CELLS_PER_BLOCK + others % CELLS_PER_BLOCK
                most = tl.where(begins, tl.minimum(NEAR_PAGES, pages), 0)
                tl.store(table + j, tl.where(j < taken, cell, -1), mask=j < most)
            if taken < fresh:
                # Taken back. The cursor never was below the limit since, so nobody else was refused by it.
                tl.atomic_add(cursor + count_at, taken - fresh)
                tl.store(overflow + count_at, 1)

    i = tl.arange(0, LANES)
    half: tl.constexpr = D // 2
    # Masks are comparisons of i: the interpreter does not take a block of bools and one bool together.
    inside = i < half
    key += sequence_at * key_sequence + head_at * key_head
    value += sequence_at * value_sequence + head_at * value_head
    key_low = tl.load(key + i, mask=inside, other=0.0).to(tl.float32)
    key_high = tl.load(key + half + i, mask=inside, other=0.0).to(tl.float32)
    value_low = tl.load(value + i, mask=inside, other=0.0).to(tl.float32)
    value_high = tl.load(value + half + i, mask=inside, other=0.0).to(tl.float32)

    # [0, half) and [half, D) of what takes effect.
    entering_low, entering_high, entering_value_low, entering_value_high = key_low, key_high, value_low, value_high
    if WINDOW > 0:
        new_cos = tl.load(cos + sequence_at * cos_sequence + i, mask=inside, other=1.0).to(tl.float32)
        new_sin = tl.load(sin + sequence_at * cos_sequence + i, mask=inside, other=0.0).to(tl.float32)
        if CODED and NEAR_PAGES == 0:
            ring_exists = before >= 0
            old = near + ring * (2 * D)
        else:
            ring_page = ring // NEAR_PAGE
            ring_cell = tl.load(table + ring_page, mask=ring_page < pages, other=-1).to(tl.int32)
            ring_cell = tl.where(ring_page == new_page, new_cell, ring_cell)
            ring_exists = (ring_cell >= 0) & (ring_cell < cells)
            old = near + ring_cell.to(tl.int64) * NEAR_STRIDE + ring % NEAR_PAGE * (2 * D)
        held = i < tl.where(leaves & ring_exists, half, 0)
        entering_low = tl.load(old + i, mask=held, other=0.0).to(tl.float32)
        entering_high = tl.load(old + half + i, mask=held, other=0.0).to(tl.float32)
        entering_value_low = tl.load(old + D + i, mask=held, other=0.0).to(tl.float32)
        entering_value_high = tl.load(old + D + half + i, mask=held, other=0.0).to(tl.float32)
    if MERGES:
        turn_cos = tl.load(leaving_cos + sequence_at * leaving_sequence + i, mask=inside, other=1.0).to(tl.float32)
        turn_sin = tl.load(leaving_sin + sequence_at * leaving_sequence + i, mask=inside, other=0.0).to(tl.float32)
        if WINDOW > 0:
            # The ring holds keys rotated; they are merged before rotary embedding. cos and sin may have been rounded.
            norm = turn_cos * turn_cos + turn_sin * turn_sin
            low, high = entering_low, entering_high
            entering_low = (low * turn_cos + high * turn_sin) / norm
            entering_high = (high * turn_cos - low * turn_sin) / norm

    if sums is not None:
        sums += at * sums_sequence + head_at * sums_head
        if MERGES:
            goes_on = joins
        else:
            # What is kept is not added, and a row's first kept token makes the sums zero.
            goes_on = count > 0
            weight = tl.where(appends, 0.0, weight)
        summed = i < tl.where(goes_on, half, 0)
        sum_low = tl.load(sums + i, mask=summed, other=0.0) + entering_low * weight
        sum_high = tl.load(sums + half + i, mask=summed, other=0.0) + entering_high * weight
        sum_value_low = tl.load(sums + D + i, mask=summed, other=0.0) + entering_value_low * weight
        sum_value_high = tl.load(sums + D + half + i, mask=summed, other=0.0) + entering_value_high * weight
        total = tl.load(sums + 2 * D, mask=goes_on, other=0.0) + weight

    last = base - beside + count_after - 1
    last_page = first_page + last // PAGE
    last_cell = tl.load(table + last_page, mask=leaves & (last_page < pages), other=-1).to(tl.int32)
    last_cell = tl.where(last_page == new_page, new_cell, last_cell)
    last_slot = last_cell.to(tl.int64) * PAGE + last % PAGE
    last_exists = leaves & (last >= 0) & (last_cell >= 0) & (last_cell < cells)
    if ABSORBS:
        if CODED and NEAR_PAGES == 0:
            residual_exists = leaves
            residual = near + WINDOW * (2 * D)
        else:
            residual_page: tl.constexpr = WINDOW // NEAR_PAGE
            residual_cell = tl.load(table + residual_page, mask=leaves & (residual_page < pages), other=-1).to(tl.int32)
            residual_cell = tl.where(residual_page == new_page, new_cell, residual_cell)
            residual_exists = leaves & (residual_cell >= 0) & (residual_cell < cells)
            residual = near + residual_cell.to(tl.int64) * NEAR_STRIDE + WINDOW % NEAR_PAGE * (2 * D)

    # All has been read that is overwritten below, maybe by another thread.
    tl.debug_barrier()
    if new_page >= 0:
        tl.store(table + new_page, new_cell, mask=new_page < pages)
    tl.store(kept, count_after)
    tl.store(length + sequence * HEADS + head, tl.minimum(length_after, beside + (pages - first_page) * PAGE))
    if WINDOW > 0:
        tl.store(decisions, decided)

    if sums is not None:
        changes = i < tl.where(leaves, half, 0)
        tl.store(sums + i, sum_low, mask=changes)
        tl.store(sums + half + i, sum_high, mask=changes)
        tl.store(sums + D + i, sum_value_low, mask=changes)
        tl.store(sums + D + half + i, sum_value_high, mask=changes)
        tl.store(sums + 2 * D, total, mask=leaves)
        if ABSORBS:
            # The residual slot's mean; where it holds nothing, attention does not see it.
            total = tl.maximum(total, 7.888609052210118e-31)  # 2**-100
        mean_low = sum_low / total
        mean_high = sum_high / total
        mean_value_low = sum_value_low / total
        mean_value_high = sum_value_high / total

    if MERGES:
        # The slot is written as attention sees it, rotated at its last token's position; again at every token.
        kept_low = mean_low * turn_cos - mean_high * turn_sin
        kept_high = mean_high * turn_cos + mean_low * turn_sin
        if CLEARS_LAST:
            kept_high = tl.where(i == half - 1, 0.0, kept_high)
        kept_value_low, kept_value_high = mean_value_low, mean_value_high
    else:
        last_exists = last_exists & appends
        kept_low, kept_high, kept_value_low, kept_value_high = (
            entering_low,
            entering_high,
            entering_value_low,
            entering_value_high,
        )
    out_type = near.dtype.element_ty
    to = slots + last_slot * (2 * D)
    written = i < tl.where(last_exists, half, 0)
    if CODED:
        if CLEARS_LAST:
            kept_high = tl.where(i == half - 1, 0.0, kept_high)
        for part in tl.static_range(4):
            x = kept_low
            if part == 1:
                x = kept_high
            if part == 2:
                x = kept_value_low
            if part == 3:
                x = kept_value_high
            # float8_e4m3fn by its bits, which every device knows and rounds alike: to the nearest, of two the even one.
            bits = x.to(tl.int32, bitcast=True)
            magnitude = tl.minimum(tl.abs(x), 448.0)
            small = (magnitude * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 15  # steps of 2**-9, below 2**-6
            large = magnitude.to(tl.int32, bitcast=True)
            large = ((large + 0x7FFFF + ((large >> 20) & 1)) >> 20) - (120 << 3)
            code = tl.where(magnitude < 0.015625, small, large)
            code = tl.where(x != x, 0x7F, code) | ((bits >> 24) & 0x80)
            tl.store(to + part * half + i, code.to(tl.uint8), mask=written)
    else:
        tl.store(to + i, kept_low.to(out_type), mask=written)
        tl.store(to + half + i, kept_high.to(out_type), mask=written)
        tl.store(to + D + i, kept_value_low.to(out_type), mask=written)
        tl.store(to + D + half + i, kept_value_high.to(out_type), mask=written)

    if ABSORBS:
        to = residual
        written = i < tl.where(residual_exists, half, 0)
        tl.store(to + i, mean_low.to(out_type), mask=written)
        tl.store(to + half + i, mean_high.to(out_type), mask=written)
        tl.store(to + D + i, mean_value_low.to(out_type), mask=written)
        tl.store(to + D + half + i, mean_value_high.to(out_type), mask=written)

    if WINDOW > 0:
        written = i < tl.where(ring_exists, half, 0)
        tl.store(old + i, (key_low * new_cos - key_high * new_sin).to(out_type), mask=written)
        tl.store(old + half + i, (key_high * new_cos + key_low * new_sin).to(out_type), mask=written)
        tl.store(old + D + i, value_low.to(out_type), mask=written)
        tl.store(old + D + half + i, value_high.to(out_type), mask=written)


def attend(
    query,
    cos,
    sin,
    slots,
    near,
    place,
    table,
    sums,
    length,
    out,
    part,
    weight,
    query_sequence,
    query_head,
    cos_sequence,
    near_sequence,
    near_head,
    table_sequence,
    table_head,
    sums_sequence,
    sums_head,
    cells,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    WINDOW: tl.constexpr,
    BASE: tl.constexpr,
    CLEARS_LAST: tl.constexpr,
    PAGE: tl.constexpr,
    CODED: tl.constexpr,
    NEAR_PAGES: tl.constexpr,
    NEAR_PAGE: tl.constexpr,
    NEAR_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    LEAST: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One share of one row's list; one program per (row, share). See triton.py: attend."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    n = tl.load(length + row)
    share = tl.maximum((n + SPLITS * BLOCK - 1) // (SPLITS * BLOCK) * BLOCK, LEAST)
    start = split * share
    if SPLITS > 1 and start >= n:
        return
    stop = tl.minimum(start + share, n)
    sequence = (row // HEADS).to(tl.int64)
    head = (row % HEADS).to(tl.int64)
    at = sequence
    if place is not None:
        at = tl.load(place + sequence).to(tl.int64)
    table += at * table_sequence + head * table_head
    near += at * near_sequence + head * near_head
    # Of the reserved places only the residual slot is seen, if it holds something.
    residual = -1
    if sums is not None:
        mass = tl.load(sums + at * sums_sequence + head * sums_head + 2 * D)
        residual = tl.where(mass > 0, WINDOW, -1)
        # In powers of two: exp2 is what the hardware has.
        bias = tl.log2(tl.maximum(mass, 7.888609052210118e-31))

    g = tl.arange(0, GROUP_PADDED)
    c = tl.arange(0, D_PADDED)
    t = tl.arange(0, BLOCK)
    half: tl.constexpr = D // 2
    inside = c < D
    given = (g < GROUP)[:, None] & inside[None, :]
    query += sequence * query_sequence + (head * GROUP + g)[:, None] * query_head
    partner = tl.where(c < half, c + half, c - half)
    q = tl.load(query + c[None, :], mask=given, other=0.0).to(tl.float32)
    swapped = tl.load(query + partner[None, :], mask=given, other=0.0).to(tl.float32)
    swapped = tl.where((c < half)[None, :], -swapped, swapped)
    turn_cos = tl.load(cos + sequence * cos_sequence + c, mask=inside, other=1.0).to(tl.float32)
    turn_sin = tl.load(sin + sequence * cos_sequence + c, mask=inside, other=0.0).to(tl.float32)
    q = q * turn_cos[None, :] + swapped * turn_sin[None, :]
    if CLEARS_LAST:
        q = tl.where((c == D - 1)[None, :], 0.0, q)
    number_type: tl.constexpr = near.dtype.element_ty
    q = q.to(number_type)

    # Finite, so that a block in which nothing is seen gives weights of zero and no NaN.
    highest = tl.full([GROUP_PADDED], -1e30, tl.float32)
    total = tl.full([GROUP_PADDED], 0.0, tl.float32)
    acc = tl.full([GROUP_PADDED, D_PADDED], 0.0, tl.float32)
    for first in range(start, stop, BLOCK):
        p = first + t
        sees = p < stop
        if BASE > WINDOW:
            sees = sees & ((p < WINDOW) | (p >= BASE) | (p == residual))
        if CODED:
            is_near = p < BASE
            far = tl.maximum(p - BASE, 0)
            if NEAR_PAGES == 0:
                cell = tl.load(table + far // PAGE, mask=sees & (p >= BASE), other=-1).to(tl.int32)
                sees = sees & (is_near | ((cell >= 0) & (cell < cells)))
                near_slot = near + p * (2 * D)
            else:
                page = tl.where(is_near, p // NEAR_PAGE, NEAR_PAGES + far // PAGE)
                cell = tl.load(table + page, mask=sees, other=-1).to(tl.int32)
                sees = sees & (cell >= 0) & (cell < cells)
                near_slot = near + cell.to(tl.int64) * NEAR_STRIDE + p % NEAR_PAGE * (2 * D)
            slot = slots + (cell.to(tl.int64) * PAGE + far % PAGE) * (2 * D)
            # A block may hold both.
            read = (sees & (p >= BASE))[:, None] & inside[None, :]
            read_near = (sees & is_near)[:, None] & inside[None, :]
            keys = tl.load(near_slot[:, None] + c[None, :], mask=read_near, other=0.0)
            codes = tl.load(slot[:, None] + c[None, :], mask=read, other=0).to(tl.int32)
            given_back = (((codes & 0x7F) << 20) | ((codes & 0x80) << 24)).to(tl.float32, bitcast=True) * 2.0**120
            keys = tl.where(is_near[:, None], keys, given_back.to(number_type))
        else:
            cell = tl.load(table + p // PAGE, mask=sees, other=-1).to(tl.int32)
            sees = sees & (cell >= 0) & (cell < cells)
            slot = slots + (cell.to(tl.int64) * PAGE + p % PAGE) * (2 * D)
            # What is not seen is not read either: it may hold anything.
            read = sees[:, None] & inside[None, :]
            keys = tl.load(slot[:, None] + c[None, :], mask=read, other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        if sums is not None:
            scores += tl.where(p == residual, bias, 0.0)[None, :]
        scores = tl.where(sees[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrinks = tl.exp2(highest - higher)
        if CODED:
            values = tl.load(near_slot[:, None] + (D + c)[None, :], mask=read_near, other=0.0)
            codes = tl.load(slot[:, None] + (D + c)[None, :], mask=read, other=0).to(tl.int32)
            given_back = (((codes & 0x7F) << 20) | ((codes & 0x80) << 24)).to(tl.float32, bitcast=True) * 2.0**120
            values = tl.where(is_near[:, None], values, given_back.to(number_type))
        else:
            values = tl.load(slot[:, None] + (D + c)[None, :], mask=read, other=0.0)
        acc = acc * shrinks[:, None]
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")
        total = total * shrinks + tl.sum(weights, 1)
        highest = higher
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    if SPLITS == 1:
        to = out + (row * GROUP + g)[:, None] * D + c[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), mask=given)
    else:
        to = (row * SPLITS + split).to(tl.int64) * GROUP + g
        tl.store(part + to[:, None] * D + c[None, :], acc, mask=given)
        tl.store(weight + to, tl.where(total > 0, highest + tl.log2(total), float("-inf")), mask=g < GROUP)


def join(
    length,
    out,
    part,
    weight,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    LEAST: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The shares of one row's list together, for one query head; one program per (row, head of its group)."""
    row = tl.program_id(0)
    g = tl.program_id(1)
    n = tl.load(length + row)
    share = tl.maximum((n + SPLITS * BLOCK - 1) // (SPLITS * BLOCK) * BLOCK, LEAST)
    shares = (n + share - 1) // share
    at = row.to(tl.int64) * (SPLITS * GROUP) + g
    s = tl.arange(0, SPLITS)
    c = tl.arange(0, D_PADDED)
    rows: tl.constexpr = 8 if SPLITS > 8 else SPLITS
    highest = tl.max(tl.load(weight + at + s * GROUP, mask=s < shares, other=float("-inf")), 0)
    # Finite: a row of length zero gives zeros and no NaN.
    highest = tl.maximum(highest, -1e30)
    total = 0.0
    acc = tl.full([D_PADDED], 0.0, tl.float32)
    for first in range(0, shares, rows):
        few = first + tl.arange(0, rows)
        weights = tl.exp2(tl.load(weight + at + few * GROUP, mask=few < shares, other=float("-inf")) - highest)
        read = (few < shares)[:, None] & (c < D)[None, :]
        parts = tl.load(part + (at + few * GROUP)[:, None] * D + c[None, :], mask=read, other=0.0)
        acc += tl.sum(weights[:, None] * parts, 0)
        total += tl.sum(weights, 0)
    acc = acc / tl.where(total > 0, total, 1.0)
    tl.store(out + (row * GROUP + g) * D + c, acc.to(out.dtype.element_ty), mask=c < D)


def write(
    chosen,
    ordinal,
    key,
    value,
    slots,
    place,
    table,
    key_sequence,
    key_token,
    key_head,
    value_sequence,
    value_token,
    value_head,
    table_sequence,
    table_head,
    cells,
    pages,
    seq,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BASE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The chosen ones of a block of tokens become slots of one row; one program per (row, block)."""
    row = tl.program_id(0)
    sequence = (row // HEADS).to(tl.int64)
    head = (row % HEADS).to(tl.int64)
    t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = sequence
    if place is not None:
        at = tl.load(place + sequence).to(tl.int64)
    table += at * table_sequence + head * table_head
    token = (sequence * seq + t) * HEADS + head
    is_chosen = tl.load(chosen + token, mask=t < seq, other=0) != 0
    to = BASE + tl.load(ordinal + token, mask=is_chosen, other=0).to(tl.int32)
    page = to // PAGE
    cell = tl.load(table + page, mask=is_chosen & (page >= 0) & (page < pages), other=-1).to(tl.int32)
    exists = is_chosen & (cell >= 0) & (cell < cells)
    slot = cell.to(tl.int64) * PAGE + to % PAGE
    c = tl.arange(0, D_PADDED)
    read = exists[:, None] & (c < D)[None, :]
    t = t.to(tl.int64)
    keys = tl.load(
        key + sequence * key_sequence + t[:, None] * key_token + head * key_head + c[None, :], mask=read, other=0.0
    )
    values = tl.load(
        value + sequence * value_sequence + t[:, None] * value_token + head * value_head + c[None, :],
        mask=read,
        other=0.0,
    )
    out = slots + slot[:, None] * (2 * D) + c[None, :]
    tl.store(out, keys.to(slots.dtype.element_ty), mask=read)
    tl.store(out + D, values.to(slots.dtype.element_ty), mask=read)
