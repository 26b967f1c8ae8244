"""Names of genes, with all that references and programs put around an id or a symbol."""

from typing import Any

import pytest

from tahoex1_hf.cells.gene_names import looks_like_mouse, plain_id, plain_symbol, text_of

ID = "ENSG00000000003"


@pytest.mark.parametrize(
    "name",
    [
        ID,
        ID.lower(),
        f"{ID}.15",
        f"{ID}.15_PAR_Y",
        f"{ID}_PAR_Y",
        f"{ID}.5_4",
        f"{ID}-PAR-Y",
        f"{ID}-1",
        f"{ID}.15-2",
        f"{ID}-1-1",
        f"GRCh38_{ID}",
        f"GRCh38______{ID}.2",
        f"GRCh38-{ID}",
        f"hg19_{ID}-1",
        f"TSPAN6_{ID}",
        f"{ID}_TSPAN6",
        f"{ID}.15|TSPAN6",
        f"HLA-A;{ID}",
    ],
)
def test_an_id_is_found_in_what_is_put_around_it(name: str) -> None:
    assert plain_id(name) == ID


@pytest.mark.parametrize(
    "name",
    [
        "TSPAN6",
        "chr1:100-600",
        f"{ID}4",
        f"X{ID}",
        f"{ID}-intron",
        f"{ID}-I",
        f"intron_{ID}",
        f"{ID}_unspliced",
        "ENST00000000003",
        "ERCC-00002",
        "",
    ],
)
def test_other_names_hold_no_id(name: str) -> None:
    assert plain_id(name) is None


def test_ids_of_other_species_stay_theirs() -> None:
    assert plain_id("mm10___ENSMUSG00000051951.5") == "ENSMUSG00000051951"


@pytest.mark.parametrize("name", [ID.encode(), f" {ID} ", f"b'{ID}'", f'"{ID}"'])
def test_names_become_text(name: Any) -> None:
    assert text_of(name) == ID


def test_genomes_before_symbols() -> None:
    assert plain_symbol("GRCh38_TP53") == plain_symbol("GRCh38___TP53") == plain_symbol("hg19-TP53") == "TP53"
    assert plain_symbol("mm10___Trp53") is None
    assert plain_symbol("NKX2-1") == "NKX2-1"


def test_mouse_symbols_are_told_from_human_ones() -> None:
    assert looks_like_mouse(["Xkr4", "Sox17", "Gm1992", "mt-Nd1", "H2-K1"])
    assert not looks_like_mouse(["TP53", "C1orf112", "HLA-A", "MT-ND1", "IGHV1-2"])
    assert not looks_like_mouse([ID, "ENSMUSG00000051951"])
