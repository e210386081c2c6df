"""`python -m tests.edit.meshed`: the sampler on meshes of eight virtual devices; prints how far it is from one device.

JSON, by mesh: the greatest difference of latents in standard deviations. A batch of three is padded where it must be.
"""

import json
import os

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax

from acejax.adapt import quantize
from acejax.edit.sampler import Sampler
from acejax.model.config import MMDiTConfig
from acejax.parallel.mesh import make_mesh
from acejax.weights import keymaps
from tests import judges
from tests.counts import count
from tests.edit import test_sampler as one
from tests.goldens import cases

CONFIG = MMDiTConfig(**{**vars(one.CONFIG), "num_heads": 8, "axes_dim": (2, 2, 4)})  # heads for tensor x seq = 8
MIXED = {"data": 2, "fsdp": 2, "tensor": 2}
MESHES = count([MIXED, {"fsdp": 4, "seq": 2}], [{"data": 8}, {"fsdp": 8}, MIXED, {"fsdp": 4, "seq": 2}, {"tensor": 8}])


def main() -> None:
    params = keymaps.from_foreign(CONFIG, cases.state(CONFIG).__getitem__, "bfl")
    features, noise, lora = one.features(3), one.made_noise()[:3], one.adapted(1, CONFIG)
    expected = Sampler(CONFIG, params)(features, noise, one.STEPS, one.GUIDANCE, lora)
    found = {}
    for shape in MESHES:
        for offload in (False, True):
            sampler = Sampler(CONFIG, params, mesh=make_mesh(shape), offload=offload)
            made = sampler(features, noise, one.STEPS, one.GUIDANCE, lora, say=(lambda *_: None) if offload else None)
            found[f"{shape}, offload {offload}"] = judges.difference(jax.device_get(made), expected)
    left, quant = quantize.quantize(params)
    expected = Sampler(CONFIG, left, quant=quant)(features, noise, one.STEPS, one.GUIDANCE)
    made = Sampler(CONFIG, left, quant=quant, mesh=make_mesh(MIXED))(features, noise, one.STEPS, one.GUIDANCE)
    found["int8"] = judges.difference(jax.device_get(made), expected)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
