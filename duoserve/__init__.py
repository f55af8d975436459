"""duoserve: Mixtral on one small GPU, its 4-bit experts in host memory, the link scheduled in two phases."""

import os

__version__ = "0.1.0"

# OpenMP's threads sleep while they wait for work (torch reads this when it is imported). Otherwise they spin,
# and if there are more of them than cores, tokens take many times longer (tests/measure_two_at_once.py).
# Beside a GPU they may spin: what the host computes of an expert is some short loops, and asleep they start
# late. (For `--device cpu` beside a GPU, and several processes at once, set it yourself.)
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def __getattr__(name):
    if name == "Engine":                    # lazily: `python -m duoserve.checkpoint` needs none of it
        from .engine import Engine
        return Engine
    raise AttributeError(f"module 'duoserve' has no attribute {name!r}")
