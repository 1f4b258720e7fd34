"""Training beside busy processes, by the time for which torch's waiting threads spin.

    python benchmarks/spin.py --busy 0 4 --values 30000 1000 100 0

Prints a table for docs/results/training.md: steps/s of `remax_nano` at 129 pixels and batch 4, the values in
turns, each in a process of its own, since OpenMP reads the variable once. `vitkit` is what commands choose.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

STEPS = """
import sys, time
import vitkit.calibration.openmp
import torch
from vitkit.models import build

threads, seconds = int(sys.argv[1]), float(sys.argv[2])
torch.manual_seed(0)
torch.set_num_threads(threads)
network = build("remax_nano").train()
optimiser = torch.optim.SGD(network.parameters(), lr=1e-3)
images = torch.randn(4, 3, 129, 129)

def step():
    optimiser.zero_grad()
    sum(output.float().square().mean() for output in network.deploy(images)).backward()
    optimiser.step()

step()
start, steps = time.perf_counter(), 0
while time.perf_counter() - start < seconds:
    step()
    steps += 1
print(steps / (time.perf_counter() - start))
"""


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that compute all the time."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def steps_per_second(value: str, threads: int, seconds: float) -> float:
    """Training steps in a second with this `GOMP_SPINCOUNT`; `vitkit` leaves the choice to vitkit."""
    environment = {name: text for name, text in os.environ.items() if name != "GOMP_SPINCOUNT"}
    if value != "vitkit":
        environment["GOMP_SPINCOUNT"] = value
    command = [sys.executable, "-c", STEPS, str(threads), str(seconds)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--values", nargs="+", default=["30000", "1000", "100", "0", "vitkit"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print("| busy processes | " + " | ".join(given.values) + " |")
    print("|---" * (len(given.values) + 1) + "|")
    for count in given.busy:
        with busy_processes(count):
            rates: dict[str, list[float]] = {value: [] for value in given.values}
            for _ in range(given.rounds):
                for value in given.values:
                    rates[value].append(steps_per_second(value, given.threads, given.seconds))
        print(f"| {count} | " + " | ".join(f"{median(rates[value]):.2f}" for value in given.values) + " |")


if __name__ == "__main__":
    main()
