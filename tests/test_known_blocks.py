"""The blocks that people know: each against an independent reference, with the paper's parameter count at C = 256.

References are timm's or torchvision's modules where they are right, with the weights copied over; otherwise the paper's
formula, written out here in plain torch. All in float64, to 1e-9, values and the gradient of the input.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import mostly_slow
from timm.layers import create_attn
from timm.layers.grn import GlobalResponseNorm
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.cspnet import model_cfgs
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg
from timm.models.mobilenetv3 import MobileNetV3
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from sase_blocks import AxialSelfAttention, LocalSelfAttention, create_block, list_blocks
from sase_blocks.blocks import (
    BLOCKS,
    AttentionModule,
    ChannelAttention,
    GatherExcite,
    ParallelAttention,
    SpatialAttention,
    block_graph,
)
from sase_blocks.ops import EXTENDED_SETS, SETS
from sase_blocks.ops.options import options_of, parse_name

Reference = Callable[[nn.Module], Callable[[Tensor], Tensor]]


def weights(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


class HardSigmoid(nn.Module):
    """In the place of torch's, whose slope is 1/6 in fp32 for float64 inputs, too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x + 3) / 6


def timm_module(kind: str, mapping: dict[str, str], **kwargs) -> Reference:
    """timm's attention of that kind with our weights, which keep their order: mapping is from timm's name to ours."""

    def build(ours: nn.Module) -> Callable[[Tensor], Tensor]:
        theirs = create_attn(kind, C, **kwargs).double().train(ours.training)
        own, state = weights(ours), theirs.state_dict()
        copied = {
            key: own[mapping[key]].detach().reshape(value.shape) for key, value in state.items() if key in mapping
        }
        missing = [key for key in state if key not in copied and not key.endswith(STATISTICS) and key not in SKIP]
        assert not missing, missing
        assert len(mapping) == len(list(ours.parameters()))
        theirs.load_state_dict({**state, **copied})
        for part in theirs.modules():
            if isinstance(part, nn.LayerNorm):
                part.eps = 1e-5  # as in GCNet's code and ours; timm's is 1e-6
            if type(getattr(part, 'gate', None)).__name__ in ('HardSigmoid', 'Hardsigmoid'):
                part.gate = HardSigmoid()
        return theirs

    return build


C = 32
SKIP = {'conv_attn.bias'}  # a softmax does not depend on it
STATISTICS = ('running_mean', 'running_var', 'num_batches_tracked')  # both start the same


