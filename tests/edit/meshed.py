"""`python -m tests.edit.meshed DEVICES SHAPES`: the sampler on meshes of virtual devices, against one device.

SHAPES is JSON, a list of meshes. Prints JSON, by mesh and way: the greatest difference of latents in standard
deviations. A batch of three is padded where it must be.
"""

import json
import os
import sys

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={sys.argv[1]}"

import jax

from acejax.adapt import quantize
from acejax.edit.sampler import Sampler
from acejax.model.config import MMDiTConfig
from acejax.parallel.mesh import make_mesh
from acejax.weights import keymaps
from tests import judges
from tests.edit import test_sampler as one
from tests.goldens import cases

HEADS = 16  # as tokens and the text's length: they fall over any axis of a mesh of 16 devices
CONFIG = MMDiTConfig(**{**vars(one.CONFIG), "hidden_size": 8 * HEADS, "num_heads": HEADS, "axes_dim": (2, 2, 4)})
SIZE, TEXT = {"height": 8, "width": 8}, 16


def main(devices: str, shapes: str) -> None:
    params = keymaps.from_foreign(CONFIG, cases.state(CONFIG).__getitem__, "bfl")
    features, noise, lora = one.features(3, **SIZE, text=TEXT), one.made_noise(**SIZE)[:3], one.adapted(1, CONFIG)
    left, quant = quantize.quantize(params)
    alone = Sampler(CONFIG, params)(features, noise, one.STEPS, one.GUIDANCE, lora)
    eight = Sampler(CONFIG, left, quant=quant)(features, noise, one.STEPS, one.GUIDANCE)
    found = {}
    for shape in json.loads(shapes):
        mesh = make_mesh(shape)
        for offload in (False, True):
            sampler = Sampler(CONFIG, params, mesh=mesh, offload=offload)
            made = sampler(features, noise, one.STEPS, one.GUIDANCE, lora, say=(lambda *_: None) if offload else None)
            found[f"{shape}, offload {offload}"] = judges.difference(jax.device_get(made), alone)
        made = Sampler(CONFIG, left, quant=quant, mesh=mesh)(features, noise, one.STEPS, one.GUIDANCE)
        found[f"{shape}, int8"] = judges.difference(jax.device_get(made), eight)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
