"""Sources as they are written on the command line, and the baselines that are added to them."""

import pytest

from tahoex1_hf.benchmarking.sources import Source, read_sources


def test_every_kind_of_source_is_told_apart() -> None:
    texts = ["a=pca", "b=random", "c=expression", "d=untrained:m", "e=f.h5ad:X_scvi", "f=f.npz", "g=f.parquet"]
    found = read_sources(texts)
    assert [source.kind for source in found] == ["pca", "random", "expression", "untrained", "file", "file", "file"]
    assert found[3].what == "m"
    assert (found[4].what, found[4].key) == ("f.h5ad", "X_scvi")
    assert [source.simple for source in found] == [True] * 4 + [False] * 3


def test_baselines_that_decide_are_added() -> None:
    found = {source.name: source for source in read_sources(["demo=owner/model"])}
    assert set(found) == {"demo", "PCA", "random", "expression", "demo untrained", "PCA on demo genes"}
    assert found["demo untrained"] == Source("demo untrained", "untrained", "owner/model")
    assert found["PCA on demo genes"] == Source("PCA on demo genes", "pca", "owner/model")


def test_baselines_that_are_named_are_not_added_again() -> None:
    found = read_sources(["demo=m", "mine=pca", "twin=untrained:m", "r=random", "e=expression"])
    assert [source.name for source in found] == ["demo", "mine", "twin", "r", "e", "PCA on demo genes"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["pca"], "write NAME=WHAT"),
        (["a/b=pca"], "write NAME=WHAT"),
        (["a=f.h5ad"], "name the slot of obsm or varm"),
        (["a=pca", "a=random"], "a is there twice"),
    ],
)
def test_other_sources_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_sources(texts)
