"""Keep what a whole run has measured until it ends, so that the same command goes on after a stop."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measuring import Row, Series

NAME = "unfinished.jsonl"
ROOT = Path(__file__).resolve().parents[1]


def code_digest() -> str:
    """Return a digest of the code that is measured and that measures."""
    digest = hashlib.blake2b(digest_size=16)
    for folder in ("tahoex1_hf", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@dataclass
class Measured:
    """What was measured in one part.

    Attributes:
        rows: Its rows.
        limits: All measurements of the hardware's limits up to its end, by the limit's name.
        seconds: Seconds that it took.
        cpu_seconds: CPU seconds that it took, with those of the processes that it started.
    """

    rows: list[Row] = field(default_factory=list)
    limits: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> "Measured":
        """Return what `asdict` made into a dictionary."""
        return cls(**{**values, "rows": [_row(row) for row in values["rows"]]})


def _row(values: Mapping[str, Any]) -> Row:
    series, reference = values["series"], values["reference"]
    beside = None if reference is None else Series(**reference)
    return Row(**{**values, "series": Series(**series), "reference": beside})


class Unfinished:
    """The file of a run that has not ended: a line that says what it is a run of, and a line for each finished part.

    Args:
        folder: Folder of the run.
        identity: All that its parts must have in common: machine, code, sizes, rounds.
        restart: Whether to forget what an earlier run has measured.

    Raises:
        ValueError: If another run was begun in the folder.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], restart: bool):
        self.path = folder / NAME
        self.parts: dict[str, Measured] = {}
        # Read as JSON, so that what is compared has the same types.
        identity = json.loads(json.dumps(identity))
        if restart or not self.path.is_file():
            self.path.write_text(json.dumps(identity) + "\n", encoding="utf-8")
            return
        first, *lines = self.path.read_text(encoding="utf-8").splitlines()
        found = json.loads(first)
        other = sorted(name for name in {*found, *identity} if found.get(name) != identity.get(name))
        if other:
            raise ValueError(f"{self.path} is of a run with another {', '.join(other)}: pass --restart to begin anew.")
        for line in lines:
            values = json.loads(line)
            part = values.pop("part")
            self.parts[part] = Measured.of_json(values)

    def add(self, part: str, measured: Measured) -> None:
        """Write down what was measured in a part."""
        self.parts[part] = measured
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"part": part, **asdict(measured)}) + "\n")

    def forget(self) -> None:
        """Remove the file, when the run has ended."""
        self.path.unlink()
