"""`acejax plan`: what a run needs, before anything is downloaded, made or compiled."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from acejax import aot
from acejax.aot import compiler
from acejax.aot import table as report_table
from acejax.cli.config import parse_config
from acejax.data import written
from acejax.data.buckets import choose
from acejax.data.config import read_batches, read_stages
from acejax.data.layout import CanvasConfig
from acejax.data.stream import batch_sizes
from acejax.errors import UserError
from acejax.parallel import rules
from acejax.parallel.chips import CHIPS, Topology, topology
from acejax.parallel.mesh import abstract_mesh
from acejax.train import plan_data, saved
from acejax.train.config import TrainConfig
from acejax.train.plan import GB, Plan, plan, settled
from acejax.train.plan_advice import Spare, spare
from acejax.train.plan_compile import FLAGS, Compiled, Kinds, compile_for, compile_step
from acejax.train.plan_data import Samples
from acejax.train.plan_remat import using
from acejax.train.plan_run import whole
from acejax.train.plan_time import ASSUMED

CPU = {"JAX_PLATFORMS": "cpu"}
REFUSED = 2  # exit code of the other process for a user's mistake
OFF = 0.1  # the most that a plan may be off from what XLA says


def main(argv: Sequence[str]) -> int:
    """Plan a run; 1 where it does not fit, or is not what was compiled."""
    parsed = parse_config("plan", argv, _define)
    if parsed is None:
        return 0
    if jax.config.jax_platforms is None:
        jax.config.update("jax_platforms", "cpu")  # nothing runs here, and who trains beside it needs the accelerator
    values, config = parsed
    if values["topology"].value is None:
        raise UserError("plan: --topology=NAME is missing: h100x8, v5e-256, v5p-128, cpu:64 ...")
    written.check_place(path := values["json"].value)
    there = topology(values["topology"].value)
    if values["compile"].value and there.chip is not None:
        compiler.check(there)
    _check_save(values, there)
    run = TrainConfig.of(config)
    text = values["text"].value or config.get("encoders", {}).get("text_length", 512)
    data, why = _data(config)
    kinds = _kinds(values, config, data, why) if values["save"].value else None
    buckets = _buckets(run, config, there, values["tokens"].value, values["samples"].value, data,
                       bool(values["save"].value))
    run = settled(run, buckets, text, there.chip, there.devices, there.slices)
    found = plan(run, buckets, text, there.chip, there.devices, values["efficiency"].value, there.slices)
    total = whole(run, found, there.chips, data, why, values["price"].value, config.get("cache", {}).get("variants", 1))
    left = spare(run, found, buckets)
    print("\n\n".join(filter(None, (found.table(), total.table(), _left(found, left)))), flush=True)
    if run.execution.int8_products:
        print("products in int8 are not counted: seconds are those of products in the activations' dtype", flush=True)
    report = {"topology": dataclasses.asdict(there), "plan": found.to_json(), "run": dataclasses.asdict(total),
              "spare": [dataclasses.asdict(use) for use in left]}
    good = found.fits
    if values["compile"].value:
        if there.chip is None:
            made = Compiled(**_in_child(argv, found, CPU | {"XLA_FLAGS": _virtual(there.devices)}))
            good = _compare(found, made) and good
            report["compiled"] = dataclasses.asdict(made)
        else:
            report["compiled"] = _in_child(argv, found, aot.ENVIRONMENT, kinds)
            print(report_table.table(report["compiled"], found.largest), flush=True)
            if kinds:
                print(_saved(values["save"].value, found, kinds), flush=True)
            good = report["compiled"]["peak"] <= there.chip.limit and good
    if path:
        written.write(path, (json.dumps(report, indent=1) + "\n").encode())
    return 0 if good else 1


def _data(config: Any) -> tuple[Samples | None, str]:
    """The run's own samples, or why they are not known: a plan is made without them as well."""
    if "sources" not in config.get("data", {}):
        return None, ""
    try:
        return plan_data.find(config), ""
    except UserError as error:
        return None, str(error)


