"""LoRA and QLoRA training: what is trained, kept, exported and read again, and what is refused before the start."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import acejax
from acejax import UserError
from acejax.adapt import lora as adapt
from acejax.adapt.quantize import quantize
from acejax.cli.main import main
from acejax.data.schedule import Stage
from acejax.data.stream import Stream
from acejax.parallel.mesh import make_mesh
from acejax.train import loop, plan_memory
from acejax.train.config import TrainConfig
from acejax.train.loop import train
from acejax.train.program import Program
from acejax.weights import keymaps
from tests import judges
from tests.goldens import cases
from tests.train.small import Table, losses, make_config

MODEL = acejax.MMDiTConfig(**make_config().model)
RANK, STEPS = 4, 6
SIZES = ((12, 8),)  # one bucket: one compile
apply = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})(
    lambda tokens, **trees: acejax.apply(MODEL, tokens=tokens, **trees))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model that is no zero anywhere, as a file, and its parameters."""
    params = keymaps.from_foreign(MODEL, cases.state(MODEL).__getitem__, "bfl")
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    acejax.save_model(path, MODEL, params)
    return path, params


def config_of(base, /, **lora) -> ConfigDict:
    config = make_config(SIZES)
    config.steps, config.init_from = STEPS, str(base[0])
    config.lora = {"rank": RANK, "alpha": None, "base": "float32"} | lora
    config.optimizer.update({"learning_rate": 0.03, "ema": 0.5})
    config.checkpoint.update({"every": 2, "export_every": 3, "export_layout": "comfy,diffusers"})
    return config


def stream():
    return Stream(Table(), [Stage(1)], [12], dict(SIZES), seed=3)


@pytest.fixture(scope="module")
def whole_run(base, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lora")
    state, _ = train(config_of(base), workdir, stream())
    return workdir, jax.device_get(state)


def velocity(params, **trees):
    wide = acejax.model.mmdit.example(MODEL, batch=2, image=8, text=3)
    rng = np.random.default_rng(0)
    tokens = jax.tree.map(lambda x: jnp.asarray(np.abs(rng.standard_normal(x.shape)), x.dtype), wide)
    grid = np.indices((1, 2, 4)).reshape(3, -1).T
    tokens = acejax.Tokens(tokens.image, jnp.asarray(np.stack([grid, grid]), jnp.int32), tokens.text, tokens.pooled,
                           jnp.array([0.3, 0.8]))
    return tokens, np.asarray(apply(tokens, params=params, **trees))


def test_the_factors_alone_are_trained_and_kept(whole_run):
    workdir, state = whole_run
    assert losses(workdir)[-1] < losses(workdir)[0]
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == RANK * numbers_per_rank()
    assert all(np.any(leaf) for leaf in jax.tree.leaves(state.params))
    notes = json.loads((workdir / "checkpoints" / str(STEPS) / "notes" / "metadata").read_text())
    assert {path.rpartition("/")[2] for path in notes["checksums"]} == {"a", "b", "step", "skipped", "count"}
    assert len(notes["base"]) == 32


def numbers_per_rank() -> int:
    """Of BFL's linear layers of the blocks."""
    shapes = keymaps.expected(MODEL, "bfl")
    return sum(sum(shape) for key, shape in shapes.items()
               if "_blocks." in key and len(shape) == 2 and key.endswith("weight"))


@pytest.mark.parametrize("layout", ["comfy", "diffusers"])
def test_an_export_gives_the_velocity_that_was_trained(base, whole_run, layout):
    """The averaged factors, attached to the base as in training and merged into it as for editing."""
    workdir, state = whole_run
    path = workdir / "exports" / f"step_{STEPS:06d}_{layout}.safetensors"
    assert len(list((workdir / "exports").iterdir())) == 4 and path.exists()
    lora = acejax.load_lora(path, MODEL)
    trained = adapt.spread(state.ema, jax.tree.map(np.ones_like, adapt.tie(lora)[1]))
    expected = velocity(base[1], lora=trained)[1]
    assert judges.difference(velocity(base[1])[1], expected) > 0.01
    assert judges.difference(velocity(base[1], lora=lora)[1], expected) < 1e-5
    assert judges.difference(velocity(acejax.merge_lora(base[1], lora))[1], expected) < 1e-4


@judges.needs_peft
def test_diffusers_loads_an_export_and_gives_the_same_velocity(base, whole_run):
    path = whole_run[0] / "exports" / f"step_{STEPS:06d}_diffusers.safetensors"
    tokens, expected = velocity(base[1], lora=acejax.load_lora(path, MODEL))
    assert judges.difference(expected, judges.flux_velocity(MODEL, base[1], tokens, path)) < 1e-4


def test_a_run_goes_on_as_if_it_had_not_stopped_and_only_on_its_base(base, whole_run, tmp_path):
    moved = tmp_path / "base.safetensors"
    shutil.copy(base[0], moved)
    workdir = shutil.copytree(whole_run[0], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    note, config = workdir / "config.json", config_of((moved, None))
    note.write_text(note.read_text().replace(str(base[0]), str(moved)))
    changed = jax.tree.map(np.array, base[1])
    changed["img_in"]["bias"][3] += 1e-6
    acejax.save_model(moved, MODEL, changed)
    with pytest.raises(UserError, match="base.safetensors: is not the model that this run's LoRA began on"):
        train(config, workdir, stream())
    moved.unlink()
    with pytest.raises(UserError, match="base.safetensors"):
        train(config, workdir, stream())
    with pytest.raises(UserError, match="a run that trains a LoRA has no model of its own; .*exports"):
        acejax.checkpoint.load_weights(workdir)
    shutil.copy(base[0], moved)
    train(config, workdir, stream())
    assert losses(workdir) == losses(whole_run[0])


def test_a_quantised_base_is_held_in_eight_bits(base):
    """As `acejax.adapt.quantize` makes it of bfloat16, leaf by leaf."""
    held = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base[1])
    for kind in ("int8", "float8"):
        program = Program.of(TrainConfig.of(config_of(base, base=kind)), make_mesh({"data": -1}), 2, 4)
        frozen = program.load_frozen()
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), frozen) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), program.frozen)
        left, quant = quantize(held, kind)
        jax.tree.map(np.testing.assert_array_equal, {"params": left, "quant": quant},
                     {name: frozen[name] for name in ("params", "quant")})


