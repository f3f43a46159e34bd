"""Count what attention blocks read, write and keep in a training step, without a GPU and without a clock.

In traversals: one read or one write of x. By default it counts compiled blocks. inductor plans its kernels from shapes
alone. This script makes it plan for a Hopper GPU (nothing is generated or run) and sums the bytes that the planned
kernels read and write. It needs neither a device nor Triton. It uses private interfaces of inductor, which are the same
from torch 2.8 to 2.15. A newer torch may need a change here.

With --eager it runs the blocks operator by operator on the meta device, where tensors have shapes but no values, and
sums what each operator reads and writes, as on a GPU. On a CPU, blocks work on a few images at a time, whose
intermediate results stay in the cache.

    python benchmarks/traffic.py                        # at the four ResNet-50 shapes, bf16
    python benchmarks/traffic.py sase se --dtype float32 --shapes 256x56x56
    python benchmarks/traffic.py --eager --shapes 256x56x56 > benchmarks/results/traffic/eager.txt
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from meter import CountBytes
from torch import nn

from sase_blocks.profiling import kept_bytes, storages_of

SHAPES = ('256x56x56', '512x28x28', '1024x14x14', '2048x7x7')


class CannotPlan(RuntimeError):
    """The installed torch has other inductor interfaces than this script uses."""


class _Hopper:
    """The properties of an H200 that inductor reads."""

    name = 'NVIDIA H200'
    major, minor = 9, 0
    multi_processor_count = 132
    max_threads_per_multi_processor = 2048
    regs_per_multiprocessor = 65536
    shared_memory_per_block = 49152
    shared_memory_per_block_optin = 232448
    L2_cache_size = 50 * 2**20
    total_memory = 140 * 2**30
    warp_size = 32
    gcnArchName = uuid = ''


@contextlib.contextmanager
def _as_if_there_were_a_gpu() -> Iterator[None]:
    replaced: dict[str, Callable[..., object]] = {
        'torch.cuda.is_available': lambda: True,
        'torch.cuda.device_count': lambda: 1,
        'torch.cuda.current_device': lambda: 0,
        'torch.cuda.get_device_capability': lambda *_: (9, 0),
        'torch.cuda.get_device_properties': lambda *_: _Hopper(),
        'torch.cuda._get_device_properties': lambda *_: _Hopper(),
        'torch._C._cuda_init': lambda: None,
        'torch._subclasses.fake_tensor.init_gpu_context': lambda *_: None,  # which would allocate on the device
        # For half precision it queries the device's driver. All inputs are contiguous, which every choice keeps.
        'torch._C._select_conv_backend': lambda *_, **__: torch._C._ConvBackend.Cudnn,
        # The package alone is not enough: has_triton queries the device and caches the answer.
        'torch._inductor.scheduler.has_triton': lambda *_: True,
    }
    with contextlib.ExitStack() as stack:
        for name, fake in replaced.items():
            stack.enter_context(mock.patch(name, fake, create=True))
        yield


def _planned_bytes(graph: torch.fx.GraphModule, inputs: list[object]) -> int:
    """Bytes that inductor's kernels for ``graph`` would read and write on the GPU."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import Scheduler
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as fake, _as_if_there_were_a_gpu():

        def moved(value: object) -> object:
            if isinstance(value, torch.Tensor):
                return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device='cuda')
            return torch.device('cuda', 0) if isinstance(value, torch.device) else value

        for node in graph.graph.nodes:
            node.kwargs = {key: moved(value) for key, value in node.kwargs.items()}
            if 'val' in node.meta:
                node.meta['val'] = moved(node.meta['val'])
        example = [moved(value) for value in inputs]
        lowering = GraphLowering(graph, example_inputs=example)
        handlers = V.set_graph_handler(lowering), V.set_fake_mode(fake), V.set_debug_handler(DebugContext())
        with handlers[0], handlers[1], handlers[2]:
            lowering.run(*example)
            lowering.scheduler = Scheduler(lowering.operations)
            return int(lowering.count_bytes()[0])


