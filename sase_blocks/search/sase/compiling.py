"""Compile the mixed blocks of a search network, for its first order."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sase_blocks.blocks.compiling import compile_blocks

from .mixed import MixedBlock
from .network import SearchNetwork

__all__ = ['compile_mixed_blocks', 'without_compilation']


def compile_mixed_blocks(network: SearchNetwork, **kwargs: Any) -> list[str]:
    """Compile every mixed block of ``network`` in place; outputs and first-order gradients stay equal.

    One graph for each shape, mode (train, eval), memory layout and for what learns (the weights, the logits, and the
    logits where nothing learns before the block, see ``SearchNetwork.learning``); blocks of one shape share it. Double
    backward does not pass through compiled code (torch raises a RuntimeError in the backward pass): only ``order='1'``
    and ``'2-fd'`` can use it. An observer stops working inside, so observe before compiling or in a copy.

    Args:
        network: with ``form='shared'`` or ``'plain'``; the formulas of 'shared' compile to the faster code.
        **kwargs: for ``torch.compile``; unless given, ``dynamic=False``; ``fullgraph=False``, for the copies between
            channels_last and the block's own format stay outside of the graph; on a CPU, and without a ``mode`` or
            ``backend``, ``options`` that keep inductor from computing a map again for every channel.

    Returns:
        The names of the compiled blocks, as in ``network.blocks``.

    Raises:
        ValueError: a block has an observer.
    """
    observed = [name for name, block in network.blocks.items() if block.observer is not None]
    if observed:
        raise ValueError(f'{observed[0]} has an observer, which compiled code cannot call; leave the context first')
    if network.logits.device.type == 'cpu' and not {'options', 'mode', 'backend'} & {*kwargs}:
        kwargs['options'] = {'realize_reads_threshold': 2}
    # The weights of the mixture reach a block as an attribute that is no leaf, at which dynamo only looks.
    warnings.filterwarnings('ignore', message='The .grad attribute of a Tensor that is not a leaf Tensor')
    for block in network.blocks.values():
        assert isinstance(block, MixedBlock)
        compile_blocks(block, **{'dynamic': False, 'fullgraph': False, **kwargs})
    return list(network.blocks)


@contextmanager
def without_compilation(network: SearchNetwork) -> Iterator[None]:
    """Within this context compiled blocks run eagerly: for observers, and for what is differentiated twice."""
    kept = {name: block._compiled_call_impl for name, block in network.blocks.items()}
    for block in network.blocks.values():
        block._compiled_call_impl = None
    try:
        yield
    finally:
        for name, block in network.blocks.items():
            block._compiled_call_impl = kept[name]
