"""Compile only the attention blocks of a network. Eager, they make 8 to 16 passes over x."""

from __future__ import annotations

from typing import Any

from torch import nn

from .base import AttentionModule


def compile_blocks(model: nn.Module, **kwargs: Any) -> list[str]:
    """Compile every attention block of ``model`` in place with ``nn.Module.compile``; outputs and gradients stay equal.

    State-dict keys do not change. dynamo keeps one graph per shape and mode. Four stages in train and eval mode already
    use its default limit of 8, so the next shape (a last partial batch) would silently run eager. This raises the limit
    to 64 for the process.

    Args:
        model: a network, or a block itself.
        **kwargs: for ``torch.compile``; ``fullgraph=True`` unless given.

    Returns:
        The names of the compiled modules.

    Raises:
        ValueError: the model holds no block of this library.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, AttentionModule)]
    if not names:
        raise ValueError(
            f'{type(model).__name__} holds no attention block of sase_blocks; compile it whole with torch.compile'
        )
    import torch._dynamo as dynamo  # loads the compiler stack, so only when needed

    limit = 'recompile_limit' if hasattr(dynamo.config, 'recompile_limit') else 'cache_size_limit'
    setattr(dynamo.config, limit, max(getattr(dynamo.config, limit), 64))
    for name in names:
        model.get_submodule(name).compile(**{'fullgraph': True, **kwargs})
    return names
