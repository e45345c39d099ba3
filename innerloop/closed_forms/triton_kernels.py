"""Convolution, batch norm, leaky ReLU and max-pooling of many tasks, each with weights of its own, on a GPU.

The formulas are those of ``convolution.py`` and ``norm_act_pool.py``; ``triton_block.py`` calls these kernels. For all:

- Activations are rows of channels: a task has ``rows`` = images * H * W of them, C values each. A weight is
  ``[C, 9, c]``, nine taps of c input channels. The distance from task to task comes as an argument (``.._t``), 0 where
  tasks share a tensor.
- A program belongs to a task (axis 2) and a few channels (axis 1), and of the tiles of rows takes every
  ``programs``-th (axis 0). Sums over rows are left by each program on its own, in ``partials``, and added up by every
  program that reads them, in one order: no atomics, so that the same inputs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(a: tl.tensor, b: tl.tensor, total: tl.tensor, DOT: tl.constexpr) -> tl.tensor:
    """Total + a b, the factors rounded as DOT has it."""
    if DOT == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
    else:
        return tl.dot(a, b, total, input_precision=DOT, out_dtype=total.dtype)


@triton.jit
def add_convolution(
    total: tl.tensor,
    x: tl.tensor,
    w: tl.tensor,
    row: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    H: tl.constexpr,
    W: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BACK: tl.constexpr,
    PACKED: tl.constexpr,
    DOT: tl.constexpr,
    BK: tl.constexpr,
) -> tl.tensor:
    """Total + the convolution of x with w at some rows and channels; BACK: with w turned around, by which dx comes."""
    h, v = row // W % H, row % W
    if PACKED:  # few input channels: taps and channels make one dimension
        for first in range(0, 9 * IN, BK):
            k = first + tl.arange(0, BK)
            dh, dv = k // IN // 3 - 1, k // IN % 3 - 1
            there_h, there_v = h[:, None] + dh[None, :], v[:, None] + dv[None, :]
            inside = (there_h >= 0) & (there_h < H) & (there_v >= 0) & (there_v < W) & (k < 9 * IN)[None, :]
            at = (row[:, None] + (dh * W + dv)[None, :]) * IN + (k % IN)[None, :]
            a = tl.load(x + at, mask=inside & (row < rows)[:, None], other=0.0)
            b = tl.load(
                w + out[None, :] * (9 * IN) + k[:, None], mask=(k < 9 * IN)[:, None] & (out < OUT)[None, :], other=0.0
            )
            total = product(a, b, total, DOT)
    else:
        parts: tl.constexpr = (IN + BK - 1) // BK
        for i in range(9 * parts):
            tap = i // parts
            k = i % parts * BK + tl.arange(0, BK)
            dh, dv = tap // 3 - 1, tap % 3 - 1
            inside = (h + dh >= 0) & (h + dh < H) & (v + dv >= 0) & (v + dv < W) & (row < rows)
            at = (row + dh * W + dv) * IN
            a = tl.load(x + at[:, None] + k[None, :], mask=inside[:, None] & (k < IN)[None, :], other=0.0)
            if BACK:
                of_weight = ((k * 9 + 8 - tap) * OUT)[:, None] + out[None, :]
            else:
                of_weight = ((out * 9 + tap) * IN)[None, :] + k[:, None]
            b = tl.load(w + of_weight, mask=(k < IN)[:, None] & (out < OUT)[None, :], other=0.0)
            total = product(a, b, total, DOT)
    return total


@triton.jit
def convolve(
    x: tl.tensor,
    w: tl.tensor,
    also_x: tl.tensor,
    also_w: tl.tensor,
    bias: tl.tensor,
    made: tl.tensor,
    partials: tl.tensor,
    z: tl.tensor,
    mean: tl.tensor,
    r: tl.tensor,
    rows: tl.tensor,
    x_t: tl.tensor,
    w_t: tl.tensor,
    also_x_t: tl.tensor,
    also_w_t: tl.tensor,
    bias_t: tl.tensor,
    H: tl.constexpr,
    W: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BACK: tl.constexpr,
    FIRST: tl.constexpr,
    ALSO: tl.constexpr,
    BIAS: tl.constexpr,
    SUMS: tl.constexpr,
    TURNS: tl.constexpr,
    REAL: tl.constexpr,
    PACKED: tl.constexpr,
    DOT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    """Made = x * w + also_x * also_w + bias, and sums of it over rows.

    SUMS = 1: the number of rows, their mean, and the sum of squares about it. SUMS = 2, for a tangent: its sum, and
    that with x^ = (z - mean) r.
    """
    program, programs, task = tl.program_id(0), tl.num_programs(0), tl.program_id(2)
    far = task.to(tl.int64)
    out = tl.program_id(1) * BN + tl.arange(0, BN)
    made += far * rows * OUT
    z += far * rows * OUT
    count = tl.zeros([BN], REAL)
    one = tl.zeros([BN], REAL)
    two = tl.zeros([BN], REAL)
    for i in range(TURNS):
        row = (program + i * programs) * BM + tl.arange(0, BM)
        total = tl.zeros([BM, BN], REAL)
        if FIRST:
            total = add_convolution(
                total, x + far * x_t, w + far * w_t, row, out, rows, H, W, IN, OUT, BACK, PACKED, DOT, BK
            )
        if ALSO:
            total = add_convolution(
                total, also_x + far * also_x_t, also_w + far * also_w_t, row, out, rows, H, W, IN, OUT, BACK, PACKED,
                DOT, BK,
            )  # fmt: skip
        if BIAS:
            total += tl.load(bias + far * bias_t + out, mask=out < OUT, other=0.0)[None, :]
        here = (row < rows)[:, None] & (out < OUT)[None, :]
        at = row[:, None] * OUT + out[None, :]
        tl.store(made + at, total, mask=here)
        if SUMS == 1:  # Chan, Golub and LeVeque's formula for two sets made one
            total = tl.where(here, total, 0.0)
            more = tl.zeros([BN], REAL) + tl.maximum(0, tl.minimum(BM, rows - (program + i * programs) * BM))
            middle = tl.sum(total, 0) / tl.maximum(more, 1.0)
            apart = tl.where(here, total - middle[None, :], 0.0)
            step = middle - one
            two += tl.sum(apart * apart, 0) + step * step * (count * more / (count + more))
            count += more
            one += step * (more / count)
        if SUMS == 2:
            scale = tl.load(r + task * OUT + out, mask=out < OUT, other=0.0)
            centre = tl.load(mean + task * OUT + out, mask=out < OUT, other=0.0)
            x_hat = (tl.load(z + at, mask=here, other=0.0) - centre[None, :]) * scale[None, :]
            total = tl.where(here, total, 0.0)
            one += tl.sum(total, 0)
            two += tl.sum(total * x_hat, 0)
    if SUMS:
        to = partials + (task * programs + program) * 3 * OUT + out
        tl.store(to, one, mask=out < OUT)
        tl.store(to + OUT, two, mask=out < OUT)
        tl.store(to + 2 * OUT, count, mask=out < OUT)


@triton.jit
def summed(
    partials: tl.tensor,
    c: tl.tensor,
    which: tl.constexpr,
    PARTS: tl.constexpr,
    C: tl.constexpr,
    REAL: tl.constexpr,
    BP: tl.constexpr,
) -> tl.tensor:
    """What all programs left of one of the three sums, added up."""
    total = tl.zeros([c.shape[0]], REAL)
    for first in range(0, PARTS, BP):
        p = first + tl.arange(0, BP)
        there = (p < PARTS)[:, None] & (c < C)[None, :]
        total += tl.sum(tl.load(partials + (p * 3 + which)[:, None] * C + c[None, :], mask=there, other=0.0), 0)
    return total


@triton.jit
def normalise(
    z: tl.tensor,
    partials: tl.tensor,
    gamma: tl.tensor,
    beta: tl.tensor,
    running_mean: tl.tensor,
    running_variance: tl.tensor,
    y: tl.tensor,
    mean: tl.tensor,
    moved_mean: tl.tensor,
    moved_variance: tl.tensor,
    r: tl.tensor,
    pooled: tl.tensor,
    place: tl.tensor,
    rows: tl.tensor,
    values: tl.tensor,
    gamma_t: tl.tensor,
    beta_t: tl.tensor,
    running_mean_t: tl.tensor,
    running_variance_t: tl.tensor,
    RUNNING: tl.constexpr,
    momentum: tl.constexpr,
    eps: tl.constexpr,
    slope: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    POOL: tl.constexpr,
    PARTS: tl.constexpr,
    TURNS: tl.constexpr,
    REAL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
) -> None:
    """Statistics from the sums over ``values`` rows, running ones moved, and y at ``rows`` of the pooled map."""
    program, programs, task = tl.program_id(0), tl.num_programs(0), tl.program_id(2)
    far = task.to(tl.int64)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    known = c < C
    z += far * values * C
    y += far * rows * C
    pooled += far * rows * C
    place += far * rows * C
    partials += task * PARTS * 3 * C
    centre = tl.zeros([BN], REAL)
    for first in range(0, PARTS, BP):
        p = first + tl.arange(0, BP)
        at, there = (p * 3)[:, None] * C + c[None, :], (p < PARTS)[:, None] & known[None, :]
        means, counts = (
            tl.load(partials + at, mask=there, other=0.0),
            tl.load(partials + at + 2 * C, mask=there, other=0.0),
        )
        centre += tl.sum(means * counts, 0) / values
    spread = tl.zeros([BN], REAL)
    for first in range(0, PARTS, BP):
        p = first + tl.arange(0, BP)
        at, there = (p * 3)[:, None] * C + c[None, :], (p < PARTS)[:, None] & known[None, :]
        means, counts = (
            tl.load(partials + at, mask=there, other=0.0),
            tl.load(partials + at + 2 * C, mask=there, other=0.0),
        )
        squares = tl.load(partials + at + C, mask=there, other=0.0)
        apart = means - centre[None, :]
        spread += tl.sum(squares + counts * apart * apart, 0) / values
    scale = 1.0 / tl.sqrt(spread + eps)
    if program == 0:
        tl.store(mean + task * C + c, centre, mask=known)
        middle = centre
        variance = spread * (values / tl.maximum(values - 1, 1).to(REAL))  # the unbiased one
        if RUNNING:
            before = tl.load(running_mean + far * running_mean_t + c, mask=known, other=0.0)
            middle = before * (1 - momentum) + middle * momentum
            before = tl.load(running_variance + far * running_variance_t + c, mask=known, other=0.0)
            variance = before * (1 - momentum) + variance * momentum
        tl.store(moved_mean + task * C + c, middle, mask=known)
        tl.store(moved_variance + task * C + c, variance, mask=known)
        tl.store(r + task * C + c, scale, mask=known)
    factor = tl.load(gamma + far * gamma_t + c, mask=known, other=0.0)
    shift = tl.load(beta + far * beta_t + c, mask=known, other=0.0)
    sign = tl.where(factor > 0, 1.0, tl.where(factor < 0, -1.0, 0.0)).to(REAL)
    HP: tl.constexpr = H // POOL
    WP: tl.constexpr = W // POOL
    for i in range(TURNS):
        row = (program + i * programs) * BM + tl.arange(0, BM)
        here = (row < rows)[:, None] & known[None, :]
        corner = (row // (HP * WP) * H + row // WP % HP * POOL) * W + row % WP * POOL
        at = corner[:, None] * C + c[None, :]
        star = tl.load(z + at, mask=here, other=0.0)
        to = row[:, None] * C + c[None, :]
        if POOL > 1:
            where = tl.zeros([BM, BN], tl.int32)
            for i in range(1, POOL * POOL):  # the first of equals stays
                other = tl.load(z + at + (i // POOL * W + i % POOL) * C, mask=here, other=0.0)
                better = sign[None, :] * other > sign[None, :] * star
                star = tl.where(better, other, star)
                where = tl.where(better, i, where)
            tl.store(pooled + to, star, mask=here)
            tl.store(place + to, where.to(tl.uint8), mask=here)
        a = (star - centre[None, :]) * (factor * scale)[None, :] + shift[None, :]
        tl.store(y + to, tl.where(a > 0, a, a * slope), mask=here)


@triton.jit
def sums(
    dy: tl.tensor,
    y: tl.tensor,
    star: tl.tensor,
    z_t: tl.tensor,
    place: tl.tensor,
    gamma: tl.tensor,
    gamma_t: tl.tensor,
    beta_t: tl.tensor,
    mean: tl.tensor,
    r: tl.tensor,
    of_tangent: tl.tensor,
    y_t: tl.tensor,
    moments: tl.tensor,
    partials: tl.tensor,
    rows: tl.tensor,
    values: tl.tensor,
    gamma_far: tl.tensor,
    gamma_t_far: tl.tensor,
    beta_t_far: tl.tensor,
    slope: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    POOL: tl.constexpr,
    SECOND: tl.constexpr,
    DY: tl.constexpr,
    GAMMA_T: tl.constexpr,
    BETA_T: tl.constexpr,
    TANGENT_PARTS: tl.constexpr,
    TURNS: tl.constexpr,
    REAL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
) -> None:
    """With DY the sums of da, of da x^* and, with SECOND, of da z.*; with SECOND the tangent y. and E z., m."""
    program, programs, task = tl.program_id(0), tl.num_programs(0), tl.program_id(2)
    far = task.to(tl.int64)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    known = c < C
    centre = tl.load(mean + task * C + c, mask=known, other=0.0)
    scale = tl.load(r + task * C + c, mask=known, other=0.0)
    y += far * rows * C
    star += far * rows * C
    dy += far * rows * C
    y_t += far * rows * C
    place += far * rows * C
    z_t += far * values * C
    if SECOND:
        of_tangent += task * TANGENT_PARTS * 3 * C
        z_mean = summed(of_tangent, c, 0, TANGENT_PARTS, C, REAL, BP) / values
        m = summed(of_tangent, c, 1, TANGENT_PARTS, C, REAL, BP) / values
        if program == 0:
            tl.store(moments + task * 2 * C + c, z_mean, mask=known)
            tl.store(moments + task * 2 * C + C + c, m, mask=known)
        kappa = tl.load(gamma + far * gamma_far + c, mask=known, other=0.0) * scale
        factor_t = tl.zeros([BN], REAL)
        shift_t = tl.zeros([BN], REAL)
        if GAMMA_T:
            factor_t += tl.load(gamma_t + far * gamma_t_far + c, mask=known, other=0.0)
        if BETA_T:
            shift_t += tl.load(beta_t + far * beta_t_far + c, mask=known, other=0.0)
    one = tl.zeros([BN], REAL)
    two = tl.zeros([BN], REAL)
    three = tl.zeros([BN], REAL)
    HP: tl.constexpr = H // POOL
    WP: tl.constexpr = W // POOL
    for i in range(TURNS):
        row = (program + i * programs) * BM + tl.arange(0, BM)
        here = (row < rows)[:, None] & known[None, :]
        at = row[:, None] * C + c[None, :]
        positive = tl.load(y + at, mask=here, other=0.0) > 0
        x_hat = (tl.load(star + at, mask=here, other=0.0) - centre[None, :]) * scale[None, :]
        if DY:
            da = tl.load(dy + at, mask=here, other=0.0)
            da = tl.where(positive, da, da * slope)
            one += tl.sum(da, 0)
            two += tl.sum(da * x_hat, 0)
        if SECOND:
            corner = (row // (HP * WP) * H + row // WP % HP * POOL) * W + row % WP * POOL
            seen = corner[:, None] * C + c[None, :]
            if POOL > 1:
                where = tl.load(place + at, mask=here, other=0).to(tl.int32)
                seen += (where // POOL * W + where % POOL) * C
            z_t_star = tl.load(z_t + seen, mask=here, other=0.0)
            a_t = factor_t[None, :] * x_hat + shift_t[None, :]
            a_t += kappa[None, :] * (z_t_star - z_mean[None, :] - m[None, :] * x_hat)
            tl.store(y_t + at, tl.where(positive, a_t, a_t * slope), mask=here)
            if DY:
                three += tl.sum(da * z_t_star, 0)
    if DY:
        to = partials + (task * programs + program) * 3 * C + c
        tl.store(to, one, mask=known)
        tl.store(to + C, two, mask=known)
        tl.store(to + 2 * C, three, mask=known)


@triton.jit
def spread(
    dy: tl.tensor,
    y: tl.tensor,
    z: tl.tensor,
    z_t: tl.tensor,
    place: tl.tensor,
    gamma: tl.tensor,
    gamma_t: tl.tensor,
    mean: tl.tensor,
    r: tl.tensor,
    moments: tl.tensor,
    partials: tl.tensor,
    dz: tl.tensor,
    dz_t: tl.tensor,
    dgamma: tl.tensor,
    dbeta: tl.tensor,
    dbias: tl.tensor,
    rows: tl.tensor,
    values: tl.tensor,
    gamma_far: tl.tensor,
    gamma_t_far: tl.tensor,
    slope: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    POOL: tl.constexpr,
    SECOND: tl.constexpr,
    GAMMA_T: tl.constexpr,
    PARTS: tl.constexpr,
    TURNS: tl.constexpr,
    REAL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
) -> None:
    """At full size (``values`` rows) dz with dgamma and dbeta; with SECOND also dz., and dgamma. in dgamma's place."""
    program, programs, task = tl.program_id(0), tl.num_programs(0), tl.program_id(2)
    far = task.to(tl.int64)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    known = c < C
    centre = tl.load(mean + task * C + c, mask=known, other=0.0)
    scale = tl.load(r + task * C + c, mask=known, other=0.0)
    kappa = tl.load(gamma + far * gamma_far + c, mask=known, other=0.0) * scale
    y += far * rows * C
    dy += far * rows * C
    place += far * rows * C
    z += far * values * C
    z_t += far * values * C
    dz += far * values * C
    dz_t += far * values * C
    partials += task * PARTS * 3 * C
    s1 = summed(partials, c, 0, PARTS, C, REAL, BP) / values
    s2 = summed(partials, c, 1, PARTS, C, REAL, BP) / values
    if SECOND:
        along = summed(partials, c, 2, PARTS, C, REAL, BP) / values
        z_mean = tl.load(moments + task * 2 * C + c, mask=known, other=0.0)
        m = tl.load(moments + task * 2 * C + C + c, mask=known, other=0.0)
        s2_t = scale * (along - z_mean * s1 - m * s2)
        kappa_t = -kappa * scale * m
        if GAMMA_T:
            kappa_t += tl.load(gamma_t + far * gamma_t_far + c, mask=known, other=0.0) * scale
        if program == 0:
            tl.store(dgamma + task * C + c, values * s2_t, mask=known)
    elif program == 0:
        tl.store(dgamma + task * C + c, values * s2, mask=known)
        tl.store(dbeta + task * C + c, values * s1, mask=known)
        tl.store(dbias + task * C + c, tl.zeros([BN], REAL), mask=known)
    HP: tl.constexpr = H // POOL
    WP: tl.constexpr = W // POOL
    for i in range(TURNS):
        row = (program + i * programs) * BM + tl.arange(0, BM)
        here = (row < values)[:, None] & known[None, :]
        at = row[:, None] * C + c[None, :]
        if POOL > 1:
            h, v = row // W % H, row % W
            pooled = (h < HP * POOL) & (v < WP * POOL)
            source = (row // (H * W) * HP + h // POOL) * WP + v // POOL
            read = source[:, None] * C + c[None, :]
            hit = here & pooled[:, None]
            where = tl.load(place + read, mask=hit, other=0).to(tl.int32)
            hit = hit & (where == (h % POOL * POOL + v % POOL)[:, None])
        else:
            read = at
            hit = here
        da = tl.load(dy + read, mask=hit, other=0.0)
        da = tl.where(tl.load(y + read, mask=hit, other=0.0) > 0, da, da * slope)
        x_hat = (tl.load(z + at, mask=here, other=0.0) - centre[None, :]) * scale[None, :]
        apart = da - s1[None, :] - s2[None, :] * x_hat
        tl.store(dz + at, kappa[None, :] * apart, mask=here)
        if SECOND:
            x_hat_t = tl.load(z_t + at, mask=here, other=0.0) - z_mean[None, :] - m[None, :] * x_hat
            change = s2_t[None, :] * x_hat + (s2 * scale)[None, :] * x_hat_t
            tl.store(dz_t + at, kappa_t[None, :] * apart - kappa[None, :] * change, mask=here)


@triton.jit
def add_weight_gradient(
    total: tl.tensor,
    dz: tl.tensor,
    x: tl.tensor,
    out: tl.tensor,
    tap: tl.tensor,
    c: tl.tensor,
    rows: tl.tensor,
    H: tl.constexpr,
    W: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    TURNS: tl.constexpr,
    DOT: tl.constexpr,
    BK: tl.constexpr,
) -> tl.tensor:
    """Total + the sum over rows of dz at channels ``out`` with x at channels c, ``tap`` away (one, or one a c)."""
    dh, dv = tap // 3 - 1, tap % 3 - 1
    split, splits = tl.program_id(1), tl.num_programs(1)
    for i in range(TURNS):
        row = (split + i * splits) * BK + tl.arange(0, BK)
        there_h, there_v = (row // W % H)[:, None] + dh, (row % W)[:, None] + dv
        inside = (there_h >= 0) & (there_h < H) & (there_v >= 0) & (there_v < W) & (row < rows)[:, None]
        a = tl.load(
            dz + row[:, None] * OUT + out[None, :], mask=(row < rows)[:, None] & (out < OUT)[None, :], other=0.0
        )
        at = (row[:, None] + dh * W + dv) * IN + c[None, :]
        b = tl.load(x + at, mask=inside & (c < IN)[None, :], other=0.0)
        total = product(tl.trans(a), b, total, DOT)
    return total


@triton.jit
def weight_gradient(
    dz: tl.tensor,
    x: tl.tensor,
    also_dz: tl.tensor,
    also_x: tl.tensor,
    made: tl.tensor,
    rows: tl.tensor,
    x_t: tl.tensor,
    also_x_t: tl.tensor,
    H: tl.constexpr,
    W: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    ALSO: tl.constexpr,
    TURNS: tl.constexpr,
    REAL: tl.constexpr,
    PACKED: tl.constexpr,
    DOT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    """Made = wgrad(dz, x) + wgrad(also_dz, also_x); axis 1 of the programs splits the rows."""
    split, splits, far = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    blocks: tl.constexpr = (OUT + BM - 1) // BM
    out = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    column = tl.program_id(0) // blocks
    if PACKED:
        k = column * BN + tl.arange(0, BN)
        taps = k // IN
        tap, c = taps[None, :], tl.where(taps < 9, k % IN, IN)
        to = taps * IN + c
    else:
        parts: tl.constexpr = (IN + BN - 1) // BN
        tap, c = column // parts, column % parts * BN + tl.arange(0, BN)
        to = tap * IN + c
    total = tl.zeros([BM, BN], REAL)
    size = far * rows
    total = add_weight_gradient(total, dz + size * OUT, x + far * x_t, out, tap, c, rows, H, W, IN, OUT, TURNS, DOT, BK)
    if ALSO:
        total = add_weight_gradient(
            total, also_dz + size * OUT, also_x + far * also_x_t, out, tap, c, rows, H, W, IN, OUT, TURNS, DOT, BK
        )
    made += (far * splits + split) * (OUT * 9 * IN)
    tl.store(made + out[:, None] * (9 * IN) + to[None, :], total, mask=(out < OUT)[:, None] & (c < IN)[None, :])


@triton.jit
def add_splits(
    parts: tl.tensor, made: tl.tensor, size: tl.tensor, SPLITS: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Made = the sum of what the splits of a weight gradient found."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    far = tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK], REAL)
    for split in range(SPLITS):
        total += tl.load(parts + (far * SPLITS + split) * size + at, mask=at < size, other=0.0)
    tl.store(made + far * size + at, total, mask=at < size)


@triton.jit
def cross_entropy(
    logits: tl.tensor,
    classes: tl.tensor,
    dy: tl.tensor,
    along: tl.tensor,
    loss: tl.tensor,
    made: tl.tensor,
    ignored: tl.constexpr,
    rows: tl.constexpr,
    C: tl.constexpr,
    ORDER: tl.constexpr,
    REAL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
) -> None:
    """Of a task the loss (ORDER 0), its gradient (1), or its tangent and the gradient's change (2)."""
    far = tl.program_id(0).to(tl.int64)
    logits += far * rows * C
    along += far * rows * C
    made += far * rows * C
    classes += far * rows
    c = tl.arange(0, BN)
    counted = tl.zeros([BM], REAL)
    for i in range((rows + BM - 1) // BM):
        row = i * BM + tl.arange(0, BM)
        counted += tl.where(
            (row < rows) & (tl.load(classes + row, mask=row < rows, other=ignored) != ignored), 1.0, 0.0
        )
    share = 1.0 / tl.sum(counted, 0)
    found = tl.zeros([BM], REAL)
    for i in range((rows + BM - 1) // BM):
        row = i * BM + tl.arange(0, BM)
        here = (row < rows)[:, None] & (c < C)[None, :]
        at = row[:, None] * C + c[None, :]
        which = tl.load(classes + row, mask=row < rows, other=ignored)
        counts = (row < rows) & (which != ignored)
        values = tl.load(logits + at, mask=here, other=float("-inf"))
        values = tl.where((row < rows)[:, None], values, 0.0)
        most = tl.max(values, 1)
        powers = tl.exp(values - most[:, None])
        total = tl.sum(powers, 1)
        p = powers / total[:, None]
        e = tl.where(c[None, :] == which[:, None], 1.0, 0.0).to(REAL)
        if ORDER == 0:
            of_class = tl.sum(tl.where(c[None, :] == which[:, None], values, 0.0), 1)
            lost = tl.where((which >= 0) & (which < C), most + tl.log(total) - of_class, float("nan"))
            found += tl.where(counts, lost, 0.0)
        else:
            scale = share * tl.load(dy + far)
            if ORDER == 1:
                change = scale * (p - e)
            else:
                step = tl.load(along + at, mask=here, other=0.0)
                found += tl.where(counts, tl.sum((p - e) * step, 1), 0.0)
                change = scale * p * (step - tl.sum(p * step, 1)[:, None])
            tl.store(made + at, tl.where(counts[:, None], change, 0.0), mask=here)
    if ORDER != 1:
        tl.store(loss + far, tl.sum(found, 0) * share)
