"""SentencePiece models as tokenizers."""

import io
import json
import random
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from memzoo.train import cli, tokenizer
from memzoo.train.data import TextData
from memzoo.train.sources import Document
from memzoo.train.tokenizer import encode_in_pieces, load_tokenizer
from memzoo.zoo.generate import as_text

WORDS = ["memory", "State,", "decay.", "gate", "∑", "é", "  ", "1234", "</s>", "don't", "aaaa", "\U0001f600", "ﬁ", "\t"]
LLAMA = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
KINDS = {
  "bpe": {"model_type": "bpe", "user_defined_symbols": ["\n"]} | LLAMA,
  "unigram": {"model_type": "unigram", "user_defined_symbols": ["\n"]} | LLAMA,
  "bpe_default": {"model_type": "bpe", "character_coverage": 0.98},
  "unigram_default": {"model_type": "unigram", "character_coverage": 0.98},
  "bpe_across_words": {"model_type": "bpe", "split_by_whitespace": False} | LLAMA,
  "word": {"model_type": "word", "vocab_size": 20},
  "char": {"model_type": "char"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """Paths of models, by the names of `KINDS`."""
  folder, chance = tmp_path_factory.mktemp("models"), random.Random(0)
  lines = [" ".join(chance.choices(WORDS, k=12)) for _ in range(200)]

  def train(kind: str) -> str:
    path = folder / f"{kind}.model"
    if not path.exists():
      model, options = io.BytesIO(), {"vocab_size": 330, "hard_vocab_limit": False, "minloglevel": 2} | KINDS[kind]
      sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **options)
      path.write_bytes(model.getvalue())
    return str(path)

  return train


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_texts_are_those_of_the_library(trained, kind):
  model, data = sentencepiece.SentencePieceProcessor(model_file=trained(kind)), TextData(tokenizer=trained(kind))
  for text in (" ".join(WORDS), "", "  two  spaces ", "unseen ∆ 中\n\x00", "</s>"):
    tokens = data.encode(text)
    assert tokens == model.encode(text)
    assert all(isinstance(token, int) for token in tokens)
    assert data.decode(tokens) == model.decode(tokens)
    if "byte_fallback" in KINDS[kind]:
      assert data.decode(tokens) == text
  assert data.vocab_size == model.vocab_size()
  assert data.end_token == model.eos_id() == 2
  assert data.begin_tokens == ()


def test_unknown_pieces_and_numbers_that_are_no_tokens_have_a_text_or_none(trained):
  data = TextData(tokenizer=trained("bpe_default"))
  tokens = data.encode("memory 中")
  assert 0 in tokens
  assert data.decode(tokens) == "memory  ⁇ "
  assert data.decode([*data.encode("memory"), data.vocab_size + 7, 10**6]) == "memory"


def test_special_tokens_are_shown_or_left_out(trained):
  data = TextData(tokenizer=trained("bpe"))
  tokens = [1, *data.encode("memory"), 2, *data.encode("gate")]
  assert data.decode(tokens) == "<s>memory</s>gate"
  assert data.decode(tokens, special=False) == "memory gate"
  assert 2 not in data.encode("memory</s>")


@pytest.mark.parametrize("kind", ["bpe", "bpe_default", "bpe_across_words", "char"])
@settings(deadline=None, max_examples=25)
@given(words=st.lists(st.sampled_from([*WORDS, " ", "a", "\n", "a" * 90]), min_size=1, max_size=300), chance=st.randoms())
def test_a_long_document_in_pieces_has_the_tokens_of_the_whole(trained, kind, words, chance):
  model, text = load_tokenizer(trained(kind)), "".join(word + chance.choice(["", " "]) for word in words).encode()
  found = np.concatenate([np.zeros(0, int), *encode_in_pieces(model.encode_with_places, text, piece=256, overlap=128)])
  assert found.tolist() == model.encode(text.decode())


@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_any_length_have_the_tokens_of_each(trained, kind, monkeypatch):
  monkeypatch.setattr(tokenizer, "_SMALLEST_BATCH", 1000)
  monkeypatch.setattr(tokenizer, "_OVERLAP", 200)
  chance, model = random.Random(1), load_tokenizer(trained(kind))
  pieces, places = [], model.encode_with_places
  monkeypatch.setattr(model, "encode_with_places", lambda text: pieces.append(len(text)) or places(text))
  texts = ["", *(" ".join(chance.choices(WORDS, k=chance.choice((1, 30, 5000)))) for _ in range(12)), ""]
  tokens, lengths = model.encode_documents([Document(str(i), text.encode()) for i, text in enumerate(texts)])
  want = [model.encode(text) for text in texts]
  assert lengths.tolist() == list(map(len, want))
  assert tokens.tolist() == list(chain.from_iterable(want))
  assert tokens.dtype == np.uint16
  assert bool(pieces) == (not kind.startswith("unigram")), "scores of a unigram model are sums over the whole document"
  assert max(pieces, default=0) < 1200


@pytest.mark.parametrize("kind", ["bpe", "unigram", "unigram_default"])
@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from([*WORDS, " ", "中", "a", "\n"]), max_size=20), st.integers(0, 40))
def test_a_text_in_a_stream_is_the_whole_text(trained, kind, words, known):
  data = TextData(tokenizer=trained(kind))
  tokens = data.encode(" ".join(words))
  prompt, new = tokens[:known], tokens[known:]
  if "�" not in data.decode(prompt):  # a prompt ends with a character
    assert data.decode(prompt) + "".join(as_text(new, data.decode, prompt)) == data.decode(tokens)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@settings(deadline=None, max_examples=50)
