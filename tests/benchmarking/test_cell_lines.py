"""Made-up cell lines in the layouts of CCLE and DepMap; none of the numbers is a measurement."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from tahoex1_hf.benchmarking.cell_lines import read_dependencies, read_lines

GCT = """#1.2
5\t4
Name\tDescription\tA1_LUNG\tB2_SKIN\tC3_BONE\tNOT_IN_DEPMAP
ENSG00000000003.10\tTSPAN6\t5\t0\t7\t1
ENSG00000000005.5\tTNMD\t0\t2\t0\t1
ENSG00000002586.13\tCD99\t3\t4\t5\t1
ENSG00000002586.13_PAR_Y\tCD99\t1\t0\t2\t1
ENSG00000000419.8\tTSPAN6\t1\t1\t1\t1
"""
MODELS = """ModelID,CCLEName,OncotreeLineage
ACH-1,A1_LUNG,Lung
ACH-2,B2_SKIN,Skin
ACH-3,C3_BONE,Bone
ACH-4,,Bone
"""
DEPENDENCIES = """,TSPAN6 (7105),TNMD (64102),CD99 (4267),XIST (7503)
ACH-9,0.9,0.9,0.1,0.5
ACH-3,0.9,0.6,,0.5
ACH-1,0.9,0.2,0.3,0.5
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "counts.gct.gz").write_bytes(gzip.compress(GCT.encode()))
    (tmp_path / "Model.csv").write_text(MODELS)
    (tmp_path / "CRISPRGeneDependency.csv").write_text(DEPENDENCIES)
    return tmp_path


def test_counts_of_the_lines_that_depmap_knows(files: Path) -> None:
    found = read_lines(files / "counts.gct.gz", files / "Model.csv")
    assert found.adata.obs_names.tolist() == ["A1_LUNG", "B2_SKIN", "C3_BONE"]
    assert found.adata.obs["OncotreeLineage"].tolist() == ["Lung", "Skin", "Bone"]
    assert found.genes.tolist() == ["ENSG00000000003", "ENSG00000000005", "ENSG00000000419", "ENSG00000002586"]
    # The copies of CD99 on X and Y are added up.
    assert found.adata.X.toarray().tolist() == [[5, 0, 1, 4], [0, 2, 1, 4], [7, 0, 1, 7]]


def test_table_without_the_two_lines_on_top(files: Path) -> None:
    (files / "plain.gct").write_text(GCT.split("\n", 2)[2])
    found = read_lines(files / "plain.gct", files / "Model.csv")
    assert found.adata.shape == (3, 4)


def test_dependencies_of_the_lines_with_counts(files: Path) -> None:
    found, lines = read_dependencies(
        files / "CRISPRGeneDependency.csv", read_lines(files / "counts.gct.gz", files / "Model.csv")
    )
    assert lines.adata.obs_names.tolist() == ["A1_LUNG", "C3_BONE"]
    # TSPAN6 stands for two genes of the counts, XIST for none, and CD99 is unknown in one of three lines.
    assert found.names.tolist() == ["ENSG00000000005"]
    assert found.values[:, 0] == pytest.approx([0.2, 0.6])
    assert found.means.tolist() == pytest.approx([2 / 3])  # of all lines of the table
    assert found.left_out == {"without counts": 2, "of unknown dependency in 10 % of the lines": 1}


def test_other_layouts_are_refused(files: Path) -> None:
    counts, models = files / "counts.gct.gz", files / "Model.csv"
    lines = read_lines(counts, models)
    (files / "other.csv").write_text("ModelID,CCLEName\nACH-1,A1_LUNG\n")
    with pytest.raises(ValueError, match="lacks the columns OncotreeLineage"):
        read_lines(counts, files / "other.csv")
    (files / "others.csv").write_text(MODELS.replace("_", "-"))
    with pytest.raises(ValueError, match="has none of the lines"):
        read_lines(counts, files / "others.csv")
    (files / "wrong.gct").write_text("gene\tA1_LUNG\nTSPAN6\t4\n")
    with pytest.raises(ValueError, match="must be Name and Description"):
        read_lines(files / "wrong.gct", models)
    (files / "wrong.csv").write_text("ModelID,TNMD\nACH-1,0.5\n")
    with pytest.raises(ValueError, match=r"genes as SYMBOL \(number\)"):
        read_dependencies(files / "wrong.csv", lines)
    (files / "strangers.csv").write_text(DEPENDENCIES.replace("ACH", "XYZ"))
    with pytest.raises(ValueError, match="has none of the lines"):
        read_dependencies(files / "strangers.csv", lines)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_lines(files / "none.gct", models)
    assert np.isfinite(lines.values.data).all()
