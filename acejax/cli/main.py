"""`acejax COMMAND ...`: picks the command, and turns a user's mistake into one line and exit code 2."""

import errno
import importlib
import os
import sys

from absl import logging

from acejax import __version__
from acejax.cli import compiled
from acejax.errors import UserError

COMMANDS = {
    "demo": "train a tiny ACE++ on the built-in pictures and score its edits",
    "train": "train from a config: acejax train --config=FILE.py --workdir=DIR [--config.a.b=value]",
    "plan": "memory and time of a training run before it starts: acejax plan --config=FILE.py --topology=v5e-256",
    "edit": "edit a picture by instruction",
    "serve": "the editor as a web page: acejax serve --demo",
    "convert": "weights of FLUX and ACE++ from one format to another, verified",
    "data": "check pictures, build datasets, cache features",
    "bench": "measure speed and cost",
}
_EXTRAS = {"transformers": "text", "ftfy": "text", "optax": "train", "orbax": "train", "grain": "train",
           "tensorflow_datasets": "train", "tensorboardX": "train", "skimage": "demo",
           "matplotlib": "demo", "gcsfs": "gcs", "gradio": "web"}  # module: the extra that brings it

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # disks, which no program can mend


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 well, 1 a result below its thresholds or an edit that came out otherwise,
    2 a mistake in what was given, 75 training that was preempted (the same command goes on), 130 Ctrl-C, 141 nobody
    reads on.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(__version__)
        return 0
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8, nor a terminal
    try:
        if argv[0] not in COMMANDS:
            raise UserError(f"no command {argv[0]!r}; the commands are {', '.join(COMMANDS)}")
        compiled.keep()
        logging.set_verbosity(logging.FATAL)  # TFDS and Orbax speak of themselves at length, and raise besides
        command = importlib.import_module(f"acejax.cli.{argv[0]}")
        return command.main(argv[1:])
    except SystemExit as leaving:  # argparse, after --help or a wrong flag; a preempted run
        return int(leaving.code or 0)
    except KeyboardInterrupt:
        goes_on = "; the same command goes on from its last checkpoint" if argv[0] in ("demo", "train") else ""
        print(f"\nacejax: stopped{goes_on}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `acejax ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except UserError as error:
        print(f"acejax: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in _FULL:
            raise
        print(f"acejax: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        module = error.name or getattr(error.__cause__, "name", None)  # fsspec explains in an error of its own
        extra = _EXTRAS.get(module.partition(".")[0]) if module else None
        if extra is None:
            raise
        extra = {("demo", "train"): "demo", ("serve", "demo"): "web"}.get((argv[0], extra), extra)
        print(f"acejax: {argv[0]} needs {module}; install it with: pip install 'acejax[{extra}]', in a checkout "
              f"pip install '.[{extra}]'", file=sys.stderr)
        return 2


def _usage() -> str:
    lines = [f"  {name:<8}{text}" for name, text in COMMANDS.items()]
    return "usage: acejax COMMAND [options]\n\n" + "\n".join(lines) + "\n\nacejax COMMAND --help tells the options."


if __name__ == "__main__":
    sys.exit(main())
