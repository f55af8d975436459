"""What the bench's commands share: their checks, and how they print a table."""

import math
from argparse import ArgumentTypeError
from pathlib import Path

from ..config import MixtralConfig
from ..errors import UserError
from ..policies import POLICIES, load_policy

SHAPES = {
    "mixtral-8x7b": MixtralConfig(),
    "mixtral-8x22b": MixtralConfig(hidden_size=6144, intermediate_size=16384, num_hidden_layers=56,
                                   num_attention_heads=48, max_position_embeddings=65536),
    "tiny": MixtralConfig(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=6,
                          num_attention_heads=4, num_key_value_heads=2, head_dim=64,
                          max_position_embeddings=4096),
}


def number(kind: type, low: float, high: float):
    """An argparse `type`: an int or a float from `low` to `high`."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            whole = "a whole number" if kind is int else "a number"
            raise ArgumentTypeError(f"{text}: expected {whole} from {low:g} to {high:g}")
        return value
    return parse


def check_policies(policies: list[str], more: tuple[str, ...] = ()) -> None:
    """Every policy is known, one of `more`, or a file."""
    for policy in policies:
        if policy not in more:
            load_policy(policy, "--policies", more)


def check_lists(args) -> None:
    """Make --cache-experts numbers, and undo what argparse does to `--policies lru tests/traces`: it takes
    the directory for one more policy."""
    for words, known in ((args.policies, (*POLICIES, "oracle", "host-only")), (args.cache_experts, ())):
        if len(words or ()) > 1 and not getattr(args, "traces", "none here") and words[-1] not in known:
            word = words[-1]
            if Path(word).is_dir() or "/" in word and not word.endswith(".py"):
                args.traces = words.pop()
    for i, word in enumerate(args.cache_experts or ()):
        if not word.isdecimal() or int(word) < 2:
            raise UserError(f"--cache-experts {word}: give a whole number of at least 2")
        args.cache_experts[i] = int(word)


def table(columns: list[tuple[str, int, str]], rows: list[dict]) -> str:
    """A line of headings and one for each row; a column is its heading, its width and the format of its
    value. The first is flush left, and as wide as it has to be."""
    lines = [[heading for heading, *_ in columns]]
    lines += [[form.format(**row) for *_, form in columns] for row in rows]
    first = max(columns[0][1], *(len(line[0]) + 1 for line in lines))       # a policy may be a path
    return "\n".join(line[0].ljust(first) + "".join(
        cell.rjust(width) for cell, (_, width, _) in zip(line[1:], columns[1:])) for line in lines)
