"""Tasks that show the differences between memories, by name."""

from .copying import Induction, SelectiveCopying
from .data import TaskData
from .needle import Needle
from .recall import MultiQueryRecall, NoisyRecall, Overwriting, StaleFacts
from .regression import Regression
from .sets import SetDisjointness
from .state_tracking import Swaps, WordProblem
from .task import Example, Mixture, Task

TASKS = {
  "mqar": MultiQueryRecall,
  "overwriting": Overwriting,
  "noisy_recall": NoisyRecall,
  "stale_facts": StaleFacts,
  "needle": Needle,
  "selective_copying": SelectiveCopying,
  "induction": Induction,
  "word_problem": WordProblem,
  "swaps": Swaps,
  "set_disjointness": SetDisjointness,
  "regression": Regression,
}

__all__ = ["TASKS", "Example", "Mixture", "Task", "TaskData", *(task.__name__ for task in TASKS.values())]
