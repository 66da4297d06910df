"""Documents from the standard library, files, folders and globs: which are read, and under which names."""

import gzip
import os
from collections import Counter
from pathlib import Path

import pytest
from memzoo.train.sources import read_documents, read_sources, skipped_in_words


def test_standard_library_is_source_text_without_packages_and_tests():
  documents = read_documents("stdlib")
  assert all(document.name.endswith(".py") for document in documents)
  assert not any(set(document.name.split("/")) & {"site-packages", "test", "encodings"} for document in documents)
  assert [document.name for document in documents if "/" not in document.name][:2] == ["__future__.py", "__hello__.py"]


def test_folder_gives_its_text_files_without_hidden_and_binary_ones(tmp_path):
  (tmp_path / "sub").mkdir()
  (tmp_path / "b.txt").write_text("two")
  (tmp_path / "sub" / "c.md").write_text("three")
  (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "and a half"}\n')
  (tmp_path / ".hidden").write_text("no")
  (tmp_path / "picture").write_bytes(b"\x89PNG\0\0")
  want = [("a.jsonl:1", b"one"), ("a.jsonl:3", b"and a half"), ("b.txt", b"two"), ("sub/c.md", b"three")]
  assert read_documents(str(tmp_path)) == want


def test_glob_and_several_sources(tmp_path):
  for name in ("a.txt", "b.txt", "c.md"):
    (tmp_path / name).write_text(name)
  documents = read_documents((str(tmp_path / "*.txt"), str(tmp_path / "c.md")))
  assert [document.name for document in documents] == ["a.txt", "b.txt", "c.md"]


def test_compressed_files_are_read_like_any_other(tmp_path):
  (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one"))
  (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"body": "two"}\n{"body": "three"}\n'))
  assert [document.text for document in read_documents(str(tmp_path), "body")] == [b"one", b"two", b"three"]


@pytest.mark.parametrize("content", [b"no gzip at all", gzip.compress(b"cut short" * 99)[:-9]], ids=["foreign", "cut short"])
def test_a_broken_compressed_file_is_named(tmp_path, content):
  path = tmp_path / "a.txt.gz"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=r"a\.txt\.gz cannot be read"):
    read_documents(str(path))


@pytest.mark.parametrize("line", ['{"text": 3}', '{"txt": "a"}', "[1]", '{"text": "a"'])
def test_broken_line_of_jsonl_is_named(tmp_path, line):
  path = tmp_path / "a.jsonl"
  path.write_text('{"text": "fine"}\n' + line + "\n")
  with pytest.raises(ValueError, match=r"a\.jsonl, line 2: expected a JSON object"):
    read_documents(str(path))


def test_a_missing_source_is_an_error_that_says_what_is_expected(tmp_path):
  with pytest.raises(ValueError, match=r"no_such.*matches no file.*stdlib"):
    read_documents(str(tmp_path / "no_such*"))


def test_unreadable_source_is_an_error(tmp_path, monkeypatch):
  path = tmp_path / "a.txt"
  path.write_text("text")

  def refuse(self):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
  with pytest.raises(ValueError, match=r"a\.txt cannot be read: Permission denied"):
    read_documents(str(path))


# Names do not depend on what else is there.


def names(source) -> list[str]:
  return [document.name for document in read_documents(str(source))]


def write(*paths: Path) -> None:
  for path in paths:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(path.name)


@pytest.mark.parametrize("pattern", ["**/*.txt", "*/x.txt", "a/*.txt", "a/x.t[x]t", "?/**/x.txt"])
def test_a_file_that_is_added_renames_no_other(tmp_path, pattern):
  write(tmp_path / "a" / "x.txt")
  before = names(tmp_path / pattern)
  write(tmp_path / "b" / "deep" / "x.txt", tmp_path / "a" / "y.txt", tmp_path / "c" / "x.txt")
  assert before == ["x.txt" if pattern.startswith("a/") else "a/x.txt"]
  assert before[0] in names(tmp_path / pattern)
  assert (len(names(tmp_path / pattern)) > 1) == (pattern != "a/x.t[x]t")


def test_names_are_relative_to_the_part_of_a_glob_without_wildcards(tmp_path, monkeypatch):
  write(tmp_path / "d" / "a" / "x.txt")
  monkeypatch.chdir(tmp_path)
  patterns = ("**/*.txt", "./**/*.txt", "d/*/x.txt", "d/a/*", "d/../d/*/*.txt")
  assert [names(pattern) for pattern in patterns] == [["d/a/x.txt"], ["d/a/x.txt"], ["a/x.txt"], ["x.txt"], ["a/x.txt"]]


