"""Tokenizers: the tokens of a text, all of them and no others, at a bounded cost."""

import hashlib
import json
import os
import random
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from memzoo.train import cli, tokenizer
from memzoo.train.data import TextData
from memzoo.train.setup import set_up
from memzoo.train.sources import Document, read_documents
from memzoo.train.tokenizer import FileTokenizer, encode_in_pieces, train_tokenizer
from memzoo.zoo.generate import as_text
from tiny_run import tiny_experiment, write_text


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
    _ = TextData(tokenizer="byte.json").vocab_size
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(ValueError, match=r"pip install .memzoo\[hub\]."):
    _ = TextData(tokenizer=str(tmp_path / "tokenizer.json")).vocab_size


# The tokens of a text are all of them, and no others.


def changed(path: str, **changes) -> str:
  """A tokenizer's file with other values of some of its fields; `model` is updated, not replaced."""
  content = json.loads(Path(path).read_text())
  content["model"] |= changes.pop("model", {})
  Path(path).write_text(json.dumps(content | changes))
  return path


def documents_of(*texts: str) -> list[Document]:
  return [Document(str(i), text.encode()) for i, text in enumerate(texts)]


def test_truncation_padding_and_dropout_in_the_file_are_not_obeyed(tokenizer_path):
  texts = "memory " * 250, "memory"
  whole = FileTokenizer(tokenizer_path)
  want, lengths = whole.encode_documents(documents_of(*texts))
  tokenizer = tokenizers.Tokenizer.from_file(tokenizer_path)
  tokenizer.enable_truncation(16)
  tokenizer.enable_padding(length=16, pad_id=3)
  tokenizer.save(tokenizer_path)
  file = FileTokenizer(changed(tokenizer_path, model={"dropout": 0.5}))
  found, found_lengths = file.encode_documents(documents_of(*texts))
  assert lengths.tolist() == found_lengths.tolist()
  assert lengths[0] > 250 > lengths[1]
  np.testing.assert_array_equal(found, want)
  assert [file.encode(text) for text in texts] == [whole.encode(text) for text in texts]
  assert file.decode(file.encode(texts[0])) == texts[0]


def test_special_tokens_are_neither_added_nor_left_out(tokenizer_path):
  tokenizer = tokenizers.Tokenizer.from_file(tokenizer_path)
  tokenizer.add_special_tokens(["<s>", "</s>"])
  special = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s>", special_tokens=special)
  tokenizer.save(tokenizer_path)
  file, text = FileTokenizer(tokenizer_path), "memory</s> state"
  assert not {token for _, token in special} & set(file.encode("memory state"))
  assert file.decode(file.encode(text)) == text
  tokens, lengths = file.encode_documents(documents_of("memory state", text))
  assert tokens.tolist() == file.encode("memory state") + file.encode(text)
  assert lengths.tolist() == [len(file.encode("memory state")), len(file.encode(text))]


def test_a_byte_tokenizer_shows_other_tokens_as_unknown():
  assert TextData().decode([65, 256 + 65, 66]) == "A\N{REPLACEMENT CHARACTER}B"


def test_the_vocabulary_reaches_to_the_largest_token(tmp_path):
  path = str(tmp_path / "tokenizer.json")
  tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "c": 2, "d": 9}, [])).save(path)
  data = TextData(tokenizer=path)
  assert data.vocab_size == 10
  for known, fits in ((4, False), (9, False), (10, True)):
    refusal = rf"vocab_size is {known}; expected at least 10: the largest token of TextData.tokenizer='.*json' is 9\.$"
    with nullcontext() if fits else pytest.raises(ValueError, match=refusal):
      data.check_model(SimpleNamespace(vocab_size=known))


def test_the_dtype_of_tokens_holds_the_largest(tmp_path):
  path = str(tmp_path / "tokenizer.json")
  for largest, dtype in ((2**16 - 1, np.uint16), (2**16, np.uint32)):
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": largest}, [])).save(path)
    tokens, _ = FileTokenizer(path).encode_documents(documents_of("ab"))
    assert tokens.dtype == dtype
    assert tokens.tolist() == [0, largest]


def test_a_tokenizer_without_tokens_is_refused(tmp_path):
  tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
  with pytest.raises(ValueError, match=r"tokenizer\.json', which has no tokens"):
    _ = TextData(tokenizer=str(tmp_path / "tokenizer.json")).vocab_size


