"""ACE++ on your own pictures, both stages in one run: first the tasks without references, then all (paper section 4).

`ace_plus_stage1.py` and `ace_plus_stage2.py` are the same as two runs. After a colon may stand, with commas between:

* a topology (`acejax plan --help` lists them): the batch size for it, as in `:v5e-256`, and the mesh's `data` for
  several slices (`:v5e-256x2`) and for large cubes (`:v5p-128`);
* `one-card`: Adafactor on bfloat16 parameters, block by block as their gradients come, so that 12B fit in 36 GB;
* `reference`: the hyper-parameters of the released code (ACE_plus `train_config/ace_plus_fft.yaml`) and its canvas.

The paper does not tell its hyper-parameters. Those here are ours, and no run at full size stands behind them yet.
"""

import dataclasses

from ml_collections import ConfigDict, config_dict

from acejax import MMDiTConfig
from acejax.parallel.chips import topology

FLUX = "FLUX.1-Fill-dev"  # a pipeline's folder, as the hub has it
TOKENS = 8192  # of a batch, on a device


def get_config(choices: str = "") -> ConfigDict:
    """Everything that a run is made of; a field is changed by `--config.field=value`."""
    config = ConfigDict({
        "seed": 0,
        "steps": 100_000,
        # `weights` by task, or by dataset/task with *, draws them in these shares: {"portrait": 2, "mine/*": 1}
        "stages": ({"share": 0.5, "references": 0}, {"share": 0.5}),
        "model": dataclasses.asdict(MMDiTConfig.ace_plus_fft()),
        "init_from": FLUX,  # or FLUX.1-dev, which the paper starts from; "" is random weights
        "data": {
            # name: a manifest, a folder of pictures, or a TFDS dataset with its split
            "sources": {"mine": {"path": "manifest.jsonl", "split": "train"}},
            "canvas": {"max_tokens": 4096, "budget": "picture", "split": True, "scale": 0.5,
                       "reference_height": (1 / 3, 1.0), "editing_height": 0.8, "multiple": 16,
                       "parity": config_dict.placeholder(str)},
            "augment": {"drop_caption": 0.0, "full_mask": 0.0, "random_mask": 0.0},
            "max_broken": 0.01,  # share of broken samples that stops the run
            "bucket_multiple": 256,  # tokens
            "most_buckets": 14,  # each is a shape to compile
            "batch_tokens": 8 * TOKENS,  # of all devices together; each must hold the longest sample
            "batch_sizes": (),  # pairs (tokens, samples) instead of the three above
        },
        "reading": {"threads": 4, "workers": 0, "ahead": 4},  # threads, or processes; batches made ahead
        "encoders": {"autoencoder": f"{FLUX}/vae", "t5": f"{FLUX}/text_encoder_2", "clip": f"{FLUX}/text_encoder",
                     "tokenizers": FLUX, "dtype": "bfloat16", "text_length": 512},
        "cache": {"dir": "cache", "dtype": "bfloat16", "variants": 1, "batch": 8},
        "loss": {"mask_weight": 1.0, "sigma_shift": 0.0, "sigma_spread": 1.0},
        "optimizer": {"name": "adamw", "learning_rate": 2e-5, "schedule": "cosine", "warmup": 0.02, "b1": 0.9,
                      "b2": 0.99, "eps": 1e-8, "momentum": 0.95, "weight_decay": 0.01, "clip": 1.0, "accumulate": 1,
                      "ema": 0.0, "param_dtype": "float32", "rounding": "stochastic", "fused": False},
        "mesh": {"data": 1, "fsdp": -1, "tensor": 1, "seq": 1},
        "execution": {"dtype": "bfloat16", "attention": "auto", "remat": "full",
                      "int8_products": False,  # of a LoRA's base in int8
                      "reduce_dtype": config_dict.placeholder(str)},  # of gradients: float32, or dtype's
        "checkpoint": {"every": 1000, "keep": 2, "best": 1, "export_every": 0, "export_layout": "bfl",
                       "export_dtype": config_dict.placeholder(str)},
        "watch": {"every": 50, "bad_steps": 10},
        "validation": {"every": 1000, "held": 8, "sources": {}, "sigmas": (0.1, 0.3, 0.5, 0.7, 0.9),
                       "grid_every": 5000, "grid": 2, "steps": 28, "guidance": 1.0},
    })
    for choice in filter(None, choices.split(",")):
        if choice == "reference":
            config.seed = 1999
            config.data.canvas.update({"max_tokens": 2048, "parity": "reference"})
            config.optimizer.update({"learning_rate": 5e-5, "warmup": 0.0, "b2": 0.999, "eps": 1e-6})
        elif choice == "one-card":
            config.optimizer.update({"name": "adafactor", "param_dtype": "bfloat16", "fused": True, "clip": 0.0})
            config.data.batch_tokens = TOKENS
        else:
            found = topology(choice)
            config.data.batch_tokens = found.devices * TOKENS
            config.mesh.data = found.copies
    return config
