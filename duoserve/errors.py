"""What all command lines share: flags, sizes as people write them, a display of progress, and errors of one
line."""

import argparse
import difflib
import re
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
DEMO = str(WEIGHTS / "demo")
SIZES = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
         "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
SHARED = {                                  # flags that several programs have, in the same words
    "--model": {"metavar": "DIR", "default": DEMO,
                "help": "a packed or Hugging Face directory (default: weights/demo)"},
    "--device": {"help": "cpu, cuda or cuda:N (default: a GPU if there is one)"},
    "--dtype": {"help": "float32, bfloat16 or float16, also as fp32, bf16, fp16 or half (default: float32 on "
                "the CPU, bfloat16 on CUDA)"},
    "--gpu-memory": {"metavar": "SIZE|PERCENT", "help": "what torch may reserve, a percentage being of the "
                     "packed model; the CUDA context, 0.5 to 0.8 GB, comes on top (default: what is free on "
                     "the GPU, less 8 %%)"},
    "--host-memory": {"metavar": "SIZE|PERCENT", "help": "keep the most used experts in this much memory, a "
                      "percentage being of the packed model, and read the others from the disk (default: "
                      "keep all)"},
    "--predictor": {"metavar": "FILE|none",
                    "help": "what duo predicts with (default: the model's own, if it has one)"},
    "--threads": {"type": int, "metavar": "N", "help": "threads for the CPU (default: one for a small "
                  "model, else one a core; or what OMP_NUM_THREADS says)"},
    "--host-threads": {"default": "auto", "metavar": "N|auto", "help": "threads for missing experts beside "
                       "a GPU; 0 never (default: all but one, if that helps here; with --device cpu 0, "
                       "or else as many as --threads)"},
    "--compile": {"action": argparse.BooleanOptionalAction,
                  "help": "torch.compile the kernels (default: on CUDA)"},
    "--simulate-link": {"metavar": "SIZE/s", "help": "simulate a link of this speed: 25GB/s (default: no)"},
    "--simulate-host": {"metavar": "SIZE/s", "help": "and, on a CPU, a host that computes missing experts "
                        "at this speed (default: no)"},
    "--json": {"action": "store_true", "help": "one JSON object on standard output (default: text)"},
}


class UserError(Exception):
    """A mistake the user can mend: one line that names the culprit and the mend, exit status 2."""


