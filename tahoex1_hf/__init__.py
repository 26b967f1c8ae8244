"""Tahoe-x1 single-cell foundation models in the Hugging Face ecosystem.

Importing the package makes the model type `tahoe_x1` known to transformers' Auto classes. Nothing else is imported
before it is used.

torch's waiting threads sleep, unless OMP_WAIT_POLICY is set or torch was imported first. By default OpenMP lets them
spin, and on a shared machine spinning threads take the cores from the very threads that they wait for.
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tahoex1_hf.hub.registration import register_when_used

if "torch" not in sys.modules:  # OpenMP reads the variable once, when torch is loaded; see benchmarks/waiting.py
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from tahoex1_hf.annotation.annotating import annotate_anndata, annotate_files
    from tahoex1_hf.annotation.saved_index import annotate_from_index
    from tahoex1_hf.configuration_tahoe_x1 import TahoeX1Config
    from tahoex1_hf.embedding.files import embed_files
    from tahoex1_hf.embedding.in_memory import embed_anndata
    from tahoex1_hf.finetuning.cells.predicting import predict_anndata, predict_files
    from tahoex1_hf.hub.adapters import load_adapter
    from tahoex1_hf.hub.sources import convert_checkpoint
    from tahoex1_hf.imputation.running import impute_file
    from tahoex1_hf.indexing.building import build_index
    from tahoex1_hf.indexing.querying import query_index
    from tahoex1_hf.modeling_tahoe_x1 import (
        TahoeX1ForPreTraining,
        TahoeX1ForSequenceClassification,
        TahoeX1ForTokenClassification,
        TahoeX1Model,
    )
    from tahoex1_hf.perturbation.run import perturb_genes
    from tahoex1_hf.reporting.making import write_page
    from tahoex1_hf.signatures.building import make_signatures
    from tahoex1_hf.signatures.querying import query_signatures
    from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

__version__ = "0.2.0"

__all__ = [
    "TahoeX1Config",
    "TahoeX1ForPreTraining",
    "TahoeX1ForSequenceClassification",
    "TahoeX1ForTokenClassification",
    "TahoeX1Model",
    "TahoeX1Tokenizer",
    "annotate_anndata",
    "annotate_files",
    "annotate_from_index",
    "build_index",
    "convert_checkpoint",
    "embed_anndata",
    "embed_files",
    "impute_file",
    "load_adapter",
    "make_signatures",
    "perturb_genes",
    "predict_anndata",
    "predict_files",
    "query_index",
    "query_signatures",
    "write_page",
]

# Public name -> module, for __getattr__; the imports above say the same to type checkers.
_MODULES = {
    "TahoeX1Config": "configuration_tahoe_x1",
    "TahoeX1ForPreTraining": "modeling_tahoe_x1",
    "TahoeX1ForSequenceClassification": "modeling_tahoe_x1",
    "TahoeX1ForTokenClassification": "modeling_tahoe_x1",
    "TahoeX1Model": "modeling_tahoe_x1",
    "TahoeX1Tokenizer": "tokenization_tahoe_x1",
    "annotate_anndata": "annotation.annotating",
    "annotate_files": "annotation.annotating",
    "annotate_from_index": "annotation.saved_index",
    "build_index": "indexing.building",
    "convert_checkpoint": "hub.sources",
    "embed_anndata": "embedding.in_memory",
    "embed_files": "embedding.files",
    "impute_file": "imputation.running",
    "load_adapter": "hub.adapters",
    "make_signatures": "signatures.building",
    "perturb_genes": "perturbation.run",
    "predict_anndata": "finetuning.cells.predicting",
    "predict_files": "finetuning.cells.predicting",
    "query_index": "indexing.querying",
    "write_page": "reporting.making",
    "query_signatures": "signatures.querying",
}

register_when_used()

if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
