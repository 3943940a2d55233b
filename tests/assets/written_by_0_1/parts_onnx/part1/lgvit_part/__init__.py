"""What runs a part on a device: numpy, pillow and onnxruntime, nothing of PyTorch; copied beside every ONNX part."""
