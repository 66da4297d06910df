"""Several processes as one run: how they find each other, which rows each reads, and how they agree.

Every process runs the same program, and every collective must be met by all of them. So whatever one process alone may
come upon (a file that only it cannot read, a signal that only it gets) is told to the others before any acts on it.
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
  """Joins the other processes of a run; returns when all are there. Must come before anything else that JAX does.

  Args:
    coordinator: HOST:PORT where process 0 can be reached by all.
    processes: how many there are.
    process: the number of this one, from 0.
    detect: find out what is not given from SLURM, Open MPI, Kubernetes or the TPU's metadata. Where neither this nor
      anything else is given there is one process, and nothing happens.

  Raises:
    ValueError: if any of the three is neither given nor found out, or they do not go together.
  """
  given = (coordinator, processes, process)
  if not detect and all(value is None for value in given):
    return
  if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
    raise ValueError(f"--coordinator is {coordinator!r}; want HOST:PORT, such as localhost:9911.")
  if processes is not None and process is not None and not 0 <= process < processes:
    raise ValueError(f"--process is {process} of --processes {processes}; want 0 to {processes - 1}.")
  try:
    if not detect and None in given:
      raise ValueError(f"--coordinator {coordinator}, --processes {processes}, --process {process}")
    jax.distributed.initialize(*given, cluster_detection_method=None if detect else "deactivate")
  except (ValueError, TypeError) as error:
    raise ValueError(
      f"the processes of this run do not know of each other ({' '.join(str(error).split())}); want --coordinator "
      "HOST:PORT, --processes N and --process I for each, or --distributed under SLURM, Open MPI, Kubernetes or on a "
      "TPU pod."
    ) from None


@contextmanager
def together() -> Iterator[None]:
  """What one process cannot do none goes on from: an exception in one is raised there, and an echo of it in the others.

  Nothing inside may wait for another process.
  """
  try:
    yield
  except Exception:
    any_process(True)
    raise
  if any_process(False):
    raise ValueError("another process could not go on; want what its own message asks for.")


def any_process(flag: bool) -> bool:
  """Whether `flag` is true in any process. All must call it; each waits for the others."""
  return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())


def check_equal(**values: str) -> None:
  """Raises `ValueError`, in every process, unless each of `values` is the same in all of them."""
  if jax.process_count() == 1:
    return
  digests = [hashlib.blake2b(value.encode(), digest_size=4).digest() for value in values.values()]
  numbers = multihost_utils.process_allgather(np.frombuffer(b"".join(digests), np.uint32))
  for name, column in zip(values, numbers.T, strict=True):
    others = np.flatnonzero(column != column[0])
    if others.size:
      raise ValueError(f"process {others[0]} has another {name} than process 0; want the same for all.")


def row_share(sharding: NamedSharding, rows: int) -> tuple[int, int]:
  """Which share of a batch's rows this process needs, and of how many equal shares: (0, 1) is all rows.

  Processes that split matrix products and not the batch need the same rows, and have the same share.

  Args:
    sharding: of the batch's arrays.
    rows: of the global batch.

  Raises:
    ValueError: if the mesh leaves this process without a device, or with rows from here and there.
  """
  held = {index[0].indices(rows)[:2] for index in sharding.addressable_devices_indices_map((rows, 1)).values()}
  if not held:
    raise ValueError(
      f"MeshShape uses {sharding.mesh.size} devices, none of which is process {jax.process_index()}'s; want a mesh over "
      f"all {jax.device_count()}."
    )
  first, last = min(start for start, _ in held), max(end for _, end in held)
  own = sum(end - start for start, end in held)
  if own != last - first or first % own:
    raise ValueError(
      f"the devices of process {jax.process_index()} hold rows from here and there ({sorted(held)}); want a mesh in which "
      "those of a process are neighbours along data and fsdp."
    )
  return first // own, rows // own


class Vote:
  """Lets processes agree at every step on the largest number that any of them put in, without waiting for each other.

  What `vote(number)` returns was put in at the call before; with one process, it is `number` itself.
  """

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
