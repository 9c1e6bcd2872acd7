"""Training with the block's norms, rotation, SwiGLU and residual adds in the GEMMs' epilogues."""

from typing import Any

from neobert.layers import NeoBERTBlock, bare_weights
from neobert.model import NeoBERTPreTrainedModel


def fuse_epilogues(model: NeoBERTPreTrainedModel) -> None:
    """Has the model's blocks computed by `neobert_kernels.epilogue_training` from now on, with and
    without gradients. Its parameters, and so its checkpoints, stay as they are.

    For GPUs, where the ops are Triton kernels. On a CPU plain PyTorch serves them, more slowly than
    the kernels of a model that is not fused. For inference alone, `PreparedNeoBERT` folds the gains
    into the weights once instead of at each call.

    model: a NeoBERT, or one with a head. The blocks are called as before, so that checkpointing,
        FSDP and hooks on a block do what they did; the modules within a block no longer are.
    Raises ValueError for a block with a module that does more than use its weight (an adapter, a
        quantiser, a hook), and for a batch-invariant model. A module that becomes such later is
        refused when the model is called.
    """
    encoder: Any = model.base_model
    for number, block in enumerate(encoder.transformer_encoder):
        name = f"transformer_encoder.{number}"
        if not isinstance(block, NeoBERTBlock):
            raise ValueError(f"{name} must be a NeoBERTBlock, it is a {type(block).__name__}")
        bare_weights(block, name)
        if block.qkv.batch_invariant:
            raise ValueError(
                "fuse_epilogues: the model is batch-invariant, and fused kernels do not promise a"
                " sequence's bits"
            )
    encoder.fused_epilogues = True
