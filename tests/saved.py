"""What autograd keeps of a forward pass for the backward."""

from collections.abc import Callable

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], Tensor], without: tuple[Tensor, ...] = ()) -> int:
    """Of the storages of all tensors that it saves, each once, leaves and `without` left out: what
    is there anyway, as parameters and tables are."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        if not (tensor.is_leaf and tensor.requires_grad):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes(), tensor  # held, lest it be taken anew
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    known = {tensor.untyped_storage().data_ptr() for tensor in without}
    return sum(nbytes for pointer, (nbytes, _) in storages.items() if pointer not in known)
