"""Tokenizers: the tokens of a text, all of them and no others, at a bounded cost."""

import sys

import numpy as np
import pytest
import tokenizers
from memzoo.train.data import TextData
from memzoo.train.sources import read_documents
from tiny_run import write_text


@pytest.fixture
def tokenizer_path(tmp_path):
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
  tokenizer.train_from_iterator(["memory state decay gate chunk " * 20], trainer)
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  return str(tmp_path / "tokenizer.json")


def test_tokenizer_file_gives_fewer_tokens_and_the_same_text(tmp_path, tokenizer_path):
  data = TextData(write_text(tmp_path / "text"), tokenizer_path, sequence_length=16, validation_fraction=0.3)
  corpus = data.load()
  assert 256 < data.vocab_size <= 300
  assert corpus.training.tokens.dtype == np.uint16
  assert corpus.training.bytes_per_token > 1.5
  assert data.decode(data.encode("erase, then write: ßé")) == "erase, then write: ßé"
  text = data.decode(corpus.validation.tokens[: corpus.validation.document_ends[0]])
  assert text.encode() in [document.text for document in read_documents(str(tmp_path / "text"))]


def test_bytes_round_trip_through_the_default_tokenizer():
  data = TextData()
  assert data.vocab_size == 256
  assert data.decode(data.encode("erase, then write: ßé")) == "erase, then write: ßé"
  assert data.decode([0xC3]) == "\N{REPLACEMENT CHARACTER}"


def test_wrong_tokenizers_are_named(tmp_path, monkeypatch):
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
    _ = TextData(tokenizer=str(tmp_path / "tokenizer.json")).vocab_size
  with pytest.raises(ValueError, match="not a file"):
    _ = TextData(tokenizer="byte").vocab_size
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(ValueError, match=r"pip install .memzoo\[hub\]."):
    _ = TextData(tokenizer="tokenizer.json").vocab_size
