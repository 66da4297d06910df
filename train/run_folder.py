"""The folder of a run: which run it holds, and its result."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Result:
  """The result of a run.

  Attributes:
    directory: of the run.
    step: batches seen.
    interrupted: the signal that stopped it early, "SIGTERM" or "SIGINT"; None if it is finished.
    skipped: batches among them whose loss or gradient was not finite.
    validation_loss, validation_bits_per_byte: on the validation text; None if interrupted, as all that follow.
    validation_accuracy: share of tokens, or of answers, whose likeliest prediction is right.
    order_0_bits_per_byte, zlib_bits_per_byte: what the same text costs under its own byte frequencies, and zlib -9.
    tokens_per_second: from the end of the first step to the end of the last, all pauses included.
    step_share: of that time, spent inside the compiled step.
    flops_per_second: of matrix products within that share, a backward pass counted as two forward ones.
    matmul_share: of what the devices reach in one large float32 matrix product, measured after the last step.
    peak_bytes: held at the peak by the fullest device, or by this process where devices do not count theirs.
  """

  directory: str
  step: int
  interrupted: str | None = None
  skipped: int = 0
  validation_loss: float | None = None
  validation_bits_per_byte: float | None = None
  validation_accuracy: float | None = None
  order_0_bits_per_byte: float | None = None
  zlib_bits_per_byte: float | None = None
  tokens_per_second: float | None = None
  step_share: float | None = None
  flops_per_second: float | None = None
  matmul_share: float | None = None
  peak_bytes: int | None = None


def check_same_run(directory: Path, text: str) -> None:
  """Raises `ValueError` if `directory` holds a run whose config differs from `text` in what decides its steps.

  A run that has not saved a checkpoint yet has nothing to lose, and may be started anew with any config.
  """
  path = directory / "config.gin"
  if not path.exists() or not any((directory / "checkpoints").glob("[0-9]*")):
    return
  there = path.read_text()
  if _differences(there, text) and (differences := _differences(_renewed(there, path), text)):
    raise ValueError(
      f"{directory} holds a run with another config: {'; '.join(differences)}. Want the same, or a new directory."
    )


def _renewed(text: str, path: Path) -> str:
  """The operative config in `text` as this version writes it: an earlier one had other fields. As it is, if it is none."""
  from .config import build_text

  if "LanguageModel." not in text and "VectorModel." not in text:
    return text
  return build_text(text, str(path)).text


def _differences(there: str, here: str) -> list[str]:
  """What differs between two operative configs, of what decides the steps of a run."""
  old, new = _bindings(there), _bindings(here)
  return [
    f"{name} = {old.get(name, 'unset')} there, {new.get(name, 'unset')} here"
    for name in sorted(old.keys() | new.keys())
    if old.get(name) != new.get(name) and not _may_change(name)
  ]


def check_writable(directory: Path) -> None:
  """Makes `directory` where it is missing. Raises `ValueError` if nothing can be written there."""
  try:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory) as probe:
      probe.write(bytes(4096))
      probe.flush()
  except OSError as error:
    raise ValueError(
      f"{directory} cannot be written to ({error.strerror}); want a folder of your own, on a disk with space left."
    ) from None


def _bindings(text: str) -> dict[str, str]:
  """The lines of an operative config, as name -> value."""
  pairs = (line.partition("=") for line in text.splitlines() if "=" in line and not line.startswith("#"))
  return {name.strip(): value.strip() for name, _, value in pairs}


def _may_change(name: str) -> bool:
  owner, _, field = name.rpartition("/")[2].rpartition(".")
  return owner == "MeshShape" or (owner == "Trainer" and field != "seed")


def finished_result(directory: Path, steps: int) -> Result | None:
  """The result of the run in `directory`, if it has gone through at least `steps` steps."""
  path = directory / "result.json"
  result = Result(**json.loads(path.read_text())) if path.exists() else None
  return result if result and result.step >= steps else None
