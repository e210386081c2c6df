"""`acejax bench NAME`: the figures behind our claims, from the `benchmarks` folder of a checkout."""

import argparse
import importlib
import sys
from pathlib import Path

import acejax
from acejax.errors import UserError

CHECKOUT = Path(acejax.__file__).resolve().parent.parent
BENCHMARKS = {"concat": "conditions as channels against conditions as tokens: FLOPs and time of a denoiser step",
              "convert": "a verified conversion against a plain copy: speed and memory",
              "stages": "the two stages of training, from a text-to-image model, against skipping the first",
              "lora": "a LoRA and a QLoRA that teach the small weights what they lack, against a shuffled control",
              "rounding": "a full fine-tune at 1e-5 in bfloat16, rounded at random and to the nearest, against float32",
              "data": "the data path against Pillow's limit and a PyTorch DataLoader: pictures a second, memory",
              "gpu": "the 12B model on one GPU beside PyTorch: denoiser step, LoRA, QLoRA, fused full fine-tune",
              "tpu": "what the TPU compiler says of the 12B programs, against an older commit: cycles, memory",
              "startup": "first and second start of an edit and of a training run: seconds, programs compiled",
              "plan": "the plan of the 12B training step against XLA's own figures on 8, 64 and 256 virtual devices"}


def main(argv: list[str]) -> int:
    """Run one benchmark with its own flags; its exit code.

    Raises:
      UserError: an unknown benchmark, or no checkout around the package.
    """
    known = "\n".join(f"  {name:10}{line}" for name, line in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="acejax bench", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measure one figure, from a checkout of acejax.",
        epilog=f"benchmarks:\n{known}\n\n`acejax bench NAME --help` shows the flags of one.")
    parser.add_argument("name", metavar="NAME", help="one of the benchmarks below")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="flags of that benchmark")
    args = parser.parse_args(argv)

    if args.name not in BENCHMARKS:
        raise UserError(f"unknown benchmark {args.name!r}; known: {', '.join(BENCHMARKS)}")
    if not (CHECKOUT / "benchmarks" / f"{args.name}.py").is_file():
        raise UserError(f"benchmarks are not part of the installed package ({CHECKOUT / 'acejax'}): "
                        "run `acejax bench` in a checkout of the source")
    if str(CHECKOUT) not in sys.path:
        sys.path.insert(0, str(CHECKOUT))
    return importlib.import_module(f"benchmarks.{args.name}").main(args.flags)
