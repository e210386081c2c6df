"""The frozen models behind the cache: their names change with what they give; and the command as a whole."""

import dataclasses
import functools
import gc
import json
import os
import pathlib
import subprocess
import sys
import textwrap
import weakref

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from acejax import UserError, load_autoencoder, load_clip, load_t5
from acejax.cli.main import main
from acejax.data import encoders as encoders_file
from acejax.data import hashes, latents, prepare
from acejax.data.cache import tiles
from acejax.data.cache.build import CacheConfig, build, settings
from acejax.data.cache.survey import Recipe
from acejax.data.config import DataConfig
from acejax.data.encoders import Encoders, EncodersConfig
from acejax.data.inputs import make_features
from acejax.data.text import Tokenizers
from acejax.lcu import patchify
from acejax.model import autoencoder, clip, t5
from acejax.model.config import AutoencoderConfig, CLIPConfig, T5Config
from acejax.weights.save import save_tensors
from benchmarks import startup
from tests import tokenizers
from tests.counts import count
from tests.data.cached import AUGMENT, CANVAS, files, samples
from tests.weights import models

VAE = AutoencoderConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1)
T5 = T5Config(vocab_size=32_128, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
CLIP = CLIPConfig(vocab_size=49_408, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=1)
PROMPTS = ["a photo of a cat", "", "restore {image}", "a", "b"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Small encoders with random weights, as files."""
    folder = tmp_path_factory.mktemp("weights")
    for name, config in (("autoencoder", VAE), ("t5", T5), ("clip", CLIP)):
        small = {key: value / 8 for key, value in models.state(config).items()}
        save_tensors(folder / f"{name}.safetensors", small, {})
    return folder


@pytest.fixture(autouse=True, scope="module")
def tokenizers_read_once():
    """They take a second, and each of the tests has them several times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoders_file.Tokenizers, "open", functools.lru_cache(Tokenizers.open))
        yield


@pytest.fixture
def config(weights):
    paths = {name: str(weights / f"{name}.safetensors") for name in ("autoencoder", "t5", "clip")}
    return EncodersConfig(**paths, tokenizers=str(tokenizers.folder()), dtype="float32", text_length=16)


@pytest.fixture(scope="module")
def expected_text(weights):
    """Text and pooled features of PROMPTS, by the models alone."""
    reader = Tokenizers.open(str(tokenizers.folder()))

    @jax.jit
    def features(t5_params, clip_params, t5_ids, clip_ids):
        return t5.apply(T5, t5_params, t5_ids), clip.apply(CLIP, clip_params, clip_ids)[1]

    return features(load_t5(weights / "t5.safetensors")[1], load_clip(weights / "clip.safetensors")[1],
                    reader.t5_ids(PROMPTS, 16)[0], reader.clip_ids(PROMPTS)[0])


def names(config, **changes):
    made = Encoders.load(dataclasses.replace(config, **changes))
    return made.picture_id, tuple(map(made.prompt_key, PROMPTS)), made.text_id


def test_models_are_read_when_they_are_needed(config, monkeypatch, expected_text):
    read, load = [], encoders_file.load.load
    monkeypatch.setattr(encoders_file.load, "load", lambda model, *more: read.append(model.path) or load(model, *more))
    made = Encoders.load(config)
    assert made.prompt_key("a cat") == made.prompt_key(" a  cat\n") != made.prompt_key("a dog") and made.picture_id
    assert made.text_shape == (16, 32, 64) and not read
    pictures = np.random.default_rng(0).uniform(-1, 1, (4, 64, 64, 3)).astype(np.float32)
    found = np.asarray(made.pictures(pictures))
    assert [path.name for path in read] == ["autoencoder.safetensors"]
    text, pooled = map(np.asarray, made.prompts(PROMPTS))
    made.pictures(pictures), made.prompts(PROMPTS)
    assert len(read) == 3, "each once"
    expected = jax.jit(functools.partial(autoencoder.encode, VAE))(load_autoencoder(config.autoencoder)[1], pictures)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(text, expected_text[0], atol=1e-4)
    np.testing.assert_allclose(pooled, expected_text[1], atol=1e-4)


def test_models_leave_memory_when_they_have_served(config, tmp_path, monkeypatch):
    """The autoencoder before prompts are encoded, all of them with the encoders; nothing waits for a collection."""
    read = {}

    def load(model, mesh, *dtype):
        array = jax.numpy.ones((2, 2))
        read[pathlib.Path(model.path).stem] = weakref.ref(array)
        return None, {"encoder": array}

    monkeypatch.setattr(encoders_file.load, "load", load)
    monkeypatch.setattr(autoencoder, "encode", lambda _, params, pictures, **more: jax.numpy.repeat(
        pictures[:, ::8, ::8, :1], 16, 3) * params["encoder"][0, 0])
    monkeypatch.setattr(t5, "apply", lambda _, params, ids, **more: ids[..., None] * params["encoder"][0])
    monkeypatch.setattr(clip, "apply", lambda _, params, ids, **more: (None, ids[:, :3] * params["encoder"][0, 0]))

    def run():
        made, alive = Encoders.load(config), []

        def prompts(texts):
            alive.append(read["autoencoder"]() is not None)
            return made.prompts(texts)

        spied, cached = dataclasses.replace(made, prompts=prompts), CacheConfig(str(tmp_path), "float32")
        build(samples()[:1], settings("list", {}, CANVAS, AUGMENT, spied, cached, 0), CANVAS, AUGMENT, spied, cached)
        assert alive and not any(alive)
        assert read["t5"]() is not None and read["clip"]() is not None, "for the next dataset"
        made.pictures(np.zeros((1, 16, 16, 3), np.float32))
        assert read["autoencoder"]() is not None

    gc.disable()
    try:
        run()
        assert not any(weak() is not None for weak in read.values())
    finally:
        gc.enable()


def test_names_change_with_what_is_given(config, weights, tmp_path):
    pictures, prompts, text = names(config)
    assert names(config) == (pictures, prompts, text)
    for changes, same in (({"dtype": "bfloat16"}, ""), ({"autoencoder_dtype": "bfloat16"}, "prompts"),
                          ({"text_length": 8}, "pictures"), ({"tile": 64}, "prompts"),
                          ({"reference": True}, "pictures")):
        found = names(config, **changes)
        assert (found[0] == pictures) == (same == "pictures"), changes
        assert (found[1] == prompts) == (found[2] == text) == (same == "prompts"), changes
    reference = names(config, reference=True)[1]
    assert [old == new for old, new in zip(prompts, reference, strict=True)] == [
        True, True, False, True, True], "the id of {image}"
    copy = tmp_path / "the same.safetensors"
    copy.write_bytes((weights / "autoencoder.safetensors").read_bytes())
    assert names(config, autoencoder=str(copy)) == (pictures, prompts, text)
    torn = bytearray(copy.read_bytes())
    torn[-3] ^= 1
    copy.write_bytes(torn)
    assert names(config, autoencoder=str(copy))[0] != pictures, "one bit of one weight"


def test_weights_are_hashed_once_for_a_cache(config, tmp_path, monkeypatch):
    notes = tmp_path / "cache" / "weights.json"
    first = Encoders.load(config, notes=notes)
    assert len(json.loads(notes.read_text())) == 3
    monkeypatch.setattr(hashes, "BLOCK", None)  # so that nothing can be hashed
    assert Encoders.load(config, notes=notes).picture_id == first.picture_id
    monkeypatch.undo()
    notes.write_text("[torn")
    assert Encoders.load(config, notes=notes).picture_id == first.picture_id


@pytest.mark.soak
def test_batches_of_any_size_over_several_devices(config, tmp_path, expected_text):
    """Four devices; 5 prompts and 3 pictures do not divide."""
    pictures = np.random.default_rng(0).uniform(-1, 1, (count(0, 3), 64, 64, 3)).astype(np.float32)
    np.save(tmp_path / "pictures.npy", pictures)
    script = f"""
        import jax, numpy as np
        from acejax.data.encoders import Encoders, EncodersConfig
        made = Encoders.load(EncodersConfig(**{dataclasses.asdict(config)!r}))
        text, pooled = made.prompts({PROMPTS!r})
        pictures = np.load({str(tmp_path / "pictures.npy")!r})
        found = dict(latents=made.pictures(pictures)) if len(pictures) else dict()
        np.savez({str(tmp_path / "found.npz")!r}, text=text, pooled=pooled, **found)
        assert jax.device_count() == 4
        assert len(made.prompts(["a"] * 8)[0].sharding.device_set) == 4
    """
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, env=os.environ | {"XLA_FLAGS": flags})
    found = np.load(tmp_path / "found.npz")
    np.testing.assert_allclose(found["text"], expected_text[0], atol=1e-4)
    np.testing.assert_allclose(found["pooled"], expected_text[1], atol=1e-4)
    if len(pictures):
        np.testing.assert_allclose(found["latents"], Encoders.load(config).pictures(pictures), atol=1e-4)


