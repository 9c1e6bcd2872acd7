from .mutation import Mutation

MUTATIONS = [
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
]  # fmt: skip
