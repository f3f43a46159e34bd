"""Attention of each position to all positions of its row or column, with relative positions on q, k and v.

The formula of Axial-DeepLab (Wang et al. 2020), per line and head, with three learned tables over the offsets:

    logits_ij = s_1 (q_i . k_j) + s_2 (q_i . R_q[i - j]) + s_3 (k_j . R_k[j - i]),      A = softmax over j
    values_i = sum_j A_ij v_j,      positions_i = sum_j A_ij R_v[i - j]

There is no 1 / sqrt(d). The paper applies a batch norm to each of the three parts of the logits. Its shift is equal for
all j, so the softmax ignores it: the norm reduces to three factors per head, s, which need only the variances of the
parts (``logit_moments``). So no three copies of size L x L are normalised, added or kept.

| route | what it does | takes part in |
|---|---|---|
| einsum | the formula as products of whole batches; autograd keeps the weights A | everything |
| recompute | the same in chunks; keeps only q, k, v and recomputes the weights in the backward | eager |
"""

import torch
from torch import Tensor

from sase_blocks.numerics import narrow, widen

from .routes import autocast_active, captured, chunks

AXIAL_ROUTES = ('einsum', 'recompute')


@torch.fx.wrap
def resize_offsets(table: Tensor, length: int) -> Tensor:
    """Resize a table over the offsets -(L0 - 1) .. L0 - 1 to another axis length, (c, 2 L0 - 1) -> (c, 2 L - 1).

    A shorter axis uses the centre columns unchanged; a longer one spreads them evenly and interpolates linearly. One
    formula covers both, without a branch that would fix an exported size.
    """
    built = (table.shape[1] + 1) // 2
    if built == 1:
        if length > 1:
            raise ValueError(
                f'a table built for an axis of length 1 has no other position and cannot be interpolated to '
                f'{length}; build the layer with the size that it will mostly process'
            )
        return table
    offset = torch.arange(1 - length, length, device=table.device)
    # The step is exactly 1 for an axis up to the built length; a longer one ends on the last offset.
    last = offset[-1:].clamp(min=built - 1).to(torch.float64 if table.dtype == torch.float64 else torch.float32)
    position = offset * ((built - 1) / last) + (built - 1)
    lower = position.floor().clamp(0, 2 * built - 3)
    weight = (position - lower).to(table.dtype)
    index = lower.to(torch.int64)
    return table[:, index] * (1 - weight) + table[:, index + 1] * weight


def by_offset(table: Tensor, length: int) -> Tensor:
    """(c, 2 L - 1) -> (c, L, L): the entry for offset i - j at [i, j]."""
    position = torch.arange(length, device=table.device)
    return table[:, position.unsqueeze(1) - position.unsqueeze(0) + length - 1]


