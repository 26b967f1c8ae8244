# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The error for inputs that cannot be used."""


class BadInput(ValueError):
    """An error for a file that cannot be used. The message says what is wrong and what to do, but not which file."""
