"""What answers images beside an export without PyTorch, and whether numpy and pillow can do what a processor does."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import BaseImageProcessor

from ..data.processing import ProcessedImages
from ..serving.device import pixels, rgb

PIXEL_TOLERANCE = 1e-5
# the folder beside infer.py with the files that it imports
PIXELS = "lgvit_pixels"
INFER = '''"""python infer.py IMAGE...: needs numpy, pillow and onnxruntime."""
import json
import pathlib
import sys

import numpy
import onnxruntime
from lgvit_pixels.pixels import pixel_settings, prepare
from lgvit_pixels.rgb import read_image

here = pathlib.Path(__file__).parent
files = ("config.json", "preprocessor_config.json", "manifest.json")
config, processor, manifest = (json.loads((here / name).read_text()) for name in files)
session = onnxruntime.InferenceSession(here / "model.onnx")
settings = pixel_settings(processor, config.get("num_channels", 3))
required = {entry.name for entry in session.get_inputs()} - {"pixel_values"}
numbers = {name: numpy.array(manifest["inputs"][name], numpy.float32) for name in required}
for file in sys.argv[1:]:
    image = prepare(read_image(file), settings)[None]
    logits, depth, _, score = session.run(None, {"pixel_values": image, **numbers})
    print(file, config["id2label"][str(logits[0].argmax())], f"after {depth[0]} blocks, score {score[0]:.3f}")
'''


def checked_pixel_settings(processor: BaseImageProcessor, num_channels: int) -> pixels.PixelSettings:
    """How numpy and pillow do what a processor does, tried on images of several shapes.

    Args:
        processor (`BaseImageProcessor`): Of the model.
        num_channels (`int`): That the model takes.

    Returns:
        What `prepare` of `serving/device/pixels.py` takes.

    Raises:
        ValueError: They cannot; says what the processor does.
    """
    random, images = np.random.default_rng(0), ProcessedImages([], processor)
    try:
        settings = pixels.pixel_settings(json.loads(processor.to_json_string()), num_channels)
        for height, width in ((37, 53), (224, 224), (300, 80), (9, 9)):
            image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
            expected, found = images.pixels(image).numpy(), pixels.prepare(image, settings)
            difference = np.abs(found - expected).max() if found.shape == expected.shape else np.inf
            if not difference <= PIXEL_TOLERANCE:
                raise ValueError(f"pixels differ by {difference:.2g}")
    except (KeyError, TypeError) as error:
        raise ValueError(str(error)) from error
    return settings


def write_infer(folder: Path, processor: BaseImageProcessor, num_channels: int) -> pixels.PixelSettings | None:
    """Write `infer.py` and the files that it imports, which prepare images by what this returns.

    `None`, and a warning, where they could not do what the processor does.
    """
    try:
        settings = checked_pixel_settings(processor, num_channels)
    except ValueError as error:
        warnings.warn(f"infer.py is left out: it cannot do what the image processor does ({error})", stacklevel=3)
        return None
    (folder / PIXELS).mkdir(exist_ok=True)
    (folder / PIXELS / "__init__.py").touch()
    for module in (pixels, rgb):
        file = Path(str(module.__file__))
        shutil.copyfile(file, folder / PIXELS / file.name)
    (folder / "infer.py").write_text(INFER, encoding="utf-8")
    return settings
