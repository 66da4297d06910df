"""Reports: one HTML file about a run, about several, or about a comparison, whole or in pieces."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from memzoo.train import cli, html_memory
from memzoo.train.chosen_settings import chosen_settings
from memzoo.train.compare import Budget, Comparison, Trial
from memzoo.train.config import build, shipped
from memzoo.train.html_figures import Line, extremes, panel, thinned
from memzoo.train.html_parts import shaded_text
from memzoo.train.html_report import write_report
from memzoo.train.loop import train
from memzoo.train.run_record import read_run, read_scalars
from memzoo.zoo.inspect import InnerLoss
from tiny_run import make_runs_quick, write_text

VOID = {"meta", "link", "br", "hr", "img", "input"}
SAMPLE = "if a < b & c > d: '<script>alert(1)</script>' \"x\"\n"


class Page(HTMLParser):
  """A page, taken apart: its elements with their attributes, its text by section, and whether every tag is closed."""

  def __init__(self, path: Path):
    super().__init__()
    self.source = path.read_text(encoding="utf-8")
    self.open, self.elements, self.wrong, self.texts = [], [], [], {}
    self.section = ""
    self.feed(self.source)
    self.wrong += [f"{tag} is not closed" for tag in self.open]

  def handle_starttag(self, tag, attributes):
    self.elements.append((tag, dict(attributes)))
    if tag == "section":
      self.section = dict(attributes)["id"]
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.elements.append((tag, dict(attributes)))

  def handle_endtag(self, tag):
    if not self.open or self.open.pop() != tag:
      self.wrong.append(f"</{tag}> closes another tag")
    if tag == "section":
      self.section = ""

  def handle_data(self, data):
    self.texts[self.section] = self.texts.get(self.section, "") + data

  def values(self, *names):
    return [attributes[name] for _, attributes in self.elements for name in names if name in attributes]

  def pictures(self):
    return [attributes.get("aria-label", "") for tag, attributes in self.elements if tag == "svg"]


def checked(path: Path) -> Page:
  """The page at `path`, which is well formed, loads nothing, and has a text for every picture."""
  page = Page(path)
  assert page.wrong == []
  assert page.source.count("<script") == 1
  links, ids = page.values("href", "src", "xlink:href"), page.values("id")
  assert [link for link in links if not link.startswith(("#", "data:"))] == []
  assert not re.search(r"https?:|@import|url\((?!#)", page.source.replace(page.texts.get("sample", ""), ""))
  assert len(ids) == len(set(ids))
  assert {link[1:] for link in links if link.startswith("#")} | set(re.findall(r"url\(#([\w-]+)\)", page.source)) <= set(ids)
  assert all(len(picture) > 10 for picture in page.pictures())
  levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
  assert levels[0] == 1
  assert all(b <= a + 1 for a, b in pairwise(levels))
  assert len(page.source) < 2_000_000
  return page


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A finished run of a small model with a memory, whose sample has characters that HTML must escape."""
  folder = tmp_path_factory.mktemp("report")
  mixers = ["LanguageModel.mixers=[@GatedConv, @DeltaNet]", "GatedConv.channels=8", "DeltaNet.num_heads=2"]
  sizes = ["LanguageModel.width=16", "LanguageModel.depth=2", "DeltaNet.key_dim=8", "DeltaNet.value_dim=8"]
  text = [f"TextData.sources={write_text(folder / 'text')}", "TextData.sequence_length=32", "TextData.validation_fraction=0.2"]
  steps = ["steps=6", "log_every=2", "evaluate_every=3", "checkpoint_every=3", "evaluation_batches=1", "sample_tokens=0"]
  settings = [*mixers, *sizes, *text, "MeshShape.data=1", *(f"Trainer.{step}" for step in steps)]
  with pytest.MonkeyPatch.context() as patch:
    make_runs_quick(patch)
    train(build("quickstart", settings), folder / "run", progress=False)
  (folder / "run" / "sample.txt").write_text(SAMPLE)
  return folder / "run"


