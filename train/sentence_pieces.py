"""SentencePiece models as tokenizers (https://arxiv.org/abs/1808.06226)."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from .libraries import library
from .tokenizer import NOTHING_FOR_BYTES, BatchTokenizer, Tokens, digest_of
from .tokenizer_files import SpecialTokens, TokenizerFolder, text_of


class SentencePieceTokenizer(BatchTokenizer):
  """A `*.model` of the `sentencepiece` library.

  Special tokens come from no text: "</s>" in a text is encoded as ordinary text. The token that ends a text is the model's own
  `eos`, unless the files of a folder name another. A token that only these files know has a number and a text, and is not
  looked for in texts either.

  Long documents are encoded in pieces, but with a unigram model as a whole: such a model adds up float32 scores from the
  document's first token on, so that after a million tokens a near tie may go the other way than in a piece. That takes about
  fifty bytes of memory for each byte of the longest document.
  """

  def __init__(self, path: str | Path, folder: TokenizerFolder | None = None, name: str | None = None):
    """Loads the model at `path`.

    Args:
      path: path of the file.
      folder: what the files beside it say; `None` to leave them out.
      name: `TextData.tokenizer`, for errors; by default the path.

    Raises:
      ValueError: if the library is not installed, or the file is not a SentencePiece model.
    """
    self._name = str(path) if name is None else name
    content = Path(path).read_bytes()
    self._model = _load(self._name, content)
    self._size = self._model.vocab_size()
    added = {number: text_of(token) for number, token in sorted(folder.added.items()) if number >= self._size} if folder else {}
    controls = filter(self._model.is_control, range(self._size))
    self._texts = {token: self._model.id_to_piece(token) for token in controls} | added  # of special tokens
    self._numbers = {text: token for token, text in self._texts.items()}
    self.vocab_size = max([self._size, *(number + 1 for number in added)])
    self.in_pieces = not _is_unigram(self._model)
    own = self._model.eos_id()
    ends = (own,) if own >= 0 else ()
    if folder:
      self.special = folder.special_tokens(self._name, self.number, self._texts.__contains__, ((), ends))
    elif ends:
      self.special = SpecialTokens(end=own, stops=ends)
    self.digest = digest_of(content, self.special, list(added.items()))

  def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
    return self._model.encode(texts, return_type="numpy")

  def encode_with_places(self, text: str) -> Tokens:
    found = self._model.encode(text, return_type="offset_mapping")
    starts, ends = np.array(found["offsets"], np.int64).reshape(-1, 2).T
    return np.array(found["ids"], self.dtype), starts, ends

  def decode(self, tokens: Sequence[int], special: bool = True) -> str:
    kept = [token for token in map(int, tokens) if (special if token in self._texts else 0 <= token < self._size)]
    parts = groupby(kept, self._texts.__contains__)
    return "".join("".join(map(self._texts.get, part)) if named else self._model.decode(list(part)) for named, part in parts)

  def number(self, text: str) -> int | None:
    if text in self._numbers:
      return self._numbers[text]
    token = self._model.piece_to_id(text)
    return token if self._model.id_to_piece(token) == text else None


def _load(name: str, content: bytes) -> Any:
  """The library's model. Raises `ValueError` as `SentencePieceTokenizer` does."""
  what = f"TextData.tokenizer is {name!r}, which needs the sentencepiece library"
  module = library("sentencepiece", what, "memzoo[sentencepiece]", NOTHING_FOR_BYTES)
  try:
    return module.SentencePieceProcessor.from_proto(content)
  except Exception as error:  # the library raises RuntimeError, and others
    reason = str(error).strip().rstrip(".")
    raise ValueError(f"TextData.tokenizer is {name!r}, which is not a SentencePiece model: {reason}.") from None


def _is_unigram(model: Any) -> bool:
  """Whether a model is of that type. The library does not tell, but only such models have several segmentations of a text."""
  try:
    model.nbest_encode("a", nbest_size=1)
  except RuntimeError:
    return False
  return True
