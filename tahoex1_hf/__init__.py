"""Tahoe-x1 single-cell foundation models in the Hugging Face ecosystem.

Importing the package registers the model type `tahoe_x1` with transformers' Auto classes.
"""

from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from tahoex1_hf.configuration_tahoe_x1 import TahoeX1Config
from tahoex1_hf.modeling_tahoe_x1 import (
    TahoeX1ForPreTraining,
    TahoeX1ForSequenceClassification,
    TahoeX1ForTokenClassification,
    TahoeX1Model,
    TahoeX1PreTrainedModel,
)
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

if TYPE_CHECKING:
    from tahoex1_hf.embedding.in_memory import embed_anndata
    from tahoex1_hf.perturbation.run import perturb_genes

__version__ = "0.1.0"

AutoConfig.register(TahoeX1Config.model_type, TahoeX1Config, exist_ok=True)
AutoModel.register(TahoeX1Config, TahoeX1Model, exist_ok=True)
AutoModelForPreTraining.register(TahoeX1Config, TahoeX1ForPreTraining, exist_ok=True)
AutoModelForSequenceClassification.register(TahoeX1Config, TahoeX1ForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(TahoeX1Config, TahoeX1ForTokenClassification, exist_ok=True)
AutoTokenizer.register(TahoeX1Config, tokenizer_class=TahoeX1Tokenizer, exist_ok=True)


def _locate_checkpoint(name: Any, marker: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from tahoex1_hf.hub.loading import locate_checkpoint

    return locate_checkpoint(name, marker, options)


# from_pretrained also reads what the original published; the files that travel to the Hub do without.
TahoeX1PreTrainedModel._locate_checkpoint = staticmethod(_locate_checkpoint)
TahoeX1Tokenizer._locate_checkpoint = staticmethod(_locate_checkpoint)

__all__ = [
    "TahoeX1Config",
    "TahoeX1ForPreTraining",
    "TahoeX1ForSequenceClassification",
    "TahoeX1ForTokenClassification",
    "TahoeX1Model",
    "TahoeX1Tokenizer",
    "embed_anndata",
    "perturb_genes",
]


def __getattr__(name: str) -> Any:
    # Loaded on first use: importing the model must not import what only embedding AnnData needs.
    if name == "embed_anndata":
        from tahoex1_hf.embedding.in_memory import embed_anndata

        return embed_anndata
    if name == "perturb_genes":
        from tahoex1_hf.perturbation.run import perturb_genes

        return perturb_genes
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
