"""From files to latents: weights in eight bits, offloaded and staged come out as those of one reading."""

import dataclasses
import functools
import gc
import types
import weakref

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

import acejax
from acejax import UserError
from acejax.adapt import quantize
from acejax.adapt.lora import combine
from acejax.cli import edit_run
from acejax.cli.edit_weights import Opened
from acejax.data import encoders as encoders_file
from acejax.data.encoders import EncodersConfig
from acejax.data.hashes import Hashes
from acejax.data.text import Tokenizers
from acejax.edit import models as models_file
from acejax.edit import transformer
from acejax.edit.editor import Editor
from acejax.edit.manifest import Entry
from acejax.edit.models import Models, ModelsConfig
from acejax.edit.profile import Profile
from acejax.edit.request import Options, Request
from acejax.edit.sampler import Sampler
from acejax.model.config import CLIPConfig, T5Config
from acejax.weights import keymaps
from acejax.weights.identify import open_model
from tests import judges, tokenizers
from tests.goldens import cases
from tests.weights import models as small

MMDIT = dataclasses.replace(small.MMDIT, context_in_dim=32, vec_in_dim=64, mlp_ratio=1.0, depth_single_blocks=1)
VAE = acejax.AutoencoderConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1)
T5 = T5Config(vocab_size=32_128, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
CLIP = CLIPConfig(vocab_size=49_408, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=1)


@pytest.fixture(autouse=True, scope="module")
def tokenizers_read_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoders_file.Tokenizers, "open", functools.lru_cache(Tokenizers.open))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All models as files, and a LoRA."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in (("transformer", MMDIT), ("autoencoder", VAE), ("t5", T5), ("clip", CLIP)):
        save_file(cases.state(config, layout=small.first(config)), folder / f"{name}.safetensors")
    pairs = {}
    for key, shape in keymaps.expected(MMDIT, "bfl").items():
        if key.endswith(("mod.lin.weight", "img_attn.qkv.weight")):
            name, draw = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}", np.random.default_rng(len(pairs))
            pairs[f"{name}.lora_down.weight"] = 0.1 * draw.standard_normal((2, shape[1]), np.float32)
            pairs[f"{name}.lora_up.weight"] = 0.3 * draw.standard_normal((shape[0], 2), np.float32)
    save_file(pairs, folder / "lora.safetensors")
    return folder


@pytest.fixture
def config(folder):
    paths = {name: str(folder / f"{name}.safetensors") for name in ("autoencoder", "t5", "clip")}
    return ModelsConfig(str(folder / "transformer.safetensors"), EncodersConfig(
        **paths, tokenizers=str(tokenizers.folder()), dtype="float32", text_length=4), dtype="float32")


@functools.cache
def inputs():
    normal = np.random.default_rng(0).standard_normal
    return {"edit": normal((1, 2, 4, 16), np.float32), "mask": np.ones((1, 16, 32, 1), np.float32),
            "noise": normal((1, 2, 4, 16), np.float32)}


@pytest.mark.parametrize("kind", quantize.KINDS)
@pytest.mark.parametrize("offload", [False, True])
def test_kernels_become_eight_bits_on_their_way(folder, kind, offload):
    path = folder / "transformer.safetensors"
    params, quant = transformer.load(open_model(path), dtype=np.float32, eight_bits=kind, offload=offload)
    whole = acejax.load_mmdit(path)[1]
    targets = (".*_blocks/.*(qkv|proj|mlp.*)",) if offload else (".*_blocks/.*",)
    for found, expected in zip((params, quant), quantize.quantize(whole, kind, targets), strict=True):
        found, expected = (flatten_dict(tree, sep="/") for tree in (found, expected))
        assert found.keys() == expected.keys()
        for name, leaf in found.items():
            assert isinstance(leaf, np.ndarray) == (offload and ("modulation" in name or name.split("/")[0] in (
                "time_in", "vector_in", "guidance_in"))), name
            np.testing.assert_array_equal(leaf, expected[name], name)


@pytest.mark.soak
def test_text_encoders_are_gone_when_the_transformer_comes(config, folder, monkeypatch):
    """Staged, in eight bits, offloaded and with a LoRA: the latents of one reading; known prompts read nothing."""
    alive, log = {}, []

    def watched(name, load):
        def wrapper(*arguments, **more):
            log.append((name, sorted(other for other, leaf in alive.items() if leaf() is not None)))
            made = load(*arguments, **more)
            alive[name] = weakref.ref(jax.tree.leaves(made[1] if name == "text" else made[0])[0])
            return made
        return wrapper

    monkeypatch.setattr(encoders_file.load, "load", watched("text", encoders_file.load.load))
    monkeypatch.setattr(models_file.transformer, "load", watched("transformer", transformer.load))
    gc.disable()
    try:
        made = Models(dataclasses.replace(config, staged=True, offload=True, eight_bits="int8"))
        lora = made.lora([(str(folder / "lora.safetensors"), 0.5)])
        for prompts in (["a cat"], ["a cat", "a cat"], ["a dog"]):
            text, pooled = made.encode_prompts(prompts)
            given = inputs() | {"text": text[:1], "pooled": pooled[:1]}
            found = made.sample(given, given["noise"], 2, 3.5, lora=lora)
    finally:
        gc.enable()
    text_read = [("text", []), ("text", ["text"])]
    assert log == [*text_read, ("transformer", []), *text_read, ("transformer", [])]
    params, quant = quantize.quantize(acejax.load_mmdit(config.transformer)[1], targets=".*_blocks/.*(qkv|proj|mlp.*)")
    file = acejax.load_lora(folder / "lora.safetensors", MMDIT)
    expected = Sampler(MMDIT, quantize.dequantize(params, quant))(
        given, given["noise"], 2, 3.5, combine([(file, 0.25), (file, 0.25)]))
    assert judges.difference(found, expected) < 1e-4
    assert made.decode_latents(found).shape == (1, 16, 32, 3)


