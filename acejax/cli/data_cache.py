"""`acejax data cache`: latents and text features of a run's data, computed once."""

import dataclasses
import json
from collections.abc import Sequence

from absl import flags

from acejax.cli.config import parse_config
from acejax.cli.processes import define_processes, joined
from acejax.data import written


def main(argv: Sequence[str]) -> int:
    """Encode what is not there yet; the same command again goes on where it was stopped, and tells what is there.

    Raises:
      UserError: as `acejax.data.config.DataConfig`, the sources, the encoders and `acejax.data.cache.build.build`.
    """
    parsed = parse_config("data cache", argv, _define)
    if parsed is None:
        return 0
    values, config = parsed
    report = values["json"].value
    written.check_place(report)
    from acejax.data.config import DataConfig
    from acejax.data.inputs import build_features
    from acejax.parallel.processes import is_first

    data = DataConfig.of(config, values["cache_dir"].value)
    with joined(values):
        made = [dataclasses.asdict(one) | {"index": str(one.index)}
                for one in build_features(data, recheck=values["recheck"].value)]
        if report and is_first():
            written.write(report, (json.dumps(made, indent=2, ensure_ascii=False) + "\n").encode())
    return 0


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("cache_dir", None, "Where features are kept, instead of config.cache.dir.", flag_values=values)
    flags.DEFINE_string("json", None, "A file for the counts, times and skipped samples of each source.",
                        flag_values=values)
    define_processes(values)
    flags.DEFINE_bool("recheck", False, "Read sources that have not changed, too: every picture is hashed again.",
                      flag_values=values)
