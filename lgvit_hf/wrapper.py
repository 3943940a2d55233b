"""HighwayWrapper: early exits behind named submodules of any `nn.Module`, on the engine of the other highways."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import cached_file

from . import cutting
from .configuration import Exit, without_attention_code
from .configuration_wrapper import OWN, HighwayWrapperConfig
from .cutting import HIDDEN, LOGITS, PIXELS, Piece, cut, logits_of
from .heads import ExitHead, HeadShape
from .modeling_highway import HighwayMixin
from .pretrained import HUB_ARGUMENTS, check_files
from .segments import Block, State, Tokens

# most prefix tokens (class, distillation, registers) that a sequence is thought to begin with
MOST_PREFIX_TOKENS = 8
# what Auto classes pass on beside settings
AUTO_ARGUMENTS = ("_from_auto", "_commit_hash", "adapter_kwargs", "code_revision", "trust_remote_code")


@dataclass(frozen=True)
class Reading:
    """How heads read what a submodule gives.

    Args:
        kind (`str`):
            `"map"` `[B, D, h, w]`, `"map_last"` `[B, h, w, D]`, `"sequence"` `[B, N, D]` or `"vector"` `[B, D]`.
        width (`int`): Channels `D`.
        grid (`tuple[int, int]`): `(h, w)` of the patches.
        num_prefix (`int`): Tokens before the patches of a sequence.
    """

    kind: str
    width: int
    grid: tuple[int, int]
    num_prefix: int = 0

    def tokens(self, hidden: Tensor) -> Tokens:
        """The same values as patches and prefix tokens."""
        if self.kind == "map":
            patches = hidden.flatten(2).transpose(1, 2)
        elif self.kind == "map_last":
            patches = hidden.flatten(1, 2)
        elif self.kind == "vector":
            patches = hidden[:, None]
        else:
            patches = hidden[:, self.num_prefix :]
        prefix = hidden[:, : self.num_prefix] if self.num_prefix else patches[:, :0]
        return Tokens(patches, self.grid, prefix)


def reading_of(shape: Sequence[int], image_size: tuple[int, int]) -> Reading:
    """How to read a submodule's output, told by its shape.

    A map has its channels where the two others are not in the proportion of the image, first if in doubt. A sequence
    begins with as few prefix tokens (class tokens, registers) as leave a grid in that proportion; where no number up
    to 8 does, it is a row of patches.

    Args:
        shape (`Sequence[int]`): Without the batch.
        image_size (`tuple[int, int]`): Height and width of the image.

    Raises:
        ValueError: It is none of `[D, h, w]`, `[h, w, D]`, `[N, D]` and `[D]`.

    Example:

        >>> reading_of([64, 8, 8], (32, 32)).kind, reading_of([8, 8, 64], (32, 32)).kind
        ('map', 'map_last')
        >>> reading_of([201, 384], (224, 224))
        Reading(kind='sequence', width=384, grid=(14, 14), num_prefix=5)
    """
    height, width = image_size
    if len(shape) == 1:
        return Reading("vector", shape[0], (1, 1))
    if len(shape) == 2:
        for num_prefix in range(min(MOST_PREFIX_TOKENS, shape[0] - 1) + 1):
            rows = round(((shape[0] - num_prefix) * height / width) ** 0.5)
            if rows and rows * rows * width == (shape[0] - num_prefix) * height:
                return Reading("sequence", shape[1], (rows, (shape[0] - num_prefix) // rows), num_prefix)
        return Reading("sequence", shape[1], (1, shape[0]))
    if len(shape) == 3:
        channels_last = shape[0] * width == shape[1] * height and shape[1] * width != shape[2] * height
        if channels_last:
            return Reading("map_last", shape[2], (shape[0], shape[1]))
        return Reading("map", shape[0], (shape[1], shape[2]))
    raise ValueError(
        f"heads: an output of shape {list(shape)} (without the batch) is no map, sequence or vector; give a module of "
        "your own that turns it into logits"
    )


class HighwayWrapper(HighwayMixin, PreTrainedModel):
    """Any image classifier with exits behind some of its submodules.

    Cuts between the children of `nn.Sequential`s, nested ones too, are exact: the children are called one by one. Any
    other module is cut by its graph as `torch.export` sees it, traced once for `eval()` and once for `train()`, for
    each dtype and device, at the image size of `example`; hooks on its submodules are not called. Either way the
    weights are those of `module` itself, under `wrapped`, and what it answered before, it answers when nobody leaves.

    Behind each cut the `State` holds `hidden` `[B, ...]`, what the submodule gave and the exit reads, and whatever
    else later blocks need (a skip connection, say), each with the batch first and under `from_` and the name of the
    operation that made it; behind the last block it holds `logits`. Blocks are counted as in `HighwayWrapperConfig`.

    Args:
        module (`nn.Module`):
            Takes images `[B, C, H, W]` as its first argument and gives logits `[B, classes]`, a tuple that begins with
            them, or an output that has `logits`. It is not copied.
        after (`Sequence[str]`): Names of the submodules, as `module.named_modules()` has them, in order of running.
        heads (`str`, `nn.Module` or a list of these, *optional*, defaults to `"auto"`):
            Of each exit, or one name for all: a head of `lgvit_hf.heads`, or a module of your own that takes the
            submodule's output and gives logits. `"auto"` is `"average"`: mean over all places, layer norm, classifier.
        example (`Tensor`, *optional*):
            One input `[1, C, H, W]`; by default of the size that `module.config` says.
        settings: Fields of `HighwayWrapperConfig`: `exit_policy`, `exit_loss_weights`, `id2label`, ...

    Raises:
        ValueError: A name that is not there; a place that cannot be cut, with the obstacle and the nearest that can; a
            module whose answer for an image depends on the others of the batch; heads that do not fit.

    Example:

        >>> net = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.Flatten(), nn.Linear(784, 5)
        ... )
        >>> model = HighwayWrapper(net.eval(), after=["1", "2"], example=torch.zeros(1, 3, 32, 32))
        >>> out = model(torch.randn(4, 3, 32, 32))
        >>> out.logits.shape, out.exit_layer.shape
        (torch.Size([4, 5]), torch.Size([4]))
        >>> model.set_exit_policy("fixed", exit_index=0)
        >>> model(torch.randn(2, 3, 32, 32)).exit_layer.tolist()
        [1, 1]
    """

    config_class = HighwayWrapperConfig
    base_model_prefix = "wrapped"
    main_input_name = PIXELS

    def __init__(
        self,
        module: nn.Module | HighwayWrapperConfig,
        after: Sequence[str] = (),
        heads: str | nn.Module | Sequence[str | nn.Module] = "auto",
        *,
        example: Tensor | None = None,
        config: HighwayWrapperConfig | None = None,
        **settings: Any,
    ):
        if isinstance(module, HighwayWrapperConfig):
            module, config = _rebuilt(module), module
        if not isinstance(module, nn.Module):
            raise ValueError(f"module: {type(module).__name__} is no nn.Module")
        if config is None:
            if isinstance(after, str) or not after:
                raise ValueError(
                    f"after: {after!r} must be a list of names of submodules, such as ['layer1', 'layer2']"
                )
            images, names = _probes(module, example), list(after)
        else:
            images, names = (
                _probes(module, torch.zeros(1, config.num_channels, *_pair(config.image_size))),
                config.after,
            )
        with _evaluating(module):
            pieces, shapes, num_labels = _proven(module, names, images)
        heads = _listed(heads, len(names)) if config is None else _own_of(config, heads)
        if config is None:
            config = _config_of(module, names, heads, shapes, num_labels, images, settings)
        elif (shapes, num_labels) != (config.exit_shapes, config.num_labels):
            raise ValueError(
                f"module: behind {names} it gives {shapes} and {num_labels} labels, but was {config.exit_shapes} and "
                f"{config.num_labels} when it was saved"
            )
        super().__init__(config)
        for index, head in enumerate(heads):
            if isinstance(head, nn.Module):
                self.exits[index] = _fitting(head, index, shapes[index], config)
        self.exits.to(images.device, images.dtype)
        # after all new weights have been made, so that these stay as they are
        self.wrapped = module
        self.training = module.training
        self.exits.train(module.training)
        with _evaluating(module):
            self._pieces: dict[tuple, list[Piece]] = {self._mode(): pieces}

    @classmethod
    def from_sequential(
        cls, parts: Sequence[nn.Module], exits: Sequence[nn.Module], *, example: Tensor, **settings: Any
    ) -> HighwayWrapper:
        """Parts that run one after the other, with an exit behind each but the last, which gives the logits itself.

        The form of TARDIS's `EarlyExitNetwork`; what it calls `exit_chosen` is the policy `fixed`.

        Args:
            parts (`Sequence[nn.Module]`): Of the network.
            exits (`Sequence[nn.Module]`): One less: what each takes, the part before it gives; logits out.
            example (`Tensor`): One input `[1, C, H, W]`.
            settings: Fields of `HighwayWrapperConfig`.

        Raises:
            ValueError: The numbers do not fit, or as of the class.

        Example:

            >>> parts = [nn.Conv2d(3, 4, 8, stride=8), nn.Sequential(nn.Flatten(), nn.Linear(64, 5))]
            >>> exits = [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))]
            >>> model = HighwayWrapper.from_sequential(parts, exits, example=torch.zeros(1, 3, 32, 32))
            >>> [tuple(logits.shape) for logits in model(torch.randn(2, 3, 32, 32), early_exit=False).exit_logits]
            [(2, 5), (2, 5)]
        """
        if len(exits) != len(parts) - 1 or not exits:
            raise ValueError(f"exits: {len(exits)} must be one less than the {len(parts)} parts, and at least one")
        names = [str(index) for index in range(len(exits))]
        return cls(nn.Sequential(*parts), names, list(exits), example=example, **settings)

    @classmethod
    def from_backbone(cls, backbone: nn.Module, **settings: Any) -> HighwayWrapper:
        """As the class itself, for whoever calls it as of the other highways; the module is not copied."""
        return cls(backbone, **settings)

    @staticmethod
    def cut_points(module: nn.Module, example: Tensor | None = None) -> list[str]:
        """Names that `after` may hold, in the order in which the submodules run.

        Args:
            module (`nn.Module`), example (`Tensor`, *optional*): As of the class.

        Example:

            >>> net = nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
            >>> HighwayWrapper.cut_points(net, torch.zeros(1, 3, 32, 32))
            ['0', '1', '2']
        """
        images = _probes(module, example)
        with _evaluating(module):
            return cutting.cut_points(module, images)

    # -- the highway ---------------------------------------------------------------------------------------

    def stem(self, state: State, interpolate_pos_encoding: bool = False) -> State:
        """The images in the module's own dtype."""
        if interpolate_pos_encoding:
            raise ValueError(
                "interpolate_pos_encoding: a wrapped module is cut for images of one size; wrap it again with an "
                "example of the other"
            )
        return State({PIXELS: state[PIXELS].to(self.dtype)})

    def blocks(self) -> list[Block]:
        """The stretches between cuts, traced anew where a submodule, mode, dtype or device is another than before."""
        mode = self._mode()
        if mode not in self._pieces:
            example = torch.zeros(1, self.config.num_channels, *_pair(self.config.image_size))
            self._pieces[mode] = cut(self.wrapped, self.config.after, _probes(self.wrapped, example))
        return list(self._pieces[mode])

    def _mode(self) -> tuple:
        """What a trace depends on; the modules themselves, since one may be put in the place of another."""
        return self.device, self.dtype, tuple((module, module.training) for module in self.wrapped.modules())

    def tokens(self, state: State) -> Tokens:
        """What the exit at hand reads: `hidden` as patches and prefix tokens."""
        return reading_of(state[HIDDEN].shape[1:], _pair(self.config.image_size)).tokens(state[HIDDEN])

    def final(self, state: State) -> Tensor:
        """The module's own answer."""
        return state[LOGITS]

    def head_shape(self, after: int) -> HeadShape:
        """Told by what the submodule gives; all places count alike, class tokens too."""
        width = reading_of(self.config.exit_shapes[after - 1], _pair(self.config.image_size)).width
        return HeadShape(
            width=width,
            num_prefix=0,
            num_labels=self.config.num_labels,
            num_attention_heads=max(number for number in range(1, 9) if width % number == 0),
            intermediate_size=4 * width,
            layer_norm_eps=1e-6,
            pool="mean",
        )

    def build_exit(self, exit: Exit) -> nn.Module:
        """The head of one exit; a place for one that is given."""
        return nn.Identity() if exit.head == OWN else super().build_exit(exit)

    def recorded_modules(self, name: str) -> list[nn.Module]:
        """Not known of a module of any kind.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"output_{name}: a wrapped module does not say where its {name} are; hook the module itself")

    def truncate(self, exit_index: int) -> HighwayWrapper:
        """Not possible: the module is the user's, and is kept whole.

        Raises:
            ValueError: Always, with another way.
        """
        raise ValueError(
            f"truncate: a wrapped module cannot be made smaller; set_exit_policy('fixed', exit_index={exit_index!r}) "
            "answers at one exit and runs nothing behind it"
        )

    def _answer(self, head: nn.Module, state: State) -> Tensor:
        return super()._answer(head, state) if isinstance(head, ExitHead) else head(state[HIDDEN])

    def _study(self, head: nn.Module, state: State) -> tuple[Tensor, Tensor]:
        if isinstance(head, ExitHead):
            return super()._study(head, state)
        return head(state[HIDDEN]), state[HIDDEN]

    def _study_final(self, state: State) -> tuple[Tensor, Tensor]:
        return state[LOGITS], state[LOGITS]

    # -- saving and loading --------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As upstream's: weights as safetensors, cuts and heads as JSON; no code, since the module's is the user's."""
        state = kwargs.pop("state_dict", None)
        once = _each_once(self.state_dict() if state is None else state)
        PreTrainedModel.save_pretrained(self, save_directory, *args, state_dict=once, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        module: nn.Module | None = None,
        heads: Sequence[nn.Module] = (),
        *,
        config: HighwayWrapperConfig | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ):
        """Load what `save_pretrained` wrote, in `eval()` mode, from safetensors only.

        Args:
            pretrained_model_name_or_path (`str` or path): Folder or Hub id.
            module (`nn.Module`, *optional*):
                A new one of the class that was wrapped; its weights are replaced. One of transformers' own models is
                built from its config where none is given.
            heads (`Sequence[nn.Module]`, *optional*): New ones of the exits whose heads were your own, in order.
            config (`HighwayWrapperConfig`, *optional*): Instead of the one in the folder.
            output_loading_info (`bool`, *optional*, defaults to `False`): Also return that no tensor was missing.
            kwargs: Fields of the config to set (`exit_policy`, ...), `dtype`, and arguments of the Hub.

        Raises:
            ValueError: No module, another module than the one that was saved, or too few heads.
            OSError: No config or no safetensors there.
        """
        path = pretrained_model_name_or_path
        check_files(path)
        hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        settings = {key: value for key, value in kwargs.items() if key not in AUTO_ARGUMENTS}
        if config is None:
            config, unknown = HighwayWrapperConfig.from_pretrained(path, return_unused_kwargs=True, **settings, **hub)
            settings = {key: value for key, value in unknown.items() if key not in HUB_ARGUMENTS}
        if settings:
            raise ValueError(f"{min(settings)!r} is no field of HighwayWrapperConfig")
        model = cls(_rebuilt(config) if module is None else module, heads=heads, config=config)
        _load(model, path, hub)
        model.eval()
        if dtype not in (None, "auto"):
            model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        info = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
        return (model, info) if output_loading_info else model


