"""Types are taken by name and as torch's objects."""

import pytest
import torch

from tahoex1_hf.common.dtypes import dtype_name


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"], ids=str)
def test_the_same_type_in_all_its_spellings(dtype) -> None:
    assert dtype_name(dtype, ("auto", "bfloat16")) == "bfloat16"


@pytest.mark.parametrize("dtype", [torch.float16, "bf16", None, float], ids=str)
def test_others_are_refused(dtype) -> None:
    with pytest.raises(ValueError, match=r'dtype=.*: pass one of "auto", "bfloat16", or torch\'s dtype of that name'):
        dtype_name(dtype, ("auto", "bfloat16"))
