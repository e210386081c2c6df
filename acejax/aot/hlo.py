"""What a TPU's optimised program (HLO text) says of itself: cycles, kernels, collectives, the lines they come from.

The compiler writes its estimate of cycles into each fusion. Loops count as often as they run, of a branch the costlier
side. Pallas kernels carry no estimate (`acejax.aot.kernels` has theirs), nor does waiting for memory or for other
devices.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Iterator

BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s8": 1,
         "u8": 1, "pred": 1, "s4": 0.5, "u4": 0.5}
THROUGH = ("model/dense.py", "parallel/rules.py")  # lines that others call for: the caller tells more
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
PASSED_ON = ("get-tuple-element", "bitcast", "copy", "copy-start", "copy-done")  # the same values elsewhere
_SHAPE = re.compile(r"\b([a-z]+\d+(?:e\w+)?|pred)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*(?:/\*.*)?$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction with what all its calls cost.

    Attributes:
      name: of the instruction.
      shape: of its result, without layout.
      cycles: of all calls together.
      calls: how often it runs in a step.
      source: the line of acejax that it comes from, "file:line", or "" where the program does not tell.
      path: jax's name of it, the innermost last.
    """

    name: str
    shape: str
    cycles: int
    calls: int
    source: str
    path: str


@dataclasses.dataclass(frozen=True)
class Program:
    """A program's cost on one device.

    Attributes:
      operations: those with an estimate, the costliest first.
      kernels: calls of each Pallas kernel, by its signature: "name(shape, shape, ...)" of its operands.
      collectives: bytes by kind: of each collective the larger of what it takes and gives.
      zeros: bytes of all-reduces over a buffer of zeros that parts are written into, which stand for a gather.
    """

    operations: tuple[Operation, ...]
    kernels: dict[str, int]
    collectives: dict[str, float]
    zeros: float

    @property
    def cycles(self) -> int:
        """Outside kernels."""
        return sum(operation.cycles for operation in self.operations)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    kind: str
    rest: str

    @functools.cached_property
    def cycles(self) -> int:
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found[1]) if found else 0

    def attribute(self, name: str) -> str:
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""

    def operands(self) -> list[str]:
        """Names of its operands."""
        return _NAME.findall(self.rest.split("), ")[0])

    def branches(self) -> list[str]:
        found = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
        if found:
            return _NAME.findall(found[1])
        return [self.attribute(f"{side}_computation") for side in ("true", "false")]


def read(text: str, package: str = "acejax") -> Program:
    """Cost of an optimised program.

    Args:
      text: as `jax.stages.Compiled.as_text()` gives it.
      package: whose lines operations are traced to.
    """
    reader = _Reader(text, package)
    return reader.program(reader.entry)


def trip(text: str, layers: str, package: str = "acejax") -> Program:
    """Cost of one trip of the loop over a stack of layers; other arguments as of `read`.

    Args:
      layers: the stack's name in jax's paths, "single_blocks". Of several loops with such operations it is the one
        whose trip costs the most.

    Raises:
      KeyError: no loop of the program has any.
    """
    reader = _Reader(text, package)
    bodies = {instruction.attribute("body") for instruction, _, _ in reader.run(reader.entry, 1)
              if instruction.kind == "while"}
    found = [body for body in bodies if any(f"/{layers}/" in instruction.rest
                                            for instruction in reader.computations.get(body, ()))]
    if not found:
        raise KeyError(layers)
    return reader.program(max(found, key=reader.cost))


