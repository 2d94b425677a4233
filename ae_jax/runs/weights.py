"""Parameters to start from: another run's, or a file's."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ae_jax import weights
from ae_jax.errors import UserError
from ae_jax.runs.checkpoint import digest_leaves, name_of
from ae_jax.runs.run import open_run
from ae_jax.train import Params


def load_weights(source: Path, like: Params) -> tuple[Params, str]:
    """The parameters at a place, for a model whose own are like some.

    Args:
        source: a run folder, of which the newest checkpoint is taken, or a
            ``.safetensors`` or ``.pt`` file with the tutorial's names.
        like: arrays or shapes.

    Returns:
        The parameters, in the dtypes of ``like``, and a sha256 of them.

    Raises:
        UserError: there are none, or they are another model's; names what differs.
    """
    if source.is_dir():
        params = open_run(source).params
    else:
        params = weights.to_linen(weights.read_state_dict(source))
    theirs, ours = (
        {name_of(path): leaf.shape for path, leaf in leaves}
        for leaves, _ in map(jax.tree_util.tree_flatten_with_path, (params, like))
    )
    different = sorted(k for k in {*theirs, *ours} if theirs.get(k) != ours.get(k))
    if different:
        name = different[0]
        raise UserError(
            f"train.init_from: {source} holds another model's parameters: {name} is "
            f"{_shown(theirs.get(name))}, this one's {_shown(ours.get(name))}"
        )
    digest = hashlib.sha256(json.dumps(digest_leaves(params)).encode()).hexdigest()
    return jax.tree.map(lambda a, b: jnp.asarray(a, b.dtype), params, like), digest


def _shown(shape: Any) -> str:
    return "absent" if shape is None else str(list(shape))
