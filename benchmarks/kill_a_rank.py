"""Kill one of two ranks with -9 at a random moment, go on, and compare every bit with the job that was left alone.

    python benchmarks/kill_a_rank.py --runs 5 --out benchmarks/results/kill_a_rank.json
    python benchmarks/kill_a_rank.py --runs 4 --hang --out benchmarks/results/hang_a_rank.json

--hang stops it (SIGSTOP), which nobody is told of, instead of killing it. In turn: the job ends and is started again with
--resume; or torchrun starts its ranks again itself (--max-restarts). Each run has BN of each rank's own images, micro-batches, an
average of the weights, an lr drop and several epochs.
"""

import argparse
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kill_and_resume import make_data, metrics, state

RANKS, STEPS, MOST_SECONDS = 2, 60, 90
SETTINGS = (
    f"schedule.shape=steps schedule.warmup=0 schedule.steps={STEPS} schedule.drops=[45] schedule.lr=0.05 data.val=200 "
    "batch.size=32 batch.micro=8 ema=0.9 log.every=1 evaluate.every=10 checkpoint.every=4 data.workers=1"
).split()


def start(arguments: list[str], log: Path, cache: Path, restarts: int = 0) -> subprocess.Popen:
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", f"--max-restarts={restarts}"]
    with log.open("w") as out:
        command = [sys.executable, *torchrun, "-m", "reslearn", "train", *arguments]
        return subprocess.Popen(command, stdout=out, stderr=out, env=environment)


def wait(process: subprocess.Popen, log: Path) -> None:
    if process.wait(timeout=600) != 0:
        sys.exit(f"a job failed:\n{log.read_text()[:6000]}")


def ranks_of(process: subprocess.Popen) -> dict[int, int]:
    """rank -> process id of a job's children."""
    found = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        rank = next((v.partition(b"=")[2] for v in variables if v.startswith(b"RANK=")), None)
        if rank is not None:
            found[int(rank)] = int(pid)
    return found


def strike(process: subprocess.Popen, run: Path, step: int, rank: int, by: signal.Signals) -> int:
    """Kill or stop a rank once the run has come to a step. Returns the step that it had come to."""
    while process.poll() is None and max((line["step"] for line in metrics(run)), default=0) < step:
        time.sleep(0.002)
    os.kill(ranks_of(process)[rank], by)
    return max(line["step"] for line in metrics(run))


def ended(process: subprocess.Popen) -> int:
    """The exit code of a job that should end by itself; one that does not is ended with its ranks."""
    try:
        return process.wait(timeout=300)
    except subprocess.TimeoutExpired:
        for pid in (*ranks_of(process).values(), process.pid):
            os.kill(pid, signal.SIGKILL)
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--hang", action="store_true", help="stop the rank instead of killing it")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    moments, rows = random.Random(options.seed), []
    # While a checkpoint is written, rank 0 has ten minutes: with --hang there are few.
    settings = [s.replace("checkpoint.every=4", "checkpoint.every=25") if options.hang else s for s in SETTINGS]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data, cache, log = make_data(folder), folder / "cache", folder / "log"
        command = [data["small"], "--model", "resnet8", "--recipe", "fashion", "--device", "cpu", *(f"--set={s}" for s in settings)]
        wait(start([*command, "--out", str(folder / "whole")], log, cache), log)
        expected = state(folder / "whole")
        for i in range(options.runs):
            how = ("--resume", "--max-restarts")[i % 2]
            run, step, rank = folder / f"run-{i}", moments.randrange(1, STEPS - 5), (i + 1) // 2 % RANKS
            process = start([*command, "--out", str(run)], log, cache, restarts=int(how == "--max-restarts"))
            by = signal.SIGSTOP if options.hang else signal.SIGKILL
            struck_at = strike(process, run, step, rank, by)
            began = time.monotonic()
            row = {"how": how, "rank": rank, "signal": by.name, "after_step": struck_at}
            if how == "--resume":
                code = ended(process)
                row["seconds_to_end"] = round(time.monotonic() - began, 1)
                text = log.read_text()
                named = rf"rank {rank} has not responded" if options.hang else rf"rank\s*: {rank} .*\n\s*exitcode\s*: -9"
                row["names_the_rank"], row["says"] = bool(re.search(named, text)), re.findall(r"reslearn: .*", text)
                row["ended_in_time"] = code != 0 and row["seconds_to_end"] < MOST_SECONDS
                wait(start(["--resume", str(run)], log, cache), log)
            else:
                wait(process, log)
                row["names_the_rank"] = not options.hang or f"rank {rank} has not responded" in log.read_text()
            got = state(run)
            row["differs"] = [key for key in got if got[key] != expected[key]]
            row["identical"] = not row["differs"] and row.get("names_the_rank", True) and row.get("ended_in_time", True)
            rows.append(row)
            print(f"{i + 1:3d}/{options.runs}  {row}", flush=True)
    same = sum(row["identical"] for row in rows)
    summary = {"runs": len(rows), "identical": same, "ranks": RANKS, "steps": STEPS, "python": platform.python_version()}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"command": "python " + " ".join(sys.argv), **summary, "rows": rows}, indent=1) + "\n")
    print(f"{same} of {len(rows)} identical")
    sys.exit(same != len(rows))


if __name__ == "__main__":
    main()
