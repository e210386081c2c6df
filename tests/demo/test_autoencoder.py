"""The finer autoencoder learns on from what a transformer leaves."""

import dataclasses

import numpy as np
import pytest

from acejax import UserError
from acejax.demo.autoencoder import FitConfig, decode_latents, encode_pictures, fit, refine
from acejax.demo.pictures import samples

CONFIG = FitConfig("convolutional", pictures=60, width=16, encoder=1, decoder=1, steps=150, batch=8, learning_rate=3e-3,
                   refine=150)


@pytest.fixture(scope="module")
def fitted():
    pictures = np.stack([sample.target for sample in samples(80, "insert", 0)])
    return fit(CONFIG, pictures[:60]), pictures


def test_refining_teaches_the_decoder_alone_what_was_made(fitted):
    before, pictures = fitted
    shown = pictures.astype(np.float32) / 127.5 - 1
    latents = np.asarray(encode_pictures(before, shown))
    checks = np.where(np.indices((8, 8)).sum(0) % 2, 0.5, -0.5)[..., None]
    made, weight = (latents + checks).astype(np.float32), np.ones((60, 64, 64, 1), np.float32)
    after = refine(CONFIG, before, pictures[:60], made[:60], pictures[:60], weight)

    def error(params, latents):
        return np.mean((decode_latents(params, latents[60:]) - shown[60:]) ** 2)

    assert error(after, made) < 0.8 * error(before, made), "pictures that it has not seen"
    assert error(after, latents) < 1.2 * error(before, latents), "what the encoder gives is not forgotten"
    decoder = {name: value for name, value in after.items() if not name.startswith("enc")}
    np.testing.assert_array_equal(decode_latents(decoder, made), decode_latents(after, made))
    same = {name for name in before if np.array_equal(after[name], before[name])}
    assert same == {name for name in before if name.startswith("enc") or name == "mean"}


def test_refining_goes_by_weight_and_seed(fitted):
    before, pictures = fitted
    config = dataclasses.replace(CONFIG, refine=4)
    latents, weight = np.zeros((80, 8, 8, 16), np.float32), np.zeros((80, 64, 64, 1), np.float32)
    weight[:, :, :32] = 1
    elsewhere = np.where(weight, pictures, 255 - pictures).astype(np.uint8)
    found = [refine(config, before, pictures, latents, wanted, weight, seed)
             for wanted, seed in ((pictures, 0), (elsewhere, 0), (255 - pictures, 0), (pictures, 1))]
    equal = [all(np.array_equal(one[name], found[0][name]) for name in before) for one in found]
    assert equal == [True, True, False, False]


def test_the_linear_kind_is_not_refined():
    with pytest.raises(UserError, match="autoencoder.refine is 5; the linear kind has nothing to be trained"):
        FitConfig("linear", refine=5)
