"""What an exit policy is: its contract, the registry, and a policy from the settings of a config."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

if TYPE_CHECKING:
    # the settings of a policy are checked without PyTorch, which a service of an exported file does without
    import torch
    from torch import Tensor

Memory = dict[str, "Tensor"]


Numbers = float | Sequence[float]


Rule = Callable[["Tensor", Memory], tuple["Tensor", Memory]]


AnyPolicy = TypeVar("AnyPolicy", bound="ExitPolicy")


POLICIES: dict[str, type[ExitPolicy]] = {}
"""Exit policies by name: what `exit_policy` may name; `register_policy` adds one."""


_DEFAULTS = {
    "single_label_classification": {"name": "confidence", "threshold": 0.8},
    "multi_label_classification": {"name": "label_confidence", "threshold": 0.9},
}


# The names that LGViT's and EEVIT's configs and scripts use for the same rules.
LEGACY_ALIASES = {"patient_and_confident": "patience_confidence", "confidence_and_entropy": "confidence_entropy"}


def register_policy(name: str) -> Callable[[type[AnyPolicy]], type[AnyPolicy]]:
    """Class decorator: make a policy known under `name`, so that a config can hold it.

    Example:

        >>> @register_policy("coin")
        ... class CoinPolicy(ExitPolicy):
        ...     def __call__(self, logits, memory, exit_index=0):
        ...         return logits[:, 0] > 0, memory
        >>> build_policy({"name": "coin"}, num_exits=2).name
        'coin'
        >>> _ = POLICIES.pop("coin")
    """

    def decorate(policy: type[AnyPolicy]) -> type[AnyPolicy]:
        if POLICIES.get(name, policy) is not policy and POLICIES[name].__qualname__ != policy.__qualname__:
            raise ValueError(f"there is already a policy called {name!r} ({POLICIES[name]}); choose another name")
        POLICIES[name] = policy
        policy.name = name
        return policy

    return decorate


def probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """`softmax(logits / temperature)` in float32, whatever the dtype of `logits` `[B, C]`."""
    logits = logits.float() if temperature == 1.0 else logits.float() / temperature
    return logits.softmax(-1)


def entropy(probs: Tensor) -> Tensor:
    """Entropy in nats of each sample, from `probs` `[B, C]`; 0 where a probability underflows, NaN where one is NaN.

    Example:

        >>> import torch
        >>> entropy(probabilities(torch.tensor([[200.0, 0.0], [0.0, 0.0]]))).tolist()
        [0.0, 0.693...]
    """
    from torch.special import entr

    return cast("Tensor", entr(probs).sum(-1))


def margin(probs: Tensor) -> Tensor:
    """Largest minus second largest probability of each sample, from `probs` `[B, C]`."""
    if probs.shape[-1] == 1:
        return probs[..., 0]
    best, second = probs.topk(2, dim=-1).values.unbind(-1)
    return best - second


def check_numbers(field_name: str, value: Numbers, *, positive: bool = False) -> None:
    """Raise `ValueError` for what is no number or list of numbers."""
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    for number in values:
        good = isinstance(number, (int, float)) and not isinstance(number, bool) and not math.isnan(number)
        if not good or (positive and not 0 < number < math.inf):
            wanted = "positive and finite" if positive else "numbers"
            raise ValueError(f"exit_policy: {field_name}={value!r} is not one number or a list of numbers ({wanted})")


def check_count(field_name: str, value: int, at_least: int = 1) -> None:
    """Raise `ValueError` for what is no whole number, or a smaller one."""
    if not _is_count(value, at_least):
        raise ValueError(f"exit_policy: {field_name}={value!r} must be an integer of at least {at_least}")


def check_exits(value: Sequence[int] | None) -> None:
    """Raise `ValueError` for what is no list of exits; `None` stands for all."""
    if value is None:
        return
    good = isinstance(value, Sequence) and not isinstance(value, str) and all(_is_count(number, 0) for number in value)
    if not good or len(set(value)) < len(value):
        raise ValueError(f"exit_policy: exits={value!r} is not a list of different exit indices, from 0")


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def number_at(value: Numbers, exit_index: int, default: float) -> float:
    """The number that holds at an exit: the only one, the exit's own, or `default` past the end of the list."""
    if isinstance(value, (int, float)):
        return value
    return value[exit_index] if exit_index < len(value) else default


