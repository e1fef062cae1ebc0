"""Utilities and divergences by name, built from plain data.

To add one, write a :class:`~flowtilt.functionals.base.Functional` and enter it::

    SHARPNESS = Entry(Sharpness, takes=("reward",), parameters={"power": number()})

A configuration names it ``module:SHARPNESS``, and :func:`flowtilt.functionals.checks.check_entry` runs
the numerical checks on it. Entered here, ``UTILITIES["sharpness"] = SHARPNESS``, it goes by that name,
the table of tiers lists it, and the tests of all registered functionals run on it; say there what its
parameters mean, in :mod:`flowtilt.functionals.keys`. See ``docs/adding-a-functional.md``.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from typing import Any, Literal

from flowtilt.functionals.base import Functional, Need, Tier, WeightedSum
from flowtilt.functionals.critic import CriticSettings
from flowtilt.functionals.design import FEATURES, OptimalDesign
from flowtilt.functionals.divergences import KL, MMD, ReferenceDraw, Renyi, Wasserstein1
from flowtilt.functionals.utilities import (
    SQ,
    CVaR,
    DiverseModes,
    Entropy,
    ExpectedReward,
    LogBarrier,
    MeanVariance,
)
from flowtilt.loading import imported, message_of
from flowtilt.model import FlowModel
from flowtilt.rewards import Reward
from flowtilt.sampling import OdeSettings
from flowtilt.words import check_word

Reader = Callable[[Any], Any]
"""Turns plain data into a value; raises ValueError with a text that follows ``must be``."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a functional.

    Attributes:
        required: whether it must be given; else the functional's own default holds.
    """

    read: Reader
    required: bool = True


@dataclass(frozen=True)
class Ingredients:
    """What an experiment, not a functional's own parameters, provides.

    Attributes:
        score_time: time at which scores stand for those of the data, in (0, 1).
    """

    reward: Reward | None = None
    reference: FlowModel | None = None
    cost: Reward | None = None
    score_time: float = 0.99
    ode: OdeSettings = field(default_factory=OdeSettings)
    draw: ReferenceDraw = field(default_factory=ReferenceDraw)


@dataclass(frozen=True)
class Entry:
    """A registered functional.

    Attributes:
        functional: its class, whose constructor takes the names of ``takes`` and ``parameters``.
        takes: which of the :class:`Ingredients` it is made with.
        parameters: its own, by name.
        examples: parameters of small problems in the plane that tables and numerical checks run on.
    """

    functional: type[Functional]
    takes: tuple[str, ...] = ()
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    examples: tuple[Mapping[str, Any], ...] = ({},)

    def __post_init__(self) -> None:
        known = [f.name for f in fields(Ingredients)]
        if unknown := [name for name in self.takes if name not in known]:
            raise ValueError(
                f"an entry cannot take {', '.join(unknown)}; experiments provide {', '.join(known)}"
            )

    @property
    def tier(self) -> Tier:
        """Where the paper's hierarchy puts it."""
        return self.functional.tier

    @property
    def needs(self) -> Need:
        """What its gradient takes."""
        return self.functional.needs


