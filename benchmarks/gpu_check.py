"""Whether the PyTorch peer computes what acejax does: at tiny size, with the same weights, on the CPU in float32.

Greatest differences, relative to the greatest number: the velocity, the loss's gradient (of all parameters; of a LoRA's
factors), and parameters after three steps of Adafactor.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from acejax.adapt import lora as adapt
from acejax.errors import UserError
from acejax.model import mmdit, modulation
from acejax.model.config import Execution, MMDiTConfig
from acejax.train.adafactor import Adafactor
from acejax.train.step import StepConfig, noisy_tokens, total_weight, velocity_errors
from acejax.weights import keymaps, lora_pairs
from benchmarks import gpu_inputs, torch_mmdit

LIMIT = 1e-4
RANK = 4


def check() -> dict[str, float]:
    """The differences by name.

    Raises:
      UserError: one is above LIMIT.
    """
    with jax.default_matmul_precision("highest"):
        found = differences()
    if wrong := [f"{name} {value:.1e}" for name, value in found.items() if not value <= LIMIT]:
        raise UserError(f"the PyTorch peer differs from acejax by {', '.join(wrong)}; expected at most {LIMIT}")
    return found


def differences() -> dict[str, float]:
    config = MMDiTConfig.tiny()
    setting = StepConfig(config, Execution(), references=0, tasks=1, mask_weight=1.0, sigma_shift=0.0,
                         sigma_spread=1.0, seed=0)
    random = np.random.default_rng(1)

    def draw(like: Any) -> Any:
        return jax.tree.map(lambda leaf: np.float32(0.1 * random.standard_normal(leaf.shape)), like)

    params = draw(jax.eval_shape(functools.partial(mmdit.init, config), jax.random.key(0)))
    factors, scales = jax.eval_shape(lambda: adapt.tie(adapt.init(config, jax.random.key(0), RANK)))
    factors, scales = draw(factors), jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), scales)
    batch = gpu_inputs.batch(config, 2, gpu_inputs.grid(24), 5, np.float32)
    noise = random.standard_normal(batch["target"].shape, np.float32)
    sigma = np.float32([0.3, 0.8])

    def loss(params: Any, factors: Any) -> jax.Array:
        frozen = {"params": params, "scales": scales}
        return velocity_errors(factors, setting, batch, noise, sigma, frozen)[0].sum() / total_weight(setting, batch)

    @jax.jit
    def ours(params: Any, factors: Any) -> Any:
        tokens = noisy_tokens(setting, batch, noise, sigma)
        levels = modulation.modulations(config, params, sigma[None], tokens.pooled, tokens.guidance)
        velocity = mmdit.apply(config, params, tokens, modulation=jax.tree.map(lambda leaf: leaf[0], levels))
        return tokens.image, velocity, jax.grad(loss, argnums=(0, 1))(params, factors)

    image, velocity, (gradient, of_lora) = jax.device_get(ours(params, factors))

    peer = torch_mmdit.MMDiT(config)
    torch_mmdit.load(peer, tensors(keymaps.to_foreign(config, params, "bfl")))
    given, (noise, sigma) = gpu_inputs.to_torch(batch, "cpu"), tensors({"n": noise, "s": sigma}).values()
    rope = peer.rotations(given["positions"][0], given["text"].shape[1])
    image, guidance = torch.from_numpy(np.array(image)), torch.ones_like(sigma)
    with torch.inference_mode():
        made = peer.modulations(sigma, given["pooled"], guidance)
        found = {"velocity": difference(peer(image, given["text"], rope, made).numpy(), velocity)}

    torch_mmdit.adapt(peer, RANK)
    adapted, expected = (dict(lora_pairs.to_foreign(config, "bfl", adapt.spread(tree, scales)))
                         for tree in (factors, of_lora))
    modules = {key: peer.get_submodule(torch_mmdit.own_name(key).removesuffix(".weight")) for key in adapted}
    for key, module in modules.items():
        module.a.data, module.b.data = (torch.from_numpy(np.array(factor)) for factor in adapted[key][:2])
    peer.requires_grad_(True).recompute = True
    torch_mmdit.loss(peer, given, noise, sigma, rope).backward()
    parameters = dict(peer.named_parameters())
    found["gradient"] = max(difference(parameters[torch_mmdit.own_name(key)].grad.numpy(), leaf)
                            for key, leaf in keymaps.to_foreign(config, gradient, "bfl").items())
    found["LoRA gradient"] = max(difference(factor.grad.numpy(), leaf) for key, module in modules.items()
                                 for factor, leaf in zip((module.a, module.b), expected[key][:2], strict=True))
    return found | {"Adafactor": adafactor_difference()}


def adafactor_difference() -> float:
    """Of a matrix and a bias after three steps in float32, by random gradients."""
    random, shape = np.random.default_rng(2), (256, 128)
    ours = {"kernel": jnp.asarray(random.standard_normal(shape, np.float32)), "bias": jnp.zeros(shape[1])}
    optimizer, peer = Adafactor(lambda step: 0.01, 0.1, clip=0.0, stochastic=False), torch_mmdit.Linear(*shape)
    moments = optimizer.init({"double_blocks": jax.tree.map(lambda leaf: leaf[None], ours), "single_blocks": {
        "none": jnp.zeros((1, 1))}})["double_blocks"]
    moments = jax.tree.map(lambda leaf: leaf[0], moments)
    peer.load_state_dict(tensors({"weight": ours["kernel"].T, "bias": ours["bias"]}))
    moved = torch_mmdit.Adafactor(peer, 0.01, 0.1)
    for step in range(3):
        gradient = {name: random.standard_normal(leaf.shape, np.float32) * (step + 1) for name, leaf in ours.items()}
        moments, ours = optimizer.layer(gradient, moments, ours, jax.random.key(0), jnp.int32(step), jnp.bool_(True))
        moved.begin()
        # the gradient of this sum is `gradient`; the hooks move both parameters
        ((peer.weight * torch.from_numpy(gradient["kernel"].T)).sum()
         + (peer.bias * torch.from_numpy(gradient["bias"])).sum()).backward()
    return max(difference(peer.weight.detach().numpy().T, ours["kernel"]),
               difference(peer.bias.detach().numpy(), ours["bias"]))


def tensors(arrays: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def difference(found: np.ndarray, expected: Any) -> float:
    expected = np.asarray(expected)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float(np.abs(found - expected).max() / np.abs(expected).max())
