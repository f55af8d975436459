"""How much two runs of generate.py slow each other down: each should take at most three times as long as
alone.

    python tests/measure_two_at_once.py [--rounds 3] [options of generate.py ...]

Run it by hand on an idle machine: it measures time, so it is not a test. Exit status 1 if it is more.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "Once upon a time there was a king who had three daughters, and the youngest of them"
MOST = 3


def run(processes: int, options: list[str]) -> list[dict]:
    """The statistics of so many runs that were started together."""
    command = [sys.executable, "generate.py", "--prompt", PROMPT, "--device", "cpu", "--json", *options]
    started = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(processes)]
    answers = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit("generate.py failed")
    return [json.loads(answer)["stats"] for answer in answers]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    args, options = parser.parse_known_args()
    alone, both = ([run(processes, options) for _ in range(args.rounds)] for processes in (1, 2))
    worst = 0.0
    for name, label in (("load_s", "loading"), ("ttft_s", "first token"), ("tpot_s", "each further token")):
        one = statistics.median(stats[name] for stats, in alone)
        slower = (max(stats[name] for stats in pair) for pair in both)
        two = statistics.median(slower)
        print(f"{label:20}{1e3 * one:9.1f} ms alone{1e3 * two:10.1f} ms beside another: "
              f"{two / one:.2f} times")
        worst = max(worst, two / one)
    return int(worst > MOST)


if __name__ == "__main__":
    sys.exit(main())
