"""`acejax data cache`: latents and text features of a run's data, computed once."""

from collections.abc import Sequence

from absl import flags

from acejax.cli.config import parse_config


def main(argv: Sequence[str]) -> int:
    """Encode what is not there yet; the same command again goes on where it was stopped, and tells what is there.

    Raises:
      UserError: as `acejax.data.config.DataConfig`, the sources, the encoders and `acejax.data.cache.build.build`.
    """
    parsed = parse_config("data cache", argv, _define)
    if parsed is None:
        return 0
    values, config = parsed
    from acejax.data.config import DataConfig
    from acejax.data.inputs import make_features

    make_features(DataConfig.of(config, values["cache_dir"].value))
    return 0


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("cache_dir", None, "Where features are kept, instead of config.cache.dir.", flag_values=values)
