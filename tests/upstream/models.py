"""transformers' common tests of models and configurations, on our four models."""

import unittest
from typing import Any, ClassVar

import sources  # noqa: F401 - makes the packages below
import torch
from transformers.testing_utils import require_torch, torch_device
from transformers_tests import test_modeling_common
from transformers_tests.test_configuration_common import ConfigTester

from tahoex1_hf import (
    TahoeX1Config,
    TahoeX1ForPreTraining,
    TahoeX1ForSequenceClassification,
    TahoeX1ForTokenClassification,
    TahoeX1Model,
)

CLS, DRUG, FIRST_GENE = 1, 2, 3
# The tests know models without a loss by the names of transformers' own classes.
test_modeling_common.MODEL_MAPPING_NAMES = {**test_modeling_common.MODEL_MAPPING_NAMES, "tahoe_x1": "TahoeX1Model"}


class TahoeX1ModelTester:
    """A small model and a batch for it, in the form in which transformers' tests ask for them."""

    batch_size, seq_length, num_labels = 13, 7, 3
    num_hidden_layers, hidden_size, num_attention_heads, vocab_size = 2, 32, 4, 99
    is_training = True

    def __init__(self, parent: unittest.TestCase, **options: Any):
        self.parent, self.options = parent, options

    def get_config(self) -> TahoeX1Config:
        return TahoeX1Config(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            expression_encoder_dropout=0.0,
            num_labels=self.num_labels,
            **self.options,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[TahoeX1Config, dict[str, torch.Tensor]]:
        shape = (self.batch_size, self.seq_length)
        input_ids = torch.randint(FIRST_GENE, self.vocab_size, shape, device=torch_device)
        input_ids[:, 0] = CLS
        if "drug_token_id" in self.options:
            input_ids[:, 1] = DRUG
        inputs = {
            "input_ids": input_ids,
            "expression_values": torch.rand(shape, device=torch_device),
            "attention_mask": torch.ones(shape, dtype=torch.long, device=torch_device),
        }
        return self.get_config(), inputs


@require_torch
class TahoeX1ModelTest(test_modeling_common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (
        TahoeX1Model,
        TahoeX1ForPreTraining,
        TahoeX1ForSequenceClassification,
        TahoeX1ForTokenClassification,
    )
    additional_model_inputs = ["expression_values"]
    options: ClassVar[dict[str, Any]] = {}

    def setUp(self) -> None:
        self.model_tester = TahoeX1ModelTester(self, **self.options)
        self.config_tester = ConfigTester(self, config_class=TahoeX1Config, hidden_size=32)

    def _prepare_for_class(
        self, inputs_dict: dict[str, Any], model_class: type, return_labels: bool = False
    ) -> dict[str, Any]:
        """Add labels, which transformers makes by the names of its own classes."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        shape = inputs["input_ids"].shape
        if return_labels and model_class is TahoeX1ForPreTraining:
            targets = torch.zeros(shape, dtype=torch.bool, device=torch_device)
            targets[:, 1::2] = True
            inputs |= {"target_mask": targets, "labels": 50 * inputs["expression_values"]}
        elif return_labels and model_class is TahoeX1ForSequenceClassification:
            inputs["labels"] = torch.zeros(shape[0], dtype=torch.long, device=torch_device)
        elif return_labels and model_class is TahoeX1ForTokenClassification:
            inputs["labels"] = torch.zeros(shape, dtype=torch.long, device=torch_device)
        return inputs


class TahoeX1OtherShapeTest(TahoeX1ModelTest):
    """The same for another shape, with a drug in each cell."""

    options: ClassVar[dict[str, Any]] = {
        "num_drugs": 6,
        "drug_fingerprint_size": 16,
        "drug_token_id": DRUG,
        "num_key_value_heads": 2,
        "use_glu": True,
        "norm_position": "post",
        "hidden_act": "silu",
        "cell_pooling": "mean",
        "attention_mask_style": "observed_or_self",
    }


class TahoeX1ConfigTest(unittest.TestCase):
    """The checks of `ConfigTester`, one by one."""

    def setUp(self) -> None:
        self.model_tester = TahoeX1ModelTester(self)
        self.tester = ConfigTester(self, config_class=TahoeX1Config, hidden_size=64, num_attention_heads=4)


def _add_check(name: str) -> None:
    def check(self: TahoeX1ConfigTest) -> None:
        getattr(self.tester, name)()

    setattr(TahoeX1ConfigTest, f"test_{name}", check)


for _name in dir(ConfigTester):
    if _name.startswith(("create_and_test_", "check_")):
        _add_check(_name)
