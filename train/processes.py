"""Several processes as one run: how they connect, which rows each reads, and how they agree.

Every process runs the same program, and all must take part in every collective. So an error or a signal in one process is
broadcast to all before any process acts on it.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def join(
  coordinator: str | None = None, processes: int | None = None, process: int | None = None, *, detect: bool = False
) -> None:
  """Joins the other processes of a run, and returns when all have joined. Call it before anything else that uses JAX.

  Args:
    coordinator: HOST:PORT of process 0.
    processes: number of processes.
    process: number of this process, from 0.
    detect: take missing values from SLURM, Open MPI, Kubernetes or the TPU's metadata. Without any argument there is one
      process, and nothing happens.

  Raises:
    ValueError: if one of the three is neither given nor detected, or they do not fit together.
  """
  given = (coordinator, processes, process)
  if not detect and all(value is None for value in given):
    return
  if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
    raise ValueError(f"--coordinator is {coordinator!r}; expected HOST:PORT, such as localhost:9911.")
  if processes is not None and process is not None and not 0 <= process < processes:
    raise ValueError(f"--process is {process} of --processes {processes}; expected 0 to {processes - 1}.")
  try:
    if not detect and None in given:
      raise ValueError(f"--coordinator {coordinator}, --processes {processes}, --process {process}")
    jax.distributed.initialize(*given, cluster_detection_method=None if detect else "deactivate")
  except (ValueError, TypeError) as error:
    raise ValueError(
      f"the processes of this run cannot connect ({' '.join(str(error).split())}); expected --coordinator "
      "HOST:PORT, --processes N and --process I for each, or --distributed under SLURM, Open MPI, Kubernetes or on a "
      "TPU pod."
    ) from None


@contextmanager
def together() -> Iterator[None]:
  """Stops all processes if one fails: an exception in one is raised there, and a `ValueError` in the others.

  The code inside must not wait for another process.
  """
  try:
    yield
  except Exception:
    any_process(True)
    raise
  if any_process(False):
    raise ValueError("another process failed; see its message.")


def any_process(flag: bool) -> bool:
  """Whether `flag` is true in any process. All processes must call it, and each waits for the others."""
  return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())


def check_equal(**values: str) -> None:
  """Raises `ValueError` in every process unless each of `values` is the same in all processes."""
  if jax.process_count() == 1:
    return
  digests = [hashlib.blake2b(value.encode(), digest_size=4).digest() for value in values.values()]
  numbers = multihost_utils.process_allgather(np.frombuffer(b"".join(digests), np.uint32))
  for name, column in zip(values, numbers.T, strict=True):
    others = np.flatnonzero(column != column[0])
    if others.size:
      raise ValueError(f"process {others[0]} has another {name} than process 0; expected the same for all.")


def row_share(sharding: NamedSharding, rows: int) -> tuple[int, int]:
  """The share of a batch's rows that this process needs, and the number of equal shares. (0, 1) is all rows.

  Processes that split matrix products, and not the batch, have the same share.

  Args:
    sharding: sharding of the batch's arrays.
    rows: number of rows of the global batch.

  Raises:
    ValueError: if the mesh has no device of this process, or the rows of its devices are not contiguous.
  """
  held = {index[0].indices(rows)[:2] for index in sharding.addressable_devices_indices_map((rows, 1)).values()}
  if not held:
    raise ValueError(
      f"MeshShape uses {sharding.mesh.size} devices, none of process {jax.process_index()}; expected a mesh over all "
      f"{jax.device_count()} devices."
    )
  first, last = min(start for start, _ in held), max(end for _, end in held)
  own = sum(end - start for start, end in held)
  if own != last - first or first % own:
    raise ValueError(
      f"the devices of process {jax.process_index()} hold rows that are not contiguous ({sorted(held)}); expected a mesh in "
      "which the devices of a process are neighbours along data and fsdp."
    )
  return first // own, rows // own


class Vote:
  """The largest number that any process passes at a step, without waiting for the others at that step.

  `vote(number)` returns the largest number of the call before; with one process, `number` itself.
  """

  # Not Orbax's `reached_preemption`: it sees SIGTERM but not Ctrl-C, and only in runs of several processes.

  def __init__(self, mesh: Mesh):
    self._mesh, self._last = mesh, None
    self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

  def __call__(self, number: int) -> int:
    if jax.process_count() == 1:
      return number
    own = np.full(len(self._mesh.local_devices), number, np.int32)
    sharding = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
    last, self._last = self._last, self._largest(jax.make_array_from_process_local_data(sharding, own))
    return 0 if last is None else int(last)
