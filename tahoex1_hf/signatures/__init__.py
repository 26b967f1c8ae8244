# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Signatures of drugs: how each shifts cells from their controls, and which drugs shift them alike."""
