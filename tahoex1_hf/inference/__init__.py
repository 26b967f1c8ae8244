# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Forward passes over many cells: batches, ragged rows, quantized weights."""
