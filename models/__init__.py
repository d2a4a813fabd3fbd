"""The zoo: every norm, activation, FFN and GLU variant in plain PyTorch, and its ONNX exports."""