@pytest.fixture
def run(config, tmp_path):
    """A config file over a manifest of pictures, and a function that runs the command with further flags."""
    source = samples()
    lines = []
    for number, sample in enumerate(source):
        row = {"task": sample.task, "prompt": sample.prompt}
        for field, data in (("target", sample.target), ("image", sample.image), ("mask", sample.mask)):
            if data is not None:
                (tmp_path / f"{number}.{field}.png").write_bytes(data)
                row[field] = f"{number}.{field}.png"
        for place, data in enumerate(sample.references):
            (tmp_path / f"{number}.{place}.png").write_bytes(data)
            row.setdefault("references", []).append(f"{number}.{place}.png")
        lines.append(json.dumps(row))
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    file = tmp_path / "run.py"
    file.write_text(f"""
from ml_collections import ConfigDict
def get_config():
    return ConfigDict({{
        "seed": 3, "steps": 10,
        "data": {{"sources": {{"list": {{"path": {str(tmp_path / "list.jsonl")!r}, "split": "train"}}}},
                 "canvas": {{"max_tokens": 64, "split": True, "scale": 0.5, "multiple": 64}},  # one shape
                 "augment": {{"drop_caption": 0.1, "full_mask": 0.0, "random_mask": 0.0}}, "max_broken": 0.0}},
        "encoders": {dataclasses.asdict(config) | {"autoencoder_dtype": "float32", "tile": 32}!r},
        "cache": {{"dir": {str(tmp_path / "cache")!r}, "dtype": "float32", "variants": 2, "batch": 4}},
    }})
""")

    def command(*flags: str) -> int:
        return main(["data", "cache", f"--config={file}", *flags])

    return command, file, source


