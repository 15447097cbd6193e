"""Attention mechanisms, one a file; the public names stand in `keras_ext.layers`."""
