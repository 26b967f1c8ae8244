"""transformers' common tests of tokenizers, on the cell tokenizer."""

import json
import tempfile
import unittest
from pathlib import Path

import sources  # noqa: F401 - makes the packages below
from transformers_tests.test_tokenization_common import TokenizerTesterMixin

from tahoex1_hf import TahoeX1Tokenizer

TOKENS = ["<pad>", "<cls>", "<eoc>", *(f"ENSG{number:011d}" for number in range(60))]


class TahoeX1TokenizationTest(TokenizerTesterMixin, unittest.TestCase):
    tokenizer_class = TahoeX1Tokenizer
    test_seq2seq = False

    @classmethod
    def setUpClass(cls) -> None:
        """Save a tokenizer; the mixin's own way reads texts that are not in the source distribution."""
        cls.from_pretrained_id: list[str] = []
        cls.tmpdirname = tempfile.mkdtemp()
        vocabulary = Path(cls.tmpdirname) / "vocab.json"
        vocabulary.write_text(json.dumps({token: number for number, token in enumerate(TOKENS)}))
        TahoeX1Tokenizer(str(vocabulary)).save_pretrained(cls.tmpdirname)
        cls.tokenizers_list = [(TahoeX1Tokenizer, cls.tmpdirname, {})]
