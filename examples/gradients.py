"""The velocity is a pure function: which words does it listen to? `python examples/gradients.py`

The gradient of the velocity's change by text features, for every sample by `vmap`, tells how much each word matters.
"""

import jax
import jax.numpy as jnp

import acejax
from acejax.demo.surroundings import encode_prompts
from acejax.demo.weights import SHIPPED, read_note

note = read_note()
config = acejax.MMDiTConfig(**note["config"])
_, params = acejax.load_mmdit(SHIPPED / "mmdit.safetensors", config, dtype="float32")
prompt = "a red heart on grass"
text, pooled = encode_prompts([prompt])
cells = note["size"] // 8
noise = jax.random.normal(jax.random.key(0), (8, cells, cells, 16))  # eight samples
grey, mask = jnp.zeros((1, cells, cells, 16)), jnp.ones((1, 8 * cells, 8 * cells, 1))


def energy(text, noise):
    """How strong the velocity is at the first step, for one sample."""
    image, positions = acejax.lcu.pack(noise[None], edit=grey, modify=grey, mask=mask)
    tokens = acejax.Tokens(image, positions, text[None], pooled, sigma=jnp.ones(1))
    return jnp.square(acejax.apply(config, params, tokens)).mean()


per_sample = jax.jit(jax.vmap(jax.grad(energy), in_axes=(None, 0)))(jnp.asarray(text[0]), noise)  # [8, words, width]
weights = jnp.linalg.norm(per_sample, axis=-1).mean(0)
for word, weight in zip(prompt.split(), weights / weights.sum(), strict=False):
    print(f"{word:<8}{'#' * int(60 * weight)}")
