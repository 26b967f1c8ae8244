"""Measure the small cases that scaling_simulation.py must reproduce: `python -m benchmarks.ray_waits [CASE ...]`.

A pipeline of the real engine, whose stages wait instead of computing: how long it takes then depends on the engine
and its workers, and hardly on who else uses the machine. One worker, two, one of them slow, workers that die in the
middle of a piece, and a store that serves one piece at a time. The seconds go into docs/benchmarks/ray-waits.jsonl.
"""

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PIECES, READ, COMPUTE, WRITE, SLOW = 24, 0.2, 1.5, 0.1, 3.0
RECORD = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "ray-waits.jsonl"
# Name: workers, factor by which the first is slower, calls in the middle of which a worker dies, seconds of the store
CASES: dict[str, tuple[int, float, tuple[int, ...], float]] = {
    "1 worker": (1, 1.0, (), 0.0),
    "2 workers": (2, 1.0, (), 0.0),
    "2 workers, one 3 times as slow": (2, SLOW, (), 0.0),
    "1 worker, killed once": (1, 1.0, (12,), 0.0),
    "2 workers, 3 kills": (2, 1.0, (6, 12, 18), 0.0),
    "2 workers, a store with a limit": (2, 1.0, (), 1.2),
}


def next_number(path: Path) -> int:
    """Return 1, 2, 3, ... to whoever asks, in whatever process."""
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        number = len(file.read()) + 1
        file.write("x")
    return number


def note_time(path: Path) -> None:
    """Add the time to a file."""
    with path.open("a") as file:
        file.write(f"{time.time()}\n")


def restart(folder: Path, workers: int) -> float | None:
    """Return the mean seconds from a worker's death to its successor's start; None where none died."""
    if not (folder / "deaths").is_file():
        return None
    deaths, starts = ([float(line) for line in (folder / name).read_text().split()] for name in ("deaths", "starts"))
    again = sorted(starts)[workers:]
    if len(again) != len(deaths):
        raise RuntimeError(f"{len(deaths)} workers died, {len(again)} were started in their place.")
    return round((sum(again) - sum(deaths)) / len(deaths), 2)


def read(row: dict[str, Any]) -> dict[str, Any]:
    """Wait as a reader."""
    time.sleep(READ)
    return row


class Compute:
    """Wait as a model; the first worker may be slow, and calls of given numbers kill their worker.

    Args:
        folder: Folder in which workers and calls are counted.
        slow: Factor by which the first worker is slower.
        kills: Numbers of the calls that kill.
    """

    def __init__(self, folder: str, slow: float, kills: tuple[int, ...]):
        self.folder, self.kills = Path(folder), kills
        note_time(self.folder / "starts")
        self.factor = slow if next_number(self.folder / "workers") == 1 else 1.0

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Wait, or die half way."""
        if row["number"] < 0:
            return row
        if next_number(self.folder / "calls") in self.kills:
            time.sleep(COMPUTE / 2)
            note_time(self.folder / "deaths")
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(COMPUTE * self.factor)
        return row


def write(row: dict[str, Any], folder: str, store: float) -> dict[str, Any]:
    """Wait as a writer, after the others where the store serves one at a time."""
    if store and row["number"] >= 0:
        with Path(folder, "store").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            time.sleep(store)
    time.sleep(WRITE)
    return row | {"ended": time.time()}


def seconds_of(name: str) -> dict[str, Any]:
    """Run a case, and return the seconds from the first piece's start to the last piece's end."""
    from tahoex1_hf.common.cluster import ClusterOptions, Stage, connected

    workers, slow, kills, store = CASES[name]
    with TemporaryDirectory() as folder, connected(ClusterOptions("local", workers, workers)) as cluster:
        stages = [
            Stage(read, cpus=0.5),
            Stage(Compute, {"folder": folder, "slow": slow, "kills": kills}, cpus=0.5),
            Stage(write, {"folder": folder, "store": store}, cpus=0.5),
        ]
        rows = [{"number": number} for number in range(PIECES)]
        begun, ends = time.time(), []
        for row in cluster.run(rows, stages):
            ends.append(row["ended"])
        ends.sort()
        # The start of Ray's workers is not what is simulated: time runs from when the first piece was computed.
        return {
            "what": name,
            "pieces": len(ends),
            "seconds": round(ends[-1] - ends[0], 2),
            "first_piece_after_s": round(ends[0] - begun, 1),
            "restart_s": restart(Path(folder), workers),
            "load": round(os.getloadavg()[0], 1),
        }


def main(names: list[str]) -> None:
    """Measure cases, all if none is named, and write them down beside those that were measured before."""
    from benchmarks.ray_cost import start_ray

    found = {line["what"]: line for line in map(json.loads, RECORD.read_text().splitlines())} if names else {}
    for name in names or CASES:
        ray = start_ray(8)
        found[name] = seconds_of(name)
        ray.shutdown()
        print(json.dumps(found[name]), flush=True)
    RECORD.write_text("".join(json.dumps(found[name]) + "\n" for name in CASES))


if __name__ == "__main__":
    from benchmarks import ray_waits  # by its name, as workers import it

    ray_waits.main(sys.argv[1:])
