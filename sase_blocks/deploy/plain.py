"""Reject wrapped, compiled, scripted and quantised networks, and networks without values."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy

# torch classes by name (importing them all is slow), and what the message calls such a network or part.
NOT_PLAIN = {
    'ScriptModule': 'scripted',
    'OptimizedModule': 'compiled',
    'DataParallel': 'wrapped in DataParallel',
    'DistributedDataParallel': 'wrapped in DistributedDataParallel',
    'FullyShardedDataParallel': 'sharded by FSDP',
    'FSDPModule': 'sharded by FSDP',
}


def check_plain(model: nn.Module, doing: str) -> None:
    """Raise for wrapped, compiled, scripted, quantised or valueless networks, with what to do; ``doing`` is a verb."""
    if not isinstance(model, nn.Module):
        raise TypeError(f'model must be an nn.Module, got {type(model).__name__}')
    for name, module in model.named_modules():
        bases = [base.__name__ for base in type(module).__mro__ if base.__module__.startswith('torch.')]
        what = next((NOT_PLAIN[base] for base in bases if base in NOT_PLAIN), None)
        if getattr(module, '_compiled_call_impl', None) is not None:
            what = 'compiled'
        elif type(module).__module__.startswith(('torch.ao.nn', 'torch.nn.quantized', 'torchao')):
            what = 'quantised'
        if what is not None:
            raise ValueError(f'{name or type(model).__name__} is {what}: {doing} the network before')
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f'{name} is lazy and has no shape yet: run one forward of the network first')
        if tensor.is_meta:
            raise ValueError(f'{name} is on the meta device and has no values: load or initialise the network first')
        if 'torchao' in type(tensor).__module__ or tensor.is_quantized:
            raise ValueError(f'{name} is quantised ({type(tensor).__name__}): {doing} the network before')
