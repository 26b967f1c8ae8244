# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Expected expression of genes in cells, as a layer, with a test on genes that are held out."""
