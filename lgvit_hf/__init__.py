"""Early exits for Vision Transformers, as an extension of Hugging Face transformers.

Importing this package registers the model types `vit_highway`, `deit_highway`, `swin_highway` and `avit` with
transformers' Auto classes and does nothing else; every public name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from . import auto

if TYPE_CHECKING:
    from .configuration import DeiTHighwayConfig, Exit, SwinHighwayConfig, ViTHighwayConfig
    from .configuration_avit import AViTConfig
    from .configuration_wrapper import HighwayWrapperConfig
    from .data import load_images, load_unlabelled
    from .engine import run_all, run_early
    from .evaluation.benchmark import benchmark
    from .evaluation.calibration import Calibration, calibrate
    from .evaluation.latency import CostTable
    from .evaluation.metric import HighwayMetric
    from .evaluation.report import evaluate
    from .evaluation.table import ExitTable, collect
    from .export.onnx_export import export_onnx
    from .export.runtime import ORTHighway
    from .growth import grow
    from .halting import token_macs
    from .heads import HEADS, register_head
    from .modeling_avit import AViT, AViTForImageClassification, AViTOutput
    from .modeling_deit import DeiTHighway, DeiTHighwayForImageClassification
    from .modeling_highway import HighwayOutput
    from .modeling_swin import SwinHighway, SwinHighwayForImageClassification
    from .modeling_vit import ViTHighway, ViTHighwayForImageClassification
    from .policies import POLICIES, ExitPolicy, build_policy, register_policy
    from .processing import ProcessedImages, make_processor
    from .recipe import train_recipe
    from .segments import Segment, State, Tokens
    from .serving.device.remote import RemoteHighway
    from .serving.opening import open_part
    from .serving.predictor import Predictor
    from .training.arguments import HighwayTrainingArguments
    from .training.avit import AViTTrainer
    from .training.trainer import DistillationTrainer, HighwayTrainer
    from .wrapper import HighwayWrapper

__version__ = "0.1.0"

_HOMES = {
    "configuration": ("Exit", "ViTHighwayConfig", "DeiTHighwayConfig", "SwinHighwayConfig"),
    "configuration_avit": ("AViTConfig",),
    "configuration_wrapper": ("HighwayWrapperConfig",),
    "data": ("load_images", "load_unlabelled"),
    "engine": ("run_all", "run_early"),
    "evaluation.benchmark": ("benchmark",),
    "evaluation.calibration": ("Calibration", "calibrate"),
    "evaluation.latency": ("CostTable",),
    "evaluation.metric": ("HighwayMetric",),
    "evaluation.report": ("evaluate",),
    "evaluation.table": ("ExitTable", "collect"),
    "export.onnx_export": ("export_onnx",),
    "export.runtime": ("ORTHighway",),
    "growth": ("grow",),
    "halting": ("token_macs",),
    "heads": ("HEADS", "register_head"),
    "modeling_avit": ("AViT", "AViTForImageClassification", "AViTOutput"),
    "modeling_vit": ("ViTHighway", "ViTHighwayForImageClassification"),
    "modeling_deit": ("DeiTHighway", "DeiTHighwayForImageClassification"),
    "modeling_swin": ("SwinHighway", "SwinHighwayForImageClassification"),
    "modeling_highway": ("HighwayOutput",),
    "policies": ("POLICIES", "ExitPolicy", "build_policy", "register_policy"),
    "processing": ("ProcessedImages", "make_processor"),
    "segments": ("Segment", "State", "Tokens"),
    "recipe": ("train_recipe",),
    "serving.device.remote": ("RemoteHighway",),
    "serving.opening": ("open_part",),
    "serving.predictor": ("Predictor",),
    "training.arguments": ("HighwayTrainingArguments",),
    "training.avit": ("AViTTrainer",),
    "training.trainer": ("HighwayTrainer", "DistillationTrainer"),
    "wrapper": ("HighwayWrapper",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = list(_HOME_OF)


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


auto.register()
