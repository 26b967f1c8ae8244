# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Transfer of labels from annotated cells to others, by neighbours among embeddings."""