def test_prompts_are_read_alone_and_as_the_model_was_trained(config, folder, monkeypatch):
    """Then an edit that is made again needs no prompts beside its own; LoRA inference's tokens are the LoRAs' alone."""
    read, encode = [], encoders_file._Prompts.__call__
    monkeypatch.setattr(encoders_file._Prompts, "__call__", lambda self, prompts: read.append(prompts) or encode(
        self, prompts))
    Models(config).encode_prompts(["a cat", "a dog", "a cat"])
    assert read == [["a cat"], ["a dog"]]
    save_file(cases.state(dataclasses.replace(MMDIT, in_channels=448)), folder / "fft.safetensors")
    for transformer_, alike in (("transformer", False), ("fft", True)):
        one, released = (Models(dataclasses.replace(
            config, transformer=str(folder / f"{transformer_}.safetensors"),
            encoders=dataclasses.replace(config.encoders, reference=reference))) for reference in (False, True))
        assert (one.checksums(Hashes(None))[-1] == released.checksums(Hashes(None))[-1]) == alike


def test_a_staged_manifest_reads_the_transformer_once(config, tmp_path, monkeypatch):
    """Whatever the number of its prompts, up to those that are remembered; then once for each so many."""
    loads, read = [], []
    monkeypatch.setattr(Models, "_load", lambda self: loads.append(1) or (lambda features, noise, *_, **__: noise))
    monkeypatch.setattr(encoders_file._Prompts, "__call__", lambda self, prompts: read.append(prompts[0]) or (
        np.zeros((1, 4, 32)), np.zeros((1, 64))))
    models = Models(dataclasses.replace(config, staged=True))
    editor = Editor(Profile.of(MMDIT), models.sample, lambda pictures: np.zeros((
        len(pictures), *(side // 8 for side in pictures.shape[1:3]), 16)), lambda latents: np.zeros((
            len(latents), *(8 * side for side in latents.shape[1:3]), 3)), models.encode_prompts)
    opened = Opened(editor, {"staged": True}, lambda hashes: [])
    for ahead, words, expected in ((64, "abca", 1), (2, "defd", 2)):
        monkeypatch.setattr(edit_run, "AHEAD", ahead)
        entries = [Entry(str(tmp_path / f"{at}.png"), word, size="64x64") for at, word in enumerate(words)]
        loads.clear()
        edit_run.run(entries, edit_run.check(entries, opened, Options()), opened, Options(), 1)
        assert len(loads) == expected and (tmp_path / "3.png").exists()
    assert "".join(read) == "abcdef"


def test_what_cannot_serve_is_named(config, folder):
    with pytest.raises(UserError, match="eight_bits is 'int4'; expected one of int8, float8"):
        dataclasses.replace(config, eight_bits="int4")
    with pytest.raises(UserError, match="int8_products with eight_bits=float8; expected eight_bits=int8 with it"):
        dataclasses.replace(config, eight_bits="float8", int8_products=True)
    with pytest.raises(UserError, match="not a FLUX transformer"):
        Models(dataclasses.replace(config, transformer=config.encoders.clip))
    save_file(cases.state(dataclasses.replace(MMDIT, context_in_dim=24)), folder / "other.safetensors")
    with pytest.raises(UserError, match="give features of 32 and 64 numbers; .*other.safetensors reads 24 and 64"):
        Models(dataclasses.replace(config, transformer=str(folder / "other.safetensors")))
    save_file(cases.state(dataclasses.replace(MMDIT, in_channels=128)), folder / "odd.safetensors")
    with pytest.raises(UserError, match="expected a FLUX transformer of 64, 384, 448 input channels"):
        Models(dataclasses.replace(config, transformer=str(folder / "odd.safetensors")))


def test_a_canvas_that_does_not_fall_apart_over_the_mesh_is_told_before_any_weights_are_read(config, monkeypatch):
    models = Models(config)
    models.check_size(64, 80)
    monkeypatch.setattr(models, "_mesh", types.SimpleNamespace(shape={"seq": 3}))
    editor = Editor(Profile.of(models.config), None, None, None, None, check_size=models.check_size)
    picture = np.zeros((64, 96, 3), np.uint8)
    editor.check(Request("x", None, picture))
    with pytest.raises(UserError, match="a canvas of 80 x 64 pixels: 20 tokens are no multiple of the mesh's seq = 3"):
        editor.check(Request("x", None, picture[:, :80]))
