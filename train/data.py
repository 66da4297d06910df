"""Text as batches of packed rows, in an order that depends only on the seed.

The documents of a split are concatenated into one array of tokens, which is cut into rows of `sequence_length`. Grain shuffles
the rows anew every epoch. A row depends only on its number, so any batch can be made without the others, and the position of a
run is one integer. No token that has a target is dropped, and only the end of a split is padded. Documents without tokens are
left out, and so are rows without targets.

In a row `segment_ids` counts documents from 1; 0 is padding. The target of a token is the next token of the same document.
The last token of a document has no target: its weight is 0. Where a token ends documents (`TextData.end_of_document`), it is
the last token of each, and the target of the last token of the text. A document that does not fit in its row continues in
another row, with a fresh memory.

The tokens of a small text are held in memory, in one byte each if tokens are bytes. Those of a large one are written to a file
once (`token_store.py`), from which rows are read when they are needed.
"""

import hashlib
import math
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from ..zoo.formats import thousands
from ..zoo.stack import Stack
from .checks import at_least, check_seed
from .files import cache_folder
from .sources import Document, Source, read_sources, skipped_in_words
from .split import Batch, Split, stack_rows
from .token_store import Part, Pieces, TokenStore, is_store, joined, name_hash, update_digest
from .token_writer import WITHOUT_TOKENS, Report, text_digest, write_store
from .tokenizer import BatchTokenizer, ByteTokenizer, load_tokenizer, with_special_tokens

if TYPE_CHECKING:
  import grain

_EPOCHS = 2**31
_IN_MEMORY = 2**28  # bytes of text in a source, above which its tokens are written to a file
_PROMPT = 32  # the most tokens of a prompt that is taken from the text


