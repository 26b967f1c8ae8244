# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The error of inputs that cannot be used."""


class BadInput(ValueError):
    """A file that cannot be used as it is. The message names what is wrong and the way out, not the file."""
