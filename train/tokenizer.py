"""Tokenizers: bytes, or those of a library; and learning one.

A document that is longer than a batch is encoded in pieces that overlap. Two neighbours are joined in the middle of their
overlap, where both must have the same tokens; so the tokens are those of the document as a whole.
"""

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .files import replacing
from .libraries import library
from .sources import Document, read_documents
from .tokenizer_files import EXPECTED, SpecialTokens, TokenizerFolder, find_tokenizer, read_folder, text_of

# Bytes of text that the library encodes at once. It takes up to 200 bytes of memory for each, so a batch is a small share of
# the text.
_SMALLEST_BATCH = 2**16
_BATCHES = 256
_OVERLAP = 2**12  # bytes that two pieces of a long document have in common
_LONGEST_WORD = 64  # bytes in which a piece looks for a space to begin or end with
NOTHING_FOR_BYTES = 'The default, "bytes", needs nothing.'

Tokens = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens, and the first and the end character of each


class ByteTokenizer:
  """Tokens are the bytes of the UTF-8 text; none is special."""

  vocab_size = 256
  digest = "bytes"
  special = SpecialTokens()

  def encode(self, text: str) -> list[int]:
    """The tokens of `text`."""
    return list(text.encode())

  def decode(self, tokens: Sequence[int], special: bool = True) -> str:
    """The text of `tokens`. Bytes that are not valid UTF-8, and tokens that are not bytes, become U+FFFD."""
    return bytes(token if 0 <= token < 256 else 0xFF for token in map(int, tokens)).decode(errors="replace")

  def number(self, text: str) -> int | None:
    """The token whose text is `text`; `None` if there is none."""
    content = text.encode()
    return content[0] if len(content) == 1 else None

  def encode_documents(self, documents: Sequence[Document]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of all documents, uint8 [tokens], and the number of tokens in each, [documents]."""
    lengths = np.array([len(document.text) for document in documents], np.int64)
    return np.frombuffer(b"".join(document.text for document in documents), np.uint8), lengths


class BatchTokenizer(ABC):
  """A tokenizer of a library, which encodes texts in batches.

  Every text gets all of its tokens and no others. Special tokens around texts are told in `special`, and never added.

  Attributes:
    vocab_size: one more than the largest token.
    digest: of all that determines the tokens of a document.
    special: the tokens around a text, where the files of the tokenizer name them.
    in_pieces: whether the tokens of a long document can be found in pieces; see `encode_in_pieces`.
  """

  vocab_size: int
  digest: str
  special: SpecialTokens = SpecialTokens()
  in_pieces: bool = True

  @abstractmethod
  def encode_batch(self, texts: list[str]) -> Sequence[Sequence[int]]:
    """The tokens of each text. Raises `ValueError` if the tokenizer cannot encode them."""

  @abstractmethod
  def encode_with_places(self, text: str) -> Tokens:
    """The tokens of `text`, and the first and the end character of each."""

  @abstractmethod
  def decode(self, tokens: Sequence[int], special: bool = True) -> str:
    """The text of `tokens`, with or without that of special tokens. Numbers that are no tokens have no text."""

  @abstractmethod
  def number(self, text: str) -> int | None:
    """The token whose text is `text`; `None` if there is none."""

  def encode(self, text: str) -> list[int]:
    """The tokens of `text`. Raises `ValueError` if the tokenizer cannot encode it."""
    return list(map(int, self.encode_batch([text])[0]))

  def encode_documents(self, documents: Sequence[Document]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of all documents, [tokens] in the smallest dtype that holds them, and the number of tokens in each."""
    size = max(_SMALLEST_BATCH, sum(len(document.text) for document in documents) // _BATCHES)
    parts, lengths = [np.zeros(0, self.dtype)], []
    for batch in _batches([document.text for document in documents], size):
      found = list(self._encode_batch(batch, size))
      lengths += map(len, found)
      parts.append(np.concatenate(found))
    return np.concatenate(parts), np.array(lengths, np.int64)

  def _encode_batch(self, batch: Sequence[bytes], size: int) -> Iterator[np.ndarray]:
    if self.in_pieces and len(batch[0]) > size:
      yield np.concatenate(list(encode_in_pieces(self.encode_with_places, batch[0], size, min(_OVERLAP, size // 2))))
      return
    for tokens in self.encode_batch([text.decode(errors="replace") for text in batch]):
      yield np.array(tokens, self.dtype)

  @property
  def dtype(self) -> type:
    """The smallest type that holds all tokens."""
    return np.uint16 if self.vocab_size <= 2**16 else np.uint32


class FileTokenizer(BatchTokenizer):
  """A `tokenizer.json` of the `tokenizers` library.

  The file's settings for truncation, padding, dropout of merges and added special tokens are ignored. Only in a folder do its
  special tokens count, as `transformers` takes them: those that the files beside it name are tokens, and the tokens that it
  puts before and after a text are in `special`.
  """

  def __init__(self, path: str | Path, folder: TokenizerFolder | None = None, name: str | None = None):
    """Loads the file at `path`.

    Args:
      path: path of the file.
      folder: what the files beside it say; `None` to leave them out.
      name: `TextData.tokenizer`, for errors; by default the path.

    Raises:
      ValueError: if the library is not installed, or the file is missing, is not a tokenizer or has no tokens.
    """
    self._name = str(path) if name is None else name
    _need_tokenizers(f"TextData.tokenizer is {self._name!r}, which")
    from tokenizers import Tokenizer

    if not os.path.isfile(path):
      raise ValueError(f"TextData.tokenizer is {self._name!r}, not a file; {EXPECTED}.")
    content = Path(path).read_bytes()
    try:
      self._tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception
      raise ValueError(f"TextData.tokenizer is {self._name!r}, which is not a tokenizer.json: {error}.") from None
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    if getattr(self._tokenizer.model, "dropout", None):
      self._tokenizer.model.dropout = None
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    if not vocabulary:
      raise ValueError(f"TextData.tokenizer is {self._name!r}, which has no tokens; expected at least one.")
    added = self._add(folder) if folder else []
    self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
    if folder:
      self.special = folder.special_tokens(self._name, self.number, self._is_special, self._template())
    self.digest = digest_of(content, self.special, added)

  def _add(self, folder: TokenizerFolder) -> list[Any]:
    """Adds the tokens that the files of `folder` name and `tokenizer.json` lacks. Returns what changed, for the digest."""
    from tokenizers import AddedToken

    def tokens() -> dict[int, Sequence[Any]]:
      found = self._tokenizer.get_added_tokens_decoder()
      return {
        number: (token.content, token.special, token.lstrip, token.rstrip, token.normalized, token.single_word)
        for number, token in sorted(found.items())
      }

    def as_added(token: str | dict[str, Any], special: bool) -> Any:
      options = token if isinstance(token, dict) else {}
      options = {key: bool(options[key]) for key in ("lstrip", "rstrip", "normalized", "single_word") if key in options}
      return AddedToken(text_of(token), special=special, **options)

    before = tokens()
    known = {text for text, *_ in before.values()}
    for _, token in sorted(folder.added.items()):
      if text_of(token) not in known:
        self._tokenizer.add_tokens([as_added(token, not isinstance(token, dict) or bool(token.get("special")))])
    known = {text for text, special, *_ in tokens().values() if special}
    for token in folder.names.values():
      if text_of(token) not in known:
        self._tokenizer.add_special_tokens([as_added(token, True)])
    return [[number, *token] for number, token in tokens().items() if before.get(number) != token]

  def _template(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that the file puts before a text and after it."""
    from tokenizers import Tokenizer, models

    # Its own vocabulary has no text that is a token for sure, so it is given one of another tokenizer.
    text = Tokenizer(models.WordLevel({"a": 0}, "a")).encode("a")
    framed = self._tokenizer.post_process(text)
    place = framed.special_tokens_mask.index(0)
    return tuple(framed.ids[:place]), tuple(framed.ids[place + 1 :])

  def _is_special(self, token: int) -> bool:
    return token in self._tokenizer.get_added_tokens_decoder()

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in self._encode(texts)]

  def decode(self, tokens: Sequence[int], special: bool = True) -> str:
    return self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=not special)

  def number(self, text: str) -> int | None:
    return self._tokenizer.token_to_id(text)

  def encode_with_places(self, text: str) -> Tokens:
    (encoding,) = self._encode([text], places=True)
    starts, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
    return np.array(encoding.ids, self.dtype), starts, ends

  def _encode(self, texts: list[str], places: bool = False) -> list[Any]:
    encode = self._tokenizer.encode_batch if places else self._tokenizer.encode_batch_fast
    try:
      return encode(texts, add_special_tokens=False)
    except Exception as error:  # such as a word that is not in the vocabulary, where no token stands for it
      raise ValueError(f"TextData.tokenizer is {self._name!r}, which cannot encode a text: {error}.") from None


def digest_of(content: bytes, special: SpecialTokens, added: list[Any]) -> str:
  """A digest of a vocabulary's file, of the tokens around a text and of those that were added to it.

  Where nothing was added, it is that of the file alone.
  """
  digest = hashlib.blake2b(content, digest_size=16)
  if special.begin or special.end is not None or added:
    digest.update(json.dumps([special.begin, special.end, added]).encode())
  return digest.hexdigest()


def with_special_tokens(
  tokens: np.ndarray, lengths: np.ndarray, begin: Sequence[int], end: int | None
) -> tuple[np.ndarray, np.ndarray]:
  """Documents with the tokens `begin` before each and `end` after each. Those without tokens stay empty.

  Args:
    tokens: [tokens] of all documents.
    lengths: [documents]; the number of tokens in each.
    begin: tokens before a document.
    end: the token after a document; `None` for none.
  """
  after = [] if end is None else [end]
  if not (begin or after):
    return tokens, lengths
  kept, last = lengths > 0, np.cumsum(lengths)
  starts, ends = (last - lengths)[kept, None], last[kept, None]
  places = np.concatenate([np.repeat(starts, len(begin), 1), np.repeat(ends, len(after), 1)], 1)
  values = np.broadcast_to(np.array([*begin, *after], tokens.dtype), places.shape)
  # Where a document ends, the next begins: of equal places, NumPy inserts the values in the order in which they are given.
  return np.insert(tokens, places.ravel(), values.ravel()), lengths + kept * (len(begin) + len(after))


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
    encode: encodes a piece; see `BatchTokenizer.encode_with_places`.
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
  library("tokenizers", f"{what} needs the tokenizers library", "memzoo[hub]", NOTHING_FOR_BYTES)


def load_tokenizer(name: str) -> ByteTokenizer | BatchTokenizer:
  """The tokenizer that `TextData.tokenizer` names.

  Args:
    name: "bytes", the path of a tokenizer.json, of a SentencePiece model (*.model) or of a folder with one of them, or the name
      of a repository on the Hugging Face hub. A path that exists comes first.

  Raises:
    ValueError: if there is no such tokenizer, or the library that reads it is not installed.
  """
  if name == "bytes":
    return ByteTokenizer()
  path, folder = find_tokenizer(name), None
  if path.is_dir():
    folder = read_folder(path, name)
    path = folder.vocabulary
  if path.suffix == ".model":
    from .sentence_pieces import SentencePieceTokenizer

    return SentencePieceTokenizer(path, folder, name)
  return FileTokenizer(path, folder, name)


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
