"""Models in the forms that others read and write: Hugging Face's, GGUF, ONNX."""
