"""The key tables: the published names and shapes, and exact ways there and back."""

import jax
import numpy as np
import pytest
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict

import acejax
from acejax.weights import keymaps, trees
from tests import judges
from tests.goldens import cases


def published() -> dict[str, tuple[int, ...]]:
    """Every tensor of ACE++ FFT as published, written out apart from the tables (BFL `model.py`, in_channels 448)."""
    hidden, mlp = 3072, 12_288
    linears = {"img_in": (hidden, 448), "txt_in": (hidden, 4096), "vector_in.in_layer": (hidden, 768),
               "vector_in.out_layer": (hidden, hidden), "final_layer.linear": (64, hidden),
               "final_layer.adaLN_modulation.1": (2 * hidden, hidden)}
    for name in ("time_in", "guidance_in"):
        linears |= {f"{name}.in_layer": (hidden, 256), f"{name}.out_layer": (hidden, hidden)}
    shapes = {}
    for i in range(19):
        for stream in ("img", "txt"):
            at = f"double_blocks.{i}.{stream}"
            linears |= {f"{at}_mod.lin": (6 * hidden, hidden), f"{at}_attn.qkv": (3 * hidden, hidden),
                        f"{at}_attn.proj": (hidden, hidden), f"{at}_mlp.0": (mlp, hidden), f"{at}_mlp.2": (hidden, mlp)}
            shapes |= {f"{at}_attn.norm.{part}_norm.scale": (128,) for part in ("query", "key")}
    for i in range(38):
        at = f"single_blocks.{i}"
        linears |= {f"{at}.linear1": (3 * hidden + mlp, hidden), f"{at}.linear2": (hidden, hidden + mlp),
                    f"{at}.modulation.lin": (3 * hidden, hidden)}
        shapes |= {f"{at}.norm.{part}_norm.scale": (128,) for part in ("query", "key")}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def test_full_size_bfl_has_the_published_780_tensors():
    expected = keymaps.expected(acejax.MMDiTConfig.ace_plus_fft(), "bfl")
    assert len(expected) == 780
    assert expected == published()


@pytest.mark.parametrize(("config", "count"), [(acejax.MMDiTConfig.flux_dev(), 11_901_408_320),
                                               (acejax.MMDiTConfig.ace_plus_lora(), 11_902_391_360),
                                               (acejax.MMDiTConfig.ace_plus_fft(), 11_902_587_968)])
@pytest.mark.parametrize("layout", keymaps.LAYOUTS)
def test_full_size_parameter_counts(config, count, layout):
    assert sum(int(np.prod(shape)) for shape in keymaps.expected(config, layout).values()) == count


@judges.needs_diffusers
@pytest.mark.parametrize("config", [acejax.MMDiTConfig.flux_dev(), acejax.MMDiTConfig.flux_fill(),
                                    acejax.MMDiTConfig.ace_plus_fft()], ids=lambda config: config.in_channels)
def test_full_size_diffusers_has_the_names_of_its_own_class(config):
    import torch
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        judge = FluxTransformer2DModel(in_channels=config.in_channels, out_channels=64, guidance_embeds=True)
    named = {key: tuple(tensor.shape) for key, tensor in judge.state_dict().items()}
    assert keymaps.expected(config, "diffusers") == named
    assert len(named) == 1160


@pytest.mark.parametrize("config", [
    acejax.MMDiTConfig.flux_fill(), acejax.MMDiTConfig.tiny(),
    acejax.MMDiTConfig.tiny(in_channels=64, out_channels=24, depth=2, mlp_ratio=2.5, vec_in_dim=48,
                            guidance_embed=False)], ids=["fill", "tiny", "odd"])
