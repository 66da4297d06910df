"""Chooses an operation's implementation, and gives the reason against each of the others.

No environment variable changes the choice, and there is no silent fallback.
"""

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from enum import Enum
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Primitive, jaxpr_as_fun, jaxprs_in_params, unmapped_aval
from jax.interpreters import ad, batching, mlir

from .partition import is_split_by_xla, varying_alike
from .sizes import known


class Kernels(Enum):
  """Which programs use kernels."""

  NEVER, ON_TPU, ALWAYS = "never", "on a TPU", "always"


class Choice(NamedTuple):
  """The implementation that runs, and for each other implementation the reason why it does not."""

  implementation: str
  passed_over: dict[str, str]

  def __str__(self) -> str:
    return "\n".join([self.implementation, *(f"  not {name}: {why}" for name, why in self.passed_over.items())])


def choose(operation: str, requested: str, candidates: Mapping[str, str | None]) -> Choice:
  """Picks the requested implementation, or with "auto" the first candidate without an objection.

  Args:
    operation: the operation's name, for the error message.
    requested: "auto" or the name of a candidate.
    candidates: implementations in order of preference, each with the objection to choosing it by default, or `None`.

  Raises:
    ValueError: if `requested` is neither "auto" nor a candidate.
  """
  if requested != "auto" and requested not in candidates:
    raise ValueError(f"implementation={requested!r} does not exist for {operation}; expected one of {['auto', *candidates]}.")
  chosen = next(name for name, objection in candidates.items() if objection is None) if requested == "auto" else requested
  others = {
    name: (f"implementation={requested!r} was requested" if requested != "auto" else objection or f"{chosen} comes first")
    for name, objection in candidates.items()
    if name != chosen
  }
  return Choice(chosen, others)


def choose_by_length(tokens: int, operation: str, requested: str, **kernels: str | None) -> Choice:
  """`choose` between "xla", a form in chunks, and "recurrent", the oracle, which a call of a single token runs.

  `kernels` are further forms in chunks, which come first: names with objections.
  """
  single = tokens == 1
  to_chunks = "a chunk of a single token is the recurrence with overhead" if single else None
  return choose(
    operation,
    requested,
    {
      **{name: to_chunks or objection for name, objection in kernels.items()},
      "xla": to_chunks,
      "recurrent": None if single else "one dependent step per token: the oracle, and the default for decoding",
    },
  )


# For `explain`: what calls choose on each platform.
_CHOICES: ContextVar[list[Callable[[str], Choice]] | None] = ContextVar("choices", default=None)


def objection_to_kernels(inputs: Any, specs: Any, chunk_size: int | None, own: Callable[[], str | None]) -> str | None:
  """Why there is no kernel for a call with such arrays, or `None`; `own` says what the operation's kernels do not compute.

  Args:
    inputs: arrays of the call.
    specs: which of their axes are rows and heads, as for `partition.partitioned`.
    chunk_size: that was asked for, or `None`.
    own: called if nothing else is in the way of it.
  """
  if not known(*(size for x in jax.tree.leaves(inputs) for size in x.shape)):
    return "sizes are not known"
  if chunk_size is not None:
    return f"chunk_size={chunk_size} was asked for, and the kernels choose their own"
  if why := own():
    return why
  if is_split_by_xla(inputs, specs):
    return "XLA cannot split kernels over a mesh; `memzoo.split_over` tells how rows and heads are split, if they divide"
  return None


class Objections(NamedTuple):
  """Why there are no kernels for a call in programs for a platform; `None` if there are."""

  tpu: str | None
  gpu: str | None = "there are no kernels for GPUs"

  def on(self, platform: str) -> str | None:
    """Why programs for "cpu", "gpu" or "tpu" do not use kernels where nobody asks for them."""
    if platform == "gpu":
      unmeasured = "the kernels for GPUs have not been measured; implementation='pallas' uses them, on Hopper GPUs"
      return self.gpu or unmeasured
    return self.tpu if platform == "tpu" else f"there are no kernels for a {platform}"


def choose_kernels(
  operation: str, requested: str, others: Callable[..., Choice], objections: Objections
) -> tuple[str, Kernels]:
  """What `others(operation, requested, pallas=objection)` picks where there are kernels; and which programs use these.

  Args:
    operation, requested: as for `choose`.
    others: a function with the other candidates, such as `choose_by_length` with a length.
    objections: to kernels.

  Raises:
    ValueError: if kernels are requested in spite of an objection, or something unknown is requested.
  """
  if requested == "pallas" and objections.tpu is not None:
    raise ValueError(f"implementation='pallas' does not do for this call of {operation}: {objections.tpu}.")

  def on(platform):
    return others(operation, requested, pallas=objections.on(platform))

  if (choices := _CHOICES.get()) is not None:
    choices.append(on)
  chosen = on("tpu").implementation
  some = Kernels.ALWAYS if requested == "pallas" else Kernels.ON_TPU
  return chosen, some if chosen == "pallas" else Kernels.NEVER


