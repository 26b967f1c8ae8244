"""Build the wheel and the source distribution into dist/, and check what would go to PyPI: `make check-dist`.

twine reads the metadata as PyPI does, check-wheel-contents the files; the wheel that the source distribution builds
must hold the same files as the wheel of the repository. Last, mypy reads the wheel's types from a script of a user.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = Path(__file__).with_name("typed_script.py")
# What mypy must say of the script's last lines, which are wrong on purpose.
MISTAKES = (
    'No overload variant of "embed_anndata" matches argument types',
    'Module "tahoex1_hf" has no attribute "embed_anndatas"',
)


def run(what: str, *arguments: str | Path, fails: bool = False, cwd: Path = ROOT) -> str:
    """Run a module of this Python, and end the check with its output where it fails (or must fail, and does not)."""
    command = [sys.executable, "-m", *map(str, arguments)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, cwd=cwd)
    if bool(result.returncode) != fails:
        sys.exit(f"{result.stdout}\ncheck FAILED: {what} (exit status {result.returncode})")
    print(f"check: {what}: ok", flush=True)
    return result.stdout


def files_of(wheel: Path) -> set[str]:
    """Return the names of the files of the package in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def tracked_source(folder: Path) -> Path:
    """Write the files that git knows, as they are now, into a folder: what else lies here must not be packed."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout.decode()
    for name in filter(None, names.split("\0")):
        if (source := ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(source.read_bytes())
    return folder


def main() -> None:
    dist = ROOT / "dist"
    for old in dist.glob("tahoex1_hf-*"):
        old.unlink()
    with tempfile.TemporaryDirectory(prefix="tahoex1_dist_") as temporary:
        tmp = Path(temporary)
        source = tracked_source(tmp / "source")
        run("builds from the repository", "build", "--wheel", "--no-isolation", "--outdir", tmp / "direct", source)
        # The source distribution, and the wheel from what it holds.
        run("builds from the source distribution", "build", "--no-isolation", "--outdir", dist, source)
        (wheel,), (archive,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
        (direct,) = (tmp / "direct").glob("*.whl")
        if different := files_of(wheel) ^ files_of(direct):
            sys.exit(f"check FAILED: in one wheel only: {sorted(different)}")
        run("twine takes the metadata", "twine", "check", "--strict", wheel, archive)
        run("the wheel's contents", "check_wheel_contents", wheel)
        target = tmp / "target"
        run("installs", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel)
        # Installed packages are read, not judged, as where they lie in site-packages.
        settings = {"mypy": f"mypy_path = {target}\nignore_missing_imports = True"}
        settings["mypy-tahoex1_hf.*"] = "follow_imports = silent"
        (tmp / "mypy.ini").write_text("".join(f"[{name}]\n{text}\n" for name, text in settings.items()))
        (tmp / "script.py").write_bytes(SCRIPT.read_bytes())
        said = run("mypy finds what is wrong in a user's script", "mypy", "script.py", fails=True, cwd=tmp)
        missing = [mistake for mistake in MISTAKES if mistake not in said]
        if missing or f"Found {len(MISTAKES)} errors in 1 file" not in said:
            sys.exit(f"{said}\ncheck FAILED: mypy says something else of tests/typed_script.py; missing: {missing}")
    print(f"checked: {wheel.relative_to(ROOT)}, {archive.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
