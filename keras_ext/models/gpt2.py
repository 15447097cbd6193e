"""GPT-2: a GPT of pre-norm blocks, with a norm after the last.

    h      = Dropout(E_token[ids] + E_position)
    h      = h + Attention(n), n = Norm(h);  h = h + FeedForward(Norm(h)),  once per block
    logits = Norm(h) E_tokenᵀ

The Chinese CPM and many others are GPT-2s of other sizes and vocabularies.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners";
github.com/openai/gpt-2; CPM: Zhang et al. 2020, arXiv 2012.00413. TensorFlow checkpoints are
OpenAI's, or have the names of bert4keras's conversions.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from keras_ext.models.bert import BLOCKS, NORM
from keras_ext.models.gpt import FIELDS, GPT, TABLES, conversion_names, huggingface_names
from keras_ext.models.names import NameTable

# The norms come before, and that of the end has no number.
PRE_NORM_BLOCKS = tuple(
    (layer, scope.replace("output/LayerNorm", "input/LayerNorm"), weights)
    for layer, scope, weights in BLOCKS
)
OUTPUT_NORM = ("output_norm", "gpt/output/LayerNorm", NORM)
# In the place of names that a checkpoint of OpenAI lacks, its own.
OPENAI = {
    r"^gpt/embeddings/word_embeddings$": r"model/wte",
    r"^gpt/embeddings/position_embeddings$": r"model/wpe",
    r"^gpt/transformer/layer_(\d+)/": r"model/h\1/",
    r"^gpt/output/LayerNorm/": r"model/ln_f/",
    r"attention/self/query/(kernel|bias)$": r"attn/c_attn/\1[0/3]",
    r"attention/self/key/(kernel|bias)$": r"attn/c_attn/\1[1/3]",
    r"attention/self/value/(kernel|bias)$": r"attn/c_attn/\1[2/3]",
    r"attention/output/dense/": r"attn/c_proj/",
    r"attention/input/LayerNorm/": r"ln_1/",
    r"intermediate/dense/": r"mlp/c_fc/",
    r"output/dense/": r"mlp/c_proj/",
    r"input/LayerNorm/": r"ln_2/",
    r"/kernel(\[\d/3\])?$": r"/w\1",
    r"/(?:bias|beta)(\[\d/3\])?$": r"/b\1",
    r"/gamma$": r"/g",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2(GPT, family="gpt2"):
    """The sizes of a GPT-2, or a CPM; see `GPT`.

    Example:
        >>> config = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4}
        >>> gpt2 = build_transformer_model(config, model="gpt2", with_mlm=True)
        >>> hidden, logits = gpt2(np.array([[5, 3, 8]]))
    """

    max_position_embeddings: int = 1024

    implied: ClassVar[Mapping[str, Any]] = {
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }
    fields: ClassVar[Mapping[str, str]] = {
        **FIELDS,
        "hidden_act": "activation_function",
        "intermediate_size": "n_inner",
    }
    activations: ClassVar[Mapping[str, str]] = {}
    names: ClassVar[Mapping[str, NameTable]] = {
        "tensorflow": dataclasses.replace(
            conversion_names((*TABLES, *PRE_NORM_BLOCKS, OUTPUT_NORM)), fallbacks=OPENAI
        ),
        "huggingface": huggingface_names(
            {"token_embedding": "wte", "position_embedding": "wpe"},
            {
                "encoder_{i}/attention_norm": "h.{i}.ln_1",
                "encoder_{i}/feed_forward_norm": "h.{i}.ln_2",
                "output_norm": "ln_f",
            },
        ),
    }
    pre_norm: ClassVar[bool] = True

    def encode(self, hidden: Any, side: str = "encoder", **pattern: Any) -> Any:
        """All blocks, and the norm after them."""
        return self.norm("output_norm")(super().encode(hidden, side, **pattern))
