"""Conditional random field (CRF): the best sequence of tags, not of single tags.

    p(y) = exp(s(y)) / Z,    s(y) = start[y_1] + Σ_t e_t[y_t] + Σ_t A[y_{t-1}, y_t] + end[y_n]

Emissions e are the scores of a network, transitions A are learnt with it. The functions of
tensors are in `keras_ext.layers.linear_chain`, with the algorithm and its cost.

Source: Lafferty, McCallum and Pereira 2001, ICML; Collobert et al. 2011, arXiv 1103.0398
(on top of a network); kexue.fm/archives/5542.
"""

from typing import Any

import keras
from keras import ops

from keras_ext.layers.linear_chain import crf_decode, crf_negative_log_likelihood
from keras_ext.numerics import at_least_float32


@keras.saving.register_keras_serializable(package="keras_ext")
class CRF(keras.layers.Layer):
    """Conditional random field over the scores of tags, as the last layer of a tagger.

        loss = log Z - s(y)
        s(y) = start[y_1] + Σ_t e_t[y_t] + Σ_t A[y_{t-1}, y_t] + end[y_n]

    The layer holds A (`transitions`), `start` and `end`, and passes the emissions e through,
    with -inf at padding, where no tag is possible. `loss` and `decode` are its other two parts.
    They read the padding off the outputs, so they need no mask, also after `model.predict`.

        model.compile(optimizer, loss=crf.loss())
        tags = crf.decode(model.predict(x))

    The loss belongs to this layer. A model that was loaded or cloned has a layer of its own:
    compile it again, `model.compile(model.optimizer, loss=model.get_layer("crf").loss())`, in
    which a loaded optimizer keeps its state.

    With a learning rate for fine-tuning (1e-5) transitions hardly move: `MultiplierOptimizer(
    optimizer, {crf: 1000})` gives them a rate of their own, as kexue.fm recommends.

    To forbid a transition, set it to a large negative number such as -1e4, not to -inf.

    Args:
        initializer: of the three weights. Default: "zeros", where every position is an
            independent softmax.
        regularizer: of the three weights. Default: None.

    Call arguments:
        inputs: emissions (batch, length, tags), without softmax. The output is like it.
        mask: booleans (batch, length), True where a position is kept. Default: the Keras mask
            of the inputs. Any pattern will do, see above; a row may be all padding.

    Raises:
        ValueError: the inputs are not of rank 3.

    Example:
        >>> inputs, crf = keras.Input((None,), dtype="int32"), CRF()
        >>> emissions = keras.layers.Embedding(9, 4, mask_zero=True)(inputs)
        >>> tagger = keras.Model(inputs, crf(emissions))
        >>> tagger.compile("adam", loss=crf.loss())
        >>> history = tagger.fit(token_ids, np.array([[3, 1, 0]]), verbose=0)
        >>> tuple(crf.decode(tagger.predict(token_ids, verbose=0)).shape)
        (1, 3)

    Reference: Lafferty et al. 2001, ICML; kexue.fm/archives/5542.
    """

    def __init__(
        self, initializer: Any = "zeros", regularizer: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.input_spec = keras.layers.InputSpec(ndim=3)
        self.initializer = keras.initializers.get(initializer)
        self.regularizer = keras.regularizers.get(regularizer)

    @property
    def potentials(self) -> tuple[keras.Variable, keras.Variable, keras.Variable]:
        """`transitions` (tags, tags), `start` and `end` (tags,), as the functions take them."""
        return self.transitions, self.start, self.end

    def build(self, inputs_shape: tuple) -> None:
        tags = inputs_shape[-1]
        self.input_spec = keras.layers.InputSpec(ndim=3, axes={-1: tags})
        self.transitions = self._add("transitions", (tags, tags))
        self.start = self._add("start", (tags,))
        self.end = self._add("end", (tags,))

    def call(self, inputs: Any, mask: Any = None) -> Any:
        if mask is None:
            return inputs
        return ops.where(ops.expand_dims(mask, -1), inputs, float("-inf"))

    def loss(
        self, *, reduction: str | None = "sum_over_batch_size", name: str = "crf_loss"
    ) -> keras.losses.Loss:
        """The loss for `compile`: -log p(y) of every sequence, not divided by its length.

        Args:
            reduction: over the sequences, as for `keras.losses.Loss`.
            name: of the loss.

        It takes y_true, integers (batch, length), the outputs of the layer, and one sample
        weight for each sequence. y_true may be anything at padding; positions where it is
        negative are left out as well. It is no metric: on JAX those have no access to the
        weights of the model while it is trained.

        Raises:
            ValueError: when the loss is computed, y_true or the sample weights have another
                shape, or a tag that counts is seen to be too large; where tags cannot be seen,
                as in a compiled step, that sequence has a NaN loss.
        """
        return CRFLoss(self, reduction, name)

    def decode(self, outputs: Any, mask: Any = None) -> Any:
        """The best tags, int32 (batch, length), 0 at padding.

        Args:
            outputs: those of the layer, tensor or array.
            mask: booleans (batch, length). Default: read off the outputs.
        """
        mask = _possible(outputs) if mask is None else mask
        return crf_decode(outputs, *self.potentials, mask)

    def compute_output_shape(self, inputs_shape: tuple) -> tuple:
        return inputs_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "initializer": keras.initializers.serialize(self.initializer),
            "regularizer": keras.regularizers.serialize(self.regularizer),
        }

    def _add(self, name: str, shape: tuple) -> keras.Variable:
        initializer = self.initializer.clone()  # three draws, should it be random
        return self.add_weight(
            shape=shape, initializer=initializer, regularizer=self.regularizer, name=name
        )


@keras.saving.register_keras_serializable(package="keras_ext")
class CRFLoss(keras.losses.Loss):
    """The loss of a `CRF` layer; see `CRF.loss`."""

    def __init__(
        self,
        crf: CRF | str,
        reduction: str | None = "sum_over_batch_size",
        name: str = "crf_loss",
    ) -> None:
        dtype = keras.config.floatx() if isinstance(crf, str) else crf.compute_dtype
        super().__init__(name, reduction, at_least_float32(dtype))
        self.crf = crf

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        if sample_weight is not None:
            shape = ops.convert_to_tensor(sample_weight).shape
            if len(shape) > 1 and shape[1:] != (1,):
                raise ValueError(
                    "sample_weight must have one weight for each sequence, (batch,), got shape "
                    f"{tuple(shape)}. Leave positions out by the mask of the CRF layer."
                )
        # A new tensor, without the Keras mask: that is of positions, the losses are of rows.
        return super().__call__(y_true, ops.add(y_pred, 0), sample_weight)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        if isinstance(self.crf, str):
            raise ValueError(
                f"The loss was restored without its layer {self.crf!r}. Compile again: model."
                f"compile(model.optimizer, loss=model.get_layer({self.crf!r}).loss())."
            )
        if len(y_true.shape) != 2:
            raise ValueError(
                f"y_true must be tags (batch, length), got shape {tuple(y_true.shape)}."
            )
        # Not `y_true >= 0`, which would leave out NaN as well.
        mask = ops.logical_and(_possible(y_pred), ops.logical_not(y_true < 0))
        return crf_negative_log_likelihood(y_pred, y_true, *self.crf.potentials, mask)

    def get_config(self) -> dict[str, Any]:
        name = self.crf if isinstance(self.crf, str) else self.crf.name
        return {"crf": name, "reduction": self.reduction, "name": self.name}


def _possible(outputs: Any) -> Any:
    """Where some tag is possible, (batch, length)."""
    return ops.max(ops.convert_to_tensor(outputs), axis=-1) > float("-inf")
