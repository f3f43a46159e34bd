"""Compile the mixed blocks of a search network, for its first order."""

from __future__ import annotations

import warnings
from typing import Any

from sase_blocks.blocks.compiling import compile_blocks

from .network import SearchNetwork


def compile_mixed_blocks(network: SearchNetwork, **kwargs: Any) -> list[str]:
    """Compile every mixed block of ``network`` in place; outputs and first-order gradients stay equal.

    Blocks of one shape share a graph. There is one for each shape, mode (train, eval), memory layout, and for each
    kind of learning: the weights, the logits, or the logits with nothing that learns before the block. Compiled code
    has no double backward (torch raises a RuntimeError in the backward pass), so only ``order='1'`` and ``'2-fd'`` can
    use it. For double backward and for observers, use ``torch.compiler.set_stance('force_eager')``.

    Args:
        network: with ``form='shared'`` or ``'plain'``; the formulas of 'shared' compile to faster code.
        **kwargs: for ``torch.compile``. Defaults: ``dynamic=False``; ``fullgraph=False``, which leaves copies between
            channels_last and the block's own format out of the graph; on a CPU, and without a ``mode`` or ``backend``,
            ``options`` that keep inductor from computing a map again for every channel.

    Returns:
        The names of the compiled blocks, as in ``network.blocks``.
    """
    if network.logits.device.type == 'cpu' and not {'options', 'mode', 'backend'} & {*kwargs}:
        kwargs['options'] = {'realize_reads_threshold': 2}
    # The weights of the mixture reach a block as an attribute that is no leaf, and dynamo only looks at it.
    warnings.filterwarnings('ignore', message='The .grad attribute of a Tensor that is not a leaf Tensor')
    for block in network.blocks.values():
        compile_blocks(block, **{'dynamic': False, 'fullgraph': False, **kwargs})
    return list(network.blocks)
