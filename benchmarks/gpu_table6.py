"""Table 6 and Figures 1 and 6 under the paper's protocol on a GPU, in pieces: each call works for some minutes, the next goes on.

    python benchmarks/gpu_table6.py --out reproduction --minutes 8.5

Three seeds of ResNet-20, 32, 44, 56, plain-20 and plain-56, five of ResNet-110, one of ResNet-1202. When all is done it prints so;
the results and the page are in OUT. It has never run on a GPU.
"""

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

# (experiment, training, seeds), the short ones first
WORK = [
    *[("table6", f"resnet{depth}", 3) for depth in (20, 32, 44, 56)],
    *[("figure1", net, 3) for net in ("plain20", "plain56")],
    ("table6", "resnet110", 5),
    ("table6", "resnet1202", 1),
]
GRACE = 30  # seconds that a stopped run has to save itself


def reproduce(out: Path, deadline: float, *words: str) -> bool:
    """Run a command until the deadline. Returns whether it came to its end."""
    command = [sys.executable, "-m", "reslearn", "reproduce", *words, "--scale", "paper", "--out", str(out)]
    print(" ".join(command), flush=True)
    process = subprocess.Popen(command)
    try:
        code = process.wait(max(1.0, deadline - GRACE - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        process.wait(GRACE)
        return False
    if code:
        sys.exit(code)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("reproduction"))
    parser.add_argument("--minutes", type=float, default=8.5)
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    for experiment, net, seeds in WORK:
        if not reproduce(options.out, deadline, experiment, "--only", net, "--seeds", str(seeds)):
            print("not done: run the same command again", flush=True)
            return
    for experiment, seeds in (("table6", 5), ("figure1", 3), ("figure6", 3)):
        reproduce(options.out, deadline + 60, experiment, "--no-train", "--seeds", str(seeds))
    print(f"done: {options.out / 'index.html'}")


if __name__ == "__main__":
    main()
