"""Replace convolutions of a network by one of TrioNet's operators (after arXiv 2111.07547), in place. Our addition."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from sase_blocks.models.slots import check_stages
from sase_blocks.profiling import quietly
from sase_blocks.selfattention import OPERATORS, build_operator
from sase_blocks.selfattention.routes import check_choice

from .families import numbered_blocks
from .insertion import check_optimizer, example_of, extend_optimizer
from .places import Where
from .refusal import check_changeable
from .surgery import hand_on

__all__ = ['replace_convolutions']


def replace_convolutions(
    model: nn.Module,
    operator: str,
    where: Where = None,
    *,
    stages: int | tuple[int, ...] | None = None,
    kernel_size: int | None = None,
    heads: int = 8,
    input_size: int | tuple[int, ...] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[str]:
    """Replace convolutions that keep their channels by local or axial self-attention, or by another convolution.

    The new operators are untrained, and the names of all other parameters stay. A norm after the convolution then
    follows the operator. Device, dtype and train or eval mode are the convolution's. One operator replaces a shared
    convolution in all its places, even if ``where`` matches only one of them.

    Args:
        model: the network.
        operator: 'conv', 'local' or 'axial'.
        where: None for the 3 x 3 convolutions of the residual blocks of a known network; a pattern over module names,
            ``'layer4.*.conv2'``; or a function ``(name, module) -> bool``.
        stages: only these stages of a known network, counted from 1.
        kernel_size: size of the window or of the new convolution; see ``build_operator``.
        heads: number of heads of the attentions.
        input_size: image size for the forward that finds axial attention's feature sizes: an int, (H, W) or (C, H, W).
            Default: a timm model's own.
        optimizer: drops the parameters of the convolutions, and gets those of the operators as in ``insert``.

    Returns:
        The names of the replaced convolutions, all names of a shared one in sequence.

    Raises:
        TypeError, ValueError: a network that cannot be changed (see ``insert``), no match, a match other than a plain
            convolution with equal input and output channels and stride 1 or 2, channels that the heads do not divide,
            or axial attention without an input size. The model is unchanged.
    """
    check_changeable(model, 'replace convolutions in', compiled_parts=True)
    check_choice('operator', operator, tuple(OPERATORS))
    check_optimizer(optimizer, model)
    found: dict[str, Any] = {}
    for name, conv in _matching(model, where, stages):
        if not any(conv is other for other in found.values()):
            found[name] = conv
    if not found:
        raise ValueError(_nothing_found(model, where, stages))
    for name, conv in found.items():
        if reason := _why_not(conv):
            raise ValueError(f'{name} cannot be replaced: {reason}')
    sizes = _feature_sizes(model, found, input_size) if operator == 'axial' else {}
    built = {}
    for name, conv in found.items():
        options: dict[str, Any] = {'size': sizes[name]} if name in sizes else {}
        new, _ = build_operator(
            operator, conv.out_channels, conv.stride[0], kernel_size, heads, dtype=conv.weight.dtype, **options
        )
        built[name] = new.to(conv.weight.device).train(conv.training)
    new_for = {id(found[name]): new for name, new in built.items()}
    names = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if id(module) in new_for]
    groups = [] if optimizer is None else [dict(group) for group in optimizer.param_groups]
    gone: dict[int, nn.Parameter] = {}
    try:
        for name, module in names:
            hand_on(module, new_for[id(module)])
            _put(model, name, new_for[id(module)])
        if optimizer is not None:
            gone = {id(p): p for conv in found.values() for p in conv.parameters()}
            for parameter in model.parameters():
                gone.pop(id(parameter), None)
            _give_up(optimizer, set(gone))
            extend_optimizer(optimizer, model, {id(p) for new in built.values() for p in new.parameters()})
    except BaseException:
        for name, module in names:
            _put(model, name, module)
        if optimizer is not None:
            del optimizer.param_groups[len(groups) :]
            for group, before in zip(optimizer.param_groups, groups, strict=True):
                group.update(before)
        raise
    for parameter in gone.values():
        if optimizer is not None:
            optimizer.state.pop(parameter, None)
    return [name for name, _ in names]


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition('.')
    setattr(model.get_submodule(parent), child, module)


def _give_up(optimizer: torch.optim.Optimizer, gone: set[int]) -> None:
    """Remove parameters from an optimizer's groups. A group without any left stays, empty."""
    for group in optimizer.param_groups:
        kept = [index for index, p in enumerate(group['params']) if id(p) not in gone]
        for key in ('params', 'param_names'):
            if key in group:
                group[key] = [group[key][index] for index in kept]


