"""duoserve: Mixtral on one small GPU, its 4-bit experts in host memory, a dual-phase schedule on the link between."""


def __getattr__(name):
    if name == "Engine":                    # lazily: `python -m duoserve.checkpoint` needs none of it
        from .engine import Engine
        return Engine
    raise AttributeError(f"module 'duoserve' has no attribute {name!r}")
