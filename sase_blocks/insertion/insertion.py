"""``insert`` and ``remove``. They look up, build and try everything first, so that an error changes nothing."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sase_blocks.blocks import Genotype, block_name, resolve_block
from sase_blocks.checks import check_feat_size
from sase_blocks.ops.primitive import no_weight_decay
from sase_blocks.profiling import Trace, run, run_block

from .layout import Layout
from .places import Place, Where, find_places
from .refusal import check_changeable, check_unwrapped, is_compiled_in_place
from .report import InsertedPlace, InsertReport
from .surgery import RECORD, IdentityStart, Mark, attach, detach, inserted_in
from .survey import Survey

Block = str | Genotype | Callable[..., nn.Module]

# torch optimisers that cannot take an attention's parameters as new groups, and what to do.
_OPTIMIZERS = {
    'LBFGS': 'takes only one parameter group: insert first, and make it from model.parameters()',
    'Muon': 'takes only matrices: insert without optimizer=, then add those of report.parameters with two dimensions '
    'to it and give the others to a second optimizer, such as AdamW',
    'SparseAdam': 'takes only sparse gradients: insert without optimizer=, and give report.parameters to another one',
}


def insert(
    model: nn.Module,
    block: Block,
    where: Where = None,
    start: str = 'identity',
    *,
    stages: int | tuple[int, ...] | None = None,
    input_size: int | tuple[int, ...] | None = None,
    example: Any = None,
    layout: str | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    **options: Any,
) -> InsertReport:
    """Insert an attention block into a network, in place. All names in the network stay.

    Each new block takes device, dtype, memory format and train or eval mode from its place. Its parameters are
    trainable, even in a frozen network. A place that an earlier call filled with the same block is left alone.

    Args:
        model: the network.
        block: a name of ``list_blocks()``, maybe with options (``'se(reduction=8)'``), a ``Genotype`` or its text, or a
            callable of channels (a class, a ``partial``, a function) that builds a module (B, C, H, W) -> (B, C, H, W).
            If it has an argument ``feat_size``, it receives the size.
        where: None for the papers' place in known networks (docs/insertion.md lists them), after the last norm of every
            residual branch. In other networks, None means the end of each repeated block, found from a forward (our
            addition). Or a pattern over module names, ``'layer*.bn2'``, whose ``*`` also matches dots, or a function
            ``(name, module) -> bool``. Attention follows each matching module, in known residual blocks at the papers'
            place.
        start: 'identity': y = x + alpha (block(x) - x) with alpha = 0, so the network's outputs stay equal bit for bit
            (a block that already starts as the identity, such as gct, gets no alpha). 'paper': the paper's
            initialisation.
        stages: only these stages, counted from 1 as in ``attn_stages``; None for all.
        input_size: image size for the forward that finds channels and feature sizes and counts MACs: an int, (H, W) or
            (C, H, W). Default: the model's own (timm's ``pretrained_cfg``, an ``image_size``). Without either, no
            forward is run.
        example: the input itself instead of ``input_size``, or a tuple of positional arguments.
        layout: layout of the tensor that the attention follows: 'NCHW', 'NHWC', 'tokens', or 'tokens+2' with two prefix
            tokens, which stay as they are. None: detected, in doubt by a forward at another size.
        optimizer: gets new groups with the new parameters and the settings of its existing ones. Vectors and the names
            in ``no_weight_decay`` get no weight decay. Make a learning-rate scheduler afterwards.
        **options: of the block, for example ``reduction=8``.

    Returns:
        The report. Prints as a table of the places.

    Raises:
        TypeError: a model, block, ``where`` or optimizer of another type, or an option that the block does not take.
        ValueError: a network that cannot be changed (lazy, on the meta device, quantised, compiled, scripted, wrapped
            in DDP or FSDP), an optimizer that cannot take such groups (LBFGS, torch's Muon), a ``where`` or stage that
            matches nothing, a place without channels, a block that changes the shape, or a place with another inserted
            block. The model is unchanged.
    """
    check_changeable(model, 'insert into', compiled_parts=True)
    build, label = _builder(block, options)
    if start not in ('identity', 'paper'):
        raise ValueError(f"start must be 'identity' or 'paper', got {start!r}")
    check_optimizer(optimizer, model)
    args, given = example_of(model, input_size, example)
    survey = Survey(model, args, partial(try_forward, model, args, given, list(model.modules())), layout)
    places, by_rule, unread = find_places(model, where, stages, survey)
    new, already = _sort_out(places, label, start)
    for place in new:
        _check_not_compiled(model, place)

    trace = survey.trace
    note = survey.why and f'feature sizes and MACs are unknown: {survey.why}'
    not_run = [] if where is not None or trace is None else [place for place in new if not trace.of(place.probe)]
    if len(not_run) < len(places):  # if none runs, the first raises an error below
        new = [place for place in new if place not in not_run]
    built = [_build(model, place, build, label, survey) for place in new]
    if len({id(b.block) for b in built}) < len(built):
        raise ValueError(f'{label} returned the same module twice; it must build a new one in every call')
    attentions = [
        b.block if start == 'paper' or b.is_identity else _like(model, place, IdentityStart(b.block))
        for place, b in zip(new, built, strict=True)
    ]

    before = sum(p.numel() for p in model.parameters())
    old_keys = set(model.state_dict())
    groups = [] if optimizer is None else list(optimizer.param_groups)
    marks = [Mark(label, start, place.how, place.path) for place in new]
    try:
        for place, attention, mark in zip(new, attentions, marks, strict=True):
            attach(place.holder, attention, mark, place.slot)
        parameters = {id(p): p for attention in attentions for p in attention.parameters()}
        if optimizer is not None:
            extend_optimizer(optimizer, model, set(parameters))
    except BaseException:
        for place in new:
            detach(place.holder)
        if optimizer is not None:
            optimizer.param_groups[:] = groups
        raise
    if marks:
        model.__dict__[RECORD] = [*model.__dict__.get(RECORD, ()), *marks]
    keys = list(model.state_dict())
    counts = [sum(p.numel() for p in attention.parameters()) for attention in attentions]
    return InsertReport(
        network=type(model).__name__,
        block=label,
        start=start,
        places=tuple(
            InsertedPlace(place.path, b.channels, b.size, count, b.macs, str(b.layout))
            for place, b, count in zip(new, built, counts, strict=True)
        ),
        already=tuple(place.path for place in already),
        keys=tuple(key for key in keys if key not in old_keys),
        model_keys=tuple(keys),
        model_parameters=before,
        model_macs=trace.macs if trace else None,
        parameters=tuple(parameters.values()),
        note=note,
        left_out=(*(place.name for place in not_run), *unread),
        by_rule=by_rule,
    )


def remove(model: nn.Module) -> list[str]:
    """Remove every inserted attention, in place. This restores the network from before ``insert``.

    Returns:
        The names of the removed modules; empty if nothing was inserted.

    Raises:
        ValueError: the network is wrapped (DDP, FSDP) or compiled.
    """
    found = [(name, module, at[0]) for name, module in model.named_modules() if (at := inserted_in(module)) is not None]
    if found:
        check_unwrapped(model, 'remove from')
    for _, module, _ in found:
        detach(module)
    for module in model.modules():
        module.__dict__.pop(RECORD, None)
    return [f'{name}.{child}' if name else child for name, _, child in found]


def _builder(block: Block, options: dict[str, Any]) -> tuple[Callable[..., nn.Module], str]:
    """A callable of (channels, feat_size=...) and its name for the report."""
    for own in {'channels', 'feat_size', 'device', 'dtype'} & set(options):
        raise TypeError(f'{own}={options[own]!r} is not an option of the block, because every place has its own')
    if isinstance(block, str | Genotype):
        name = block_name(block, **options)
        return resolve_block(name), name
    if isinstance(block, nn.Module):
        raise TypeError(
            f'block is a single {type(block).__name__} module, but every place needs its own: pass the class, or a '
            f'function channels -> module'
        )
    if not callable(block):
        raise TypeError(f'block must be a name, a Genotype or its text, or a callable of channels, got {block!r}')
    if options:
        block = partial(block, **options)
    function, label = block, ''
    if isinstance(block, partial):
        function = block.func
        label = ', '.join([*map(repr, block.args), *(f'{k}={v!r}' for k, v in block.keywords.items())])
    name = getattr(function, '__qualname__', type(function).__name__)
    try:
        takes_size = 'feat_size' in inspect.signature(block).parameters
    except ValueError:  # C code has no signature
        takes_size = False
    build = block if takes_size else lambda channels, feat_size: block(channels)
    return build, f'{name}({label})' if label else name


def check_optimizer(optimizer: torch.optim.Optimizer | None, model: nn.Module) -> None:
    if optimizer is None:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f'optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}')
    for base in type(optimizer).__mro__:
        if base.__name__ in _OPTIMIZERS and base.__module__.startswith('torch.optim'):
            raise ValueError(f'{base.__name__} {_OPTIMIZERS[base.__name__]}')
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group['params']):
        raise ValueError(f'the optimizer is for another network: it has no parameter of this {type(model).__name__}')


def _sort_out(places: list[Place], label: str, start: str) -> tuple[list[Place], list[Place]]:
    """The places to fill, and those already filled with this block. Another block there is an error."""
    new, already = [], []
    for place in places:
        found = inserted_in(place.holder)
        mark = None if found is None else found[1]
        if mark is None:
            new.append(place)
        elif (mark.block, mark.start) == (label, start):
            already.append(place)
        else:
            raise ValueError(
                f'{place.path!r} already holds {mark.block} with start={mark.start!r} from an earlier insert: call '
                f'remove(model) first, or choose other places'
            )
    return new, already


def _check_not_compiled(model: nn.Module, place: Place) -> None:
    parts = place.name.split('.') if place.name else []
    around = [model.get_submodule('.'.join(parts[:depth])) for depth in range(len(parts) + 1)]
    if any(map(is_compiled_in_place, (*around, place.holder))):
        raise ValueError(
            f'{place.name or type(model).__name__} is compiled (module.compile()); insert before compiling'
        )


def example_of(model: nn.Module, input_size: Any, example: Any) -> tuple[tuple[Any, ...] | None, bool]:
    """The arguments for one forward (None if unknown), and whether the caller gave them."""
    if example is not None:
        if input_size is not None:
            raise ValueError('give input_size or example, not both')
        return (example if isinstance(example, tuple) else (example,)), True
    given = input_size is not None
    if not given:
        config = getattr(model, 'pretrained_cfg', None) or getattr(model, 'default_cfg', None)
        input_size = (config.get('input_size') if isinstance(config, dict) else None) or None
        if input_size is None:  # torchvision's ViT has the attribute, transformers' networks in their configuration
            said = getattr(getattr(model, 'config', model), 'image_size', None)
            input_size = (said, said) if isinstance(said, int) else said
        if not isinstance(input_size, tuple | list) or not all(isinstance(n, int) for n in input_size):
            return None, False
        input_size = tuple(input_size)[-2:]  # the channels may differ from the configuration
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = 3 if first is None else first.in_channels
    if isinstance(input_size, tuple | list) and len(input_size) == 3:
        channels, *input_size = input_size
    try:
        height, width = check_feat_size(tuple(input_size) if isinstance(input_size, list) else input_size, '')
    except ValueError:
        raise ValueError(
            f'input_size must be an int, (H, W) or (C, H, W), each at least 1, got {input_size!r}'
        ) from None
    tensor = next((p for p in model.parameters()), torch.empty(0))
    x = torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0))
    return (x.to(device=tensor.device, dtype=tensor.dtype),), given


def try_forward(
    model: nn.Module, args: tuple[Any, ...] | None, given: bool, probes: list[nn.Module]
) -> tuple[Trace | None, str]:
    """The trace of one forward, or why there is none. A forward that the caller asked for must succeed."""
    if args is None:
        return None, 'no forward was run; pass input_size='
    try:
        trace = run(model, args, probes)
    except Exception as error:
        what = f'{type(error).__name__}: {error}'.splitlines()[0]
        shapes = ', '.join(str(tuple(a.shape)) if isinstance(a, Tensor) else type(a).__name__ for a in args)
        if given:
            raise ValueError(f'the forward of {type(model).__name__} fails for an input of {shapes}: {what}') from error
        return None, f'the forward fails for {shapes} ({what}); pass input_size='
    return trace, ''


def _map_at(place: Place, survey: Survey) -> tuple[int, tuple[int, int] | None, Layout]:
    """Channels, feature size and layout at a place."""
    at = f'{place.name!r} ({type(place.holder).__name__})'
    if survey.trace is None:
        if place.channels is None or survey.asked[0] not in (None, 'NCHW'):
            what = 'the layout' if place.channels else 'the number of output channels'
            raise ValueError(f'{what} of {at} is unknown: pass input_size= or example= to find it from one forward')
        return place.channels, None, Layout('NCHW')
    found = survey.map_of(place.probe, place.channels)
    if isinstance(found, str):
        raise ValueError(f'{at} {found}')
    return found


class _Built(NamedTuple):
    block: nn.Module
    channels: int
    size: tuple[int, int] | None
    macs: int | None
    layout: Layout
    is_identity: bool  # by its own initialisation: then neither alpha nor the block would get a gradient


def _build(model: nn.Module, place: Place, build: Any, label: str, survey: Survey) -> _Built:
    """Build the block for one place, and try it on a random map."""
    channels, size, layout = _map_at(place, survey)
    at = f'{label} for {channels} channels at {place.path!r}'
    try:
        block = build(channels, feat_size=size)
    except (ValueError, TypeError) as error:
        hint = f' ({survey.why})' if survey.why and 'feat_size' in str(error) else ''
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f'{at}: {error}{hint}') from error
    if not isinstance(block, nn.Module):
        raise TypeError(f'{at}: expected an nn.Module, got {block!r}')
    if any(is_lazy(t) or t.is_meta for t in (*block.parameters(), *block.buffers())):
        raise ValueError(f'{at} is lazy or on the meta device; build it with values')
    some = size or (8, 8)
    x, y, macs = run_block(_like(model, place, block), channels, some)
    if not isinstance(y, Tensor) or y.shape != x.shape:
        gave = tuple(y.shape) if isinstance(y, Tensor) else f'a {type(y).__name__}'
        raise ValueError(f'{at} changes the shape: {tuple(x.shape)} became {gave}')
    if not y.isfinite().all():
        raise ValueError(f'{at} returns non-finite values for a standard normal input')
    is_identity = torch.equal(x, y)
    if is_identity and x.dtype in (torch.float16, torch.bfloat16):  # where a gate near 1 rounds to 1
        x, y, _ = run_block(copy.deepcopy(block).double(), channels, some)
        is_identity = torch.equal(x, y)
    return _Built(layout.around(block), channels, size, macs if size else None, layout, is_identity)


def _like(model: nn.Module, place: Place, attention: nn.Module) -> nn.Module:
    """Give ``attention`` the device, dtype, memory format and mode of its place."""
    parts = place.name.split('.') if place.name else []
    around = [model.get_submodule('.'.join(parts[:depth])) for depth in range(len(parts), -1, -1)]
    tensors = (t for m in (place.holder, *around) for t in (*m.parameters(), *m.buffers()) if t.is_floating_point())
    nearest = next(tensors, torch.empty(0))
    attention.to(device=nearest.device, dtype=nearest.dtype)
    if any(
        p.is_contiguous(memory_format=torch.channels_last) > p.is_contiguous()
        for p in model.parameters()
        if p.ndim == 4
    ):
        attention.to(memory_format=torch.channels_last)
    return attention.train(place.holder.training)


def extend_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, new: set[int]) -> None:
    """Add the new parameters with the network's weight decay, or none for vectors, scalars and ``no_weight_decay``."""
    template = next((g for g in optimizer.param_groups if g.get('weight_decay')), optimizer.param_groups[0])
    settings = {key: value for key, value in template.items() if key not in ('params', 'param_names')}
    named = [(name, p) for name, p in model.named_parameters() if id(p) in new]
    listed = no_weight_decay(model)
    exempt = {name for name, p in named if p.ndim <= 1 or any(fnmatchcase(name, pattern) for pattern in listed)}
    for without in (False, True):
        group: list[Any] = [(n, p) if 'param_names' in template else p for n, p in named if (n in exempt) == without]
        if group:
            changed = {'weight_decay': 0.0} if without and 'weight_decay' in settings else {}
            optimizer.add_param_group({**settings, **changed, 'params': group})
