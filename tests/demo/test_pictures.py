import dataclasses

import numpy as np
import pytest

from acejax import UserError
from acejax.demo import autoencoder, pictures, scores, surroundings
from acejax.demo.pictures import COLORS, HELD_PAIRS, PHOTOS, SHAPES, SIZE, TASKS, TEST_PHOTO, Thing, paint, samples


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_fixed_by_their_seed_and_fit_their_task(task):
    one, again, other = (list(samples(20, task, seed)) for seed in (0, 0, 1))
    assert all(np.array_equal(a.target, b.target) and a.prompt == b.prompt for a, b in zip(one, again, strict=True))
    assert any(not np.array_equal(a.target, b.target) for a, b in zip(one, other, strict=True))
    for sample in one:
        assert sample.target.shape == (SIZE, SIZE, 3) and sample.target.dtype == np.uint8
        assert (sample.image is None) == (task == "text")
        assert (sample.mask is None) == (task in ("text", "instruct") or sample.prompt.startswith("remove the"))
        assert len(sample.references) == {"reference": 1, "two_references": 2}.get(task, 0)
        if sample.mask is not None:  # what changes lies inside the mask
            np.testing.assert_array_equal(sample.target[sample.mask == 0], sample.image[sample.mask == 0])
        if sample.references:
            assert not set(sample.prompt.split()) & set(COLORS), "the colour is in the reference alone"


def test_held_out_pairs_and_the_test_photo_are_never_trained_on(monkeypatch):
    taken = set()
    photo = pictures.photo
    monkeypatch.setattr(pictures, "photo", lambda name, *how: taken.add(name) or photo(name, *how))
    shown = {(thing.shape, thing.color)
             for task in TASKS for split, count in (("train", 150), ("validation", 20))
             for sample in samples(count, task, 0, split) for thing in sample.things}
    assert taken == set(PHOTOS) - {TEST_PHOTO}
    assert not shown & HELD_PAIRS and len(shown) == len(SHAPES) * len(COLORS) - len(HELD_PAIRS)
    for task in TASKS:
        for sample in samples(20, task, 0, "held"):
            assert {(thing.shape, thing.color) for thing in sample.things} <= HELD_PAIRS
        for sample in samples(20, task, 0, "test"):
            assert not {(thing.shape, thing.color) for thing in sample.things} & HELD_PAIRS


def test_the_scores_read_what_is_painted():
    """On the truth the scores must be right, on the background alone at chance."""
    for task in TASKS:
        for sample in samples(40, task, 7, "test"):
            for thing in sample.things:
                shown = sample.image if task == "remove" else sample.target
                assert scores.color_of(shown, thing) == thing.color
                assert scores.shape_of(shown, thing) == thing.shape
                if task == "remove":
                    assert scores.is_gone(sample.target, sample.target, thing)
                    assert not scores.is_gone(sample.image, sample.target, thing)
                    other = dataclasses.replace(thing, color=next(color for color in COLORS if color != thing.color))
                    assert not scores.is_gone(paint(sample.target, other), sample.target, thing)
    background = next(samples(1, "insert", 0, "test")).image
    things = [Thing(shape, color, (16, 16, 32)) for shape in SHAPES for color in COLORS]
    assert np.mean([scores.color_of(background, thing) == thing.color for thing in things]) <= 0.2
    assert np.mean([scores.shape_of(background, thing) == thing.shape for thing in things]) <= 0.3
    wrong = paint(background, Thing("star", "red", (16, 16, 32)))
    assert scores.shape_of(wrong, Thing("circle", "red", (16, 16, 32))) == "star"
    assert scores.color_of(wrong, Thing("star", "blue", (16, 16, 32))) == "red"


def test_psnr():
    black, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    assert scores.psnr(black, white) == 0 and scores.psnr(black, black) > 90
    assert scores.psnr(black, black + 26) == pytest.approx(20 * np.log10(255 / 26))


def test_the_autoencoder_has_the_shape_of_fluxs_and_keeps_the_picture():
    train = np.stack([s.target for s in samples(150, "insert", 0)]).astype(np.float32) / 127.5 - 1
    test = np.stack([s.target for s in samples(20, "insert", 1)]).astype(np.float32) / 127.5 - 1
    params = autoencoder.fit_linear(train)
    latents = autoencoder.encode_pictures(params, test)
    assert latents.shape == (20, 8, 8, 16)
    decoded = autoencoder.decode_latents(params, latents)
    assert decoded.shape == test.shape and 10 * np.log10(4 / np.mean((decoded - test) ** 2)) > 21


@pytest.mark.soak
def test_the_finer_autoencoder_begins_as_the_linear_one_and_learns():
    train, test = (np.stack([s.target for s in samples(60, "insert", seed, size=80)]) for seed in (0, 1))

    def error(params):
        latents = autoencoder.encode_pictures(params, test.astype(np.float32) / 127.5 - 1)
        assert latents.shape == (60, 10, 10, 16) and 0.5 < np.var(latents, (0, 1, 2)).mean() < 2
        return np.mean(((autoencoder.decode_latents(params, latents) + 1) * 127.5 - test) ** 2)

    linear = error(autoencoder.fit(autoencoder.FitConfig(), train))
    config = autoencoder.FitConfig("convolutional", width=16, steps=60, learning_rate=3e-3, noise=0.05)
    again, finer = (autoencoder.fit(config, train) for _ in range(2))
    assert error(finer) < linear and autoencoder.kind_of(finer) == "convolutional"
    assert all(np.array_equal(finer[name], again[name]) for name in finer), "a seed fixes it"


@pytest.mark.parametrize("field", [{"kind": "deep"}, {"steps": 0}, {"noise": -1.0}])
def test_an_autoencoder_that_cannot_be_is_refused(field):
    with pytest.raises(UserError, match=f"autoencoder.{next(iter(field))} is .*; expected"):
        autoencoder.FitConfig(**field)


def test_every_prompt_can_be_read_and_words_are_told_apart():
    prompts = sorted({sample.prompt for task in TASKS for sample in samples(100, task, 0)})
    text, pooled = surroundings.encode_prompts(prompts)
    assert text.shape == (len(prompts), 6, 64) and pooled.shape == (len(prompts), 64)
    assert len(np.unique(text.reshape(len(prompts), -1), axis=0)) == len(prompts)
    with pytest.raises(UserError, match="do not know 'zebra'; they know: a, an, and, blue"):
        surroundings.encode_prompts(["a zebra"])
    with pytest.raises(UserError, match="has 7 words"):
        surroundings.encode_prompts(["a red heart on the cat and"])
    with pytest.raises(UserError, match="has 0 words"):
        surroundings.encode_prompts([" "])


@pytest.mark.parametrize("task", ["insert", "text"])
def test_photos_vary_in_training_alone(task):
    def targets(split, vary):
        return np.stack([sample.target for sample in samples(20, task, 3, split, vary=vary)])

    for split in ("validation", "test", "held"):
        np.testing.assert_array_equal(targets(split, True), targets(split, False))
    varied = targets("train", True)
    np.testing.assert_array_equal(varied, targets("train", True))
    assert (varied != targets("train", False)).any((1, 2, 3)).sum() >= 15
    greys = [np.ptp(sample[:8, :8].astype(int), -1).max() == 0 for sample in varied]
    assert any(greys), "photos without colour keep none where they are named, and at times where they are not"