class ExitPolicy:
    """When a sample exits. Derive, implement `__call__`, and `register_policy` to store it in configs.

    The engine calls the policy once per evaluated exit, with the samples that have not exited. The last exit (the
    final classifier, or the deepest one that `max_depth` allows) answers whatever the policy says, and a sample whose
    logits are NaN never exits early.
    """

    name = "custom"
    # whether `__call__` itself never lets a sample with NaN logits exit; otherwise the engine sees to it
    nan_never_exits = False
    # whether exits differ by more than their thresholds and temperatures: an export then holds a rule for each
    differs_by_exit = False
    # the `problem_type` whose answers it can judge; None for any
    problem_type: ClassVar[str | None] = None
    # the parameters that may be a list with a value for each exit
    per_exit: ClassVar[tuple[str, ...]] = ("threshold", "entropy_threshold", "temperature")
    # a threshold that no score reaches, so that no sample exits early
    out_of_reach: ClassVar[float] = math.inf

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "keeps_nan" in cls.__dict__:  # old name
            warnings.warn("keeps_nan of an exit policy is now nan_never_exits", DeprecationWarning, stacklevel=2)
            cls.nan_never_exits = cls.__dict__["keeps_nan"]  # old name

    def start(self, batch_size: int, device: torch.device | str) -> Memory:
        """The memory before the first exit: tensors with the batch first, so that samples can be dropped."""
        return {}

    def skips(self, exit_index: int) -> bool:
        """Whether no sample can exit here and nothing is remembered of it: its head is then not run at all."""
        exits = getattr(self, "exits", None)
        return exits is not None and exit_index not in exits

    def check(self, num_exits: int) -> None:
        """Raise `ValueError` where the parameters do not fit a highway of `num_exits` early exits."""
        exits = getattr(self, "exits", None) or ()
        if any(index >= num_exits for index in exits):
            raise ValueError(f"exit_policy: exits={list(exits)}: the model has {num_exits}, 0 to {num_exits - 1}")
        for name in self.per_exit:
            value = getattr(self, name, None)
            # a temperature may also be given for the final classifier, which has no threshold
            lengths = (num_exits, num_exits + 1) if name == "temperature" else (num_exits,)
            if isinstance(value, Sequence) and len(value) not in lengths:
                raise ValueError(
                    f"exit_policy: {name} has {len(value)} values, but the model has {num_exits} exits; "
                    f"give one for all or {num_exits}"
                )

    def with_exits(self, exits: Sequence[int], num_exits: int) -> ExitPolicy:
        """The same policy of the same highway with only some of its exits: each sample exits where it did.

        Args:
            exits (`Sequence[int]`): Which are left, by index from 0 in ascending order: at least those it evaluates.
            num_exits (`int`): How many there are.

        Raises:
            ValueError: It evaluates one that is not left.

        Example:

            >>> build_policy({"name": "confidence", "threshold": [1.0, 0.8, 1.0]}, 3).with_exits([1], 3).to_dict()
            {'name': 'confidence', 'threshold': [0.8], 'temperature': 1.0}
        """
        lost = [index for index in range(num_exits) if index not in exits and not self.skips(index)]
        if lost:
            raise ValueError(
                f"exits={list(exits)}: the policy {self.name!r} evaluates exit {lost[0]} too; leave it in"
            )
        kept = [*exits, num_exits]  # a temperature may also be given for the final classifier
        changes: dict[str, Any] = {}
        for name in self.per_exit:
            value = getattr(self, name, None)
            if isinstance(value, Sequence):
                changes[name] = [value[index] for index in kept if index < len(value)]
        if getattr(self, "exits", None) is not None:
            changes["exits"] = [kept.index(index) for index in cast(Any, self).exits]
        return cast(ExitPolicy, dataclasses.replace(cast(Any, self), **changes)) if changes else self

    def __call__(self, logits: Tensor, memory: Memory, exit_index: int = 0) -> tuple[Tensor, Memory]:
        """Decide for each sample.

        Args:
            logits (`Tensor`): `[B, C]`, of the exit just run.
            memory (`dict[str, Tensor]`): What was returned for these samples at the exit before, or by `start`.
            exit_index (`int`): Which exit this is, from 0.

        Returns:
            `exits` `[B]` bool, and the memory; its entry `score` `[B]` float32, when there, becomes `exit_score`, and
            its entry `answer` `[B, C]` takes the place of the logits of samples that exit.
        """
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The JSON form that `build_policy` reads."""
        settings: dict[str, Any] = dataclasses.asdict(self) if dataclasses.is_dataclass(self) else {}
        given = {key: value for key, value in settings.items() if value is not None}
        return {"name": self.name} | {
            key: list(value) if isinstance(value, tuple) else value for key, value in given.items()
        }


class CustomPolicy(ExitPolicy):
    """Any callable `(logits, memory) -> (exits, memory)`, with or without `start`, as a policy."""

    def __init__(self, rule: Rule):
        if not callable(rule):
            raise ValueError(f"exit_policy: {rule!r} is not callable as (logits, memory) -> (exits, memory)")
        self.rule = rule

    def start(self, batch_size: int, device: torch.device | str) -> Memory:
        """What the rule's own `start` gives, or nothing."""
        start = getattr(self.rule, "start", None)
        return start(batch_size=batch_size, device=device) if start else {}

    def __call__(self, logits: Tensor, memory: Memory, exit_index: int = 0) -> tuple[Tensor, Memory]:
        return self.rule(logits, memory)


