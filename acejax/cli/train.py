"""`acejax train`: train from a config."""

from collections.abc import Sequence

import ml_collections
from absl import flags

from acejax.cli.config import CPU_DEVICES, parse_config
from acejax.cli.processes import define_processes, joined
from acejax.errors import UserError
from acejax.workdir import agree, claim, claim_data, lock


def main(argv: Sequence[str]) -> int:
    """Train to the config's last step; the same command again resumes. 75 when the machine was wanted back before.

    With several processes, 69 when another one has failed.
    """
    parsed = parse_config("train", argv, _define)
    if parsed is None:
        return 0
    values, config = parsed
    workdir = values["workdir"].value
    if workdir is None:
        raise UserError("train: --workdir=DIR is missing")
    from acejax.parallel.mesh import split_cpu

    split_cpu(values["cpu_devices"].value)
    with joined(values), lock(workdir):
        _train(config, workdir, values["profile"].value, values["dump_hlo"].value, values["executables"].value)
    return 0


def _train(config: ml_collections.ConfigDict, workdir: str, profile: str, dump_hlo: str, executables: str) -> None:
    from acejax.parallel.processes import say
    from acejax.train import executables as steps
    from acejax.train import loop
    from acejax.train.decode import make_decode
    from acejax.train.profile import window_of
    from acejax.train.validate import HeldOut

    window_of(profile)  # what is wrong with it is said before anything is encoded
    if executables:
        steps.check(executables)

    if config.get("data", {}).get("source") == "demo":
        from acejax.demo import job
        _, _, stream, held_out = job.prepare(config, workdir)
    else:
        from acejax.data import inputs
        from acejax.data.config import DataConfig
        data = DataConfig.of(config)
        run, mesh = loop.check(config, workdir)
        inputs.check(data, mesh, run.optimizer.accumulate)
        agree(workdir, config.to_dict(), loop.FREE)
        features = inputs.make_features(data, model=run.model)
        claim(workdir, config.to_dict(), loop.FREE)  # what failed before this leaves nothing behind
        table, held_out, judge = features, None, run.validation
        if judge.every or judge.grid_every:
            table, held, prompt = inputs.make_held_out(data, features, judge.held, judge.sources, run.seed, run.model)
            held_out = HeldOut(held, make_decode(data.encoders) if judge.grid_every else None, prompt)
        claim_data(workdir, table.digest)  # with what is held out: that may not begin or end within a run
        stream = inputs.make_stream(data.stages, run.steps, data.batches, table, mesh, run.seed, data.max_broken,
                                    run.optimizer.accumulate)
    _, seconds = loop.train(config, workdir, stream, held_out=held_out, profile=profile, dump_hlo=dump_hlo,
                            executables=executables)
    say(f"trained to step {config.steps}: {', '.join(f'{name} {value:.0f} s' for name, value in seconds.items())}")


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("cpu_devices", CPU_DEVICES, "Devices that a CPU stands for; a result is repeated with the "
                         "same number.", flag_values=values)
    define_processes(values)
    flags.DEFINE_string("workdir", None, "Where checkpoints and metrics go.", flag_values=values)
    flags.DEFINE_string("profile", "", "START:STOP: trace these steps into WORKDIR/profile, for TensorBoard, XProf and "
                        "Perfetto.", flag_values=values)
    flags.DEFINE_string("executables", "", "A folder of compiled steps, which may be on gs://: those that are of this "
                        "run are used without compiling, others are compiled and saved there. Or a file that `acejax "
                        "plan --save` has written. They are programs: name none that you do not trust.",
                        flag_values=values)
    flags.DEFINE_string("dump_hlo", "", "A folder that gets each compiled step as XLA's text, and the memory it takes.",
                        flag_values=values)
