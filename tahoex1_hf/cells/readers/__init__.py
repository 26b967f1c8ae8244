# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Readers of the kinds of files that hold cells, one module each; `cells.opening` chooses among them."""
