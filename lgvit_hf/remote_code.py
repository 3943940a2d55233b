"""The code that goes with a checkpoint: `trust_remote_code=True` opens it where this package is not installed."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

from .files import add_files

# what `Trainer` calls the folders that it resumes from
TRAINING_CHECKPOINT = re.compile(r"checkpoint-\d+")


def code_goes_with(model_class: type, folder: str | Path) -> bool:
    """Whether the code of a model belongs into a folder.

    Not into those of a training run that is resumed from them, and not where the class is somebody's own:
    `register_for_auto_class` is for that.

    Example:

        >>> from lgvit_hf import ViTHighway
        >>> code_goes_with(ViTHighway, "runs/stage2"), code_goes_with(ViTHighway, "runs/stage2/checkpoint-500")
        (True, False)
    """
    is_ours = model_class.__module__.rpartition(".")[0] == __package__
    return is_ours and not TRAINING_CHECKPOINT.fullmatch(Path(folder).name) and not Path(folder).is_file()


def auto_map(model_class: Any) -> dict[str, str]:
    """Which of the files that go with a model each Auto class opens, and for which class.

    Args:
        model_class (`type`): `ViTHighway` or another of our models.

    Example:

        >>> from lgvit_hf import ViTHighway
        >>> auto_map(ViTHighway)["AutoConfig"], auto_map(ViTHighway)["AutoModel"]
        ('configuration_sequence.ViTHighwayConfig', 'modeling_vit.ViTHighway')
    """
    config, model = (
        f"{each.__module__.rpartition('.')[2]}.{each.__name__}" for each in (model_class.config_class, model_class)
    )
    return {"AutoConfig": config, "AutoModel": model, "AutoModelForImageClassification": model}


def code_files(model_class: type) -> list[Path]:
    """The files of this package that a model is made of: its own, and all that it imports."""
    # not needed by whoever only answers with a model
    from transformers.dynamic_module_utils import get_relative_import_files

    own = Path(str(sys.modules[model_class.__module__].__file__))
    return sorted({own, *map(Path, get_relative_import_files(own))})


def write_code(model_class: type, folder: str | Path) -> None:
    """Copy the code of a model beside its weights, byte for byte."""
    with add_files(folder) as new:
        for file in code_files(model_class):
            shutil.copyfile(file, new / file.name)
