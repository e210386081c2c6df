"""The flags of commands that several processes run together."""

from contextlib import AbstractContextManager

from absl import flags


def define_processes(values: flags.FlagValues) -> None:
    """Add the arguments of `acejax.parallel.processes.joined` as flags."""
    flags.DEFINE_string("coordinator", None, "HOST:PORT at which process 0 waits for the others. TPU pods, srun and "
                        "mpirun need none of these three.", flag_values=values)
    flags.DEFINE_integer("processes", None, "Processes that train together.", flag_values=values)
    flags.DEFINE_integer("process", None, "Which one this is, from 0.", flag_values=values)
    flags.DEFINE_float("patience", 300, "Seconds that all processes have for finding each other.", flag_values=values)
    flags.DEFINE_float("silence", 120, "Seconds without a sign of life after which a process is given up.",
                       flag_values=values)


def joined(values: flags.FlagValues) -> AbstractContextManager[None]:
    """`acejax.parallel.processes.joined` by these flags."""
    from acejax.parallel import processes

    names = ("coordinator", "processes", "process", "patience", "silence")
    return processes.joined(**{name: values[name].value for name in names})
