"""`acejax convert SRC DST --to LAYOUT`: weights from one format to another, with a report that nothing was lost."""

import argparse
import collections
import dataclasses
import json
import math
import pathlib
import re
import shutil
import sys

import ml_dtypes
import numpy as np
from tqdm import tqdm

from acejax.errors import UserError
from acejax.model.config import MMDiTConfig
from acejax.weights import convert, hub, identify, keymaps, lora_formats, pickles, save
from acejax.weights.convert import Report
from acejax.weights.convert_lora import convert_lora
from acejax.weights.identify import Model
from acejax.weights.source import PICKLES, exists, open_source, shown

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16,
          "float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2}
GROW = {str(value): value for value in identify.GROW}
# a folder of a diffusers pipeline -> the file that BFL and ComfyUI call it
FILES = {"transformer": "flux.safetensors", "vae": "ae.safetensors", "text_encoder": "clip_l.safetensors",
         "text_encoder_2": "t5xxl.safetensors"}
ORBAX_COPIES = 3.3  # of the tree, in memory at once while Orbax saves it and while it is read back


def main(argv: list[str]) -> int:
    """Convert and print the report; 1 when NaN or infinity is in the weights.

    Raises:
      UserError: whatever is wrong with the source, the flags or the target; nothing is left half-written.
    """
    args = _parser().parse_args(argv)
    target = pathlib.Path(args.target)
    if exists(target):
        raise UserError(f"{target}: is there already; give another place, nothing is overwritten")
    if args.json and not exists(pathlib.Path(args.json).absolute().parent):
        raise UserError(f"--json={args.json}: its folder is not there")
    path = hub.fetch(args.source) if hub.looks_like_id(args.source) else pathlib.Path(args.source)
    whole = identify.pipeline(path)
    reports = _convert_pipeline(path, whole, target, args) if whole else [_convert(path, target, args)]
    print("\n\n".join(map(table, reports)))
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps([report.to_json() for report in reports], indent=2) + "\n")
    return int(any(report.not_finite for report in reports))


def table(report: Report) -> str:
    """The report for people; `--json` has every tensor."""
    written = collections.Counter(f"{row.stored} to {row.dtype}" if row.stored != row.dtype else row.dtype
                                  for row in report.rows)
    dtypes = ", ".join(f"{count} {name}" for name, count in written.items())
    more = f" and {len(report.files) - 1} more" if len(report.files) > 1 else ""
    lines = {
        "source": f"{report.source}: {report.model}, {report.found}",
        "target": f"{report.files[0]}{more}: {report.written}{_prefixed(report)}",
        "used": f"{report.used} tensors, each exactly once; {len(report.twins)} repeat another",
        "not needed": _names(report.ignored),
        "left over": _names(report.left_over),
        "written": f"{len(report.rows)} tensors, all filled: {dtypes}",
        "change": f"{report.change:g} at most, by the conversion of dtype; {sum(row.zeros for row in report.rows):,} "
                  "numbers became 0",
        "NaN or Inf": _names(report.not_finite),
        "back again": f"{report.exact} of {report.used} tensors bit for bit"}
    return "\n".join(f"{name:<11} {text}" for name, text in lines.items())


def _prefixed(report: Report) -> str:
    return f", under {keymaps.COMFY}" if report.rows[0].key.startswith(keymaps.COMFY) else ""


def _names(keys: tuple[str, ...]) -> str:
    more = " ..." if len(keys) > 3 else ""
    return f"{len(keys)}: {', '.join(map(shown, keys[:3]))}{more}" if keys else "none"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="acejax convert", description="Convert weights of FLUX and ACE++ (transformer, autoencoder, text "
        "encoders, LoRA, or a whole diffusers pipeline) and verify what was written.")
    parser.add_argument("source", metavar="SRC", help="a safetensors file, an index of shards, a folder, a diffusers "
                        "pipeline, an Orbax folder or workdir, a PyTorch file (needs torch), or a hub id "
                        "OWNER/NAME[/FILE]")
    parser.add_argument("target", metavar="DST", help="a .safetensors file, or a folder (diffusers, orbax, pipelines)")
    parser.add_argument("--to", required=True, choices=("bfl", "comfy", "diffusers", "orbax"))
    parser.add_argument("--dtype", choices=DTYPES, help="what to store; each tensor's own by default")
    parser.add_argument("--grow", choices=GROW, help="widen img_in to 384 or 448 channels, the "
                        "velocity unchanged; 'reference' widens to 448 with the mask shifted, as ACE_plus does")
    parser.add_argument("--allow-extra", action="store_true", help="leave tensors alone that the model does not have")
    parser.add_argument("--raw", action="store_true", help="of a workdir whose run averages its parameters, take those "
                        "of its last step instead")
    parser.add_argument("--json", metavar="FILE", help="write the report there, with every tensor")
    return parser


