"""What a user can get wrong, and sizes as people write them."""

import argparse
import re
import sys

SIZES = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
         "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


class UserError(Exception):
    """A mistake the user can mend: one line that names the culprit and the mend, exit status 2."""


class Parser(argparse.ArgumentParser):
    """argparse, with its complaints as one line like every other."""

    def error(self, message):
        raise UserError(message)


def parse_size(text: str, flag: str = "size") -> int:
    """`4GiB`, `500MB`, `1.5G` or plain bytes -> bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if not match or match[2] == "I" or not 0 < float(match[1]) < 1e18:
        raise UserError(f"{flag}: '{text}' is not a size; write it like 4GiB, 500MB or 25GB/s")
    return int(float(match[1]) * SIZES[match[2]])


def parse_rate(text: str, flag: str = "rate") -> int:
    """`25GB/s` -> bytes a second."""
    return parse_size(text.strip().removesuffix("/s"), flag)


def human(n: float) -> str:
    """Bytes as a person reads them: decimal units, as disks and links are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 999.5:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def run_main(main) -> None:
    """Run a program's `main`, turning what a user can cause into one line and exit status 2."""
    try:
        sys.exit(main())
    except UserError as error:
        message = " ".join(str(error).split())
    except BrokenPipeError:                 # `generate.py ... | head`: not a mistake at all
        sys.stderr.close()
        sys.exit(0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
