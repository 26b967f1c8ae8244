"""transformers' common tests of pipelines, on our models and cells.

Their tester looks for tiny models by name, in a folder with a list of them, and takes the examples of each task from
modules that are not in the source distribution: `PipelineTests` below stands in their place.
"""

import json
import os
import sys
import types
import unittest
from typing import Any, ClassVar

import anndata
import numpy as np
import scipy.sparse as sp
import torch
from sources import SOURCES
from transformers import pipeline

from tahoex1_hf import (
    TahoeX1Config,
    TahoeX1ForSequenceClassification,
    TahoeX1ForTokenClassification,
    TahoeX1Model,
    TahoeX1Tokenizer,
)

GENES = [f"ENSG{number:011d}" for number in range(60)]
TOKENS = ["<pad>", "<cls>", "<eoc>", *GENES]
MODELS = {
    "feature-extraction": TahoeX1Model,
    "text-classification": TahoeX1ForSequenceClassification,
    "token-classification": TahoeX1ForTokenClassification,
}
PLACE = SOURCES / "tiny-models"


def save_models() -> None:
    """Save what the tester looks for: a list, and a folder for each class."""
    vocabulary = PLACE / "reports" / "vocab.json"
    vocabulary.parent.mkdir(parents=True, exist_ok=True)
    vocabulary.write_text(json.dumps({token: number for number, token in enumerate(TOKENS)}))
    names = {}
    for model_class in MODELS.values():
        torch.manual_seed(0)
        config = TahoeX1Config(
            vocab_size=len(TOKENS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_labels=2
        )
        folder = PLACE / config.model_type / model_class.__name__
        model_class(config).save_pretrained(folder)
        TahoeX1Tokenizer(str(vocabulary)).save_pretrained(folder)
        names[model_class.__name__] = {"tokenizer_classes": ["TahoeX1Tokenizer"], "processor_classes": []}
    (PLACE / "reports" / "tiny_model_summary.json").write_text(json.dumps(names))


class PipelineTests:
    """Examples of a task, and what its pipeline makes of them."""

    task: ClassVar[str]

    def get_test_pipeline(self, model: Any, tokenizer: Any, dtype: str = "float32", **processors: Any) -> Any:
        cells = np.random.default_rng(0).poisson(0.7, (2, len(GENES))).astype(np.float32)
        examples = [anndata.AnnData(sp.csr_matrix(cell[None]), var={"gene": GENES}).copy() for cell in cells]
        for example in examples:
            example.var_names = GENES
        return pipeline(self.task, model=model, tokenizer=tokenizer, dtype=dtype, **processors), examples

    def run_pipeline_test(self, made: Any, examples: list[Any]) -> None:
        for outputs in (made(examples[0]), made(examples)):
            assert len(outputs) > 0


save_models()
os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = str(PLACE)
theirs = sys.modules["transformers"]
from transformers_tests import test_pipeline_mixin  # noqa: E402

sys.modules["transformers"] = theirs  # the tester put another copy of it in its place
test_pipeline_mixin.transformers_module = types.SimpleNamespace(TahoeX1Tokenizer=TahoeX1Tokenizer)
ours = types.ModuleType("tahoe_x1_pipeline_tests")
sys.modules[ours.__name__] = ours
for _task in MODELS:
    _name = _task.title().replace("-", "") + "PipelineTests"
    setattr(ours, _name, type(_name, (PipelineTests,), {"task": _task}))
    test_pipeline_mixin.pipeline_test_mapping[_task] = {"test": f"{ours.__name__}.{_name}"}


class TahoeX1PipelineTest(test_pipeline_mixin.PipelineTesterMixin, unittest.TestCase):
    pipeline_model_mapping = MODELS
