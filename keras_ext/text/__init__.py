"""Text to batches: tokenizers, vocabularies and length buckets."""

from keras_ext.text.batches import BucketedBatches, choose_lengths, row_sizes
from keras_ext.text.model_inputs import model_inputs
from keras_ext.text.tokenizer import Encoding, WordPieceTokenizer
from keras_ext.text.vocabulary import build_vocabulary

__all__ = [
    "BucketedBatches",
    "Encoding",
    "WordPieceTokenizer",
    "build_vocabulary",
    "choose_lengths",
    "model_inputs",
    "row_sizes",
]
