from .mutation import Mutation

MUTATIONS = [
    Mutation(
        "pooling",
        "divided by the length of the tile",
        "/ tl.maximum(end - start, 1).to(tl.float32)",
        "/ BLOCK_T",
        "test_pool",
    ),
    Mutation("pooling", "empty sequences divide by zero", "tl.maximum(end - start, 1)",
             "(end - start)", "test_pool"),
    Mutation(
        "pooling",
        "last tile of a sequence dropped",
        "range(start, end, BLOCK_T)",
        "range(start, end - 1, BLOCK_T)",
        "test_pool",
    ),
    Mutation(
        "pooling",
        "reads beyond hidden",
        "end = tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64), tokens)",
        "end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)",
        "test_offsets_beyond_the_tokens_read_nothing_there",
    ),
    Mutation(
        "pooling", "gradient to the neighbour sequence", "end <= token", "end < token", "test_pool"
    ),
    Mutation(
        "pooling",
        "bisection one step short",
        "sequences.bit_length()",
        "sequences.bit_length() - 1",
        "test_pool",
    ),
    Mutation(
        "pooling",
        "cls gradient to every token",
        "owned & (token == start)",
        "owned",
        "test_pool",
    ),
]  # fmt: skip
