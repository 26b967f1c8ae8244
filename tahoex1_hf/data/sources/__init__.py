"""Kinds of sources of cells, one module each."""