class Registry(dict[str, Entry]):
    """Entries by name.

    Args:
        kind: what they are, for messages: ``utility`` or ``divergence``.
    """

    def __init__(self, kind: str, entries: Mapping[str, Entry]) -> None:
        super().__init__(entries)
        self.kind = kind

    def entry(self, name: str) -> Entry:
        """An entry by its name, or one of your own by ``module:NAME`` from an importable module.

        Raises:
            ValueError: for an unknown name, a module or a name in it that is not there, or one that is
                no :class:`Entry`; the message says which.
        """
        if name in self:
            return self[name]
        if name.count(":") != 1:
            raise ValueError(
                f"unknown {self.kind} {name!r}; known: {', '.join(self)}, or module:NAME of your own"
            )
        try:
            found = imported(name)
        except ValueError as error:
            raise ValueError(f"{self.kind} {name}: {error}") from None
        if not isinstance(found, Entry):
            what = found.__name__ if isinstance(found, type) else type(found).__name__
            raise ValueError(
                f"{self.kind} {name}: must be an Entry of flowtilt.functionals.registry, got {what}; "
                "write NAME = Entry(YourFunctional, takes=..., parameters=...) and name that"
            )
        return found

    def build(self, name: str, parameters: Mapping[str, Any], ingredients: Ingredients) -> Functional:
        """A functional from plain data, by the name of its entry; see :meth:`entry`.

        Raises:
            ValueError: for an unknown name, an unknown, missing or bad key, or a missing
                ingredient; the message names it and what is known.
        """
        entry, where = self.entry(name), f"{self.kind} {name}"
        values = _read_keys(entry.parameters, parameters, where)
        for key in entry.takes:
            values[key] = getattr(ingredients, key)
            if values[key] is None:
                raise ValueError(f"{where}: needs a {key}, and the experiment gives none")
        try:
            return entry.functional(**values)
        except Exception as error:
            what = message_of(error, TypeError, ValueError)  # the former if an entry does not fit its class
            raise ValueError(f"{where}: {what}; {_known(entry.parameters)}") from None

    def build_sum(self, items: Sequence[Mapping[str, Any]], ingredients: Ingredients) -> WeightedSum:
        """A weighted sum from a list of mappings: ``name``, ``weight`` (1 if not given), parameters.

        The first is the one whose active samples count.

        Raises:
            ValueError: as :meth:`build`, or for an empty list.
        """
        parts = []
        for item in items:
            rest = dict(item)
            if "name" not in rest:
                raise ValueError(f"{self.kind}: key name: missing; known: {', '.join(self)}")
            name = rest.pop("name")
            weight = _read(number(), rest.pop("weight", 1.0), f"{self.kind} {name}", "weight", "1 by default")
            parts.append((weight, self.build(name, rest, ingredients)))
        return WeightedSum(tuple(parts))


def _known(parameters: Mapping[str, Parameter]) -> str:
    return f"known keys: {', '.join(parameters) or 'none'}"


def _read(parameter: Parameter, data: Any, where: str, key: str, known: str) -> Any:
    try:
        return parameter.read(data)
    except ValueError as error:
        raise ValueError(f"{where}: key {key}: must be {error}, got {data!r}; {known}") from None


