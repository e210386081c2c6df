"""The sampler against the plain loop of `apply`, and against itself: batches, LoRAs, eight bits, offloaded weights."""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import acejax
from acejax import UserError, flow, lcu
from acejax.adapt import lora as adapt
from acejax.adapt import quantize
from acejax.edit import sampler as sampling
from acejax.edit.sampler import Sampler, sample, split
from acejax.edit.step_cache import full_steps
from acejax.model import modulation
from tests import judges, loras
from tests.counts import count
from tests.goldens import cases
from tests.parallel.shapes import SWAPPING, meshes

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = loras.CONFIG
HEIGHT, WIDTH, STEPS, GUIDANCE = 4, 6, 3, 3.5


def features(batch=4, height=HEIGHT, width=WIDTH, text=cases.TEXT):
    normal = np.random.default_rng(3).standard_normal
    drawn = {name: normal((4, *shape), np.float32)[:batch] for name, shape in (
        ("edit", (height, width, 16)), ("modify", (height, width, 16)), ("mask", (8 * height, 8 * width, 1)),
        ("text", (text, CONFIG.context_in_dim)), ("pooled", (CONFIG.vec_in_dim,)))}
    return drawn | {"mask": (drawn["mask"] > 0).astype(np.float32)}


@functools.cache
def adapted(seed, config=CONFIG):
    """A LoRA that changes every layer, those of the modulation included."""
    draw = np.random.default_rng(seed).standard_normal
    return jax.tree_util.tree_map_with_path(
        lambda path, x: 0.1 * draw(x.shape, np.float32) if path[-1].key == "b" else x,
        adapt.init(config, jax.random.key(seed), 4))