class PerSamplePolicy(ExitPolicy):
    """A policy of thresholds whose thresholds are each sample's own, such as those of its rung of a ladder.

    Exits that `policy` itself skips are skipped, whatever the thresholds. With an ensemble, `with_ensemble` goes
    around this.

    Args:
        policy (`ExitPolicy`): One with a `threshold`, which these take the place of.
        thresholds (`Tensor`): `[B, E]`, a row per sample and a column per early exit.

    Raises:
        ValueError: The policy has no threshold; `thresholds` are no numbers `[B, E]`, or of other samples or exits.

    Example:

        >>> import torch
        >>> policy = build_policy({"name": "confidence", "threshold": 0.5}, num_exits=1)
        >>> each = PerSamplePolicy(policy, torch.tensor([[0.9], [0.6]]), num_exits=1)
        >>> each(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), each.start(2, "cpu"))[0].tolist()  # 0.73 is more than 0.6
        [False, True]
    """

    name = "per_sample"

    def __init__(self, policy: ExitPolicy, thresholds: Tensor, num_exits: int):
        if not hasattr(policy, "threshold"):
            raise ValueError(f"exit_policy: {policy.name!r} has no threshold that each sample could have its own of")
        if thresholds.dim() != 2 or thresholds.shape[1] != num_exits or not thresholds.is_floating_point():
            raise ValueError(
                f"thresholds {tuple(thresholds.shape)} of {thresholds.dtype} must be floats (samples, {num_exits}), "
                "one for each early exit"
            )
        if thresholds.isnan().any():
            raise ValueError("thresholds are NaN for some samples")
        self.policy, self.thresholds = policy, thresholds.float()
        self.nan_never_exits = policy.nan_never_exits

    def start(self, batch_size: int, device: torch.device | str) -> Memory:
        """The memory of the policy, and the thresholds, which go with the samples."""
        if batch_size != len(self.thresholds):
            raise ValueError(f"thresholds of {len(self.thresholds)} samples for a batch of {batch_size}")
        return {**self.policy.start(batch_size, device), "thresholds": self.thresholds.to(device)}

    def skips(self, exit_index: int) -> bool:
        """As the policy itself."""
        return self.policy.skips(exit_index)

    def __call__(self, logits: Tensor, memory: Memory, exit_index: int = 0) -> tuple[Tensor, Memory]:
        """See `ExitPolicy`."""
        thresholds = memory["thresholds"]
        # a copy whose threshold at each exit is a number per sample; comparisons take both alike
        policy = copy.copy(self.policy)
        object.__setattr__(policy, "threshold", thresholds.unbind(1))
        own = {name: tensor for name, tensor in memory.items() if name != "thresholds"}
        exits, after = policy(logits, own, exit_index)
        return exits, {**after, "thresholds": thresholds}


