"""Stage 2 of ACE++: what stage 1 made learns all tasks, those with references too. Choices as `ace_plus.py`."""

import pathlib
import runpy

from ml_collections import ConfigDict

ace_plus = runpy.run_path(str(pathlib.Path(__file__).with_name("ace_plus.py")))["get_config"]


def get_config(choices: str = "") -> ConfigDict:
    config = ace_plus(choices)
    config.stages = ({"share": 1.0},)
    config.init_from = "runs/stage1"  # its workdir, or any weights: ace_plus_fft.safetensors goes on from the released
    return config
