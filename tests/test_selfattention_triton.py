"""The Triton route of local self-attention without a GPU: in the interpreter, compiled, chosen and refused.

What the kernels compute is tested in `interpreted_triton.py`, in a process of its own.
"""

import importlib.util
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sase_blocks.selfattention import LocalSelfAttention, local_attention, local_triton
from sase_blocks.selfattention.local_routes import eager_route

needs_triton = pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='Triton is not installed here')
TESTS = Path(__file__).parent


def interpreted(*arguments: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith('PYTEST_')}
    environment |= {'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1'}
    run = subprocess.run(
        # Triton's interpreter does what new versions of numpy warn of.
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-W', 'ignore::DeprecationWarning',
         *arguments, 'interpreted_triton.py'],
        cwd=TESTS, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (run.returncode, 'passed' in run.stdout) == (0, True), run.stdout[-8000:] + run.stderr[-2000:]


@needs_triton
@pytest.mark.slow
def test_in_the_interpreter():
    interpreted('-m', 'not slow')


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize('layout', ['nchw', 'channels_last', 'together', '1-32-1'])
def test_in_the_interpreter_at_many_sizes(layout):
    interpreted('-m', 'slow', '-k', layout)


# ------------------------------------------------------------------------------------------------------- compilation


def resources(kernel, options: dict, dtype: str, capability: int) -> tuple[int, int]:
    """Registers and bytes of spills of a kernel compiled for NCHW maps, as the disassembler reports them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tool = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
    if not tool.exists():
        pytest.skip('this build of Triton comes without the CUDA tools')
    options = dict(options)
    settings = {name: options.pop(name) for name in ('num_warps', 'enable_fp_fusion')}
    constants = {name: options[name] for name in kernel.arg_names if name in options}
    signature = {}
    for name in kernel.arg_names:
        if name in constants or name.endswith('_x'):
            signature[name] = 'constexpr'
            constants.setdefault(name, 1)
        elif '_' in name or name in ('heads', 'height', 'width'):
            signature[name] = 'i32'
        else:
            signature[name] = '*fp32' if name in ('relative', 'lse', 'delta', 'parts') else f'*{dtype}'
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=settings)
    file = Path(os.environ['TRITON_CACHE_DIR']) / 'kernel.cubin'
    file.write_bytes(compiled.asm['cubin'])
    report = subprocess.run([tool, '-res-usage', file], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf'\b{x}:(\d+)', report)[1]) for x in ('REG', 'STACK', 'LOCAL'))
    return registers, stack + local


@needs_triton
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize(
    ('d', 'size', 'terms', 'dtype', 'mask', 'most'),
    [
        (16, 7, 1, 'bf16', False, 0),
        (16, 7, 3, 'bf16', True, 0),
        (32, 7, 3, 'fp16', False, 0),
        (64, 7, 1, 'bf16', False, 0),
        (8, 3, 1, 'fp32', False, 8),  # bytes of a thread that Triton 3.8 spills for sm_90
        (16, 7, 3, 'fp32', False, 0),
        (64, 7, 1, 'fp32', True, 16),  # the same
    ],
)
@pytest.mark.slow
def test_compiles_without_further_spills(d, size, terms, dtype, mask, most, tmp_path, monkeypatch):
    from sase_blocks.selfattention import local_triton_backward as backward
    from sase_blocks.selfattention import local_triton_forward as forward

    if forward.INTERPRETED:
        pytest.skip('TRITON_INTERPRET is set: there is nothing to compile')
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    for channels, kernels in (
        (forward.CHANNELS_FORWARD, [forward.forward_kernel]),
        (forward.CHANNELS_BACKWARD, [backward.query_kernel, backward.key_kernel]),
    ):
        options = forward.constants(d, size, terms, mask, channels)
        for kernel in kernels:
            for capability in (80, 90):
                registers, spilled = resources(kernel, options, dtype, capability)
                assert (registers <= 255, spilled <= most) == (True, True), (kernel, capability, spilled)


# ------------------------------------------------------------------------------------------- where it runs, the choice


def arguments(d=4, size=3, dtype=torch.float32, terms=1):
    return [torch.randn(1, 2, d, 5, 5, dtype=dtype)] * 3 + [torch.randn(terms, 2, d // 2, size, dtype=dtype)]


def mixed():
    q, k, v, relative = arguments()
    return [q.half(), k, v, relative]


REFUSED = [
    ('fp64', lambda: arguments(dtype=torch.float64), r'float32, float16 or bfloat16.* got torch.float64.* on cpu'),
    ('two dtypes', mixed, r'one dtype.* got torch.float16, torch.float32, torch.float32 on cpu'),
    ('table in fp64', lambda: [*arguments()[:3], arguments()[3].double()], r'tables torch.float64'),
    ('window', lambda: arguments(size=27), r'windows up to 25 .*k = 27'),
    ('channels', lambda: arguments(d=66), r'up to 64 channels per head; .*d = 66'),
    ('meta', lambda: [x.to('meta') for x in arguments()], r'runs on CUDA; got torch.float32.* on meta'),
]


@pytest.mark.parametrize(('make', 'text'), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_forced_where_it_cannot_run(make, text):
    with pytest.raises(ValueError, match=text):
        local_attention(*make(), route='triton')


@needs_triton
def test_forced_on_a_cpu_without_the_interpreter():
    with pytest.raises(ValueError, match=r'TRITON_INTERPRET=1.*got torch.float32.* on cpu, .* d = 4, k = 3'):
        LocalSelfAttention(8, 2, 3, route='triton')(torch.randn(1, 8, 5, 5))


def test_forced_without_triton(monkeypatch):
    monkeypatch.setattr(local_triton, 'kernels', lambda: 'ModuleNotFoundError: no triton')
    with pytest.raises(ValueError, match=r'cannot be imported \(ModuleNotFoundError: no triton\)'):
        local_attention(*arguments(), route='triton')


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning')
def test_no_compiler_no_script_no_transform():
    layer, x, inputs = LocalSelfAttention(8, 2, 3, route='triton'), torch.randn(1, 8, 7, 7), arguments()[1:]
    with pytest.raises(Exception, match='cannot be captured'):
        torch.export.export(layer.eval(), (x,))
    with pytest.raises(torch.jit.Error, match="'triton' is an autograd function, which TorchScript cannot run"):
        torch.jit.script(layer)(x)
    with pytest.raises(ValueError, match=r'torch\.func'):
        torch.func.vmap(lambda q: local_attention(q, *inputs, route='triton'))(torch.randn(3, 1, 2, 4, 5, 5))


@pytest.fixture
def on_cuda(monkeypatch):
    """Arguments that say they are on a GPU of compute capability 9.0, and an empty memory of checks."""
    monkeypatch.setattr(local_triton, 'capability', lambda device: (9, 0))
    monkeypatch.setattr(local_triton, '_passed', {})
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    with FakeTensorMode():
        yield lambda **kinds: [x.to('cuda:0') for x in arguments(**kinds)]


def test_chosen_once_checked(on_cuda, monkeypatch):
    seen = []
    monkeypatch.setattr(local_triton, 'refusal', lambda *a: None)
    monkeypatch.setattr(local_triton, 'difference', lambda *kind: seen.append(kind))
    inputs = on_cuda()
    assert [eager_route(*inputs, False) for _ in range(3)] == ['triton'] * 3
    assert len(seen) == 1
    for other in (on_cuda(size=5), on_cuda(d=16), on_cuda(terms=3), on_cuda(dtype=torch.bfloat16)):
        assert eager_route(*other, False) == 'triton'
    assert eager_route(*inputs, True) == 'triton'
    assert len(seen) == 6
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    assert eager_route(*inputs, False) == 'triton'
    assert eager_route(*on_cuda(size=9), False) == 'recompute'  # cannot be checked now
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    assert eager_route(*on_cuda(size=9), False) == 'triton'


def test_a_failed_check_warns_once_and_falls_back(on_cuda, monkeypatch):
    monkeypatch.setattr(local_triton, 'refusal', lambda *a: None)
    monkeypatch.setattr(local_triton, 'difference', lambda *kind: 'the gradient of k differs by 3e-01 of its norm')
    inputs = on_cuda(size=5)
    with pytest.warns(RuntimeWarning, match=r'float32, d = 4, k = 5, 1 terms on cuda.*gradient of k differs by 3e-01'):
        assert eager_route(*inputs, False) == 'recompute'
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert eager_route(*inputs, False) == 'recompute'


def test_not_chosen_where_it_cannot_run(on_cuda, monkeypatch):
    monkeypatch.setattr(local_triton, 'difference', lambda *kind: pytest.fail('checked for nothing'))
    assert 'plain tensors' in local_triton.refusal(*on_cuda())
    assert eager_route(*on_cuda(), False) == 'shifts'
    huge = torch.empty(1, 2, 4, 2**15, 2**15, device='cuda:0')
    assert '2**31 elements' in local_triton.refusal(huge, huge, huge, on_cuda()[3])
    monkeypatch.setattr(local_triton, 'capability', lambda device: (7, 5))
    with pytest.raises(ValueError, match=r'compute capability 8\.0 or newer; got torch.float32.* on cuda'):
        local_attention(*on_cuda(), route='triton')
    assert eager_route(*on_cuda(size=5), True) == 'recompute'