def test_a_lora_goes_on_from_a_file_with_its_alpha(base, whole_run, tmp_path):
    """Of other targets too: what the file leaves out begins anew."""
    lora = acejax.load_lora(whole_run[0] / "exports" / f"step_{STEPS:06d}_comfy.safetensors", MODEL, scale=0.5)
    del lora["double_blocks"]["txt"]
    acejax.save_lora(tmp_path / "start.safetensors", MODEL, lora)
    config = config_of(base, init_from=str(tmp_path / "start.safetensors"))
    program = Program.of(TrainConfig.of(config), make_mesh({"data": -1}), 2, 4)
    found = adapt.spread(program.begin().params, program.load_frozen()["scales"])
    np.testing.assert_allclose(velocity(base[1], lora=found)[1], velocity(base[1], lora=lora)[1], atol=1e-5)
    scales = {name: set(np.ravel(stream["qkv"]["scale"])) for name, stream in found["double_blocks"].items()}
    assert scales == {"img": {0.5}, "txt": {1.0}}


@pytest.mark.long
@pytest.mark.parametrize("held", ["bfloat16", "int8"])
def test_a_base_in_few_bits_and_parts_of_a_batch_have_nearly_the_same_losses(base, whole_run, tmp_path, held):
    config = config_of(base, base=held)
    config.optimizer.accumulate = 2
    config.execution.update({"dtype": "bfloat16", "remat": "full"})
    train(config, tmp_path, stream(), until=3)
    np.testing.assert_allclose(losses(tmp_path), losses(whole_run[0])[:3], rtol=0.02)