class _Reader:
    """The computations of a program by name."""

    def __init__(self, text: str, package: str):
        self.computations: dict[str, list[_Instruction]] = {}
        self.entry = ""
        self._costs: dict[str, int] = {}
        current: list[_Instruction] = []
        for line in text.splitlines():
            found = _INSTRUCTION.match(line)
            if found:
                current.append(_Instruction(*found.groups()))
            elif opened := _COMPUTATION.match(line):
                current = self.computations.setdefault(opened[2], [])
                self.entry = opened[2] if opened[1] else self.entry
        self._lines = _source_lines(text, package)

    def program(self, name: str) -> Program:
        """Of a computation and all that it calls."""
        operations, kernels, seen = [], collections.Counter(), set()
        moved, zeros = collections.Counter(), 0.0
        for instruction, calls, computation in self.run(name, 1):
            if instruction.cycles:
                operations.append(self.operation(instruction, calls))
            if "tpu_custom_call" in instruction.rest:
                kernels[_signature(instruction)] += calls
            for kind, size, of_zeros, channel in self.sent(instruction, computation):
                if channel and (channel, computation) in seen:  # one that goes on through several fusions
                    continue
                seen.add((channel, computation))
                moved[kind] += calls * size
                zeros += calls * of_zeros
        operations.sort(key=lambda operation: operation.cycles, reverse=True)
        return Program(tuple(operations), dict(kernels), dict(moved), zeros)

    def run(self, name: str, calls: int) -> Iterator[tuple[_Instruction, int, str]]:
        """(instruction, how often it runs, its computation) of a computation and all that it calls."""
        for instruction in self.computations.get(name, ()):
            yield instruction, calls, name
            if instruction.kind == "while":
                yield from self.run(instruction.attribute("body"), calls * self.trips(instruction))
            elif instruction.kind == "conditional":
                yield from self.run(max(instruction.branches(), key=self.cost), calls)
            elif instruction.kind in ("call", "call-start", "async-start"):  # v7x's SparseCores run the second kind
                yield from self.run(instruction.attribute("to_apply") or instruction.attribute("calls"), calls)

    def cost(self, name: str) -> int:
        """Cycles of one run of a computation."""
        if name not in self._costs:
            self._costs[name] = sum(calls * instruction.cycles for instruction, calls, _ in self.run(name, 1))
        return self._costs[name]

    def trips(self, loop: _Instruction) -> int:
        """How often a loop runs: as it says, or the only constant of its condition (loops count up from 0 by 1)."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
        if known:
            return int(known[1])
        constants = [instruction.rest for instruction in self.computations.get(loop.attribute("condition"), ())
                     if instruction.kind == "constant"]
        numbers = [int(found[1]) for found in (re.match(r"(\d+)\)", rest) for rest in constants) if found]
        return numbers[0] if len(numbers) == 1 else 1

    def sent(self, instruction: _Instruction, computation: str) -> list[tuple[str, float, float, str]]:
        """(kind, bytes, bytes of these that stand for a gather, channel) of a collective, also of one in a fusion."""
        kind = instruction.kind.removesuffix("-start")
        if kind in COLLECTIVES:
            return [(kind, self._size(instruction, computation), self._of_zeros(instruction, computation),
                     instruction.attribute("channel_id"))]
        if instruction.kind != "fusion":
            return []
        called = instruction.attribute("calls")
        found = []
        for inner in self.computations.get(called, ()):
            kind = inner.kind.removesuffix("-start")
            if kind in COLLECTIVES:
                kind = "reduce-scatter" if called.startswith("all-reduce-scatter") else kind
                found.append((kind, self._size(inner, called), self._of_zeros(inner, called),
                              inner.attribute("channel_id")))
        return found

    def _named(self, computation: str) -> dict[str, _Instruction]:
        return {instruction.name: instruction for instruction in self.computations[computation]}

    def _size(self, instruction: _Instruction, computation: str) -> float:
        named = self._named(computation)
        operands = [named[name].shape for name in instruction.operands() if name in named]
        taken = sum(map(_bytes, operands))
        given = _bytes(instruction.shape)
        if instruction.kind.endswith("-start"):  # gives its operands too
            given = max(given - taken, 0)
        return max(taken, given)

    def _of_zeros(self, instruction: _Instruction, computation: str) -> float:
        """Bytes of an all-reduce's operands that are buffers of zeros with a part written into them."""
        if instruction.kind.removesuffix("-start") != "all-reduce":
            return 0.0
        named = self._named(computation)
        return sum(_bytes(named[name].shape) for name in instruction.operands() if name in named
                   and self._written(named[name], computation))

    def _written(self, made: _Instruction, computation: str, item: int = 0) -> bool:
        """Whether a value is made by writing a part into another: itself, or the fusion that it comes from."""
        named = self._named(computation)
        if made.kind == "dynamic-update-slice":
            return True
        if made.kind == "fusion":
            called = made.attribute("calls")
            inner = self.computations.get(called, [])
            return bool(inner) and self._written(inner[-1], called, item)  # the root is the last
        if made.kind == "tuple":
            source = made.operands()[item:item + 1]
        elif made.kind in PASSED_ON:
            index = re.search(r"\bindex=(\d+)", made.rest) if made.kind == "get-tuple-element" else None
            item, source = int(index[1]) if index else item, made.operands()[:1]
        else:
            return False
        return bool(source) and source[0] in named and self._written(named[source[0]], computation, item)

    def operation(self, instruction: _Instruction, calls: int) -> Operation:
        frame = re.search(r"stack_frame_id=(\d+)", instruction.rest)
        path = re.search(r'op_name="([^"]*)"', instruction.rest)
        shape = re.sub(r"\{[^}]*\}", "", instruction.shape)
        return Operation(instruction.name, shape, calls * instruction.cycles, calls,
                         self._lines.get(frame[1], "") if frame else "", path[1] if path else "")


