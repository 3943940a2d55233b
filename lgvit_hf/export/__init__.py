"""A highway as ONNX: one file that really skips, one file per segment, or every exit's logits."""
