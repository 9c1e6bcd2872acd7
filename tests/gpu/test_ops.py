"""Every op on the GPU: accuracy at real widths, the same bits again, graphs, compile, big rows."""

import pytest
import torch
from accuracy import assert_accurate
from cases import DIM, LENGTHS, VOCAB, WIDTH, make, run

import neobert_kernels
from neobert_kernels._library import OPS, has_kernel

pytestmark = pytest.mark.usefixtures("kernels")
NAMES = list(make(torch.float32, [2], "cpu"))
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# What serves these on a GPU is not a kernel of ours: GEMMs are the library's, and the fused loss
# has no use for the CPU's row kernels.
WITHOUT_KERNEL = {"linear", "linear_swiglu", "cross_entropy_rows", "cross_entropy_rows_grad_"}


def test_every_op_has_its_cuda_kernel():
    missing = {name for name in OPS if not has_kernel(name, "CUDA")}
    assert missing <= WITHOUT_KERNEL, sorted(missing - WITHOUT_KERNEL)


@pytest.mark.no_poison
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_accuracy(name, dtype):
    case = make(dtype, LENGTHS, "cuda")[name]
    plain, truth = run(case.plain, case.inputs), run(case.plain, case.inputs, wide=True)
    for number, tensors in enumerate(zip(run(case.ours, case.inputs), plain, truth, strict=True)):
        if dtype == torch.float32 or name.startswith(("linear_cross_entropy", "attention")):
            # One number's error is a whole row's: the yardstick is the largest over all rows.
            tensors = [tensor.flatten() for tensor in tensors]
        assert_accurate(*tensors, f"{name}, output or gradient {number}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_every_time(name, dtype):
    case = make(dtype, LENGTHS, "cuda")[name]
    first = run(case.ours, case.inputs)
    for _ in range(3):
        for ours, again in zip(first, run(case.ours, case.inputs), strict=True):
            assert torch.equal(ours, again)


@pytest.fixture
def one_order():
    """Backwards that sum in one order, without the filling of fresh memory."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.no_poison
@pytest.mark.usefixtures("one_order")
@pytest.mark.parametrize("name", NAMES)
def test_graph_capture(name):
    case = make(torch.bfloat16, LENGTHS, "cuda")[name]
    inputs = tuple(t.clone() for t in case.inputs)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(case.ours, inputs)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    leaves = [t.detach().requires_grad_() for t in inputs]
    with torch.cuda.graph(graph):
        outputs = case.ours(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs])
    for leaf, other in zip(leaves, make(torch.bfloat16, LENGTHS, "cuda")[name].inputs, strict=True):
        leaf.data.copy_(other)
    graph.replay()
    eager_leaves = [t.detach().clone().requires_grad_() for t in leaves]
    eager = case.ours(*eager_leaves)
    eager = eager if isinstance(eager, tuple) else (eager,)
    eager_grads = torch.autograd.grad(eager, eager_leaves, [torch.ones_like(t) for t in eager])
    for replayed, expected in zip((*outputs, *grads), (*eager, *eager_grads), strict=True):
        assert torch.equal(replayed, expected)


@pytest.mark.no_poison
@pytest.mark.usefixtures("one_order")
@pytest.mark.parametrize("name", NAMES)
def test_compile(name):
    torch._dynamo.reset()
    case = make(torch.bfloat16, LENGTHS, "cuda")[name]
    compiled = torch.compile(case.ours, fullgraph=True, dynamic=True)
    for eager, traced in zip(run(case.ours, case.inputs), run(compiled, case.inputs), strict=True):
        assert torch.equal(eager, traced)


@pytest.mark.parametrize("tokens", [1, 7, 16, 1000, 4096])
def test_the_number_of_tokens_compiles_nothing(tokens):
    from neobert_kernels.triton import rms_norm, swiglu

    def run_once(tokens):
        x = torch.randn(tokens, DIM, device="cuda", requires_grad=True)
        neobert_kernels.rms_norm(x, torch.ones(DIM, device="cuda")).sum().backward()
        gate_up = torch.randn(tokens, 2 * WIDTH, device="cuda", requires_grad=True)
        neobert_kernels.swiglu(gate_up).sum().backward()

    kernels = (rms_norm._forward, rms_norm._backward, swiglu._forward, swiglu._backward)
    run_once(33)
    device = torch.cuda.current_device()
    compiled = [len(kernel.device_caches[device][0]) for kernel in kernels]
    run_once(tokens)
    assert [len(kernel.device_caches[device][0]) for kernel in kernels] == compiled


@pytest.mark.no_poison
@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "rotary"])
def test_more_than_two_to_the_31_elements(name):
    free, _ = torch.cuda.mem_get_info()
    if free < 40 * 2**30:
        pytest.skip(f"needs 40 GiB of GPU memory, {free / 2**30:.0f} are free")
    width = {"rms_norm": DIM, "swiglu": 2 * WIDTH, "rotary": DIM}[name]
    tokens = 2**31 // width + 1000
    x = torch.randn(1000, width, device="cuda", dtype=torch.bfloat16)
    big = x.new_zeros(tokens, width)
    big[-1000:] = x
    if name == "rotary":
        table = torch.randn(2, 64, 32, device="cuda")
        positions = torch.arange(tokens, device="cuda") % 64
        big, x = big.view(tokens, 12, 64), x.view(1000, 12, 64)
        whole = neobert_kernels.apply_rotary(big, *table, positions)
        part = neobert_kernels.apply_rotary(x, *table, positions[-1000:].contiguous())
    else:
        fn = {
            "rms_norm": lambda t: neobert_kernels.rms_norm(t, torch.ones(DIM, device="cuda")),
            "swiglu": neobert_kernels.swiglu,
        }[name]
        whole, part = fn(big), fn(x)
    assert torch.equal(whole[-1000:], part)


@pytest.mark.no_poison
def test_the_loss_needs_a_third_of_the_memory_of_full_logits():
    tokens = 16384
    labels = torch.randint(VOCAB, (tokens,), device="cuda")
    labels[torch.rand(tokens, device="cuda") > 0.2] = -100
    hidden = torch.randn(tokens, DIM, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(VOCAB, DIM, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def peak(loss):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(loss(hidden, weight), (hidden, weight))
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    ours = peak(lambda h, w: neobert_kernels.linear_cross_entropy(h, w, None, labels))
    full = peak(lambda h, w: torch.nn.functional.cross_entropy((h @ w.t()).float(), labels))
    assert 3 * ours <= full, f"{ours / 2**20:.0f} MiB against {full / 2**20:.0f} MiB"


def test_errors():
    x, weight = torch.randn(2, DIM, device="cuda"), torch.ones(DIM, device="cuda")
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16"):
        neobert_kernels.rms_norm(x.double(), weight.double())
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16"):
        torch.ops.neobert.rms_norm(x.double(), weight.double(), 1e-5)
    with pytest.raises(ValueError, match="weight is on cpu but x is on cuda"):
        neobert_kernels.rms_norm(x, weight.cpu())
    table = torch.randn(2, 8, 24, device="cuda")
    with pytest.raises(ValueError, match="head_dim"):
        neobert_kernels.apply_rotary(x.view(2, 16, 48), *table, torch.arange(2, device="cuda"))
