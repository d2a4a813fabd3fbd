"""Running artifacts: onnxruntime with the ops library; never TVM, never the compiler."""
