"""The config of Swin with exits, whose blocks stand in stages."""

from __future__ import annotations

from typing import Any

from transformers import SwinConfig

from .configuration import HighwayConfig
from .ensemble import Ensemble  # noqa: F401  (see CONTRIBUTING.md, rule 5)
from .exit_head import ExitHead  # noqa: F401
from .exit_policy import Memory  # noqa: F401
from .exit_settings import Exit  # noqa: F401
from .gate import GatePolicy  # noqa: F401
from .heads import lgvit_heads
from .policies import ExitPolicy  # noqa: F401
from .safe_config import SafeConfig  # noqa: F401
from .segments import height_width


class SwinHighwayConfig(HighwayConfig, SwinConfig):
    """A `SwinConfig` with exits; see `HighwayConfig` for the exit settings. An exit stands before the patch merging.

    Example:

        >>> SwinHighwayConfig(depths=[2, 2, 18, 2]).exit_positions
        [4, 7, 10, 13, 16, 19, 22, 23]
    """

    model_type = "swin_highway"
    pools = ("mean",)
    takes_performer = False

    @property
    def num_blocks(self) -> int:
        """Blocks of all stages."""
        return sum(self.depths)

    def check_sizes(self) -> None:
        """Any size of image or patch, as upstream: what does not divide is padded."""

    def stage_of(self, after: int) -> int:
        """Stage, from 0, that block number `after` (from 1) belongs to."""
        for stage in range(len(self.depths)):
            if after <= sum(self.depths[: stage + 1]):
                return stage
        raise ValueError(f"block {after} is beyond the {self.num_blocks} blocks of {list(self.depths)}")

    def validate_linear_blocks(self) -> None:
        """As of the base; both blocks must be in one stage."""
        super().validate_linear_blocks()
        first, last = map(self.stage_of, self.linear_blocks or (1, 1))
        if first != last:
            raise ValueError(
                f"linear_blocks: {self.linear_blocks} lie in stages {first + 1} and {last + 1} (depths "
                f"{list(self.depths)}), between which grid and width change; take blocks of one stage"
            )

    def cut_to(self, num_blocks: int) -> dict[str, Any]:
        """The settings of the same backbone with only its first `num_blocks` blocks."""
        stage = self.stage_of(num_blocks)
        depths = [*self.depths[:stage], num_blocks - sum(self.depths[:stage])]
        return {
            "depths": depths,
            "num_heads": list(self.num_heads[: stage + 1]),
            # they follow from the depths
            **dict.fromkeys(("out_features", "out_indices", "stage_names", "num_layers", "hidden_size")),
        }

    def patch_grid(self, after: int, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches after block `after` (from 1) for images of `height` x `width` pixels."""
        rows, columns = height_width(self.patch_size)
        # images are padded to whole patches, and a grid to whole groups of patches at each merging
        shrink = 2 ** self.stage_of(after)
        return -(-height // (rows * shrink)), -(-width // (columns * shrink))

    def _preset_positions(self) -> list[int]:
        # published for Swin-B; the stages of other depths lie elsewhere
        return [4, 7, 10, 13, 16, 19, 22, 23] if list(self.depths) == [2, 2, 18, 2] else super()._preset_positions()

    def _preset_types(self, num_exits: int) -> list[str]:
        return lgvit_heads(num_exits, attention=("attention_r1", "attention_r2"))
