"""AViT: a plain ViT or DeiT whose tokens halt one by one, and are removed where nothing is trained."""

from __future__ import annotations

import copy
import logging
import os
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    PretrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    ViTMSNForImageClassification,
    ViTMSNModel,
)
from transformers.utils import ModelOutput

from .checkpoint_files import HUB_ARGUMENTS
from .configuration import OWN_FIELDS
from .configuration_avit import AViTConfig
from .ensemble import Ensemble  # noqa: F401
from .exit_head import ExitHead  # noqa: F401
from .exit_policy import Memory  # noqa: F401
from .exit_settings import Exit  # noqa: F401
from .files import add_files  # noqa: F401
from .gate import GatePolicy  # noqa: F401
from .halting_layers import HaltingDeiTLayer, HaltingViTLayer
from .heads import is_watched
from .losses import check_labels, task_loss
from .plain_checkpoint import load_native, name_of
from .policies import POLICIES  # noqa: F401
from .pretrained import SafeCheckpoint
from .recording import Selection, recording, requested
from .remote_code import write_code  # noqa: F401
from .safe_config import SafeConfig  # noqa: F401
from .segments import State  # noqa: F401
from .token_halting import (
    Halting,
    attend_live_tokens,
    distribution_loss,
    halting_scores,
    halting_target,
    settle,
    weigh_live_tokens,
)

logger = logging.getLogger(__name__)


# how live tokens attend, and what that is called in the blocks: any other way would see tokens that have halted
ATTENTIONS = {"sdpa": "live_tokens", "eager": "live_tokens_eager"}
AttentionInterface.register(ATTENTIONS["sdpa"], attend_live_tokens)
AttentionInterface.register(ATTENTIONS["eager"], weigh_live_tokens)

# what a backbone is made of, and which plain checkpoints have one inside: the bare backbone last
BACKBONES = {"vit": (ViTConfig, ViTModel, HaltingViTLayer), "deit": (DeiTConfig, DeiTModel, HaltingDeiTLayer)}
NATIVES = {
    "vit": (ViTForImageClassification, ViTModel),
    "deit": (DeiTForImageClassificationWithTeacher, DeiTForImageClassification, DeiTModel),
    # a ViT by another name
    "vit_msn": (ViTMSNForImageClassification, ViTMSNModel),
}
# their classifiers, of the class token and of the distillation token
CLASSIFIERS = (("classifier", "cls_classifier"), ("distillation_classifier",))