@pytest.mark.parametrize(("lora", "message"), [
    ({"rank": 0}, "config.lora: rank is 0; expected at least 1"),
    ({"rank": 33}, "config.lora.rank is 33; expected 1 to 32"),
    ({"targets": "attention"}, "config.lora.targets: target 'attention' matches no linear layer; they are"),
    ({"targets": "("}, r"config.lora.targets: target '\(' is no regular expression"),
    ({"targets": r"double_blocks\.0\.img_attn\.qkv", "MODEL": 2}, "matches some layers of .*img/qkv only"),
    ({"base": "nf4"}, "config.lora: base is 'nf4'; known: float32, bfloat16, int8, float8"),
    ({"init_from": "RUN", "rank": 8}, "found rank 4; config.lora.rank is 8"),
    ({"init_from": "RUN", "targets": ".*qkv"}, "adapts double_blocks/img/mlp_in; config.lora.targets"),
    ({"init_from": "RUN", "alpha": 2.0}, "alpha is 2.0, and init_from brings its own"),
    ({"init_from": "RUN", "MODEL": 1, "hidden_size": 64}, "has shape .*; expected"),
    ({"init_from": "nosuch.safetensors"}, "nosuch.safetensors"),
])
def test_mistakes_are_told_before_anything_is_written(base, whole_run, tmp_path, lora, message):
    """A LoRA of another geometry, too, and a pattern over some layers of a stack."""
    lora = dict(lora)
    config = config_of(base, **{name: value for name, value in lora.items() if name not in ("MODEL", "hidden_size")})
    if lora.get("init_from") == "RUN":
        config.lora.init_from = str(whole_run[0] / "exports" / f"step_{STEPS:06d}_comfy.safetensors")
    if "MODEL" in lora:
        config.init_from = None
        config.model.update({"depth": lora["MODEL"]} | (
            {"hidden_size": 64, "num_heads": 4} if "hidden_size" in lora else {}))
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run", stream())
    assert not (tmp_path / "run").exists()


def test_a_base_of_another_geometry_is_told(base, tmp_path):
    wider, grown = config_of(base), config_of(base)
    wider.model.depth = 2
    acejax.save_model(tmp_path / "fill.safetensors", dataclasses.replace(MODEL, in_channels=384), {
        **base[1], "img_in": {"kernel": base[1]["img_in"]["kernel"][:384], "bias": base[1]["img_in"]["bias"]}})
    grown.init_from = str(tmp_path / "fill.safetensors")
    for config, message in ((wider, "base.safetensors.*double_blocks.1.* missing"),
                            (grown, "reads 384 channels, config.model.in_channels is 448; a LoRA would never learn")):
        with pytest.raises(UserError, match=message):
            train(config, tmp_path / "run", stream())
    assert not (tmp_path / "run").exists()


def test_memory_that_is_not_there_is_told_with_what_would_fit(base, tmp_path, monkeypatch, capsys):
    """In compiling and in a step; through the command it is exit code 2."""
    def exhausted(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12345 bytes.")

    config = config_of(base, base="bfloat16")
    monkeypatch.setitem(plan_memory.BACKENDS, "cpu", dataclasses.replace(plan_memory.BACKENDS["cpu"], reserve=0))
    for name, broken in (("compile", exhausted), ("step", lambda *_: {12: exhausted})):
        monkeypatch.setattr(loop, "_compile", broken)
        with pytest.raises(UserError, match="memory of the devices is exhausted .*12345 bytes") as told:
            train(config, tmp_path / name, stream())
        assert "memory of one device in GB" in str(told.value) and "  frozen " in str(told.value)
        assert str(told.value).endswith("\nconfig.execution.remat=attention,qkv,mlp,proj,out makes it fit")
    monkeypatch.setattr(loop, "_compile", lambda *_: exhausted())
    monkeypatch.setattr("acejax.demo.job.prepare", lambda config, workdir: (None, None, stream(), None))
    flags = [f"--config.model.{name}={value}" for name, value in make_config().model.items()
             if name in ("hidden_size", "num_heads", "depth_single_blocks", "axes_dim", "context_in_dim", "vec_in_dim")]
    assert main(["train", "--config=demo.py", f"--workdir={tmp_path / 'command'}", "--cpu_devices=1", *flags]) == 2
    assert "acejax: the memory of the devices is exhausted" in capsys.readouterr().err