@dataclass(frozen=True)
class TextData:
  """Text to train on, and how it is cut into batches.

  Attributes:
    sources: "stdlib" (the source text of Python's standard library), files, folders and globs (see `read_sources`), or folders
      of tokens that `memzoo tokenize` wrote.
    tokenizer: "bytes" (256 tokens); the path of a tokenizer.json, of a SentencePiece *.model, or of a folder with one of them
      as `transformers` saves it; or a repository's name on the Hugging Face hub, such as "gpt2".
    sequence_length: tokens in a row.
    batch_size: rows in a batch, over all devices and processes.
    validation_fraction: the share of the documents, picked by a hash of their names, that is kept for validation. If that
      picks none or all, as from a single file, the end of every document is kept instead.
    seed: random seed of the order of the rows.
    weights: for a mixture, the relative number of rows from each source; `None` takes every row of every source once an
      epoch.
    text_field: the field of objects in *.jsonl files, or the column of tables, that holds the text.
    max_documents: the most documents in a row; a row ends early if one more would follow. `None` for any number. Layers with
      a chunk grid need a bound.
    end_of_document: the token after each document, as text, such as "<|endoftext|>"; `None` for none. "auto" takes the one that
      the tokenizer's files name, if any: "bytes" and a tokenizer.json by its own path have none. If one document is cut into
      training and validation, both parts count as documents. The token before each document, if any, is always that of the
      tokenizer's folder.
  """

  sources: str | tuple[str, ...] = "stdlib"
  tokenizer: str = "bytes"
  sequence_length: int = 512
  batch_size: int = 8
  validation_fraction: float = 0.05
  seed: int = 0
  weights: tuple[float, ...] | None = None
  text_field: str = "text"
  max_documents: int | None = None
  end_of_document: str | None = "auto"

  def __post_init__(self):
    at_least(1, self, "sequence_length", "batch_size", *([] if self.max_documents is None else ["max_documents"]))
    if self.weights is not None and (len(self.weights) != self._count_sources() or min(self.weights) <= 0):
      raise ValueError(
        f"TextData.weights is {self.weights} for {self._count_sources()} sources; expected a positive number for each."
      )
    if not 0 < self.validation_fraction < 1:
      raise ValueError(f"TextData.validation_fraction is {self.validation_fraction}; expected a share between 0 and 1.")
    check_seed(self)

  def _count_sources(self) -> int:
    return 1 if isinstance(self.sources, str) else len(self.sources)

  @cached_property
  def _tokenizer(self) -> ByteTokenizer | BatchTokenizer:
    return load_tokenizer(self.tokenizer)

  @property
  def vocab_size(self) -> int:
    """One more than the largest token; a model's `vocab_size` must be at least this."""
    return self._tokenizer.vocab_size

  @property
  def begin_tokens(self) -> tuple[int, ...]:
    """The tokens before each document, usually none or one."""
    return self._tokenizer.special.begin

  @cached_property
  def end_token(self) -> int | None:
    """The token after each document; see `end_of_document`. Raises `ValueError` if the tokenizer does not have it."""
    if self.end_of_document is None:
      return None
    if self.end_of_document == "auto":
      return self._tokenizer.special.end
    token = self._tokenizer.number(self.end_of_document)
    if token is None:
      raise ValueError(
        f"TextData.end_of_document is {self.end_of_document!r}, which is not a token of TextData.tokenizer={self.tokenizer!r}; "
        'expected the text of one token, "auto" or None.'
      )
    return token

  @property
  def stop_tokens(self) -> tuple[int, ...]:
    """The tokens that end a generated text: `end_token`, and those that the files of the tokenizer name."""
    own = () if self.end_token is None else (self.end_token,)
    return tuple(dict.fromkeys(own + self._tokenizer.special.stops))

  def encode(self, text: str) -> list[int]:
    """The tokens of `text`, without those around a document."""
    return self._tokenizer.encode(text)

  def encode_prompt(self, text: str) -> list[int]:
    """The tokens of a document that begins with `text` and goes on."""
    return [*self.begin_tokens, *self.encode(text)]

  def decode(self, tokens: Sequence[int], special: bool = True) -> str:
    """The text of `tokens`, with or without that of special tokens and of those around a document."""
    if not special:
      around = {*self.begin_tokens, self.end_token}
      tokens = [token for token in tokens if int(token) not in around]
    return self._tokenizer.decode(tokens, special)

  one_token: ClassVar[np.ndarray] = np.zeros((1, 1), np.int32)  # an input with which a model can be initialised

  @property
  def source(self) -> str:
    """A description of the source of the text."""
    return f"TextData.sources={self.sources!r}, {self.tokenizer} as tokens"

  def check_model(self, model: Any) -> None:
    """Raises `ValueError` if `model` has fewer tokens than the tokenizer, or a layer takes fewer documents than a row holds.

    Also if `end_of_document` is no token.
    """
    _ = self.end_token
    known = getattr(model, "vocab_size", 0)
    if known < self.vocab_size:
      raise ValueError(
        f"LanguageModel.vocab_size is {known}; expected at least {self.vocab_size}: the largest token of "
        f"TextData.tokenizer={self.tokenizer!r} is {self.vocab_size - 1}."
      )
    check_documents(model, self.max_documents or self.sequence_length, "set TextData.max_documents")

  def check_tokenizer(self, digest: str | None) -> None:
    """Raises `ValueError` unless the tokenizer has this `tokenizer_digest`, which was saved when the run began."""
    if digest not in (None, self.tokenizer_digest):
      raise ValueError(
        f"TextData.tokenizer is {self.tokenizer!r}, whose content is not what the model was trained with; expected the file "
        "as it was during training."
      )

  @property
  def tokenizer_digest(self) -> str:
    """"bytes", or a digest of the tokenizer's files as they were when they were loaded."""
    return self._tokenizer.digest

  def load(self, report: Report = lambda text, documents: None) -> "Corpus":
    """Reads, splits and tokenises all text.

    Args:
      report: called while the tokens of a large text are written, with the bytes of text and the documents so far.

    Raises:
      ValueError: if a source is missing, unreadable, empty or malformed, or there is less than a row of text to train on.
    """
    sources = self._find(report)
    apart = self.weights or any(map(_is_file, sources))
    training, validation = zip(*map(self._split, [[source] for source in sources] if apart else [sources]), strict=True)
    counts = [len(part.lengths) for part in training]
    skipped = sum((Counter(s.index.skipped) if _is_file(s) else s.skipped for s in sources), Counter())
    corpus = Corpus(
      self,
      self._join(training),
      self._join(validation),
      tuple(counts) if self.weights else (sum(counts),),
      skipped + Counter({WITHOUT_TOKENS: sum(part.without for part in (*training, *validation))}),
    )
    self._check(corpus, [self.sources] if isinstance(self.sources, str) else self.sources)
    return corpus

  def tokenize(self, folder: Path, report: Report = lambda text, documents: None) -> TokenStore:
    """Writes the tokens of all text to a folder, or continues with that. As a source it stands for the text.

    Args:
      folder: an empty or a new one, or one where this was begun.
      report: see `load`.

    Raises:
      ValueError: as for `load`, or if the folder holds something else.
    """
    return write_store(folder, read_sources(self.sources, self.text_field), self._encoder, self.tokenizer, report)

  @property
  def _encoder(self) -> "_Encoder":
    return _Encoder(self._tokenizer, self.begin_tokens, self.end_token)

  def _find(self, report: Report) -> list[Source | TokenStore]:
    """The sources; those with much text as tokens in a folder."""
    return [self._small_or_store(source, report) for source in read_sources(self.sources, self.text_field)]

  def _small_or_store(self, source: Source, report: Report) -> Source | TokenStore:
    if is_store(folder := Path(source.name).expanduser()):
      return self._open(folder)
    if source.size <= _IN_MEMORY:
      return source
    folder = cache_folder("tokens") / text_digest([source], self._encoder)
    return write_store(folder, [source], self._encoder, self.tokenizer, report)

  def _open(self, folder: Path) -> TokenStore:
    store = TokenStore(folder, trusted=True)
    if store.index.tokenizer_digest != self._encoder.digest:
      raise ValueError(
        f"TextData.sources names {str(folder)!r}, which holds tokens of {store.index.tokenizer!r}; TextData.tokenizer is "
        f"{self.tokenizer!r} and TextData.end_of_document {self.end_of_document!r}. Expected those with "
        "which they were made."
      )
    return store

  def _split(self, sources: Sequence[Source | TokenStore]) -> tuple[Part, Part]:
    """The tokens of training and of validation, of a store or of texts that are split together."""
    if _is_file(sources[0]):
      return sources[0].split(self.validation_fraction)
    documents = [document for source in sources for document in source.read()]
    training, validation = split_documents(documents, self.validation_fraction)
    del documents  # which may have been cut in two
    return self._encode(training), self._encode(validation)

  def _encode(self, documents: Sequence[Document]) -> Part:
    """The tokens of all documents that have some."""
    tokens, lengths = self._encoder.encode_documents(documents)
    kept = lengths > 0
    num_bytes = sum(len(document.text) for document, length in zip(documents, lengths, strict=True) if length)
    return Part(tokens, lengths[kept], num_bytes, int((~kept).sum()))

  def _join(self, parts: Sequence[Part]) -> "Split":
    tokens = [part.tokens for part in parts]
    if len(parts) == 1:
      (whole,) = tokens
    else:
      whole = joined(tokens) if any(isinstance(t, Pieces) for t in tokens) else np.concatenate(tokens)
    ends = np.cumsum(np.concatenate([part.lengths for part in parts]))
    num_bytes = sum(part.num_bytes for part in parts)
    return Split(whole, ends, num_bytes, self.sequence_length, self.max_documents, len(self.begin_tokens))

  def _check(self, corpus: "Corpus", names: Sequence[str]) -> None:
    """Raises `ValueError` if there is too little text in a split, or in a source of a mixture."""
    training, validation, skipped = corpus.training, corpus.validation, skipped_in_words(corpus.skipped)
    if training.tokens.size <= self.sequence_length:
      raise ValueError(
        f"TextData.sources={self.sources!r} leave {training.tokens.size} tokens to train on; expected more than "
        f"TextData.sequence_length={self.sequence_length}: give more text, or shorter rows.{skipped}"
      )
    for part, name in zip(corpus.parts, names if self.weights else [""], strict=True):
      if not part.num_targets:
        what = f"names {name!r}, which leaves" if self.weights else f"is {self.sources!r}, which leave"
        raise ValueError(
          f"TextData.sources {what} {part.tokens.size} tokens to train on and none to predict; expected a document of at least "
          f"two tokens.{skipped}"
        )
    if not validation.num_targets:
      raise ValueError(
        f"TextData.sources={self.sources!r} leave {validation.tokens.size} tokens to validate on and none to predict; expected "
        f"a document of at least two tokens: give more text, or a larger TextData.validation_fraction.{skipped}"
      )


