"""`acejax edit`: one edit, a manifest of them, or one made again from its result."""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from etils import epath

from acejax.cli.config import parse_flags
from acejax.cli.weight_flags import define_weights
from acejax.data import written
from acejax.errors import UserError

PICTURES = ("image", "mask", "reference", "control")
KEPT = ("task", "prompt", "size", "scale", "seed", "steps", "guidance", "step_cache", "measure_cache", "grow", "crop",
        "paste", "parity", "batch", "manifest", "overwrite", "warm_up", "json", "dtype", "eight_bits",
        "int8_products", "staged", "offload", "tile", "mesh")  # a record tells them


def main(argv: Sequence[str]) -> int:
    """Edit and write the results; 1 where an edit that was made again has other pixels."""
    start = time.time()
    values = parse_flags("edit", argv, _define)
    if values is None:
        return 0
    flag = {name: values[name].value for name in values}
    if flag["list_tasks"]:
        print(_tasks(flag["demo"], flag["weights"]))
        return 0
    from acejax.cli.edit_weights import lora, open_weights  # jax, for which --help need not wait

    loras = [lora(text) for text in flag["lora"] or ()]
    if flag["from"]:
        from acejax.cli.edit_again import again

        if said := [name for name in KEPT if values[name].present]:
            raise UserError(f"edit: --from makes an edit again as it was; --{said[0]} can't be given with it")
        moved = {name: flag[name] for name in ("image", "mask", "control", "weights", "base", "contour", "depth")}
        return again(flag["from"], flag["out"], moved | {"references": flag["reference"]}, loras)
    from acejax.cli.edit_run import check, run, warm_up
    from acejax.edit.request import Options

    _check_flags(flag)
    options = Options(**{field.name: flag[field.name] for field in dataclasses.fields(Options)})
    entries = _entries(flag)
    _check_report(flag, entries)
    if flag["warm_up"]:
        opened = open_weights(flag, loras, flag["parity"])
        count = warm_up(entries, check(entries, opened, options), opened, options, flag["batch"])
        print(f"compiled for {count} kind{'s' * (count > 1)} of edits in {time.time() - start:.1f} s; nothing written")
        return 0
    left = [entry for entry in entries if not entry.line or flag["overwrite"] or not epath.Path(entry.out).exists()]
    if len(left) < len(entries):
        print(f"{len(entries) - len(left)} of {len(entries)} are there already (--overwrite makes them again)")
    edits: list[dict[str, Any]] = []
    if left:
        opened = open_weights(flag, loras, flag["parity"])
        edits = run(left, check(left, opened, options), opened, options, flag["batch"])
    if flag["json"]:
        report = _about() | {"seconds": round(time.time() - start, 3), "edits": edits}
        written.write(flag["json"], (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode(
            errors="backslashreplace"))  # names that are no UTF-8
    return 0


def _check_flags(flag: Mapping[str, Any]) -> None:
    if not flag["demo"] and not flag["base"]:
        raise UserError("edit: add --demo to use the small weights that come with acejax, or --base=FOLDER of FLUX.1")
    if not flag["out"] and (flag["manifest"] or not flag["warm_up"]):
        raise UserError("edit: --out is missing")
    if flag["manifest"] and (given := [name for name in PICTURES if flag[name]]):
        raise UserError(f"edit: --{given[0]} with --manifest, whose lines name their pictures")
    if flag["warm_up"] and flag["json"]:
        raise UserError("edit: --json with --warm_up, which makes no edit to tell of")
    written.check_place(flag["json"])


def _check_report(flag: Mapping[str, Any], entries: Sequence[Any]) -> None:
    """Raises UserError where the report would take the place of another file of the edits."""
    from acejax.edit.manifest import place

    taken = [path for entry in entries for path in (entry.out, *(path for _, path in entry.inputs))]
    if flag["json"] and place(flag["json"]) in map(place, [*taken, *filter(None, [flag["manifest"]])]):
        raise UserError(f"--json={flag['json']} is a file of the edits themselves; expected another one")


def _entries(flag: Mapping[str, Any]) -> list[Any]:
    """The edits that are asked for."""
    from acejax.edit import manifest

    try:
        seeds = [int(seed) for seed in flag["seed"]]
    except ValueError:
        seeds = []
    if not seeds:
        raise UserError(f"--seed={','.join(flag['seed'])}: expected whole numbers, such as 7 or 0,1,2")
    if flag["manifest"]:
        defaults = {name: flag[name] for name in ("prompt", "task", "size", "scale") if flag[name] is not None}
        return manifest.read(flag["manifest"], flag["out"], defaults, seeds)
    out = flag["out"] or "warm_up.png"  # which is not written
    entry = manifest.Entry(out, flag["prompt"] or "", flag["task"], flag["image"], flag["mask"],
                           tuple(flag["reference"] or ()), flag["control"], flag["size"], flag["scale"])
    return manifest.seeded(entry, seeds)


def _about() -> dict[str, str]:
    import jax

    from acejax import __version__
    from acejax.edit.record import platform

    return {"acejax": __version__, "jax": jax.__version__, "platform": platform()}


def _tasks(demo: bool, weights: str | None) -> str:
    """The presets, and what each takes."""
    from acejax.edit.tasks import TASKS as tasks

    if demo:
        from acejax.demo.weights import SHIPPED, read_note, tasks_of

        tasks = tasks_of(read_note(weights or SHIPPED))
    lines = [f"{'task':<20}{'image':<10}{'mask':<10}{'references':<12}{'scale':<11}{'annotator':<11}{'LoRA':<15}"
             "what it does"]
    for name, task in tasks.items():
        least, most = task.references
        count = str(least) if least == most else f"{least} or more" if most is None else f"{least} to {most}"
        scale = f"{task.scale:g}" if demo or task.scale == task.lora_scale else f"{task.scale:g} / {task.lora_scale:g}"
        lines.append(f"{name:<20}{task.image:<10}{task.mask:<10}{count:<12}{scale:<11}{task.annotator:<11}"
                     f"{task.lora or 'none':<15}{task.about}")
    if not demo:
        lines += ["", "scale: how much of the area the model may not see, for 448 / for 384 channels; --demo lists the "
                      "tasks of the small weights"]
    return "\n".join(lines)


def _define(values: flags.FlagValues) -> None:
    def text(name, about, default=None):
        flags.DEFINE_string(name, default, about, flag_values=values)

    def switch(name, about):
        flags.DEFINE_boolean(name, False, about, flag_values=values)

    define_weights(values)
    text("prompt", "What to make, e.g. 'a red heart' or 'make it blue'.")
    text("task", "A preset (--list_tasks); by default what the inputs stand for.")
    switch("list_tasks", "List the presets and what each takes.")
    text("image", "The picture to edit, of any size; none: text to picture.")
    text("mask", "A mask of the picture's size, white where to generate.")
    flags.DEFINE_multi_string("reference", None, "A reference picture; may be given several times.",
                              flag_values=values)
    text("control", "A ready map (contours, depth, ...) of the picture's size, in place of the task's annotator.")
    text("size", "WIDTHxHEIGHT of the result: without a picture, for outpainting and super-resolution.")
    flags.DEFINE_float("scale", None, "Repainting scale, 0 to 1: how much of the area to change the model may not see; "
                       "by default the task's.", flag_values=values)
    flags.DEFINE_list("seed", ["0"], "Fixes the result. Several, as 0,1,2, give OUT-0.png, OUT-1.png, OUT-2.png.",
                      flag_values=values)
    flags.DEFINE_integer("steps", None, "Of the sampler; by default the weights'.", flag_values=values)
    flags.DEFINE_float("guidance", None, "Guidance scale; by default the weights'.", flag_values=values)
    flags.DEFINE_float("step_cache", None, "Leave the transformer's blocks out of steps that change little, the more "
                       "the greater it is (0.3); by default all steps are whole.", flag_values=values)
    switch("measure_cache", "Make each edit with whole steps, too, and tell how far --step_cache takes it from them.")
    flags.DEFINE_integer("grow", 0, "Make masks larger by so many pixels on all sides, where an edit looks cut.",
                         flag_values=values)
    text("crop", "mask: work on a window around the mask; none: on the whole picture; auto: around the mask with the "
         "small weights, and where the whole is too large.", "auto")
    text("paste", "feather: pixels outside the mask stay the picture's; changed: inside it too, where the model has "
         "changed nothing; off: the model's own; auto: changed with the small weights, feather with others.", "auto")
    text("parity", "reference: what ACE++'s released code would give.")
    flags.DEFINE_integer("batch", 4, "Most edits of equal size that are made at once.", 1, 64, flag_values=values)
    text("out", "The file to write; with --manifest a folder. A PNG keeps how it was made, for --from; JPEG and WebP "
         "do not.")
    text("manifest", "Edits as JSON lines; those whose result is there already are left out.")
    switch("overwrite", "With --manifest: make those again, too.")
    switch("warm_up", "Make what is asked for once and write nothing: programs are compiled when they are needed.")
    text("json", "Write what was done there: task, prompt, size, window, drift, tokens, notes, seconds.")
    text("from", "A PNG of acejax edit: verify its pictures, weights and LoRAs, make it again and compare (exit code "
         "1: other pixels). --image, --mask, --reference, --control, --weights, --base, --contour, --depth and --lora "
         "say where a file is now.")
