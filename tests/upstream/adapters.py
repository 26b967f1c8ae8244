"""PEFT's common tests, on our models: feature extraction, and classification of cells and of genes."""

import sys
import types
from pathlib import Path

import torch
from sources import SOURCES

from tahoex1_hf import TahoeX1Config, TahoeX1ForSequenceClassification, TahoeX1ForTokenClassification, TahoeX1Model

# PEFT's testers ask whether a model is diffusers' Stable Diffusion, which needs no more than a class of that name.
stand_in = types.ModuleType("diffusers")
stand_in.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
sys.modules["diffusers"] = stand_in
from peft_tests import test_feature_extraction_models as features  # noqa: E402
from peft_tests import test_seq_classifier as sequences  # noqa: E402
from peft_tests import test_token_classification_qa as tokens  # noqa: E402

del sys.modules["diffusers"]


def small_model(model_class: type) -> str:
    """Save a model to be loaded by all tests."""
    torch.manual_seed(0)
    config = TahoeX1Config(
        vocab_size=99, hidden_size=32, num_hidden_layers=5, num_attention_heads=4, intermediate_size=37, num_labels=2
    )
    folder: Path = SOURCES / f"tiny-random-{model_class.__name__}"
    model_class(config).save_pretrained(folder)
    return str(folder)


# The lists of models that the tests below were made with.
features.PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST[:] = [small_model(TahoeX1Model)]
sequences.PEFT_SEQ_CLS_MODELS_TO_TEST[:] = [small_model(TahoeX1ForSequenceClassification)]
tokens.PEFT_TOKEN_CLS_MODELS_TO_TEST[:] = [small_model(TahoeX1ForTokenClassification)]


class Cells:
    """Arguments of our models, with values beside the tokens that PEFT's tests have."""

    torch_device: str

    def prepare_inputs_for_testing(self) -> dict[str, torch.Tensor]:
        inputs = {
            "input_ids": torch.tensor([[1, 1, 1], [1, 2, 1]]),
            "expression_values": torch.tensor([[-2.0, 3.0, 7.0], [-2.0, 5.0, 1.0]]),
            "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1]]),
        }
        return {name: tensor.to(self.torch_device) for name, tensor in inputs.items()}


class TestFeatureExtraction(Cells, features.TestPeftFeatureExtractionModel):
    pass


class TestCellClassification(Cells, sequences.TestSequenceClassificationModels):
    pass


class TestGeneClassification(Cells, tokens.TestTokenClassificationModels):
    pass
