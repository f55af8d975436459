"""duoserve: Mixtral on one small GPU, its 4-bit experts in host memory, the link scheduled in two phases."""

import os

__version__ = "0.1.0"

# OpenMP's threads sleep while they wait for work (torch reads this when it is imported). Otherwise they spin,
# and if there are more of them than cores, tokens take many times longer (tests/measure_two_at_once.py). For
# some microseconds they do spin: what the host computes of an expert is a few loops, one right after another.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def __getattr__(name):
    if name == "Engine":                    # lazily: `python -m duoserve.checkpoint` needs none of it
        from .engine import Engine
        return Engine
    raise AttributeError(f"module 'duoserve' has no attribute {name!r}")
