"""`acejax data cache`: latents and text features of a run's data, computed once."""

from collections.abc import Sequence

from absl import flags

from acejax.cli.config import parse_config


def main(argv: Sequence[str]) -> int:
    """Encode what is not there yet; the same command again goes on where it was stopped, and tells what is there.

    Raises:
      UserError: as `acejax.data.config.DataConfig`, the sources, the encoders and `acejax.data.cache.build`.
    """
    parsed = parse_config("data cache", argv, _define)
    if parsed is None:
        return 0
    values, config = parsed
    from acejax.data import cache
    from acejax.data.config import DataConfig

    given = DataConfig.of(config, values["cache_dir"].value)
    sources = {name: source.open() for name, source in given.sources.items()}
    encoders = given.load_encoders()
    settings = given.settings(encoders)
    for name, source in sources.items():
        cache.build(source, settings[name], given.canvas, given.augment, encoders, given.cache, given.max_broken)
    return 0


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("cache_dir", None, "Where features are kept, instead of config.cache.dir.", flag_values=values)
