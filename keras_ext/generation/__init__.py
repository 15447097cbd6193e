"""Text from language models: search and sampling, with kept keys and values."""

from keras_ext.generation.cached_model import CachedModel
from keras_ext.generation.generator import Generator
from keras_ext.generation.sampling import sample_tokens

__all__ = ["CachedModel", "Generator", "sample_tokens"]
