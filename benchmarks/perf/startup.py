"""How long ``agentsdpo --help`` takes: whole processes, median of many, beside a bare interpreter.

    python -m agentsdpo.benchmarks.perf.startup [--runs 20] [--json]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time


def seconds(*arguments: str) -> float:
    """Wall time of one interpreter run."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    pairs = [(seconds("-m", "agentsdpo.cli", "--help"), seconds("-c", "pass")) for _ in range(args.runs + 1)][1:]
    mine, bare = (statistics.median(values) for values in zip(*pairs, strict=True))
    row = {"name": "help_s", "value": round(mine, 4), "unit": "s", "peer": "python -c pass",
           "detail": {"peer_s": round(bare, 4), "runs": args.runs}}
    sys.stdout.write(json.dumps([row]) + "\n" if args.json else
                     f"agentsdpo --help {mine:.3f} s, python -c pass {bare:.3f} s (medians of {args.runs})\n")


if __name__ == "__main__":
    main()
