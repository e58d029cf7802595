"""The engines that run a bundle, by the names that `Grounder.open` and the command line know them by."""

ENGINES = ("native", "onnx", "onnx-cuda", "tensorrt")
