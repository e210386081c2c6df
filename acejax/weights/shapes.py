"""The leaves of the transformer's tree by arithmetic: what `mmdit.init` makes, without jax.

Conversion needs the shapes of a model and nothing else of it, and jax takes longer to import and to trace `init` than
a gigabyte takes to copy. The tests hold this table against `init`.
"""

from acejax.model.config import MMDiTConfig

Shape = tuple[int, ...]
TIME_CHANNELS = 256  # of the embedding of a time or a guidance scale


def transformer(config: MMDiTConfig) -> dict[str, Shape]:
    """Our path -> shape, for every leaf."""
    hidden = config.hidden_size
    leaves = _linear("img_in", (), config.in_channels, hidden) | _linear("txt_in", (), config.context_in_dim, hidden)
    embedded = {"time_in": TIME_CHANNELS, "vector_in": config.vec_in_dim, "guidance_in": TIME_CHANNELS}
    for name, channels in embedded.items():
        if name != "guidance_in" or config.guidance_embed:
            leaves |= _linear(f"{name}/in_layer", (), channels, hidden)
            leaves |= _linear(f"{name}/out_layer", (), hidden, hidden)
    for stream in ("double_blocks/img", "double_blocks/txt"):
        leaves |= _stream(config, stream, config.depth, modulations=6)
    leaves |= _stream(config, "single_blocks", config.depth_single_blocks, modulations=3)
    del leaves["single_blocks/mlp_out/bias"]  # BFL's linear2 has one bias: proj's
    return (leaves | _linear("final_layer/modulation", (), hidden, 2, hidden)
            | _linear("final_layer/linear", (), hidden, config.out_channels))


def _stream(config: MMDiTConfig, name: str, depth: int, modulations: int) -> dict[str, Shape]:
    """The stacked layers of one residual stream."""
    hidden, stack = config.hidden_size, (depth,)
    return (_linear(f"{name}/modulation", stack, hidden, modulations, hidden)
            | _linear(f"{name}/qkv", stack, hidden, 3, config.num_heads, config.head_dim)
            | {f"{name}/{norm}/scale": (depth, config.head_dim) for norm in ("query_norm", "key_norm")}
            | _linear(f"{name}/proj", stack, hidden, hidden)
            | _linear(f"{name}/mlp_in", stack, hidden, config.mlp_size)
            | _linear(f"{name}/mlp_out", stack, config.mlp_size, hidden))


def _linear(name: str, stack: Shape, inputs: int, *features: int) -> dict[str, Shape]:
    return {f"{name}/kernel": (*stack, inputs, *features), f"{name}/bias": (*stack, *features)}
