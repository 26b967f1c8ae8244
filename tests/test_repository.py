"""What stands around the package agrees: versions, addresses, commands of workflows, Dockerfile, the tests' forks."""

import configparser
import re
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
import yaml
from check_docker import instructions, is_ignored
from helpers import REPO_ROOT

import tahoex1_hf

WORKFLOWS = sorted((REPO_ROOT / ".github" / "workflows").glob("*.yml"))
SETUP = configparser.ConfigParser()
SETUP.read(REPO_ROOT / "setup.cfg", encoding="utf-8")
SOURCE = SETUP["metadata"]["url"]


def read(name: str) -> str:
    return (REPO_ROOT / name).read_text(encoding="utf-8")


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_version_is_one() -> None:
    assert load(REPO_ROOT / "CITATION.cff")["version"] == tahoex1_hf.__version__
    newest = re.search(r"^## \[(\d[^]]*)\]", read("CHANGELOG.md"), flags=re.MULTILINE)
    assert newest is not None
    assert newest[1] == tahoex1_hf.__version__


def test_the_address_is_one() -> None:
    """The repository's address is in setup.cfg; whoever changes it there is told where else it stands."""
    urls = dict(re.findall(r"^(\w+) = (\S+)$", SETUP["metadata"]["project_urls"], flags=re.MULTILINE))
    assert all(urls[name].startswith(SOURCE) for name in ("Source", "Issues", "Changelog"))
    assert load(REPO_ROOT / "CITATION.cff")["repository-code"] == SOURCE
    assert yaml.load(read("mkdocs.yml"), yaml.BaseLoader)["repo_url"] == SOURCE


def test_workflows_call_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), flags=re.MULTILINE))
    called = set()
    for path in WORKFLOWS:
        for job in load(path)["jobs"].values():
            assert "timeout-minutes" in job or set(job) >= {"environment"}, path
            for step in job["steps"]:
                called |= set(re.findall(r"\bmake ([a-z-]+)", step.get("run", "")))
    assert called == {"check-dist", "docs", "test", "test-lowest", "test-newest"}
    assert called <= targets


def test_nobody_may_write_unasked() -> None:
    """A workflow reads, and only the jobs that publish get a token for that alone."""
    may_write = {}
    for path in WORKFLOWS:
        workflow = load(path)
        assert workflow["permissions"] == {"contents": "read"}
        for name, job in workflow["jobs"].items():
            if job.get("permissions"):
                may_write[path.stem, name] = set(job["permissions"])
    assert may_write == {("docs", "publish"): {"pages", "id-token"}, ("publish", "pypi"): {"id-token"}}


def test_the_classifiers_are_the_versions_that_are_tested() -> None:
    jobs = load(REPO_ROOT / ".github/workflows/tests.yml")["jobs"]
    tested = [jobs["test"]["steps"][1]["with"]["python-version"], *jobs["newest"]["strategy"]["matrix"]["python"]]
    classifiers = re.findall(r"Python :: (3\.\d+)$", SETUP["metadata"]["classifiers"], flags=re.MULTILINE)
    assert classifiers == tested


def test_the_dockerfile_copies_what_is_there() -> None:
    sources = {name for instruction, text in instructions() if instruction == "COPY" for name in text.split()[:-1]}
    assert {"setup.cfg", "tahoex1_hf"} <= sources
    for name in sources:
        assert (REPO_ROOT / name).exists(), name
        assert not is_ignored(name), name
    for name in ("tests", "docs/scaling.png", ".git", "dist/tahoex1_hf-0.2.0.tar.gz", "tahoex1_hf/__pycache__/x.pyc"):
        assert is_ignored(name), name


@pytest.mark.parametrize("where", ["Dockerfile", "environment.yml", "Makefile", "README.md"])
def test_extras_exist(where: str) -> None:
    asked = {
        extra for names in re.findall(r"(?:\.|tahoex1_hf)\[([a-z0-9,]+)\]", read(where)) for extra in names.split(",")
    }
    assert asked
    assert asked <= set(SETUP["options.extras_require"])


def test_what_extras_name_is_pinned() -> None:
    pins = {re.split("==", line)[0].lower() for line in read("constraints.txt").splitlines() if "==" in line}
    for extra in ("docs", "notebooks", "dist", "test"):
        for line in SETUP["options.extras_require"][extra].split("\n"):
            name = re.match(r"[\w.-]*", line)
            assert name is not None
            if name[0] and name[0] != "tahoex1_hf":
                assert name[0].lower() in pins, f"{extra}: {name[0]}"


def test_workers_import_what_failed_or_was_skipped_anew(tmp_path: Path) -> None:
    """Where tests are collected for forks, half made modules would lack their tests, and nobody would be told."""
    (tmp_path / "test_good.py").write_text("def test_it(): pass\n")
    (tmp_path / "test_failing.py").write_text("def test_it(): pass\nimport nothing_there\n")
    (tmp_path / "test_skipped.py").write_text("import pytest\npytest.importorskip('nothing_there')\n")
    code = (
        "import fork_server, sys\n"
        "fork_server.collect([sys.argv[1], '--import-mode=importlib', '-c', '/dev/null', '--rootdir', sys.argv[1]])\n"
        "print([name for name in sys.modules if name.startswith('test_')])"
    )
    done = forked.run([sys.executable, "-c", code, tmp_path], cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "['test_good']", done.stdout + done.stderr
