"""HighwayWrapper: early exits after named submodules of any `nn.Module`, on the engine of the other highways."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import cached_file

from .checkpoint_files import HUB_ARGUMENTS, check_files
from .configuration_wrapper import OWN, HighwayWrapperConfig, class_name, config_of_wrapped
from .exit_settings import Exit
from .feature_layout import default_head, reading_of
from .heads import ExitHead, HeadShape
from .modeling_highway import HighwayMixin
from .modes import evaluating
from .module_split import cut, cut_points, proven_pieces
from .safe_config import without_attention_code
from .segments import Block, State, Tokens, height_width
from .sequential_split import HIDDEN, LOGITS, PIXELS, Piece

NO_DATA_PARALLEL = (
    "a wrapped module cannot be copied for several GPUs in one process (nn.DataParallel): its pieces hold the weights "
    "of the first; start a process for each with torchrun or accelerate launch, or show it one (CUDA_VISIBLE_DEVICES)"
)
# what Auto classes pass on beside settings
AUTO_ARGUMENTS = ("_from_auto", "_commit_hash", "adapter_kwargs", "code_revision", "trust_remote_code")


class HighwayWrapper(HighwayMixin, PreTrainedModel):
    """Any image classifier with exits after some of its submodules.

    Cuts between the children of `nn.Sequential`s, nested ones too, are exact: the children are called one by one. Any
    other module is cut by its graph as `torch.export` sees it, traced once for `eval()` and once for `train()`, for
    each dtype and device, at the image size of `example`; hooks on its submodules are not called. Either way the
    weights are those of `module` itself, under `wrapped`, and it answers as before when no sample exits early.

    Behind each cut the `State` holds `hidden` `[B, ...]`, what the submodule gave and the exit reads, and whatever
    else later blocks need (a skip connection, say), each with the batch first and under `from_` and the name of the
    operation that made it; after the last block it holds `logits`. Blocks are counted as in `HighwayWrapperConfig`.

    Args:
        module (`nn.Module`):
            Takes images `[B, C, H, W]` as its first argument and gives logits `[B, classes]`, a tuple that begins with
            them, or an output that has `logits`. It is not copied.
        after (`Sequence[str]`): Names of the submodules, as `module.named_modules()` has them, in order of running.
        heads (`str`, `nn.Module` or a list of these, *optional*, defaults to `"auto"`):
            Of each exit, or one name for all: a head of `lgvit_hf.heads`, or a module of your own that takes the
            submodule's output and gives logits. `"auto"` is `"concat"` of a sequence of tokens (layer norm,
            then a classifier of each channel's mean and largest value) and `"average"` of all else (mean over all
            places, layer norm, classifier).
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

    if TYPE_CHECKING:
        config: HighwayWrapperConfig

    config_class = HighwayWrapperConfig  # type: ignore[assignment]  # `None` upstream
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
            config = module
            module = _rebuilt(config)
        if not isinstance(module, nn.Module):
            raise ValueError(f"module: {type(module).__name__} is no nn.Module")
        if config is None:
            if isinstance(after, str) or not after:
                raise ValueError(
                    f"after: {after!r} must be a list of names of submodules, such as ['layer1', 'layer2']"
                )
            images, names = _probes(module, example), list(after)
        else:
            names = config.after
            images = _probes(module, torch.zeros(1, config.num_channels, *height_width(config.image_size)))
        with evaluating(module):
            pieces, shapes, num_labels = proven_pieces(module, names, images)
        if config is None:
            own: Sequence[Any] = _one_per_exit(heads, shapes)
            config = config_of_wrapped(module, names, own, shapes, num_labels, images, settings)
        else:
            own = _own_of(config, heads)
        if (shapes, num_labels) != (config.exit_shapes, config.num_labels):
            raise ValueError(
                f"module: after {names} it gives {shapes} and {num_labels} labels, but was {config.exit_shapes} and "
                f"{config.num_labels} when it was saved"
            )
        super().__init__(config)
        for index, head in enumerate(own):
            if isinstance(head, nn.Module):
                self.exits[index] = _fitting(head, index, shapes[index], config)
        self.exits.to(images.device, images.dtype)
        # the module itself is no unit: its pieces run its weights, and not its submodules
        self._no_split_modules = self._head_classes()
        # after all new weights have been made, so that these stay as they are
        self.wrapped = module
        self.training = module.training
        self.exits.train(module.training)
        with evaluating(module):
            self._pieces: dict[tuple, list[Piece]] = {self._mode(): pieces}

    @classmethod
    def from_sequential(
        cls, parts: Sequence[nn.Module], exits: Sequence[nn.Module], *, example: Tensor, **settings: Any
    ) -> HighwayWrapper:
        """Parts that run one after the other, with an exit after each but the last, which gives the logits itself.

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
    def from_backbone(cls, backbone: nn.Module, **settings: Any) -> HighwayWrapper:  # type: ignore[override]
        """As the class itself, for whoever calls it as of the other highways; the module is not copied."""
        return cls(backbone, **settings)

    @staticmethod
    def cut_points(module: nn.Module, example: Tensor | None = None) -> list[str]:
        """Names that `after` may hold, in the order in which the submodules run.

        Args:
            module (`nn.Module`), example (`Tensor`, *optional*): See the class.

        Example:

            >>> net = nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
            >>> HighwayWrapper.cut_points(net, torch.zeros(1, 3, 32, 32))
            ['0', '1', '2']
        """
        images = _probes(module, example)
        with evaluating(module):
            return cut_points(module, images)

    # -- the highway ---------------------------------------------------------------------------------------

    def stem(self, state: State, interpolate_pos_encoding: bool = False) -> State:
        """The images in the module's own dtype."""
        if interpolate_pos_encoding:
            raise ValueError(
                "interpolate_pos_encoding: a wrapped module is cut for images of one size; wrap it again with an "
                "example of the other"
            )
        return State({PIXELS: state[PIXELS].to(self.dtype)})

    # cutting is no part of a graph that is compiled
    @torch.compiler.disable
    def blocks(self) -> list[Block]:
        """The stretches between cuts, traced anew where a submodule, mode, dtype or device is another than before."""
        mode = self._mode()
        if mode not in self._pieces:
            example = torch.zeros(1, self.config.num_channels, *height_width(self.config.image_size))
            self._pieces[mode] = cut(self.wrapped, self.config.after, _probes(self.wrapped, example))
        return list(self._pieces[mode])

    def _replicate_for_data_parallel(self) -> HighwayWrapper:
        raise ValueError(NO_DATA_PARALLEL)

    def _mode(self) -> tuple:
        """What a trace depends on; the modules themselves, since one may be put in the place of another."""
        return self.device, self.dtype, tuple((module, module.training) for module in self.wrapped.modules())

    def tokens(self, state: State) -> Tokens:
        """What the exit at hand reads: `hidden` as patches and prefix tokens."""
        return reading_of(state[HIDDEN].shape[1:], height_width(self.config.image_size)).tokens(state[HIDDEN])

    def final(self, state: State) -> Tensor:
        """The module's own answer."""
        return state[LOGITS]

    def head_shape(self, after: int) -> HeadShape:
        """Told by what the submodule gives; all places count alike, class tokens too."""
        width = reading_of(self.config.exit_shapes[after - 1], height_width(self.config.image_size)).width
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
            "answers at one exit and runs nothing after it"
        )

    def _answer(self, head: nn.Module, state: State) -> Tensor:
        return super()._answer(head, state) if isinstance(head, ExitHead) else head(state[HIDDEN])

    def _forward_with_features(self, head: nn.Module, state: State) -> tuple[Tensor, Tensor]:
        if isinstance(head, ExitHead):
            return super()._forward_with_features(head, state)
        return head(state[HIDDEN]), state[HIDDEN]

    def _final_with_features(self, state: State) -> tuple[Tensor, Tensor]:
        return state[LOGITS], state[LOGITS]

    # -- saving and loading --------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As upstream's: weights as safetensors, cuts and heads as JSON; no code, since the module's is the user's."""
        if kwargs.get("push_to_hub"):
            return super().save_pretrained(save_directory, *args, **kwargs)
        state = kwargs.pop("state_dict", None)
        once = _each_once(self.state_dict() if state is None else state)
        return PreTrainedModel.save_pretrained(self, save_directory, *args, **{"state_dict": once, **kwargs})

    @classmethod
    def from_pretrained(  # type: ignore[override]  # a module cannot be built from a config alone
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
        hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        check_files(path, hub)
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
        info = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        return (model, {name: [] for name in info}) if output_loading_info else model


def _each_once(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without those that are another under a second name, as of tied weights."""
    first: dict[Any, str] = {}
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
            tensors |= load_file(str(cached_file(path, name, **hub)))
    except SafetensorError as error:
        raise OSError(f"{path}: damaged safetensors ({error})") from error
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(
            f"{path}: its weights are of another module than {class_name(model.wrapped)} ({reason})"
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
    config: Any = getattr(module, "config", None)
    size: Any = getattr(config, "image_size", None)
    if example is None and not size:
        raise ValueError(
            f"example: {type(module).__name__} does not say what images it takes; give one, such as "
            "example=torch.zeros(1, 3, 224, 224)"
        )
    shape = (1, config.num_channels, *height_width(size)) if example is None else tuple(example.shape)
    if len(shape) != 4 or shape[0] < 1:
        raise ValueError(f"example: shape {shape} must be (1, channels, height, width)")
    weight = next((each for each in module.parameters() if each.is_floating_point()), torch.zeros(()))
    images = torch.randn(3, *shape[1:], generator=torch.Generator().manual_seed(0))
    if example is not None:
        # the last: an example of zeros says little
        images[-1] = example[0].detach().cpu()
    return images.to(weight.device, weight.dtype)


def _one_per_exit(
    heads: str | nn.Module | Sequence[str | nn.Module], shapes: list[list[int]]
) -> list[str | nn.Module]:
    """A head for each exit; one name may stand for all."""
    if isinstance(heads, str):
        heads = [heads] * len(shapes)
    if isinstance(heads, nn.Module) and not isinstance(heads, nn.ModuleList):
        heads = [heads]
    if len(heads) != len(shapes):
        raise ValueError(f"heads: {len(heads)} must be as many as exits, {len(shapes)}, or one name for all")
    modules = [head for head in heads if isinstance(head, nn.Module)]
    if len(set(map(id, modules))) < len(modules):
        raise ValueError("heads: one module stands at several exits; give each its own")
    return [default_head(shape) if head == "auto" else head for head, shape in zip(heads, shapes, strict=True)]


def _own_of(config: HighwayWrapperConfig, heads: Any) -> list[nn.Module | None]:
    """The user's own heads at the exits that have such, by a config."""
    given = [] if isinstance(heads, str) else list(heads)
    wanted = config.exit_types.count(OWN)
    if len(given) != wanted:
        raise ValueError(f"heads: {len(given)} modules, but {wanted} of the exits were saved with heads of your own")
    own = iter(given)
    return [next(own) if head == OWN else None for head in config.exit_types]


@torch.no_grad()
def _fitting(head: nn.Module, index: int, shape: list[int], config: HighwayWrapperConfig) -> nn.Module:
    """A head of the user's own that takes what its exit reads and gives logits."""
    weight = next(head.parameters(), torch.zeros(()))
    try:
        with evaluating(head):
            logits: Any = head(torch.zeros(2, *shape, device=weight.device, dtype=weight.dtype))
    # the user's code may raise anything
    except Exception as error:
        raise ValueError(
            f"heads: {class_name(head)} at exit {index} does not take {['batch', *shape]} "
            f"({type(error).__name__}: {error})"
        ) from error
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (2, config.num_labels):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"heads: {class_name(head)} at exit {index} gives {found}, not logits (2, {config.num_labels})"
        )
    return head
