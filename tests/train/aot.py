"""Compile the full training step of the 12B model ahead of time on virtual devices: python -m tests.train.aot 8

Stage 2 of ACE++ at full size: 448 channels, 512 text and 4,096 image tokens, one sample a device, AdamW in float32,
everything sharded over `fsdp`. No array is made. Prints XLA's memory of one device and fails above a bound.
"""

import functools
import os
import sys

DEVICES = int(sys.argv[1]) if len(sys.argv) > 1 else 8
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402

import acejax  # noqa: E402
from acejax.parallel import mesh as meshes  # noqa: E402
from acejax.parallel import rules  # noqa: E402
from acejax.train.step import StepConfig, init_state, train_step  # noqa: E402

GB = 1e9
BOUND = {8: 45.0, 64: 15.0}  # GB of state, gradients and temporaries a device


def main() -> None:
    mesh = meshes.make_mesh({"fsdp": DEVICES})
    execution = acejax.Execution(jnp.bfloat16, "xla_chunked", "full", rules.constrain(mesh))
    setting = StepConfig(acejax.MMDiTConfig(), execution, references=1, tasks=8, mask_weight=1.0, sigma_shift=0.0,
                         sigma_spread=1.0, seed=0)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5))
    state = jax.eval_shape(functools.partial(init_state, setting, optimizer))
    placed = rules.shardings(state, mesh)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed)

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((DEVICES, *shape), dtype, sharding=rules.batch_sharding(mesh))

    latents = {name: array(4096, 64, dtype=jnp.bfloat16) for name in ("edit", "modify", "target")}
    batch = latents | {"mask": array(4096, 256, dtype=jnp.uint8), "unit": array(4096, dtype=jnp.int8),
                       "positions": array(4096, 3, dtype=jnp.int32), "lengths": array(dtype=jnp.int32),
                       "text": array(512, 4096, dtype=jnp.bfloat16), "pooled": array(768, dtype=jnp.bfloat16),
                       "task": array(dtype=jnp.int32)}
    step = jax.jit(functools.partial(train_step, setting=setting, optimizer=optimizer), donate_argnums=0,
                   out_shardings=(placed, None))
    memory = step.lower(state, batch).compile().memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes / GB, memory.temp_size_in_bytes / GB
    print(f"12B training step, {DEVICES} devices, each: {arguments:.1f} GB of state, {temporaries:.1f} GB of scratch")
    if arguments + temporaries > BOUND.get(DEVICES, 80.0):
        sys.exit(f"more than the {BOUND.get(DEVICES)} GB expected of a device")


if __name__ == "__main__":
    main()