def _check_save(values: flags.FlagValues, there: Topology) -> None:
    """What can be wrong with --save before anything is compiled."""
    if not (save := values["save"].value):
        if given := [name for name in ("tasks", "references") if values[name].present]:
            raise UserError(f"plan: --{given[0]} is of the step that --save=FILE writes, and there is no --save")
        return
    if not values["compile"].value or there.chip is None:
        raise UserError(f"plan: --save={save} goes with --compile and a TPU's topology, here is {there.name}; on CPUs "
                        "and GPUs `acejax train --executables=FOLDER` saves what it compiles")
    if not save.endswith(saved.SUFFIX):
        raise UserError(f"plan: --save={save}: expected a name that ends in {saved.SUFFIX}, which `acejax train "
                        "--executables=FOLDER` looks for")
    written.check_place(save, "--save")


def _kinds(values: flags.FlagValues, config: Any, data: Samples | None, why: str) -> Kinds:
    """What the step to save depends on of the data: as given, else as the data has it."""
    known = None if data is None else data.kinds
    tasks, references = values["tasks"].value, values["references"].value
    if known is None and (tasks is None or references is None):
        raise UserError("plan: --save needs the data's tasks and references, which are not known ("
                        f"{why or 'no sources'}); give --tasks=N and --references=N, the most of a sample")
    return Kinds(max(count for _, count in known) if references is None else references,
                 len({task for task, _ in known}) if tasks is None else tasks,
                 config.data.get("canvas", {}).get("split", CanvasConfig.split),
                 config.get("cache", {}).get("dtype", Kinds.dtype))


def _saved(path: str, found: Plan, kinds: Kinds) -> str:
    step, header = found.largest, saved.read(path)
    return (f"saved to {path}: {header.size / 1e6:.1f} MB, the step of {step.samples} samples of {step.image}+"
            f"{found.text} tokens, {kinds.references} references at most, {kinds.tasks} tasks; `acejax train "
            "--executables` takes it where all else is the same (no chip has loaded one yet)")


def _left(found: Plan, left: Sequence[Spare]) -> str:
    """What to do with memory that is left over."""
    if not left:
        return ""
    over = (found.capacity - found.largest.memory.total) / GB
    return "\n".join([f"{over:.1f} GB of a device are left over; what fits as well (one of them, by estimate):",
                      *(f"  {use}" for use in left)])


def _buckets(run: TrainConfig, config: Any, there: Topology, tokens: int, samples: int, known: Samples | None,
             save: bool) -> dict[int, int]:
    """Samples of a batch by image tokens: those given, those that training would choose for the data that is known, or
    the greatest that the config allows.

    A canvas whose pictures have a budget each holds a reference as large as the target; more references make more.
    """
    mesh = abstract_mesh(run.mesh, there.devices)
    parts = rules.batch_parts(mesh, run.optimizer.accumulate)
    if tokens and save and not samples and "batch_tokens" in config.data:
        return batch_sizes([tokens], config.data.batch_tokens, parts)  # as the run that is to find it
    if tokens:
        return {tokens: samples or parts}
    if samples:
        raise UserError("plan: --samples needs --tokens")
    data = config.data
    if data.get("batch_sizes"):
        return {image: count for image, count in data.batch_sizes}
    if "batch_tokens" not in data:
        raise UserError("config.data has neither batch_sizes nor batch_tokens; plan --tokens=N can do without them")
    if known is not None and known.tokens is not None:
        batches = read_batches(data, ("sources", "canvas", "augment", "max_broken"))
        chosen = choose(known.tokens, batches.bucket_multiple, batches.most_buckets)
        return batch_sizes(chosen, data.batch_tokens, parts)
    canvas = data.get("canvas", {})
    picture = canvas.get("max_tokens", CanvasConfig.max_tokens)
    stages = read_stages(config, tuple(data.get("sources", ()))) if "stages" in config else ()
    references = any(stage.references != 0 for stage in stages)
    pictures = 2 if references and canvas.get("budget", CanvasConfig.budget) == "picture" else 1
    return batch_sizes(sorted({picture, pictures * picture}), data.batch_tokens, parts)