def test_a_binary_file_of_a_glob_is_left_out_whatever_else_matches(tmp_path):
  write(tmp_path / "a.txt")
  (tmp_path / "b.bin").write_bytes(b"a\0")
  (source,) = read_sources(str(tmp_path / "*"))
  assert ([document.name for document in source.documents], source.skipped) == (["a.txt"], {"binary files": 1})
  with pytest.raises(ValueError, match=r"b\.\*', which holds no text; .* Skipped: binary files \(1\)\."):
    read_documents(str(tmp_path / "b.*"))
  assert names(tmp_path / "b.bin") == ["b.bin"], "a file that is named alone is read"


# What is not read is counted.


def test_a_linked_folder_is_read_under_its_own_name(tmp_path):
  write(tmp_path / "text" / "a.txt", tmp_path / "elsewhere" / "sub" / "b.txt", tmp_path / "text" / ".cache" / "c.txt")
  (tmp_path / "text" / "linked").symlink_to(tmp_path / "elsewhere")
  (tmp_path / "text" / "cached").symlink_to(tmp_path / "text" / ".cache")
  assert names(tmp_path / "text") == ["a.txt", "cached/c.txt", "linked/sub/b.txt"]


def test_a_linked_folder_that_is_read_anyway_is_counted(tmp_path):
  write(tmp_path / "text" / "a.txt", tmp_path / "text" / "sub" / "b.txt", tmp_path / "elsewhere" / "c.txt")
  (tmp_path / "text" / "all").symlink_to(tmp_path / "text")
  (tmp_path / "text" / "again").symlink_to(tmp_path / "text" / "sub")
  (tmp_path / "text" / "out").symlink_to(tmp_path / "elsewhere")
  (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "elsewhere")
  (source,) = read_sources(str(tmp_path / "text"))
  assert [document.name for document in source.documents] == ["a.txt", "out/c.txt", "sub/b.txt"]
  assert source.skipped == {"links to folders that are read anyway": 3}


def test_a_loop_of_links_gives_a_glob_every_file_once(tmp_path):
  write(tmp_path / "text" / "sub" / "a.txt")
  (tmp_path / "text" / "sub" / "loop").symlink_to(tmp_path / "text")
  assert names(tmp_path / "text" / "**" / "*.txt") == ["sub/a.txt"]


def test_empty_documents_special_files_and_folders_of_a_glob_are_counted(tmp_path):
  write(tmp_path / "a.txt", tmp_path / "sub" / "b.txt")
  (tmp_path / "empty.txt").touch()
  (tmp_path / "c.jsonl").write_text('{"text": ""}\n\n{"text": "c"}\n')
  os.mkfifo(tmp_path / "pipe")
  (folder,) = read_sources(str(tmp_path))
  assert [document.name for document in folder.documents] == ["a.txt", "c.jsonl:3", "sub/b.txt"]
  assert folder.skipped == {"empty documents": 2, "special files": 1}
  (matched,) = read_sources(str(tmp_path / "*"))
  assert [document.name for document in matched.documents] == ["a.txt", "c.jsonl:3"]
  assert matched.skipped == {"empty documents": 2, "special files": 1, "folders that a glob matches": 1}
  (deep,) = read_sources(str(tmp_path / "**"))
  assert len(deep.documents) == 3
  assert deep.skipped == {"empty documents": 2, "special files": 1}


def test_an_unreadable_folder_is_an_error(tmp_path, monkeypatch):
  write(tmp_path / "a.txt", tmp_path / "sub" / "b.txt")
  scandir = os.scandir

  def refuse(path):
    if os.path.basename(path) == "sub":
      raise PermissionError(13, "Permission denied", str(path))
    return scandir(path)

  monkeypatch.setattr("os.scandir", refuse)
  with pytest.raises(ValueError, match=r"sub cannot be read: Permission denied"):
    read_documents(str(tmp_path))


@pytest.mark.parametrize("pattern", ["", "*.jsonl", "b.jsonl"])
def test_a_line_that_cannot_be_text_is_named(tmp_path, pattern):
  (tmp_path / "b.jsonl").write_text('{"text": "\\ud800"}\n')
  with pytest.raises(ValueError, match=r"b\.jsonl, line 1: expected a JSON object .*UnicodeEncodeError"):
    read_documents(str(tmp_path / pattern))


def test_skipped_units_are_counted_in_words():
  skipped = Counter({"empty documents": 1, "binary files": 1200})
  assert skipped_in_words(skipped) == " Skipped: binary files (1,200), empty documents (1)."
  assert skipped_in_words(Counter()) == ""