class _Encoder(NamedTuple):
  """A tokenizer, and the tokens before and after each document."""

  tokenizer: ByteTokenizer | BatchTokenizer
  begin: tuple[int, ...]
  end: int | None

  @property
  def vocab_size(self) -> int:
    return self.tokenizer.vocab_size

  @property
  def digest(self) -> str:
    around = "" if not self.begin and self.end is None else f" {self.begin} {self.end}"
    return f"{self.tokenizer.digest}{around}"

  def encode_documents(self, documents: Sequence[Document]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of all documents, [tokens], and how many each has; none where the tokenizer finds none."""
    return with_special_tokens(*self.tokenizer.encode_documents(documents), self.begin, self.end)


def _is_file(source: Source | TokenStore) -> bool:
  return isinstance(source, TokenStore)


def check_documents(model: Any, most: int, remedy: str) -> None:
  """Raises `ValueError` if a layer of `model` takes fewer documents in a row than `most`."""
  for mixer in model.sublayers() if isinstance(model, Stack) else ():
    bound = getattr(mixer, "max_documents", most)
    if bound < most:
      name = f"{type(mixer).__name__}.max_documents"
      raise ValueError(f"{name} is {bound}, and a row may hold {most} documents; raise it to at least that, or {remedy}.")


def split_documents(documents: list[Document], fraction: float) -> tuple[list[Document], list[Document]]:
  """Splits `documents` into training and validation by a hash of their names.

  The split of a document depends only on its name, so adding documents moves none. But if one side would be empty, as with few
  documents, the last `fraction` of every document is validation instead.
  """

  def is_validation(document: Document) -> bool:
    return name_hash(document.name) < fraction * 2**64

  validation = [document for document in documents if is_validation(document)]
  training = [document for document in documents if not is_validation(document)]
  if training and validation:
    return training, validation
  cuts = [(name, text, len(text) - math.ceil(len(text) * fraction)) for name, text in documents]
  return (
    [Document(name, text[:cut]) for name, text, cut in cuts if cut],
    [Document(name, text[cut:]) for name, text, cut in cuts],
  )


@dataclass(frozen=True)
class Corpus:
  """All text of a `TextData`, tokenised.

  Attributes:
    data: the `TextData`.
    training, validation: the splits.
    counts: numbers of training documents in the parts that rows are drawn from; with weights, a part is a source.
    skipped: number of things in the sources that were skipped, by what they are.
  """

  data: TextData
  training: Split
  validation: Split
  counts: tuple[int, ...]
  skipped: Counter[str] = field(default_factory=Counter)

  measure: ClassVar[str] = "bits_per_byte"

  def measured(self, loss: float, validation: bool = False) -> float:
    """Converts a loss in nats per token to bits per byte of a split's text."""
    return loss / math.log(2) / (self.validation if validation else self.training).bytes_per_token

  def baselines(self, batches: Sequence[Batch]) -> dict[str, float]:
    """Bits per byte of the targets of `batches`, without a model, by name."""
    found = baselines(predicted_text(batches, self.data))
    return {"byte frequencies": found.order_0, "zlib -9": found.zlib}

  @cached_property
  def parts(self) -> list[Split]:
    """The parts of `training` that rows are drawn from, with `data.weights`."""
    bounds = np.cumsum([0, *self.counts])
    return [self.training.documents(start, end) for start, end in pairwise(bounds)]

  def summary(self, steps: int) -> str:
    """One line about the documents, the rows that they are packed into, the epochs in `steps` batches, and what was skipped."""
    left_out = Counter({"rows without a target": self._left_out})
    rows = sum(map(len, self.parts))
    without = 1 - sum(part.num_targets for part in self.parts) / (rows * self.data.sequence_length)
    documents = len(self.training.document_ends)
    return (
      f"{documents:,} document{'s' * (documents > 1)} packed into {rows:,} rows of {self.data.sequence_length}, "
      f"{without:.2%} of their places without a target; {len(self.validation.document_ends):,} into "
      f"{len(self.validation):,} for validation. {steps * self.data.batch_size / rows:.2g} epochs of "
      f"{thousands(self.training.num_bytes, 'B')} of text.{skipped_in_words(self.skipped + left_out)}"
    )

  @property
  def _left_out(self) -> int:
    return sum(split.left_out for split in (*self.parts, self.validation))

  def batches(self, share: int = 0, shares: int = 1) -> "grain.DatasetIterator":
    """An endless iterator over training batches: tokens, targets, segment_ids, weights, each [rows, sequence_length].

    Every epoch has its own order; in a mixture, every part has its own epochs. `get_state()` and `set_state(state)` save and
    restore the position.

    Args:
      share, shares: the index of this share, and the number of equal shares that the rows of each batch are divided into; see
        `processes.row_share`. A batch holds the same rows for any number of shares.
    """
    import grain  # here, because the import takes a second and only training needs it

    # Not Grain's endless repetition: in batches of one row, its length is too large for len().
    parts = [grain.MapDataset.source(part).shuffle(self.data.seed).repeat(_EPOCHS) for part in self.parts]
    rows = grain.MapDataset.mix(parts, self.data.weights)
    batches = rows[share::shares].batch(self.data.batch_size // shares)
    # One thread reads ahead while the device computes. A row takes a few microseconds, so more threads gain nothing.
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))

  def validation_batches(self, count: int) -> list[Batch]:
    """At most `count` batches of validation rows, spread evenly over the split; 0 means all of it.

    Every batch has `batch_size` rows; the last is filled with padding.
    """
    rows, size = len(self.validation), self.data.batch_size
    wanted = rows if count == 0 else min(rows, count * size)
    chosen = [self.validation[row] for row in np.linspace(0, rows - 1, wanted).round().astype(int)]
    padding = {name: np.zeros_like(values) for name, values in chosen[0].items()}
    chosen += [padding] * (-len(chosen) % size)
    return [stack_rows(chosen[start : start + size]) for start in range(0, len(chosen), size)]

  def prompt(self, text: str | None) -> list[int]:
    """The tokens of `text`, a run's `Trainer.sample_prompt`; by default the first of the validation text.

    Raises:
      ValueError: if `text` has no tokens, or cannot be encoded.
    """
    if text is None:
      ended = self.validation.document_ends[0] - (self.data.end_token is not None)
      return self.validation.tokens[: min(_PROMPT, ended)].tolist()
    try:
      tokens = self.data.encode_prompt(text)
    except ValueError as error:
      raise ValueError(f"Trainer.sample_prompt is {text!r}: {error}") from None
    if not tokens:
      raise ValueError(
        f"Trainer.sample_prompt is {text!r}, which has no tokens; expected text with at least one token of "
        f"TextData.tokenizer={self.data.tokenizer!r}."
      )
    return tokens

  @cached_property
  def fingerprint(self) -> str:
    """A digest of all tokens and document ends of both splits, and of the number of rows that are left out, if any."""
    digest = hashlib.blake2b(digest_size=16)
    for split in (self.training, self.validation):
      update_digest(digest, split.tokens)
      digest.update(split.document_ends.data)
    if self._left_out:
      digest.update(str(self._left_out).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Baselines:
  """Bits per byte of a text without a model.

  Attributes:
    order_0: the entropy of its byte frequencies.
    zlib: its size after compression by zlib at level 9.
  """

  order_0: float
  zlib: float


def baselines(text: bytes) -> Baselines:
  """Bits per byte of `text` under its own byte frequencies, and compressed by zlib at level 9; NaN if it is empty."""
  if not text:
    return Baselines(math.nan, math.nan)
  counts = np.bincount(np.frombuffer(text, np.uint8), minlength=256)
  share = counts[counts > 0] / len(text)
  return Baselines(order_0=float(-(share * np.log2(share)).sum()), zlib=8 * len(zlib.compress(text, 9)) / len(text))


def predicted_text(batches: Sequence[Batch], data: TextData) -> bytes:
  """The bytes of the targets of `batches`, in the order of the rows. The token that ends a document has none."""
  tokens = np.concatenate([batch["targets"][batch["weights"] > 0] for batch in batches])
  if data.end_token is not None:
    tokens = tokens[tokens != data.end_token]
  return tokens.astype(np.uint8).tobytes() if data.tokenizer == "bytes" else data.decode(tokens.tolist()).encode()
