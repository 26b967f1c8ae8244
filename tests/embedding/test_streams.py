"""A file in an object store appears whole or not at all, and an earlier one stays until then."""

from pathlib import Path

import pytest

from tahoex1_hf.embedding.streams import WholeStream


class Stop(Exception):
    pass


def write(location: str, content: bytes, fail: bool) -> None:
    with WholeStream(location) as file:
        for start in range(0, len(content), 2**20):
            file.write(content[start : start + 2**20])
        if fail:
            raise Stop


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_stopped_write_leaves_what_was_there(place: str, tmp_path: Path, s3: str) -> None:
    """Also one of several parts, of which a store has received some: they are taken back."""
    import boto3
    import fsspec

    client = boto3.client("s3")
    client.create_bucket(Bucket="streams")
    location = {"local": str(tmp_path / "out.npy"), "s3": "s3://streams/out.npy"}
    small, large = b"small" * 100, bytes(range(256)) * 2**17  # 32 MB; parts have 5 MB and more
    filesystem, path = fsspec.url_to_fs(location[place])
    for before in (None, small, large):
        if before is not None:
            write(location[place], before, fail=False)
        for content in (small, large):
            with pytest.raises(Stop):
                write(location[place], content, fail=True)
            filesystem.invalidate_cache()
            assert (filesystem.cat_file(path) if filesystem.exists(path) else None) == before
    assert "Uploads" not in client.list_multipart_uploads(Bucket="streams")
    assert [name.rpartition("/")[2] for name in filesystem.ls(path.rpartition("/")[0], detail=False)] == ["out.npy"]