def _read_keys(parameters: Mapping[str, Parameter], data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of a mapping of plain data, checked key by key."""
    known = _known(parameters)
    for key in data:
        if key not in parameters:
            raise ValueError(f"{where}: key {key}: unknown; {known}")
    for key, parameter in parameters.items():
        if parameter.required and key not in data:
            raise ValueError(f"{where}: key {key}: missing; {known}")
    return {key: _read(parameters[key], value, where, key, known) for key, value in data.items()}


def _to_number(data: Any) -> float:
    if isinstance(data, bool) or not isinstance(data, (int, float)) or not math.isfinite(data):
        raise ValueError("a finite number")
    return float(data)


def _to_whole(data: Any) -> int:
    if isinstance(data, bool) or not isinstance(data, int):
        raise ValueError("a whole number")
    return data


def _to_numbers(data: Any) -> tuple[float, ...]:
    try:
        return tuple(_to_number(entry) for entry in data)
    except (TypeError, ValueError):
        raise ValueError("a list of finite numbers") from None


def _to_text(data: Any) -> str:
    if not isinstance(data, str):
        raise ValueError("a name")
    return data


number = partial(Parameter, _to_number)
"""A finite real number."""

whole = partial(Parameter, _to_whole)
"""A whole number."""

numbers = partial(Parameter, _to_numbers)
"""A list of finite real numbers."""

text = partial(Parameter, _to_text)
"""A name."""


def section(kind: type, required: bool = False) -> Parameter:
    """A mapping of the fields of a dataclass of numbers and names."""
    types = typing.get_type_hints(kind)
    readers = {int: _to_whole, float: _to_number, str: _to_text}
    keys = {
        f.name: Parameter(
            readers[types[f.name]], required=f.default is MISSING and f.default_factory is MISSING
        )
        for f in fields(kind)
    }

    def read(data: Any) -> Any:
        if not isinstance(data, Mapping):
            raise ValueError(f"a mapping of {', '.join(keys)}")
        try:
            return kind(**_read_keys(keys, data, kind.__name__))
        except ValueError as error:
            raise ValueError(f"a valid {kind.__name__} ({error})") from None

    return Parameter(read, required)


def choice_of(kinds: Mapping[str, type], required: bool = False) -> Parameter:
    """A mapping with a ``kind`` and the fields of that kind's dataclass."""

    def read(data: Any) -> Any:
        kind = data.get("kind") if isinstance(data, Mapping) else None
        if not isinstance(kind, str) or kind not in kinds:
            raise ValueError(f"a mapping with a kind of {', '.join(kinds)}")
        return section(kinds[kind]).read({key: value for key, value in data.items() if key != "kind"})

    return Parameter(read, required)


UTILITIES = Registry(
    "utility",
    {
        "expected_reward": Entry(ExpectedReward, takes=("reward",)),
        "cvar": Entry(CVaR, takes=("reward",), parameters={"mass": number()}, examples=({"mass": 0.3},)),
        "sq": Entry(SQ, takes=("reward",), parameters={"mass": number()}, examples=({"mass": 0.3},)),
        "mean_variance": Entry(
            MeanVariance, takes=("reward",), parameters={"risk": number()}, examples=({"risk": 0.5},)
        ),
        "entropy": Entry(Entropy, takes=("score_time", "ode")),
        "optimal_design": Entry(
            OptimalDesign,
            parameters={
                "criterion": text(),
                "features": choice_of(FEATURES),
                "ridge": number(required=False),
            },
            examples=tuple({"criterion": name} for name in ("log_det", "trace", "eigenvalue")),
        ),
        "diverse_modes": Entry(
            DiverseModes, takes=("score_time", "ode"), parameters={"modes": whole()}, examples=({"modes": 2},)
        ),
        "log_barrier": Entry(
            LogBarrier,
            takes=("reward", "cost"),
            parameters={"bound": number(), "strength": number(required=False)},
            examples=({"bound": 1.2, "strength": 0.5},),
        ),
    },
)
"""What to raise."""

DIVERGENCES = Registry(
    "divergence",
    {
        "kl": Entry(KL, takes=("reference", "score_time", "ode")),
        "renyi": Entry(
            Renyi,
            takes=("reference", "score_time", "ode"),
            parameters={"order": number(), "samples": whole(required=False)},
            examples=({"order": 0.5}, {"order": 2.0}),
        ),
        "mmd": Entry(
            MMD,
            takes=("reference", "draw"),
            parameters={"kernel": text(), "bandwidth": number(required=False)},
            examples=tuple({"kernel": name} for name in ("gaussian", "inverse_multiquadric", "energy")),
        ),
        "wasserstein1": Entry(
            Wasserstein1,
            takes=("reference", "draw"),
            parameters={"weights": numbers(), "critic": section(CriticSettings)},
            examples=({"weights": [1.0, 4.0], "critic": {"updates": 100}},),
        ),
    },
)
"""What keeps the distribution near the pretrained one."""


class UnmetNeed(ValueError):
    """A functional needs what the domain cannot give."""


def check_needs(
    functional: Functional,
    model: FlowModel,
    reward: Reward | None = None,
    takes: Literal["gradient", "value"] = "gradient",
) -> None:
    """Check before any training that a solver can have what it takes of a functional's first variation.

    Args:
        reward: a reward that the solver tilts by beside those inside the functional.
        takes: what the solver evaluates: gradients (Adjoint Matching) or values (weighted fitting).
            The value of a variation whose gradient needs scores needs densities.

    Raises:
        UnmetNeed: naming the functional and what it lacks.
        ValueError: for another word in ``takes``.
    """
    check_word(takes, ("gradient", "value"), "what a solver takes")
    by_value = takes == "value"
    for part in functional.components:
        name = type(part).__name__
        if (part.needs == "density" or (by_value and part.needs == "score")) and not model.has_likelihood:
            raise UnmetNeed(
                f"{name} needs the likelihood of samples, and {type(model).__name__} has none; "
                "choose a functional that needs scores or samples only"
            )
    if by_value:
        return
    users = [(type(part).__name__, each) for part in functional.components for each in part.rewards]
    users += [("the solver", reward)] if reward is not None else []
    for name, each in users:
        if not each.differentiable:
            raise UnmetNeed(
                f"{name} needs the gradient of the reward, and {type(each).__name__} has none; "
                "choose a solver that needs values only, or a differentiable reward"
            )
