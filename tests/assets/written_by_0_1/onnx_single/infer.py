"""python infer.py IMAGE...: needs numpy, pillow and onnxruntime."""
import json
import pathlib
import sys

import onnxruntime
from lgvit_pixels.pixels import pixel_settings, prepare
from lgvit_pixels.rgb import read_image

here = pathlib.Path(__file__).parent
config, processor = (json.loads((here / name).read_text()) for name in ("config.json", "preprocessor_config.json"))
session = onnxruntime.InferenceSession(here / "model.onnx")
settings = pixel_settings(processor, config.get("num_channels", 3))
for file in sys.argv[1:]:
    image = prepare(read_image(file), settings)[None]
    logits, depth, _, score = session.run(None, {"pixel_values": image})
    print(file, config["id2label"][str(logits[0].argmax())], f"after {depth[0]} blocks, score {score[0]:.3f}")