@given(tokens=st.lists(st.integers(0, 400), max_size=40))
def test_any_tokens_in_a_stream_are_their_whole_text(trained, kind, tokens):
  data = TextData(tokenizer=trained(kind))
  assert "".join(as_text(tokens, data.decode)) == data.decode(tokens)


def test_the_command_shows_spaces_and_characters_of_several_bytes(trained, monkeypatch, capsys):
  data = TextData(tokenizer=trained("bpe"))
  prompt, whole = data.encode("memory"), data.encode("memory gate 中∑ decay.")
  assert whole[: len(prompt)] == prompt, "as this test needs it"
  steps = np.array([*whole[len(prompt) :], 2])[:, None]
  monkeypatch.setattr("memzoo.train.evaluation.load_run", lambda *_, **__: (SimpleNamespace(model=None, data=data), None, 1))
  monkeypatch.setattr("memzoo.zoo.generate.stream", lambda *_, **__: iter(steps))
  cli.generate(Path("run"), "memory")
  assert capsys.readouterr().out == "memory gate 中∑ decay.\n"


def test_a_folder_with_only_a_model_has_the_tokens_that_its_files_name(trained, tmp_path):
  (tmp_path / "tokenizer.model").write_bytes(Path(trained("bpe")).read_bytes())
  bare, size = TextData(tokenizer=trained("bpe")), TextData(tokenizer=trained("bpe")).vocab_size
  assert TextData(tokenizer=str(tmp_path)).tokenizer_digest == bare.tokenizer_digest
  added = {"0": {"content": "<unk>"}, str(size): {"content": "<|im_end|>", "special": True}}
  config = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "<|im_end|>", "added_tokens_decoder": added}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  data = TextData(tokenizer=str(tmp_path))
  assert (data.vocab_size, data.begin_tokens, data.end_token) == (size + 1, (1,), size)
  assert data.decode([*data.encode("gate"), size]) == "gate<|im_end|>"
  assert data.decode([1, *data.encode("gate"), size], special=False) == "gate"
  assert data.encode("gate<|im_end|>") == bare.encode("gate<|im_end|>")
  assert data.tokenizer_digest != bare.tokenizer_digest
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<e>"}))
  with pytest.raises(ValueError, match=r"has '<e>' as eos_token, which is not a token of .*tokenizer\.model; expected one"):
    _ = TextData(tokenizer=str(tmp_path)).vocab_size


def test_a_model_without_an_end_has_none(tmp_path):
  model = io.BytesIO()
  options = {"vocab_size": 12, "hard_vocab_limit": False, "minloglevel": 2, "eos_id": -1, "bos_id": -1}
  sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["a b c a b"] * 9), model_writer=model, **options)
  (tmp_path / "a.model").write_bytes(model.getvalue())
  data = TextData(tokenizer=str(tmp_path / "a.model"))
  assert (data.end_token, data.stop_tokens) == (None, ())
  assert TextData(tokenizer=str(tmp_path / "a.model"), end_of_document="a").end_token == data.encode("a")[-1]


def test_what_is_no_model_and_a_missing_library_are_named(trained, tmp_path, monkeypatch):
  for content in (b"", b"{}", Path(trained("bpe")).read_bytes()[:100]):
    (tmp_path / "a.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"TextData\.tokenizer is '.*a\.model', which is not a SentencePiece model: .*\.$"):
      _ = TextData(tokenizer=str(tmp_path / "a.model")).vocab_size
  monkeypatch.setitem(sys.modules, "sentencepiece", None)
  with pytest.raises(ValueError, match=r"a\.model', which needs .* pip install \"memzoo\[sentencepiece\]\"\. The default"):
    _ = TextData(tokenizer=str(tmp_path / "a.model")).vocab_size