def test_the_digest_is_that_of_the_file_as_it_was_loaded(tokenizer_path):
  data, again = TextData(tokenizer=tokenizer_path), TextData(tokenizer=tokenizer_path)
  data.encode("memory")
  before = Path(tokenizer_path).read_bytes()
  changed(tokenizer_path, version="1.0", truncation=None, added_tokens=[])
  Path(tokenizer_path).write_bytes(Path(tokenizer_path).read_bytes() + b"\n")
  assert data.tokenizer_digest == hashlib.blake2b(before, digest_size=16).hexdigest()
  assert again.tokenizer_digest != data.tokenizer_digest


# Encoding takes memory in proportion to the text.


def byte_level() -> tokenizers.Tokenizer:
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  return tokenizer


def metaspace() -> tokenizers.Tokenizer:
  """Spaces become a part of the words, and the text a single word, as in converted SentencePiece models."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=False))
  tokenizer.normalizer = tokenizers.normalizers.Sequence([
    tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")
  ])
  tokenizer.decoder = tokenizers.decoders.Metaspace()
  return tokenizer


def word_pieces() -> tokenizers.Tokenizer:
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="<unk>"))
  tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  tokenizer.decoder = tokenizers.decoders.WordPiece()
  return tokenizer


def unigram() -> tokenizers.Tokenizer:
  tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  tokenizer.decoder = tokenizers.decoders.Metaspace()
  return tokenizer


TRAINERS = {
  byte_level: (tokenizers.trainers.BpeTrainer, {}),
  metaspace: (tokenizers.trainers.BpeTrainer, {"max_token_length": 12, "special_tokens": ["<unk>"]}),
  word_pieces: (tokenizers.trainers.WordPieceTrainer, {"special_tokens": ["<unk>"]}),
  unigram: (tokenizers.trainers.UnigramTrainer, {"unk_token": "<unk>", "special_tokens": ["<unk>"]}),
}
WORDS = ["memory", "State,", "decay.\n", "gate", "∑", "é", "   ", "\n\n\t", "1234", "<|end|>", "don't", "aaaa", "\U0001f600"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """Files of tokenizers of four kinds, by name. A token that is added to each occurs in the text, with spaces around it."""
  folder, chance = tmp_path_factory.mktemp("tokenizers"), random.Random(0)
  texts = [" ".join(chance.choices(WORDS, k=12)) for _ in range(60)]
  for make, (trainer, options) in TRAINERS.items():
    tokenizer = make()
    tokenizer.train_from_iterator(texts, trainer(vocab_size=350, show_progress=False, **options))
    tokenizer.add_tokens([tokenizers.AddedToken("<|end|>", lstrip=True, rstrip=True)])
    tokenizer.save(str(folder / f"{make.__name__}.json"))
  return lambda make: str(folder / f"{make.__name__}.json")


@pytest.mark.parametrize("make", TRAINERS)
@settings(deadline=None, max_examples=25)
@example(words=["a"] * 400, chance=random.Random(0), broken=False)  # two texts whose pieces are joined at several places
@example(words=[*WORDS, " ", "a"] * 20, chance=random.Random(1), broken=False)
@given(st.lists(st.sampled_from([*WORDS, " ", "a", "a" * 90]), min_size=1, max_size=300), st.randoms(), st.booleans())
def test_a_long_document_in_pieces_has_the_tokens_of_the_whole(trained, make, words, chance, broken):
  file, text = FileTokenizer(trained(make)), "".join(word + chance.choice(["", " "]) for word in words).encode()
  if broken:
    at = chance.randrange(len(text))
    text = text[:at] + bytes(chance.choices((0x80, 0xE2, 0xC3, 0xFF), k=20)) + text[at:]
  want = file.encode(text.decode(errors="replace"))
  found = np.concatenate([np.zeros(0, int), *encode_in_pieces(file.encode_with_places, text, piece=256, overlap=128)])
  assert found.tolist() == want


def test_pieces_are_few_and_as_long_as_asked(trained):
  file, text, lengths = FileTokenizer(trained(byte_level)), b"the memory writes " * 3000, []

  def encode(piece):
    lengths.append(len(piece))
    return file.encode_with_places(piece)

  parts = list(encode_in_pieces(encode, text, piece=4096, overlap=512))
  assert max(lengths) <= 4096 + 64
  assert sum(lengths) < 1.2 * len(text)
  assert len(parts) == len(lengths)


def test_a_text_whose_pieces_never_agree_is_encoded_as_a_whole():
  """In vain every time, the pieces double, so that the work is a constant multiple of the text."""
  lengths = []

  def encode(piece):
    lengths.append(len(piece))
    places = np.arange(len(piece))
    return np.full(len(piece), len(lengths)), places, places + 1

  found = np.concatenate(list(encode_in_pieces(encode, b"a" * 5000, piece=256, overlap=64)))
  assert found.tolist() == [len(lengths)] * 5000
  assert lengths[-1] == 5000
  assert sum(lengths) < 5 * 5000


@pytest.mark.parametrize("long", [100, 10_000])
def test_batches_of_documents_have_the_tokens_of_each(trained, long, monkeypatch):
  monkeypatch.setattr(tokenizer, "_SMALLEST_BATCH", 1000)
  monkeypatch.setattr(tokenizer, "_OVERLAP", 200)
  chance, file = random.Random(1), FileTokenizer(trained(byte_level))
  texts = ["", *("".join(chance.choices(WORDS, k=chance.choice((1, 30, long)))) for _ in range(40)), ""]
  tokens, lengths = file.encode_documents(documents_of(*texts))
  want = [file.encode(text) for text in texts]
  assert lengths.tolist() == list(map(len, want))
  assert tokens.tolist() == list(chain.from_iterable(want))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 1000])
def test_encoding_takes_at_most_three_times_the_memory_of_text_and_tokens(tmp_path, tokenizer_path, count):
  script = """
    import sys
    from memzoo.train.data import TextData
    data = TextData(sys.argv[1], sys.argv[2])
    data.encode("memory")
    def peak(): return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    before = peak()
    corpus = data.load()
    text = corpus.training.num_bytes + corpus.validation.num_bytes
    print((peak() - before) / (text + corpus.training.tokens.nbytes + corpus.validation.tokens.nbytes))
  """
  folder = tmp_path / "text"
  folder.mkdir()
  text = "".join(random.Random(0).choices(["memory ", "state ", "decay, ", "gate.\n", "chunk "], k=12_000_000 // 7 // count))
  for i in range(count):
    (folder / f"{i}.txt").write_text(text)
  command = [sys.executable, "-c", textwrap.dedent(script), str(folder), tokenizer_path]
  environment = os.environ | {"TOKENIZERS_PARALLELISM": "true"}
  done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
  assert float(done.stdout) < 3


# What a run needs of a tokenizer.


def test_a_prompt_that_cannot_be_encoded_is_refused_before_the_first_step(tmp_path):
  path = str(tmp_path / "tokenizer.json")
  words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"memory": 0, "writes": 1}))
  words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  words.save(path)
  (tmp_path / "text.txt").write_text("memory writes " * 99)
  data = TextData(str(tmp_path / "text.txt"), path, sequence_length=8, batch_size=2)
  for prompt, refusal in (("def ", "'def ': .* cannot encode"), (" ", "' ', which has no tokens")):
    with pytest.raises(ValueError, match=rf"Trainer\.sample_prompt is {refusal}"):
      set_up(tiny_experiment(tmp_path, data=data, sample_tokens=4, sample_prompt=prompt), tmp_path / "run")
    set_up(tiny_experiment(tmp_path, data=data, sample_tokens=0, sample_prompt=prompt), tmp_path / "run")
  set_up(tiny_experiment(tmp_path, data=data, sample_tokens=4), tmp_path / "run")


def test_the_command_shows_a_text_as_it_continues_the_prompt(trained, monkeypatch, capsys):
  data = TextData(tokenizer=trained(unigram))
  prompt, whole = data.encode("memory gate"), data.encode("memory gate memory gate")
  assert whole[: len(prompt)] == prompt, "as this test needs it"
  assert data.decode(whole[len(prompt) :]) == "memory gate", "decoded alone, it lacks the space"
  monkeypatch.setattr("memzoo.train.evaluation.load_run", lambda *_, **__: (SimpleNamespace(model=None, data=data), None, 1))
  monkeypatch.setattr("memzoo.zoo.generate.stream", lambda *_, **__: iter(np.array(whole)[len(prompt) :, None]))
  cli.generate(Path("run"), "memory gate")
  assert capsys.readouterr().out == "memory gate memory gate\n"


@pytest.mark.parametrize("make", [byte_level, metaspace, unigram, word_pieces])
@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 300), max_size=40), st.integers(0, 40))
def test_the_pieces_of_a_stream_are_the_whole_text(trained, make, tokens, known):
  data = TextData(tokenizer=trained(make))
  tokens = [token % data.vocab_size for token in tokens]
  prompt, new = tokens[:known], tokens[known:]
  assert data.decode(prompt) + "".join(as_text(new, data.decode, prompt)) == data.decode(tokens)


def test_a_place_to_write_is_checked_before_a_tokenizer_is_learned(tmp_path, monkeypatch):
  monkeypatch.setattr(tokenizer, "read_documents", lambda *_: pytest.fail("the text is read"))
  for path in (tmp_path / "none" / "tokenizer.json", tmp_path):
    with pytest.raises(ValueError, match=r"cannot be written; expected a file"):
      train_tokenizer("stdlib", 300, path)
