"""Where a tokenizer's files are, and what those beside its vocabulary say about tokens that begin and end texts.

A tokenizer is a file, a folder as `transformers` saves it, or a repository on the Hugging Face hub.
"""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .files import read_object

VOCABULARIES = "tokenizer.json", "tokenizer.model"  # in a folder with both, the first is used
_SETTINGS, _NAMES, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_GENERATION, _MODEL = "generation_config.json", "config.json"
TOKENIZER_FILES = *VOCABULARIES, _SETTINGS, _NAMES, _ADDED, _GENERATION, _MODEL

# In the order in which `transformers` adds those that a vocabulary lacks.
_SPECIAL = "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"
_REPOSITORY = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
EXPECTED = (
  'expected "bytes", a tokenizer.json, a SentencePiece *.model, a folder with one of them, or a repository\'s name on the '
  "Hugging Face hub"
)


class SpecialTokens(NamedTuple):
  """Tokens that a tokenizer's files put around a text.

  Attributes:
    begin: the tokens before a text.
    end: the token after a text; `None` for none.
    stops: tokens that end a generated text, `end` among them.
  """

  begin: tuple[int, ...] = ()
  end: int | None = None
  stops: tuple[int, ...] = ()


@dataclass(frozen=True)
class TokenizerFolder:
  """What the files of a folder say about its tokenizer.

  Attributes:
    vocabulary: the tokenizer.json or tokenizer.model.
    names: the special tokens by what they are for, such as "eos_token", as text or with the options of an `AddedToken`.
    added: tokens beside the vocabulary, by number.
    adds_begin: whether a text begins with `names["bos_token"]`; `None` if no file says so.
    stops: numbers of the tokens at which the model stops.
  """

  vocabulary: Path
  names: dict[str, str | dict[str, Any]]
  added: dict[int, str | dict[str, Any]]
  adds_begin: bool | None
  stops: tuple[int, ...]

  def special_tokens(
    self,
    tokenizer: str,
    number: Callable[[str], int | None],
    is_special: Callable[[int], bool],
    template: tuple[tuple[int, ...], tuple[int, ...]],
  ) -> SpecialTokens:
    """The tokens around a text.

    Args:
      tokenizer: `TextData.tokenizer`, for errors.
      number: from the text of a token to the token; `None` where there is none.
      is_special: whether a token stands for no text.
      template: the tokens that the vocabulary's file puts before a text and after it.

    Raises:
      ValueError: if a token that is needed is not in the vocabulary.
    """

    def named(name: str) -> int | None:
      text = text_of(self.names[name]) if name in self.names else None
      if text is not None and number(text) is None:
        raise ValueError(
          f"TextData.tokenizer is {tokenizer!r}, where {_SETTINGS} or {_NAMES} has {text!r} as {name}, which is not a token of "
          f"{self.vocabulary}; expected one that is, or null."
        )
      return None if text is None else number(text)

    before, after = template
    if self.adds_begin is not None:
      first = named("bos_token") if self.adds_begin else None
      before = () if first is None else (first,)
    stops = tuple(token for token in self.stops if is_special(token))
    last = [named("eos_token"), *after[:1], *stops]
    end = next((token for token in last if token is not None), None)
    return SpecialTokens(before, end, tuple(dict.fromkeys([*([] if end is None else [end]), *stops])))


def text_of(token: str | dict[str, Any]) -> str:
  """The text of a token in a tokenizer's JSON files."""
  return token["content"] if isinstance(token, dict) else token


def vocabulary_in(folder: Path) -> Path | None:
  """The file of `VOCABULARIES` in `folder` that a tokenizer is made of; `None` if there is none."""
  return next((folder / name for name in VOCABULARIES if (folder / name).is_file()), None)


