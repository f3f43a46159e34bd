"""The common parts of long runs alone. The tests of training and searches cover the rest."""

import os

import pytest
import torch

from sase_blocks.runs import be_deterministic

VARIABLE = 'CUBLAS_WORKSPACE_CONFIG'


def settings():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        os.environ.get(VARIABLE),
    )


@pytest.mark.parametrize('variable', [None, ':16:8'])
@pytest.mark.parametrize('before', [(False, False, True), (True, True, False)], ids=str)
@pytest.mark.parametrize('fails', [False, True], ids=['it ends', 'it fails'])
def test_determinism_ends_with_its_run(variable, before, fails, monkeypatch):
    torch_before = settings()[:3]
    monkeypatch.delenv(VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(VARIABLE, variable)

    def set_to(mode, warn_only, benchmark):
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark

    set_to(*before)
    try:
        with be_deterministic(enabled=False):
            assert settings() == (*before, variable)
        try:
            with be_deterministic():
                assert settings() == (True, False, False, variable or ':4096:8')
                if fails:
                    raise FloatingPointError
        except FloatingPointError:
            assert fails
        assert settings() == (*before, variable)
    finally:
        set_to(*torch_before)
