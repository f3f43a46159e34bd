"""Settings for all tests: one thread a process under pytest-xdist, no network, and figures without a screen."""

import gc
import os

if 'PYTEST_XDIST_WORKER' in os.environ:
    # Before torch is imported. As many processes as cores, each with as many threads, take turns and lose time.
    # Programs that a test starts inherit it.
    os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ.setdefault('HF_HUB_OFFLINE', '1')

from multiprocessing.connection import wait

import pytest
import torch


def pytest_collection_finish():
    # The imported libraries and the collected tests stay to the end: no need to look through them each time.
    gc.collect()
    gc.freeze()


def mostly_slow(values, *quick):
    """Parameters of which `make test` takes those named, and `make test-slow` the others."""
    rows = {value: value if isinstance(value, tuple) else (value,) for value in values}
    return [pytest.param(*row, marks=() if value in quick else pytest.mark.slow) for value, row in rows.items()]


@pytest.fixture
def one_thread():
    """One thread and a fixed seed: maps this small only lose by more, and lose minutes on a machine that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def to_a_good_end():
    """Starts processes at once and waits, as long as it takes, until all have ended well or one has not."""

    def run(processes):
        for process in processes:
            process.start()
        running = list(processes)
        while running and not any(process.exitcode for process in processes):
            wait([process.sentinel for process in running])
            running = [process for process in running if process.exitcode is None]
        codes = [process.exitcode for process in processes]
        for process in running:  # they may wait for the one that failed
            process.kill()
            process.join()
        assert codes == [0] * len(processes), 'None: was ended after another one had failed'

    return run


@pytest.fixture
def twice_at_once(to_a_good_end):
    """Runs a function in two processes of a multiprocessing context at the same time, both to a good end."""

    def run(context, target, *args):
        to_a_good_end([context.Process(target=target, args=args) for _ in range(2)])

    return run