def config_of(file):
    space = {}
    exec(file.read_text(), space)
    return space["get_config"]()


def test_another_process_encodes_and_compiles_nothing(run, tmp_path):
    _, file, _ = run
    first, second = (startup.start(tmp_path, ["data", "cache", f"--config={file}", f"--cache_dir={tmp_path / name}"])
                     for name in ("one", "two"))
    assert first["compiled"] == first["programs"] == second["programs"] >= 3 and second["compiled"] == 0


def test_the_command_makes_features_that_a_run_finds(run, config, capsys, monkeypatch):
    command, file, source = run
    assert command() == 0
    said = capsys.readouterr().out
    assert "list: 6 samples, 13 distinct pictures, 6 tasks" in said
    given = DataConfig.of(config_of(file))
    before = files(file.parent / "cache")
    monkeypatch.setattr(encoders_file.load, "load", None)  # the second time no model is read
    assert command() == 0 and "list: 6 samples, unchanged since they were encoded" in capsys.readouterr().out
    assert command("--recheck", f"--json={file.parent / 'r.json'}") == 0
    assert "all there, nothing encoded" in capsys.readouterr().out
    assert files(file.parent / "cache") == before
    (report,) = json.loads((file.parent / "r.json").read_text())
    assert (report["dataset"], report["samples"], report["tiles_encoded"], report["skipped"]) == ("list", 6, 0, [])
    assert report["index"] == str(next((file.parent / "cache" / "index").iterdir())) and report["seconds"] > 0
    features = make_features(given)
    assert len(features) == 6 and features.datasets == ("list",)
    monkeypatch.undo()
    encoders = given.load_encoders()
    recipe = Recipe(given.canvas, given.augment, 2, 3, "", str.encode, "")
    for index in (0, 2, 5):
        plan = recipe.visit(source[index], tiles.hashes(source[index]), 1)
        expected = latents.encode([prepare.compose(source[index], given.canvas, plan)],
                                  lambda pictures: np.asarray(encoders.pictures(pictures)))
        row = features._parts[0].fetch(index, 1, False)
        for field in ("edit", "modify", "target"):
            np.testing.assert_allclose(row[field], patchify(expected[field])[0], atol=2e-4)

    def to_encode(*flags):
        assert command(*flags) == 0
        lines = capsys.readouterr().out.splitlines()
        return [int(line.split()[5]) for line in lines if " to encode" in line]

    capsys.readouterr()
    masks = 2
    needed = [int(line.split()[1]) for line in said.splitlines() if " to encode" in line]
    assert needed[0] > 15 and needed[1] == 7
    changed = count("tile=64", "autoencoder_dtype=bfloat16")
    assert to_encode(f"--config.encoders.{changed}") == [needed[0] - masks, 0]
    assert to_encode("--config.encoders.text_length=8") == [0, 7]
    assert to_encode("--recheck") == [0, 0]


