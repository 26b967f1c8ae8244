"""A simulated drug screen with planted effects, which depend on the drugs' fingerprints and on the cell line."""

import itertools
import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
from cells import GENES as ALL_GENES
from helpers import DRUG, tiny_config, tiny_model
from scipy.sparse import csr_matrix

from tahoex1_hf import TahoeX1ForPreTraining, TahoeX1Tokenizer

BITS, CONTROL = 16, "DMSO_TF"  # as in Tahoe-100M, whose drug table does not hold the control
GENES = ALL_GENES[:30]
LINES = ["A", "B", "C"]
# Every pair of eight features is a drug; each feature sets its own bits and moves its own genes.
PAIRS = list(itertools.combinations(range(8), 2))
DRUGS = ["drug" + "".join(map(str, pair)) for pair in PAIRS]
NEW = DRUGS[-4:]  # these are not in the table of the base


def fingerprints() -> np.ndarray:
    """Return fingerprints as `(drugs, bits)`; each feature sets two bits."""
    table = np.zeros((len(DRUGS), BITS), dtype=np.float32)
    for row, pair in enumerate(PAIRS):
        for feature in pair:
            table[row, 2 * feature : 2 * feature + 2] = 1
    return table


def simulated_screen(
    cells_per_condition: int = 16, seed: int = 0, names: tuple[str, ...] = tuple(LINES)
) -> anndata.AnnData:
    """Simulate Poisson counts; a drug multiplies rates of genes by factors that depend on the line's sensitivity."""
    random = np.random.default_rng(seed)
    effects = random.normal(0, 1.2, (8, len(GENES))) * (random.random((8, len(GENES))) < 0.4)
    rates = {line: random.gamma(2, 4, len(GENES)) for line in names}
    sensitivity = dict(zip(names, np.linspace(1.2, 0.6, len(names)), strict=True))
    counts, lines, drugs = [], [], []
    for line in names:
        for drug in (CONTROL, *DRUGS):
            shift = np.zeros(len(GENES))
            if drug != CONTROL:
                shift = sensitivity[line] * effects[list(PAIRS[DRUGS.index(drug)])].sum(axis=0)
            number = cells_per_condition * (2 if drug == CONTROL else 1)
            depth = random.uniform(0.7, 1.4, (number, 1))
            counts.append(random.poisson(depth * rates[line] * np.exp(shift)))
            lines += [line] * number
            drugs += [drug] * number
    obs = pd.DataFrame({"line": pd.Categorical(lines), "drug": drugs}, index=[f"c{i}" for i in range(len(drugs))])
    order = random.permutation(len(drugs))
    matrix = csr_matrix(np.concatenate(counts).astype(np.float32))
    return anndata.AnnData(matrix, obs=obs, var=pd.DataFrame(index=GENES))[order].copy()


def write_drug_base(folder: Path, context_length: int = 40) -> Path:
    """Write a model with random weights that knows the first drugs."""
    folder.mkdir(parents=True)
    tokens = ["<pad>", "<cls>", "<drug>", *GENES]
    vocab = folder / "own_vocab.json"
    vocab.write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    known = DRUGS[: -len(NEW)]
    table = {"<pad>": 0, **{drug: 1 + n for n, drug in enumerate(known)}}
    tokenizer = TahoeX1Tokenizer(vocab, context_length=context_length, drug_to_id=table)
    config = tiny_config(
        vocab_size=len(tokens),
        num_drugs=len(table),
        drug_fingerprint_size=BITS,
        drug_token_id=DRUG,
        hidden_act="gelu",
        expression_encoder_dropout=0.0,
    )
    model = tiny_model(config, TahoeX1ForPreTraining)
    rows = np.concatenate([np.zeros((1, BITS), np.float32), fingerprints()[: len(known)]])
    with torch.no_grad():
        model.tahoe.embeddings.drug_encoder.embedding.weight.copy_(torch.from_numpy(rows))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_new_drugs(folder: Path) -> dict[str, str]:
    """Write files as `tahoex1 drug-fingerprints` does, with the drugs that the base lacks."""
    table = {"<pad>": 0, **{drug: 1 + n for n, drug in enumerate(NEW)}}
    (folder / "drug_to_id_pad.json").write_text(json.dumps(table))
    rows = np.concatenate([np.zeros((1, BITS), np.float32), fingerprints()[-len(NEW) :]])
    np.save(folder / "drug_fps_pad.npy", rows)
    return {
        "drug_table": str(folder / "drug_to_id_pad.json"),
        "drug_fingerprints": str(folder / "drug_fps_pad.npy"),
    }