class Version(argparse.Action):
    """`--version`: torch is imported when it is asked for, not before."""

    def __call__(self, parser, *_):
        import_requirements()
        print(f"duoserve {import_module('duoserve').__version__}, torch {import_module('torch').__version__}")
        parser.exit()


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, a guess at what was meant, and `examples` (what follows the program's
    name) at the end of --help."""

    def __init__(self, *, examples: tuple[str, ...], **options):
        super().__init__(**options)
        self.examples = [f"{self.prog} {words}" for words in examples]
        self.add_argument("--version", action=Version, nargs=0, help="of duoserve and of torch")

    def format_help(self) -> str:           # (argparse would fill its `epilog` like prose)
        return "\n  ".join([f"{super().format_help()}\nexamples:", *self.examples]) + "\n"

    def shared(self, *flags: str) -> None:
        """Add flags from `SHARED`; "--model -m" has a short form, too."""
        for names in map(str.split, flags):
            self.add_argument(*names, **SHARED[names[0]])

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
            meant = did_you_mean(flag.partition("=")[0], flags)
            self.error(f"unrecognized arguments: {' '.join(rest)}{meant}")
        return namespace, rest


def did_you_mean(word: str, known) -> str:
    likely = difflib.get_close_matches(word.lower(), known, 1)
    return f"; did you mean {likely[0]}?" if likely else ""


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
        raise UserError(f"{flag} {text}: {format_bytes(rate)} a second is not a link's speed; "
                        "write it like 25GB/s")
    return rate


def parse_amount(amount: int | str, whole: int, flag: str) -> int:
    """A size, or a percentage of `whole` (which is the packed model) -> bytes."""
    if not isinstance(amount, str):
        if not 0 < amount < 1e18:
            raise UserError(f"{flag} {amount}: not a size")
        return int(amount)
    if not amount.strip().endswith("%"):
        size = parse_size(amount, flag)
        if re.fullmatch(r"\s*\d{1,5}(\.\d+)?\s*", amount):       # so few bytes: the unit was left out
            n, digits = float(amount), amount.strip()
            meant = f"is {100 * n:g}% meant?" if n < 1 else f"write {digits}{'GiB' if n < 1000 else 'MB'}"
            raise UserError(f"{flag} {amount} is too small: {digits} was read as bytes; {meant}")
        return size
    match = re.fullmatch(r"\s*(\d*\.?\d+)\s*%\s*", amount)
    if not match or not 0 < float(match[1]) < 1e6:
        raise UserError(f"{flag} {amount}: not a percentage; write it like 15%")
    return int(whole * float(match[1]) / 100)


def format_bytes(n: float) -> str:
    """Bytes to three digits, in decimal units, as disks and links are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 999.5:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def rounded_up(n: int) -> str:
    """Bytes rounded up to three digits, as `parse_size` reads them."""
    step = 10 ** max(0, len(str(n)) - 3)
    return format_bytes(-(-n // step) * step).replace(" ", "")


def count(n: float) -> str:
    """A number of things, or of things a second, as a person reads it."""
    return f"{n:.2g}" if n < 10 else f"{n:,.0f}"


class Progress:
    """One line on standard error, written anew, if that is a terminal and the work takes over two seconds.

    It counts bytes, unless `write` says how to write down something else.
    """

    def __init__(self, total: int, label: str, write=format_bytes):
        self.total, self.label, self.done, self.start, self.write = total, label, 0, time.monotonic(), write
        self.shown, self.next, self.lock = sys.stderr.isatty(), self.start + 2, threading.Lock()

    def add(self, n: int) -> None:
        with self.lock:                                             # loading adds from several threads
            self.done, now = self.done + n, time.monotonic()
            if self.shown and now >= self.next and self.done:
                rate = self.done / (now - self.start)
                minutes, seconds = divmod(round(max(0, self.total - self.done) / rate), 60)
                done, total, rate = map(self.write, (self.done, self.total, rate))
                print(f"\r{self.label}: {done} of {total}, {rate}/s, {minutes}:{seconds:02d} left\033[K",
                      end="", file=sys.stderr, flush=True)
                self.next = now + 0.2
            if self.done >= self.total:     # (whoever closes it may have something else to do before)
                self.close()

    def close(self) -> None:
        if self.next > self.start + 2:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        self.shown, self.next = False, self.start


def note(text: str) -> None:
    """What a user should know, on standard error; the program goes on."""
    print(f"note: {text}", file=sys.stderr)


@contextmanager
def reading_text(name: str):
    """What may be wrong with a text that the user names is a `UserError` that calls it by `name`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror}); name a text file") from None
    except UnicodeDecodeError:
        raise UserError(f"{name}: is not UTF-8 text; name a text file") from None


def fail(message: str) -> None:
    print("error:", *message.split(), file=sys.stderr)
    sys.exit(2)


def import_requirements() -> None:
    """Import what pip installs, before anything else does, so that what is missing is one line, too."""
    for name in ("numpy", "sentencepiece", "safetensors", "torch"):
        try:
            import_module(name)
        except ImportError as error:
            fail(f"{name} cannot be imported ({error}); pip install -r requirements.txt")


def run_main(main) -> None:
    """Run a program's `main`; what a user can cause is one line and exit status 2."""
    try:
        sys.exit(main())
    except UserError as error:
        message = str(error)
    except BrokenPipeError:                 # `generate.py ... | head`: no error
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:                # a name too long, a device that is full
        message = f"{error.filename or 'standard output'}: {error.strerror}"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:              # a mistake in a policy of one's own; anything else is ours
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in sys.argv[1:]]
        if not own:
            raise
        at = own[-1]
        message = f"{at.filename}:{at.lineno}, in {at.name}: {type(error).__name__}: {error}"
    fail(message)
