"""A sampler of one's own over the pure functions: Heun's second-order steps in place of Euler's, jitted as a whole.

`python examples/own_sampler.py` compares both with many Euler steps, on the small weights' "a red heart on grass".
"""

import jax
import jax.numpy as jnp

import acejax
from acejax.demo.surroundings import encode_prompts
from acejax.demo.weights import SHIPPED, read_note

note = read_note()
config = acejax.MMDiTConfig(**note["config"])
_, params = acejax.load_mmdit(SHIPPED / "mmdit.safetensors", config, dtype="float32")
text, pooled = encode_prompts(["a red heart on grass"])
cells = note["size"] // 8                                # a latent pixel is 8 x 8 pixels
grey = jnp.zeros((1, cells, cells, 16))                  # nothing to keep and nothing to change
mask = jnp.ones((1, 8 * cells, 8 * cells, 1))            # everything is generated


def velocity(latents, sigma):
    image, positions = acejax.lcu.pack(latents, edit=grey, modify=grey, mask=mask)
    tokens = acejax.Tokens(image, positions, text, pooled, sigma=jnp.full((1,), sigma))
    return acejax.lcu.unpack(acejax.apply(config, params, tokens), cells, cells)


@jax.jit
def heun(noise, sigmas):
    def step(latents, pair):
        sigma, following = pair
        first = velocity(latents, sigma)
        second = velocity(latents + (following - sigma) * first, following)
        return latents + (following - sigma) * (first + second) / 2, None
    return jax.lax.scan(step, noise, (sigmas[:-1], sigmas[1:]))[0]


euler = jax.jit(lambda noise, sigmas: acejax.flow.euler(velocity, noise, sigmas))
noise = jax.random.normal(jax.random.key(0), grey.shape)
tokens = (cells // 2) ** 2
exact = euler(noise, acejax.flow.schedule(128, tokens))
errors = {}
for name, sampler, steps in (("Euler", euler, 16), ("Heun", heun, 8)):  # as many velocities each
    errors[name] = float(jnp.abs(sampler(noise, acejax.flow.schedule(steps, tokens)) - exact).mean())
    print(f"{name:<6}{steps:>3} steps: {errors[name]:.4f} from 128 steps of Euler")