def _convert_pipeline(source: pathlib.Path, parts: dict[str, pathlib.Path], target: pathlib.Path,
                      args: argparse.Namespace) -> list[Report]:
    """Each model of a pipeline, all of them or none; as diffusers' again with what else it is made of."""
    folders = args.to in ("diffusers", "orbax")
    others = argparse.Namespace(**vars(args) | {"grow": None})  # only the transformer grows
    with save.beside(target) as place:
        place.mkdir()
        reports = [_convert(part, place / (name if folders else FILES[name]), args if name == "transformer" else others)
                   for name, part in parts.items()]
        if args.to == "diffusers":  # tokenizers, scheduler, model_index.json
            for other in source.iterdir():
                if other.is_dir() and other.name not in parts:
                    shutil.copytree(other, place / other.name)
                elif other.suffix == ".json":
                    shutil.copy(other, place)
    return [dataclasses.replace(report, files=tuple(
        str(target / pathlib.Path(file).relative_to(place)) for file in report.files)) for report in reports]


def _convert(path: pathlib.Path, target: pathlib.Path, args: argparse.Namespace) -> Report:
    grow = GROW.get(args.grow)
    if exists(path / "model.json") or exists(path / "config.json") and exists(path / "checkpoints"):
        from acejax import checkpoint  # Orbax takes a second to import

        model = convert.of_tree(path, *checkpoint.load_weights(path, ema=not args.raw))
        return _convert_model(identify.grown(model, grow) if grow else model, target, args)
    found = pickles.open_pickle(path) if path.suffix in PICKLES else open_source(path)
    if lora_formats.is_lora(found.tensors):
        if args.to not in lora_formats.LAYOUTS or target.suffix != ".safetensors" or grow:
            raise UserError(f"{path}: found a LoRA; expected --to {' or '.join(lora_formats.LAYOUTS)}, a .safetensors "
                            "file as the target, and no --grow")
        return convert_lora(path, target, args.to, MMDiTConfig.flux_fill(), DTYPES.get(args.dtype))
    return _convert_model(identify.identify(found, grow=grow, allow_extra=args.allow_extra), target, args)


def _convert_model(model: Model, target: pathlib.Path, args: argparse.Namespace) -> Report:
    dtype = DTYPES.get(args.dtype)
    if args.to == "orbax" and target.suffix == ".safetensors":
        raise UserError(f"{target}: expected the name of a folder for --to orbax")
    if args.to == "orbax":
        return _to_orbax(model, target, dtype)
    known = list(keymaps.layouts_of(model.config))
    if args.to == "diffusers" or target.suffix == ".safetensors":
        layout = args.to if args.to in known else known[0]
    else:
        raise UserError(f"{target}: expected a name that ends in .safetensors for --to {args.to}")
    prefix = keymaps.COMFY if args.to == "comfy" and isinstance(model.config, MMDiTConfig) else None
    total = 2 * sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in model.tensors.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc=target.name, disable=not sys.stderr.isatty()) as bar:
        return convert.convert(model, target, layout, dtype, prefix, bar.update)


def _to_orbax(model: Model, target: pathlib.Path, dtype: np.dtype | None) -> Report:
    """The tree through memory into an Orbax folder; the report compares what comes back."""
    size = sum(math.prod(tensor.shape) * np.dtype(dtype or tensor.dtype).itemsize for tensor in model.tensors.values())
    free = _free_memory()
    if free is not None and ORBAX_COPIES * size > free:
        raise UserError(f"{target}: an Orbax folder is made in memory and needs {ORBAX_COPIES * size / 1e9:.1f} GB; "
                        f"{free / 1e9:.1f} GB are free. acejax reads safetensors everywhere: convert to bfl instead, "
                        "or run this on a larger machine")
    if dtype is None and any(tensor.dtype == np.float64 for tensor in model.tensors.values()):
        raise UserError(f"{model.path}: is stored in float64, which jax does not keep; give a --dtype")
    from acejax import checkpoint
    from acejax.weights import load

    with save.beside(target) as place:
        checkpoint.save_weights(place, model.config, load.load(model, dtype=dtype)[1])
        report = convert.compare(model, convert.of_tree(place, *checkpoint.load_weights(place)), dtype)
    return dataclasses.replace(report, written="orbax", files=(str(target),))


def _free_memory() -> int | None:
    """Bytes that this process may still take, by the machine and by its cgroup; None where neither says."""
    found = re.search(r"MemAvailable:\s+(\d+)", _read("/proc/meminfo"))
    limit, used = (_read(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    free = [1024 * int(found[1])] if found else []
    free += [int(limit) - int(used)] if limit.isdigit() and used.isdigit() else []
    return min(free, default=None)


def _read(path: str) -> str:
    try:
        return pathlib.Path(path).read_text()
    except OSError:
        return ""