def explain(function: Callable[..., Any], *arguments: Any, platform: str | None = None, **options: Any) -> Choice:
  """Says which implementation runs for `function(*arguments, **options)`, and why the others do not.

  Args:
    function: an operation that has kernels, or a function that calls one.
    *arguments: arrays, or their `jax.ShapeDtypeStruct`s.
    platform: "cpu", "gpu" or "tpu": what the program is compiled for; by default JAX's default.
    **options: of the call.
  """
  arrays = {name: options.pop(name) for name in ("initial_state", "segment_ids") if name in options}
  choices: list[Callable[[str], Choice]] = []
  token = _CHOICES.set(choices)
  try:
    jax.eval_shape(lambda arguments, arrays: function(*arguments, **arrays, **options), arguments, arrays)
  finally:
    _CHOICES.reset(token)
  return choices[0](platform or jax.default_backend())


class Forms(NamedTuple):
  """An operation's forms by platform: functions of the same arguments, with results of equal shapes and dtypes.

  Attributes:
    cpu: in programs that are compiled for a CPU.
    others: in all other programs.
    tpu: if given, in programs for a TPU in place of `others`.
    gpu: the same, for a GPU.
  """

  cpu: Callable[..., Any]
  others: Callable[..., Any]
  tpu: Callable[..., Any] | None = None
  gpu: Callable[..., Any] | None = None

  def of(self, platform: str) -> Callable[..., Any]:
    """The form for "cpu", "tpu", "cuda" or "rocm"."""
    return {"cpu": self.cpu, "tpu": self.tpu, "cuda": self.gpu, "rocm": self.gpu}.get(platform) or self.others

  def distinct(self) -> bool:
    """Whether it matters what a program is compiled for."""
    return any(form not in (None, self.others) for form in self)

  def map(self, function: Callable[[Callable[..., Any]], Callable[..., Any]]) -> "Forms":
    """`function` of each form that is given."""
    return Forms(*(form and function(form) for form in self))


_PLATFORMS = "cpu", "tpu", "cuda", "rocm"


def by_platform(forms: Forms, *args: Any) -> Any:
  """The result of the form for the platform that the program is compiled for.

  The platform is known when a program is lowered, which may be on another machine; `jax.default_backend()` does not tell. Only
  two forms are traced: the CPU's, which tells the shapes of the results, and the one that is compiled.
  """
  if not forms.distinct():
    return forms.others(*args)
  leaves, structure = jax.tree.flatten(args)
  results = None

  def flat(form, *leaves):
    nonlocal results
    found, results = jax.tree.flatten(form(*jax.tree.unflatten(structure, leaves)))
    return found

  found = _bind(leaves, forms.map(lambda form: partial(flat, form)))
  return jax.tree.unflatten(results, found)


def form_for(equation: JaxprEqn, platform: str) -> ClosedJaxpr | None:
  """What a program for a platform runs at an equation that comes from `by_platform`; `None` of any other equation."""
  if equation.primitive is not _form_p:
    return None
  return equation.params["choice"].traced(platform, [x.aval for x in equation.invars])


class _ByPlatform:
  """The forms of a call, as functions of arrays that return lists of arrays, and the mesh and x64 mode of the call."""

  def __init__(self, forms: Forms):
    self.forms, self._traced = forms, {}
    self._mesh, self._x64 = jax.sharding.get_abstract_mesh(), jax.config.jax_enable_x64

  def traced(self, platform: str, types: Sequence[Any]) -> ClosedJaxpr:
    """The form of a platform, for arguments of such types."""
    form = self.forms.of(platform)
    key = form, *types
    if key not in self._traced:
      with jax.sharding.use_abstract_mesh(self._mesh), jax.enable_x64(self._x64):
        self._traced[key] = jax.make_jaxpr(form)(*types)
    return self._traced[key]

  def __repr__(self) -> str:
    """The same for all, so that equal programs are printed alike."""
    return type(self).__name__


def _bind(leaves: Sequence[Any], forms: Forms) -> list[jax.Array]:
  """Calls the primitive. The CPU's form is a parameter of its equation, so that code which walks through jaxprs sees it."""
  choice = _ByPlatform(forms)
  return _form_p.bind(*leaves, cpu=choice.traced("cpu", [jax.typeof(x) for x in leaves]), choice=choice)


def _run_form(*leaves: Any, choice: _ByPlatform, **_: Any) -> list[jax.Array]:
  """A call that is not compiled: the form for the device of the arrays."""
  place = next((x for x in leaves if isinstance(x, jax.Array)), None)
  platform = jax.default_backend() if place is None else next(iter(place.devices())).platform
  return choice.forms.of("cuda" if platform == "gpu" else platform)(*leaves)


