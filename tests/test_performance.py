"""What makes it fast and can be counted: programs, transfers, copies, operations.

Seconds belong into scripts/benchmark.py; these numbers are the same on every machine.
"""

import functools
import itertools
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from ae_jax import ensemble, run
from ae_jax.checkpoint import digest_leaves
from ae_jax.config import Config, EnsembleConfig, ModelConfig
from ae_jax.train import MEMBERS, Purpose, key_for, make_train_chunk
from scripts.benchmark import made_up
from scripts.tables import cost_on_paper

N, D, B = 200, 784, 64
IMAGES = np.random.default_rng(0).integers(0, 256, (N, D), np.uint8)


@functools.cache
def tutorial():
    """The reference program, its jitted chunk, and that chunk compiled."""
    program = run.build(Config(), N, D)
    state = jax.eval_shape(program.init)
    chunk = make_train_chunk(program.train_step)
    order = program.order(key_for(0, Purpose.SHUFFLE), 0)
    return program, chunk, chunk.lower(state, IMAGES, order, 0).compile()


def num_params(state):
    return sum(leaf.size for leaf in jax.tree.leaves(state.params))


def test_any_split_of_an_epoch_and_any_epoch_run_one_program():
    program, _, _ = tutorial()
    chunk = make_train_chunk(program.train_step)
    state = made_up(program.init)
    images = jax.device_put(IMAGES)
    for epoch in range(2):
        order = program.order(key_for(0, Purpose.SHUFFLE), epoch)
        for stop in (1, 2, 4):
            state = chunk(state, images, order, epoch * 4 + stop)
    assert int(state.step) == 8
    assert chunk._cache_size() == 1
    assert program.order._cache_size() == 1


def test_one_program_draws_the_first_state_of_every_seed():
    program, _, _ = tutorial()
    before = program.init_at._cache_size()
    first, second = (program.init_at(np.uint32(seed)).params for seed in (0, 2**32 - 1))
    assert program.init_at._cache_size() <= before + 1
    differ = jax.tree.map(lambda a, b: (a != b).any(), first, second)
    assert all(jax.tree.leaves(differ))


def test_sixteen_draws_are_compiled_as_two():
    program, _, _ = tutorial()
    drawn = str(jax.make_jaxpr(program.init_at)(np.uint32(0)))
    assert drawn.count("random_bits[") == 2


def test_within_an_epoch_nothing_goes_to_or_from_the_host():
    program, chunk, _ = tutorial()
    state = made_up(program.init)
    images, stop = jax.device_put((IMAGES, jnp.int32(4)))
    order = program.order(key_for(0, Purpose.SHUFFLE), 0)
    with jax.transfer_guard("disallow"):
        state = jax.block_until_ready(chunk(state, images, order, stop))
    with (
        pytest.raises(Exception, match=r"[Dd]isallowed"),
        jax.transfer_guard("disallow"),
    ):
        chunk(state, IMAGES, order, stop)  # these would have to


def test_the_state_is_updated_in_place():
    program, chunk, compiled = tutorial()
    state = made_up(program.init)
    leaves = jax.tree.leaves((state.params, state.opt_state, state.epoch_metrics))
    kept = sum(leaf.nbytes for leaf in leaves)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= kept
    # Beside it: the gradients, the activations of a batch, and its images.
    widths = sum(ModelConfig.hidden) * 2 + ModelConfig.code_width + D
    room = 4 * (num_params(state) + 4 * B * (widths + D))
    assert memory.temp_size_in_bytes <= room
    order = program.order(key_for(0, Purpose.SHUFFLE), 0)
    chunk(state, IMAGES, order, 1)
    assert all(leaf.is_deleted() for leaf in leaves)


def test_a_step_costs_its_products_and_adam_and_little_else():
    program, _, _ = tutorial()
    state = jax.eval_shape(program.init)
    x = jax.ShapeDtypeStruct((B, D), jnp.float32)
    weight = jax.ShapeDtypeStruct((B,), jnp.float32)
    cost = jax.jit(program.train_step).lower(state, x, weight).compile().cost_analysis()
    params = num_params(state)
    first = D * ModelConfig.hidden[0]  # nobody asks for the gradient of the images
    products = 2 * B * (3 * params - first)
    assert products <= cost["flops"] <= 1.1 * products
    # Parameters, both moments and gradients are read and written a few times at most.
    assert cost["bytes accessed"] <= 4 * (20 * params + 16 * B * D)