@dataclass
class AViTOutput(ModelOutput):
    """What an `AViT` answers.

    Args:
        loss (`Tensor`, *optional*):
            When labels were given: the task's, and the ponder and distribution losses with the config's weights.
        logits (`Tensor`): `[B, C]`.
        token_depth (`Tensor`): `[B, N]` int64, blocks that each token ran, from 1; prefix tokens first.
        ponder_cost (`Tensor`): `[B, N]`, `rho`: blocks that each token ran, and the weight of the last.
        exit_layer (`Tensor`): `[B]` int64, blocks run until all tokens of the image had halted.
        halting_scores (`Tensor`, *optional*):
            `[B, L]`, mean over the tokens after the class token, after each block; not where tokens are removed,
            since those that have halted count.
        ponder_loss (`Tensor`, *optional*): Mean of `ponder_cost`; not where tokens are removed and no labels given.
        distribution_loss (`Tensor`, *optional*): Of `halting_scores` against their target.
        hidden_states (`tuple[Tensor]`, *optional*), attentions (`tuple[Tensor]`, *optional*):
            See ViT; tokens that have halted are zero after the block where they do.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    token_depth: Tensor | None = None
    ponder_cost: Tensor | None = None
    exit_layer: Tensor | None = None
    halting_scores: Tensor | None = None
    ponder_loss: Tensor | None = None
    distribution_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class AViT(SafeCheckpoint, PreTrainedModel):
    """A ViT or DeiT whose tokens halt one by one (A-ViT, https://arxiv.org/abs/2112.07658). No new parameters.

    In training a token that has halted is zeroed and is no key of the others (*masked*). Otherwise it is removed: the
    live tokens of all images stand in a row, so that every block computes on these alone (*removed*). Both give the
    same logits and depths.

    Example:

        >>> import torch
        >>> from lgvit_hf import AViT, AViTConfig
        >>> small = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2)
        >>> model = AViT(AViTConfig(**small, image_size=32, gate_scale=1.0, gate_center=0.0)).eval()
        >>> out = model(torch.randn(5, 3, 32, 32))
        >>> out.logits.shape, out.token_depth.shape
        (torch.Size([5, 2]), torch.Size([5, 5]))
    """

    if TYPE_CHECKING:
        config: AViTConfig

    config_class = AViTConfig  # type: ignore[assignment]  # `None` upstream
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # the loss is a mean: `Trainer` must divide it by the accumulation steps itself
    accepts_loss_kwargs = False

    def __init__(self, config: AViTConfig):
        config.validate_halting()
        super().__init__(config)
        _check_attention(config._attn_implementation)
        config_class, backbone_class, block_class = BACKBONES[config.backbone]
        sizes = set(config_class().to_dict()) - set(PretrainedConfig().to_dict())
        inner = config_class(**{name: getattr(config, name) for name in sizes})
        self.backbone = backbone_class(inner, add_pooling_layer=False)
        for layer in self.layers:
            layer.__class__ = block_class  # with the weights that it has
            layer.head_dim = config.hidden_size // config.num_attention_heads
        # the backbone says what the user chose; the blocks go by a config that says how live tokens do that
        self._block_config, self.backbone.config = inner, copy.copy(inner)
        self.backbone.config._attn_implementation = config._attn_implementation
        inner._attn_implementation = ATTENTIONS[config._attn_implementation]
        self.classifiers = nn.ModuleList(
            nn.Linear(config.hidden_size, config.num_labels) for _ in range(config.num_read_tokens)
        )
        self.post_init()
        # what stays on one device, and is a unit of FSDP
        self._no_split_modules = [type(self.backbone.embeddings).__name__, block_class.__name__]

    @property
    def layers(self) -> Any:
        """The blocks, as transformers has them."""
        # `encoder.layer` in transformers 4, `layers` in 5
        return getattr(self.backbone, "layers", None) or self.backbone.encoder.layer

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        remove_tokens: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        output_hidden_states: Selection | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> AViTOutput | tuple:
        """Answer images.

        Args:
            pixel_values (`Tensor`): `[B, num_channels, H, W]`, from the image processor.
            labels (`Tensor`, *optional*): `[B]` class numbers (or what `config.problem_type` asks for).
            remove_tokens (`bool`, *optional*):
                Whether tokens that have halted are removed. By default in `eval()` mode without labels,
                unless hidden states or attentions are asked for. The loss is without the distribution's part then, for
                which halted tokens count too.
            interpolate_pos_encoding (`bool`, *optional*): Take images of another size.
            output_hidden_states (`bool` or numbers of some, *optional*), output_attentions (`bool`, *optional*):
                Also return what the backbone would; all tokens stay then.
            return_dict (`bool`, *optional*): `False` gives a tuple.

        Raises:
            ValueError:
                No, an empty or a misshapen batch; a label out of range; tokens to be removed where all are needed.
        """
        config = self.config
        if pixel_values is None or len(pixel_values) == 0:
            raise ValueError("pixel_values: give at least one image, [batch, channels, height, width]")
        if labels is not None:
            check_labels(labels, config.num_labels)
        recorded = requested(config, hidden_states=output_hidden_states, attentions=output_attentions)
        remove = (not self.training and labels is None and not recorded) if remove_tokens is None else remove_tokens
        if remove and self.training:
            raise ValueError("remove_tokens: True in training; the gradient needs every token, call model.eval()")
        if remove and recorded:
            raise ValueError(f"output_{next(iter(recorded))} needs every token in every block: remove_tokens=False")
        embeddings, scores = self.backbone.embeddings, None
        pixel_values = pixel_values.to(embeddings.patch_embeddings.projection.weight.dtype)
        with recording(recorded, self._recorded_modules) as records:
            hidden = embeddings(pixel_values, interpolate_pos_encoding=bool(interpolate_pos_encoding))
            if remove:
                answer, depth, ponder = self._run_removed(hidden)
            else:
                answer, depth, ponder, scores = self._run_masked(hidden)
        answer = self.backbone.layernorm(answer.to(hidden.dtype))
        logits = sum(classifier(answer[:, token]) for token, classifier in enumerate(self.classifiers))
        logits = logits / len(self.classifiers)
        # a pipeline takes batches apart, and this is of all images: not where only answers are wanted
        ponder_loss = None if remove and labels is None else ponder.mean()
        spread_loss: Tensor | None = None
        loss: Tensor | None = None
        if scores is not None:
            target = halting_target(config.num_hidden_layers, config.target_depth, config.published_target)
            spread_loss = distribution_loss(scores.mean(0), target)
        if labels is not None:
            loss = task_loss(logits, labels, config.problem_type) + config.ponder_weight * ponder_loss
            if spread_loss is not None:
                # clamped values need not add up to 1, and may seem nearer than equal
                loss = loss + config.distribution_weight * spread_loss.clamp(min=0)
        output = AViTOutput(
            loss=loss,
            logits=logits,
            token_depth=depth,
            ponder_cost=ponder,
            exit_layer=depth.amax(-1),
            halting_scores=scores,
            ponder_loss=ponder_loss,
            distribution_loss=spread_loss,
            hidden_states=records.get("hidden_states"),
            attentions=records.get("attentions"),
        )
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _run_masked(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All tokens in all blocks: what the read tokens give, every token's depth and ponder cost, mean scores."""
        config, read = self.config, self.config.num_read_tokens
        state = Halting.start(hidden.shape[:2], hidden.device)
        answer, means = torch.zeros((), device=hidden.device), []
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, state.live)
            scores = halting_scores(hidden, config.gate_scale, config.gate_center)
            means.append(scores[:, 1:].mean(1))  # of the last block too, although all tokens halt after it
            if index == config.num_hidden_layers - 1:
                scores = torch.ones_like(scores)
            weights, state = state.step(scores, config.eps)
            answer = answer + weights[:, :read, None] * hidden[:, :read]
        return answer, state.depth, state.ponder, torch.stack(means, dim=1)

    def _run_removed(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Live tokens only, all images' in a row: what the read tokens give, every token's depth and ponder cost."""
        (batch_size, num_tokens, _), config = hidden.shape, self.config
        scale, center, enough, num_read = config.gate_scale, config.gate_center, 1 - config.eps, config.num_read_tokens
        token = torch.arange(batch_size * num_tokens, device=hidden.device)  # number of each live token
        # the first tokens of every image: where these would stand is where images begin
        read = token.view(batch_size, num_tokens)[:, :num_read].flatten().contiguous()
        hidden, lengths, at = hidden.view(1, batch_size * num_tokens, -1), (num_tokens,) * batch_size, read
        total = torch.zeros((), device=hidden.device)
        # of each block: who ran it, with what scores, and what the read tokens were then
        ran, ran_scores, states = [], [], []
        # where no gradient is asked for none of these many small steps needs to know of it
        with torch.inference_mode(not torch.is_grad_enabled()):
            for layer in self.layers:
                hidden = (layer if is_watched(layer) else layer.forward)(hidden, lengths)
                row = hidden.squeeze(0)
                scores = halting_scores(row, scale, center)
                ran.append(token)
                ran_scores.append(scores)
                states.append(row.index_select(0, at))
                total = total + scores
                stay = (total < enough).nonzero().squeeze(1)
                num_live = stay.numel()
                if num_live == 0:
                    break
                if num_live < token.numel():
                    hidden = row.index_select(0, stay).unsqueeze(0)
                    total, token = total.index_select(0, stay), token.index_select(0, stay)
                    if read.numel() == 1:  # one image, one token: the first of those that live
                        lengths = (num_live,)
                        continue
                    places = torch.searchsorted(token, read)
                    begins = [*places.tolist()[::num_read], num_live]
                    lengths = tuple(end - begin for begin, end in pairwise(begins) if begin < end)
                    # a read token that has halted stands nowhere: its weight is 0
                    at = places.clamp_(max=num_live - 1)
        weights, depth, ponder = settle(ran, ran_scores, batch_size * num_tokens)
        weights = weights.index_select(1, read).unsqueeze(2)
        answer = torch.where(weights > 0, weights * torch.stack(states), 0.0).sum(0)
        shape = (batch_size, num_tokens)
        return answer.unflatten(0, (batch_size, num_read)), depth.view(shape), ponder.view(shape)

    def _recorded_modules(self, name: str) -> list[nn.Module]:
        if name == "hidden_states":
            return [self.backbone.embeddings, *self.layers]
        # the weights are given by `attention.attention` in transformers 4, by `attention` in 5
        return [getattr(layer.attention, "attention", layer.attention) for layer in self.layers]

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], *args: Any, **kwargs: Any) -> None:
        """As upstream's: `"sdpa"`, or `"eager"`, which also gives attention weights.

        Raises:
            ValueError: Another one is asked for.
        """
        _check_attention(attn_implementation)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        self._block_config._attn_implementation = ATTENTIONS[self.config._attn_implementation]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As upstream's, from safetensors only; a missing tensor raises.

        Args:
            output_loading_info (`bool`, *optional*, defaults to `False`):
                Also return which tensors are missing or left over, and leave it to the caller to judge them.

        Raises:
            ValueError: A tensor is missing; a pickle was asked for.
            OSError: No config or no safetensors there.
        """
        model, info = cls._load_safely(pretrained_model_name_or_path, *args, **kwargs)
        if output_loading_info:
            return model, info
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(
                f"{pretrained_model_name_or_path}: {len(missing)} tensors are missing, such as {missing[0]!r}; "
                "a plain ViT or DeiT is for AViT.from_backbone"
            )
        return model

    @classmethod
    def from_backbone(cls, backbone: str | os.PathLike | PreTrainedModel, **kwargs: Any) -> AViT:
        """Let the tokens of a plain ViT or DeiT halt.

        Its tensors are copied. Nothing is new, but for the classifier where it has none for these labels.

        Args:
            backbone (`str`, path or `PreTrainedModel`):
                Hub id, folder, or a model in memory, which may also be a highway without exits.
            kwargs:
                Fields of `AViTConfig` to set, such as `gate="small"`, `num_labels` or `id2label`. Hub arguments
                (`revision`, `token`, `cache_dir`, `local_files_only`, `force_download`, `subfolder`) are passed on.

        Raises:
            ValueError: The checkpoint is neither ViT nor DeiT, or lacks a tensor; an unknown field.

        Example:

            >>> from transformers import ViTConfig, ViTForImageClassification
            >>> small = dict(num_hidden_layers=4, hidden_size=24, intermediate_size=24, num_attention_heads=2)
            >>> plain = ViTForImageClassification(ViTConfig(**small))
            >>> AViT.from_backbone(plain, gate="student").config.gate_center
            10.0
        """
        hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        native = backbone if isinstance(backbone, PreTrainedModel) else load_native(backbone, hub, _natives)
        _natives(name_of(backbone), _kind_of(native))
        model = cls(_config_of(native, kwargs)).to(native.device, native.dtype)
        model.backbone.load_state_dict(_without_pooler(native.base_model.state_dict()))
        named = dict(native.named_children())
        for classifier, names in zip(model.classifiers, CLASSIFIERS, strict=False):
            trained = next((named[name] for name in names if isinstance(named.get(name), nn.Linear)), None)
            if trained is not None and trained.weight.shape == classifier.weight.shape:
                classifier.load_state_dict(trained.state_dict())
            elif {"num_labels", "id2label"} & set(kwargs):
                logger.warning("AViT: the classifier is new, for %d labels. Train it.", model.config.num_labels)
            else:
                raise ValueError(f"{name_of(backbone)}: no classifier; give num_labels to make a new one")
        return model.eval()


def _check_attention(name: str | dict[str, str]) -> None:
    if name not in tuple(ATTENTIONS):
        raise ValueError(
            f'Specified `attn_implementation="{name}"` is not supported by AViT, whose live tokens alone attend to '
            'each other; leave it at "sdpa", or "eager" for attention weights'
        )


def _natives(name: str, model_type: str | None) -> tuple[Any, ...]:
    if model_type not in NATIVES:
        raise ValueError(
            f"{name}: model type {model_type!r}, but AViT takes 'vit' and 'deit' backbones, and 'vit_msn'; "
            "`lgvit convert --from dinov2` makes a plain ViT of a DINOv2"
        )
    return NATIVES[model_type]


def _kind_of(model: PreTrainedModel) -> str:
    """The model type; of a highway of blocks alone that reads the class token, that of its backbone."""
    config = model.config
    plain = not getattr(config, "exit_positions", None) and getattr(config, "pool", "cls") == "cls"
    plain = plain and getattr(config, "linear_blocks", None) is None
    attends = getattr(config, "_attn_implementation", None) != "performer"
    return config.model_type.removesuffix("_highway") if plain and attends else config.model_type


def _without_pooler(names: dict[str, Any]) -> dict[str, Any]:
    # a bare backbone may carry a pooler, which no classifier of transformers uses
    return {name: value for name, value in names.items() if not name.startswith("pooler.")}


def _config_of(native: PreTrainedModel, changes: dict[str, Any]) -> AViTConfig:
    """The native model's config as ours, with `changes`."""
    settings = native.config.to_dict()
    for key in ("model_type", "transformers_version", "_name_or_path", "architectures", "auto_map", *OWN_FIELDS):
        settings.pop(key, None)
    own = set(AViTConfig().to_dict()) | {"gate", "num_labels"}
    unknown = sorted(set(changes) - set(settings) - own)
    if unknown and not unknown[0].startswith("exit"):
        raise ValueError(f"{unknown[0]!r} is no field of AViTConfig")
    if changes.get("num_labels", native.config.num_labels) != native.config.num_labels or "id2label" in changes:
        for key in ("id2label", "label2id"):
            settings.pop(key, None)
    kind = _kind_of(native)
    settings["backbone"] = "vit" if kind == "vit_msn" else kind
    with_teacher = isinstance(native, DeiTForImageClassificationWithTeacher)
    settings["distilled"] = with_teacher and getattr(native.config, "distilled", True)
    return AViTConfig(**{**settings, **changes})


AViTForImageClassification = AViT
"""The name that transformers gives such a class: the same one."""
