"""A LoRA on FLUX.1-Fill-dev, 384 channels, as ACE++'s released ones: its canvas, all 304 modules, rank 64.

One card of 48 GB does (`acejax plan`), and one of 24 GB with the base in eight bits, a lower rank and smaller pictures;
docs/lora.md has both, and goes through a run. `lora.targets` are regular expressions over our names or BFL's,
`lora.init_from` a LoRA to go on from. Choices as `ace_plus.py`; `reference` has the hyper-parameters of the released
code (ACE_plus `train_config/ace_plus_lora.yaml`).
"""

import pathlib
import runpy

from ml_collections import ConfigDict, config_dict

flux_fill = runpy.run_path(str(pathlib.Path(__file__).with_name("flux_fill.py")))["get_config"]
TOKENS = 8192  # of a batch: without a topology, for one device


def get_config(choices: str = "") -> ConfigDict:
    return with_lora(flux_fill(choices), choices)


def with_lora(config: ConfigDict, choices: str) -> ConfigDict:
    """`config` with a LoRA in place of the model."""
    named = choices.split(",")
    config.steps = 100_000 if "reference" in named else 4000
    config.lora = {"rank": 64, "alpha": config_dict.placeholder(float), "targets": "(double|single)_blocks/.*",
                   "init_from": config_dict.placeholder(str), "base": "bfloat16"}
    config.optimizer.learning_rate = 1e-3 if "reference" in named else 1e-4
    config.checkpoint.update({"every": 250, "best": 0, "export_every": 250, "export_layout": "comfy,diffusers",
                              "export_dtype": "bfloat16"})
    config.validation.update({"every": 250, "grid_every": 1000})
    if not set(named) - {"", "reference"}:
        config.data.batch_tokens = TOKENS
    return config
