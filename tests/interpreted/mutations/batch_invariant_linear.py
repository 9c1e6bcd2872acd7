from .mutation import Mutation

MUTATIONS = [
    Mutation(
        "batch_invariant_linear",
        "another number of elements a step for few rows",
        "**tile,",
        '**tile | ({"BLOCK_K": 32} if rows < 64 else {}),',
        "test_a_rows_bits_are_its_own",
    ),
    Mutation(
        "batch_invariant_linear",
        "elements beyond the last not masked",
        "< DEPTH\n",
        "< DEPTH + BLOCK_K\n",
        "test_accuracy",
    ),
    Mutation(
        "batch_invariant_linear",
        "rows beyond the last not masked",
        "live = first_row + row < rows\n",
        "live = first_row + row < rows + BLOCK_M\n",
        "test_accuracy",
    ),
    Mutation(
        "batch_invariant_linear",
        "columns beyond the last not masked",
        "live & (column < COLUMNS)[None, :]",
        "live & (column < COLUMNS + BLOCK_N)[None, :]",
        "test_accuracy",
    ),
    Mutation(
        "batch_invariant_linear",
        "the last group of row tiles taken for a whole one",
        "group = tl.minimum(tl.cdiv(rows, BLOCK_M) - first_m, GROUP)",
        "group = GROUP",
        "test_accuracy",
    ),
    Mutation(
        "batch_invariant_linear",
        "the residual of the first tile's rows",
        "residual_ptr + first_row * stride_rm",
        "residual_ptr + 0 * stride_rm",
        "test_accuracy",
    ),
    Mutation(
        "batch_invariant_linear",
        "far rows in 32 bits",
        ".to(tl.int64) * BLOCK_M",
        " * BLOCK_M",
        "test_rows_more_than_two_to_the_31_elements_apart",
    ),
]  # fmt: skip
