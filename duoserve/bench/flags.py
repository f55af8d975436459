"""What the commands of the bench share: paths, checks and ways of reading lists of words."""

from pathlib import Path

from ..errors import UserError
from ..policies import POLICIES, load_policy

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
DEMO = WEIGHTS / "demo"


def check_range(flag: str, value: float, low: float, high: float, least_open: bool = False) -> None:
    if not low <= value <= high or (least_open and value == low):
        raise UserError(f"{flag} {value:g}: expected a number from {low:g} to {high:g}")


def check_policies(policies: list[str], more: tuple[str, ...] = ()) -> None:
    """Names or files; `more` are known besides."""
    for policy in policies:
        if policy not in more:
            load_policy(policy, "--policies", more)


def int_or_word(word: str) -> int | str:
    try:
        return int(word)
    except ValueError:
        return word


def take_directory(args) -> None:
    """`--policies lru tests/traces`: argparse gives the directory to the list before it, where no policy is called so."""
    for words, known in ((args.policies, (*POLICIES, "oracle")), (args.cache_experts, ())):
        if args.traces is None and words and len(words) > 1 and isinstance(word := words[-1], str) \
                and word not in known and (Path(word).is_dir() or "/" in word and not word.endswith(".py")):
            args.traces = words.pop()


def table(columns: list[tuple[str, int, str]], rows: list[dict]) -> str:
    """`columns`: (heading, width, how its value is written, by the row's names); the first is to the left."""
    cells = [[heading for heading, *_ in columns]] + [[how.format(**row) for *_, how in columns] for row in rows]
    widths = [width for _, width, _ in columns]
    widths[0] = max(widths[0], *(len(line[0]) + 1 for line in cells))       # (a policy may be a path)
    return "\n".join(line[0].ljust(widths[0]) + "".join(cell.rjust(w) for cell, w in zip(line[1:], widths[1:]))
                     for line in cells)