def _nothing_found(model: nn.Module, where: Where, stages: Any) -> str:
    """The error if nothing matches: what was searched, and what the network has instead."""
    if where is not None:
        within = '' if stages is None else f' in the stages {stages!r}'
        return f'where={where!r} matches no module{within} of this {type(model).__name__}'
    message = f'no residual block of this {type(model).__name__} has a 3 x 3 convolution that can be replaced'
    convs = {n: _why_not(m) for n, m in model.named_modules() if getattr(m, 'kernel_size', None) == (3, 3)}
    possible = [name for name, reason in convs.items() if reason is None]
    if possible:
        return f'{message}, but {len(possible)} elsewhere can be: choose them with where=, such as {possible[-1]!r}'
    for name, reason in convs.items():
        message += f'; of {name}: {reason}'
        break
    return message


def _matching(model: nn.Module, where: Where, stages: Any) -> Iterator[tuple[str, Any]]:
    blocks = [(name, stage) for name, _, _, stage in numbered_blocks(model)]
    known = [stage for _, stage in blocks if stage is not None]
    chosen = None
    if stages is not None:
        if not known:
            raise ValueError(f'the stages of this {type(model).__name__} are not known: choose with where= only')
        chosen = check_stages(stages, max(known), 'stages')
    if where is not None and not isinstance(where, str) and not callable(where):
        raise TypeError(
            f'where must be a pattern over module names, a function (name, module) -> bool or None, got {where!r}'
        )
    for name, module in model.named_modules(remove_duplicate=False):
        around = [stage for block, stage in blocks if name.startswith(f'{block}.')]
        if chosen is not None and not any(stage in chosen for stage in around):
            continue
        if where is None:
            plain = isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and _why_not(module) is None
            wanted = bool(around) and plain
        else:
            wanted = fnmatchcase(name, where) if isinstance(where, str) else bool(where(name, module))
        if wanted:
            yield name, module


def _why_not(conv: nn.Module) -> str | None:
    if type(conv) is not nn.Conv2d:
        return f'it is a {type(conv).__name__}, not a plain nn.Conv2d'
    if conv.groups != 1 or conv.in_channels != conv.out_channels:
        return f'it has {conv.groups} groups, {conv.in_channels} channels in and {conv.out_channels} out'
    if conv.stride not in ((1, 1), (2, 2)):
        return f'its stride is {conv.stride}; operators have 1 or 2'
    if conv.dilation != (1, 1):
        return f'it is dilated by {conv.dilation}'
    if conv.kernel_size[0] % 2 == 0 or tuple(conv.padding) != tuple(k // 2 for k in conv.kernel_size):
        return f'its kernel {conv.kernel_size} with padding {conv.padding} does not keep the size of the map'
    return None


def _feature_sizes(model: nn.Module, convs: dict[str, Any], input_size: Any) -> dict[str, tuple[int, int]]:
    """The input map size of each convolution, from one forward in eval mode."""
    args, _ = example_of(model, input_size, None)
    if args is None:
        raise ValueError("axial attention's tables need the map sizes: pass the image's input_size=(C, H, W)")
    sizes: dict[str, tuple[int, int]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            size = (inputs[0].shape[2], inputs[0].shape[3])
            if sizes.setdefault(name, size) != size:
                raise ValueError(f'{name} runs on maps of {sizes[name]} and {size}, but axial attention needs one size')

        return hook

    handles = [conv.register_forward_pre_hook(watch(name)) for name, conv in convs.items()]
    try:
        with quietly(model):
            model(*args)
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in convs if name not in sizes]
    if missing:
        raise ValueError(f'{missing[0]} does not run in a forward of an image of shape {tuple(args[0].shape[1:])}')
    return sizes
