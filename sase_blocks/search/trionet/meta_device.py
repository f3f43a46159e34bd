"""Modules on the meta device: shapes without numbers, built quickly."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _WithoutDrawing(TorchFunctionMode):
    """Skips random initialisation: it has no effect on the meta device, but each draw costs milliseconds."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.normal_, torch.Tensor.uniform_) or getattr(func, '__module__', '') == 'torch.nn.init':
            return args[0] if args else kwargs['tensor']
        return func(*args, **kwargs)


@contextmanager
def meta_device() -> Iterator[torch.device]:
    """Yields a device on which modules are built without initialisation."""
    with _WithoutDrawing():
        yield torch.device('meta')
