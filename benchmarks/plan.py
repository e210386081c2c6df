"""The closed-form plan of the 12B training step against XLA's `memory_analysis` of the compiled step.

ACE++ stage 2 at full size (448 channels, 512 text and 4,096 image tokens, one sample a device, chunked attention, full
remat, AdamW in float32) on virtual CPU devices, everything sharded over `fsdp`; nothing is executed.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import tempfile
from pathlib import Path

from acejax.cli import plan
from acejax.cli.config import folder
from acejax.data.written import check_place

DEVICES = (8, 64, 256)
TEMPORARIES = 5e9  # bytes a device, at most, on 256
GB = 1e9


def main(argv: list[str]) -> int:
    """Compile at each size; 1 where a plan is off by more than 10 %, or 256 devices need 5 GB of scratch."""
    parser = argparse.ArgumentParser(prog="acejax bench plan", description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=DEVICES)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args(argv)
    check_place(args.json)
    rows, good = [], True
    with tempfile.TemporaryDirectory() as scratch:
        for devices in args.devices:
            path = Path(scratch) / f"{devices}.json"
            flags = [f"--config={folder() / 'ace_plus.py'}", f"--topology=cpu:{devices}", "--tokens=4096", "--text=512",
                     "--config.execution.attention=xla_chunked", "--compile", f"--json={path}"]
            good = plan.main(flags) == 0 and good
            rows.append(row(devices, json.loads(path.read_text())))
    good = good and all(row["xla"]["temporaries GB"] < TEMPORARIES / GB for row in rows if row["devices"] == 256)
    if args.json:
        args.json.write_text(json.dumps({
            "command": "acejax bench plan", "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, virtual CPU devices",
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
            "rows": rows, "holds": good}, indent=1) + "\n")
    print("\ndevices  XLA arguments  temporaries  plan arguments  temporaries     off  compile s")
    for one in rows:
        xla, planned = one["xla"], one["plan"]
        print(f"{one['devices']:7} {xla['arguments GB']:14.3f} {xla['temporaries GB']:12.3f} "
              f"{planned['arguments GB']:15.3f} {planned['temporaries GB']:12.3f} {one['off']:+7.1%} "
              f"{one['compile seconds']:10.1f}")
    return 0 if good else 1


def row(devices: int, report: dict) -> dict:
    """One line of the result from `acejax plan --json`."""
    compiled, held = report["compiled"], report["modelled"]["steps"][0]["memory"]
    given = sum(held[name] for name in ("frozen", "parameters", "optimizer", "average", "batch"))
    planned, found = sum(held.values()), compiled["arguments"] + compiled["temporaries"]
    return {
        "devices": devices, "off": round(planned / found - 1, 4),
        "xla": {"arguments GB": compiled["arguments"] / GB, "temporaries GB": compiled["temporaries"] / GB},
        "plan": {"arguments GB": given / GB, "temporaries GB": (planned - given) / GB,
                 **{f"{name} GB": round(size / GB, 4) for name, size in held.items()}},
        "gathers of a whole stack": compiled["stack_gathers"],
        "gradients reduced more than once": compiled["repeated_reductions"],
        "compile seconds": round(compiled["seconds"], 1)}
