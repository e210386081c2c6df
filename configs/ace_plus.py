"""ACE++ on your own pictures: `--config=configs/ace_plus.py:stage1`, `:stage2` (the default), `:both` or `:lora`.

So far `acejax train` starts from random weights and trains all of them: it does not read FLUX's or ACE++'s weights yet,
and `:lora` trains no LoRA.

Stage 1 has the tasks without references, stage 2 all of them (paper section 4). `:lora` lays the canvas out as the
released LoRAs for FLUX.1-Fill-dev are used: 384 channels, full-height references, nothing split.
"""

import dataclasses

from ml_collections import ConfigDict

from acejax import MMDiTConfig

FLUX = "FLUX.1-Fill-dev"  # a pipeline's folder, as the hub has it


def get_config(part: str = "stage2") -> ConfigDict:
    """Everything that a run is made of; a field is changed by `--config.field=value`."""
    stages = {"stage1": ({"share": 1.0, "references": 0},), "stage2": ({"share": 1.0},), "lora": ({"share": 1.0},),
              "both": ({"share": 0.5, "references": 0}, {"share": 0.5})}
    if part not in stages:
        raise ValueError(f"ace_plus.py:{part}; known: {', '.join(stages)}")
    lora = part == "lora"
    model = MMDiTConfig.ace_plus_lora() if lora else MMDiTConfig.ace_plus_fft()
    return ConfigDict({
        "seed": 0,
        "steps": 10_000,
        # `weights` by task, or by dataset/task with *, draws them in these shares: {"portrait": 2, "mine/*": 1}
        "stages": stages[part],
        "model": dataclasses.asdict(model),
        "data": {
            # name: a manifest, a folder of pictures, or a TFDS dataset with its split
            "sources": {"mine": {"path": "manifest.jsonl", "split": "train"}},
            "canvas": {"max_tokens": 4096, "budget": "picture", "split": not lora, "scale": 1.0 if lora else 0.5,
                       "reference_height": (1.0, 1.0) if lora else (1 / 3, 1.0),
                       "editing_height": 1.0 if lora else 0.8, "multiple": 16},
            "augment": {"drop_caption": 0.0, "full_mask": 0.0, "random_mask": 0.0},
            "max_broken": 0.01,  # share of broken samples that stops the run
            "bucket_multiple": 256,  # tokens
            "most_buckets": 14,  # each is a shape to compile
            "batch_tokens": 8 * 8192,  # of all devices together; each must hold the longest sample
            "batch_sizes": (),  # pairs (tokens, samples) instead of the three above
        },
        "reading": {"threads": 4, "workers": 0, "ahead": 4},  # threads, or processes; batches made ahead
        "encoders": {"autoencoder": f"{FLUX}/vae", "t5": f"{FLUX}/text_encoder_2", "clip": f"{FLUX}/text_encoder",
                     "tokenizers": FLUX, "dtype": "bfloat16", "text_length": 512},
        "cache": {"dir": "cache", "dtype": "bfloat16", "variants": 1, "batch": 8},
        "loss": {"mask_weight": 1.0, "sigma_shift": 0.0, "sigma_spread": 1.0},
        "optimizer": {"learning_rate": 1e-5, "warmup": 0.02, "b1": 0.9, "b2": 0.99, "weight_decay": 0.01, "clip": 1.0},
        "mesh": {"data": 1, "fsdp": -1, "tensor": 1, "seq": 1},
        "execution": {"dtype": "bfloat16", "attention": "auto", "remat": "full"},
        "checkpoint": {"every": 1000, "keep": 2, "best": 1, "export_every": 0, "export_layout": "bfl"},
        "watch": {"every": 50, "bad_steps": 10},
    })
