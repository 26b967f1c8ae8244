"""Skip what cannot hold for these models, by the list in skips.py, and write down how each test ended."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from skips import SKIPS  # noqa: E402

RESULTS = Path(os.environ["TAHOEX1_UPSTREAM_RESULTS"])
_ended: dict[str, tuple[str, str]] = {}
_subtests: Counter[str] = Counter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    used = set()
    for item in items:
        for pattern, reason in SKIPS:
            if re.search(pattern, item.nodeid):
                used.add(pattern)
                item.add_marker(pytest.mark.skip(reason=f"listed: {reason}"))
                break
    # Where all files are run, each line of the list must still skip something.
    if {item.path.name for item in items} >= {"models.py", "adapters.py", "tokenizer.py", "pipelines.py"}:
        unused = [pattern for pattern, _ in SKIPS if pattern not in used]
        if unused:
            raise pytest.UsageError(f"skips.py: {unused} match no test. Delete them.")


def pytest_runtest_logreport(report: Any) -> None:
    if hasattr(report, "context"):  # a subtest
        _subtests[report.nodeid, report.outcome] += 1
        if report.outcome == "failed":
            _ended[report.nodeid] = ("failed", str(report.longrepr)[-400:])
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")[-400:]
    if report.outcome != "passed" or report.when == "call":
        _ended.setdefault(report.nodeid, (report.outcome, reason.removeprefix("Skipped: ")))


def ask_git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(HERE), *arguments], capture_output=True, text=True, check=False).stdout


def pytest_sessionfinish() -> None:
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "peft", "torch")}
    # The revision and, of a merge, its parents.
    revisions = ask_git("rev-list", "--parents", "-n", "1", "--abbrev-commit", "HEAD").split()
    changed = ask_git("status", "--porcelain", "--untracked-files=no")
    record = {
        "versions": versions,
        "revisions": revisions if len(revisions) > 2 else revisions[:1],
        "changed_files": len(changed.splitlines()),
        "tests": {name: {"outcome": outcome, "reason": reason} for name, (outcome, reason) in sorted(_ended.items())},
        "subtests": {f"{name} {outcome}": number for (name, outcome), number in sorted(_subtests.items())},
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
