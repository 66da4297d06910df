"""Reads the text of an optimised HLO module: what is executed, how often, and what is multiplied and sent.

    module = parse(jax.jit(f).lower(x).compile().as_text())
    module.cycles()         # the compiler's estimate; only TPU modules have one
    module.flops()          # of matrix products
    module.collectives()    # all-reduce, all-gather, ...

The body of a loop counts once per iteration, nested loops included; of a conditional the most expensive branch counts.
`compiled.cost_analysis()` counts the body of a loop only once.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_ASSIGNMENT = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\]")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_NO_WORK = ("AllocateBuffer", "ConcatBitcast")  # custom calls
_PASSES = {"default": 1, "high": 3, "highest": 6}


class Instruction(NamedTuple):
  """One instruction: a line of the text.

  Attributes:
    name: unique in its computation.
    opcode: such as "fusion" or "all-gather-start".
    type: the result's type, such as "f32[8,128]{1,0}" or "(f32[8]{0}, s32[])".
    operands: names of the instructions that it reads; for a constant, its value.
    attributes: the rest of the line: called computations, metadata, the compiler's notes.
  """

  name: str
  opcode: str
  type: str
  operands: tuple[str, ...]
  attributes: str

  @property
  def op_name(self) -> str:
    """Where it comes from in the traced program, such as "jit(step)/blocks_0/mixer/dot_general"; "" if unknown."""
    return _search(r'op_name="([^"]*)"', self.attributes)

  @property
  def estimated_cycles(self) -> int:
    """The compiler's estimate; 0 where it gives none."""
    return int(_search(r'"estimated_cycles":"(\d+)"', self.attributes) or 0)

  @property
  def dtype(self) -> str:
    """The element type of the result, such as "bf16"; of a tuple, that of its first array."""
    return _ARRAY.search(self.type)[1]

  def called(self, *attributes: str) -> list[str]:
    """The computations that these attributes name."""
    found = (_search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes) for attribute in attributes)
    return [name for text in found for name in re.findall(r"[\w.\-]+", text)]


class Execution(NamedTuple):
  """An instruction in its computation, and how many times one run of the module executes it."""

  instruction: Instruction
  computation: str
  times: int


class Collective(NamedTuple):
  """A communication between chips.

  Attributes:
    kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all" or "collective-permute".
    times: number of executions.
    bytes: what a chip contributes or receives in one of them, whichever is more.
    op_name: see `Instruction`.
    files: the source files that it comes from, innermost call first.
  """

  kind: str
  times: int
  bytes: int
  op_name: str
  files: tuple[str, ...]


class Product(NamedTuple):
  """A matrix product.

  Attributes:
    left, right: dtypes of its operands.
    passes: the number of bfloat16 passes in which a TPU multiplies them.
    times: number of executions.
    op_name, files: as in `Collective`.
  """

  left: str
  right: str
  passes: int
  times: int
  op_name: str
  files: tuple[str, ...]


