"""On what, in which dtype and how much at once a model computes."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Tokens in a batch by default. On a CPU, speed is level from 512 to 4096 tokens, but from 3641 on
# a float32 qkv projection is more than the 32 MiB above which glibc maps every tensor anew: 4096
# tokens took 3 % longer than 2048 for it. Longer texts are batches of their own. On a GPU, chosen
# from the model's arithmetic and not measured: enough to hide the kernel launches of 28 layers, at
# under 1 GiB of activations in bfloat16.
MAX_TOKENS = {"cpu": 2048, "cuda": 32768}


def device_and_dtype(
    device: torch.device | str | None, dtype: torch.dtype | str | None
) -> tuple[torch.device, torch.dtype]:
    """What is asked for; by default the GPU in bfloat16 if there is one, the CPU in float32.

    Raises ValueError for a device that is not here and for a dtype that is not served.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if str(device).split(":")[0] not in MAX_TOKENS:
        raise ValueError(f"device must be one of {', '.join(MAX_TOKENS)}, got {device}")
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device}, but torch {torch.__version__} finds no GPU")
    if dtype is None:
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        dtype = DTYPES[dtype]
    return device, dtype
