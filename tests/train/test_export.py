"""Weights as safetensors while a run goes on."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import acejax
from acejax.checkpoint import Checkpoints
from acejax.cli import convert
from acejax.model.mmdit import init
from acejax.train import export
from acejax.train.export import Exports
from acejax.weights import keymaps
from acejax.weights.source import open_source
from tests.train.small import make_config


@pytest.fixture(scope="module")
def small():
    config = acejax.MMDiTConfig(**make_config().model)
    return config, jax.jit(init, static_argnums=0)(config, jax.random.key(0))


@pytest.mark.parametrize("layout", ["bfl", "comfy", "diffusers"])
def test_an_export_loads_as_what_was_trained(small, tmp_path, monkeypatch, layout):
    """Also where leaves are gathered in pieces, the last of which overlap."""
    monkeypatch.setattr(export, "PIECE", 3000)
    config, params = small
    exports = Exports(tmp_path, config, (layout,))
    exports.save(12, params)
    exports.save(24, jax.tree.map(np.negative, params))
    exports.close()
    assert sorted(path.name for path in (tmp_path / "exports").iterdir()) == ["step_000012.safetensors",
                                                                              "step_000024.safetensors"]
    path = tmp_path / "exports" / "step_000012.safetensors"
    assert all(key.startswith(keymaps.COMFY) for key in open_source(path).tensors) == (layout == "comfy")
    _, loaded = acejax.load_mmdit(path, config)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_a_workdir_gives_its_averages(small, tmp_path):
    config, params = small
    (tmp_path / "config.json").write_text(json.dumps({"model": dataclasses.asdict(config)}))
    averages = jax.tree.map(np.negative, params)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"params": params, "ema": averages})
    checkpoints.close()
    for name, flags, expected in ("ema", [], averages), ("raw", ["--raw"], params):
        target = tmp_path / f"{name}.safetensors"
        assert convert.main([str(tmp_path), str(target), "--to", "bfl", *flags]) == 0
        jax.tree.map(np.testing.assert_array_equal, acejax.load_mmdit(target, config)[1], expected)


def test_an_export_that_cannot_be_written_is_told(small, tmp_path):
    (tmp_path / "exports").write_text("")
    exports = Exports(tmp_path, small[0])
    exports.save(1, small[1])
    with pytest.raises(acejax.UserError, match="step_000001.safetensors.* cannot be written"):
        exports.close()
    exports.close()
