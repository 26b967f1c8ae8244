# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Remove from the names of tensors what wrappers of a model, such as DDP, torch.compile and PEFT, have added."""

import re
from collections.abc import Iterable

# Modules that wrap a model or a part of it; no tensor of ours, nor of the original, has one in its name.
_WRAPPERS = "(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)"
# How our names begin. The original's begin with `model.`, too, but go on otherwise.
_OURS = (
    r"(?:tahoe|embeddings|layers|norm|classifier|cell_decoder\.(?:gene_query|cell_proj)"
    r"|expression_decoder\.(?:layers|output))"
)
_FRONT = re.compile(rf"(?:{_WRAPPERS}\.|base_model\.model\.|model\.(?={_OURS}\.))*")
_INSIDE = re.compile(rf"(?<=\.){_WRAPPERS}\.")
_ADAPTER = "base_model.model."  # how the names of an adapter's tensors begin


def unwrapped(name: str) -> str:
    """Return the name that a tensor has in the model itself."""
    return _INSIDE.sub("", _FRONT.sub("", name, count=1))


def unwrapped_in_adapter(name: str) -> str:
    """Return the name that a tensor has in an adapter that PEFT saves."""
    return (_ADAPTER if _ADAPTER in _front(name) else "") + unwrapped(name)


def unwrapping(names: Iterable[str]) -> dict[str, str]:
    """Return the `key_mapping` of `from_pretrained` that removes the parts of wrappers from names.

    Args:
        names: Names of the tensors in a checkpoint.

    Returns:
        Regular expression -> replacement of its first match; empty if no name has a wrapper's part.

    Raises:
        ValueError: If two tensors would have the same name then.
    """
    rules: dict[str, str] = {}
    fronts: set[str] = set()
    met: dict[str, str] = {}
    for name in names:
        bare = unwrapped(name)
        if bare in met:
            raise ValueError(f"{met[bare]} and {name} are two tensors for one place, {bare}: leave only one of them.")
        met[bare] = name
        front = _front(name)
        fronts.add(front)
        for number, wrapper in enumerate(_INSIDE.findall(name.removeprefix(front))):
            # A rule is applied once to a name. With empty groups at its end, it is another rule that does the same.
            rules[rf"\.{re.escape(wrapper)}{'(?:)' * number}"] = "."
    # The longest first: where one begins with another, it must not lose that part alone.
    longest = sorted(fronts - {""}, key=len, reverse=True)
    return {**{f"^{re.escape(front)}": "" for front in longest}, **rules}


def taken_off(names: Iterable[str]) -> str:
    """Return the parts that `unwrapped` removes from names, as text for messages."""
    found: set[str] = set()
    for name in names:
        front = _front(name)
        found |= {front, *_INSIDE.findall(name.removeprefix(front))}
    return ", ".join(sorted(found - {""}))


def _front(name: str) -> str:
    match = _FRONT.match(name)
    return match[0] if match else ""
