"""Take the steps of the Dockerfile in a new virtual environment, then embed cells: `make check-docker`.

It finds what a build would stumble over, without Docker: a file that is not copied or that .dockerignore keeps back,
an extra or a pin that cannot be installed, a dependency that the command needs and no extra brings. Steps of the base
image alone (apt-get, users, folders at the root) are left out; torch comes from where pip finds it, or from the index
in TORCH_INDEX.
"""

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ONLY_IN_AN_IMAGE = ("apt-get", "mkdir", "useradd")


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions with their arguments, in order."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text())
    lines = (line for line in text.splitlines() if line.strip() and not line.startswith("#"))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def is_ignored(name: str) -> bool:
    """Tell whether .dockerignore keeps a file or folder back; the last pattern that fits decides, as in Docker."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if pattern := line.partition("#")[0].strip():
            wanted = pattern.startswith("!")
            parts = [name, *(parent.as_posix() for parent in Path(name).parents if parent.name)]
            if any(fnmatch.fnmatch(part, pattern.lstrip("!").removeprefix("**/")) for part in parts):
                ignored = not wanted
    return ignored


def copy(names: list[str], image: Path) -> None:
    """Copy what a COPY instruction names from the repository into the folder that stands for the image."""
    *sources, target = names
    for name in sources:
        if is_ignored(name):
            sys.exit(f"check FAILED: the Dockerfile copies {name}, which .dockerignore keeps back")
        (image / target).mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():  # of a folder, COPY takes what is in it
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, image / target, ignore=ignore, dirs_exist_ok=True)
        else:
            shutil.copyfile(ROOT / name, image / target / Path(name).name)


def run(command: list[str | Path], **options) -> str:
    """Run a step, print it, and end the check with its output where it fails."""
    result = subprocess.run(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options
    )
    print(f"{'ok' if not result.returncode else 'FAILED'}: {shlex.join(map(str, command))}", flush=True)
    if result.returncode:
        sys.exit(f"{result.stdout}\ncheck FAILED (exit status {result.returncode})")
    return result.stdout


def take_steps(tmp: Path) -> tuple[list[str], dict[str, str]]:
    """Take the Dockerfile's steps in `tmp`, and return the entry point and the variables of the image."""
    image, environment = tmp / "image", tmp / "venv"
    run([sys.executable, "-m", "venv", environment])
    arguments = {"TORCH_INDEX": os.environ.get("TORCH_INDEX", "https://pypi.org/simple")}
    variables: dict[str, str] = {}
    entry: list[str] = []
    for instruction, text in instructions():
        if instruction == "COPY":
            copy(text.split(), image)
        elif instruction == "RUN" and text.startswith("pip "):
            words = [arguments.get(word.removeprefix("$"), word) for word in shlex.split(text)]
            run([environment / "bin/python", "-m", *words], cwd=image)
        elif instruction == "RUN":
            steps = [shlex.split(step)[0] for step in text.split("&&")]
            if unknown := set(steps) - {*ONLY_IN_AN_IMAGE, "rm"}:
                sys.exit(f"check FAILED: steps that this check does not know: {sorted(unknown)}")
        elif instruction == "ENV":
            variables |= {key: str(tmp) + value for key, value in (pair.split("=") for pair in shlex.split(text))}
        elif instruction == "ENTRYPOINT":
            entry = [str(environment / "bin" / name) for name in re.findall(r'"([^"]+)"', text)]
    return entry, variables


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="tahoex1_docker_") as temporary:
        tmp = Path(temporary)
        entry, variables = take_steps(tmp)
        work = tmp / "work"
        work.mkdir()
        # Nothing of the repository, and of this process's environment only where commands and homes are.
        kept = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
        away = {"cwd": work, "env": {**kept, **variables, "HF_HUB_OFFLINE": "1"}}
        print(run([*entry, "--version"], **away).strip())
        examples = ROOT / "examples"
        run([Path(entry[0]).with_name("python"), examples / "demo_cells.py", "cells.h5ad"], **away)
        run([*entry, "embed", "cells.h5ad", "embedded.h5ad", "--model", examples / "demo_checkpoint"], **away)
        if not (work / "embedded.h5ad").is_file():
            sys.exit("check FAILED: no embedded.h5ad")


if __name__ == "__main__":
    main()
