"""What a user can get wrong: the error itself, one line that says it, and sizes as people write them."""

import argparse
import difflib
import re
import sys
from importlib import import_module

SIZES = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
         "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


class UserError(Exception):
    """A mistake the user can mend: one line that names the culprit and the mend, exit status 2."""


class Parser(argparse.ArgumentParser):
    """argparse, with its complaints as one line like every other, and a guess at what was meant."""

    def error(self, message):
        raise UserError(message)

    def parse_known_args(self, args=None, namespace=None):
        args, flags = sys.argv[1:] if args is None else args, self._option_string_actions
        for word in args:                   # `-prompt` would be -p with the value "rompt"
            name = f"-{word.partition('=')[0]}"
            if word[:2] in flags and name in flags and name != "--help":
                self.error(f"unrecognized arguments: {word}; did you mean {name}?")
        namespace, rest = super().parse_known_args(args, namespace)
        if flag := next((word for word in rest if word.startswith("-")), None):
            self.error(f"unrecognized arguments: {' '.join(rest)}{did_you_mean(flag.partition('=')[0], flags)}")
        return namespace, rest


def did_you_mean(word: str, known) -> str:
    likely = difflib.get_close_matches(word.lower(), known, 1)
    return f"; did you mean {likely[0]}?" if likely else ""


def unknown(flag: str, name: str, known) -> UserError:
    """A name that is none of the `known`."""
    return UserError(f"{flag} {name}: unknown{did_you_mean(name, known)}; choose from {', '.join(known)}")


def parse_size(text: str, flag: str = "size", example: str = "4GiB or 500MB") -> int:
    """`4GiB`, `500MB`, `1.5G` or plain bytes -> bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if not match or match[2] == "I" or not 0 < float(match[1]) < 1e18:
        raise UserError(f"{flag}: '{text}' cannot be; write it like {example}")
    return round(float(match[1]) * SIZES[match[2]])


def parse_rate(text: str, flag: str = "rate") -> int:
    """`25GB/s` -> bytes a second."""
    bits = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])b(?:its?)?(?:/s|ps)?\s*", text)
    if bits and float(bits[1]):
        rate = format_bytes(float(bits[1]) * SIZES[bits[2]] / 8).replace(" ", "")
        raise UserError(f"{flag} {text}: that is bits, 8 of them a byte: write {rate}/s")
    rate = parse_size(text.strip().removesuffix("/s"), flag, "25GB/s")
    if not 1e3 <= rate < 1e15:
        raise UserError(f"{flag} {text}: {format_bytes(rate)} a second is not a link's speed; write it like 25GB/s")
    return rate


def parse_amount(amount: int | str, whole: int, flag: str) -> int:
    """A size, or a percentage of `whole` (which is the packed model) -> bytes."""
    if not isinstance(amount, str):
        if not 0 < amount < 1e18:
            raise UserError(f"{flag} {amount}: not a size")
        return int(amount)
    if not amount.strip().endswith("%"):
        size = parse_size(amount, flag)
        if re.fullmatch(r"\s*\d{1,5}(\.\d+)?\s*", amount):       # nobody means so few bytes: the unit was left out
            n = float(amount)
            meant = f"is {100 * n:g}% meant?" if n < 1 else f"write {amount.strip()}{'GiB' if n < 1000 else 'MB'}"
            raise UserError(f"{flag} {amount} is too small: {amount.strip()} was read as bytes; {meant}")
        return size
    try:
        share = float(amount.strip()[:-1])
    except ValueError:
        share = -1.0
    if not 0 < share < 1e6:
        raise UserError(f"{flag} {amount}: not a percentage; write it like 15%")
    return int(whole * share / 100)


def format_bytes(n: float) -> str:
    """Bytes as a person reads them: decimal units, as disks and links are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 999.5:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def rounded_up(n: int) -> str:
    """Bytes to three digits, no fewer than they are, as `parse_size` reads them."""
    step = 10 ** max(0, len(str(n)) - 3)
    n = -(-n // step) * step
    power = min((len(str(n)) - 1) // 3, 4)
    return f"{n / 1000**power:g}{('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def count(n: float) -> str:
    """A number of things, or of things a second, as a person reads it."""
    return f"{n:.2g}" if n < 10 else f"{n:,.0f}"


def fail(message: str) -> None:
    print("error:", *message.split(), file=sys.stderr)
    sys.exit(2)


def import_requirements() -> None:
    """What pip installs, before a program's own imports of it: if it is not there, that is one line too."""
    for name in ("numpy", "sentencepiece", "safetensors", "torch"):
        try:
            import_module(name)
        except ImportError as error:
            fail(f"{name} cannot be imported ({error}); pip install -r requirements.txt")


def run_main(main) -> None:
    """Run a program's `main`, turning what a user can cause into one line and exit status 2."""
    try:
        sys.exit(main())
    except UserError as error:
        message = str(error)
    except BrokenPipeError:                 # `generate.py ... | head`: not a mistake at all
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:                # a name too long, a device that is full
        message = f"{error.filename or 'standard output'}: {error.strerror}"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    fail(message)
