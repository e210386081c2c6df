"""`acejax serve`: the web page."""

import pathlib
import signal
import threading
from collections.abc import Sequence

from absl import flags

from acejax.cli.config import parse_flags
from acejax.cli.weight_flags import define_weights
from acejax.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Serve until Ctrl-C or SIGTERM."""
    values = parse_flags("serve", argv, _define)
    if values is None:
        return 0
    flag = {name: values[name].value for name in values}
    if not flag["demo"] and not flag["base"]:
        raise UserError("serve: add --demo to use the small weights that come with acejax, or give --base")
    import gradio  # noqa: F401 - its extra may be missing, which is told before weights are read

    from acejax.cli.edit_weights import lora, open_weights
    from acejax.edit.web import Site, serving
    from acejax.edit.web_form import Limits

    opened = open_weights(flag, [lora(text) for text in flag["lora"] or ()], None)
    about, examples = f"The weights: {opened.editor.profile.name}.", ()
    if flag["demo"]:
        from acejax.demo import examples as demo

        about, examples = demo.ABOUT, demo.examples()
    # What a visitor's file says of the server are names, not folders; an id of the hub is whole.
    kept = {name: pathlib.Path(value).name if isinstance(value, str) and pathlib.Path(value).exists() else value
            for name, value in opened.flags.items()}
    used = [file.__class__(file.field, pathlib.Path(file.path).name, file.checksum, file.scale)
            for file in opened.files]
    limits = Limits(flag["max_megabytes"], flag["max_megapixels"], waiting=flag["queue"])
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    with serving(Site(opened.editor, about, examples, limits, kept, used), flag["host"], flag["port"]) as address:
        print(f"acejax is at {address} (Ctrl-C ends it)", flush=True)
        stopped.wait()
    return 0


def _define(values: flags.FlagValues) -> None:
    def number(name, default, about, least, most):
        flags.DEFINE_integer(name, default, about, least, most, flag_values=values)

    define_weights(values)
    flags.DEFINE_string("host", "127.0.0.1", "The address to listen on; 0.0.0.0 lets other machines in, without a "
                        "password.", flag_values=values)
    number("port", 7860, "The port; 0: any that is free.", 0, 65535)
    number("max_megabytes", 20, "The largest file that can be uploaded.", 1, 1000)
    number("max_megapixels", 50, "The largest picture, given or made.", 1, 178)
    number("queue", 16, "Most edits that wait for their turn.", 1, 1000)
