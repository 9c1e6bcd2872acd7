from .mutation import Mutation

MUTATIONS = [
    Mutation(
        "rms_norm",
        "rstd of the wrong row",
        "tl.load(rstd_ptr + first + row, mask=live",
        "tl.load(rstd_ptr + first + 0 * row, mask=live",
        "test_rms_norm_bwd",
    ),
    Mutation(
        "rms_norm",
        "rows beyond the last not masked",
        "live = first + row < rows\n",
        "live = first + row < rows + ROWS\n",
        "test_rms_norm",
    ),
    Mutation(
        "rms_norm",
        "columns beyond the last not masked",
        "(columns < DIM)",
        "(columns < CHUNKS * BLOCK)",
        "test_rms_norm",
    ),
    Mutation(
        "rms_norm",
        "mean over the padded row",
        "tl.sum(squares, 1) / DIM",
        "tl.sum(squares, 1) / (CHUNKS * BLOCK)",
        "test_rms_norm",
    ),
    Mutation("rms_norm", "no eps", "/ DIM + eps", "/ DIM", "test_rms_norm"),
    Mutation(
        "rms_norm",
        "norm of the sum before it is rounded",
        "            x = total.to(tl.float32)\n",
        "",
        "test_add_rms_norm",
    ),
    Mutation(
        "rms_norm",
        "the weight of the first chunk for all",
        "g = dy * weights[c]",
        "g = dy * weights[0]",
        "test_rms_norm_bwd",
    ),
    Mutation(
        "rms_norm",
        "dweight of a program's last tile alone",
        "(dweights[c] + dy * x_hat,)",
        "(dy * x_hat,)",
        "test_rms_norm_bwd",
    ),
    Mutation(
        "rms_norm",
        "all programs sum into one row",
        "dweight_ptr + tl.program_id(0) * DIM",
        "dweight_ptr + 0 * DIM",
        "test_rms_norm_bwd",
    ),
    Mutation(
        "rms_norm",
        "the residual's own gradient dropped",
        "dx += _load(dtotal_ptr",
        "_load(dtotal_ptr",
        "test_add_rms_norm_bwd",
    ),
]  # fmt: skip
