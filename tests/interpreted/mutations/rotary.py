from .mutation import Mutation

MUTATIONS = [
    Mutation("rotary", "wrong sign in the backward", "sin = -sin", "sin = sin", "test_rotary"),
    Mutation(
        "rotary",
        "halves of a head instead of adjacent pairs",
        "tl.split(tl.reshape(x, [BLOCK_T, BLOCK_S, HALF, 2]))",
        "tl.split(tl.permute(tl.reshape(x, [BLOCK_T, BLOCK_S, 2, HALF]), (0, 1, 3, 2)))",
        "test_rotary",
    ),
    Mutation(
        "rotary",
        "position of the token before",
        "tl.load(positions_ptr + token,",
        "tl.load(positions_ptr + tl.maximum(token - 1, 0),",
        "test_rotary",
    ),
    Mutation(
        "rotary",
        "k and v rotated instead of q and k",
        "slot % GROUP * stride_",
        "(slot % GROUP + GROUP - 1) * stride_",
        "test_rotary_qkv_",
    ),
    Mutation(
        "rotary",
        "tokens beyond the last not masked",
        "live = token < tokens",
        "live = token < tokens + BLOCK_T",
        "test_rotary",
    ),
]  # fmt: skip
