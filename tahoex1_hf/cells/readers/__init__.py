# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Readers of files with cells, one module for each kind of file; `cells.opening` chooses among them."""
