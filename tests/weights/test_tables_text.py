"""The text encoders' key tables: the published names and shapes, and exact ways there and back."""

import ml_dtypes
import numpy as np
import pytest

from acejax.model.config import CLIPConfig, T5Config
from acejax.weights import keymaps
from tests import judges
from tests.goldens import cases

T5_TWIN = "encoder.embed_tokens.weight"
CONFIGS = {"t5": T5Config(), "clip": CLIPConfig()}
SMALL = {"t5": cases.t5_config(), "clip": cases.clip_config()}
ENCODERS = {"t5": judges.t5_encoder, "clip": judges.clip_encoder}
over_models = pytest.mark.parametrize("model", CONFIGS)


def published(model: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of FLUX's `text_encoder_2` (t5) or `text_encoder` (clip), written out apart from the tables."""
    shapes = {}
    if model == "t5":
        width, wide = 4096, 10_240
        for i in range(24):
            at = f"encoder.block.{i}.layer"
            shapes |= {f"{at}.0.SelfAttention.{part}.weight": (width, width) for part in "qkvo"}
            shapes |= {f"{at}.1.DenseReluDense.{part}.weight": (wide, width) for part in ("wi_0", "wi_1")}
            shapes |= {f"{at}.1.DenseReluDense.wo.weight": (width, wide)}
            shapes |= {f"{at}.{part}.layer_norm.weight": (width,) for part in (0, 1)}
        return shapes | {"shared.weight": (32_128, width), T5_TWIN: (32_128, width),
                         "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 64),
                         "encoder.final_layer_norm.weight": (width,)}
    width, wide = 768, 3072
    linears = {}
    for i in range(12):
        at = f"text_model.encoder.layers.{i}"
        linears |= {f"{at}.self_attn.{part}_proj": (width, width) for part in ("q", "k", "v", "out")}
        linears |= {f"{at}.mlp.fc1": (wide, width), f"{at}.mlp.fc2": (width, wide),
                    f"{at}.layer_norm1": (width,), f"{at}.layer_norm2": (width,)}
    linears["text_model.final_layer_norm"] = (width,)
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes | {"text_model.embeddings.token_embedding.weight": (49_408, width),
                     "text_model.embeddings.position_embedding.weight": (77, width),
                     "text_model.embeddings.position_ids": (1, 77)}


def is_the_model(found: dict[str, tuple[int, ...]], model: str) -> bool:
    """Whether a file with these names and shapes holds the full-size model and nothing else."""
    config = CONFIGS[model]
    located = keymaps.layouts_of(config)["hf"].locate(found)
    if located is None:
        return False
    names, outside = located
    return not outside and {key: found[name] for key, name in names.items()} == keymaps.expected(config, "hf")


@pytest.mark.parametrize(("model", "count"), [("t5", 4_762_310_656), ("clip", 123_060_480)])
def test_full_size_parameter_counts(model, count):
    assert sum(int(np.prod(shape)) for shape in keymaps.expected(CONFIGS[model], "hf").values()) == count


@over_models
def test_full_size_is_as_published(model):
    assert is_the_model(published(model), model)


@judges.needs_transformers
@over_models
def test_full_size_is_as_transformers_has_it(model):
    import torch

    with torch.device("meta"):
        judge = ENCODERS[model](CONFIGS[model])
    assert is_the_model({key: tuple(tensor.shape) for key, tensor in judge.state_dict().items()}, model)


@over_models
def test_a_wrong_list_of_tensors_is_seen(model):
    """Prefixes, twins and ignored keys forgive nothing else: one name or shape changed, one missing, one more."""
    whole = published(model)
    last = max(key for key in whole if key.endswith("norm.weight"))
    without = {key: shape for key, shape in whole.items() if key != last}
    for wrong in (without, whole | {last: (1,)}, without | {f"{last}s": whole[last]}, whole | {"vae.bias": (1,)},
                  without | {f"text_encoders.{last}": whole[last]}):
        assert not is_the_model(wrong, model)


@pytest.mark.parametrize("kept", [["shared.weight", T5_TWIN], ["shared.weight"], [T5_TWIN], []])
@pytest.mark.parametrize("prefix", ["", "text_encoders.t5xxl.transformer."])
def test_t5_files(kept, prefix):
    """Either twin serves, under each prefix; ComfyUI's whole checkpoints have a logit_scale beside the model."""
    shapes = published("t5")
    shapes = {prefix + key: shape for key, shape in shapes.items() if key in kept or shapes[key] != (32_128, 4096)}
    assert is_the_model(shapes | {"text_encoders.t5xxl.logit_scale": ()}, "t5") == bool(kept)


@pytest.mark.parametrize("prefix", ["text_model.", "", "text_encoders.clip_l.transformer.text_model."])
def test_clip_files(prefix):
    shapes = {key.replace("text_model.", prefix): shape for key, shape in published("clip").items()}
    extra = {prefix.replace("text_model.", "") + "text_projection.weight": (768, 768), "logit_scale": ()}
    assert is_the_model(shapes | extra, "clip")


def test_a_checkpoint_with_more_models_in_it():
    """What stands outside the prefix is told apart, even where it is named like one of the encoder's own tensors."""
    prefix = "text_encoders.t5xxl.transformer."
    others = ["model.diffusion_model.img_in.weight", "shared.weight"]
    layout = keymaps.layouts_of(CONFIGS["t5"])["hf"]
    names, outside = layout.locate([*others, *(prefix + key for key in keymaps.expected(CONFIGS["t5"], "hf"))])
    assert outside == others
    assert names == {key: prefix + key for key in keymaps.expected(CONFIGS["t5"], "hf")}


def test_twins_are_told_apart_by_the_table():
    """With both there the table's own name is read; alone, the other one gives the same tree."""
    config, key = SMALL["t5"], "shared.weight"
    layout, state = keymaps.layouts_of(config)["hf"], cases.state(SMALL["t5"], layout="hf")
    both = state | {T5_TWIN: np.full_like(state[key], np.nan)}
    alone = {T5_TWIN if name == key else name: tensor for name, tensor in state.items()}
    for file in (both, alone):
        names, _ = layout.locate(file)
        params = keymaps.from_foreign(config, lambda name, file=file, names=names: file[names[name]], "hf")
        np.testing.assert_array_equal(params["token_embedding"]["embedding"], state[key])


@over_models
def test_round_trip_is_bit_exact_in_bfloat16(model):
    config = SMALL[model]
    state = {key: tensor.astype(ml_dtypes.bfloat16) for key, tensor in cases.state(config, layout="hf").items()}
    params = keymaps.from_foreign(config, state.__getitem__, "hf")
    back = keymaps.to_foreign(config, params, "hf")
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        assert back[key].dtype == tensor.dtype
        np.testing.assert_array_equal(back[key].view(np.uint16), tensor.view(np.uint16))


@over_models
def test_plan_covers_every_number_once(model):
    config = SMALL[model]
    ours = {path: np.zeros(shape, int) for path, shape in keymaps.leaf_shapes(config).items()}
    for copy in keymaps.plan_for(config, "hf"):
        ours[copy.path][copy.index] += 1
    assert all((counts == 1).all() for counts in ours.values())


@judges.needs_transformers
@over_models
def test_transformers_loads_what_we_write(model, tmp_path):
    """The first prefix is written: as published, which every version reads."""
    from safetensors.numpy import save_file

    config = SMALL[model]
    layout, state = keymaps.layouts_of(config)["hf"], cases.state(config, layout="hf")
    judge = ENCODERS[model](config)
    judge.config.save_pretrained(tmp_path)
    save_file({layout.prefixes[0] + key: tensor for key, tensor in state.items()}, tmp_path / "model.safetensors",
              metadata={"format": "pt"})
    assert all(layout.prefixes[0] + key in published(model) for key in state)  # the small model has the first layers
    loaded, report = type(judge).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for key, tensor in loaded.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), state[layout.twins.get(key, key)])
