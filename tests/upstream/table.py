"""Write docs/upstream-tests.md from the results that conftest.py wrote: `python table.py RESULTS`."""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parents[2] / "docs" / "upstream-tests.md"
GROUPS = {
    "TahoeX1ModelTest": "transformers: models",
    "TahoeX1OtherShapeTest": "transformers: models with drugs",
    "TahoeX1ConfigTest": "transformers: configuration",
    "TahoeX1TokenizationTest": "transformers: tokenizer",
    "TahoeX1PipelineTest": "transformers: pipelines",
    "TestFeatureExtraction": "PEFT: feature extraction",
    "TestCellClassification": "PEFT: classification of cells",
    "TestGeneClassification": "PEFT: classification of genes",
}
LISTED = "listed: "
# Parts of reasons that name the test once more.
REWORDED = {
    r"^TahoeX1PipelineTest::\S+ is skipped: `\S+` is not in .*": "a task that these models do not have",
    r"<class '(\w+\.)*(TahoeX1)?\w+'>|TahoeX1Model(?= )": "this class",
}
HEAD = """# transformers' and PEFT's own tests

Written by `make test-upstream`, which takes the common tests of transformers {transformers} and PEFT {peft} from their
source distributions and runs them on our classes (torch {torch}, on a CPU; `tests/upstream`). Revision
{revision}{changed}.

| tests | passed | failed | left out by our list | left out by themselves | subtests passed |
|---|---|---|---|---|---|
"""
NOT_THERE = """
transformers' source distribution lacks its tests of exporters and of text generation, and the examples of its pipeline
tests. `torch.export` is tested in `tests/test_modeling_tahoe_x1.py`; the pipeline tester has cells as examples.
"""


def group_of(name: str) -> str:
    return GROUPS[name.split("::")[1]]


def counts(record: dict[str, Any]) -> str:
    """Make the rows of the table."""
    ended: Counter[tuple[str, str]] = Counter()
    for name, test in record["tests"].items():
        kind = "listed" if test["reason"].startswith(LISTED) else test["outcome"]
        ended[group_of(name), kind] += 1
    subtests: Counter[str] = Counter()
    for name, number in record["subtests"].items():
        if name.endswith(" passed"):
            subtests[group_of(name)] += number
    kinds = ("passed", "failed", "listed", "skipped")
    rows = [
        f"| {group} | {' | '.join(f'{ended[group, kind]:,}' for kind in kinds)} | {subtests[group]:,} |"
        for group in GROUPS.values()
        if any(ended[group, kind] for kind in kinds)
    ]
    whole = [sum(number for (_, each), number in ended.items() if each == kind) for kind in kinds]
    rows.append(f"| all | {' | '.join(f'{number:,}' for number in whole)} | {sum(subtests.values()):,} |")
    return "\n".join(rows) + "\n"


def test_name(name: str) -> str:
    """Return a test's name without file, class and parameters."""
    return re.sub(r"\[.*|_\d+(_\w+)?$", "", name.split("::")[2], flags=re.DOTALL)


def reasons(record: dict[str, Any], listed: bool) -> str:
    """List the reasons for which tests were left out, with their numbers, and the tests where our list names them."""
    found: dict[str, list[str]] = {}
    for name, test in record["tests"].items():
        if test["outcome"] == "skipped" and test["reason"].startswith(LISTED) == listed:
            reason = " ".join(test["reason"].removeprefix(LISTED).split())
            for pattern, plain in REWORDED.items():
                reason = re.sub(pattern, plain, reason)
            found.setdefault(reason, []).append(f"{group_of(name)}, `{test_name(name)}`")
    lines = []
    for reason, names in sorted(found.items(), key=lambda item: (-len(item[1]), item[0])):
        which = f" ({'; '.join(sorted(set(names)))})" if listed and len(set(names)) <= 40 else ""
        lines.append(f"- {len(names)}: {reason}{which}")
    return "\n".join(lines) + "\n"


def main() -> None:
    record = json.loads(Path(sys.argv[1]).read_text())
    changed = f", with {record['changed_files']} changed files" if record["changed_files"] else ""
    revision, *parents = [each[:12] for each in record["revisions"]] or ["unknown"]
    if parents:
        revision += f" (merge of {' and '.join(parents)})"
    text = HEAD.format(**record["versions"], revision=revision, changed=changed) + counts(record)
    failed = [name for name, test in record["tests"].items() if test["outcome"] == "failed"]
    if failed:
        text += "\n## Failed\n\n" + "".join(f"- {group_of(name)}: `{name.split('::')[2]}`\n" for name in failed)
    text += NOT_THERE
    text += "\n## Left out by our list\n\n`tests/upstream/skips.py` gives one reason for each.\n\n" + reasons(
        record, True
    )
    text += "\n## Left out by themselves\n\n" + reasons(record, False)
    DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
