"""Writing a converted folder: tensors one at a time into safetensors, and nothing visible before all is there."""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout

_SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_LOCK = ".lock"


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and type of a tensor that is yet to be written."""

    name: str
    shape: torch.Size
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return self.shape.numel() * self.dtype.itemsize


def write_tensors(
    folder: Path, specs: list[TensorSpec], tensors: Iterable[tuple[str, torch.Tensor]], max_shard_size: int
) -> None:
    """Write `model.safetensors`, or numbered files with `model.safetensors.index.json`, as transformers names them.

    Args:
        folder: where to write.
        specs: every tensor, in the order in which `tensors` gives them.
        tensors: the tensors; each is written before the next one is read.
        max_shard_size: most bytes of one file (a single tensor may exceed it).
    """
    shards: list[list[TensorSpec]] = [[]]
    for spec in specs:
        if shards[-1] and sum(other.size for other in shards[-1]) + spec.size > max_shard_size:
            shards.append([])
        shards[-1].append(spec)
    given = iter(tensors)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        single = len(shards) == 1
        name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(folder / name, shard, given)
        weight_map |= {spec.name: name for spec in shard}
    if len(shards) > 1:
        metadata = {
            "total_parameters": sum(spec.shape.numel() for spec in specs),
            "total_size": sum(spec.size for spec in specs),
        }
        text = json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")


def _write_safetensors(path: Path, specs: list[TensorSpec], tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    # The library's own writer wants all tensors in memory at once. The format: the header's length, the header, the
    # tensors back to back.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": _SAFETENSORS_DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.size],
        }
        offset += spec.size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for spec in specs:
            name, tensor = next(tensors)
            if (name, tensor.shape, tensor.dtype) != (spec.name, spec.shape, spec.dtype):
                raise ValueError(f"Expected {spec}, got {name} {list(tensor.shape)} {tensor.dtype}.")
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def check_destination(destination: Path) -> None:
    """Raise FileExistsError unless `destination` is free, or an empty folder."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(f"{destination} exists already: choose another destination, or remove it.")


@contextmanager
def workspace(destination: Path) -> Iterator[Path]:
    """A folder beside `destination` to work in; its sub-folder `result` is moved to `destination` at the end.

    What a process that was killed left behind is cleared away first.
    """
    check_destination(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    _clear_stale(destination)
    folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", suffix=".partial", dir=destination.parent))
    lock = FileLock(folder / _LOCK)
    try:
        with lock:
            result = folder / "result"
            result.mkdir(mode=0o755)
            yield folder
            check_destination(destination)
            if destination.exists():
                destination.rmdir()
            result.rename(destination)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _clear_stale(destination: Path) -> None:
    for folder in destination.parent.glob(f".{destination.name}-*.partial"):
        if not (folder / _LOCK).exists() and time.time() - folder.stat().st_mtime < 60:
            continue  # another process is just about to lock it
        try:
            with FileLock(folder / _LOCK, timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
        except Timeout:
            continue  # in use by a process that lives
        shutil.rmtree(folder, ignore_errors=True)


def describe_files(files: Mapping[str, Path]) -> dict[str, dict[str, object]]:
    """Size and SHA-256 of each file, by the name it is to be listed under."""
    described: dict[str, dict[str, object]] = {}
    for name, path in sorted(files.items()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        described[name] = {"size": path.stat().st_size, "sha256": digest}
    return described
