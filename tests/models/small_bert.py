"""A BERT of the least sizes that tell all dimensions apart, with every head."""

HEADS = {"with_mlm": True, "with_nsp": True, "with_pool": True}
SIZES = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 7,
}