@pytest.mark.parametrize("place, value, message", [
    ("data.sources", None, "config.data.sources is missing; expected fields"),
    ("data.sources.list.path", None, "config.data.sources.list.path is missing"),
    ("data.sources.list.pth", 1, "config.data.sources.list.pth: no such field; expected path, split"),
    ("data.canvas.max_token", 1, "config.data.canvas.max_token: no such field; expected max_tokens"),
    ("data.canvas.scale", 2.0, "config.data.canvas.scale is 2.0; expected 0 to 1"),
    ("data.augment.drop_caption", "much", "config.data.augment.drop_caption is 'much'; expected a number"),
    ("data.max_broken", 2, "config.data.max_broken is 2; expected a share, 0 to 1"),
    ("encoders.t5", None, "config.encoders.t5 is missing"),
    ("encoders.dtype", "int8", "config.encoders.dtype is 'int8'; expected one of bfloat16"),
    ("encoders.text_length", 1, "config.encoders.text_length is 1; expected 2 tokens or more"),
    ("cache.variants", 0, "config.cache.variants is 0; expected 1 or more"),
    ("cache.batch", True, "config.cache.batch is True; expected int"),
    ("cache", None, "config.cache is missing; expected fields"),
])
def test_a_wrong_field_is_named(run, place, value, message):
    given = config_of(run[1]).to_dict()
    *parts, last = place.split(".")
    part = functools.reduce(dict.__getitem__, parts, given)
    part[last] = value
    if value is None:
        del part[last]
    with pytest.raises(UserError) as error:
        DataConfig.of(ConfigDict(given))
    assert str(error.value).startswith(message)


def test_mistakes_end_in_one_line(run, capsys):
    command, file, _ = run
    for flags, message in ((["--config.encoders.t5=nosuch"], "nosuch: no such file"),
                           (["--config.data.sources.list.path=nosuch"], "nosuch: no such file or folder"),
                           (["--config.cache.dtype=float8"], "config.cache.dtype is 'float8'"),
                           (["--json=nosuch/r.json"], "--json=nosuch/r.json: its folder is not there"),
                           (["--config.nosuch=1"], "no such config field: nosuch")):
        assert command(*flags) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error
    assert not (file.parent / "cache" / "shards").exists()
