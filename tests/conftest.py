"""Settings of all tests: one thread, and property-based tests that draw the same examples every time."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the linear algebra is loaded

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")