def _in_child(argv: Sequence[str], found: Plan, environment: dict[str, str], kinds: Kinds | None = None
              ) -> dict[str, Any]:
    """The largest step, compiled by another process: what jax compiles for is settled before it starts."""
    where = "virtual CPU devices" if found.chip is None else found.chip.name
    print(f"\ncompiling the step for {found.devices} {where} ...", flush=True)
    step = [kinds and dataclasses.asdict(kinds), found.remat, found.largest.samples, found.largest.image, found.text]
    child = subprocess.run([sys.executable, "-m", "acejax.cli.plan", json.dumps(step), *argv],
                           env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=False)
    told = json.loads(child.stdout.splitlines()[-1]) if child.returncode in (0, REFUSED) else {}
    if child.returncode:
        raise UserError("plan: " + told.get("error", f"the step did not compile (exit code {child.returncode}); the "
                                                     "lines above tell why"))
    return told


def _virtual(devices: int) -> str:
    return f"--xla_force_host_platform_device_count={devices} {FLAGS}"


def _child(step: str, argv: Sequence[str]) -> None:
    """The other process of `_in_child`: prints what it found as the last line, or the error."""
    values, config = parse_config("plan", argv, _define)
    there, (kinds, remat, *sizes) = topology(values["topology"].value), json.loads(step)
    run = using(TrainConfig.of(config), remat)
    if there.chip is None:
        print(json.dumps(dataclasses.asdict(compile_step(run, *sizes))))
    else:
        report = compile_for(run, there, *sizes, kinds=kinds and Kinds(**kinds), save=values["save"].value)
        print(json.dumps(report.to_json()))


def _compare(modelled: Plan, made: Compiled) -> bool:
    held = modelled.largest.memory
    off = held.total / (made.arguments + made.temporaries) - 1
    print(f"XLA says {made.arguments / GB:.3f} GB given + {made.temporaries / GB:.3f} beside ({made.seconds:.0f} s); "
          f"the plan for this backend {held.arguments / GB:.3f} + {held.temporaries / GB:.3f}: {off:+.1%}")
    wrong = [f"the plan is off by more than {OFF:.0%}"] if abs(off) > OFF else []
    wrong += [f"a whole stack is gathered at once: {', '.join(made.stack_gathers)}"] if made.stack_gathers else []
    wrong += [f"gradients are reduced more than once: {', '.join(made.repeated_reductions)}"
              ] if made.repeated_reductions else []
    print("\n".join(wrong) or "no gather of a whole stack, one reduction for each gradient")
    return not wrong


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("topology", None, "Devices to plan for: CHIPxN, a slice as v5e-256, v5p-128 (64 chips) or "
                        "v7x-64 (32 chips, 64 devices), several slices as v5e-256x2, or cpu:N; the chips are "
                        f"{', '.join(CHIPS)}.", flag_values=values)
    flags.DEFINE_float("price", None, "Of a chip-hour, in any currency: the run's price is told.", lower_bound=0.0,
                       flag_values=values)
    flags.DEFINE_float("efficiency", None, "Share of the chip's peak that matrix products reach; by default as the TPU "
                       f"compiler's cycles say of the chip, or {ASSUMED}, which is assumed.", flag_values=values)
    flags.DEFINE_integer("tokens", None, "Image tokens of a sample; by default as the config has it.", lower_bound=1,
                         flag_values=values)
    flags.DEFINE_integer("samples", None, "Samples of a batch of --tokens, over all devices; by default one a device.",
                         lower_bound=1, flag_values=values)
    flags.DEFINE_integer("text", None, "Text tokens of a sample; by default as the config has it.", lower_bound=1,
                         flag_values=values)
    flags.DEFINE_boolean("compile", False, "Ask the compiler: a TPU's own, with libtpu (make aot), or XLA's for "
                         "virtual devices of cpu:N.",
                         flag_values=values)
    flags.DEFINE_string("save", None, "With --compile, for a TPU: a file, on gs:// too, that gets the compiled step "
                        "for `acejax train --executables`. Its name ends in .executable.", flag_values=values)
    flags.DEFINE_integer("tasks", None, "Of the data, for --save; by default as the data has it.", lower_bound=1,
                         flag_values=values)
    flags.DEFINE_integer("references", None, "Likewise: the most of a sample.", lower_bound=0, flag_values=values)
    flags.DEFINE_string("json", None, "Where to write the plan as JSON.", flag_values=values)


if __name__ == "__main__":
    try:
        _child(sys.argv[1], sys.argv[2:])
    except UserError as error:
        print(json.dumps({"error": str(error)}))
        sys.exit(REFUSED)
