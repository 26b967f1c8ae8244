"""Files of a folder, local or in an object store, appear whole or not at all, and are found again."""

import time
from pathlib import Path
from typing import Any

import pytest

from tahoex1_hf.common.folders import Folder


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "a") if request.param == "local" else f"memory://{tmp_path}/a")


def test_what_is_written_is_found_and_removed(folder: Folder) -> None:
    assert folder.names() == []
    assert folder.size("x") is None
    folder.make()
    folder.write_file("x", b"0123456789")
    folder.child("b").make()
    with folder.child("b").writing("y") as path:
        path.write_bytes(b"abc")
    assert folder.names() == ["b", "x"]
    assert folder.sizes() == {"x": 10}
    assert folder.size("b/y") == 3
    assert folder.size("b") is None
    assert folder.read_file("b/y") == b"abc"
    assert folder.read_files(["x", "b/y"]) == [b"0123456789", b"abc"]
    assert folder.read_ranges([("x", 2, 5), ("b/y", 0, 1), ("x", 7, None)]) == [b"234", b"a", b"789"]
    with pytest.raises(FileNotFoundError):
        folder.read_files(["x", "none"])
    folder.delete("x")
    folder.delete("x")
    assert folder.names() == ["b"]
    folder.remove()
    folder.remove()
    assert folder.names() == []


def test_an_error_leaves_what_was_there(folder: Folder) -> None:
    folder.make()
    folder.write_file("x", b"old")

    def write() -> None:
        with folder.writing("x") as path:
            path.write_bytes(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert folder.read_file("x") == b"old"
    assert folder.names() == ["x"]


def test_a_store_that_cannot_be_reached_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    store, folder, failed = type(fsspec.filesystem("memory")), Folder("memory://folders/again"), set()

    def failing_once(name: str) -> Any:
        real = getattr(store, name)

        def call(*arguments: Any, **more: Any) -> Any:
            if name not in failed:
                failed.add(name)
                raise ConnectionRefusedError(111, "Connection refused")
            return real(*arguments, **more)

        return call

    methods = {"ls", "info", "cat_file", "pipe_file", "put_file", "rm_file", "rm"}
    for name in methods:
        monkeypatch.setattr(store, name, failing_once(name))
    folder.write_file("x", b"0123")
    with folder.writing("y") as path:
        path.write_bytes(b"45")
    assert folder.names() == ["x", "y"]
    failed -= {"ls"}
    assert folder.sizes() == {"x": 4, "y": 2}
    assert folder.size("x") == 4
    assert folder.read_ranges([("x", 1, 3)]) == [b"12"]
    folder.delete("x")
    folder.remove()
    assert folder.names() == []
    assert failed == methods


def test_a_large_file_is_sent_in_parts_and_there_at_the_end(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec
    import s3fs.core

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    # s3fs before 2025.3 has no such function, and sends parts of 50 MB.
    if not hasattr(s3fs.core, "calculate_chunksize"):
        pytest.skip("this s3fs sends files below 50 MB in one part")
    monkeypatch.setattr(s3fs.core, "calculate_chunksize", lambda *_, **__: 5 * 2**20)
    store, folder = fsspec.filesystem("s3"), Folder("s3://parts/a")
    store.mkdir("parts")
    calls: list[str] = []
    real = s3fs.core.S3FileSystem._call_s3

    async def call(self: Any, method: str, *arguments: Any, **more: Any) -> Any:
        if "multipart" in method or method == "upload_part":
            calls.append(method)
        if method == "complete_multipart_upload":
            listing = await real(self, "list_objects_v2", Bucket="parts")
            assert listing["KeyCount"] == 0
            if calls.count(method) == 1:
                raise ConnectionResetError(104, "Connection reset by peer")
        return await real(self, method, *arguments, **more)

    monkeypatch.setattr(s3fs.core.S3FileSystem, "_call_s3", call)
    content = bytes(11 * 2**20)
    with folder.writing("x") as path:
        path.write_bytes(content)
    attempt = ["create_multipart_upload", "upload_part", "upload_part", "upload_part", "complete_multipart_upload"]
    assert calls == [*attempt, "abort_multipart_upload", *attempt]
    assert folder.sizes() == {"x": len(content)}


def test_a_store_that_refuses_is_named(s3: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"^s3://no-such-bucket/a: .*bucket does not exist"):
        Folder("s3://no-such-bucket/a").write_file("x", b"1")
    assert Folder("s3://no-such-bucket/a").names() == []
