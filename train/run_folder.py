"""The folder of a run: which run it holds, and its result."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from .files import read_record, read_text, write_text

_SHOWN = 3  # differences between two configs in a message

# Parts of an operative config that are no settings: the version of its format, where it found the modules that it imports, and
# the line before the settings that another version wrote.
CONFIG_FORMAT, IMPORT_FOLDERS = "config_format", "import_folders"
IGNORED = "# Unknown to the version of memzoo that wrote this, and ignored:"


class DifferentRun(ValueError):
  """A folder holds a run with another config. Its message may have several lines."""


@dataclass(frozen=True)
class Result:
  """The result of a run.

  Attributes:
    directory: folder of the run.
    step: batches seen.
    interrupted: the signal that stopped it early, "SIGTERM" or "SIGINT"; None if it is finished.
    skipped: how many of them had a loss or gradient that was not finite.
    validation_loss, validation_bits_per_byte: results on the validation text; these and all below are None if interrupted.
    validation_accuracy: share of tokens, or of answers, whose likeliest prediction is right.
    order_0_bits_per_byte, zlib_bits_per_byte: the same text under its own byte frequencies, and compressed by zlib -9.
    tokens_per_second: mean rate from the end of the first step to the end of the last, all pauses included.
    step_share: the share of that time inside the compiled step.
    shares: the share of that time that each activity took: "step", "evaluation", "checkpoints", "input", "reporting".
    flops_per_second: rate of matrix products inside the compiled step; a backward pass counts as two forward ones.
    matmul_share: `flops_per_second` divided by the devices' rate in one large float32 product, measured after the last step.
    peak_bytes: peak memory of the fullest device, or of this process if devices do not report theirs.
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
  shares: dict[str, float] | None = None
  flops_per_second: float | None = None
  matmul_share: float | None = None
  peak_bytes: int | None = None


def run_of(path: str | Path) -> Path | None:
  """The folder of the run at `path`, which is that folder or the config in it; else None."""
  path = Path(path).expanduser()
  if path.name == "config.gin" and (path.parent / "checkpoints").is_dir():
    return path.parent
  return path if (path / "config.gin").is_file() else None


def write_config(directory: Path, text: str) -> None:
  """Writes the operative config of a run. Lines of the one there that this version ignores are kept."""
  path = directory / "config.gin"
  there = "" if _is_free(directory) else path.read_text(encoding="utf-8")
  may_have_more = f"{CONFIG_FORMAT} = " in there and there != text and IGNORED not in text
  _, mark, ignored = _renewed(path).partition(IGNORED) if may_have_more else ("", "", "")
  write_text(path, f"{text}\n{mark}{ignored}" if mark else text)


def check_same_run(directory: Path, text: str) -> None:
  """Raises `ValueError` if `directory` holds a run whose config differs from `text` in a setting that affects its steps.

  A run without a complete checkpoint or a result may be started anew with any config.
  """
  if _is_free(directory):
    return
  path = directory / "config.gin"
  there = read_text(path, "write the config of the run there, or choose a new directory")
  if _differences(there, text) and (differences := _differences(_renewed(path), text)):
    raise DifferentRun(
      f"{directory} holds a run with another config:{_listed(differences)}Expected the same, or a new directory."
    )


def _is_free(directory: Path) -> bool:
  """Whether a folder has no run: no config, or neither a complete checkpoint nor a result."""
  return not (directory / "config.gin").exists() or not (
    complete_checkpoints(directory) or (directory / "result.json").exists()
  )


def _listed(differences: list[str]) -> str:
  """One difference in the same line; of several the first, each in its own."""
  if len(differences) == 1:
    return f" {differences[0]}. "
  more = [f"and {len(differences) - _SHOWN} more"] if len(differences) > _SHOWN else []
  return "".join(f"\n  {line}" for line in differences[:_SHOWN] + more) + "\n"


def complete_checkpoints(directory: Path) -> list[int]:
  """The steps of the complete checkpoints in a run's folder, ascending. A save in progress has a longer name."""
  return sorted(int(path.name) for path in (directory / "checkpoints").glob("[0-9]*") if path.name.isdigit())


def _renewed(path: Path) -> str:
  """The operative config in a file with the fields of this version; any other text unchanged."""
  from .config import build_text

  text = path.read_text(encoding="utf-8")
  if "LanguageModel." not in text and "VectorModel." not in text:
    return text
  return build_text(text, str(path), path.parent).text


def _differences(there: str, here: str) -> list[str]:
  """The settings that affect the steps of a run and differ between two operative configs."""
  old, new = settings(there), settings(here)
  return [
    f"{name} = {old.get(name, 'unset')} there, {new.get(name, 'unset')} here"
    for name in sorted(old.keys() | new.keys())
    if old.get(name) != new.get(name) and not _may_change(name)
  ]


def check_writable(directory: Path) -> None:
  """Creates `directory` if it is missing. Raises `ValueError` if nothing can be written there."""
  try:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory) as probe:
      probe.write(bytes(4096))
      probe.flush()
  except OSError as error:
    raise ValueError(
      f"{directory} cannot be written to ({error.strerror}); expected a folder of your own, on a disk with space left."
    ) from None


def settings(text: str) -> dict[str, str]:
  """The settings of an operative config, as name -> value."""
  pairs = (line.partition("=") for line in text.partition(IGNORED)[0].splitlines() if "=" in line and not line.startswith("#"))
  found = {name.strip(): value.strip() for name, _, value in pairs}
  return {name: value for name, value in found.items() if name not in (CONFIG_FORMAT, IMPORT_FOLDERS)}


def _may_change(name: str) -> bool:
  owner, _, field = name.rpartition("/")[2].rpartition(".")
  return owner == "MeshShape" or (owner == "Trainer" and field != "seed")


def finished_result(directory: Path, steps: int) -> Result | None:
  """The result of the run in `directory`, if it has taken at least `steps` steps."""
  path = directory / "result.json"
  result = read_record(Result, path, "remove it, and the same command writes it again") if path.exists() else None
  return result if result and result.step >= steps else None