def read_folder(folder: Path, name: str) -> TokenizerFolder:
  """Reads the files of a tokenizer, which the user knows as `name`. Raises `ValueError` if it has none, or a broken one."""
  vocabulary = vocabulary_in(folder)
  if vocabulary is None:
    raise ValueError(f"TextData.tokenizer is {name!r}, a folder without {' or '.join(VOCABULARIES)}; {EXPECTED}.")

  def read(file: str) -> dict[str, Any]:
    remedy = f"it belongs to TextData.tokenizer={name!r}"
    return read_object(folder / file, remedy) if (folder / file).is_file() else {}

  settings = read(_SETTINGS)
  try:
    names = {key: value for key, value in (read(_NAMES) | settings).items() if key in _SPECIAL and value}
    added = {number: token for token, number in read(_ADDED).items()}
    added |= {int(number): token for number, token in settings.get("added_tokens_decoder", {}).items()}
    for token in (*names.values(), *added.values()):
      if not isinstance(text_of(token), str):
        raise TypeError(f"a token is {token!r}")
    stops = next((found for file in (_GENERATION, _MODEL) if (found := _numbers(read(file).get("eos_token_id")))), ())
  except (TypeError, KeyError, AttributeError) as error:
    message = f"TextData.tokenizer is {name!r}, where a JSON file beside {vocabulary.name} is not as transformers writes it"
    raise ValueError(f"{message} ({type(error).__name__}: {error}).") from None
  names = {key: names[key] for key in _SPECIAL if key in names}
  return TokenizerFolder(vocabulary, names, added, settings.get("add_bos_token"), stops)


def _numbers(value: Any) -> tuple[int, ...]:
  """One number, a list of them or nothing, as in "eos_token_id"."""
  numbers = value if isinstance(value, list) else [] if value is None else [value]
  if not all(isinstance(number, int) for number in numbers):
    raise TypeError(f"eos_token_id is {value!r}")
  return tuple(numbers)


def copy_tokenizer(source: Path, target: Path) -> None:
  """Copies the tokenizer in the folder `source`, if there is one, to the folder `target`; files that are there stay."""
  if not vocabulary_in(source):
    return
  target.mkdir(parents=True, exist_ok=True)
  for name in TOKENIZER_FILES:
    if (source / name).is_file() and not (target / name).exists():
      shutil.copyfile(source / name, target / name)


def find_tokenizer(name: str) -> Path:
  """The file or folder that `TextData.tokenizer` names. A path that exists comes before a repository of the same name.

  Raises:
    ValueError: if there is none.
  """
  path = Path(name).expanduser()
  if path.exists():
    return path
  if not _REPOSITORY.fullmatch(name) or path.suffix in (".json", ".model"):
    raise ValueError(f"TextData.tokenizer is {name!r}, not a file or folder here; {EXPECTED}.")
  return _repository(name)


def _repository(name: str) -> Path:
  """The folder of a repository's tokenizer in the local cache. What is not there is downloaded."""
  missing = f"TextData.tokenizer is {name!r}, not a file or folder here"
  try:
    import huggingface_hub  # noqa: F401
  except ImportError:
    message = f'{missing}; a name on the Hugging Face hub needs huggingface_hub: pip install "memzoo[hub]"'
    raise ValueError(f"{message}. Otherwise {EXPECTED}.") from None
  cached = _cached(name)
  if cached and (cached / _SETTINGS).is_file():
    return cached
  try:
    return download(name, TOKENIZER_FILES)
  except ValueError as error:
    if cached:  # a repository without settings, and no network
      return cached
    raise ValueError(
      f"{missing} nor in the cache of the Hugging Face hub, and cannot be downloaded ({str(error).rstrip('.')}); {EXPECTED}. "
      "Without a network: a path, or a repository that was downloaded before."
    ) from None


def _cached(name: str) -> Path | None:
  """The folder of a repository in the local cache, if it has a tokenizer there."""
  try:
    folder = download(name, TOKENIZER_FILES, local_files_only=True)
  except ValueError:
    return None
  return folder if vocabulary_in(folder) else None


def download(name: str, files: Sequence[str], **options: Any) -> Path:
  """A folder with those files of a repository on the Hugging Face hub, as far as it has them.

  Raises:
    ImportError: if huggingface_hub is not installed.
    ValueError: if they cannot be had; its text is the reason, a sentence.
  """
  from huggingface_hub import snapshot_download

  try:
    return Path(snapshot_download(name, allow_patterns=list(files), **options))
  except Exception as error:  # of many kinds: no network, no such repository, no right to read it
    raise ValueError(str(error).strip().split("\n")[0]) from None
