"""Kills one of two ranks with SIGKILL at a random time, recovers, and checks that the result equals an uninterrupted job's.

    python benchmarks/kill_a_rank.py --runs 5 --out benchmarks/results/kill_a_rank.json
    python benchmarks/kill_a_rank.py --runs 4 --hang --out benchmarks/results/hang_a_rank.json

--hang stops the rank silently (SIGSTOP) instead of killing it. Runs alternate between two ways to recover: the job ends and is
restarted with --resume, or torchrun restarts its ranks (--max-restarts). Each run has per-rank BN, micro-batches, a weight
average, a learning-rate drop and several epochs.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from kill_and_resume import finish, make_data, metrics, start, state, wait

RANKS, STEPS, MAX_SECONDS = 2, 60, 90
SETTINGS = (
    f"schedule.shape=steps schedule.warmup=0 schedule.steps={STEPS} schedule.drops=[45] schedule.lr=0.05 data.val=200 "
    "batch.size=32 batch.micro=8 ema=0.9 log.every=1 evaluate.every=10 checkpoint.every=4 data.workers=1"
).split()


def start_ranks(arguments: list[str], log: Path, cache: Path, restarts: int = 0) -> subprocess.Popen:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", f"--max-restarts={restarts}"]
    return start(arguments, log, cache, torchrun)


def ranks_of(process: subprocess.Popen) -> dict[int, int]:
    """rank -> process ID of a job's child processes."""
    pids = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        rank = next((v.partition(b"=")[2] for v in variables if v.startswith(b"RANK=")), None)
        if rank is not None:
            pids[int(rank)] = int(pid)
    return pids


def signal_rank(process: subprocess.Popen, run: Path, step: int, rank: int, number: signal.Signals) -> int:
    """Sends a signal to a rank once the run has reached a step. Returns the last logged step."""
    while process.poll() is None and max((line["step"] for line in metrics(run)), default=0) < step:
        time.sleep(0.002)
    os.kill(ranks_of(process)[rank], number)
    return max(line["step"] for line in metrics(run))


def exit_code(process: subprocess.Popen) -> int:
    """Waits for a job to end by itself and returns its exit code. On a timeout, kills the job and its ranks."""
    try:
        return process.wait(timeout=300)
    except subprocess.TimeoutExpired:
        for pid in (*ranks_of(process).values(), process.pid):
            os.kill(pid, signal.SIGKILL)
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="random seed of the times")
    parser.add_argument("--hang", action="store_true", help="stop the rank instead of killing it")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    times, rows = random.Random(options.seed), []
    # Ranks wait ten minutes for rank 0 to write a checkpoint, so --hang writes few.
    settings = [s.replace("checkpoint.every=4", "checkpoint.every=25") if options.hang else s for s in SETTINGS]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data, cache, log = make_data(folder), folder / "cache", folder / "log"
        command = [data["small"], "--model", "resnet8", "--recipe", "fashion", "--device", "cpu", *(f"--set={s}" for s in settings)]
        wait(start_ranks([*command, "--out", str(folder / "whole")], log, cache), log)
        expected = state(folder / "whole")
        for i in range(options.runs):
            recovery = ("--resume", "--max-restarts")[i % 2]
            run, step, rank = folder / f"run-{i}", times.randrange(1, STEPS - 5), (i + 1) // 2 % RANKS
            process = start_ranks([*command, "--out", str(run)], log, cache, restarts=int(recovery == "--max-restarts"))
            number = signal.SIGSTOP if options.hang else signal.SIGKILL
            last_step = signal_rank(process, run, step, rank, number)
            started = time.monotonic()
            row = {"how": recovery, "rank": rank, "signal": number.name, "after_step": last_step}
            if recovery == "--resume":
                code = exit_code(process)
                row["seconds_to_end"] = round(time.monotonic() - started, 1)
                text = log.read_text()
                message = rf"rank {rank} has not responded" if options.hang else rf"rank\s*: {rank} .*\n\s*exitcode\s*: -9"
                row["names_the_rank"], row["says"] = bool(re.search(message, text)), re.findall(r"reslearn: .*", text)
                row["ended_in_time"] = code != 0 and row["seconds_to_end"] < MAX_SECONDS
                wait(start_ranks(["--resume", str(run)], log, cache), log)
            else:
                wait(process, log)
                row["names_the_rank"] = not options.hang or f"rank {rank} has not responded" in log.read_text()
            actual = state(run)
            row["differs"] = [key for key in actual if actual[key] != expected[key]]
            row["identical"] = not row["differs"] and row.get("names_the_rank", True) and row.get("ended_in_time", True)
            rows.append(row)
            print(f"{i + 1:3d}/{options.runs}  {row}", flush=True)
    finish(rows, options.out, ranks=RANKS, steps=STEPS)


if __name__ == "__main__":
    main()
