"""`acejax data COMMAND ...`: from pictures to what training reads."""

import importlib

from acejax.errors import UserError

COMMANDS = {  # name: the module with its main(argv), and what it does
    "check": ("acejax.cli.data_check", "look through a manifest: faults by line, sizes, tokens, steps per epoch"),
    "build": ("acejax.cli.data_build", "write a manifest's samples as a TFDS dataset (array_record)"),
    "cache": ("acejax.cli.data_cache", "encode pictures and prompts once, for training to read"),
}


def main(argv: list[str]) -> int:
    """Run one of COMMANDS.

    Raises:
      UserError: no or an unknown command, or what the command raises.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        lines = [f"  {name:<8}{text}" for name, (_, text) in COMMANDS.items()]
        print("usage: acejax data COMMAND [options]\n\n" + "\n".join(lines)
              + "\n\nacejax data COMMAND --help tells the options.")
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        raise UserError(f"no command data {argv[0]!r}; the commands are {', '.join(COMMANDS)}")
    return importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:])
