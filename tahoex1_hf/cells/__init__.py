# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Everything between a file and encoded cells: opening it, finding genes and counts, encoding."""
