"""Ways to damage files: bytes of any file, and values, types and shapes of those whose format is known."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import yaml

Random = np.random.Generator

# What stands where something else was expected.
STRANGE: list[Any] = [
    None, True, -1, 0, 3, 10**12, 10**30, 0.5, float("nan"), float("inf"), "", "x", "../../etc/passwd", "/etc/passwd",
    "\udcff", [], [[]], [1, "a", None], {}, {"a": 1}, "a" * 10_000,
]  # fmt: skip


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def choose(random: Random, things: Any) -> Any:
    return things[int(random.integers(len(things)))]


# Bytes ----------------------------------------------------------------------------------------------


def damage_bytes(path: Path, random: Random) -> str:
    """Flip, cut, blank, repeat or replace bytes of a file."""
    data = bytearray(path.read_bytes())
    size = len(data)
    how = choose(random, ["flip", "flip", "flip", "cut", "blank", "grow", "empty", "text", "other"])
    if how == "flip" and size:
        for _ in range(int(random.integers(1, 9))):
            data[int(random.integers(size))] ^= 1 << int(random.integers(8))
    elif how == "cut" and size:
        del data[int(random.integers(size)) :]
    elif how == "blank" and size:
        start = int(random.integers(size))
        stop = min(size, start + int(random.integers(1, 400)))
        data[start:stop] = bytes(stop - start)
    elif how == "grow":
        data += bytes(random.integers(0, 256, 300, dtype=np.uint8))
    elif how == "empty":
        data = bytearray()
    elif how == "text":
        data = bytearray(b"<html><body>404 Not Found</body></html>\n")
    else:
        data = bytearray(b"\x1f\x8b\x08\x00" + bytes(random.integers(0, 256, 60, dtype=np.uint8)))
    path.write_bytes(data)
    return f"bytes: {how} {path.name}"


# JSON and YAML --------------------------------------------------------------------------------------


def damage_value(value: Any, random: Random) -> Any:
    """Return a tree of dicts and lists in which one thing is missing, renamed or strange."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        key = choose(random, sorted(value, key=str))
        how = random.random()
        if how < 0.2:
            return {name: each for name, each in value.items() if name != key}
        if how < 0.25:
            return {(f"{name}_x" if name == key else name): each for name, each in value.items()}
        return {**value, key: damage_value(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.7:
        place = int(random.integers(len(value)))
        if random.random() < 0.2:
            return value[:place] + value[place + 1 :]
        return [*value[:place], damage_value(value[place], random), *value[place + 1 :]]
    return choose(random, STRANGE)


def damage_json(path: Path, random: Random) -> str:
    path.write_text(json.dumps(damage_value(json.loads(path.read_text()), random)))
    return f"json: {path.name}"


def damage_yaml(path: Path, random: Random) -> str:
    value = damage_value(yaml.safe_load(path.read_text()), random)
    path.write_text(json.dumps(value), errors="replace")
    return f"yaml: {path.name}"


def damage_lines(path: Path, random: Random) -> str:
    """Change one word or line of a text file."""
    lines = path.read_text().split("\n")
    place = 0 if random.random() < 0.3 else int(random.integers(len(lines)))
    words = lines[place].replace(",", " , ").split(" ")
    how = choose(random, ["word", "drop", "twice", "long", "line"])
    if how == "word":
        words[int(random.integers(len(words)))] = str(choose(random, STRANGE))
        lines[place] = " ".join(words).replace(" , ", ",")
    elif how == "drop":
        del lines[place]
    elif how == "twice":
        lines.insert(place, lines[place])
    elif how == "long":
        lines[place] += " 1" * 50
    else:
        lines[place] = choose(random, ["", "%", "0 0 0", "-1 -1 -1", "a\tb\tc", '"', "\0\0", "1e400 1 1"])
    path.write_text("\n".join(lines), errors="replace")
    return f"lines: {how} {path.name}"


def damage_safetensors(path: Path, random: Random) -> str:
    """Change the header of a safetensors file, with a length that fits it or not."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.dumps(damage_value(json.loads(data[8 : 8 + size]), random)).encode("utf-8", "replace")
    length = len(header) if random.random() < 0.8 else choose(random, [0, 1, 2**40, 2**63, len(header) + 7])
    path.write_bytes(struct.pack("<Q", length) + header + data[8 + size :])
    return "safetensors: header"


# HDF5 -----------------------------------------------------------------------------------------------


def damage_hdf5(path: Path, random: Random) -> str:
    """Change one object or attribute of an HDF5 file."""
    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        name = choose(random, names)
        change = choose(random, list(_HDF5_CHANGES))
        try:
            _HDF5_CHANGES[change](file, name, random)
        except (TypeError, ValueError, LookupError, RuntimeError, OSError, AttributeError, OverflowError) as error:
            if name in file:  # the change is not for this object
                del file[name]
            change = f"deleted instead ({type(error).__name__})"
        return f"hdf5: {change} {name}"


def _replace(file: h5py.File, name: str, value: Any, **options: Any) -> None:
    attributes = dict(file[name].attrs)
    del file[name]
    if value is None:
        made = file.create_group(name)
    else:
        made = file.create_dataset(name, data=value, **options)
    made.attrs.update(attributes)


def _delete(file: h5py.File, name: str, random: Random) -> None:
    del file[name]


def _other_type(file: h5py.File, name: str, random: Random) -> None:
    shape = file[name].shape if isinstance(file[name], h5py.Dataset) else (5,)
    size = int(np.prod(shape))
    made = [
        np.full(shape, 0.5), np.full(shape, np.nan), np.full(shape, -3), np.full(shape, 2**62), np.ones(shape, bool),
        np.array([b"x"] * size, dtype="S3").reshape(shape),
        np.array([b"\xff\xfe"] * size, dtype="S3").reshape(shape),
        np.zeros(shape, dtype=[("a", "f4"), ("b", "S2")]),
        np.zeros(shape, dtype=np.complex64),
        np.zeros(shape, dtype=np.float16),
        np.zeros(shape, dtype="V3"),
    ]  # fmt: skip
    _replace(file, name, choose(random, made))


def _other_shape(file: h5py.File, name: str, random: Random) -> None:
    value = np.asarray(file[name][()])
    flat = value.ravel()
    made = [
        flat[0], flat[:0], flat[:-1], np.concatenate([flat] * 11), flat[None, :], flat[:, None],
        flat[: len(flat) // 2 * 2].reshape(-1, 2),
    ]  # fmt: skip
    _replace(file, name, choose(random, made))


def _other_values(file: h5py.File, name: str, random: Random) -> None:
    value = np.array(file[name][()])
    place = int(random.integers(value.size))
    strange = [-1, 2**31 - 1, 10**6, 0] if value.dtype.kind in "iu" else [np.nan, np.inf, -1.0, 1e38, 0.5]
    value.ravel()[place] = choose(random, strange)
    file[name][...] = value


def _strings(file: h5py.File, name: str, random: Random) -> None:
    size = file[name].size
    _replace(file, name, np.array(["ß" * (i % 3) for i in range(size)], dtype=object), dtype=h5py.string_dtype())


def _swap_kind(file: h5py.File, name: str, random: Random) -> None:
    _replace(file, name, None if isinstance(file[name], h5py.Dataset) else np.arange(4))


def _scalar_null(file: h5py.File, name: str, random: Random) -> None:
    attributes = dict(file[name].attrs)
    del file[name]
    file.create_dataset(name, data=h5py.Empty("f4")).attrs.update(attributes)


def _attribute(file: h5py.File, name: str, random: Random) -> None:
    place = file[name] if len(file[name].attrs) else file
    key = choose(random, sorted(place.attrs))
    strange = [None, "x", b"\xff", 3, -1.5, np.arange(3), np.array(["a", "b"], dtype="S1"), h5py.Empty("i4"), 10**15]
    value = choose(random, strange)
    del place.attrs[key]
    if value is not None:
        place.attrs[key] = value


def _external(file: h5py.File, name: str, random: Random) -> None:
    """Put something in its place that lies outside the file, or nowhere."""
    shape = file[name].shape if isinstance(file[name], h5py.Dataset) and file[name].shape else (4,)
    del file[name]
    how = choose(random, ["link", "soft", "storage", "virtual"])
    if how == "link":
        file[name] = h5py.ExternalLink("/etc/hostname", "/X")
    elif how == "soft":
        file[name] = h5py.SoftLink("/nowhere")
    elif how == "storage":
        file.create_dataset(name, shape=shape, dtype="u1", external=[("/etc/hostname", 0, h5py.h5f.UNLIMITED)])
    else:
        layout = h5py.VirtualLayout(shape=shape, dtype="f4")
        layout[...] = h5py.VirtualSource("/etc/hostname", "X", shape=shape)
        file.create_virtual_dataset(name, layout)


def _huge(file: h5py.File, name: str, random: Random) -> None:
    """Declare far more than the file stores."""
    attributes, dtype = dict(file[name].attrs), file[name].dtype
    del file[name]
    made = file.create_dataset(name, shape=(10**11,), dtype=dtype, chunks=(10**4,), compression="gzip")
    made.attrs.update(attributes)


_HDF5_CHANGES: dict[str, Callable[[h5py.File, str, Random], None]] = {
    "delete": _delete,
    "type": _other_type,
    "shape": _other_shape,
    "values": _other_values,
    "strings": _strings,
    "kind": _swap_kind,
    "null": _scalar_null,
    "attribute": _attribute,
    "external": _external,
    "huge": _huge,
}