def build_policy(policy: ExitPolicy | Rule | dict[str, Any] | str, num_exits: int) -> ExitPolicy:
    """Make a checked policy for a highway of `num_exits` early exits.

    Args:
        policy (`dict`, `str`, `ExitPolicy` or callable):
            `{"name": "confidence", "threshold": 0.8}`, a registered name that needs no parameters, or an object.
        num_exits (`int`): Early exits, the final classifier not counted.

    Raises:
        ValueError: Unknown name or parameter, missing parameter, wrong number of thresholds.

    Example:

        >>> build_policy({"name": "entropy", "threshold": [0.1, 0.2, 0.3]}, num_exits=2)
        Traceback (most recent call last):
        ...
        ValueError: exit_policy: threshold has 3 values, but the model has 2 exits; give one for all or 2
    """
    if isinstance(policy, str):
        policy = {"name": policy}
    built = _from_dict(policy) if isinstance(policy, dict) else policy
    if not isinstance(built, ExitPolicy):
        built = CustomPolicy(built)
    built.check(num_exits)
    return built


def problem_of(num_labels: int, problem_type: str | None) -> str:
    """What a model's logits stand for; as in transformers, one label without a `problem_type` is a regression.

    Example:

        >>> problem_of(10, None), problem_of(1, None)
        ('single_label_classification', 'regression')
    """
    if num_labels < 2 and problem_type != "multi_label_classification":
        return "regression"
    return problem_type or "single_label_classification"


def default_policy(num_labels: int, problem_type: str | None) -> dict[str, Any]:
    """The policy of a model for which none was chosen.

    Example:

        >>> default_policy(3, "multi_label_classification"), default_policy(1, None)
        ({'name': 'label_confidence', 'threshold': 0.9}, {'name': 'never'})
    """
    return copy.deepcopy(_DEFAULTS.get(problem_of(num_labels, problem_type), {"name": "never"}))


def following_default(policy: dict[str, Any], num_labels: int, problem_type: str | None) -> dict[str, Any]:
    """A policy as it is; the default of another problem becomes that of this one.

    transformers' users set `problem_type` and `num_labels` of a config that is there already.

    Example:

        >>> following_default({"name": "confidence", "threshold": 0.8}, 1, "regression")
        {'name': 'never'}
        >>> following_default({"name": "confidence", "threshold": 0.7}, 1, "regression")
        {'name': 'confidence', 'threshold': 0.7}
    """
    problem = problem_of(num_labels, problem_type)
    of_others = [default for other, default in _DEFAULTS.items() if other != problem]
    return default_policy(num_labels, problem_type) if policy in of_others else policy


def check_problem(policy: ExitPolicy, num_labels: int, problem_type: str | None) -> None:
    """Raise `ValueError` where a policy judges other answers than a model gives."""
    problem = problem_of(num_labels, problem_type)
    if policy.problem_type not in (None, problem):
        fitting = [name for name, known in POLICIES.items() if known.problem_type in (None, problem)]
        raise ValueError(
            f"exit_policy: {policy.name!r} is for {policy.problem_type}, and this model's is {problem} "
            f"(num_labels={num_labels}, problem_type={problem_type!r}); choices: {', '.join(sorted(fitting))}"
        )


def _from_dict(settings: dict[str, Any]) -> Any:
    settings = dict(settings)
    name = settings.pop("name", None)
    if name == "gumbel_lte":
        raise ValueError("exit_policy: 'gumbel_lte' (learned exits) never existed as code; " + _known_policies())
    cls = POLICIES.get(LEGACY_ALIASES.get(name, name)) if isinstance(name, str) else None
    if cls is None:
        raise ValueError(f"exit_policy: unknown policy name {name!r}; " + _known_policies())
    parameters = inspect.signature(cls).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        unknown = sorted(set(settings) - set(parameters))
        missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in settings]
        missing = [key for key in missing if parameters[key].kind is not inspect.Parameter.VAR_POSITIONAL]
        if unknown or missing:
            what = f"unknown parameter {unknown[0]!r}" if unknown else f"missing parameter {missing[0]!r}"
            raise ValueError(f"exit_policy: {what} for {name!r}; its parameters: {', '.join(parameters) or 'none'}")
    return cls(**settings)


def _known_policies() -> str:
    return f"known policies: {', '.join(sorted(POLICIES))}"
