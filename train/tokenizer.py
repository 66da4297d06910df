"""Tokenizers: bytes, or the file of a tokenizer; and learning one.

A document that is longer than a batch is encoded in pieces that overlap. Two neighbours are joined in the middle of their
overlap, where both must have the same tokens; so the tokens are those of the document as a whole.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .files import replacing
from .sources import Document, read_documents

# Bytes of text that the library encodes at once. It takes up to 200 bytes of memory for each, so a batch is a small share of
# the text.
_SMALLEST_BATCH = 2**16
_BATCHES = 256
_OVERLAP = 2**12  # bytes that two pieces of a long document have in common
_LONGEST_WORD = 64  # bytes in which a piece looks for a space to begin or end with

Tokens = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens, and the first and the end character of each


class ByteTokenizer:
  """Tokens are the bytes of the UTF-8 text; none is special."""

  vocab_size = 256
  digest = "bytes"

  def encode(self, text: str) -> list[int]:
    """The tokens of `text`."""
    return list(text.encode())

  def decode(self, tokens: Sequence[int], special: bool = True) -> str:
    """The text of `tokens`. Bytes that are not valid UTF-8, and tokens that are not bytes, become U+FFFD."""
    return bytes(token if 0 <= token < 256 else 0xFF for token in map(int, tokens)).decode(errors="replace")

  def encode_documents(self, documents: Sequence[Document]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of all documents, uint8 [tokens], and the number of tokens in each, [documents]."""
    lengths = np.array([len(document.text) for document in documents], np.int64)
    return np.frombuffer(b"".join(document.text for document in documents), np.uint8), lengths


