"""`ExportedHighway`: an exported highway in any runtime, with the call and the answers of the PyTorch model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from importlib import import_module
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from ..configuration import HighwayConfig
from ..engine import Answers, run_all, run_early
from ..evaluation.costs import Costs, Exported
from ..files import add_files
from ..hub.loading import answer_depths
from ..losses import check_labels, task_loss
from ..modeling_highway import HighwayOutput, PolicyHolder, all_exits_output
from ..policies import ExitPolicy
from ..segments import Segment, State
from ..serving.device.session import run_segment
from .manifest import MANIFEST, Manifest
from .sessions import Session, open_sessions
from .single_file import check_file_policy, run_file

_Opened = TypeVar("_Opened", bound="ExportedHighway")


class ExportedHighway(PolicyHolder, nn.Module):
    """A folder that `export_onnx` wrote, of any layout, in a runtime.

    It is called and calibrated as the PyTorch model is, and takes its policy from `config.json` as that does. A single
    file keeps its kind of policy and its exits, and takes new numbers, if they are inputs; the other layouts take any.
    Of the layout `segments` each session is a segment, so that the same loop drops exited samples; a head is in one
    file with the blocks before it and is run with them, whether its exit is evaluated or not.

    Args:
        folder (`Path`): What was exported.
        config (`HighwayConfig`): Of the highway.
        manifest (`Manifest`): What `export_onnx` says of its files.
        sessions (`list[Session]`): One, or one per segment.
        exported (`Exported`): What evaluation asks of it.
    """

    main_input_name = "pixel_values"
    # where tensors are taken from and given back
    device = torch.device("cpu")
    # of the pixels that the files take, whatever their precision; those of another are converted
    dtype = torch.float32

    def __init__(
        self, folder: Path, config: HighwayConfig, manifest: Manifest, sessions: list[Session], exported: Exported
    ):
        super().__init__()
        self.folder, self.config, self.manifest = folder, config, manifest
        self.sessions, self.exported = sessions, exported
        self.layout, self.depths = manifest.layout, manifest.depths
        self._checked_policy(config.exit_policy)  # refused when the files are opened, not at the first batch
        self.eval()

    @classmethod
    def _opened(
        cls: type[_Opened], folder: str | Path, runtime: str, threads: int | None, open_file: Callable[..., Session]
    ) -> _Opened:
        """Open a folder whose files `open_file(file, threads)` opens."""
        folder = Path(folder)
        manifest = Manifest.load(folder)
        config = _config_of(folder, manifest)
        threads = torch.get_num_threads() if threads is None else threads
        sessions = open_sessions(folder, manifest, lambda file: open_file(file, threads))
        heads = manifest.macs["heads"]
        held = {*manifest.exits, len(heads) - 1}
        exported = Exported(
            layout=manifest.layout,
            precision=manifest.precision,
            # heads that are in the files are run whether the policy evaluates their exits or not
            macs=Costs(
                manifest.macs["backbone_costs"],
                [macs if index in held else 0.0 for index, macs in enumerate(heads)],
                fused=True,
            ),
            digest=manifest.digest,
            file_bytes=sum((folder / name).stat().st_size for name in manifest.files),
            runtime=f"{runtime} {import_module(runtime).__version__}",
            threads=threads,
        )
        return cls(folder, config, manifest, sessions, exported)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the exported files again, beside a `config.json` with the policy that is now in force.

        `infer.py` is left out: it decides by the thresholds inside its file.
        """
        with add_files(folder) as new:
            for name in (*self.manifest.files, MANIFEST):
                shutil.copyfile(self.folder / name, new / name)
            self.config.save_pretrained(new)

    def can_generate(self) -> bool:
        """What a pipeline asks."""
        return False

    def _checked_policy(self, policy: Any) -> ExitPolicy:
        built = super()._checked_policy(policy)
        if self.layout == "single":
            runtime = self.exported.runtime.split()[0]
            check_file_policy(built, self.config.exit_ensemble, self.manifest, runtime, self.folder)
        return built

    def segments(self) -> list[Segment]:
        """The highway as a list of segments.

        Of the layout `segments`, each is a session. Of `all_exits`, the first runs everything, and each
        only gives its logits: the same answers, nothing saved.

        Raises:
            ValueError: Of a single file, which decides inside.
        """
        if self.layout == "single":
            raise ValueError(
                "layout 'single' has no segments: it decides inside its file, and does not say what every exit "
                f"answers; export with layout='segments' for that ({self.folder})"
            )
        if self.layout == "segments":
            return [
                Segment(depth, (partial(_advance, session),), itemgetter("logits"))
                for depth, session in zip(self.depths, self.sessions, strict=True)
            ]
        run = (partial(_run_all_exits, self.sessions[0]),)
        return [
            Segment(depth, () if index else run, itemgetter(str(index))) for index, depth in enumerate(self.depths)
        ]

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        early_exit: bool | None = None,
        min_depth: int | None = None,
        max_depth: int | None = None,
        return_dict: bool | None = None,
    ) -> HighwayOutput | tuple:
        """Answer images, as the PyTorch model does in `eval()` mode; there are no `exit_features`.

        Args:
            pixel_values (`Tensor`): `[B, num_channels, H, W]`, from the image processor; any floating dtype.
            labels (`Tensor`, *optional*): `[B]`, for a loss.
            early_exit (`bool`, *optional*, defaults to `True`): Otherwise all exits run; not of a single file.
            min_depth (`int`, *optional*), max_depth (`int`, *optional*):
                See the PyTorch model; not of a single file.
            return_dict (`bool`, *optional*): `False` gives a tuple.

        Raises:
            ValueError: No, an empty or a misshapen batch; a label out of range; something that the layout cannot do.
        """
        pixels = self._checked_batch(pixel_values, labels).detach().to(self.device, self.dtype)
        state, early = State({"pixel_values": pixels.contiguous()}), early_exit is None or early_exit
        bounded = (min_depth, max_depth) != (None, None)
        if self.layout == "single" and (bounded or not early):
            raise ValueError("a single file always exits early, at any depth; export with layout='segments'")
        if bounded and not early:
            raise ValueError("min_depth and max_depth bound early exit; they mean nothing when all exits run")
        labels = None if labels is None else labels.to(self.device)
        if early:
            if self.layout == "single":
                found = run_file(self.sessions[0], state["pixel_values"].numpy(), self.exit_policy, len(self.depths))
                answers = Answers(*map(torch.from_numpy, found))
            else:
                segments = self.segments()
                answers = run_early(segments, state, self.answering_policy, min_depth=min_depth, max_depth=max_depth)
            loss = None if labels is None else task_loss(answers.logits, labels, self.config.problem_type)
            output = HighwayOutput(loss=loss, **vars(answers))
        else:
            output = all_exits_output(run_all(self.segments(), state), self.depths[-1], labels, self.config)
        keep_dict = self.config.return_dict if return_dict is None else return_dict
        return output if keep_dict else output.to_tuple()

    def _checked_batch(self, pixel_values: Tensor | None, labels: Tensor | None) -> Tensor:
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        wanted = self.sessions[0].get_inputs()[0].shape[1:]
        if pixel_values.dim() != 4 or list(pixel_values.shape[1:]) != wanted or not len(pixel_values):
            raise ValueError(
                f"pixel_values: shape {tuple(pixel_values.shape)} must be (batch, {', '.join(map(str, wanted))}), "
                "with at least one image"
            )
        if labels is not None:
            check_labels(labels, self.config.num_labels)
        return pixel_values


def _config_of(folder: Path, manifest: Manifest) -> HighwayConfig:
    """The config beside a manifest; it must be of the highway that was exported."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not isinstance(config, HighwayConfig):
        raise ValueError(f"{folder / 'config.json'}: model type {config.model_type!r} is no highway")
    depths = answer_depths(config)
    if depths != manifest.depths:
        raise ValueError(
            f"{folder / 'config.json'} is of a highway that answers at depths {depths}, the files beside it at "
            f"{manifest.depths}; export it again"
        )
    return config


def _advance(session: Any, state: State) -> State:
    """The state after a segment, with the logits of its exit."""
    feeds = {name: tensor.contiguous().numpy() for name, tensor in state.tensors.items()}
    return State({name: torch.from_numpy(array) for name, array in run_segment(session, feeds).items()})


def _run_all_exits(session: Any, state: State) -> State:
    """The logits of each exit, by its index."""
    (stacked,) = session.run(["exit_logits"], {"pixel_values": state["pixel_values"].numpy()})
    return State({str(index): logits for index, logits in enumerate(torch.from_numpy(stacked))})
