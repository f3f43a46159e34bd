"""Settings for all tests: one thread a process under pytest-xdist, no network, and figures without a screen."""

import os

if 'PYTEST_XDIST_WORKER' in os.environ:
    # Before torch is imported. As many processes as cores, each with as many threads, take turns and lose time.
    # Programs that a test starts inherit it.
    os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import pytest
import torch


@pytest.fixture
def one_thread():
    """One thread and a fixed seed: maps this small only lose by more, and lose minutes on a machine that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def twice_at_once():
    """Runs a function in two processes of a multiprocessing context at the same time, both to a good end."""

    def run(context, target, *args):
        both = [context.Process(target=target, args=args) for _ in range(2)]
        for process in both:
            process.start()
        for process in both:
            process.join(300)
            assert process.exitcode == 0

    return run
