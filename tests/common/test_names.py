"""Names of files and models in outputs."""

from pathlib import Path

import pytest

from tahoex1_hf.common.names import public_name, short_names


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/data/a.h5ad"], ["a.h5ad"]),
        (["/data/a.h5ad", "b.h5ad"], ["a.h5ad", "b.h5ad"]),
        (["/d/s1/m", "/d/s2/m", "/d/s2/n"], ["s1/m", "s2/m", "n"]),
        (["/d/x/s1/m", "/d/y/s1/m"], ["x/s1/m", "y/s1/m"]),
        (["m", "s/m"], ["m", "s/m"]),
        (["/d/a.h5ad", "/d/a.h5ad"], ["a.h5ad", "a.h5ad"]),
        (["s3://b/a.h5ad", "/d/a.h5ad"], ["s3://b/a.h5ad", "a.h5ad"]),
        (["/d/set (train)", "/d/set (validation)"], ["set (train)", "set (validation)"]),
        ([], []),
    ],
)
def test_short_names(paths: list[str], names: list[str]) -> None:
    assert short_names(paths) == names


def test_public_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/model").mkdir(parents=True)
    for path, name in {
        "/home/me/model": "model",
        "runs/model": "model",
        "tahoebio/Tahoe-x1": "tahoebio/Tahoe-x1",
        "/cache/models--tahoebio--Tahoe-x1/snapshots/abc/70m": "tahoebio/Tahoe-x1",
        "/cache/translated/models--tahoebio--Tahoe-x1--70m-model--v2/snapshots/abc": "tahoebio/Tahoe-x1/70m-model/v2",
        "s3://bucket/model": "s3://bucket/model",
        "": "",
    }.items():
        assert public_name(path) == name
