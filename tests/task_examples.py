"""Examples of memory tasks on the host, and the score of answers to one."""

import functools

import jax
import numpy as np
from memzoo.train.tasks import Example


@functools.cache
def program(task, count):
  """`count` examples as a function of a key, compiled once."""
  return jax.jit(lambda key: task.batch(key, count))


def examples(task, count, seed=0):
  batch = jax.device_get(program(task, count)(jax.random.key(seed)))
  return [Example(*(field[i] for field in batch)) for i in range(count)]


def score(task, example, answers):
  asked = example.weights > 0
  if task.continuous:
    return np.mean(np.square(answers - example.targets)[asked])
  return np.mean(answers[asked] == example.targets[asked])
