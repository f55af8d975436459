"""duoserve: Mixtral on one small GPU, its 4-bit experts in host memory, a dual-phase schedule on the link between."""

import os

# OpenMP's threads sleep while they wait for work (this is read when torch is imported). They would spin, and where more
# run than there are cores they would spin for each other: tokens many times slower (tests/measure_two_at_once.py).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def __getattr__(name):
    if name == "Engine":                    # lazily: `python -m duoserve.checkpoint` needs none of it
        from .engine import Engine
        return Engine
    raise AttributeError(f"module 'duoserve' has no attribute {name!r}")
