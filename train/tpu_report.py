"""Tables of what the TPU compiler says: `memzoo bench --tpu` and `memzoo compile`."""

from collections import defaultdict
from collections.abc import Sequence

from rich.table import Table

from ..pallas_kernels.tpu_bench import KERNELS, Estimate
from ..zoo.formats import binary, milliseconds, table, thousands
from .tpu_step import StepCost


def estimate_line(found: Estimate) -> str:
  """One line about one compiled operation."""
  what = f"{found.operation}{_with_kernels(found)}, {found.chip}, batch {found.shape.batch}, {found.direction}"
  if found.ns is None:
    return f"{what}: {found.problem}"
  return f"{what}: {found.ns:.1f} ns per token-head, {binary(found.temporary_bytes)} of temporaries"


def estimates_table(found: Sequence[Estimate]) -> Table:
  """A row for each operation, chip and batch."""
  rows: dict[tuple, dict[str, Estimate]] = defaultdict(dict)
  for each in found:
    rows[each.operation + _with_kernels(each), each.chip, each.shape.batch][each.direction] = each
  shape = found[0].shape
  shown = table(
    f"Estimated ns per token and head: {shape.length:,} tokens, {shape.heads} heads of {shape.key_dim}, {found[0].dtype}",
    ("operation", "chip", "batch", "forward", "roofline", "temporaries", "gradient", "roofline", "temporaries", "compile s"),
    words=2,
  )
  for (operation, chip, batch), directions in rows.items():
    cells = []
    for direction in ("forward", "gradient"):
      cells += _cells(directions.get(direction))
    seconds = sum(each.compile_seconds for each in directions.values())
    shown.add_row(operation, chip, str(batch), *cells, f"{seconds:.0f}")
  return shown


def kernels_table(found: Sequence[Estimate]) -> Table | None:
  """A row for each kernel of a program; `None` if there are none."""
  shown = table(
    "Kernels, static: bundles of instructions per token and head; shares of the slots of a step",
    ("operation", "chip", "batch", "kernel", "bundles", "matrix", "vector", "stores", "spills", "fast memory"),
    words=4,
  )
  for each in found:
    for kernel in each.kernels:
      shares = (f"{kernel.slots[slot]:.0%}" for slot in ("MATMUL", "VALU", "VSTORE", "VSTORE:SPILL"))
      place = each.operation, each.chip, str(each.shape.batch), kernel.name
      shown.add_row(*place, f"{kernel.bundles:.2f}", *shares, binary(kernel.vmem_bytes))
  return shown if shown.row_count else None


def _with_kernels(found: Estimate) -> str:
  return " (kernels)" if found.implementation == KERNELS else ""


def _cells(found: Estimate | None) -> tuple[str, str, str]:
  if found is None:
    return "", "", ""
  if found.ns is None:
    return "too large", f"{found.roofline_ns:.2f}", ""
  return f"{found.ns:.1f}", f"{found.roofline_ns:.2f}", binary(found.temporary_bytes)


def step_line(found: StepCost) -> str:
  """One line about one compiled step: memory, work and time."""
  cost, kernels = found.cost, found.cost.custom_calls["tpu_custom_call"]
  parts = (*found.held.items(), ("temporaries", cost.temporary_bytes))
  what = "" if found.sequences is None else f", a token of {found.sequences} sequences"
  floor = "" if found.sequences is None else f", at least {milliseconds(found.floor_seconds)} ms to read parameters and states"
  work = (
    f"{thousands(cost.flops, 'FLOPs')} in matrix products, {milliseconds(cost.seconds)} ms of arithmetic by the compiler's "
    f"estimate{f', both without {kernels} calls of kernels' if kernels else ''}"
  )
  if cost.unread:
    work = f"its work and what chips send are not known, because libtpu does not give the program's text ({cost.unread})"
  return (
    f"{_mesh(found)} on {found.topology}{what}: {binary(cost.peak_bytes)} of {binary(found.memory_bytes)} on each chip "
    f"({', '.join(f'{binary(size)} {name}' for name, size in parts)}), {work}{floor}; compiled in {found.compile_seconds:.0f} s"
  )


def traffic_table(steps: Sequence[StepCost]) -> Table:
  """The collectives of each step by place and kind."""
  shown = table("Collectives in a step, on each chip", ("mesh", "in", "kind", "executed", "size"), words=3)
  for step in steps:
    traffic = step.traffic()
    for (where, kind), (times, size) in traffic.items():
      shown.add_row(_mesh(step), where, kind, f"{times:,}", binary(size))
    if not traffic:
      shown.add_row(_mesh(step), "", "not known" if step.cost.unread else "none", "", "")
    shown.add_section()
  return shown


def _mesh(step: StepCost) -> str:
  return "x".join(map(str, step.mesh))
