"""What a user writes, for mypy to read: `tests/check_dist.py`. The last two statements are wrong."""

import numpy as np
from anndata import AnnData

from tahoex1_hf import TahoeX1Config, TahoeX1Model, TahoeX1Tokenizer, embed_anndata, perturb_genes

config: TahoeX1Config = TahoeX1Config(hidden_size=64)
model: TahoeX1Model = TahoeX1Model(config)
tokenizer: TahoeX1Tokenizer = TahoeX1Tokenizer.from_pretrained("folder")


def embed(adata: AnnData) -> np.ndarray:
    return embed_anndata(adata, model, tokenizer, return_array=True, batch_tokens=4096)


def embed_samples(adata: AnnData) -> tuple[np.ndarray, np.ndarray]:
    return embed_anndata(adata, model, tokenizer, draws=4, return_array=True, return_deviations=True)


def rank(adata: AnnData) -> list[str]:
    return list(perturb_genes(adata, model, tokenizer, genes=["TP53"]).table.columns)


embed_anndata(AnnData(), model, tokenizer, batch_tokens="many")
from tahoex1_hf import embed_anndatas  # noqa: E402, F401
