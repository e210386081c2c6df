"""The small weights that acejax ships: the demo at 96 pixels, with a finer autoencoder and removal, trained longer.

They are made by one command, within 90 minutes on two cores:

    acejax demo --config=configs/small_weights.py --workdir=runs/small_weights
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

ZERO_REF = {"text": 0.5, "insert": 1.2, "recolor": 1.4, "instruct": 1.5, "remove": 1.0}


def get_config() -> ConfigDict:
    """`configs/demo.py` with what differs."""
    config = runpy.run_path(str(Path(__file__).parent / "demo.py"))["get_config"]()
    config.steps = 150_000
    config.stages = ({"share": 0.2, "weights": ZERO_REF},
                     {"share": 0.8, "weights": ZERO_REF | {"reference": 1.6, "two_references": 1.6}})
    config.model.update({"hidden_size": 160, "mlp_ratio": 2.0, "depth_single_blocks": 2, "axes_dim": (8, 16, 16)})
    config.data.update({"samples": 4000, "tasks": ("text", "insert", "recolor", "instruct", "reference",
                                                   "two_references", "remove"),
                        "size": 96, "scales": (2.5, 3.25, 4.0), "vary": True,
                        "batch_sizes": ((36, 8), (72, 4), (108, 4))})  # small ones: more steps a second
    config.data.canvas.scales = dict.fromkeys(config.data.tasks, 0.0)  # nothing of the picture is hidden
    config.data.autoencoder.update({"kind": "convolutional", "pictures": 12_000, "width": 80, "encoder": 1,
                                    "decoder": 3, "steps": 4000, "noise": 0.05, "refine": 3000, "drafts": 6000})
    config.loss.sigma_shift = 2.2  # two Euler steps: at 1 and about 0.6
    config.optimizer.update({"learning_rate": 2e-3, "ema": 0.999})
    config.checkpoint.every = 10_000
    config.evaluate.update({"seed": 2_000_000, "steps": 2, "thresholds": "small_weights"})
    return config
