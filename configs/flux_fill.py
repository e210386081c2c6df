"""FLUX.1-Fill-dev as it is, 384 channels, on your own pictures: the canvas of ACE++'s released LoRAs for it.

References have the target's height and nothing stands apart to be changed. Choices as `ace_plus.py`.
"""

import dataclasses
import pathlib
import runpy

from ml_collections import ConfigDict

from acejax import MMDiTConfig

ace_plus = runpy.run_path(str(pathlib.Path(__file__).with_name("ace_plus.py")))["get_config"]


def get_config(choices: str = "") -> ConfigDict:
    config = ace_plus(choices)
    config.stages = ({"share": 1.0},)
    config.model = dataclasses.asdict(MMDiTConfig.flux_fill())
    config.data.canvas.update({"split": False, "scale": 1.0, "reference_height": (1.0, 1.0), "editing_height": 1.0})
    return config
