"""Stage 1 of ACE++: a text-to-image or Fill model learns the tasks without references. Choices as `ace_plus.py`."""

import pathlib
import runpy

from ml_collections import ConfigDict

ace_plus = runpy.run_path(str(pathlib.Path(__file__).with_name("ace_plus.py")))["get_config"]


def get_config(choices: str = "") -> ConfigDict:
    config = ace_plus(choices)
    config.stages = ({"share": 1.0, "references": 0},)
    return config
