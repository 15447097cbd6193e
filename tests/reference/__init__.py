"""Independent float64 NumPy references; nothing here imports Keras."""