def _each_once(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without those that are another under a second name, as of tied weights."""
    first: dict[tuple, str] = {}
    for name, tensor in state.items():
        first.setdefault((tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if tensor.numel() else name, name)
    return {name: state[name] for name in first.values()}


def _load(model: HighwayWrapper, path: str | os.PathLike, hub: dict[str, Any]) -> None:
    """The weights of a saved wrapper, all of them and no others."""
    index = Path(path) / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    tensors: dict[str, Tensor] = {}
    try:
        for name in sorted(names):
            tensors |= load_file(cached_file(path, name, **hub))
    except SafetensorError as error:
        raise OSError(f"{path}: damaged safetensors ({error})") from error
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(
            f"{path}: its weights are of another module than {_name(model.wrapped)} ({reason})"
        ) from error
    # one tensor under several names is saved under one of them
    ours = model.state_dict()
    loaded = {ours[name].data_ptr() for name in ours if name not in missing}
    missing = [name for name in missing if ours[name].data_ptr() not in loaded]
    if missing or unexpected:
        what = f"no tensor {missing[0]!r}" if missing else f"unknown tensor {unexpected[0]!r}"
        raise ValueError(f"{path}: {what}; it was saved from {model.config.module_class}")


def _rebuilt(config: HighwayWrapperConfig) -> nn.Module:
    """One of transformers' own models, from the config that was saved; of no other code."""
    settings = config.module_config
    if not settings:
        raise ValueError(
            f"module: {config.module_class} is no model of transformers; give a new one to be filled: "
            "HighwayWrapper.from_pretrained(folder, module=...)"
        )
    kind, name = settings.get("model_type"), str(config.module_class).rpartition(".")[2]
    model_class = getattr(transformers, name, None)
    if kind not in CONFIG_MAPPING or not (inspect.isclass(model_class) and issubclass(model_class, PreTrainedModel)):
        raise ValueError(f"module: transformers {transformers.__version__} has no model {name!r} of type {kind!r}")
    if model_class.config_class is not CONFIG_MAPPING[kind]:
        raise ValueError(f"module: {name!r} is no model of type {kind!r}")
    return model_class(CONFIG_MAPPING[kind].from_dict(without_attention_code(settings)))


def _probes(module: nn.Module, example: Tensor | None) -> Tensor:
    """Three different images of the size of an example, on the module's device and in its dtype."""
    config = getattr(module, "config", None)
    size = getattr(config, "image_size", None)
    if example is None and not size:
        raise ValueError(
            f"example: {type(module).__name__} does not say what images it takes; give one, such as "
            "example=torch.zeros(1, 3, 224, 224)"
        )
    shape = (1, config.num_channels, *_pair(size)) if example is None else tuple(example.shape)
    if len(shape) != 4 or shape[0] < 1:
        raise ValueError(f"example: shape {shape} must be (1, channels, height, width)")
    weight = next((each for each in module.parameters() if each.is_floating_point()), torch.zeros(()))
    images = torch.randn(3, *shape[1:], generator=torch.Generator().manual_seed(0))
    if example is not None:
        # the last: an example of zeros says little
        images[-1] = example[0].detach().cpu()
    return images.to(weight.device, weight.dtype)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """A module in `eval()` mode, each of its submodules as before afterwards."""
    before = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, training in before:
            each.training = training


@torch.no_grad()
def _proven(module: nn.Module, after: Sequence[str], images: Tensor) -> tuple[list[Piece], list[list[int]], int]:
    """The pieces of a module, run against it with rows that leave and change places; what exits read; the classes."""
    try:
        answer = module(images)
    # the user's code may raise anything
    except Exception as error:
        raise ValueError(
            f"example: {_name(module)} does not take {tuple(images.shape)} ({type(error).__name__}: {error})"
        ) from error
    expected = logits_of(answer)
    if len(expected) != len(images):
        raise ValueError(
            f"module: {len(images)} images give logits of shape {tuple(expected.shape)}, not one row each"
        )
    if not expected.isfinite().all():
        raise ValueError(
            f"module: {_name(module)} answers NaN or infinity in eval() mode (asked for your example and for random "
            "images of mean 0 and standard deviation 1)"
        )
    alone = logits_of(module(images[:1]))
    if not _same(alone, expected[:1]):
        raise ValueError(
            f"module: {_name(module)} answers an image otherwise where it is alone, in eval() mode: rows that leave "
            "would change the answers of those that stay (statistics of the batch?)"
        )
    pieces, shapes = cut(module, after, images), []
    state, rows = State({PIXELS: images}), torch.arange(len(images), device=images.device)
    for index, piece in enumerate(pieces):
        state = piece(state)
        if index < len(after):
            shapes.append(list(state[HIDDEN].shape[1:]))
            # the last one leaves, the others change places; then these do, at every cut
            order = torch.arange(2 if index == 0 else len(rows), device=images.device).flip(0)
            state, rows = state.select(order), rows[order]
    if not _same(state[LOGITS], expected[rows]):
        raise ValueError(
            f"after: cut behind {list(after)}, {_name(module)} gives other answers for rows that others have left "
            "behind; what crosses a cut depends on the batch"
        )
    return pieces, shapes, expected.shape[1]


def _same(ours: Tensor, expected: Tensor) -> bool:
    if ours.shape != expected.shape:
        return False
    tolerance = 100 * torch.finfo(expected.dtype).eps * max(1.0, expected.abs().max().item())
    return bool((ours - expected).abs().max() <= tolerance)


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _listed(heads: str | nn.Module | Sequence[str | nn.Module], num_exits: int) -> list[str | nn.Module]:
    """A head for each exit; one name may stand for all."""
    if isinstance(heads, str):
        heads = [heads] * num_exits
    if isinstance(heads, nn.Module) and not isinstance(heads, nn.ModuleList):
        heads = [heads]
    if len(heads) != num_exits:
        raise ValueError(f"heads: {len(heads)} must be as many as exits, {num_exits}, or one name for all")
    if len({id(head) for head in heads if isinstance(head, nn.Module)}) < sum(
        isinstance(head, nn.Module) for head in heads
    ):
        raise ValueError("heads: one module stands at several exits; give each its own")
    return ["average" if head == "auto" else head for head in heads]


def _own_of(config: HighwayWrapperConfig, heads: Any) -> list[nn.Module | None]:
    """The user's own heads at the exits that have such, by a config."""
    given = [] if isinstance(heads, str) else list(heads)
    wanted = config.exit_types.count(OWN)
    if len(given) != wanted:
        raise ValueError(f"heads: {len(given)} modules, but {wanted} of the exits were saved with heads of your own")
    own = iter(given)
    return [next(own) if head == OWN else None for head in config.exit_types]


def _config_of(
    module: nn.Module,
    after: list[str],
    heads: Sequence[str | nn.Module],
    shapes: list[list[int]],
    num_labels: int,
    images: Tensor,
    settings: dict[str, Any],
) -> HighwayWrapperConfig:
    theirs = getattr(module, "config", None)
    known = isinstance(theirs, PretrainedConfig)
    labels: dict[str, Any] = {"num_labels": num_labels}
    if known and theirs.num_labels == num_labels:
        labels = {"id2label": theirs.id2label, "label2id": theirs.label2id, "problem_type": theirs.problem_type}
    if "id2label" in settings:
        labels.pop("num_labels", None)
        if len(settings["id2label"]) != num_labels:
            raise ValueError(f"id2label: {len(settings['id2label'])} names for the {num_labels} logits of the module")
    height, width = images.shape[2:]
    is_theirs = isinstance(module, PreTrainedModel) and getattr(transformers, _name(module), None) is type(module)
    fields = {
        "after": after,
        "exit_types": [OWN if isinstance(head, nn.Module) else head for head in heads],
        "exit_shapes": shapes,
        "image_size": height if height == width else [height, width],
        "num_channels": images.shape[1],
        "module_class": f"{type(module).__module__}.{type(module).__qualname__}",
        "module_config": theirs.to_dict() if is_theirs else None,
    }
    wrong = sorted(set(fields) & set(settings))
    if wrong:
        raise ValueError(f"{wrong[0]}: it is told by the module and its heads, and cannot be set")
    unknown = sorted(set(settings) - set(HighwayWrapperConfig().to_dict()) - {"num_labels"})
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no field of HighwayWrapperConfig")
    return HighwayWrapperConfig(**{**fields, **labels, **settings})


@torch.no_grad()
def _fitting(head: nn.Module, index: int, shape: list[int], config: HighwayWrapperConfig) -> nn.Module:
    """A head of the user's own that takes what its exit reads and gives logits."""
    weight = next(head.parameters(), torch.zeros(()))
    try:
        with _evaluating(head):
            logits: Any = head(torch.zeros(2, *shape, device=weight.device, dtype=weight.dtype))
    # the user's code may raise anything
    except Exception as error:
        raise ValueError(
            f"heads: {_name(head)} at exit {index} does not take {['batch', *shape]} ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (2, config.num_labels):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"heads: {_name(head)} at exit {index} gives {found}, not logits (2, {config.num_labels})")
    return head
