"""Kills a run at random moments, start-up, evaluations and saves included, and compares it with an undisturbed run.

    python tests/kill_often.py --kills 10 --seed 0

Prints where each kill fell. Exits with 1 unless both runs have bitwise equal losses, with every step once.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tiny_run import write_text

SETTINGS = {
  "LanguageModel.width": 16,
  "LanguageModel.depth": 1,
  "TextData.sequence_length": 32,
  "TextData.batch_size": 4,
  "Trainer.evaluation_batches": 4,
  "Trainer.evaluate_every": 11,
  "Trainer.checkpoint_every": 7,
  "Trainer.sample_tokens": 0,
}


def command(text: str, run: Path, steps: int) -> list[str]:
  settings = [f"--set={name}={value}" for name, value in SETTINGS.items()]
  train = [sys.executable, "-m", "memzoo.train.cli", "train", "quickstart", *settings, f"--set=TextData.sources={text}"]
  return [*train, "--out", str(run), "--steps", str(steps)]


def losses(run: Path) -> list[tuple[int, float]]:
  path = run / "metrics.jsonl"
  rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
  return [(row["step"], row["loss"]) for row in rows]


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=10)
  parser.add_argument("--steps", type=int, default=1200)
  parser.add_argument("--latest", type=float, default=13.0, help="seconds from a start to the latest kill")
  parser.add_argument("--seed", type=int, default=0, help="of the moments")
  arguments = parser.parse_args()
  moments = random.Random(arguments.seed)
  with tempfile.TemporaryDirectory() as folder:
    text, alone, killed = write_text(Path(folder, "text")), Path(folder, "alone"), Path(folder, "killed")
    start = time.perf_counter()
    subprocess.run(command(text, alone, arguments.steps), check=True, stdout=subprocess.DEVNULL)
    duration = time.perf_counter() - start
    print(f"undisturbed: {duration:.1f} s")
    for number in range(arguments.kills):
      process = subprocess.Popen(command(text, killed, arguments.steps), stdout=subprocess.DEVNULL)
      moment = moments.uniform(0.1, arguments.latest)
      time.sleep(moment)
      process.send_signal(signal.SIGKILL)
      finished = process.wait() == 0
      saved = sorted(int(path.name) for path in killed.glob("checkpoints/*") if path.name.isdigit())
      late = ", too late: pass more --steps" if finished else ""
      print(f"kill {number + 1}: after {moment:.1f} s; saved {saved}{late}", flush=True)
    subprocess.run(command(text, killed, arguments.steps), check=True, stdout=subprocess.DEVNULL)
    equal = losses(killed) == losses(alone)
    whole = [step for step, _ in losses(killed)] == list(range(1, arguments.steps + 1))
    print(f"{arguments.steps} losses {'bitwise equal' if equal else 'DIFFER'}, steps {'complete' if whole else 'MISSING'}")
    return 0 if equal and whole else 1


if __name__ == "__main__":
  sys.exit(main())