def test_the_shapes_are_those_that_init_makes(config):
    tree = jax.eval_shape(lambda: acejax.init(config, jax.random.key(0)))
    assert keymaps.leaf_shapes(config) == {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


def test_trees_are_flattened_as_flax_does():
    tree = {"a": {"b": 1, "c": {"d": 2}, "empty": {}}, "e": 3}
    leaves = flatten_dict(tree, sep="/")
    assert trees.flat(tree) == trees.flat(FrozenDict(tree)) == leaves
    assert trees.nested(leaves) == unflatten_dict(leaves, sep="/")


@pytest.mark.parametrize("change", ["name", "shape"])
def test_a_wrong_list_is_seen(change):
    wrong = published()
    shape = wrong.pop("single_blocks.37.linear2.weight")
    wrong |= {"single_blocks.37.linear2.kernel": shape} if change == "name" else {
        "single_blocks.37.linear2.weight": shape[::-1]}
    assert keymaps.expected(acejax.MMDiTConfig.ace_plus_fft(), "bfl") != wrong


@pytest.mark.parametrize("layout", keymaps.LAYOUTS)
def test_plan_covers_every_number_once(layout):
    """Each foreign element and each of ours is the end of exactly one copy."""
    model = cases.config()
    foreign = {key: np.zeros(shape, int) for key, shape in keymaps.expected(model, layout).items()}
    ours = {path: np.zeros(shape, int) for path, shape in keymaps.leaf_shapes(model).items()}
    for copy in keymaps.plan_for(model, layout):
        foreign[copy.key][copy.region] += 1
        ours[copy.path][copy.index] += 1
        assert ours[copy.path][copy.index].shape == copy.block
    assert all((counts == 1).all() for tree in (foreign, ours) for counts in tree.values())


def test_tree_is_the_one_of_init():
    model = cases.config()
    params = keymaps.from_foreign(model, cases.state(model).__getitem__, "bfl")
    made = jax.eval_shape(lambda: acejax.init(model, jax.random.key(0)))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == jax.tree.map(lambda leaf: leaf.shape, made)


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("layout", keymaps.LAYOUTS)
def test_round_trips_are_bit_exact(layout, guidance):
    """BFL -> ours -> either layout -> ours -> BFL."""
    model = acejax.MMDiTConfig(**(vars(cases.config()) | {"guidance_embed": guidance}))
    state = cases.state(model)
    assert any(key.startswith("guidance_in") for key in state) == guidance
    params = keymaps.from_foreign(model, state.__getitem__, "bfl")
    foreign = keymaps.to_foreign(model, params, layout)
    assert {key: tensor.shape for key, tensor in foreign.items()} == keymaps.expected(model, layout)
    assert all(tensor.flags.c_contiguous for tensor in foreign.values())
    again = keymaps.from_foreign(model, foreign.__getitem__, layout)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    back = keymaps.to_foreign(model, again, "bfl")
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        np.testing.assert_array_equal(back[key], tensor)


def test_single_block_parts_and_swapped_final_halves():
    """Two facts that a round trip cannot see: which rows are the MLP's, and diffusers' (scale, shift)."""
    model = cases.config()
    state = cases.state(model)
    params = keymaps.from_foreign(model, state.__getitem__, "bfl")
    hidden = model.hidden_size
    np.testing.assert_array_equal(params["single_blocks"]["mlp_in"]["kernel"][1],
                                  state["single_blocks.1.linear1.weight"][3 * hidden:].T)
    np.testing.assert_array_equal(params["single_blocks"]["mlp_out"]["kernel"][2],
                                  state["single_blocks.2.linear2.weight"][:, hidden:].T)
    np.testing.assert_array_equal(params["single_blocks"]["proj"]["bias"][2], state["single_blocks.2.linear2.bias"])
    shift, scale = np.split(state["final_layer.adaLN_modulation.1.weight"], 2)
    np.testing.assert_array_equal(keymaps.to_foreign(model, params, "diffusers")["norm_out.linear.weight"],
                                  np.concatenate([scale, shift]))


def test_wrong_tree_is_named():
    model = cases.config()
    params = keymaps.from_foreign(model, cases.state(model).__getitem__, "bfl")
    del params["img_in"]["bias"]
    with pytest.raises(ValueError, match=r"'img_in/bias' has shape None, the config expects \(64,\)"):
        keymaps.to_foreign(model, params, "bfl")
