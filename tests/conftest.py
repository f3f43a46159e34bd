"""Settings for all tests: one thread a process under pytest-xdist, no network, and figures without a screen."""

import os

if 'PYTEST_XDIST_WORKER' in os.environ:
    # Before torch is imported. As many processes as cores, each with as many threads, take turns and lose time.
    # Programs that a test starts inherit it.
    os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