@pytest.fixture
def copy(run, tmp_path):
  """A copy of the run's folder, to damage."""
  return Path(shutil.copytree(run, tmp_path / "copy"))


def without(text: str, *words: str) -> list[str]:
  return [word for word in words if word not in text]


def raising(error):
  def raises(*_, **__):
    raise error

  return raises


def memzoo(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
  """A command line in this process: exit status, standard output, standard error."""
  monkeypatch.setattr(cli, "start", lambda cache=True: None)
  monkeypatch.setattr("sys.argv", ["memzoo", *arguments])
  try:
    cli.main()
    status = 0
  except SystemExit as stopped:
    status = stopped.code or 0
  return status, *capsys.readouterr()


@pytest.mark.slow
def test_a_run_has_its_curves_memory_sample_model_speed_and_settings(run, monkeypatch, capsys):
  status, out, err = memzoo(monkeypatch, capsys, "report", str(run))
  assert (status, err) == (0, "")
  assert out.startswith(f"Wrote {run / 'report.html'}, ")
  page = checked(run / "report.html")
  sections = ["curves", "memory-over-a-document", "sample", "model", "speed-and-layout", "settings"]
  assert list(page.texts)[1:] == sections
  result = json.loads((run / "result.json").read_text())
  assert f"{result['validation_bits_per_byte']:.3f} bits per byte" in page.texts[""]
  assert "finished" in page.texts[""]
  assert without(page.texts["curves"], "learning rate", "gradient norm", "validation", "zlib -9") == []
  memory = page.texts["memory-over-a-document"]
  drawn = ("how much is stored", "write strength", "how long a write lasts", "hard to predict", "write most")
  assert without(memory, *drawn) == []
  assert "DeltaNet1matrices, gates, writes" in memory
  assert "GatedConv0nothing" in memory
  assert page.texts["sample"].endswith(SAMPLE)
  assert without(page.texts["model"], "block 0", "DeltaNet", "embedding") == []
  assert without(page.texts["speed-and-layout"], "tokens/s", "step 3, step 6", "evaluation", "parameters", "mesh") == []
  assert without(page.texts["settings"], "DeltaNet.key_dim", "All settings", "Trainer.nonfinite_limit") == []


@pytest.mark.slow
def test_a_run_without_checkpoints_result_and_text_says_what_is_missing(copy):
  shutil.rmtree(copy / "checkpoints")
  (copy / "result.json").unlink()
  (copy / "sample.txt").unlink()
  with (copy / "metrics.jsonl").open("a") as metrics:
    metrics.write('{"step": 7, "lo')  # a kill cut it
  page = checked(write_report([copy]))
  assert without(page.texts[""], "Not finished: 6 of 6 steps; at the last evaluation", "No checkpoint") == []
  assert "memory-over-a-document" not in page.texts
  assert page.pictures()
  (copy / "metrics.jsonl").unlink()
  page = checked(write_report([copy], memory=False))
  assert without(page.texts[""], "metrics.jsonl has no steps yet", "not evaluated yet") == []
  assert "No steps are recorded yet" in page.texts["curves"]
  assert "No sample" in page.texts["sample"]


def test_a_run_whose_text_is_gone_has_the_rest(copy, run, monkeypatch):
  monkeypatch.setattr(html_memory, "load_run_and_text", raising(ValueError("TextData.sources matches no file here.")))
  page = checked(write_report([copy]))
  assert "Nothing is drawn: TextData.sources matches no file here." in page.texts["memory-over-a-document"]
  assert "learning rate" in page.texts["curves"]


def test_a_config_of_no_use_here_and_damaged_files_leave_the_rest(copy):
  config = copy / "config.gin"
  config.write_text("import layers_that_are_not_here\n" + config.read_text())
  (copy / "result.json").write_text("{")
  page = checked(write_report([copy]))
  assert without(page.texts[""], "cannot import layers_that_are_not_here", "result.json is not JSON", "Not finished") == []
  assert "layers_that_are_not_here" in page.texts["settings"]
  assert "model" not in page.texts
  (copy / "metrics.jsonl").write_text('{"step": 1}\nnot a row\n{"step": 2}\n')
  assert "metrics.jsonl, line 2, is damaged" in checked(write_report([copy])).texts[""]


def test_steps_that_were_skipped_are_named_and_marked(copy):
  rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
  rows[3] |= {"skipped": True, "loss": None, "bits_per_byte": None, "gradient_norm": None}
  (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  page = checked(write_report([copy], memory=False))
  assert without(page.texts["curves"], "not finite: 1 steps (4)", "Marks on the axis are skipped steps") == []


def test_several_runs_share_pictures_and_show_the_differences_of_their_settings(copy, run, tmp_path, monkeypatch, capsys):
  config = copy / "config.gin"
  config.write_text(config.read_text().replace("DeltaNet.key_dim = 8", "DeltaNet.key_dim = 4"))
  monkeypatch.chdir(tmp_path)
  status, out, _ = memzoo(monkeypatch, capsys, "report", str(run), str(copy), "--no-memory")
  assert (status, out.split(",")[0]) == (0, "Wrote report.html")
  page = checked(tmp_path / "report.html")
  assert without(page.texts[""], "2 runs", "The best is") == []
  assert without(page.texts["differences-of-settings"], "settingruncopy", "DeltaNet.key_dim84") == []
  assert without(page.texts["curves"], "run, training", "copy, training", "run, validation", "copy, validation") == []


def test_folders_that_are_no_runs_and_impossible_files_print_one_line(run, tmp_path, monkeypatch, capsys):
  (tmp_path / "unfinished" / "trials").mkdir(parents=True)
  (tmp_path / "comparison").mkdir()
  (tmp_path / "comparison" / "results.json").write_text("[]")
  cases = [
    ([tmp_path], "is no run: it has no config.gin"),
    ([tmp_path / "unfinished"], "is a comparison without results.json, not finished"),
    ([tmp_path / "comparison"], "not a JSON object"),
    ([tmp_path / "comparison", run], "is a comparison; expected it alone"),
    ([run, "--no-memory", "--out", tmp_path], "a folder; expected the path of a file"),
    ([run, "--no-memory", "--out", tmp_path / "none" / "report.html"], "No such file or directory"),
  ]
  for arguments, words in cases:
    status, _, err = memzoo(monkeypatch, capsys, "report", *map(str, arguments))
    assert (status, err.count("\n")) == (2, 1), err
    assert words in err


def comparison(continuous: bool = False) -> Comparison:
  """Two layers, one at two sizes, on two tests."""

  def trial(name, size, good):
    scores = {"8": [good, good + 0.1], "16": [good / 2, good / 2]}
    kinds = {test: {"near": seeds, "far": seeds} for test, seeds in scores.items()}
    rates = {"0.01": good, "0.1": 0.2}
    training = {rate: [[10, [2.0, 2.1], [0.1, 0.2]], [20, [1.0, 1.1], [last, last]]] for rate, last in rates.items()}
    return Trial(name, size, 1000, 20, 3.0, 0.01, scores, kinds, training)

  trials = [trial("DeltaNet", 512, 0.6), trial("DeltaNet", 1024, 0.8), trial("Mine<T>", 512, 0.4)]
  chance, budget = {"8": 0.1, "16": 0.05}, Budget([0.01, 0.1])
  return Comparison("Recall(pairs=4)", "pairs", chance, continuous, budget, trials, "memzoo compare 'a<b'")


@pytest.mark.parametrize(("continuous", "best"), [(False, "DeltaNet, 1.0 KiB"), (True, "Mine<T>")])
def test_a_comparison_has_its_table_curves_budget_and_command(tmp_path, continuous, best):
  comparison(continuous).save(tmp_path / "results.json")
  assert Comparison.load(tmp_path / "results.json").trials == comparison(continuous).trials
  page = checked(write_report([tmp_path]))
  assert f"On 16 pairs the best is {best}, with" in page.texts[""]
  assert without(page.texts["results"], "0.40 ± 0.00" if not continuous else "0.4 ± 0", "1,024", "scores by state") == []
  assert without(page.texts["learning-curves"], "rate 0.01, chosen", "rate 0.1", "Mine<T>, 512 bytes") == []
  assert "far" in page.texts["by-kind-of-answer"]
  assert "0.995" in page.texts["budget"]
  assert page.texts["command"].endswith("memzoo compare 'a<b'")


def test_layers_of_every_kind_are_drawn_or_named(monkeypatch):
  """With results of `inspect` made by hand: nothing is compiled."""
  values = np.linspace(0.2, 0.8, 40).reshape(1, 40, 1)
  fakes = {"routing": {"block 0/routing": np.array([[0.6, 0.4]])}, "distances": {"block 1/distance": values}}
  fakes["inner_losses"] = {"block 2": InnerLoss(values, values / 2), "block 3": InnerLoss(values, np.full_like(values, np.nan))}
  for name, found in fakes.items():
    monkeypatch.setattr(html_memory.inspect, name, lambda *_, found=found: found)
  errors = {"gates": TypeError("odd shape"), "retention": ValueError("model, a Mine, has no layers of the family")}
  errors["curves_over_time"] = ValueError("model has no memory matrices: its layers are X.")
  for name, error in errors.items():
    monkeypatch.setattr(html_memory.inspect, name, raising(error))
  messages = []
  drawn = html_memory._draw_all(messages, None, None, np.zeros((1, 40), np.int32))
  assert messages == ["Not drawn: gates (TypeError: odd shape)"]
  pictures = {name: len(seen.pictures) for name, seen in drawn.items() if seen.pictures}
  assert pictures == {"routing": 1, "learning": 1, "distances": 1}
  assert drawn["learning"].pictures[0].count("after the write</li>") == 1
  model = build("tasks/mqar").model.clone(depth=4)
  text = html_memory._who_is_drawn(model, drawn)
  cells = [cell for cell in re.sub("<[^>]*>", "|", text.partition("<tbody>")[2]).split("|") if cell]
  assert cells == ["GatedConv", "0, 2", "routing, learning", "GatedDeltaNet", "1, 3", "learning, distances"]


def test_the_longest_document_is_shown_without_its_neighbours():
  ids = np.array([[1, 1, 2, 2, 2, 0], [1, 2, 2, 2, 2, 3]])
  batch = {name: np.arange(12).reshape(2, 6) for name in ("tokens", "targets", "weights")} | {"segment_ids": ids}
  assert html_memory.longest_document([batch]).tokens.tolist() == [[7, 8, 9, 10]]
  assert html_memory.longest_document([batch], most=3).tokens.tolist() == [[7, 8, 9]]


def test_matrices_of_a_mixture_are_averaged_and_deep_models_thinned():
  curve = np.ones((3, 1, 2))
  merged = html_memory._merged({"block 0/memory_0": curve, "block 0/memory_1": 3 * curve, "block 0/shared": 5 * curve})
  assert {name: by_block["block 0"].tolist() for name, by_block in merged.items()} == {
    "memory, mean of all": [2, 2, 2],
    "shared": [5, 5, 5],
  }
  chosen = html_memory._spread({f"block {i}": i for i in range(30)})
  assert (len(chosen), chosen[0][1][0], chosen[-1][1][0]) == (8, "block 0", "block 29")


def test_thinned_lines_keep_their_ends_and_bands_their_extremes():
  x = np.arange(1001)
  y = np.where(x == 700, 9.0, np.sin(x))
  kept, values = thinned(x, y, 100)
  assert len(kept) <= 102
  assert (kept[0], kept[-1]) == (0, 1000)
  assert values.tolist() == y[kept.astype(int)].tolist()
  y[3] = np.nan
  _, low, high, every = extremes(x, y, 100)
  assert every == 11
  assert (high.max(), low.min()) == (9.0, np.nanmin(y))
  assert thinned([], [])[0].size == 0


def test_pictures_take_the_colours_of_the_page_and_keep_small_numbers():
  picture = panel("rate & <size>", [Line("a<b", [0, 1], [0.00012, 0.00045], 3)], xlabel="x", ylabel="y")
  assert "var(--c3)" in picture
  assert not re.search("#fe0|#000000", picture.partition("<svg")[2])
  assert ">0.00015</text>" in picture
  assert "rate &amp; &lt;size&gt;" in picture
  assert 'aria-label="rate &amp; &lt;size&gt;: y against x. a&lt;b: from 0.00012 to 0.00045."' in picture


def test_shades_are_merged_and_escaped():
  text = shaded_text([("a", 0.0), ("<", 0.5), ("&", 0.52), ("z", 7.0), ("n", float("nan"))])
  assert re.sub("<pre[^>]*>|</pre>", "", text) == 'a<span class="s5">&lt;&amp;</span><span class="s9">z</span>n'


def test_rates_are_read_from_events_until_one_is_cut(run, tmp_path):
  (events,) = (run / "tensorboard").glob("events*")
  whole = read_scalars(run / "tensorboard", "tokens_per_second")
  assert list(whole) == [2, 3, 4, 6]
  assert list(whole.values()) == list(read_run(run).rates.values())
  data = events.read_bytes()
  (tmp_path / events.name).write_bytes(data[:-3])
  assert list(read_scalars(tmp_path, "learning_rate"))[:5] == [1, 2, 3, 4, 5]
  second = data.index(b"learning_rate", data.index(b"learning_rate") + 1)
  (tmp_path / events.name).write_bytes(data[:second] + bytes(len(data) - second))
  assert list(read_scalars(tmp_path, "learning_rate")) == [1]


@pytest.mark.parametrize("config", ["quickstart", "models/yaad_10m", "models/mem_mamba_130m", "tasks/regression"])
def test_chosen_settings_are_those_that_differ_from_the_defaults(config):
  assert config in shipped()
  experiment = build(config, ["Trainer.log_every=21"])
  chosen = chosen_settings(experiment)
  assert chosen["Trainer.log_every"] == ("21", "20")
  assert chosen[f"{type(experiment.model).__name__}.width"][1] == ""
  assert not {"Trainer.seed", "MeshShape.data"} & chosen.keys()
  assert not {"Loss.kind", "Network.residual"} & chosen.keys(), "the loss of Yaad is its default"


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def photographed(page: Path, out: Path, width: int, *options: str) -> tuple[np.ndarray, list[str]]:
  """A screenshot, grey [height, width] from 0 to 1, and what the browser's console said."""
  flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", *options]
  flags += [f"--window-size={width},1400", f"--screenshot={out}", f"--user-data-dir={out.parent / 'profile'}"]
  done = subprocess.run([CHROMIUM, *flags, page.as_uri()], capture_output=True, text=True, timeout=120)
  assert out.exists(), done.stderr
  return imread(out)[..., :3].mean(axis=-1), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
def test_a_browser_shows_the_page_in_light_and_dark_and_has_no_complaints(run, tmp_path):
  page = write_report([run], tmp_path / "page.html", memory=False)
  grey, said = photographed(page, tmp_path / "light.png", 500, "--blink-settings=preferredColorScheme=1")
  assert said == []
  assert np.median(grey) > 0.9
  assert 0.02 < (grey < 0.5).mean() < 0.5  # text and lines
  grey, said = photographed(page, tmp_path / "dark.png", 1300, "--blink-settings=preferredColorScheme=0")
  assert said == []
  assert np.median(grey) < 0.2
  assert 0.005 < (grey > 0.5).mean() < 0.5
  broken = tmp_path / "broken.html"
  broken.write_text(page.read_text().replace("addEventListener", "addEventListner"))
  assert photographed(broken, tmp_path / "broken.png", 500)[1], "an error in the page's script must be noticed"