class FileTokenizer:
  """A `tokenizer.json` of the `tokenizers` library.

  Every text gets all of its tokens and no others: the file's settings for truncation, padding, dropout of merges and added
  special tokens are ignored.
  """

  def __init__(self, path: str):
    """Loads the file at `path`.

    Raises:
      ValueError: if the library is not installed, or the file is missing, is not a tokenizer or has no tokens.
    """
    _need_tokenizers(f"TextData.tokenizer is {path!r}, which")
    from tokenizers import Tokenizer

    if not os.path.isfile(path):
      raise ValueError(f'TextData.tokenizer is {path!r}, not a file; expected "bytes" or the path of a tokenizer.json.')
    self._path, content = path, Path(path).read_bytes()
    self.digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    try:
      self._tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception
      raise ValueError(f"TextData.tokenizer is {path!r}, which is not a tokenizer.json: {error}.") from None
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    if getattr(self._tokenizer.model, "dropout", None):
      self._tokenizer.model.dropout = None
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    if not vocabulary:
      raise ValueError(f"TextData.tokenizer is {path!r}, which has no tokens; expected at least one.")
    self.vocab_size = 1 + max(vocabulary.values())

  def encode(self, text: str) -> list[int]:
    """The tokens of `text`. Raises `ValueError` if the tokenizer cannot encode it."""
    return self._encode([text])[0].ids

  def decode(self, tokens: Sequence[int], special: bool = True) -> str:
    """The text of `tokens`, with or without that of special tokens."""
    return self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=not special)

  def encode_with_places(self, text: str) -> Tokens:
    """The tokens of `text`, and the first and the end character of each."""
    (encoding,) = self._encode([text], places=True)
    starts, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
    return np.array(encoding.ids, self._dtype), starts, ends

  def encode_documents(self, documents: Sequence[Document]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of all documents, [tokens] in the smallest dtype that holds them, and the number of tokens in each."""
    size = max(_SMALLEST_BATCH, sum(len(document.text) for document in documents) // _BATCHES)
    parts, lengths = [np.zeros(0, self._dtype)], []
    for batch in _batches([document.text for document in documents], size):
      found = list(self._encode_batch(batch, size))
      lengths += map(len, found)
      parts.append(np.concatenate(found))
    return np.concatenate(parts), np.array(lengths, np.int64)

  def _encode_batch(self, batch: Sequence[bytes], size: int) -> Iterator[np.ndarray]:
    if len(batch[0]) > size:
      yield np.concatenate(list(encode_in_pieces(self.encode_with_places, batch[0], size, min(_OVERLAP, size // 2))))
      return
    for encoding in self._encode([text.decode(errors="replace") for text in batch]):
      yield np.array(encoding.ids, self._dtype)

  def _encode(self, texts: list[str], places: bool = False) -> list[Any]:
    encode = self._tokenizer.encode_batch if places else self._tokenizer.encode_batch_fast
    try:
      return encode(texts, add_special_tokens=False)
    except Exception as error:  # such as a word that is not in the vocabulary, where no token stands for it
      raise ValueError(f"TextData.tokenizer is {self._path!r}, which cannot encode a text: {error}.") from None

  @property
  def _dtype(self) -> type:
    return np.uint16 if self.vocab_size <= 2**16 else np.uint32


def _batches(texts: Sequence[bytes], size: int) -> Iterator[list[bytes]]:
  """`texts` in order, in batches of at most `size` bytes. A text that is longer is a batch of its own."""
  batch, total = [], 0
  for text in texts:
    if batch and total + len(text) > size:
      yield batch
      batch, total = [], 0
    batch.append(text)
    total += len(text)
  if batch:
    yield batch


def encode_in_pieces(encode: Callable[[str], Tokens], text: bytes, piece: int, overlap: int) -> Iterator[np.ndarray]:
  """Yields the tokens of `text` in parts.

  Args:
    encode: encodes a piece; see `FileTokenizer.encode_with_places`.
    text: UTF-8. Bytes that are not become U+FFFD.
    piece: bytes in a piece.
    overlap: bytes that a piece shares with the one before, fewer than `piece`. If the two differ there, one longer piece takes
      their place, with twice the bytes.
  """
  start, end, size = 0, _place_to_cut(text, piece), piece
  left = encode(text[start:end].decode(errors="replace"))
  cut = -1  # the tokens of `left` that start before this character have been yielded
  while end < len(text):
    following, last = _place_to_cut(text, end - overlap), _place_to_cut(text, end - overlap + size)
    right = encode(text[following:last].decode(errors="replace"))
    shift = len(text[start:following].decode(errors="replace"))
    shared = len(text[following:end].decode(errors="replace"))
    joint = _joint(left, right, shift, shared)
    if joint is None:
      size *= 2
      end = _place_to_cut(text, start + size)
      left = encode(text[start:end].decode(errors="replace"))
      continue
    tokens, starts, _ = left
    yield tokens[(starts >= cut) & (starts < shift + joint)]
    start, end, size, left, cut = following, last, piece, right, joint
  yield left[0][left[1] >= cut]


def _joint(left: Tokens, right: Tokens, shift: int, shared: int) -> int | None:
  """The first character of a token in the middle half of the overlap, in `right`; `None` if the two differ there."""
  low, high = shared // 4, shared - shared // 4
  inside = []
  for (tokens, starts, ends), moved in ((left, shift), (right, 0)):
    within = (starts >= moved + low) & (ends <= moved + high)
    inside.append(np.stack([tokens[within], starts[within] - moved, ends[within] - moved]))
  if not inside[1].size or not np.array_equal(*inside):
    return None
  return int(inside[1][1, 0])


def _place_to_cut(text: bytes, place: int) -> int:
  """The first place from `place` on where a word may start, or else a character: the halves decode to the same as the whole."""
  if place >= len(text):
    return len(text)
  if word := re.compile(rb"\s").search(text, place, place + _LONGEST_WORD):
    return word.start()
  while place < len(text) and text[place] & 0xC0 == 0x80:
    place += 1
  return place


def _need_tokenizers(what: str) -> None:
  try:
    import tokenizers  # noqa: F401
  except ImportError:
    raise ValueError(
      f'{what} needs the tokenizers library: pip install "memzoo[hub]". The default, "bytes", needs nothing.'
    ) from None


def load_tokenizer(name: str) -> ByteTokenizer | FileTokenizer:
  """The tokenizer that `TextData.tokenizer` names: "bytes", or the path of a tokenizer.json."""
  return ByteTokenizer() if name == "bytes" else FileTokenizer(os.path.expanduser(name))


def train_tokenizer(sources: str | Sequence[str], vocab_size: int, path: str | os.PathLike, field: str = "text") -> int:
  """Learns byte-pair merges from text and writes them as a `tokenizer.json`. It can encode any text.

  Args:
    sources, field: as for `read_sources`.
    vocab_size: number of tokens, including the 256 bytes.
    path: path of the file to write.

  Returns:
    The number of tokens; fewer than `vocab_size` if the text has no more pairs.

  Raises:
    ValueError: if a source cannot be used, or `vocab_size` is less than 256.
  """
  if vocab_size < 256:
    raise ValueError(f"vocab_size is {vocab_size}; expected at least 256, one for each byte.")
  _need_tokenizers("learning a tokenizer")
  if not os.access(folder := Path(path).absolute().parent, os.W_OK) or Path(path).is_dir():
    raise ValueError(f"{path} cannot be written; expected a file in a folder of your own, and {folder} is none.")
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
  texts = (document.text.decode(errors="replace") for document in read_documents(sources, field))
  tokenizer.train_from_iterator(texts, trainer)
  with replacing(Path(path)) as temporary:
    tokenizer.save(os.fspath(temporary))
  return tokenizer.get_vocab_size()
