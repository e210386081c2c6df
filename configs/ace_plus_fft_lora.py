"""A LoRA on the full ACE++ model, 448 channels: all 304 modules, rank 64, its canvas. Choices as `flux_fill_lora.py`.

`init_from` is ACE++'s released full model (`ace_plus_fft.safetensors` of ali-vilab/ACE_Plus), or a run's export.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

ace_plus = runpy.run_path(str(pathlib.Path(__file__).with_name("ace_plus.py")))["get_config"]
with_lora = runpy.run_path(str(pathlib.Path(__file__).with_name("flux_fill_lora.py")))["with_lora"]


def get_config(choices: str = "") -> ConfigDict:
    config = with_lora(ace_plus(choices), choices)
    config.stages = ({"share": 1.0},)
    config.init_from = "ace_plus_fft.safetensors"
    return config
