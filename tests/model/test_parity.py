"""The MMDiT computes what FLUX computes, and the same however it is executed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import acejax
from acejax.model.attention import CHUNK, attention
from acejax.model.mmdit import timestep_embedding
from acejax.weights import keymaps
from tests import judges
from tests.goldens import cases, make
from tests.judges import difference

# at guidance 50 one embedding angle is 50,000: the last bit of one float32 frequency moves the output by 1e-3 of std
TOLERANCE = {1.0: 1e-4, 3.5: 1e-4, 50.0: 5e-3}
over_cases = pytest.mark.parametrize("guidance", cases.GUIDANCE)
over_channels = pytest.mark.parametrize("channels", cases.CHANNELS)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """(config, params) by input channels, through a file as a user's weights come."""
    models = {}
    for channels in cases.CHANNELS:
        path = tmp_path_factory.mktemp("weights") / f"{channels}.safetensors"
        save_file(cases.state(cases.config(channels)), path)
        models[channels] = acejax.load_mmdit(path, cases.config(channels))
    return models


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[448]


apply = jax.jit(acejax.apply, static_argnums=0, static_argnames="execution")


@over_cases
@over_channels
def test_equals_the_recorded_flux(loaded, channels, guidance):
    config, params = loaded[channels]
    with np.load(make.FLUX) as recorded:
        expected = recorded[make.name(channels, guidance)]
    assert difference(apply(config, params, cases.inputs(config, guidance)), expected) < TOLERANCE[guidance]


@judges.needs_diffusers
@over_cases
@over_channels
def test_equals_diffusers(loaded, channels, guidance):
    config, params = loaded[channels]
    tokens = cases.inputs(config, guidance, seed=2)
    assert difference(apply(config, params, tokens), judges.flux_velocity(config, params, tokens)) < TOLERANCE[guidance]


@judges.needs_diffusers
def test_recorded_flux_is_current():
    """Within what the recording is held against: PyTorch's float32 is not the same on all CPUs."""
    made = make.flux()
    with np.load(make.FLUX) as recorded:
        assert recorded.keys() == made.keys()
        for guidance, tolerance in TOLERANCE.items():
            for channels in cases.CHANNELS:
                key = make.name(channels, guidance)
                assert difference(recorded[key], made.pop(key)) < tolerance, key
    assert not made


@judges.needs_diffusers
def test_model_without_guidance_equals_diffusers():
    config = dataclasses.replace(cases.config(64), guidance_embed=False)
    params = keymaps.from_foreign(config, cases.state(config).__getitem__, "bfl")
    tokens = dataclasses.replace(cases.inputs(config), guidance=None)
    assert difference(apply(config, params, tokens), judges.flux_velocity(config, params, tokens)) < 1e-4


def test_timestep_embedding():
    """temb(0.5) as FLUX computes it; float32 fixes no more than four digits of an angle of 500."""
    embedding = np.asarray(timestep_embedding(jnp.array([0.5])))[0]
    np.testing.assert_allclose(embedding[:3], [-0.88384926, 0.94594574, 0.84850687], atol=1e-4)
    np.testing.assert_allclose(embedding[128:131], [-0.46777180, 0.32432494, -0.52918434], atol=1e-4)


@pytest.mark.parametrize("implementation", ["xla", "xla_chunked"])
def test_padded_sample_gives_what_it_gives_alone(model, implementation, monkeypatch):
    """What stands in the padding reaches no valid token, with all queries at once and by chunks."""
    monkeypatch.setattr("acejax.model.attention.CHUNK", 8)  # 19 tokens: two chunks and a part
    config, params = model
    tokens = cases.inputs(config)
    full, short = lengths = np.array([cases.ROWS * cases.COLUMNS, 8], np.int32)
    batched = apply(config, params, dataclasses.replace(tokens, lengths=lengths),
                    execution=acejax.Execution(attention=implementation))
    unpadded = apply(config, params, tokens)
    alone = jax.tree.map(lambda leaf: leaf[1:], tokens)
    alone = dataclasses.replace(alone, image=alone.image[:, :short], positions=alone.positions[:, :short])

    assert difference(batched[0, :full], unpadded[0]) < 1e-5
    assert difference(batched[1, :short], apply(config, params, alone)[0]) < 1e-5
    assert difference(batched[1, :short], unpadded[1, :short]) > 1e-2  # the lengths do matter
    assert bool(jnp.isfinite(batched).all())


@pytest.mark.parametrize("lengths", [None, [CHUNK + 188, 3]])
def test_chunked_attention_equals_plain(lengths):
    """Forward and gradient, for a size that is no multiple of the chunk."""
    shape = (2, CHUNK + 188, 2, 8)
    q, k, v, weight = (jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 4))
    lengths = None if lengths is None else jnp.array(lengths)

    def run(implementation):
        def weighted(q, k, v):
            out = attention(q, k, v, lengths, implementation)
            return (out * weight).sum(), out
        (_, out), gradients = jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return out, *gradients

    for found, expected in zip(run("xla_chunked"), run("xla"), strict=True):
        assert difference(found, expected) < 1e-4


def test_bfloat16_is_close(model):
    """bf16 keeps 8 bits: five blocks of random, unnormalised modulation stay within a few percent."""
    config, params = model
    tokens = cases.inputs(config)
    exact = np.asarray(apply(config, params, tokens))
    found = apply(config, params, tokens, execution=acejax.Execution(dtype=jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    error = np.asarray(found, np.float32) - exact
    assert error.std() < 0.03 * exact.std()