@functools.partial(jax.jit, static_argnames="channels")
def plain(params, features, noise, guidance, lora, channels=448):
    """Every step makes its modulation itself."""
    config = dataclasses.replace(CONFIG, in_channels=channels)
    given = {name: features[name] for name in sampling.INPUTS[channels]}

    def velocity(latents, sigma):
        image, positions = lcu.pack(latents, **given)
        batch = len(latents)
        tokens = acejax.Tokens(image, positions, features["text"], features["pooled"], jnp.full(batch, sigma), guidance)
        return lcu.unpack(acejax.apply(config, params, tokens, lora=lora), HEIGHT, WIDTH)

    return flow.euler(velocity, noise, flow.schedule(STEPS, HEIGHT * WIDTH // 4))


@pytest.fixture(scope="module")
def sampler():
    return Sampler(CONFIG, loras.params())


def made_noise(height=HEIGHT, width=WIDTH):
    return np.random.default_rng(5).standard_normal((4, height, width, 16), np.float32)


@pytest.fixture(scope="module")
def noise():
    return made_noise()


@pytest.fixture(scope="module")
def alone(sampler, noise):
    return sampler(features(), noise, STEPS, GUIDANCE)


def test_text_to_picture_is_the_plain_loop(noise, channels=64):
    """Of 448 channels the next test tells, of 384 test_pipeline_parity."""
    params = dict(loras.params())
    params["img_in"] = params["img_in"] | {"kernel": params["img_in"]["kernel"][:channels]}
    config, given = dataclasses.replace(CONFIG, in_channels=channels), features()
    wanted = {name: given[name] for name in (*sampling.INPUTS[channels], "text", "pooled")}
    expected = plain(params, given, noise, jnp.full(4, GUIDANCE), None, channels)
    assert judges.difference(Sampler(config, params)(wanted, noise, STEPS, GUIDANCE), expected) < 1e-5


def test_a_lora_is_an_argument_and_two_are_one(sampler, noise, alone):
    """Nothing is compiled for another one of its shape; guidance may differ by sample."""
    guidance = np.array([1.0, 2.0, 3.5, 4.0])
    both = adapt.combine([(adapted(1), 0.5), (adapted(2), -1.0)])
    compiled = None
    for lora in (both, adapt.combine([(adapted(2), 1.0), (adapted(1), 0.25)])):
        found = sampler(features(), noise, STEPS, guidance, lora)
        assert judges.difference(found, plain(loras.params(), features(), noise, jnp.asarray(guidance), lora)) < 1e-5
        assert compiled in (None, sampling._loop._cache_size())
        compiled = sampling._loop._cache_size()
    assert judges.difference(found, alone) > 1e-2
    np.testing.assert_array_equal(sampler(features(), noise, STEPS, GUIDANCE), alone)  # and gone again


def test_a_batch_is_its_samples_one_by_one(sampler, noise, alone):
    for i in range(4):
        one = {name: part[i:i + 1] for name, part in features().items()}
        found = sampler(one, noise[i:i + 1], STEPS, GUIDANCE)
        assert np.abs(found[0] - alone[i]).max() < 1e-4 * alone.std()


def test_what_the_model_reads_must_be_there(sampler, noise):
    with pytest.raises(ValueError, match="features lack modify, mask, which a model of 448"):
        sampler({name: part for name, part in features().items() if name != "modify"} | {"mask": None}, noise, STEPS)
    with pytest.raises(ValueError, match="guidance is None"):
        sampler(features(), noise, STEPS, None)
    with pytest.raises(UserError, match="steps is 0; expected at least 1"):
        sampler(features(), noise, 0)
    with pytest.raises(ValueError, match="reads 100 channels; known: 64, 384, 448"):
        Sampler(dataclasses.replace(CONFIG, in_channels=100), loras.params())


def test_offloaded_and_in_eight_bits(noise):
    params, quant = quantize.quantize(loras.params())
    shown = quantize.dequantize(params, quant)
    offloaded = Sampler(CONFIG, params, quant=quant, offload=True)
    assert {type(leaf) for leaf in jax.tree.leaves(offloaded._first)} == {np.ndarray}
    lora = adapt.combine([(adapted(1), 0.5), (adapted(2), -1.0)])  # of one shape with the last test's
    found = offloaded(features(), noise, STEPS, GUIDANCE, lora)
    expected = plain(shown, features(), noise, jnp.full(4, GUIDANCE), lora)
    assert judges.difference(found, expected) < 1e-4


def test_progress_changes_nothing(sampler, noise, alone):
    """Neither pixels nor what is compiled."""
    told, compiled = [], sampling._loop._cache_size()
    found = sampler(features(), noise, STEPS, GUIDANCE, say=lambda *steps: told.append(steps))
    np.testing.assert_array_equal(found, alone)
    assert told == [(1, 1), (2, 2), (3, 3)] and sampling._loop._cache_size() == compiled


def test_a_step_cache_leaves_blocks_out(sampler, noise, alone):
    """None at 0; the more the greater it is; at its greatest only the first and last step are whole."""
    def cached(threshold, **more):
        return sampler(features(), noise, STEPS, GUIDANCE, cache=threshold, **more)

    assert judges.difference(cached(0.0), alone) < 1e-5
    told, found = [], cached(1e9)
    np.testing.assert_array_equal(cached(1e9, say=lambda *steps: told.append(steps)), found)
    assert told == [(2, 1), (3, 2)]
    assert 1e-3 < float(jnp.linalg.norm(found - alone) / jnp.linalg.norm(alone)) < 1
    make = jax.jit(functools.partial(modulation.modulations, CONFIG))
    made = make(loras.params(), np.linspace(1, 0.1, 8)[:, None], np.ones((1, CONFIG.vec_in_dim)), np.ones(1))
    counts = [int(full_steps(made, threshold).sum()) for threshold in (0.0, 0.5, 1.0, 1e9)]
    assert counts == sorted(counts, reverse=True) and (counts[0], counts[-1]) == (8, 2) and len(set(counts)) > 2, counts


@pytest.mark.long
@pytest.mark.parametrize("devices, shapes", [
    (8, count([SWAPPING, {"fsdp": 4, "seq": 2}], meshes(8))),
    pytest.param(16, meshes(16), marks=pytest.mark.soak)])
def test_meshes_give_the_latents_of_one_device(devices, shapes):
    run = subprocess.run([sys.executable, "-m", "tests.edit.meshed", str(devices), json.dumps(shapes)], cwd=ROOT,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert all(difference < 1e-4 for difference in found.values()), found


def test_the_12b_loop_takes_no_weights_of_modulation(capsys):
    """From abstract values: what the program of a FLUX-sized model is given, in bfloat16."""
    config, execution = acejax.MMDiTConfig.ace_plus_fft(), acejax.Execution(jnp.bfloat16, attention="xla_chunked")

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    params = jax.tree.map(lambda x: array(*x.shape), jax.eval_shape(acejax.init, config, jax.random.key(0)))
    first, rest = split({"params": params, "quant": None, "lora": None})
    made = jax.eval_shape(functools.partial(modulation.modulations, config, execution=execution), first["params"],
                          array(28, 1, dtype=jnp.float32), array(1, 768), array(1, dtype=jnp.float32))
    side, canvas = 128, {name: array(1, 128, 128, 16) for name in ("edit", "modify", "noise")}
    given = canvas | {"mask": array(1, 8 * side, 8 * side, 1), "text": array(1, 512, 4096)}
    lowered = jax.jit(sample, static_argnums=(0, 1, 2)).lower(config, execution, None, rest, given,
                                                           array(29, dtype=jnp.float32), made)
    assert lowered.out_info.shape == (1, side, side, 16)
    weights, whole, steps = (sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
                             for tree in (rest, params, made))
    with capsys.disabled():
        print(f"\n12B loop: {weights / 1e9:.3f} GB of weights instead of {whole / 1e9:.3f} GB, and "
              f"{steps / 1e6:.1f} MB of modulation for 28 steps")
    assert whole - weights == 2 * 3_279_710_208 and steps < 60e6