def split_tables(relative: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """(2 g, 2 L0 - 1) -> R_q (g / 2, L, L) by [i, j], R_k (g / 2, L, L) by [j, i], R_v (g, L, L) by [i, j]."""
    tables = by_offset(resize_offsets(relative, length), length)
    half = relative.shape[0] // 4
    return tables[:half], tables[half : 2 * half], tables[2 * half :]


def logit_maps(q: Tensor, k: Tensor, r_q: Tensor, r_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three parts of the logits, each (N, heads, L, L), for q and k of shape (N, heads, L, c)."""
    content = torch.einsum('nhic,nhjc->nhij', q, k)
    return content, torch.einsum('nhic,cij->nhij', q, r_q), torch.einsum('nhjc,cji->nhij', k, r_k)


def logit_moments(q: Tensor, k: Tensor, r_q: Tensor, r_k: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the three parts of the logits, per head: (3, heads), (3, heads).

    q, k: (N, heads, L, c). For c <= L no map is computed: a sum of squared products is the product of two c x c
    matrices of second moments. Otherwise the maps are smaller than these matrices and are used.
    """
    n, heads, length, c = q.shape
    if c > length:
        parts = torch.stack(logit_maps(q, k, r_q, r_k)).transpose(1, 2).reshape(3, heads, n * length * length)
        variance, mean = torch.var_mean(parts, 2, correction=0)
        return mean, variance
    count = n * length * length
    by_i, by_j = q.sum(0).transpose(1, 2), k.sum(0).transpose(1, 2)  # (heads, c, L)
    first = [
        (q.sum(2) * k.sum(2)).sum((0, 2)),
        (by_i * r_q.sum(2)).sum((1, 2)),
        (by_j * r_k.sum(2)).sum((1, 2)),
    ]
    second = [
        (torch.einsum('nhic,nhid->nhcd', q, q) * torch.einsum('nhjc,nhjd->nhcd', k, k)).sum((0, 2, 3)),
        (torch.einsum('nhic,nhid->hicd', q, q) * torch.einsum('cij,dij->icd', r_q, r_q)).sum((1, 2, 3)),
        (torch.einsum('nhjc,nhjd->hjcd', k, k) * torch.einsum('cji,dji->jcd', r_k, r_k)).sum((1, 2, 3)),
    ]
    mean = torch.stack(first) / count
    return mean, (torch.stack(second) / count - mean * mean).clamp(min=0)


def attend(
    q: Tensor, k: Tensor, v: Tensor, r_q: Tensor, r_k: Tensor, r_v: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """values and positions (N, heads, L, g), and the weights (N, heads, L, L), for lines (N, heads, L, .).

    In this layout the products that share a table entry, one batch for every i, need no copies on a CPU.
    """
    factor = scale.unsqueeze(2).unsqueeze(3)
    logits = torch.einsum('nhic,nhjc->nhij', q * factor[0], k)
    logits += torch.einsum('nhic,cij->nhij', q * factor[1], r_q)
    logits += torch.einsum('nhjc,cji->nhij', k * factor[2], r_k)
    weights = torch.softmax(logits, 3)
    values = torch.einsum('nhij,nhjc->nhic', weights, v)
    return values, torch.einsum('nhij,cij->nhic', weights, r_v), weights


def einsum(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The route ``einsum``, for arguments in fp32 or fp64. Shapes as in ``axial_attention``."""
    r_q, r_k, r_v = split_tables(relative, q.shape[3])
    values, positions, _ = attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), r_q, r_k, r_v, scale)
    return values.reshape(v.shape), positions.reshape(v.shape)


class RecomputedLines(torch.autograd.Function):
    """``einsum`` that keeps only its inputs, in their own dtype; second derivatives go through ``einsum``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        values, positions = torch.empty_like(v), torch.empty_like(v)
        tables = split_tables(widen(relative), q.shape[3])
        for i, j in chunks(q.shape[0], q.shape[1], q.shape[2] * q.shape[3] ** 2, q):
            ql, kl, vl = (widen(x[i, j]) for x in (q, k, v))
            value, position, _ = attend(ql.flatten(0, 1), kl.flatten(0, 1), vl.flatten(0, 1), *tables, widen(scale))
            values[i, j] = narrow(value, v).reshape(vl.shape)
            positions[i, j] = narrow(position, v).reshape(vl.shape)
        return values, positions

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g_values, g_positions):  # type: ignore[no-untyped-def]
        q, k, v, relative, scale = saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            values, positions = einsum(widen(q), widen(k), widen(v), widen(relative), widen(scale))
            y = narrow(values, v), narrow(positions, v)
            wanted = [x for x, needed in zip(saved, ctx.needs_input_grad, strict=True) if needed]
            found = iter(torch.autograd.grad(y, wanted, (g_values, g_positions), create_graph=True))
            return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)
        if autocast_active(g_values.device):
            with torch.autocast(g_values.device.type, enabled=False):
                return line_gradients(q, k, v, relative, scale, g_values, g_positions)
        return line_gradients(q, k, v, relative, scale, g_values, g_positions)


def line_gradients(
    q: Tensor, k: Tensor, v: Tensor, relative: Tensor, scale: Tensor, g_values: Tensor, g_positions: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of the five inputs of ``RecomputedLines``, chunk by chunk, from these inputs only."""
    with torch.enable_grad():
        table = widen(relative).detach().requires_grad_()
        expanded = split_tables(table, q.shape[3])
    r_q, r_k, r_v = (x.detach() for x in expanded)
    factor = widen(scale).unsqueeze(2).unsqueeze(3)
    gq, gk, gv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    g_tables = [torch.zeros_like(x) for x in (r_q, r_k, r_v)]
    g_scale = torch.zeros_like(widen(scale))
    for i, j in chunks(q.shape[0], q.shape[1], q.shape[2] * q.shape[3] ** 2, q):
        ql, kl, vl, gv_l, gp_l = (widen(x[i, j]).flatten(0, 1) for x in (q, k, v, g_values, g_positions))
        _, _, weights = attend(ql, kl, vl, r_q, r_k, r_v, widen(scale))
        shape = gq[i, j].shape, gv[i, j].shape
        gv[i, j] = narrow(torch.einsum('nhij,nhic->nhjc', weights, gv_l), v).reshape(shape[1])
        g_tables[2] += torch.einsum('nhij,nhic->cij', weights, gp_l)
        g_weights = torch.einsum('nhic,nhjc->nhij', gv_l, vl)
        g_weights += torch.einsum('nhic,cij->nhij', gp_l, r_v)
        g = torch._softmax_backward_data(g_weights, weights, 3, weights.dtype)
        from_k = torch.einsum('nhij,nhjc->nhic', g, kl)  # gradient of q through both parts that contain q
        from_q_table = torch.einsum('nhij,cij->nhic', g, r_q)
        from_q = torch.einsum('nhij,nhic->nhjc', g, ql)
        from_k_table = torch.einsum('nhij,cji->nhjc', g, r_k)
        gq[i, j] = narrow(factor[0] * from_k + factor[1] * from_q_table, q).reshape(shape[0])
        gk[i, j] = narrow(factor[0] * from_q + factor[2] * from_k_table, k).reshape(shape[0])
        g_tables[0] += torch.einsum('nhij,nhic->cij', g, ql * factor[1])
        g_tables[1] += torch.einsum('nhij,nhjc->cji', g, kl * factor[2])
        g_scale[0] += (ql * from_k).sum((0, 2, 3))
        g_scale[1] += (ql * from_q_table).sum((0, 2, 3))
        g_scale[2] += (kl * from_k_table).sum((0, 2, 3))
    (g_relative,) = torch.autograd.grad(expanded, table, g_tables)
    return gq, gk, gv, narrow(g_relative, relative), narrow(g_scale, scale)


def recomputed_lines(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The route ``recompute``. (A function of its own: TorchScript reads every comment about types.)"""
    values, positions = RecomputedLines.apply(q, k, v, relative, scale)
    return values, positions


def long_axis(q: Tensor) -> bool:
    """Whether the weights A, L / g times as large as v, are large enough to recompute.

    Measured on a CPU, forward + backward of AxialSelfAttention with 8 heads: at 56 with 64 channels recompute is as
    fast as einsum and keeps 0.4 of its memory; at 28 with 128 channels it takes 1.35 times as long and keeps 0.6.
    """
    return q.shape[3] >= 4 * q.shape[4]  # L >= 2 g


def run_axial_route(
    q: Tensor, k: Tensor, v: Tensor, relative: Tensor, scale: Tensor, recompute: bool
) -> tuple[Tensor, Tensor]:
    """``axial_attention`` after its checks, outside autocast."""
    if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript skips code only under such a line
        if recompute:
            return recomputed_lines(q, k, v, relative, scale)
    values, positions = einsum(widen(q), widen(k), widen(v), widen(relative), widen(scale))
    values, positions = narrow(values, v), narrow(positions, v)
    if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript skips code only under such a line
        if not captured():  # keep the memory order of v, so a channels_last map stays channels_last
            return torch.empty_like(v).copy_(values), torch.empty_like(v).copy_(positions)
    return values, positions


@torch.fx.wrap
def axial_attention(
    q: Tensor, k: Tensor, v: Tensor, relative: Tensor, scale: Tensor, route: str | None = None
) -> tuple[Tensor, Tensor]:
    """Attention along lines, with relative positions on q, k and v.

    Products and the softmax run in fp32 for half inputs, under autocast too; the results have the dtype of v.

    Args:
        q, k: (B, lines, heads, L, g / 2), any strides.
        v: (B, lines, heads, L, g).
        relative: (2 g, 2 L0 - 1): rows for q (g / 2), k (g / 2) and v (g), columns for the offsets, the middle one
            for offset 0; shared by the heads, resized to L if L0 differs (``resize_offsets``).
        scale: (3, heads): factors of the parts q . k, q . R_q and k . R_k.
        route: one of ``AXIAL_ROUTES``; None chooses: recompute without gradients and for axes with L >= 2 g, else
            einsum; always einsum under a compiler, an exporter or TorchScript. recompute has no forward-mode
            derivative.

    Returns:
        sum A v and sum A R_v, each (B, lines, heads, L, g).

    Raises:
        ValueError: mismatched shapes, an empty map, a table of length 1 for a longer axis, an unknown route, or
            ``'recompute'`` where it does not run.
    """
    forced = 'auto' if route is None else route
    if q.dim() != 5 or q.shape != k.shape or v.dim() != 5 or q.shape[:4] != v.shape[:4] or 2 * q.shape[4] != v.shape[4]:
        raise ValueError(
            f'q and k must be (B, lines, heads, L, g / 2) and v (B, lines, heads, L, g), '
            f'got {q.shape}, {k.shape}, {v.shape}'
        )
    if q.shape[1] < 1 or q.shape[3] < 1:
        raise ValueError(f'attention over an empty map: got {q.shape[1]} lines of length {q.shape[3]}')
    if relative.dim() != 2 or relative.shape[0] != 2 * v.shape[4] or relative.shape[1] % 2 == 0:
        raise ValueError(f'relative must be (2 g, 2 L - 1), got {relative.shape} for v of shape {v.shape}')
    if forced != 'auto' and forced != 'einsum' and forced != 'recompute':
        raise ValueError(f'route must be one of einsum, recompute, got {forced}')
    if torch.jit.is_scripting():
        if forced == 'recompute':
            raise ValueError(
                "the route 'recompute' is an autograd function, which TorchScript cannot run; use 'einsum'"
            )
        return run_axial_route(q, k, v, relative, scale, False)
    else:
        graph = captured()
        if forced == 'recompute' and graph:
            raise ValueError("the route 'recompute' is an autograd function and cannot be captured; use 'einsum'")
        recompute = forced == 'recompute' or (
            forced == 'auto' and not graph and (long_axis(q) or not torch.is_grad_enabled())
        )
        if autocast_active(q.device):
            with torch.autocast(q.device.type, enabled=False):
                return run_axial_route(q, k, v, relative, scale, recompute)
        return run_axial_route(q, k, v, relative, scale, recompute)
