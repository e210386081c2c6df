"""The small models that parity is held on: everything but their outputs comes from a seed."""

import numpy as np

import acejax
from acejax.model.config import CLIPConfig, T5Config
from acejax.weights import keymaps

CHANNELS = (64, 384, 448)
GUIDANCE = (1.0, 3.5, 50.0)
ROWS, COLUMNS, TEXT, BATCH = 3, 5, 4, 2


def config(in_channels: int = 448) -> acejax.MMDiTConfig:
    """Two double and three single blocks of width 64: all of FLUX's parts, with rope over all three axes."""
    return acejax.MMDiTConfig(in_channels=in_channels, hidden_size=64, num_heads=2, depth=2, depth_single_blocks=3,
                              axes_dim=(4, 14, 14), context_in_dim=24, vec_in_dim=20)


def autoencoder() -> acejax.AutoencoderConfig:
    """FLUX's autoencoder at an eighth of its width."""
    return acejax.AutoencoderConfig(ch=16, num_groups=8)


def t5_config() -> T5Config:
    """Three layers whose heads are together narrower than the stream, FLUX's buckets."""
    return T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=40, num_layers=3, num_heads=3)


def clip_config() -> CLIPConfig:
    return CLIPConfig(vocab_size=64, hidden_size=16, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
                      max_position_embeddings=12)


def t5_ids() -> np.ndarray:
    """[2, 150]: a short and a long prompt, then the end token and pads; 128 tokens apart the last bucket serves."""
    ids = np.random.default_rng(2).integers(2, t5_config().vocab_size, (2, 150), np.int32)
    for row, end in zip(ids, (9, 139), strict=True):
        row[end], row[end + 1:] = 1, 0
    return ids


def clip_ids() -> np.ndarray:
    """[4, 12]: the end token, which also pads, first comes at 1, 5, 10 and 11."""
    end = clip_config().vocab_size - 1
    ids = np.random.default_rng(3).integers(0, end - 1, (4, 12), np.int32)
    for row, at in zip(ids, (1, 5, 10, 11), strict=True):
        row[0], row[at:] = end - 1, end
    return ids


def state(model: keymaps.Config, seed: int = 0, layout: str = "bfl") -> dict[str, np.ndarray]:
    """Random weights in a foreign layout; none is 0 or 1 throughout, so that none can be mistaken for another."""
    draw = np.random.default_rng(seed).standard_normal
    tensors = {}
    for key, shape in sorted(keymaps.expected(model, layout).items()):
        mean = 1 if len(shape) == 1 and not key.endswith("bias") else 0  # the scale of a norm
        std = 0.3 if len(shape) == 1 else np.prod(shape[1:]) ** -0.5
        tensors[key] = (mean + std * draw(shape)).astype(np.float32)
    return tensors


def inputs(model: acejax.MMDiTConfig, guidance: float = 3.5, seed: int = 1) -> acejax.Tokens:
    """A batch on a non-square canvas; the samples differ in everything, sigma included."""
    draw = np.random.default_rng(seed).standard_normal

    def normal(*shape):
        return draw((BATCH, *shape)).astype(np.float32)

    grid = np.array(acejax.lcu.positions(2 * ROWS, 2 * COLUMNS))
    return acejax.Tokens(
        image=normal(ROWS * COLUMNS, model.in_channels), positions=np.tile(grid, (BATCH, 1, 1)),
        text=normal(TEXT, model.context_in_dim), pooled=normal(model.vec_in_dim),
        sigma=np.array([0.25, 0.8], np.float32), guidance=np.full(BATCH, guidance, np.float32))


def pictures_and_latents(rows: int = 3, columns: int = 5, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Two pictures [B, 8 rows, 8 columns, 3] in [-1, 1] and latents [B, rows, columns, 16] of no picture."""
    rng = np.random.default_rng(seed)
    pictures = rng.uniform(-1, 1, (BATCH, 8 * rows, 8 * columns, 3))
    return pictures.astype(np.float32), rng.standard_normal((BATCH, rows, columns, 16)).astype(np.float32)
