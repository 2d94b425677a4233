"""float32 means float32: the precision that a run asks for reaches every product."""

import jax
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from ae_jax.config import TrainConfig
from ae_jax.devices import numerics
from ae_jax.models import MODELS
from ae_jax.objectives import Reconstruction
from ae_jax.runs.program import build
from ae_jax.runs.run import scores_of
from ae_jax.train import Block

PRODUCTS = ("dot_general", "conv_general_dilated")


def products_of(jaxpr):
    """The precision of every product of a program, those inside its loops too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in PRODUCTS:
            yield equation.params["precision"]
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda v: isinstance(v, Jaxpr | ClosedJaxpr)
        ):
            inner = getattr(value, "jaxpr", value)
            if isinstance(inner, Jaxpr):
                yield from products_of(inner)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("float32", jax.lax.Precision.HIGHEST),
        ("tf32", jax.lax.Precision.HIGH),
    ],
)
def test_every_product_of_training_and_scoring_has_the_precision_asked_for(
    model, precision, expected
):
    shape, options = (8, 9, 1), MODELS[model]()
    with numerics(precision):
        made = build(
            options, Reconstruction(), TrainConfig(precision=precision), 70, shape
        )
        state = made.init(0)
        rows = np.zeros((2, 64), np.int32)
        block = Block(np.zeros((70, *shape), np.uint8), rows, 0, 2)
        x = np.zeros((4, *shape), state.epoch_metrics["mse"].dtype)
        chunk = jax.make_jaxpr(made.chunk)(state, block, 2)
        scores = jax.make_jaxpr(scores_of(Reconstruction(), made.model))
        scored = scores(state.params, x, np.arange(4))
    training = list(products_of(chunk.jaxpr))
    # Forward, and backward for kernels and inputs, but not for the images.
    kernels = [x for x in jax.tree.leaves(state.params) if x.ndim > 1]
    assert len(training) == 3 * len(kernels) - 1
    for found in (*training, *products_of(scored.jaxpr)):
        parts = found if isinstance(found, tuple) else (found,)
        assert set(parts) == {expected}