COMPILE = """
import jax, json, re
from ae_jax import checkpoint, feed, hosts, run
from ae_jax.config import Config
from ae_jax.train import Purpose, key_for
import numpy as np

found = []
for count in (1, 2, 4):
    mesh = hosts.make_mesh(count, 64)
    where = hosts.replicated(mesh)
    program = run.build(Config(), 200, 784, sharding=where)
    key = key_for(0, Purpose.SHUFFLE)
    made = feed.InMemory(np.zeros((200, 784), np.uint8), program.order, key, mesh)
    state = checkpoint.abstract_like(program.init, where)
    made.lower(program.train_step, state)
    made.compile()
    text = made._chunk.as_text()
    sizes = [
        np.prod([int(n) for n in dims.split(",") if n])
        for line in re.findall("= (.*) all-reduce[(]", text)
        for dims in re.findall("f32.([0-9,]*).", line)
    ]
    cost = made._chunk.cost_analysis()
    found.append([cost["flops"], 4 * int(sum(sizes))])
print(json.dumps(found))
"""


def test_devices_share_a_step_as_on_paper():
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        capture_output=True,
        text=True,
        check=True,
    )
    for count, (flops, reduced) in zip((1, 2, 4), json.loads(done.stdout), strict=True):
        paper = cost_on_paper(count, B)
        adam = 20 * num_params(jax.eval_shape(tutorial()[0].init))
        assert paper["flops"] <= flops <= 1.05 * paper["flops"] + adam
        # The gradients, and a few sums of the batch.
        assert paper["reduced_bytes"] <= reduced <= paper["reduced_bytes"] + 64


def test_members_share_one_program_and_are_updated_in_place():
    program = run.build(EnsembleConfig(), N, D)
    group = ensemble.make_group(program, 2)
    members = jnp.arange(2, dtype=jnp.uint32)
    states = group.put(made_up(lambda: group.init(members)), MEMBERS)
    leaves = jax.tree.leaves((states.params, states.opt_state))
    images = group.put(IMAGES, None)
    for stop in (1, 4):
        states = group.advance(states, images, group.order(members, 0), stop)
    assert group.advance._cache_size() == 1
    assert all(leaf.is_deleted() for leaf in leaves)
    assert math.isfinite(float(states.epoch_metrics["loss"].sum()))


# --- The cache of compiled programs ---------------------------------------------------

DAMAGES = (
    lambda blob: blob[: len(blob) // 2],
    lambda blob: b"",
    lambda blob: b"not what was compiled " * 100,
    lambda blob: blob[:1000] + bytes([blob[1000] ^ 16]) + blob[1001:],
)


def begin(folder, cache):
    """The tutorial on digits as a process of its own, its programs kept in a cache."""
    command = [sys.executable, "-m", "experiments.tutorial", "--preset", "quick"]
    options = ["--train.num-epochs", "1", "--figures.epochs", "1", "--model.hidden"]
    return subprocess.Popen(
        [*command, *options, "16", "--run-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """What it said, if it ended well."""
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return said


def test_a_damaged_cache_or_none_stops_no_run_and_changes_no_bit(tmp_path):
    cache, in_the_way = tmp_path / "cache", tmp_path / "file"
    in_the_way.touch()
    names = ("sound", "uncached", "damaged")
    sound, uncached, damaged = folders = [tmp_path / name for name in names]
    begun = begin(sound, cache), begin(uncached, in_the_way)
    said = [finish(process) for process in begun]
    complaint = "persistent compilation cache"
    assert [complaint in text for text in said] == [False, True]

    programs = sorted(cache.iterdir())
    for path, damage in zip(programs, itertools.cycle(DAMAGES)):
        path.write_bytes(damage(path.read_bytes()))
    assert len(programs) > len(DAMAGES)
    said = finish(begin(damaged, cache))
    assert said.count(complaint) > len(DAMAGES)
    assert sorted(cache.iterdir()) == programs

    opened = [run.open_run(folder) for folder in folders]
    losses = [[row["train/mse"] for row in one.rows] for one in opened]
    digests = [digest_leaves(one.state) for one in opened]
    assert losses[1:] == losses[:1] * 2
    assert digests[1:] == digests[:1] * 2
