"""The finer autoencoder learns on from what a transformer leaves."""

import numpy as np
import pytest

from acejax import UserError
from acejax.demo.autoencoder import FitConfig, decode_latents, encode_pictures, fit, refine
from acejax.demo.pictures import samples

CONFIG = FitConfig("convolutional", pictures=60, width=16, encoder=1, decoder=1, steps=60, batch=8, refine=60)


def test_refining_teaches_the_decoder_alone_what_was_made():
    pictures = np.stack([sample.target for sample in samples(80, "insert", 0)])
    fitted = fit(CONFIG, pictures[:60])
    shown = pictures.astype(np.float32) / 127.5 - 1
    latents = np.asarray(encode_pictures(fitted, shown))
    made = latents + 0.4 * np.sin(3 * latents[..., ::-1])  # what could be told from the latents is amiss in them
    weight = np.ones((60, 64, 64, 1), np.float32)
    refined = refine(CONFIG, fitted, pictures[:60], made[:60], pictures[:60], weight)

    def error(params, latents):
        return np.mean((decode_latents(params, latents[60:]) - shown[60:]) ** 2)

    assert error(refined, made) < 0.9 * error(fitted, made), "pictures that it has not seen"
    assert error(refined, latents) < 1.1 * error(fitted, latents), "and what the encoder gives is not forgotten"
    same = {name for name in fitted if np.array_equal(refined[name], fitted[name])}
    assert same == {name for name in fitted if name.startswith("enc") or name == "mean"}
    again = refine(CONFIG, fitted, pictures[:60], made[:60], pictures[:60], weight)
    assert all(np.array_equal(refined[name], again[name]) for name in refined), "a seed fixes the result"


def test_weights_say_which_pixels_count():
    pictures = np.stack([sample.target for sample in samples(40, "insert", 1)])
    fitted, wanted, left = fit(CONFIG, pictures), 255 - pictures, np.zeros((40, 64, 64, 1), np.float32)
    left[:, :, :32] = 1
    latents = np.asarray(encode_pictures(fitted, pictures.astype(np.float32) / 127.5 - 1)) + 3  # no picture has these
    refined = refine(CONFIG, fitted, pictures, latents, wanted, left)
    error = (np.asarray(decode_latents(refined, latents)) - (wanted.astype(np.float32) / 127.5 - 1)) ** 2
    assert error[:, :, :24].mean() < 0.5 * error[:, :, 40:].mean()


def test_the_linear_kind_is_not_refined():
    with pytest.raises(UserError, match="autoencoder.refine is 5; the linear kind has nothing to be trained"):
        FitConfig("linear", refine=5)
