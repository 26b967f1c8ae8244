# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Run a benchmark: evaluate each source once, keep what is done, and report all of them together."""

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tahoex1_hf.benchmarking.report import write_report
from tahoex1_hf.benchmarking.resampling import Measurement
from tahoex1_hf.benchmarking.sources import Source
from tahoex1_hf.benchmarking.task import Benchmark
from tahoex1_hf.common.digests import json_digest
from tahoex1_hf.common.files import WholeFile
from tahoex1_hf.common.progress import progress_bar
from tahoex1_hf.runs.memory import peak_memory_gb

logger = logging.getLogger(__name__)

DONE = "done"  # folder with a file for each source that is done
_COST = ("seconds", "cpu_seconds", "peak_memory_gb")


@dataclass(frozen=True, eq=False)
class Done:
    """The scores of a source, and what they took.

    Attributes:
        measurements: Scores.
        seconds: Time for embeddings and scores.
        cpu_seconds: CPU time for them, of all threads; None where an earlier version did not note it.
        peak_memory_gb: Peak memory of the process when the source was done.
    """

    measurements: list[Measurement]
    seconds: float
    cpu_seconds: float | None
    peak_memory_gb: float


def run_benchmark(task: Benchmark, sources: Sequence[Source], folder: Path, restart: bool = False) -> str:
    """Evaluate sources, and write a report into a folder.

    A source that is done is not evaluated again by the same command on the same folder.

    Args:
        task: Task.
        sources: Sources, the baselines included.
        folder: Folder of the run.
        restart: Whether to discard the scores of an earlier run with other cells, labels, models or settings.

    Returns:
        The verdicts.

    Raises:
        ValueError: If the folder holds scores of other inputs.
    """
    task.prepare(sources)
    settings = task.settings() | {"task": task.name}
    identities = {
        source.name: json_digest([settings, source.kind, source.what, source.key, source.fingerprint()])
        for source in sources
    }
    done_folder = folder / DONE
    if restart:
        shutil.rmtree(done_folder, ignore_errors=True)
    done_folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Done] = {}
    for source in sources:  # all of them before any work is done
        if (done := _read(done_folder, source, identities[source.name])) is not None:
            found[source.name] = done
    with progress_bar(None, total=len(sources), initial=len(found), unit="source", desc=task.name) as bar:
        for source in sources:
            if source.name in found:
                continue
            logger.info("Evaluating %s (%s).", source.name, " ".join(filter(None, [source.kind, source.what])))
            started, cpu_started = time.perf_counter(), time.process_time()
            measured = task.evaluate(source)
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
            found[source.name] = Done(measured, seconds, cpu_seconds, peak_memory_gb())
            _write(done_folder, source, identities[source.name], found[source.name])
            bar.update()
    measurements = {source.name: found[source.name].measurements for source in sources}
    notes = [*task.notes, *task.judge(measurements, sources)]
    costs = {name: {field: getattr(each, field) for field in _COST} for name, each in found.items()}
    return write_report(task, sources, measurements, notes, costs, settings, folder)


def _place(folder: Path, source: Source) -> Path:
    return folder / f"{source.name.replace(' ', '_')}.npz"


def _write(folder: Path, source: Source, identity: str, done: Done) -> None:
    facts = [{**asdict(each), "replicates": None} for each in done.measurements]
    head = {"identity": identity, "scores": facts} | {field: getattr(done, field) for field in _COST}
    arrays = {str(number): each.replicates for number, each in enumerate(done.measurements)}
    with WholeFile(_place(folder, source)) as partial, partial.open("wb") as file:
        np.savez(file, head=np.array(json.dumps(head)), **arrays)  # type: ignore[arg-type]


def _read(folder: Path, source: Source, identity: str) -> Done | None:
    """Return the scores of a source by an earlier run; None if that run did not get to it.

    Raises:
        ValueError: If that run had other inputs.
    """
    path = _place(folder, source)
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        head = json.loads(str(arrays["head"]))
        if head["identity"] != identity:
            raise ValueError(
                f"{path} holds scores of {source.name} with other cells, labels, genes, weights or settings: choose "
                "another --output, or discard them with --restart."
            )
        scores = [
            Measurement(**{**facts, "replicates": arrays[str(number)]}) for number, facts in enumerate(head["scores"])
        ]
    return Done(scores, head["seconds"], head.get("cpu_seconds"), head["peak_memory_gb"])