@dataclass(frozen=True)
class Module:
  """A parsed module.

  Attributes:
    computations: by name.
    entry: the name of the one that runs.
    files: source files by the number of a stack frame, innermost call first.
  """

  computations: dict[str, tuple[Instruction, ...]]
  entry: str
  files: dict[str, tuple[str, ...]]

  def cycles(self) -> int:
    """The sum of the compiler's estimates. It gives none for asynchronous copies and for custom calls."""
    return self._cycles(self.entry)

  def executions(self, *, fused: bool = True) -> Iterator[Execution]:
    """Every executed instruction, if `fused` also those inside fusions."""
    return self._walk(self.entry, 1, fused=fused)

  def trip_counts(self) -> list[int | None]:
    """How often each executed loop runs its body; `None` if unknown, and the body counts once."""
    return [self._trip_count(each.instruction) for each in self.executions() if each.instruction.opcode == "while"]

  def collectives(self) -> list[Collective]:
    """All communications between chips; an asynchronous one is one.

    A TPU also makes one in steps, beside the arithmetic of several fusions or of a loop. The steps have one channel and a
    "chain_id". The first is executed as often as the communication, others perhaps more often.
    """
    found, chains = [], {}
    for execution in self.executions():
      instruction, kind = execution.instruction, execution.instruction.opcode.removesuffix("-start")
      if kind in _COLLECTIVES:
        size = max(_received(instruction), sum(bytes_of(operand.type) for operand in self.operands(execution)))
        one = Collective(kind, execution.times, size, instruction.op_name, self._files(instruction))
        if "chain_id=" not in instruction.attributes:
          found.append(one)
          continue
        channel = _search(r"channel_id=(\d+)", instruction.attributes)
        chains[channel] = min(one, chains.get(channel, one), key=lambda step: step.times)
    return found + list(chains.values())

  def products(self) -> list[Product]:
    """All matrix products. A TPU's are convolutions."""
    found = []
    for execution in self._executed_products():
      instruction = execution.instruction
      left, right = (operand.dtype for operand in self.operands(execution))
      stated = _search(r"operand_precision=\{(\w+)", instruction.attributes) or "default"
      passes = _PASSES[stated] if "f32" in (left, right) else 1
      found.append(Product(left, right, passes, execution.times, instruction.op_name, self._files(instruction)))
    return found

  def flops(self) -> int:
    """FLOPs of the executed matrix products; a multiply-add counts as two."""
    return sum(each.times * _flops(each.instruction, *self.operands(each)) for each in self._executed_products())

  def custom_calls(self) -> Counter[str]:
    """The number of executed custom calls of each target: kernels and library routines."""
    found: Counter[str] = Counter()
    for instruction, _, times in self.executions():
      target = _search(r'custom_call_target="([^"]*)"', instruction.attributes)
      if instruction.opcode == "custom-call" and target not in _NO_WORK:
        found[target] += times
    return found

  def _executed_products(self) -> Iterator[Execution]:
    return (each for each in self.executions() if each.instruction.opcode in ("dot", "convolution"))

  def _cycles(self, computation: str) -> int:
    return sum(each.times * each.instruction.estimated_cycles for each in self._walk(computation, 1, fused=False))

  def _walk(self, computation: str, times: int, fused: bool) -> Iterator[Execution]:
    """The estimate of a fusion covers what is inside, which is therefore walked through only if `fused`."""
    for instruction in self.computations[computation]:
      yield Execution(instruction, computation, times)
      called, repeated = [], times
      match instruction.opcode:
        case "while":
          called, repeated = instruction.called("body"), times * (self._trip_count(instruction) or 1)
        case "conditional":
          branches = instruction.called("branch_computations", "true_computation", "false_computation")
          called = [max(branches, key=self._cycles)]
        case "call" | "async-start":
          called = instruction.called("to_apply", "calls")
        case "fusion" if fused:
          called = instruction.called("calls")
      for name in called:
        yield from self._walk(name, repeated, fused)

  def _trip_count(self, loop: Instruction) -> int | None:
    """What the compiler noted, or else the only integer in the loop's condition."""
    if noted := _search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
      return int(noted)
    (condition,) = loop.called("condition")
    constants = [each for each, _, _ in self._walk(condition, 1, fused=True) if each.opcode == "constant"]
    limits = [int(each.operands[0]) for each in constants if each.type.startswith("s32[]")]
    return limits[0] if len(limits) == 1 else None

  def _files(self, instruction: Instruction) -> tuple[str, ...]:
    return self.files.get(_search(r"stack_frame_id=(\d+)", instruction.attributes), ())

  def operands(self, execution: Execution) -> list[Instruction]:
    """The instructions that it reads; none for parameters and constants."""
    here = self._by_name[execution.computation]
    return [here[name] for name in execution.instruction.operands if name in here]

  @cached_property
  def _by_name(self) -> dict[str, dict[str, Instruction]]:
    return {name: {each.name: each for each in body} for name, body in self.computations.items()}


def parse(text: str) -> Module:
  """Parses the text of a module.

  Raises:
    ValueError: if the text has no computation called ENTRY.
  """
  computations: dict[str, tuple[Instruction, ...]] = {}
  name, entry, body = "", "", []
  lines = text.splitlines()
  for line in lines:
    if started := _COMPUTATION.match(line):
      name, body = started[2], []
      entry = name if started[1] else entry
    elif name and re.match(r"\}(?!\})", line):
      computations[name], name = tuple(_instruction(*each) for each in body), ""
    elif name and (assigned := _ASSIGNMENT.match(line)):
      body.append((assigned[1], line[assigned.end() :]))
    elif name and body:  # attributes of a kernel are on lines of their own
      body[-1] = body[-1][0], body[-1][1] + line
  if not entry:
    raise ValueError(f"text is {text[:60]!r}...; expected an HLO module, with a computation called ENTRY.")
  return Module(computations, entry, _files(lines))