def traversals(block: nn.Module, x: torch.Tensor) -> tuple[float, float, float]:
    """Traversals of x in a compiled training step, forward and backward, and sizes of x kept between them.

    Raises:
        CannotPlan: the installed torch has other inductor interfaces.
    """
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    captured: list[tuple[torch.fx.GraphModule, list[object]]] = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[object]) -> object:
        captured.append((copy.deepcopy(graph), list(inputs)))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=compiler,
        bw_compiler=compiler,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    torch._dynamo.reset()
    y = torch.compile(block.train(), backend=backend, fullgraph=True, dynamic=False)(x)
    y.backward(torch.ones_like(y))
    # What the backward graph takes from the forward (parameters too), without the gradient of y.
    nodes = [n for n in captured[1][0].graph.nodes if n.op == 'placeholder' and not n.name.startswith('tangents')]
    tensors = [n.meta['val'] for n in nodes if isinstance(n.meta.get('val'), torch.Tensor)]
    kept = sum(t.numel() * t.element_size() for t in tensors)
    try:
        forward, backward = (_planned_bytes(graph, inputs) for graph, inputs in captured)
    except Exception as error:  # of any kind, because private interfaces have no contract
        text = (str(error).strip().splitlines() or [''])[0]
        raise CannotPlan(
            f'torch {torch.__version__} does not plan without a GPU as benchmarks/traffic.py asks it to '
            f'({type(error).__name__}: {text}); use torch 2.15 or older, or adapt the script'
        ) from error
    size = x.numel() * x.element_size()
    return forward / size, backward / size, kept / size


def eager_traversals(block: nn.Module, x: torch.Tensor) -> tuple[float, float, float]:
    """Traversals of x in an eager training step, forward and backward, and sizes of x kept between them."""
    inputs = [x, *(p for p in block.train().parameters() if p.requires_grad)]
    kept = kept_bytes(lambda: block(x), storages_of(block))
    with CountBytes() as forward:
        y = block(x)
    grad = torch.empty_like(y)
    with CountBytes() as backward:
        torch.autograd.grad(y, inputs, grad)
    size = x.numel() * x.element_size()
    return forward.bytes / size, backward.bytes / size, kept / size


def builders() -> dict[str, Callable[..., nn.Module]]:
    """Blocks by name: ours, then timm's as timm_NAME."""
    from timm.layers import get_attn

    found: dict[str, Callable[..., nn.Module]] = {
        f'timm_{name}': get_attn(name) for name in ('se', 'eca', 'cbam', 'gc')
    }
    with contextlib.suppress(ImportError):
        found = {**importlib.import_module('sase_blocks.blocks').BLOCKS, **found}
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('blocks', nargs='*', help='ours by name, timm_se and so on (default: all of them)')
    parser.add_argument('--shapes', nargs='+', default=SHAPES, metavar='CxHxW')
    parser.add_argument('--dtype', nargs='+', choices=['bfloat16', 'float32'], help='default: bfloat16; eager: both')
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--eager', action='store_true', help='count eager blocks instead of compiled ones')
    args = parser.parse_args(argv)
    known = builders()
    unknown = [name for name in args.blocks if name not in known]
    if unknown:
        parser.error(f'unknown block {unknown[0]!r}; there are {", ".join(known)}')
    dtypes = args.dtype or (['float32', 'bfloat16'] if args.eager else ['bfloat16'])
    print('eager' if args.eager else f'torch {torch.__version__}, planned for {_Hopper.name}', end=', ')
    print(f'batch {args.batch}, training')
    print(f'{"block":<12}{"shape":<13}{"dtype":<10}{"forward":>9}{"backward":>10}{"kept":>8}', end='   ')
    print('(traversals of x; sizes of x)')
    count, device, digits = (eager_traversals, 'meta', 1) if args.eager else (traversals, 'cpu', 2)
    for shape, dtype in itertools.product(args.shapes, dtypes):
        c, h, w = (int(n) for n in shape.split('x'))
        with torch.device(device):
            x = torch.randn(args.batch, c, h, w, dtype=getattr(torch, dtype), requires_grad=True)
            for name in args.blocks or known:
                try:
                    forward, backward, kept = count(known[name](c).to(x.dtype), x)
                except CannotPlan as error:
                    sys.exit(f'traffic.py: {error}')
                print(f'{name:<12}{shape:<13}{dtype:<10}{forward:>9.{digits}f}{backward:>10.{digits}f}{kept:>8.2f}')


if __name__ == '__main__':
    main()
