"""What holds for all tests: the same examples in every run, and no more threads than cores."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # two processes share the cores; read when numpy and torch are loaded
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")

from hypothesis import HealthCheck, settings

SLOW = [HealthCheck.too_slow]  # says something of the machine, not of the code
settings.register_profile("fixed", derandomize=True, database=None, deadline=None, suppress_health_check=SLOW)
settings.register_profile("random", derandomize=False, database=None, deadline=None, suppress_health_check=SLOW)
settings.load_profile("fixed")  # others: --hypothesis-profile=random