def _lower_form(platform: str, context: Any, *values: Any, choice: _ByPlatform, **_: Any) -> Any:
  function = jaxpr_as_fun(choice.traced(platform, context.avals_in))
  return mlir.lower_fun(function, multiple_results=True)(context, *values)


def _map_form(
  leaves: Sequence[Any], axes: Sequence[int | None], *, choice: _ByPlatform, **_: Any
) -> tuple[list[jax.Array], list[int]]:
  results = _bind(leaves, choice.forms.map(lambda form: jax.vmap(form, in_axes=tuple(axes))))
  return results, [0] * len(results)


def _differentiate_form(leaves: Sequence[Any], tangents: Sequence[Any], *, choice: _ByPlatform, **_: Any) -> Any:
  """For operations that JAX differentiates, and for derivatives of gradients. All forms are traced."""
  types = [jax.typeof(x) for x in leaves]

  def differentiable(platform):
    traced = choice.traced(platform, types)
    if not _has_kernels(traced.jaxpr):
      return choice.forms.of(platform)
    return partial(_refusal_p.bind, types=tuple(traced.out_avals))

  tangents = tuple(ad.instantiate_zeros(t) for t in tangents)
  apart = {platform: differentiable(platform) for platform in _PLATFORMS}
  together = partial(jax.lax.platform_dependent, **apart, default=choice.forms.others)
  return jax.jvp(together, tuple(leaves), tangents)


def _has_kernels(jaxpr: Jaxpr) -> bool:
  names = "pallas_call", "core_map", "mpmd_map"
  return any(e.primitive.name in names or any(map(_has_kernels, jaxprs_in_params(e.params))) for e in jaxpr.eqns)


def _refuse(*_: Any, **__: Any) -> Any:
  raise TypeError(
    "kernels have a hand-written gradient, and no derivatives of it; expected implementation='xla' or 'recurrent', an argument "
    "of the operation and a field of the layers."
  )


def _refuse_tangents(arrays: Sequence[Any], tangents: Sequence[Any], *, types: tuple[Any, ...]) -> Any:
  given = [t for t in tangents if not isinstance(t, ad.Zero)]
  return _refusal_p.bind(*arrays, types=types), _refusal_p.bind(*given, types=types)


def _refuse_cotangents(cotangents: Sequence[Any], *arrays: Any, types: tuple[Any, ...]) -> Any:
  del types
  given = [ad.instantiate_zeros(d) for d in cotangents]
  return _refusal_p.bind(*given, types=tuple(x.aval for x in arrays))


def _map_refusal(arrays: Sequence[Any], axes: Sequence[int | None], *, types: tuple[Any, ...]) -> tuple[Any, list[int]]:
  size = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)
  mapped = tuple(unmapped_aval(size, 0, each) for each in types)
  return _refusal_p.bind(*arrays, types=mapped), [0] * len(types)


# Stands for kernels where they would have to be differentiated: programs that would run it are refused.
_refusal_p = Primitive("kernels_without_derivatives")
_refusal_p.multiple_results = True
_refusal_p.def_abstract_eval(lambda *_, types: list(types))
mlir.register_lowering(_refusal_p, _refuse)
ad.primitive_jvps[_refusal_p] = _refuse_tangents
ad.primitive_transposes[_refusal_p] = _refuse_cotangents
batching.primitive_batchers[_refusal_p] = _map_refusal


_form_p = Primitive("form_for_platform")
_form_p.multiple_results = True
_form_p.def_impl(_run_form)
_form_p.def_effectful_abstract_eval(lambda *types, cpu, choice: (cpu.out_avals, cpu.effects))
mlir.register_lowering(_form_p, partial(_lower_form, ""))
for _platform in _PLATFORMS:
  mlir.register_lowering(_form_p, partial(_lower_form, _platform), platform=_platform)
batching.primitive_batchers[_form_p] = _map_form
ad.primitive_jvps[_form_p] = _differentiate_form


def kept_by_platform(forms: Forms, kept_shapes: Forms, inputs: Any) -> tuple[Any, Forms]:
  """The results of `by_platform`, and what each form keeps for its gradient.

  Each form maps inputs to (results, kept), and the function of the same platform in `kept_shapes` maps them to the shapes of
  `kept`. What another platform's form would keep is zero. A program reads what its own platform kept, so the zeros take no
  memory in it.
  """
  shapes = Forms(*(shapes_of and shapes_of(inputs) for shapes_of in kept_shapes))

  def on(platform, inputs):
    results, kept = getattr(forms, platform)(inputs)
    zeros = varying_alike(inputs, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
    return results, zeros._replace(**{platform: kept})

  return by_platform(Forms(*(form and partial(on, name) for name, form in forms._asdict().items())), inputs)
