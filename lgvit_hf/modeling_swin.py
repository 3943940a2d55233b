"""SwinHighway: stem, blocks, tokens and final for transformers' Swin."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import SwinForImageClassification, SwinModel
from transformers.models.swin.modeling_swin import SwinStage

from .attention import FeatureMap  # noqa: F401  (see CONTRIBUTING.md, rule 5)
from .checkpoint_files import check_files  # noqa: F401
from .configuration import HighwayConfig  # noqa: F401
from .configuration_swin import SwinHighwayConfig
from .engine import run_early  # noqa: F401
from .ensemble import Ensemble  # noqa: F401
from .exit_head import ExitHead  # noqa: F401
from .exit_policy import Memory  # noqa: F401
from .exit_settings import Exit  # noqa: F401
from .files import add_files  # noqa: F401
from .gate import GatePolicy  # noqa: F401
from .heads import HeadShape
from .losses import task_loss  # noqa: F401
from .modeling_highway import HighwayMixin, grid_of, is_replaced
from .plain_checkpoint import load_native  # noqa: F401
from .policies import ExitPolicy  # noqa: F401
from .pretrained import PretrainedHighway  # noqa: F401
from .recording import recording  # noqa: F401
from .remote_code import write_code  # noqa: F401
from .safe_config import SafeConfig  # noqa: F401
from .segments import Block, State, Tokens

try:
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
except ImportError:
    # transformers 4 has the weight names of the checkpoints, and saves a buffer that 5 makes anew
    _SAVED_BUFFERS = [r"relative_position_index"]
else:
    _SAVED_BUFFERS = []
    # transformers 5 renames weights by model type; unknown types would be left with random ones
    register_checkpoint_conversion_mapping("swin_highway", get_checkpoint_conversion_mapping("swin"), overwrite=True)


class SwinHighwayStage(SwinStage):
    """Upstream's stage, one part of which can be run alone: a block by its number, or the merging at its end, "merge".

    Checkpointed gradients and the moves between devices belong to stages, so a part is run through its stage.
    """

    def forward(
        self,
        hidden_states: Tensor,
        input_dimensions: tuple[int, int],
        *args,
        part: int | str | None = None,
        **kwargs,
    ):
        if part is None:
            return super().forward(hidden_states, input_dimensions, *args, **kwargs)
        if part == "merge":
            return self.downsample(hidden_states, input_dimensions)
        block = self.blocks[part]
        return block(hidden_states) if is_replaced(block) else block(hidden_states, input_dimensions)[0]


def _run_block(stage: nn.Module, index: int, before: nn.Module | None, state: State) -> State:
    """One block of a stage; the first has patches merged before, so that an exit before it does not pay for that."""
    hidden, grid = state["hidden"], grid_of(state)
    if before is not None:
        # transformers 5 checkpoints a stage once; the merging is little beside its blocks
        merge: Any = before.downsample if before.gradient_checkpointing else partial(before, part="merge")
        hidden = merge(hidden, grid)
        grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
    return State({"hidden": stage(hidden, grid, part=index)}, grid)


class SwinHighway(HighwayMixin, SwinForImageClassification):
    """Swin with early exits. There is no prefix token: heads average the patches, at the width of their stage.

    Example:

        >>> import torch
        >>> from lgvit_hf import SwinHighway, SwinHighwayConfig
        >>> config = SwinHighwayConfig(
        ...     embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=2, image_size=16, patch_size=2
        ... )
        >>> SwinHighway(config).eval()(torch.randn(5, 3, 16, 16)).logits.shape
        torch.Size([5, 2])
    """

    if TYPE_CHECKING:
        config: SwinHighwayConfig

    config_class = SwinHighwayConfig  # type: ignore[assignment]  # `None` upstream
    takes_any_size = True
    _no_split_modules = ["SwinEmbeddings", "SwinHighwayStage"]
    native_classes = (SwinForImageClassification, SwinModel)
    # each loads what the other saved
    _keys_to_ignore_on_load_missing = _SAVED_BUFFERS  # type: ignore[assignment]  # `None` upstream
    _keys_to_ignore_on_load_unexpected = [r"relative_position_index"]  # type: ignore[assignment]

    def __init__(self, config: SwinHighwayConfig):
        super().__init__(config)
        for stage in self.swin.encoder.layers:
            stage.__class__ = SwinHighwayStage  # with the weights that it has

    def stem(self, state: State, interpolate_pos_encoding: bool = False) -> State:
        pixels = state["pixel_values"].to(self.swin.embeddings.patch_embeddings.projection.weight.dtype)
        hidden, grid = self.swin.embeddings(pixels, interpolate_pos_encoding=interpolate_pos_encoding)
        return State({"hidden": hidden}, grid)

    def blocks(self) -> list[Block]:
        runs: list[Block] = []
        before = None
        for stage in self.swin.encoder.layers:
            for index in range(len(stage.blocks)):
                runs.append(partial(_run_block, stage, index, before))
                before = None
            before = stage
        return runs

    def block_lists(self) -> list[nn.ModuleList]:
        return [stage.blocks for stage in self.swin.encoder.layers]

    def tokens(self, state: State) -> Tokens:
        return Tokens(state["hidden"], grid_of(state), state["hidden"][:, :0])

    def final(self, state: State) -> Tensor:
        hidden = self.swin.layernorm(state["hidden"])
        return self.classifier(self.swin.pooler(hidden.transpose(1, 2)).flatten(1))

    def head_shape(self, after: int) -> HeadShape:
        config = self.config
        stage = config.stage_of(after)
        width = config.embed_dim * 2**stage
        return HeadShape(
            width=width,
            num_prefix=0,
            num_labels=config.num_labels,
            num_attention_heads=config.num_heads[stage],
            intermediate_size=int(width * config.mlp_ratio),
            layer_norm_eps=config.layer_norm_eps,
            hidden_act=config.hidden_act,
            dropout=config.hidden_dropout_prob,
            pool=config.pool,
        )

    def recorded_modules(self, name: str) -> list[nn.Module]:
        stages = self.swin.encoder.layers
        if name == "hidden_states":
            merges = [stage.downsample for stage in stages[:-1]]
            return [self.swin.embeddings, *merges, stages[-1].blocks[-1]]
        attentions = [stage.blocks[-1].attention for stage in stages if not is_replaced(stage.blocks[-1])]
        # transformers 4 gives the weights only on request; its dropout sees them in any case
        return [attention.self.dropout if hasattr(attention, "self") else attention for attention in attentions]


SwinHighwayForImageClassification = SwinHighway
"""The name that transformers gives such a class: the same one."""
