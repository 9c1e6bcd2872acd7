"""Kernels broken on purpose. Each must be caught by the named test, or that test is worth nothing.

`python tests/interpreted/mutations.py` (with TRITON_INTERPRET=1) breaks them one by one and prints,
as JSON, which were caught; tests/test_triton_interpreter.py runs it.
"""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).parent
KERNELS = HERE.parent.parent / "neobert_kernels" / "triton"


class Mutation(NamedTuple):
    op: str  # the file of the kernel, and check_<op>.py
    what: str
    old: str  # replaced wherever it stands in the file
    new: str
    caught_by: str
    file: str = ""  # where it stands, if in a module that the kernel's imports from


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
    Mutation("swiglu", "halves swapped", "gate_ptrs + WIDTH", "gate_ptrs", "test_swiglu"),
    Mutation(
        "swiglu", "wrong sign in dgate", "(1 + gate * (1 -", "(1 - gate * (1 -", "test_swiglu"
    ),
    Mutation(
        "swiglu",
        "exponential that overflows",
        "gate * tl.sigmoid(gate) * up",
        "gate * tl.exp(gate) / (1 + tl.exp(gate)) * up",
        "test_swiglu",
    ),
    Mutation(
        "swiglu",
        "the saved tensor overwritten",
        "dgate_up = torch.empty_like(gate_up)",
        "dgate_up = gate_up",
        "test_swiglu",
    ),
    Mutation(
        "swiglu",
        "columns beyond the last not masked",
        " & (column < WIDTH)",
        " & (column >= 0)",
        "test_swiglu",
    ),
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
    Mutation(
        "cross_entropy",
        "last chunk dropped",
        "range(0, tokens, max(chunk, 1))",
        "range(0, tokens - chunk, max(chunk, 1))",
        "test_loss_and_gradients",
    ),
    Mutation(
        "cross_entropy",
        "dweight of the last chunk alone",
        "logits, x, count, dweight, start, size, FIRST=start == 0",
        "logits, x, count, dweight, start, size, FIRST=True",
        "test_loss_and_gradients",
    ),
    Mutation(
        "cross_entropy",
        "a part of the vocabulary dropped from dhidden",
        "tl.static_range(SPLITS)",
        "tl.static_range(SPLITS - 1)",
        "test_loss_and_gradients",
    ),
    Mutation(
        "cross_entropy",
        "padding counted in the softmax",
        'rounded.to(tl.float32), float("-inf"))',
        "rounded.to(tl.float32), 0.0)",
        "test_loss_and_gradients",
    ),
    Mutation(
        "cross_entropy",
        "gradient in the padding",
        "gradient = tl.where(column < VOCAB, gradient, 0.0)",
        "gradient = gradient",
        "test_loss_and_gradients",
    ),
    Mutation(
        "cross_entropy",
        "rows that are not there counted in dweight",
        "PADDED, DIM, live, live,",
        "PADDED, DIM, size, size,",
        "test_loss_and_gradients",
    ),
    Mutation(
        "cross_entropy",
        "mean over the chunk",
        "total /= tl.maximum(count, 1)",
        "total /= tl.maximum(size, 1)",
        "test_loss_and_gradients",
    ),
    Mutation(
        "cross_entropy",
        "one-hot of the neighbour",
        "tl.where(column == label[:, None]",
        "tl.where(column == label[:, None] + 1",
        "test_loss_and_gradients",
    ),
    Mutation(
        "cross_entropy",
        "log-sum-exp of logits before rounding",
        "rounded.to(tl.float32), float(",
        "logits, float(",
        "test_confident_predictions_have_tiny_gradients",
    ),
    Mutation(
        "cross_entropy",
        "a tile of forbidden words is NaN",
        "tl.maximum(tl.max(logits, 1), -3.0e38)",
        "tl.max(logits, 1)",
        "test_a_forbidden_word",
    ),
    Mutation(
        "cross_entropy",
        "label outside the vocabulary unseen",
        'tl.where(is_token, total, float("nan"))',
        "total",
        "test_a_label_outside_the_vocabulary_makes_the_loss_nan",
    ),
    Mutation(
        "attention",
        "keys beyond the end of the sequence",
        'tl.where(live[None, :], scores, float("-inf"))',
        "scores",
        "test_accuracy",
    ),
    Mutation(
        "attention",
        "key range one tile too long",
        "range(0, whole, BLOCK_N)",
        "range(0, whole + BLOCK_N, BLOCK_N)",
        "test_accuracy",
    ),
    Mutation(
        "attention",
        "last keys dropped",
        "if whole < length:",
        "if length < whole:",
        "test_accuracy",
    ),
    Mutation(
        "attention",
        "output not rescaled to a new maximum",
        "output * rescale[:, None]",
        "output",
        "test_accuracy",
    ),
    Mutation(
        "attention",
        "sum of weights not rescaled to a new maximum",
        "total * rescale",
        "total",
        "test_accuracy",
    ),
    Mutation(
        "attention",
        "keys of another sequence",
        "k_ptr += start * stride_kt",
        "k_ptr += 0 * stride_kt",
        "test_accuracy",
    ),
    Mutation(
        "attention",
        "last queries of a short sequence dropped",
        "range(0, length, BLOCK_M)",
        "range(0, length - BLOCK_M, BLOCK_M)",
        "test_accuracy",
    ),
    Mutation(
        "attention",
        "stores across the end of the sequence",
        "output, mask=(first + row < length)[:, None]",
        "output, mask=(first + row <= length)[:, None]",
        "test_accuracy",
    ),
    Mutation(
        "attention",
        "values with the keys' strides",
        "head * stride_vh",
        "head * stride_kh",
        "test_strided_views_are_read_as_they_lie",
    ),
    Mutation(
        "attention", "log-sum-exp in base 2", "* 0.6931471805599453", "", "test_accuracy"
    ),
    Mutation(
        "attention",
        "a token of no sequence not filled",
        "fill(out_ptr, STRIDE_OT, first, tokens,",
        "fill(out_ptr, STRIDE_OT, first, tokens - 1,",
        "test_accuracy",
    ),
    Mutation(
        "attention",
        "nothing said of a sequence longer than max_seqlen",
        "elif length > max_seqlen:",
        "elif length < 0:",
        "test_a_sequence_longer_than_max_seqlen_is_nan",
    ),
    Mutation(
        "attention",
        "a scale of zero",
        "max(abs(scale) * math.log2(math.e), 2.0**-126)",
        "abs(scale) * math.log2(math.e)",
        "test_scale",
    ),
    Mutation("attention", "a negative scale", "scores = -scores", "scores = scores", "test_scale"),
    Mutation(
        "attention",
        "far sequences in 32 bits",
        "start = start.to(tl.int64)",
        "start = start",
        "test_rows_more_than_two_to_the_31_elements_apart",
    ),
    Mutation(
        "attention",
        "far rows in 32 bits",
        "ptr += tl.cast(first, tl.int64) * stride",
        "ptr += first * stride",
        "test_rows_more_than_two_to_the_31_elements_apart",
        file="_varlen",
    ),
    Mutation(
        "attention",
        "last queries of a long sequence dropped",
        "tile * ROWS < length",
        "tile * ROWS + ROWS <= length",
        "test_accuracy",
        file="_varlen",
    ),
    Mutation(
        "attention",
        "shortest first",
        "others > length",
        "others < length",
        "test_the_list_has_every_tile_the_longest_first",
        file="_varlen",
    ),
    Mutation(
        "attention",
        "sequences of one length in one place",
        "other < sequence",
        "other < 0",
        "test_the_list_has_every_tile_the_longest_first",
        file="_varlen",
    ),
    Mutation(
        "attention",
        "short sequences counted among the tiles",
        "(others > SHORT) & (others <= max_seqlen)",
        "others <= max_seqlen",
        "test_the_list_has_every_tile_the_longest_first",
        file="_varlen",
    ),
    Mutation(
        "attention",
        "room for too few tiles",
        "(tokens + most * (rows - 1)) // rows",
        "tokens // rows",
        "test_the_list_has_every_tile_the_longest_first",
        file="_varlen",
    ),
    Mutation(
        "attention",
        "a list longer than its room",
        " & (at < capacity)",
        "",
        "test_bad_offsets_leave_no_tensor",
        file="_varlen",
    ),
    Mutation(
        "attention",
        "offsets beyond the tokens",
        "tl.minimum(end, tokens)",
        "end",
        "test_bad_offsets_leave_no_tensor",
        file="_varlen",
    ),
    Mutation(
        "attention_bwd",
        "delta left out",
        "(dweights - delta[None, :])",
        "dweights",
        "test_accuracy",
        file="_gradients",
    ),
    Mutation(
        "attention_bwd",
        "weights of keys that are not there, for a tile of keys",
        "tl.where(live[:, None], weights, 0.0)",
        "weights",
        "test_scores_far_from_zero",
        file="_gradients",
    ),
    Mutation(
        "attention_bwd",
        "weights of keys that are not there, for a tile of queries",
        "tl.where(there[None, :], weights, 0.0)",
        "weights",
        "test_scores_far_from_zero",
        file="_gradients",
    ),
    Mutation(
        "attention_bwd",
        "log-sum-exp in the wrong base",
        "lse * 1.4426950408889634",
        "lse",
        "test_accuracy",
        file="_gradients",
    ),
    Mutation(
        "attention_bwd",
        "dk not scaled",
        "dk * scale,",
        "dk,",
        "test_accuracy",
        file="_gradients",
    ),
    Mutation(
        "attention_bwd",
        "dk and dv exchanged",
        "dqkv_ptr + 2 * HEAD_DIM",
        "dqkv_ptr + HEAD_DIM",
        "test_accuracy",
        file="_gradients",
    ),
    Mutation(
        "attention_bwd",
        "a query or key of the next sequence",
        "there = at + column < length",
        "there = at + column <= length",
        "test_accuracy",
        file="_gradients",
    ),
    Mutation(
        "attention_bwd",
        "last step dropped",
        "range(0, length, STEP)",
        "range(0, length - STEP, STEP)",
        "test_accuracy",
        file="_gradients",
    ),
    Mutation(
        "attention_bwd",
        "stores across the end of the sequence",
        "mask=(first + row < length)[:, None])",
        "mask=(first + row <= length)[:, None])",
        "test_accuracy",
        file="_gradients",
    ),
    Mutation(
        "attention_bwd",
        "all atomics to the first queries",
        "            sums_ptrs += STEP * STRIDE\n",
        "",
        "test_accuracy",
        file="_gradients",
    ),
    Mutation(
        "attention_bwd",
        "sums that begin with what was there",
        "zeros, mask=live[:, None]",
        "zeros, mask=(row < 0)[:, None]",
        "test_accuracy",
    ),
    Mutation("attention_bwd", "dq not scaled", "dq * scale,", "dq,", "test_accuracy"),
    Mutation(
        "attention_bwd",
        "delta of the first head",
        "delta_ptr + head * tokens + start,",
        "delta_ptr + start,",
        "test_accuracy",
    ),
    Mutation(
        "attention_bwd",
        "dv of tokens of no sequence not filled",
        "tl.static_range(3)",
        "tl.static_range(2)",
        "test_accuracy",
    ),
    Mutation(
        "attention_bwd",
        "queries of another sequence",
        "q_ptr + start * stride_qt",
        "q_ptr + 0 * stride_qt",
        "test_accuracy",
    ),
    Mutation(
        "attention_bwd",
        "atomics where one order is asked for",
        "not torch.are_deterministic_algorithms_enabled()",
        "True",
        "test_one_order_needs_no_atomics",
    ),
    Mutation(
        "attention_bwd",
        "far sequences in 32 bits",
        "start = start.to(tl.int64)",
        "start = start",
        "test_rows_more_than_two_to_the_31_elements_apart",
    ),
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


def caught(mutation: Mutation, folder: Path) -> str:
    """The first failure of `caught_by` with the broken kernel, or "" if it passed."""
    name = f"{mutation.file or mutation.op}.py"
    source = (KERNELS / name).read_text()
    assert mutation.old in source, f"{name} no longer has {mutation.old!r}"
    path = folder / name
    path.write_text(source.replace(mutation.old, mutation.new))
    check = HERE / f"check_{mutation.op}.py"
    output = io.StringIO()
    options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", f"--kernels={path}"]
    with contextlib.redirect_stdout(output):
        code = pytest.main([f"{check}::{mutation.caught_by}", *options])
    failed = [line for line in output.getvalue().splitlines() if line.startswith("FAILED")]
    if code == pytest.ExitCode.OK:
        return ""
    assert failed, output.getvalue()
    return failed[0]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = {}
        for mutation in MUTATIONS:
            results[f"{mutation.op}: {mutation.what}"] = caught(mutation, Path(folder))
    json.dump(results, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
