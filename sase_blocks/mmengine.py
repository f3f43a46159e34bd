"""Blocks by name in mmengine's configurations: ``dict(type='SASE', channels=64)``.

A configuration imports this module: ``custom_imports = dict(imports=['sase_blocks.mmengine'])``. This registers every
block in mmengine's ``MODELS`` under its name in capitals, with its options as keys, and ``AttentionBlock`` for
genotypes. The registries of OpenMMLab's other libraries look there too.
"""

from __future__ import annotations

from .blocks import BLOCKS, AttentionBlock

__all__: list[str] = []


def _register() -> None:
    try:
        from mmengine.registry import MODELS
    except ImportError as error:
        raise ImportError('sase_blocks.mmengine needs mmengine: pip install "sase-blocks[ecosystem]"') from error
    for name, build in BLOCKS.items():
        MODELS.register_module(name=name.upper(), module=build)
    MODELS.register_module(module=AttentionBlock)


_register()