def torchvision_se(ours: nn.Module) -> Callable[[Tensor], Tensor]:
    theirs = SqueezeExcitation(C, C // 16).double()
    own = weights(ours)
    with torch.no_grad():
        theirs.fc1.weight.copy_(own['excite.fc1.weight'][:, :, None, None])
        theirs.fc2.weight.copy_(own['excite.fc2.weight'][:, :, None, None])
        theirs.fc1.bias.zero_()
        theirs.fc2.bias.zero_()
    return theirs


def batch_norm(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """In training mode, by the definition."""
    dims = [d for d in range(z.dim()) if d != 1]
    shape = [1, -1] + [1] * (z.dim() - 2)
    mean = z.mean(dims, keepdim=True)
    var = ((z - mean) ** 2).mean(dims, keepdim=True)
    return (z - mean) / torch.sqrt(var + 1e-5) * weight.reshape(shape) + bias.reshape(shape)


def bam(ours: nn.Module, d: int = 4) -> Callable[[Tensor], Tensor]:
    w = weights(ours)

    def forward(x: Tensor) -> Tensor:
        hidden = torch.relu(x.mean((2, 3)) @ w['channel_excite.fc1.weight'].T + w['channel_excite.fc1.bias'])
        m_c = hidden @ w['channel_excite.fc2.weight'].T + w['channel_excite.fc2.bias']
        m_c = batch_norm(m_c, w['channel_excite.norm.weight'], w['channel_excite.norm.bias'])[:, :, None, None]
        m_s = x
        for i, dilation in ((0, 1), (2, d), (4, d), (6, 1)):
            weight, bias = w[f'spatial_squeeze.convs.{i}.weight'], w[f'spatial_squeeze.convs.{i}.bias']
            m_s = F.conv2d(m_s, weight, bias, padding=dilation * (weight.shape[2] // 2), dilation=dilation)
            m_s = torch.relu(m_s) if i < 6 else m_s
        m_s = batch_norm(m_s, w['spatial_excite.norm.weight'], w['spatial_excite.norm.bias'])
        return x + x * torch.sigmoid(m_c + m_s)

    return forward


def scse(ours: nn.Module) -> Callable[[Tensor], Tensor]:
    w = weights(ours)

    def forward(x: Tensor) -> Tensor:
        z = torch.relu(x.mean((2, 3)) @ w['channel_excite.fc1.weight'].T) @ w['channel_excite.fc2.weight'].T
        cse = x * torch.sigmoid(z)[:, :, None, None]
        sse = x * torch.sigmoid(F.conv2d(x, w['spatial_squeeze.weight'][None, :, None, None]))
        return cse + sse

    return forward


def srm(ours: nn.Module) -> Callable[[Tensor], Tensor]:
    w = weights(ours)

    def forward(x: Tensor) -> Tensor:
        mean = x.flatten(2).mean(2)
        deviation = ((x.flatten(2) - mean[:, :, None]) ** 2).mean(2).sqrt()
        z = (w['squeeze.0.weight'] * torch.stack([mean, deviation], 2)).sum(2)
        return x * torch.sigmoid(batch_norm(z, w['excite.norm.weight'], w['excite.norm.bias']))[:, :, None, None]

    return forward


def gct(ours: nn.Module) -> Callable[[Tensor], Tensor]:
    w = weights(ours)

    def forward(x: Tensor) -> Tensor:
        s = w['squeeze.0.weight'] * ((x**2).sum((2, 3)) + 1e-5) ** 0.5
        normalised = math.sqrt(x.shape[1]) * s / ((s**2).sum(1, keepdim=True) + 1e-5) ** 0.5
        return x * (1 + torch.tanh(w['excite.weight'] * normalised + w['excite.bias']))[:, :, None, None]

    return forward


def fca(ours: nn.Module, size: tuple[int, int] = (7, 7), frequencies: int = 16) -> Callable[[Tensor], Tensor]:
    """One basis function at a time, for a map of the spectrum's size or pooled to it."""
    w = weights(ours)
    rows = [0, 0, 6, 0, 0, 1, 1, 4, 5, 1, 3, 0, 0, 0, 3, 2]
    columns = [0, 1, 0, 5, 2, 0, 2, 0, 0, 6, 0, 4, 6, 3, 5, 2]
    height, width = size

    def wave(frequency: int, position: int, n: int) -> float:
        value = math.cos(math.pi * frequency * (position + 0.5) / n) / math.sqrt(n)
        return value if frequency == 0 else value * math.sqrt(2)

    def forward(x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(x, size)
        out = []
        for channel in range(C):
            u = rows[channel // (C // frequencies)] * (height // 7)
            v = columns[channel // (C // frequencies)] * (width // 7)
            basis = torch.tensor(
                [[wave(u, i, height) * wave(v, j, width) for j in range(width)] for i in range(height)],
                dtype=torch.float64,
            )
            out.append((pooled[:, channel] * basis).sum((1, 2)))
        q = torch.stack(out, 1)
        z = torch.relu(q @ w['excite.fc1.weight'].T) @ w['excite.fc2.weight'].T
        return x * torch.sigmoid(z)[:, :, None, None]

    return forward


def gsop(ours: nn.Module) -> Callable[[Tensor], Tensor]:
    w = weights(ours)
    p = 'squeeze.0.'

    def forward(x: Tensor) -> Tensor:
        z = F.conv2d(x, w[p + 'reduce.weight'], w[p + 'reduce.bias'])
        z = torch.relu(batch_norm(z, w[p + 'reduce_norm.weight'], w[p + 'reduce_norm.bias'])).flatten(2)
        m = z.shape[2]
        centring = (torch.eye(m, dtype=z.dtype) - torch.ones(m, m, dtype=z.dtype) / m) / m
        covariance = batch_norm(z @ centring @ z.transpose(1, 2), w[p + 'norm.weight'], w[p + 'norm.bias'])
        c = covariance.shape[1]
        kernels = w[p + 'row_weight'].reshape(4 * c, 1, c, 1)
        rows = F.conv2d(covariance.unsqueeze(3), kernels, w[p + 'row_bias'].flatten(), groups=c)
        q = rows.flatten(1) @ w[p + 'fc.weight'].T + w[p + 'fc.bias']
        return x * torch.sigmoid(q)[:, :, None, None]

    return forward


def sge(ours: nn.Module, groups: int = 32) -> Callable[[Tensor], Tensor]:
    w = weights(ours)

    def forward(x: Tensor) -> Tensor:
        out = []
        for i, part in enumerate(x.split(C // groups, 1)):
            c = (part * part.mean((2, 3), keepdim=True)).sum(1, keepdim=True)
            mean = c.mean((2, 3), keepdim=True)
            deviation = ((c - mean) ** 2).mean((2, 3), keepdim=True).sqrt()
            a = w['weight'][i] * (c - mean) / (deviation + 1e-5) + w['bias'][i]
            out.append(part * torch.sigmoid(a))
        return torch.cat(out, 1)

    return forward


def ema(ours: nn.Module, groups: int = 32) -> Callable[[Tensor], Tensor]:
    w = weights(ours)

    def one(x: Tensor) -> Tensor:
        """One group, (B, C / G, H, W)."""
        b, c, height, width = x.shape
        strips = torch.cat([x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)], 2)
        strips = F.conv2d(strips, w['conv1x1.weight'].unsqueeze(3), w['conv1x1.bias'])
        h, v = strips[:, :, :height], strips[:, :, height:].transpose(2, 3)
        x1 = x * torch.sigmoid(h) * torch.sigmoid(v)
        x1 = F.group_norm(x1, c, w['norm_weight'], w['norm_bias'])
        x2 = F.conv2d(x, w['conv3x3.weight'], w['conv3x3.bias'], padding=1)
        first = torch.softmax(x1.mean((2, 3)), 1)[:, None] @ x2.flatten(2)
        second = torch.softmax(x2.mean((2, 3)), 1)[:, None] @ x1.flatten(2)
        return x * torch.sigmoid((first + second).reshape(b, 1, height, width))

    return lambda x: torch.cat([one(part) for part in x.split(C // groups, 1)], 1)


def shuffle(ours: nn.Module) -> Callable[[Tensor], Tensor]:
    """One group at a time, and the channels dealt out one by one."""
    w = weights(ours)
    half = w['norm_weight'].numel()

    def affine(z: Tensor, name: str) -> Tensor:
        return w[f'{name}_weight'][:, None, None] * z + w[f'{name}_bias'][:, None, None]

    def forward(x: Tensor) -> Tensor:
        z = []
        for part in x.split(2 * half, 1):
            first, second = part[:, :half], part[:, half:]
            z.append(first * torch.sigmoid(affine(first.mean((2, 3), keepdim=True), 'channel')))
            normed = F.instance_norm(second, weight=w['norm_weight'], bias=w['norm_bias'])
            z.append(second * torch.sigmoid(affine(normed, 'spatial')))
        z = torch.cat(z, 1)
        return torch.stack([z[:, i] for pair in zip(range(C // 2), range(C // 2, C), strict=True) for i in pair], 1)

    return forward


def simam(ours: nn.Module, e_lambda: float = 1e-4) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        n = x.shape[2] * x.shape[3] - 1
        mean = x.mean((2, 3), keepdim=True)
        var = ((x - mean) ** 2).sum((2, 3), keepdim=True) / n
        energy = 4 * (var + e_lambda) / ((x - mean) ** 2 + 2 * var + 2 * e_lambda)
        return x * torch.sigmoid(1 / energy)

    return forward


def triplet(ours: nn.Module, k: int = 7) -> Callable[[Tensor], Tensor]:
    w = weights(ours)

    def branch(x: Tensor, name: str) -> Tensor:
        """CBAM's spatial gate on x, whatever its second axis is."""
        pooled = torch.cat([x.max(1, keepdim=True).values, x.mean(1, keepdim=True)], 1)
        z = F.conv2d(pooled, w[f'{name}.conv.weight'], padding=k // 2)
        return x * torch.sigmoid(batch_norm(z, w[f'{name}.norm.weight'], w[f'{name}.norm.bias']))

    def forward(x: Tensor) -> Tensor:
        over_h = branch(x.permute(0, 2, 1, 3), 'gate_cw').permute(0, 2, 1, 3)
        over_w = branch(x.permute(0, 3, 2, 1), 'gate_hc').permute(0, 3, 2, 1)
        return (over_h + over_w + branch(x, 'gate_hw')) / 3

    return forward


def depthwise(x: Tensor, weight: Tensor, bias: Tensor, dilation: int = 1) -> Tensor:
    """One tap of the kernel at a time."""
    rows, columns = weight.shape[2:]
    top, left = dilation * (rows // 2), dilation * (columns // 2)
    padded = F.pad(x, (left, left, top, top))
    z = bias[:, None, None].expand_as(x)
    for i, j in itertools.product(range(rows), range(columns)):
        shifted = padded[:, :, i * dilation :, j * dilation :][:, :, : x.shape[2], : x.shape[3]]
        z = z + weight[:, 0, i, j][:, None, None] * shifted
    return z


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.einsum('oc,bchw->bohw', weight[:, :, 0, 0], x) + bias[:, None, None]


def depthwise_stack(ours: nn.Module, *layers: tuple[str, int]) -> Callable[[Tensor], Tensor]:
    """x times a stack of depthwise convolutions, each with its dilation, and a 1x1 convolution."""
    w = weights(ours)

    def forward(x: Tensor) -> Tensor:
        a = x
        for name, dilation in layers:
            a = depthwise(a, w[f'{name}.weight'], w[f'{name}.bias'], dilation)
        return x * conv1x1(a, w['conv1.weight'], w['conv1.bias'])

    return forward


def lka(ours: nn.Module, d: int = 3) -> Callable[[Tensor], Tensor]:
    return depthwise_stack(ours, ('conv0', 1), ('conv_spatial', d))


def lska(ours: nn.Module, d: int = 3) -> Callable[[Tensor], Tensor]:
    return depthwise_stack(ours, ('conv0h', 1), ('conv0v', 1), ('conv_spatial_h', d), ('conv_spatial_v', d))


def msca(ours: nn.Module) -> Callable[[Tensor], Tensor]:
    w = weights(ours)

    def conv(x: Tensor, name: str) -> Tensor:
        return depthwise(x, w[f'{name}.weight'], w[f'{name}.bias'])

    def forward(x: Tensor) -> Tensor:
        scales = [conv(x, 'conv0')]
        scales += [conv(conv(scales[0], f'conv{i}_1'), f'conv{i}_2') for i in range(3)]
        return x * conv1x1(sum(scales), w['conv3.weight'], w['conv3.bias'])

    return forward


def lsk(ours: nn.Module) -> Callable[[Tensor], Tensor]:
    w = weights(ours)

    def layer(function: Callable, x: Tensor, name: str, *rest: int) -> Tensor:
        return function(x, w[f'{name}.weight'], w[f'{name}.bias'], *rest)

    def forward(x: Tensor) -> Tensor:
        u = layer(depthwise, x, 'conv0')
        parts = [layer(conv1x1, u, 'conv1'), layer(conv1x1, layer(depthwise, u, 'conv_spatial', 3), 'conv2')]
        values = torch.cat(parts, 1)
        pooled = torch.stack([values.sum(1) / values.shape[1], values.max(1).values], 1)
        s = layer(F.conv2d, pooled, 'conv_squeeze', 1, w['conv_squeeze.weight'].shape[2] // 2)
        chosen = sum(part / (1 + torch.exp(-s[:, i, None])) for i, part in enumerate(parts))
        return x * layer(conv1x1, chosen, 'conv')

    return forward


def polarized(ours: nn.Module, parallel: bool = True) -> Callable[[Tensor], Tensor]:
    """With the maps of C / 2 channels that the paper writes."""
    w = weights(ours)

    def channel(x: Tensor) -> Tensor:
        query = torch.softmax(torch.einsum('c,bcn->bn', w['channel_query.weight'], x.flatten(2)), 1)
        value = torch.einsum('dc,bcn->bdn', w['channel_value.weight'], x.flatten(2))
        z = torch.einsum('bdn,bn->bd', value, query) @ w['channel_out.weight'].T
        z = (z - z.mean(1, keepdim=True)) / torch.sqrt(z.var(1, keepdim=True, correction=0) + 1e-5)
        return x * torch.sigmoid(z * w['norm_weight'] + w['norm_bias'])[:, :, None, None]

    def spatial(x: Tensor) -> Tensor:
        query = torch.einsum('dc,bcn->bdn', w['spatial_query.weight'], x.flatten(2)).mean(2)
        value = torch.einsum('dc,bcn->bdn', w['spatial_value.weight'], x.flatten(2))
        a = torch.einsum('bd,bdn->bn', torch.softmax(query, 1), value).reshape(x.shape[0], 1, *x.shape[2:])
        return x * torch.sigmoid(a)

    return lambda x: channel(x) + spatial(x) if parallel else spatial(channel(x))


def double(ours: nn.Module) -> Callable[[Tensor], Tensor]:
    """In the order of the paper: A, B and V as maps, the descriptors, the distribution, the last convolution."""
    w = weights(ours)

    def forward(x: Tensor) -> Tensor:
        flat = x.flatten(2)
        a = torch.einsum('mc,bcp->bmp', w['feature.weight'], flat) + w['feature.bias'][:, None]
        b = torch.exp(torch.einsum('nc,bcp->bnp', w['gather.weight'][:, :, 0, 0], flat))
        v = torch.exp(torch.einsum('nc,bcp->bnp', w['distribute.weight'][:, :, 0, 0], flat)
                      + w['distribute.bias'][:, None])  # fmt: skip
        descriptors = torch.einsum('bmp,bnp->bmn', a, b / b.sum(2, keepdim=True))
        z = torch.einsum('bmn,bnp->bmp', descriptors, v / v.sum(1, keepdim=True))
        return x + (torch.einsum('cm,bmp->bcp', w['out.weight'], z) + w['out.bias'][:, None]).reshape(x.shape)

    return forward


def criss_cross(ours: nn.Module, passes: int = 2) -> Callable[[Tensor], Tensor]:
    """One position at a time, with the list of its row and column."""
    w = weights(ours)

    def forward(x: Tensor) -> Tensor:
        _, _, height, width = x.shape
        for _ in range(passes):
            q = conv1x1(x, w['query_conv.weight'], w['query_conv.bias'])
            k = conv1x1(x, w['key_conv.weight'], torch.zeros(1, dtype=x.dtype))
            v = conv1x1(x, w['value_conv.weight'], w['value_conv.bias'])
            z = []
            for i, j in itertools.product(range(height), range(width)):
                cross_k, cross_v = (
                    torch.cat([m[:, :, i], m[:, :, :i, j], m[:, :, i + 1 :, j]], 2) for m in (k, v)
                )  # H + W - 1 positions
                a = torch.softmax((q[:, :, i, j, None] * cross_k).sum(1), 1)
                z.append((a[:, None] * cross_v).sum(2))
            x = x + w['gamma'] * torch.stack(z, 2).reshape(x.shape)
        return x

    return forward


def dual(ours: nn.Module) -> Callable[[Tensor], Tensor]:
    """With the whole matrices of weights."""
    w = weights(ours)

    def forward(x: Tensor) -> Tensor:
        q = conv1x1(x, w['query_conv.weight'], w['query_conv.bias']).flatten(2)
        k = conv1x1(x, w['key_conv.weight'], torch.zeros(1, dtype=x.dtype)).flatten(2)
        v = conv1x1(x, w['value_conv.weight'], w['value_conv.bias']).flatten(2)
        s = torch.softmax(torch.einsum('bdi,bdj->bij', q, k), 2)
        energy = torch.einsum('bip,bjp->bij', x.flatten(2), x.flatten(2))
        r = torch.softmax(energy.amax(2, keepdim=True) - energy, 2)
        p, c = torch.einsum('bij,bcj->bci', s, v), torch.einsum('bij,bjp->bip', r, x.flatten(2))
        return x + (w['position_gamma'] * p + w['channel_gamma'] * c).reshape(x.shape)

    return forward


def timm_sk(ours: nn.Module) -> Callable[[Tensor], Tensor]:
    """timm's module of two paths on all channels, with our weights. Its two selections are one layer."""
    own = weights(ours)
    groups, hidden = C // own['paths.0.0.weight'].shape[1], own['fc.weight'].shape[0]
    theirs = create_attn('sk', C, split_input=False, groups=groups, rd_channels=hidden).double().train()
    names = {f'paths.{i}.{t}.{k}': f'paths.{i}.{o}.{k}' for i in (0, 1) for t, o in (('conv', 0), ('bn', 1))
             for k in ('weight', 'bias')}  # fmt: skip
    names |= {'attn.fc_reduce.weight': 'fc.weight', 'attn.bn.weight': 'norm.weight', 'attn.bn.bias': 'norm.bias'}
    selection = torch.cat([own['select.0.weight'], own['select.1.weight']])
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            copied = selection if name == 'attn.fc_select.weight' else own[names[name]]
            parameter.copy_(copied.reshape(parameter.shape))
    return theirs


def selective_kernel(ours: nn.Module) -> Callable[[Tensor], Tensor]:
    w = weights(ours)
    paths = sum(name.startswith('select') for name in w)

    def forward(x: Tensor) -> Tensor:
        maps = []
        for i in range(paths):
            kernel = w[f'paths.{i}.0.weight']
            u = F.conv2d(x, kernel, padding=i + 1, dilation=i + 1, groups=C // kernel.shape[1])
            maps.append(torch.relu(batch_norm(u, w[f'paths.{i}.1.weight'], w[f'paths.{i}.1.bias'])))
        s = sum(maps).mean((2, 3))
        z = torch.relu(batch_norm(s @ w['fc.weight'].T, w['norm.weight'], w['norm.bias']))
        e = [torch.exp(z @ w[f'select.{i}.weight'].T) for i in range(paths)]
        return sum(u * (part / sum(e))[:, :, None, None] for u, part in zip(maps, e, strict=True))

    return forward


def nam(ours: nn.Module) -> Callable[[Tensor], Tensor]:
    w = weights(ours)

    def forward(x: Tensor) -> Tensor:
        gamma = w['norm.weight']
        share = torch.stack([g.abs() for g in gamma]) / sum(g.abs() for g in gamma)
        return x / (1 + torch.exp(-share[:, None, None] * batch_norm(x, gamma, w['norm.bias'])))

    return forward


def timm_grn(ours: nn.Module) -> Callable[[Tensor], Tensor]:
    theirs = GlobalResponseNorm(C, channels_last=False).double()
    theirs.load_state_dict(ours.state_dict())
    return theirs


def grn(ours: nn.Module) -> Callable[[Tensor], Tensor]:
    w = weights(ours)

    def forward(x: Tensor) -> Tensor:
        g = torch.stack([(x[:, i] ** 2).sum((1, 2)).sqrt() for i in range(C)], 1)
        n = g / (g.mean(1, keepdim=True) + 1e-6)
        return w['weight'][:, None, None] * x * n[:, :, None, None] + w['bias'][:, None, None] + x

    return forward


def caa(ours: nn.Module) -> Callable[[Tensor], Tensor]:
    w = weights(ours)
    k = w['conv_h.weight'].shape[2]

    def forward(x: Tensor) -> Tensor:
        mean = F.conv2d(x, torch.ones(C, 1, 7, 7, dtype=x.dtype) / 49, padding=3, groups=C)
        z = torch.einsum('bchw,oc->bohw', mean, w['conv1.weight'][:, :, 0, 0]) + w['conv1.bias'][:, None, None]
        z = F.conv2d(z, w['conv_w.weight'], w['conv_w.bias'], padding=(0, k // 2), groups=C)
        z = F.conv2d(z, w['conv_h.weight'], w['conv_h.bias'], padding=(k // 2, 0), groups=C)
        z = torch.einsum('bchw,oc->bohw', z, w['conv2.weight'][:, :, 0, 0]) + w['conv2.bias'][:, None, None]
        return x * torch.sigmoid(z)

    return forward


def mlca(ours: nn.Module, s: int = 5, share: float = 0.5) -> Callable[[Tensor], Tensor]:
    w = weights(ours)

    def bounds(i: int, n: int, m: int) -> slice:
        return slice(i * n // m, -(-(i + 1) * n // m))

    def resized(x: Tensor, height: int, width: int) -> Tensor:
        """Adaptive average pooling, one window at a time."""
        h, v = x.shape[2:]
        rows = [[x[:, :, bounds(i, h, height), bounds(j, v, width)].mean((2, 3)) for j in range(width)]
                for i in range(height)]  # fmt: skip
        return torch.stack([torch.stack(row, 2) for row in rows], 2)

    def along(z: Tensor, kernel: Tensor) -> Tensor:
        """Every entry with its neighbours, (B, N) -> (B, N)."""
        k = kernel.numel()
        padded = F.pad(z, (k // 2, k // 2))
        return sum(kernel.flatten()[i] * padded[:, i : i + z.shape[1]] for i in range(k))

    def forward(x: Tensor) -> Tensor:
        cells = resized(x, s, s)
        whole = torch.sigmoid(along(cells.mean((2, 3)), w['conv_global.weight']))
        row = torch.cat([cells[:, :, i, j] for i in range(s) for j in range(s)], 1)
        parts = torch.sigmoid(along(row, w['conv_local.weight'])).split(C, 1)
        a = torch.stack([(1 - share) * whole + share * part for part in parts], 2).unflatten(2, (s, s))
        return x * resized(a, *x.shape[2:])

    return forward


def scsa(ours: nn.Module, heads: int = 1, window: int = 7) -> Callable[[Tensor], Tensor]:
    w = weights(ours)
    n = C // 4

    def strip(s: Tensor, norm: str) -> Tensor:
        parts = []
        for i, part in enumerate(s.split(n, 1)):
            kernel = w[f'convs.{i}.weight']
            parts.append(F.conv1d(part, kernel, w[f'convs.{i}.bias'], padding=kernel.shape[2] // 2, groups=n))
        normed = F.group_norm(torch.cat(parts, 1), 4, w[f'{norm}.weight'], w[f'{norm}.bias'])
        return torch.sigmoid(normed)

    def forward(x: Tensor) -> Tensor:
        z = x * strip(x.mean(3), 'norm_h')[:, :, :, None] * strip(x.mean(2), 'norm_w')[:, :, None, :]
        t = F.avg_pool2d(z, (min(window, x.shape[2]), min(window, x.shape[3])))
        t = F.group_norm(t, 1, w['norm_weight'], w['norm_bias']).flatten(2)
        q, k, v = ((t * w[name][:, None]).unflatten(1, (heads, -1)) for name in ('query', 'key', 'value'))
        scores = torch.einsum('bhin,bhjn->bhij', q, k) / (C // heads) ** 0.5
        out = torch.einsum('bhij,bhjn->bhin', torch.softmax(scores, -1), v).flatten(1, 2)
        return z * torch.sigmoid(out.mean(2))[:, :, None, None]

    return forward


def gam(ours: nn.Module) -> Callable[[Tensor], Tensor]:
    w = weights(ours)
    k = w['conv1.weight'].shape[2] // 2

    def forward(x: Tensor) -> Tensor:
        tokens = x.permute(0, 2, 3, 1)
        hidden = torch.relu(tokens @ w['fc1.weight'][:, :, 0, 0].T + w['fc1.bias'])
        c = (hidden @ w['fc2.weight'][:, :, 0, 0].T + w['fc2.bias']).permute(0, 3, 1, 2)
        z = x * torch.sigmoid(c)
        s = F.conv2d(z, w['conv1.weight'], padding=k)
        s = torch.relu(batch_norm(s, w['norm1.weight'], w['norm1.bias']))
        s = batch_norm(F.conv2d(s, w['conv2.weight'], padding=k), w['norm2.weight'], w['norm2.bias'])
        return z * torch.sigmoid(s)

    return forward


def gather_excite(ours: nn.Module, convs: tuple[int, ...] = (0, 3, 6)) -> Callable[[Tensor], Tensor]:
    """The learned forms of Gather-Excite, at extent 8 with three convolutions."""
    w = weights(ours)

    def forward(x: Tensor) -> Tensor:
        g = x
        for i in convs:
            g = torch.relu(g) if i else g
            g = F.conv2d(g, w[f'gather.{i}.weight'], stride=2, padding=1, groups=C)
            g = batch_norm(g, w[f'gather.{i + 1}.weight'], w[f'gather.{i + 1}.bias'])
        if 'excite.0.weight' in w:
            g = torch.relu(F.conv2d(g, w['excite.0.weight'], w['excite.0.bias']))
            g = F.conv2d(g, w['excite.2.weight'], w['excite.2.bias'])
        return x * torch.sigmoid(F.interpolate(g, size=x.shape[2:], mode='nearest'))

    return forward


def cbam_names() -> dict[str, str]:
    return {
        'channel.fc1.weight': '0.excite.fc1.weight',
        'channel.fc2.weight': '0.excite.fc2.weight',
        'spatial.conv.conv.weight': '1.excite.conv.weight',
        'spatial.conv.bn.weight': '1.excite.norm.weight',
        'spatial.conv.bn.bias': '1.excite.norm.bias',
    }


def same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


mlp = {'fc1.weight': 'excite.fc1.weight', 'fc2.weight': 'excite.fc2.weight'}
context = {
    f'mlp_{{}}.{part}.{kind}': f'excite.{part}.{kind}' for part in ('fc1', 'norm', 'fc2') for kind in ('weight', 'bias')
}


def gc_names(which: str) -> dict[str, str]:
    return {'conv_attn.weight': 'squeeze.0.weight', **{k.format(which): v for k, v in context.items()}}


def ela_reference(groups: int, **kwargs) -> Reference:
    names = same('conv_h.weight', 'conv_w.weight', *(f'norm_{a}.{k}' for a in 'hw' for k in ('weight', 'bias')))
    norm = partial(nn.GroupNorm, groups)
    return timm_module('ela', names, act_layer=nn.Identity, norm_layer=lambda channels, **_: norm(channels), **kwargs)


eca_names = {'conv.weight': 'excite.convs.0.weight'}
ecam_names = {
    f'{t}.{k}': f'excite.{o}.{k}' for t, o in (('conv', 'conv1'), ('conv2', 'conv2')) for k in ('weight', 'bias')
}
coord_names = {
    **same('conv1.weight', 'conv_h.weight', 'conv_w.weight'),
    'bn1.weight': 'norm.weight',
    'bn1.bias': 'norm.bias',
}
scoord_names = same(*(f'{part}.{k}' for part in ('fc1', 'fc_h', 'fc_w') for k in ('weight', 'bias')))
CASES: list[tuple[str, str, Reference]] = [
    ('se', 'timm', timm_module('se', mlp, bias=False, rd_channels=C // 16)),
    ('se', 'torchvision', torchvision_se),
    ('ese', 'timm', timm_module('ese', {'fc.weight': 'excite.fc.weight', 'fc.bias': 'excite.fc.bias'})),
    ('eca', 'timm', timm_module('eca', eca_names)),
    ('ecam', 'timm', timm_module('ecam', ecam_names)),
    ('ceca', 'timm', timm_module('ceca', eca_names)),
    ('cbam', 'timm', timm_module('cbam', cbam_names())),
    ('lcbam', 'timm', timm_module('lcbam', cbam_names())),
    ('gc', 'timm', timm_module('gc', gc_names('scale'), rd_ratio=1 / 16)),
    ('gca', 'timm', timm_module('gca', gc_names('add'), rd_ratio=1 / 16)),
    ('ge', 'timm', timm_module('ge', {}, extent=8, use_mlp=False)),
    ('coord', 'timm', timm_module('coord', coord_names, rd_channels=8)),
    ('scoord', 'timm', timm_module('scoord', scoord_names)),
    ('ela', 'timm', ela_reference(16)),
    ('strip', 'timm', timm_module('strip', same('conv_h.weight', 'conv_w.weight'))),
    ('lka', 'formula', lka),
    ('lska', 'formula', lska),
    ('msca', 'formula', msca),
    ('lsk', 'formula', lsk),
    ('polarized', 'formula', polarized),
    ('a2', 'formula', double),
    ('criss_cross', 'formula', criss_cross),
    ('dual', 'formula', dual),
    ('bam', 'formula', bam),
    ('scse', 'formula', scse),
    ('srm', 'formula', srm),
    ('gct', 'formula', gct),
    ('fca', 'formula', fca),
    ('gsop', 'formula', gsop),
    ('sge', 'formula', sge),
    ('ema', 'formula', ema),
    ('shuffle', 'formula', shuffle),
    ('simam', 'formula', simam),
    ('triplet', 'formula', triplet),
    ('ge_theta', 'formula', gather_excite),
    ('ge_plus', 'formula', gather_excite),
    ('sk', 'timm', timm_sk),
    ('sk', 'formula', selective_kernel),
    ('nam', 'formula', nam),
    ('grn', 'timm', timm_grn),
    ('grn', 'formula', grn),
    ('caa', 'formula', caa),
    ('mlca', 'formula', mlca),
    ('scsa', 'formula', scsa),
    ('gam', 'formula', gam),
]
# The same with other options than the defaults. A formula reads most sizes from the weights.
WITH_OPTIONS: list[tuple[str, Reference]] = [
    ('se(reduction=4)', timm_module('se', mlp, bias=False, rd_channels=C // 4)),
    ('eca(gamma=1, beta=4)', timm_module('eca', eca_names, gamma=1, beta=4)),
    ('eca(kernel_size=7)', timm_module('eca', eca_names, gamma=1)),
    ('ecam(reduction=2, gamma=1, beta=4)', timm_module('ecam', ecam_names, rd_ratio=1 / 2, gamma=1, beta=4)),
    ('ecam(kernel_size=7)', timm_module('ecam', ecam_names, gamma=1)),
    ('ceca(gamma=1, beta=4)', timm_module('ceca', eca_names, gamma=1, beta=4)),
    ('ceca(kernel_size=7)', timm_module('ceca', eca_names, gamma=1)),
    ('cbam(reduction=8, kernel_size=3)', timm_module('cbam', cbam_names(), rd_ratio=1 / 8, spatial_kernel_size=3)),
    ('lcbam(reduction=2, kernel_size=5)', timm_module('lcbam', cbam_names(), rd_ratio=1 / 2, spatial_kernel_size=5)),
    ('gc(reduction=8)', timm_module('gc', gc_names('scale'))),
    ('gca(reduction=4)', timm_module('gca', gc_names('add'), rd_ratio=1 / 4)),
    ('ge(extent=2)', timm_module('ge', {}, extent=2, use_mlp=False)),
    ('ge_theta(extent=4)', partial(gather_excite, convs=(0, 3))),
    ('ge_plus(extent=2, reduction=4)', partial(gather_excite, convs=(0,))),
    ('coord(reduction=2)', timm_module('coord', coord_names, rd_channels=16)),
    ('scoord(reduction=2)', timm_module('scoord', scoord_names, rd_channels=16)),
    ('ela(kernel_size=5, groups=4)', ela_reference(4, kernel_size=5)),
    ('strip(kernel_size=5)', timm_module('strip', same('conv_h.weight', 'conv_w.weight'), kernel_size=5)),
    ('lka(kernel_size=9, dilation=2)', partial(lka, d=2)),
    ('lska(kernel_size=11, dilation=2)', partial(lska, d=2)),
    ('lsk(reduction=4, kernel_size=3)', lsk),
    ('dual(reduction=3)', dual),
    ('criss_cross(reduction=2, recurrence=1)', partial(criss_cross, passes=1)),
    ('a2(reduction=2)', double),
    ('polarized(parallel=False)', partial(polarized, parallel=False)),
    ('bam(reduction=8, dilation=2)', partial(bam, d=2)),
    ('scse(reduction=4)', scse),
    ('fca(frequencies=4, reduction=2)', partial(fca, frequencies=4)),
    ('gsop(rd_channels=8)', gsop),
    ('sge(groups=4)', partial(sge, groups=4)),
    ('ema(groups=8)', partial(ema, groups=8)),
    ('shuffle(groups=4)', shuffle),
    ('simam(e_lambda=0.1)', partial(simam, e_lambda=0.1)),
    ('triplet(kernel_size=3)', partial(triplet, k=3)),
    ('sk(groups=4, reduction=2, min_rd_channels=8)', timm_sk),
    ('sk(num_paths=3, groups=1)', selective_kernel),
    ('caa(kernel_size=5)', caa),
    ('mlca(local_size=3, local_weight=0.25)', partial(mlca, s=3, share=0.25)),
    ('mlca(kernel_size=7)', mlca),
    ('mlca(gamma=1, beta=4)', mlca),
    ('scsa(num_heads=4, window_size=3)', partial(scsa, heads=4, window=3)),
    ('scsa(kernel_sizes=(1, 3, 3, 5))', scsa),
    ('gam(reduction=4, kernel_size=3)', gam),
]


def drawn(module: nn.Module) -> nn.Module:
    """Every parameter away from its start, so that none can hide."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return module


def assert_equals_its_reference(name, reference, size):
    block = drawn(create_block(name, C).double().train())
    x = torch.randn(4, C, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for module in (block, reference(block)):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.backward(torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
        results.append((y.detach(), leaf.grad))
    assert not torch.allclose(results[0][0], x)
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9, msg=lambda text: f'{name}: {text}')


@pytest.mark.parametrize(('name', 'source', 'reference'), CASES, ids=[f'{c[0]}-{c[1]}' for c in CASES])
@pytest.mark.parametrize('size', [(16, 24), (9, 5)], ids=str)
def test_equals_an_independent_reference(name, source, reference, size):
    assert_equals_its_reference(name, reference, size)


def test_equals_an_independent_reference_with_options(one_thread):
    for name, reference in WITH_OPTIONS:
        assert_equals_its_reference(name, reference, (9, 12))


def test_every_known_block_has_a_reference():
    assert {case[0] for case in CASES} == set(list_blocks()) - {'sase'}  # SASE: test_golden.py
    told = [parse_name(name) for name, _ in WITH_OPTIONS]
    for name, build in BLOCKS.items():
        given = {option for other, options in told for option in options if other == name}
        assert name == 'sase' or given == set(options_of(build)), name


def test_attention_over_positions_keeps_no_map_of_all_pairs():
    """What is kept for the backward pass. All pairs of the positions would be 16 times as much as x."""
    x = torch.randn(2, 16, 16, 16)
    for name, most in (('polarized', 1), ('a2', 1), ('criss_cross', 2), ('dual', 1)):
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            create_block(name, 16)(x.clone().requires_grad_())
        assert max(kept) <= most * x.numel(), (name, max(kept) / x.numel())


def test_fca_of_a_large_map():
    """As the authors: the spectrum of a 14 x 14 map has frequencies twice as high."""
    block = drawn(create_block('fca', C, feat_size=14).double())
    x = torch.randn(2, C, 14, 14, dtype=torch.float64)
    torch.testing.assert_close(block(x), fca(block, (14, 14))(x), rtol=1e-9, atol=1e-9)


R = 256 // 16
PARAMETERS = {
    'sase': 2 + 2 * 256 * R + 2 * 256 + 2 + 2 + 2 * 9,
    'se': 2 * 256 * R,
    'ese': 256 * 256 + 256,
    'eca': 5,
    'ecam': 2 * 32 + 32 * 5 + 1,
    'ceca': 5,
    'cbam': 2 * 256 * R + 2 * 49 + 2,
    'lcbam': 2 * 256 * R + 49 + 2,
    'bam': (2 * 256 * R + R + 256 + 2 * 256) + (256 * R + R + 2 * (9 * R * R + R) + R + 1 + 2),
    'scse': 256 * 256 + 256,
    'gc': 256 + 2 * 256 * R + R + 256 + 2 * R,
    'gca': 256 + 2 * 256 * R + R + 256 + 2 * R,
    'ge': 0,
    'ge_theta': 3 * (9 * 256 + 2 * 256),
    'ge_plus': 3 * (9 * 256 + 2 * 256) + 2 * 256 * R + R + 256,
    'srm': 4 * 256,
    'gct': 3 * 256,
    'fca': 2 * 256 * R,
    'gsop': (256 * 128 + 128 + 2 * 128) + 2 * 128 + (4 * 128 * 128 + 4 * 128) + (4 * 128 * 256 + 256),
    'sge': 2 * 64,
    'ema': (8 * 8 + 8) + (9 * 8 * 8 + 8) + 2 * 8,
    'shuffle': 6 * 2,
    'simam': 0,
    'triplet': 3 * (2 * 49 + 2),
    'coord': 3 * 256 * 8 + 2 * 8,
    'scoord': 3 * 256 * 40 + 40 + 2 * 256,
    'ela': 2 * 7 * 256 + 4 * 256,
    'strip': 2 * 3 * 256,
    'lka': (25 + 49 + 2) * 256 + 256 * 256 + 256,
    'lska': (2 * 5 + 2 * 7 + 4) * 256 + 256 * 256 + 256,
    'dual': 2 * 256 * 32 + 32 + 256 * 256 + 256 + 2,
    'criss_cross': 2 * 256 * 32 + 32 + 256 * 256 + 256 + 1,
    'a2': 4 * 256 * 64 + 2 * 64 + 256,
    'polarized': 256 + 4 * 256 * 128 + 2 * 256,
    'lsk': (25 + 49 + 2) * 256 + 3 * 256 * 128 + 2 * 128 + 256 + 4 * 49 + 2,
    'msca': (25 + 2 * 7 + 2 * 11 + 2 * 21 + 7) * 256 + 256 * 256 + 256,
    'sk': 2 * (9 * 256 * 8 + 2 * 256) + 256 * 32 + 2 * 32 + 2 * 32 * 256,
    'nam': 2 * 256,
    'grn': 2 * 256,
    'caa': 2 * (256 * 256 + 256) + 2 * (11 * 256 + 256),
    'mlca': 2 * 5,
    'scsa': 64 * (3 + 5 + 7 + 9 + 4) + 2 * 2 * 256 + 2 * 256 + 3 * 256,
    'gam': (2 * 256 * R + R + 256) + 2 * 49 * 256 * R + 2 * R + 2 * 256,
}


def test_parameter_counts():
    counts = {name: sum(p.numel() for p in create_block(name, 256).parameters()) for name in list_blocks()}
    assert counts == PARAMETERS


@pytest.mark.parametrize('name', list_blocks())
def test_graph_and_docstring(name):
    graph = block_graph(name)
    assert graph.formula.startswith('y = ')
    reached = {'x'}
    for _ in graph.nodes:
        reached |= {edge.target for edge in graph.edges if edge.source in reached}
    assert reached == set(graph.nodes)
    for edge in graph.edges:
        assert edge.set_name is None or parse_name(edge.label)[0] in EXTENDED_SETS[edge.set_name]
    first = BLOCKS[name].__doc__.strip().split('\n')[0]
    assert 'arXiv' in first or 'no paper' in BLOCKS[name].__doc__ or name in ('simam', 'sase', 'strip', 'mlca'), first


@pytest.mark.parametrize('extent', [0, 1, 3, 6, True, '8'])
def test_wrong_extent(extent):
    with pytest.raises(ValueError, match='power of 2'):
        GatherExcite(8, extent=extent)


WRONG_COMPOSITIONS = [
    (lambda: ChannelAttention(8, ('avg', 'max'), 'affine'), "'affine' ends in a gate.*summed.*mlp"),
    (lambda: ChannelAttention(8, 'avg', 'fc', add=True), "'fc' ends in a gate.*added"),
    (lambda: ChannelAttention(8, ()), 'at least one statistic'),
    (lambda: ChannelAttention(8, 'average'), "'average' is not a channel squeeze; did you mean 'avg'"),
    (lambda: SpatialAttention(8, ('avg', 'max'), 'conv7x7'), "excite='conv_norm', got 'conv7x7'"),
    (lambda: ParallelAttention(8, ('avg', 'affine'), ('avg', 'norm'), joint=True), 'joint=True sums values'),
    (lambda: ParallelAttention(8, ('avg', 'mlp'), ('avg', 'mlp')), "'mlp' is not a spatial excite"),
    (lambda: SpatialAttention(8, 'avg', 'conv7x7_norm'), "'conv7x7_norm' is now 'conv_norm'"),
    (lambda: ChannelAttention(8, 'avg', 'mlp_half'), r"'mlp_half' is now 'mlp\(reduction=2\)'"),
    (lambda: ChannelAttention(8, 'avg', 'mlp(rd=2)'), "mlp has no option 'rd'; it has reduction"),
]


@pytest.mark.parametrize(('build', 'text'), WRONG_COMPOSITIONS)
def test_wrong_compositions(build, text):
    with pytest.raises(ValueError, match=text):
        build()


def test_the_paper_sets_stay_as_they_are():
    for set_name, table in SETS.items():
        assert len(table) == 7
        assert list(EXTENDED_SETS[set_name].items())[:7] == list(table.items())
        assert all(cls.paper_key for cls in table.values())
        assert not any(cls.paper_key for name, cls in EXTENDED_SETS[set_name].items() if name not in table)


@pytest.mark.parametrize('name', mostly_slow(list_blocks(), 'sase', 'cbam', 'coord', 'triplet', 'gsop'))
def test_in_timms_slot(name):
    torch.manual_seed(0)
    model = timm.create_model(
        'resnet10t', block_args={'attn_layer': partial(create_block, name)}, num_classes=2, zero_init_last=False
    )
    model.train()(torch.randn(2, 3, 40, 48)).sum().backward()
    inside = [(key, p) for key, p in model.named_parameters() if '.se.' in key]
    assert (len(inside) > 0) == (PARAMETERS[name] > 0)
    assert all(p.grad is not None and p.grad.isfinite().all() for _, p in inside)


# A small model of each family of timm that takes an attention from outside, and how.
SLOTS: list[tuple[str, Callable[[object], dict]]] = [
    ('resnet10t', lambda layer: {'block_args': {'attn_layer': layer}}),
    ('res2net50_14w_8s', lambda layer: {'block_args': {'attn_layer': layer}, 'layers': (1, 1, 1, 1)}),
    ('skresnet18', lambda layer: {'block_args': {'attn_layer': layer}}),
    ('gernet_s', lambda layer: {'attn_layer': layer}),
    ('repvgg_a0', lambda layer: {'attn_layer': layer}),
    ('nf_regnet_b0', lambda layer: {'attn_layer': layer, 'depths': (1, 1, 1, 1), 'attn_kwargs': {}}),
    ('cs3darknet_s', lambda layer: {'stages': replace(model_cfgs['cs3darknet_s'].stages, attn_layer=(layer,) * 4)}),
    ('ese_vovnet19b_slim', lambda layer: {'attn': layer}),
    ('efficientnet_b0', lambda layer: {'se_layer': layer}),
]


def small_mobilenetv3(layer: object) -> nn.Module:
    return MobileNetV3(decode_arch_def([['ir_r9_k3_s2_e2_c16_se0.25']]), se_layer=layer)


def small_maxxvit(layer: object) -> nn.Module:
    conv_cfg = MaxxVitConvCfg(attn_layer=layer)
    return MaxxVit(MaxxVitCfg(embed_dim=(16,), depths=(8,), block_type=('C',), stem_width=8, conv_cfg=conv_cfg), 64)


@pytest.mark.parametrize('name', ['se', *(pytest.param(n, marks=pytest.mark.slow) for n in ('cbam', 'gca', 'coord'))])
@pytest.mark.parametrize(('model', 'arguments'), SLOTS, ids=[slot[0] for slot in SLOTS])
def test_in_every_family_with_a_slot(model, arguments, name):
    net = timm.create_model(model, num_classes=2, **arguments(partial(create_block, name))).eval()
    plain = timm.create_model(model, num_classes=2)
    assert any(isinstance(module, AttentionModule) for module in net.modules())
    assert not any(isinstance(module, AttentionModule) for module in plain.modules())
    assert net(torch.randn(1, 3, 64, 64)).isfinite().all()


# Those above, our own, and two that take the attention by their class only. Some families tell a block when the network
# starts its branches at zero, so both ways are asked.
BOTH_WAYS = ('resnet10t', 'skresnet18', 'gernet_s', 'cs3darknet_s', 'resnet20_cifar')
FAMILIES: list[tuple[str | Callable[[object], nn.Module], Callable[[object], dict]]] = [
    *SLOTS,
    ('resnet20_cifar', SLOTS[0][1]),
    *(
        (name, lambda layer, make=make: {**make(layer), 'zero_init_last': False})
        for name, make in (*SLOTS, ('resnet20_cifar', SLOTS[0][1]))
        if name in BOTH_WAYS
    ),
    (small_mobilenetv3, lambda layer: {'layer': layer}),
    (small_maxxvit, lambda layer: {'layer': layer}),
]


@pytest.mark.parametrize(('model', 'arguments'), FAMILIES, ids=lambda value: getattr(value, '__name__', value))
def test_a_block_keeps_its_initialisation_in_every_family(model, arguments):
    """What stands in the slots in the end is what the block drew last, by itself or when it was asked to."""
    drawn = {}
    names = itertools.cycle(['cbam', 'sase', 'gsop', 'ese', 'bam', 'gc', 'ge_plus', 'ema', 'scoord', 'lcbam'])

    def watched(channels: int, **kwargs) -> nn.Module:
        block = create_block(next(names), channels, **kwargs)
        for part in block.modules():
            if isinstance(part, AttentionModule):

                def reset(part=part, own=part.reset_parameters) -> None:
                    own()
                    drawn[part] = {key: value.clone() for key, value in part.state_dict().items()}

                reset()
                part.reset_parameters = reset
        return block

    build = partial(timm.create_model, model, num_classes=2) if isinstance(model, str) else model
    net = build(**arguments(watched))
    placed = [module for module in net.modules() if isinstance(module, AttentionModule)]
    assert len(placed) >= 3
    for part in placed:
        changed = [key for key, value in part.state_dict().items() if not torch.equal(value, drawn[part][key])]
        assert changed == [], part


# What the initialisations of timm, torchvision and others look for, and set norms to.
FOUND = (nn.Conv2d, nn.Linear, nn.Embedding)
NORMS = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
LAYERS: dict[str, Callable[..., nn.Module]] = {
    **{f'{kind}/{name}': cls for kind, table in EXTENDED_SETS.items() for name, cls in table.items()},
    **BLOCKS,
    'local': lambda channels, feat_size: LocalSelfAttention(channels),
    'axial': lambda channels, feat_size: AxialSelfAttention(channels, size=feat_size),
}


@pytest.mark.parametrize('build', LAYERS.values(), ids=LAYERS)
def test_no_network_finds_the_layers_of_a_block(build):
    for name, module in build(32, feat_size=(7, 6)).named_modules():
        assert not isinstance(module, FOUND), f'{name}: take ops.Conv2d and ops.Linear'
        if isinstance(module, NORMS):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
