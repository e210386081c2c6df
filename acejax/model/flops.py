"""FLOPs of the transformer in closed form: 2 for each multiply-add of a matrix product, nothing for the rest.

The formulas are the architecture's own (`acejax.model.mmdit`). They are needed because XLA's `cost_analysis` counts
the body of a scan once and a kernel such as cuDNN's or our own for TPUs not at all.
"""

import dataclasses
from collections.abc import Mapping

from acejax.model.config import MMDiTConfig
from acejax.model.mmdit import TIME_CHANNELS


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one forward pass by part.

    Attributes:
      linear: qkv, output projection and MLP of every block; grows with the tokens.
      attention: q k^T and its product with v in every block, unmasked; grows with the tokens squared.
      modulation: adaLN of every block and of the output layer, once a sample.
      embedding: time, guidance and pooled text embedders, once a sample.
      io: image and text tokens into the model's width, image tokens out of it.
    """

    linear: int
    attention: int
    modulation: int
    embedding: int
    io: int

    @property
    def total(self) -> int:
        return self.linear + self.attention + self.modulation + self.embedding + self.io


def forward(config: MMDiTConfig, text: int, image: int, batch: int = 1) -> Flops:
    """FLOPs of one `acejax.apply` over `batch` samples of `text` and `image` tokens, padding included.

    With N = text + image, D = hidden_size, M = mlp_size and L = depth + depth_single_blocks:

        linear      2 L N (4 D^2 + 2 D M)      a single block's weights are those of a double block's stream
        attention   4 L N^2 D
        modulation  2 D^2 (12 depth + 3 depth_single_blocks + 2)
        embedding   2 sum over embedders (in D + D^2), in = 256 (time, guidance) or vec_in_dim
        io          2 D (image (in_channels + out_channels) + text context_in_dim)
    """
    width, tokens, blocks = config.hidden_size, text + image, config.depth + config.depth_single_blocks
    embedders = [TIME_CHANNELS] * (1 + config.guidance_embed) + [config.vec_in_dim]
    return Flops(
        linear=batch * 2 * blocks * tokens * (4 * width**2 + 2 * width * config.mlp_size),
        attention=batch * 4 * blocks * tokens**2 * width,
        modulation=batch * 2 * width**2 * (12 * config.depth + 3 * config.depth_single_blocks + 2),
        embedding=batch * 2 * sum(features * width + width**2 for features in embedders),
        io=batch * 2 * width * (image * (config.in_channels + config.out_channels) + text * config.context_in_dim),
    )


def low_rank(pairs: Mapping[str, int], text: int, image: int, batch: int = 1) -> int:
    """FLOPs that LoRA pairs add to a forward pass: 2 for each number of a and b and each token that meets it.

    `pairs` are numbers by module ("double_blocks/txt/qkv"), all layers together.
    """
    def tokens(module: str) -> int:
        if "modulation" in module or module.startswith(("time_in", "guidance_in", "vector_in")):
            return 1
        if module.startswith(("double_blocks/txt", "txt_in")):
            return text
        return text + image if module.startswith("single_blocks") else image

    return batch * 2 * sum(count * tokens(module) for module, count in pairs.items())


def training_step(config: MMDiTConfig, text: int, image: int, batch: int = 1, pairs: Mapping[str, int] | None = None
                  ) -> int:
    """Model FLOPs of a training step, the numerator of MFU: 3 x forward.

    The backward pass is two products for each one of the forward pass. By the usual convention what remat recomputes
    does not count, and the few input gradients that nothing needs (of tokens and sinusoids) do.

    With a LoRA on the blocks (`pairs`, as `low_rank`) no kernel has a gradient: 2 x forward for the blocks' linear
    layers and the output, 3 x for attention and the pairs, 1 x for what lies before the blocks and for modulation.
    """
    once = forward(config, text, image, batch)
    if pairs is None:
        return 3 * once.total
    output = batch * 2 * config.hidden_size * image * config.out_channels
    return once.total + once.linear + 2 * once.attention + output + 3 * low_rank(pairs, text, image, batch)
