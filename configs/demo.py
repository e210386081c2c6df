"""The demo: a tiny ACE++ on the built-in pictures, in two stages, as the paper trains (0-ref tasks, then all)."""

from ml_collections import ConfigDict, config_dict

from acejax.demo.pictures import REPAINTING, SCALES, SIZE

ZERO_REF = {"text": 0.5, "insert": 1.3, "recolor": 1.0, "instruct": 1.5}


def get_config() -> ConfigDict:
    """Everything that a run is made of; a field is changed by `--config.field=value`."""
    return ConfigDict({
        "seed": 0,
        "steps": 6000,
        # shares of the steps, and of the samples by task
        "stages": ({"share": 0.25, "weights": ZERO_REF},
                   {"share": 0.75, "weights": ZERO_REF | {"reference": 1.4, "two_references": 1.6}}),
        "model": {"in_channels": 448, "out_channels": 64, "hidden_size": 128, "num_heads": 4, "depth": 1,
                  "depth_single_blocks": 3, "mlp_ratio": 4.0, "axes_dim": (4, 14, 14), "theta": 10_000,
                  "context_in_dim": 64, "vec_in_dim": 64, "guidance_embed": False},
        "init_from": config_dict.placeholder(str),  # weights to start from; none: random
        "data": {
            "source": "demo",  # the built-in pictures
            "samples": 1200,  # training samples of each task
            "tasks": ("text", "insert", "recolor", "instruct", "reference", "two_references"),
            "size": SIZE,  # of a picture's sides in pixels
            "scales": SCALES,  # of a photo's short side, in sides of a picture
            "vary": False,  # turn the training photos, and change their colours
            # "linear" is fitted in a second; "convolutional" is trained from it and finer, and its decoder may learn on
            # for `refine` steps from what the trained transformer makes of `drafts` training samples
            "autoencoder": {"kind": "linear", "pictures": 1500, "width": 96, "encoder": 1, "decoder": 2, "steps": 4000,
                            "batch": 16, "learning_rate": 1e-3, "noise": 0.1, "refine": 0, "drafts": 3000},
            "canvas": {"split": True, "scale": 1.0, "scales": REPAINTING,
                       "reference_height": (1.0, 1.0), "editing_height": 1.0},
            "batch_sizes": ((16, 16), (32, 8), (48, 8)),  # samples of a batch by number of tokens: 0, 1, 2 references
        },
        "reading": {"threads": 1, "workers": 0, "ahead": 4},  # threads, or processes; batches made ahead
        # ACE++ has 1, 0 and 1: a plain mean over the canvas, noise levels in the middle. A small model on 64 pixels
        # learns several times faster where it looks at what is generated, and at high noise, where text decides.
        "loss": {"mask_weight": 4.0, "sigma_shift": 1.2, "sigma_spread": 1.5},
        "optimizer": {"name": "adamw", "learning_rate": 2e-3, "schedule": "cosine", "warmup": 0.02, "b1": 0.9,
                      "b2": 0.99, "weight_decay": 0.01, "clip": 1.0, "accumulate": 1, "ema": 0.0,
                      "param_dtype": "float32", "rounding": "stochastic", "fused": False},
        # test samples a task, held-out pairs, Euler steps; split "validation" is for choices: other crops of the
        # training photos, so that the test photo stays unseen
        "evaluate": {"samples": 192, "held": 96, "steps": 8, "seed": 1_000_000, "split": "test", "thresholds": "demo"},
        "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "seq": 1},
        "execution": {"dtype": "float32", "attention": "auto", "remat": "none"},
        "checkpoint": {"every": 1000, "keep": 2, "best": 0, "export_every": 0, "export_layout": "bfl"},
        "watch": {"every": 50, "bad_steps": 10},
        # none while it trains, as `evaluate` is more than that; every: 500 keeps some samples out and judges by them
        "validation": {"every": 0, "held": 8, "grid_every": 0, "grid": 2, "steps": 8},
    })