def instruction_of(text: str, signature: str) -> str:
    """The first instruction of a program that calls the kernel of a signature.

    Raises:
      KeyError: there is none.
    """
    for line in text.splitlines():
        found = _INSTRUCTION.match(line) if "tpu_custom_call" in line else None
        if found and _signature(_Instruction(*found.groups())) == signature:
            return found[1]
    raise KeyError(signature)


def _signature(kernel: _Instruction) -> str:
    """A Pallas kernel's name, as jax gave it, and the shapes of its operands."""
    name = re.sub(r"[.\d]+$", "", kernel.name).strip("_")
    for known in ("transpose_jvp_", "jvp_"):
        name = name.removeprefix(known).strip("_")
    operands = re.search(r"operand_layout_constraints=\{(.*?\})\}", kernel.rest)
    shapes = [f"{kind}[{size}]" for kind, size in _SHAPE.findall(operands[1])] if operands else []
    return f"{name}({', '.join(shapes)})"


def _bytes(shape: str) -> float:
    """Bytes of a shape, or of all in a tuple of them."""
    total = 0.0
    for kind, sizes in _SHAPE.findall(shape):
        count = 1
        for size in filter(None, sizes.split(",")):
            count *= int(size)
        total += count * BYTES.get(kind, 1)  # what is not named is a float8
    return total


def _source_lines(text: str, package: str) -> dict[str, str]:
    """By stack frame: the innermost line of the package, "model/mmdit.py:130", but for those in `THROUGH`."""
    tables: dict[str, dict[str, str]] = {}
    current = ""
    for line in text.splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            current = line
        elif not line.strip():
            current = current if tables.get(current) is None else ""
        elif current and (found := re.match(r"(\d+) (.*)", line)):
            tables.setdefault(current, {})[found[1]] = found[2]
        elif tables and line.startswith(("%", "ENTRY")):
            break
    places = {}
    for number, location in tables.get("FileLocations", {}).items():
        name = tables["FileNames"][re.search(r"file_name_id=(\d+)", location)[1]].strip('"')
        line = re.search(r"\bline=(\d+)", location)[1]
        inside = name.rpartition(f"/{package}/")[2] if f"/{package}/" in name else ""
        places[number] = f"{inside}:{line}" if inside and inside not in THROUGH else ""
    frames = {}
    for number, frame in tables.get("StackFrames", {}).items():
        location = re.search(r"file_location_id=(\d+)", frame)[1]
        parent = re.search(r"parent_frame_id=(\d+)", frame)  # counted from 1, where frames are counted from 0
        frames[number] = location, str(int(parent[1]) - 1) if parent else "0"
    lines = {}
    for number in frames:
        at = number
        while at in frames and not places.get(frames[at][0]):
            at = frames[at][1]
        lines[number] = places[frames[at][0]] if at in frames else ""
    return lines
