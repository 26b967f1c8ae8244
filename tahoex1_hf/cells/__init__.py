# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""All steps from a file to encoded cells: opening the file, finding its genes and counts, encoding the cells."""
