"""Which networks cannot be changed, and why: one table for insertion, replacement, fusion and export."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy

# Classes of torch and DeepSpeed by name (importing them all is slow): what such a module is, and the step that made it.
STEPS = {
    'ScriptModule': ('a TorchScript module', 'torch.jit.script or trace'),
    'OptimizedModule': ('compiled', 'torch.compile'),
    'DataParallel': ('wrapped in DataParallel', 'wrapping it, or give model.module'),
    'DistributedDataParallel': ('wrapped in DistributedDataParallel', 'wrapping it'),
    'FullyShardedDataParallel': ('sharded by FSDP', 'wrapping it'),
    'FSDPModule': ('sharded by FSDP', 'fully_shard'),
    'DeepSpeedEngine': ('wrapped by DeepSpeed', 'deepspeed.initialize'),
}
QUANTISED = ('torch.ao.nn', 'torch.nn.quantized', 'torchao')


def check_changeable(model: nn.Module, doing: str, *, compiled_parts: bool = False) -> None:
    """Check that a network is plain modules with values.

    Args:
        doing: verb of the messages, such as 'fuse' or 'insert into'.
        compiled_parts: allow parts on which ``module.compile()`` was called.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a part is wrapped, sharded, compiled, scripted or quantised, or has no values yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f'model must be an nn.Module, got {type(model).__name__}')
    check_unwrapped(model, doing)
    for name, module in model.named_modules():
        what = name or type(model).__name__
        if not compiled_parts and is_compiled_in_place(module):
            raise ValueError(f'{what} is compiled: {doing} the network before module.compile()')
        if type(module).__module__.startswith(QUANTISED):
            raise ValueError(f'{what} is quantised or prepared for it: {doing} the network before')
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f'{name} is lazy and has no shape yet: run one forward of the network first')
        if tensor.is_meta:
            raise ValueError(f'{name} is on the meta device and has no values: load or initialise the network first')
        integer = isinstance(tensor, nn.Parameter) and not (tensor.is_floating_point() or tensor.is_complex())
        if integer or tensor.is_quantized or 'torchao' in type(tensor).__module__:
            kind = tensor.dtype if type(tensor) is nn.Parameter else type(tensor).__name__
            raise ValueError(f'{name} is quantised ({kind}): {doing} the network before')
        if any(base.__name__ == 'DTensor' for base in type(tensor).__mro__):
            raise ValueError(f'{name} is sharded (DTensor): {doing} the network before it is parallelised')


def check_unwrapped(model: nn.Module, doing: str) -> None:
    """Raise ValueError if a part is wrapped, sharded, compiled or scripted."""
    for name, module in model.named_modules():
        for base in type(module).__mro__:
            if base.__name__ in STEPS and base.__module__.partition('.')[0] in ('torch', 'deepspeed'):
                state, step = STEPS[base.__name__]
                what = name or type(model).__name__
                raise ValueError(f'{what} is {state}: {doing} the network before {step}')


def is_compiled_in_place(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called."""
    return getattr(module, '_compiled_call_impl', None) is not None
