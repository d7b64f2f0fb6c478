"""Models in the forms that others read and write: Hugging Face's, peft's, GGUF, ONNX."""

import shutil

from fledge import UserError


def save_tensors(tensors: dict, path: str, beside: str) -> None:
    """Write {name: tensor} as the .safetensors at path; whoever may read the file beside may it."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, {'format': 'pt'})
    except SafetensorError as e:  # a full disk
        raise UserError(f'cannot write {path.rpartition("/")[2]}: {e}') from None
    shutil.copymode(beside, path)  # safetensors keeps its files from everybody else