def _files(lines: list[str]) -> dict[str, tuple[str, ...]]:
  """The files of every stack frame, from the tables before the first computation; none if the module lacks them."""
  tables: dict[str, dict[str, str]] = {name: {} for name in ("FileNames", "FileLocations", "StackFrames")}
  rows: dict[str, str] = {}
  for line in itertools.takewhile(lambda line: not _COMPUTATION.match(line), lines):
    rows = tables.get(line, {}) if line.isalpha() else rows
    number, _, rest = line.partition(" ")
    if number.isdigit():
      rows[number] = rest
  names, locations, frames = tables.values()
  parents = {frame: int(_search(r"parent_frame_id=(\d+)", row) or 0) for frame, row in frames.items()}
  none = parents.get("1")  # what the first frame, which has no parent, gives for it: parents are counted from there
  files: dict[str, tuple[str, ...]] = {}
  for frame, row in frames.items():  # parents come first
    location = locations[_search(r"file_location_id=(\d+)", row)]
    file = names[_search(r"file_name_id=(\d+)", location)].strip('"')
    files[frame] = (file, *files.get(str(parents[frame] - none), ()))
  return files


def _instruction(name: str, text: str) -> Instruction:
  """From "TYPE OPCODE(OPERANDS)ATTRIBUTES"; a tuple's type and a layout have parentheses too."""
  cut = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
  opening = text.index("(", cut)
  closing = _closing(text, opening)
  operands = text[opening + 1 : closing]
  names = re.findall(r"%([\w.\-]+)", operands) or [operands]
  return Instruction(name, text[cut:opening].strip(), text[:cut], tuple(names), text[closing + 1 :])


def _closing(text: str, opening: int) -> int:
  """The place of the parenthesis that closes the one at `opening`."""
  depth = 0
  for found in re.compile(r"[()]").finditer(text, opening):
    depth += 1 if found[0] == "(" else -1
    if not depth:
      return found.start()
  raise ValueError(f"a parenthesis is not closed in {text[:60]!r}...")


def _flops(product: Instruction, left: Instruction, right: Instruction) -> int:
  if product.opcode == "dot":
    contracted = _search(r"lhs_contracting_dims=\{([\d,]*)\}", product.attributes)
    axes = _shape(left)
    return 2 * math.prod(_shape(product)) * math.prod(axes[int(axis)] for axis in contracted.split(",") if axis)
  # A convolution labels each axis: b(atch), f(eatures), i(nput) and o(utput) features of the kernel, and 0, 1, ... for space.
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", product.attributes)
  shapes = zip(labels.groups(), (left, right, product), strict=True)
  inputs, kernel, outputs = (dict(zip(label, _shape(each), strict=True)) for label, each in shapes)
  window = dict(re.findall(r"(\w+)=([\dx_\-]+)", _search(r"window=\{([^}]*)\}", product.attributes)))
  taps = (_taps(axis, inputs, outputs, window) for axis in outputs if axis.isdigit())
  return 2 * outputs["b"] * outputs["f"] * kernel["i"] * math.prod(taps)


def _taps(axis: str, inputs: dict[str, int], outputs: dict[str, int], window: dict[str, str]) -> int:
  """Along one axis of space: how often a tap of the kernel meets an input, and neither padding nor a gap between inputs."""

  def option(name: str, default: str) -> str:
    return window[name].split("x")[int(axis)] if name in window else default

  size, stride, spread = (int(option(name, "1")) for name in ("size", "stride", "rhs_dilate"))
  gap, before = int(option("lhs_dilate", "1")), int(option("pad", "0_0").partition("_")[0])
  places = (i * stride + tap * spread - before for i in range(outputs[axis]) for tap in range(size))
  return sum(0 <= place <= (inputs[axis] - 1) * gap and place % gap == 0 for place in places)


def _shape(instruction: Instruction) -> list[int]:
  return [int(size) for size in _ARRAY.search(instruction.type)[2].split(",") if size]


def _received(instruction: Instruction) -> int:
  """Bytes of a collective's result. Some asynchronous ones return (operands, results, ...) where they start."""
  if instruction.opcode not in ("all-gather-start", "collective-permute-start"):
    return bytes_of(instruction.type)
  _, others = _first(instruction.type[1:-1])
  return bytes_of(_first(others)[0])


def _first(types: str) -> tuple[str, str]:
  """The first of several types, and the others."""
  cut = _closing(types, 0) + 1 if types.startswith("(") else (types + ", ").index(", ")
  return types[:cut], types[cut:].removeprefix(", ")


def bytes_of(shapes: str) -> int:
  """Bytes of all arrays in a type."""
  sizes = (_bits(dtype) * math.prod(map(int, filter(None, axes.split(",")))) for dtype, axes in _ARRAY.findall(shapes))
  return sum(sizes) // 8


def _bits(dtype: str) -> int:
  """Bits of an element: 16 of "bf16", 8 of "f8e4m3fn" and "pred"."""
  return int(_search(r"[a-z]+(\d+)", dtype) or 8)


def _search(pattern: str, text: str) -> str:
  found = re.search(pattern, text)
  return found[1] if found else ""
