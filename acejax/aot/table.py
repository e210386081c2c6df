"""A compiler's report in words."""

from collections.abc import Mapping
from typing import Any

from acejax.parallel.chips import topology

GB, MILLION = 1e9, 1e6


def table(report: Mapping[str, Any], step: Any = None) -> str:
    """The report (`acejax.aot.compiler.Report.to_json`) as lines.

    Args:
      report: the report.
      step: the plan of the same step, to stand beside it: `flops` of all devices' model, `memory.total`.
    """
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [f"the compiler for {report['topology']} says ({versions}; {report['compile_seconds']:.0f} s; estimates of "
             "one device, nothing was run):"]
    limit = f" of {report['limit'] / GB:.2f} that it takes" if report["limit"] else ""
    planned = ""
    if step:
        off = step.memory.total / report["peak"] - 1
        planned = f"; the plan says {step.memory.total / GB:.2f} ({off:+.1%})"
    lines.append(f"  peak memory      {report['peak'] / GB:9.2f} GB{limit}{planned}")
    if report.get("host"):
        lines.append(f"  of the host      {report['host'] / GB:9.2f} GB for each device")
    lines.append(f"  cycles           {report['total'] / MILLION:9.1f} million: {report['cycles'] / MILLION:.1f} "
                 f"outside kernels, {report['kernel_cycles'] / MILLION:.1f} in them")
    if report["seconds"]:
        lines.append(f"  seconds          {report['seconds']:9.3f} at {report['clock'] / GB:.2f} GHz, without waiting "
                     f"for memory or other devices{_mfu(report, step)}")
    for signature, kernel in sorted(report["kernels"].items()):
        name, _, rest = signature.partition("(")
        shape = rest.partition("]")[0] + "]"
        cycles = kernel["cycles"] / MILLION
        lines.append(f"  kernel           {kernel['calls']:5} x {cycles:7.3f} million  {name} {shape}")
    for kind, size in sorted(report["collectives"].items()):
        lines.append(f"  {kind:<17}{size / GB:9.3f} GB")
    if report["zero_gathers"] > MILLION:
        lines.append(f"  of all-reduce    {report['zero_gathers'] / GB:9.3f} GB stand for gathers")
    lines.append("  costliest operations, all their calls:")
    for operation in report["top"]:
        where = operation["source"] or "-"
        lines.append(f"    {operation['cycles'] / report['total']:6.1%} {operation['calls']:4} x "
                     f"{operation['cycles'] // operation['calls']:>10,}  {where:<24} {operation['shape'][:40]:<40} "
                     f"{operation['path'][-60:]}")
    return "\n".join(lines)


def _mfu(report: Mapping[str, Any], step: Any) -> str:
    """The share of the chips' peak that the model's FLOPs are in these seconds."""
    there = topology(report["topology"])
    if step is None or there.chip is None:
        return ""
    return f"; MFU {step.flops / (there.devices * there.chip.flops * report['seconds']):.1%}"
