"""Loading failures that other projects had with these two matrices, by number, one test for each.

Each test brings the situation about and sees the right weights, or one error that names the tensor at fault. What is
right is worked out here, in fp64 and without the code under test.
"""

import itertools
import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from indexproj.indexer import IndexerProjection
from indexproj.kernels import reference
from indexproj.loading import Assembly, Checkpoint, CheckpointError, Plan, load
from support import write_checkpoint

# Failures that cannot be brought about here, each with the reason.
NOT_OURS = {
    "L46": "LoRA on a fused parameter: there are no adapters here, and no parameters to which one could be attached",
}

# (H, K) of DeepSeek-V3.2, of GLM-5 to 5.3, of GLM-5.3-Flash, and one for tests of something other than shapes.
V32, GLM, FLASH, SMALL = (64, 7168), (32, 6144), (32, 4096), (16, 256)
D = 128

# GLM-5.2: 21 layers that run an indexer, 57 that share the choice of an earlier one, and the MTP layer.
RUN = [0, 1, 2, *range(6, 78, 4)]
OWNERS = [*RUN, 78]
GLM52 = {
    "num_hidden_layers": 78,
    "num_nextn_predict_layers": 1,
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
    "indexer_types": ["full" if layer in RUN else "shared" for layer in range(78)],
}

# Names behind "indexer."; a dict from them to tensors is called leaves, and one from layers to leaves a model.
WK, SCALE, GATE, GATE_SCALE = "wk.weight", "wk.weight_scale_inv", "weights_proj.weight", "weights_proj.weight_scale_inv"


# Encodings, as tensors by the last part of their names. Neighbouring scales differ.


def raw(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def e4m3(n, k):
    codes = raw(n, k)
    return codes.masked_fill(codes & 0x7F == 0x7F, 0).view(torch.float8_e4m3fn)


def factors(*shape):
    return torch.exp2(-6 - 6 * torch.rand(shape))


def exponents(*shape):
    return torch.randint(100, 127, shape, dtype=torch.uint8)


def bf16(n, k):
    return {"weight": torch.randn(n, k).bfloat16()}


def fp8(n, k):
    return {"weight": e4m3(n, k), "weight_scale_inv": factors(-(-n // 128), -(-k // 128))}


def mxfp8(n, k):
    return {"weight": e4m3(n, k), "weight_scale_inv": exponents(n, k // 32)}


def packed(n, k):
    """A power of two per 128 values, four to an int32; K may leave some of the last int32 unused."""
    return {"weight": e4m3(n, k), "weight_scale_inv": exponents(n, 4 * -(-k // 512)).view(torch.int32)}


def nvfp4(n, k):
    scales = {"weight_scale": e4m3(n, k // 16), "weight_scale_2": factors(), "input_scale": factors()}
    return {"weight": raw(n, k // 2), **scales}


def nvfp4_divisor(n, k):
    return {
        "weight_packed": raw(n, k // 2), "weight_scale": e4m3(n, k // 16), "weight_global_scale": 1 / factors(1)
    }  # fmt: skip


def mxfp4(n, k):
    return {"weight": raw(n, k // 2), "weight_scale": exponents(n, k // 32)}


def int4(n, k):
    words, scale = raw(n, k // 2).view(torch.int32), factors(n, k // 128).bfloat16()
    return {"weight_packed": words, "weight_scale": scale, "weight_shape": torch.tensor([n, k])}


# What they mean.


def times(codes, scale, rows, columns):
    """Codes by scales that blocks of so many rows and columns share."""
    n, k = codes.shape
    return codes.double() * scale.double()[torch.arange(n)[:, None] // rows, torch.arange(k) // columns]


def power(exponent):
    return torch.exp2(exponent.double() - 127)


def e2m1(codes):
    nibbles = torch.stack((codes & 0xF, codes >> 4), -1).flatten(1).double()
    sign, exponent, mantissa = nibbles // 8, nibbles // 2 % 4, nibbles % 2
    size = torch.where(exponent == 0, mantissa / 2, torch.exp2(exponent - 1) * (1 + mantissa / 2))
    return torch.where(sign == 1, -size, size)


def means(matrix, values):
    return torch.equal(matrix.dequantize(torch.float64), values)


def holds(matrix, *tensors):
    """True if it consists of these tensors, bit for bit."""
    return [(t.shape, t.dtype) for t in matrix.tensors] == [(t.shape, t.dtype) for t in tensors] and all(
        torch.equal(mine.view(torch.uint8), given.contiguous().view(torch.uint8))
        for mine, given in zip(matrix.tensors, tensors, strict=True)
    )


def sides(weights, leaves):
    """Each matrix with its own tensors."""
    for matrix, name in ((weights.wk, "wk."), (weights.gate, "weights_proj.")):
        yield matrix, {leaf.removeprefix(name): leaves[leaf] for leaf in leaves if leaf.startswith(name)}


def right(weights, leaves):
    """True for exactly these tensors, bf16 or fp8."""
    return all(holds(matrix, *own.values()) for matrix, own in sides(weights, leaves))


def all_right(weights, model, numbers=None):
    """True for exactly these layers of the model, all of them if none are given."""
    return list(weights) == list(model if numbers is None else numbers) and all(
        right(weights[number], model[number]) for number in weights
    )


# Layers, and ways to load them.


def prefixed(prefix, tensors):
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def layer(shape, wk=fp8, gate=bf16):
    h, k = shape
    return {**prefixed("wk.", wk(D, k)), **prefixed("weights_proj.", gate(h, k))}


def fused(shape, make):
    h, k = shape
    return prefixed("wk_weights_proj.", make(D + h, k))


def without(leaves, *dropped):
    return {leaf: tensor for leaf, tensor in leaves.items() if leaf not in dropped}


def named(leaves, number=0, prefix="model.layers."):
    return prefixed(f"{prefix}{number}.self_attn.indexer.", leaves)


def everything(model, prefix="model.layers."):
    return {name: tensor for number in model for name, tensor in named(model[number], number, prefix).items()}


def send(assembly, *calls):
    """One load, its tensors split over several calls."""
    assembly.begin()
    for tensors in calls:
        for name, tensor in tensors.items():
            assembly.offer(name, tensor)
    return assembly.finish()


def problems_of(load, *arguments):
    with pytest.raises(CheckpointError) as caught:
        load(*arguments)
    return caught.value.problems


def only(items):
    (item,) = items
    return item


def attempt(leaves, **config):
    """Layer 0 and what is wrong with it, from memory and from files, which have to agree."""
    with TemporaryDirectory() as directory:
        path = write_checkpoint(Path(directory), named(leaves), config=config)
        loads = (lambda: send(Assembly([0]), named(leaves))), (lambda: load(path))
        try:
            weights, read = (each()[0] for each in loads)
        except CheckpointError:
            first, second = map(problems_of, loads)
            assert sorted(problem.subject for problem in first) == sorted(problem.subject for problem in second)
            return None, [(problem.subject.partition("indexer.")[2], str(problem)) for problem in first]
    assert holds(read.wk, *weights.wk.tensors)
    assert holds(read.gate, *weights.gate.tensors)
    return weights, []


def bring(leaves, **config):
    weights, problems = attempt(leaves, **config)
    assert not problems
    return weights


def fault(leaves):
    """The one tensor that is named."""
    return only(attempt(leaves)[1])[0]


def plan_of(path, model, config, prefix="model.layers."):
    return Plan.of(Checkpoint(write_checkpoint(path, everything(model, prefix), config=config)))


def pointers(weights):
    return [tensor.data_ptr() for matrix in (weights.wk, weights.gate) for tensor in matrix.tensors]


# The failures.


def test_field_l01_names_are_not_rewritten():
    """vLLM #38684: KeyError on wk_weights_proj.weight_scale_inv, as names were rewritten by substring.
    Here a name is parsed as a whole: the scale goes with its codes, and neighbours are left to others."""
    leaves = layer(V32)
    neighbours = {"wq_b.weight": e4m3(64, 64), "wq_b.weight_scale_inv": factors(1, 1), "k_norm.weight": torch.ones(D)}
    assert right(bring({**leaves, **neighbours}), leaves)
    assembly = Assembly([0])
    assembly.begin()
    assert not any(assembly.offer(name, tensor) for name, tensor in named(neighbours).items())


def test_field_l02_already_fused():
    """vLLM #38684 (review): wk_weights_proj_weights_proj.weight, from a re-saved model that was fused already.
    Here the fused name is as good as the two others, and an error beside them."""
    leaves = layer(GLM, bf16)
    both = {"wk_weights_proj.weight": torch.cat((leaves[WK], leaves[GATE]))}
    assert right(bring(both), leaves)
    assert [leaf for leaf, _ in attempt({**both, **leaves})[1]] == ["wk_weights_proj"]


def test_field_l03_layers_of_other_ranks():
    """vLLM #42944: GLM-5.1-FP8 on 8 pipeline ranks, KeyError on a layer of another rank.
    Here such tensors are counted, and neither kept nor looked into."""
    model = {number: layer(SMALL) for number in range(79)}
    for first in range(0, 79, 10):
        owned = range(first, min(first + 10, 79))
        foreign = (first + 40) % 79
        assembly = Assembly(owned)
        broken = {**without(model[foreign], SCALE), "wk.bias": torch.zeros(1)}
        assert all_right(send(assembly, everything({**model, foreign: broken})), model, owned)
        assert assembly.passed_over == {number: 3 for number in model if number not in owned}


@pytest.mark.parametrize("prefix", ["model.layers.", "model.language_model.layers.", "language_model.model.layers."])
def test_field_l04_one_loader_for_every_prefix(prefix):
    """vLLM #57639: GLM-5.3-Flash on 2 pipeline ranks, KeyError, as its copy of the loader lacked a check.
    Here there is one loader, whatever comes before "layers"."""
    first, second = list(range(3, 23, 4)), [*range(23, 45, 4), 45]
    model = {number: layer(FLASH) for number in first + second}
    neighbours = {number: {"index_kpool_compress_gate": torch.zeros(1)} for number in model}
    for owned in (first, second):
        assert all_right(send(Assembly(owned), everything(model, prefix), everything(neighbours, prefix)), model, owned)


def test_field_l05_a_matrix_split_over_calls():
    """vLLM #46078, #46168: with a streaming loader rows stayed uninitialised, as codes waited in a local variable.
    Here a load is begun and finished, with any calls in between, and what is missing at the end is an error."""
    leaves = layer(SMALL)
    for order in itertools.permutations(named(leaves).items()):
        for cut in range(len(order) + 1):
            assert right(send(Assembly([0]), dict(order[:cut]), dict(order[cut:]))[0], leaves)
    problems = problems_of(send, Assembly(range(3)), everything({0: leaves, 2: without(leaves, SCALE)}))
    assert [problem.subject for problem in problems] == ["layer 1", *named({SCALE: 0}, 2)]


@pytest.mark.parametrize(
    ("prefix", "number"), [("model.language_model.layers.", 7), ("model.layers.", 45), ("model.mtp_layers.", 0)]
)
def test_field_l06_split_over_calls_in_every_model(prefix, number):
    """vLLM 0.33.0, glm5next, hy_v4 and their MTP models: the failure of #46168, left in these copies."""
    leaves = layer(SMALL)
    index = 45 if "mtp" in prefix else number
    calls = [{name: tensor} for name, tensor in reversed(named(leaves, number, prefix).items())]
    assert right(send(Assembly([index], num_hidden_layers=45), *calls)[index], leaves)


@pytest.mark.parametrize("shape", [V32, GLM])
def test_field_l07_a_scale_that_never_comes(shape):
    """vLLM 0.33.0: rows of wk stayed uninitialised, as the gate alone marked their parameter as loaded.
    Here each tensor of each matrix is accounted for."""
    assert fault(without(layer(shape), SCALE)) == SCALE
    assert fault(without(layer(shape), GATE)) == GATE


def test_field_l08_a_scale_without_codes():
    """vLLM 0.33.0: a scale beside a BF16 wk was kept for ever. Here it is an error, in whatever order it comes."""
    leaves = {**layer(GLM, bf16), SCALE: factors(1, 48)}
    assert fault(leaves) == SCALE
    for order in itertools.permutations(named(leaves).items()):
        assert only(problems_of(send, Assembly([0]), dict(order))).subject == only(named({SCALE: 0}))


@pytest.mark.parametrize("left", [SCALE, WK])
def test_field_l09_a_half_from_an_aborted_load(left):
    """vLLM 0.33.0: a scale left by an aborted update went with the codes of the next one, and so on for ever.
    Here begin() forgets, also after a finish() that failed, and a second half within one load is an error."""
    stale, fresh = layer(SMALL), layer(SMALL)
    rest = named({left: stale[left]})
    assembly = Assembly([0])
    assembly.begin()
    assembly.offer(*only(rest.items()))
    assert right(send(assembly, named(fresh))[0], fresh)
    problems_of(send, assembly, rest)
    assert right(send(assembly, named(fresh))[0], fresh)
    assert only(problems_of(send, assembly, rest, named(fresh))).subject == only(rest)


def test_field_l10_buckets_of_a_weight_update():
    """SGLang's begin_weight_update_transaction: a matrix and its scale come in different buckets.
    Here a load is such a transaction."""
    assembly = Assembly(range(4))
    for _ in range(2):
        model = {number: layer(SMALL) for number in range(4)}
        buckets = [everything({number: {leaf: model[number][leaf]} for number in model}) for leaf in (GATE, SCALE, WK)]
        assert all_right(send(assembly, *buckets), model)


@pytest.mark.parametrize("make", [fp8, bf16])
@pytest.mark.parametrize("gate", [fp8, bf16])
def test_field_l11_a_streamer_that_reuses_its_buffer(make, gate):
    """SGLang, vLLM with Run:ai's streamer: tensors that waited were overwritten. Here what is kept is copied."""
    leaves = layer(SMALL, make, gate)
    buffer = torch.empty(1 << 17, dtype=torch.uint8)
    assembly = Assembly([0])
    assembly.begin()
    for name, tensor in named(leaves).items():
        assembly.offer(name, buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor))
        buffer.fill_(0x55)
    assert right(assembly.finish()[0], leaves)


def test_field_l12_weights_of_layers_that_do_not_run(tmp_path):
    """vLLM #45895, #46600: index_topk_freq = 4 on DeepSeek-V3.2 failed, as all its layers have indexers on disk.
    Here what runs and what is on disk are two things, and a load may be of the former alone."""
    model = {number: layer(SMALL) for number in range(62)}
    plan = plan_of(tmp_path, model, {"num_hidden_layers": 61, "num_nextn_predict_layers": 1, "index_topk_freq": 4})
    assert not plan.problems
    runs = [number for number in plan.layers if plan.runs(number)]
    assert runs == [0, *range(1, 61, 4), 61]
    assert all_right(load(tmp_path, runs), model, runs)


def test_field_l13_a_stream_with_layers_that_do_not_run():
    """vLLM 0.33.0, models/deepseek_v32: KeyError with GLM-5.1 and index_topk_freq, for #46600 was not carried over.
    Here the one loader passes over layers it was not asked for, and says how many tensors of each."""
    model = {number: layer(SMALL) for number in range(12)}
    assembly = Assembly([0, 1, 5, 9])
    assert all_right(send(assembly, everything(model)), model, [0, 1, 5, 9])
    assert assembly.passed_over == dict.fromkeys((2, 3, 4, 6, 7, 8, 10, 11), 3)


@pytest.mark.parametrize(("owners", "has_weights"), [(OWNERS, False), (range(79), True)])
def test_field_l14_having_weights_and_running(tmp_path, owners, has_weights):
    """vllm-ascend #11363, #11674: layers that skip the indexer have no weights in GLM-5.2, but have them in GLM-5.1.
    Here these are two predicates."""
    plan = plan_of(tmp_path, {number: layer(SMALL) for number in owners}, GLM52)
    assert not plan.problems
    assert plan.has_weights(3) is has_weights
    assert [number for number in range(79) if plan.runs(number)] == OWNERS


def test_field_l15_a_description_of_layers_that_are_not_there(tmp_path):
    """vllm-ascend #12901: KeyError with GLM-5.2 in w8a8, from asking how an indexer is quantized that is not there.
    Here headers decide, and no description does; INT8, which ModelSlim writes, is refused by name."""
    model = {number: layer(SMALL, bf16) for number in OWNERS}
    plan = plan_of(tmp_path, model, GLM52)
    described = dict.fromkeys((only(named({WK: 0}, number)) for number in range(79)), "W8A8_DYNAMIC")
    (tmp_path / "quant_model_description.json").write_text(json.dumps(described))
    assert list(plan.layers) == OWNERS
    assert all_right(load(tmp_path), model)
    w8a8 = {WK: torch.ones(D, 6144, dtype=torch.int8), "wk.weight_scale": factors(D, 1)}
    assert fault({**layer(GLM, bf16), **w8a8}) == WK


def test_field_l16_shared_layers_are_not_missing(tmp_path):
    """mlx-lm #1418, llama.cpp #24770: GLM-5.2, "Missing 285 parameters", as 57 of its layers have no indexer.
    Here that is as it should be, and one too few is not."""
    model = {number: layer(SMALL) for number in OWNERS}
    assert not plan_of(tmp_path, model, GLM52).problems
    assert all_right(load(tmp_path), model)
    plan = plan_of(tmp_path, without(model, 10), GLM52)
    assert "weights for the indexers of layers 10," in only(plan.problems).expected


@pytest.mark.parametrize("types", [GLM52["indexer_types"], None])
@pytest.mark.parametrize(("offset", "agrees"), [(3, True), (None, False), (2, False), (1, False)])
def test_field_l17_schedules_that_disagree(tmp_path, types, offset, agrees):
    """vLLM 0.33.0, ATOM, prime-rl #2541: four ways to tell from the config which layers have an indexer.
    Here the files tell; a schedule that contradicts them or another one is an error."""
    config = {**GLM52, "indexer_types": types, "index_skip_topk_offset": offset}
    plan = plan_of(tmp_path, {number: layer(SMALL) for number in OWNERS}, config)
    if agrees:
        assert list(load(tmp_path)) == OWNERS
    else:
        assert only(problems_of(load, tmp_path)) == only(plan.problems)
        assert only(plan.problems).subject == "config.json"


def test_field_l18_nothing_for_layers_without_weights(tmp_path, poison):
    """sglang #29339: parameters of layers that share were allocated and never filled.
    Here every byte that a load returns is one of the checkpoint."""
    model = {number: layer(SMALL) for number in OWNERS}
    plan_of(tmp_path, model, GLM52)
    weights = load(tmp_path)
    assert sum(pair.nbytes for pair in weights.values()) == sum(tensor.nbytes for tensor in everything(model).values())
    assert all_right(weights, model)


def test_field_l19_which_layer_a_name_means(tmp_path):
    """sglang #40285: the MTP layer of GLM-5.3-Flash went into the main model, as only "model.layers" was looked for.
    Here the number counts, under any prefix; `mtp_layers`, as in HY-V4, come behind the hidden layers."""
    model = {number: layer(SMALL) for number in (4, 5, 45)}
    config = {"text_config": {"num_hidden_layers": 45, "num_nextn_predict_layers": 1}}
    plan = plan_of(tmp_path, model, config, "model.language_model.layers.")
    assert [(number, plan.layers[number].is_mtp) for number in plan.layers] == [(4, False), (5, False), (45, True)]
    assert all_right(load(tmp_path), model)
    mtp, hidden = named(model[45], 0, "model.mtp_layers."), named(model[4], 0)
    write_checkpoint(tmp_path, hidden, mtp, config={"num_hidden_layers": 45})
    assert all_right(load(tmp_path), {0: model[4], 45: model[45]})
    assert [problem.subject for problem in problems_of(send, Assembly([0]), hidden, mtp)] == list(mtp)


def test_field_l20_mtp_and_memory_order(tmp_path):
    """ATOM #835: the MTP layer of DeepSeek-V3.2 did not know of the fusion, and K was not contiguous.
    Here it is a layer as any other, and strides do not matter."""
    leaves = layer(V32)
    strided = {leaf: tensor.T.contiguous().T for leaf, tensor in leaves.items()}
    assert not strided[WK].is_contiguous()
    weights = send(Assembly([61], num_hidden_layers=61), named(strided, 61))[61]
    assert right(weights, leaves)
    assert all(matrix.tensors[0].is_contiguous() for matrix in (weights.wk, weights.gate))
    plan_of(tmp_path, {0: layer(V32), 61: leaves}, {"num_hidden_layers": 61})
    assert right(load(tmp_path, [61])[61], leaves)


def test_field_l21_codes_are_no_weights():
    """TensorRT-LLM #18658: FP8 codes were copied into an fp32 parameter, and the scale dropped, without an error.
    Here codes without the scale that gives them a value do not load."""
    for leaves in (layer(GLM, fp8, fp8), layer(GLM, bf16, fp8), fused(GLM, fp8)):
        for scale in (leaf for leaf in leaves if "scale" in leaf):
            assert fault(without(leaves, scale)) == scale


def test_field_l22_each_matrix_has_its_own_scales():
    """Megatron-Bridge #5851: FP8 was cast to BF16 without its scales. Here each half of the pair has its own."""
    leaves = layer(GLM, fp8, fp8)
    for matrix, own in sides(bring(leaves), leaves):
        assert means(matrix, times(own["weight"], own["weight_scale_inv"], 128, 128))


def test_field_l23_fnuz():
    """vLLM 0.33.0: e4m3fnuz codes were copied as if they were values, without an error.
    Here they are codes, and mean half of what the same bits mean in e4m3fn; e5m2 is refused."""
    leaves = layer(V32)
    bits = leaves[WK].view(torch.uint8)
    bits[bits == 0x80] = 0
    weights = bring({**leaves, WK: bits.view(torch.float8_e4m3fnuz)})
    assert means(weights.wk, times(leaves[WK], leaves[SCALE] / 2, 128, 128))
    for dtype in (torch.float8_e5m2, torch.float8_e5m2fnuz):
        assert fault({**leaves, WK: torch.zeros(leaves[WK].shape, dtype=dtype)}) == WK


def test_field_l24_minus_zero_or_nan():
    """sglang #28455, vLLM #45681: no right answer on gfx942, where 0x80 is NaN and codes mean half as much.
    Here 0x80 is zero in e4m3fn and an error in e4m3fnuz, and one becomes the other without loss."""
    leaves = layer(SMALL)
    bits = leaves[WK].view(torch.uint8)
    bits[5, 7] = 0x80
    weights = bring(leaves)
    assert right(weights, leaves)
    assert weights.wk.to_fnuz().codes.dtype == torch.float8_e4m3fnuz
    assert means(weights.wk.to_fnuz(), times(leaves[WK], leaves[SCALE], 128, 128))
    assert fault({**leaves, WK: bits.view(torch.float8_e4m3fnuz)}) == WK


@pytest.mark.parametrize("k", [6144, 7168, 2880])
def test_field_l25_packed_exponents(k):
    """miles #1928: "tensor a (6144) must match the size of tensor b (1536)", from wk's scale as DeepGEMM packs it.
    Here such an int32 [128, 12] is an encoding of its own, in either order in memory."""
    leaves = layer((32, k), packed)
    values = times(leaves[WK], power(leaves[SCALE].view(torch.uint8)), 1, 128)
    assert means(bring(leaves).wk, values)
    mn_major = {**leaves, SCALE: leaves[SCALE].T.contiguous().T}
    assert means(send(Assembly([0]), named(mn_major))[0].wk, values)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((128, 12), torch.float32), ((128, 48), torch.float32), ((128, 192), torch.float32), ((2, 96), torch.float32),
        ((48,), torch.float32), ((1, 48), torch.float64), ((1, 12), torch.int32), ((128, 13), torch.int32),
        ((128, 12), torch.uint8), ((128, 192), torch.int8),
    ],
)  # fmt: skip
def test_field_l26_no_block_is_guessed(shape, dtype):
    """vLLM 0.33.0: any shape that divides made a block: with packed int32 as factors values reached 3.95e11.
    Here dtypes and shapes are a closed list."""
    assert fault({**layer(GLM), SCALE: torch.ones(shape, dtype=dtype)}) == SCALE


def test_field_l27_mxfp8_under_another_name():
    """SGLang's MXFP8 updates: biased exponents under weight_scale_inv were used as factors.
    Here the dtype tells, not the name, for the gate as for wk."""
    leaves = layer(GLM, mxfp8, mxfp8)
    for matrix, own in sides(bring(leaves), leaves):
        assert holds(matrix, own["weight"], own["weight_scale_inv"].view(torch.float8_e8m0fnu))
        assert means(matrix, times(own["weight"], power(own["weight_scale_inv"]), 1, 32))


@pytest.mark.parametrize(
    ("name", "make", "shape", "block"),
    [
        ("weight_scale_inv", exponents, (1, 48), (128, 128)),
        ("weight_scale", exponents, (128, 192), (1, 32)),
        ("weight_scale", factors, (1, 48), (128, 128)),
    ],
)
def test_field_l28_one_decoder(name, make, shape, block):
    """vLLM 0.33.0, glm5next: 23424 for exponents of blocks, AssertionError for MXFP8, KeyError for Quark.
    Here there is one decoder for all."""
    scale = make(*shape)
    leaves = {**without(layer(GLM), SCALE), f"wk.{name}": scale}
    assert means(bring(leaves).wk, times(leaves[WK], power(scale) if make is exponents else scale, *block))


@pytest.mark.parametrize("spelling", ["weight_scale_inv", "weight_scale", "scale"])
def test_field_l29_spellings_of_the_scale(spelling):
    """vLLM #54556, sglang #38999: KeyError on weight_scale, as Quark renames weight_scale_inv.
    Here all three names are the scale, and two of them at once one too many."""
    leaves = layer(GLM)
    renamed = {**without(leaves, SCALE), f"wk.{spelling}": leaves[SCALE]}
    assert right(bring(renamed), leaves)
    if f"wk.{spelling}" != SCALE:
        assert fault({**renamed, SCALE: factors(1, 48)}) == SCALE


@pytest.mark.parametrize(
    "leaf", ["wk.weight_scales", "wk.weight_scale_3", "wk.scale_inv", "wk.weight.scale", "weights_proj.qweight", "wk"]
)
def test_field_l30_endings_are_a_closed_list(leaf):
    """SGLang's test for Quark: `.weight_scale` was taken for a weight. Here each ending is known or an error."""
    weight = torch.ones(D, 6144).bfloat16()
    assert fault({**layer(GLM), leaf: weight}) == leaf
    assert fault({**without(layer(GLM, bf16), WK), "wk.weight_scale": weight}) == WK


def test_field_l31_int4_from_a_default_recipe():
    """llm-compressor #2512: KeyError on weights_proj.weight_packed, as the recipe had named every Linear.
    Here INT4 is decoded, and refused where a part of it is missing."""
    leaves = layer(GLM, int4, int4)
    for matrix, own in sides(bring(leaves), leaves):
        integers = (own["weight_packed"].long()[..., None] >> torch.arange(0, 32, 4) & 0xF).flatten(1) - 8
        assert means(matrix, times(integers, own["weight_scale"], 1, 128).bfloat16().double())
    assert fault(without(leaves, "weights_proj.weight_shape")) == "weights_proj.weight_shape"


def test_field_l32_nvfp4():
    """vLLM #41108, #41834: "tensor a (3072) must match the size of tensor b (6144)", from NVFP4 in a BF16 model.
    Here both matrices may be NVFP4, and stay it."""
    leaves = layer(GLM, nvfp4, nvfp4)
    assert leaves[WK].shape == (128, 3072)
    for matrix, own in sides(bring(leaves), leaves):
        codes, scale, factor, _ = own.values()
        assert holds(matrix, codes, scale, factor.expand(len(codes), 1))
        assert means(matrix, times(e2m1(codes), scale, 1, 16) * factor.double())


def test_field_l33_roles_of_nvfp4(tmp_path):
    """vLLM 0.33.0: weight_scale_2 overwrote weight_scale. Here each has its role, in any order.
    input_scale, which is of activations, is put down and not used."""
    leaves = layer(SMALL, nvfp4)
    for order in itertools.permutations(named(leaves).items()):
        weights = send(Assembly([0]), dict(order))[0]
        assert holds(weights.wk, leaves[WK], leaves["wk.weight_scale"], leaves["wk.weight_scale_2"].expand(128, 1))
    plan = plan_of(tmp_path, {0: leaves}, {}).layers[0]
    assert set(plan.wk.headers) == {"weight", "scale", "scale_2", "input_scale"}
    for part in ("wk.weight_scale", "wk.weight_scale_2"):
        assert fault(without(leaves, part)) == part


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (128,), (128, 1)])
def test_field_l34_one_scale_or_one_for_each_row(shape):
    """vLLM 0.33.0: IndexError for a scalar scale, AssertionError for [1], KeyError for input_scale.
    Here each of these shapes has a meaning, and input_scale may be anything."""
    scale = factors(*shape)
    leaves = {**without(layer(GLM), SCALE), "wk.weight_scale": scale, "wk.input_scale": factors(1)}
    values = leaves[WK].double() * scale.double().view(-1, 1)
    assert means(bring(leaves).wk, values)
    odd = {**leaves, "wk.input_scale": torch.ones(1, dtype=torch.complex128)}  # of which safetensors has no name
    assert means(send(Assembly([0]), named(odd))[0].wk, values)


def test_field_l35_an_fp8_gate():
    """vLLM 0.33.0: FP8 codes of weights_proj were copied into BF16 rows, and only then its scale was a KeyError.
    Here the gate is read as wk is, and without its scale nothing of it reaches the weights in use."""
    leaves, unscaled = layer(V32, fp8, fp8), without(layer(V32, fp8, fp8), GATE_SCALE)
    assert right(bring(leaves), leaves)
    assert fault(unscaled) == GATE_SCALE
    assembly = Assembly([0])
    live = send(assembly, named(leaves))[0]
    problems_of(send, assembly, named(unscaled))
    assert right(live, leaves)


@pytest.mark.parametrize(("wk", "gate"), [(bf16, bf16), (fp8, bf16), (fp8, fp8)])
def test_field_l36_ignore_lists_have_no_say(wk, gate):
    """ATOM #439: "This GEMM is not supported!", as GLM-5-FP8's ignore list says indexers_proj, which is no tensor.
    Here the dtype on disk decides."""
    leaves = layer(GLM, wk, gate)
    for ignored in ([], ["model.layers.0.self_attn.indexers_proj"], ["model.layers.0.self_attn.indexer.wk"]):
        quantization = {"quant_method": "fp8", "weight_block_size": [64, 64], "modules_to_not_convert": ignored}
        assert right(bring(leaves, quantization_config=quantization), leaves)


def test_field_l37_one_block_of_rows():
    """sglang-jax #1111: a check for narrow matrices tripped on wk, N = 128. Here that is one row of blocks, as is H."""
    leaves = layer(GLM, fp8, fp8)
    assert leaves[SCALE].shape == leaves[GATE_SCALE].shape == (1, 48)
    assert right(bring(leaves), leaves)
    for scale in (SCALE, GATE_SCALE):
        assert fault({**leaves, scale: factors(2, 48)}) == scale


def test_field_l38_ragged_blocks():
    """vllm-ascend #15346: the last row of blocks was lost, 576 / 128 = 4.5; vLLM 0.33.0: AssertionError for K = 2880.
    Here blocks are counted upwards, along K and along the rows of a fused matrix."""
    leaves, both = layer((64, 2880)), fused((64, 2880), fp8)
    assert leaves[SCALE].shape == (1, 23)
    assert means(bring(leaves).wk, times(leaves[WK], leaves[SCALE], 128, 128))
    assert fault({**leaves, SCALE: factors(1, 22)}) == SCALE
    codes, scale = both.values()
    assert scale.shape == (2, 23)
    assert means(bring(both).gate, times(codes, scale, 128, 128)[D:])
    assert fault({**both, "wk_weights_proj.weight_scale_inv": factors(1, 23)}) == "wk_weights_proj.weight_scale_inv"


@pytest.mark.parametrize("leaf", ["wk.bias", "weights_proj.bias"])
def test_field_l39_bias(leaf):
    """vLLM #30036: weights_proj.bias "not initialized from checkpoint", with DeepSeek-V3.2-Exp in BF16.
    Here there is no bias, and one on disk is an error."""
    leaves = layer(V32, bf16)
    assert right(bring(leaves), leaves)
    assert fault({**leaves, leaf: torch.zeros(64)}) == leaf


@pytest.mark.parametrize(
    ("make", "leaf", "value"),
    [
        (bf16, WK, torch.nan), (bf16, GATE, torch.inf), (fp8, WK, torch.nan), (fp8, SCALE, torch.nan),
        (fp8, GATE_SCALE, torch.inf), (mxfp8, GATE_SCALE, 0xFF), (packed, SCALE, -1),
        (nvfp4, "wk.weight_scale", torch.nan), (nvfp4, "weights_proj.weight_scale_2", torch.nan),
        (nvfp4_divisor, "wk.weight_global_scale", 0), (nvfp4_divisor, "wk.weight_global_scale", torch.inf),
        (mxfp4, "wk.weight_scale", 0xFF), (int4, "wk.weight_scale", torch.inf),
        (int4, "weights_proj.weight_scale", torch.nan),
    ],
)  # fmt: skip
def test_field_l40_values_that_nobody_wrote(make, leaf, value):
    """vLLM #57532: a scale of lm_head "was never loaded (still NaN)". Here neither NaN nor infinity is a value."""
    leaves = layer(GLM, make, make)
    leaves[leaf].flatten()[-1] = value
    assert fault(leaves) == leaf


def test_field_l41_a_load_that_fails_changes_nothing():
    """vLLM 0.33.0, layerwise reload: a half that never came let uninitialised memory into the weights in use.
    Here they are written once everything is there and right."""
    old, new = layer(GLM), layer(GLM)
    assembly = Assembly([0, 1])
    live = send(assembly, everything({0: old, 1: old}))
    before = {number: pointers(live[number]) for number in live}
    nan, narrow = torch.full((1, 48), torch.nan), new[GATE][:, :128]
    for bad in ({}, without(new, SCALE), {**new, SCALE: nan}, {**new, GATE: narrow}):
        problems_of(send, assembly, everything({0: new, 1: bad}))
        assert all_right(live, {0: old, 1: old})
    assert send(assembly, everything({0: new, 1: new})) == live
    assert all_right(live, {0: new, 1: new})
    assert {number: pointers(live[number]) for number in live} == before


def test_field_l42_no_copy_that_goes_stale():
    """vLLM 0.33.0, glm5next: an fp32 copy of the gate, made at the first forward, outlived a weight update.
    Here the fused buffer is the memory that a load writes, and a module that holds the weights sees it."""
    old, new = layer(GLM, bf16), layer(GLM, bf16)
    assembly = Assembly([0])
    module = IndexerProjection(send(assembly, named(old))[0])
    fused_weight, x = module.weights.fused_weight, torch.randn(2, 6144)
    assert torch.equal(reference(x, module.weights)[1], x.double() @ old[GATE].double().T)
    send(assembly, named(new))
    assert torch.equal(fused_weight, torch.cat((new[WK], new[GATE])))
    assert torch.equal(reference(x, module.weights)[1], x.double() @ new[GATE].double().T)


@pytest.mark.parametrize("make", [bf16, fp8, mxfp8, packed, nvfp4, nvfp4_divisor, mxfp4, int4])
@pytest.mark.parametrize("is_fused", [False, True])
def test_field_l43_loading_again(make, is_fused):
    """sglang #30761, verl #7519: a reload took repacked scales for raw ones, or paired new codes with old scales.
    Here each load starts from raw tensors, and gives what a first load of them gives, in the memory at hand."""
    first, second = (fused(SMALL, make) if is_fused else layer(SMALL, make, make) for _ in range(2))
    assembly = Assembly([0])
    live = send(assembly, named(first))[0]
    before = pointers(live)
    for leaves in (first, second, second, first):
        fresh = send(Assembly([0]), named(leaves))[0]
        assert send(assembly, named(leaves))[0] is live
        assert holds(live.wk, *fresh.wk.tensors)
        assert holds(live.gate, *fresh.gate.tensors)
        assert pointers(live) == before


def test_field_l44_names_that_nobody_takes(tmp_path):
    """sglang #38616: names that save_pretrained writes were dropped, "97% of file", without a word.
    Here offer() says whether it takes a tensor, and a layer for which none came is an error."""
    tensors = {name.replace("self_attn", "attn"): tensor for name, tensor in named(layer(SMALL)).items()}
    assembly = Assembly([0])
    assembly.begin()
    assert not any(assembly.offer(name, tensor) for name, tensor in tensors.items())
    assert only(problems_of(assembly.finish)).subject == "layer 0"
    assert only(problems_of(load, write_checkpoint(tmp_path, tensors))).found == "none of 3 tensors"


@pytest.mark.parametrize("make", [bf16, fp8])
def test_field_l45_fused_names_in_an_update(make):
    """vLLM 0.33.0: updates that are not in the checkpoint's format use fused names only.
    Here a load may use either, and writes the same memory."""
    old, new = layer(GLM, make, make), layer(GLM, make, make)
    update = {
        f"wk_weights_proj.{part}": torch.cat((new[f"wk.{part}"], new[f"weights_proj.{part}"])) for part in make(D, 128)
    }
    assembly = Assembly([0])
    live = send(assembly, named(old))[0]
    before = pointers(live)
    for leaves, expected in ((update, new), (old, old)):
        assert send(assembly, named(leaves))[0] is live
        assert right(live, expected)
        assert pointers(live) == before


@pytest.mark.parametrize("make", [fp8, mxfp8, packed, nvfp4, nvfp4_divisor, mxfp4, int4])
def test_field_l47_no_scale_is_optional(make):
    """vLLM #53503: without a scale an FP8 checkpoint "uses empty padding", and says nothing.
    Here no scale of any encoding is optional, and the error lists what would complete it."""
    leaves = layer(SMALL, make, make)
    for leaf in leaves:
        matrix, _, part = leaf.partition(".")
        if "weight_" in part and "packed" not in part:
            ((subject, message),) = attempt(without(leaves, leaf))[1]
            assert subject.startswith(f"{matrix}.")
            assert part in message


def test_field_l48_tensors_of_layers_that_share(tmp_path):
    """llama.cpp #25407: some conversions of GLM-5.2 carry indexers in all layers. Here that is legal; few are run."""
    model = {number: layer(SMALL) for number in range(79)}
    plan = plan_of(tmp_path, model, GLM52)
    assert not plan.problems
    assert all_right(load(tmp_path), model)
    assert list(load(tmp_path, filter(plan.runs, plan.layers))) == OWNERS


def test_field_l49_an_fp8_fused_matrix():
    """vLLM #38665: GLM-5-FP8 was claimed to hold one fused FP8 tensor; others say two. Here headers decide."""
    both, apart = fused(GLM, fp8), layer(GLM)
    codes, scale = both.values()
    weights = bring(both)
    assert holds(weights.wk, codes[:D], scale[:1])
    assert holds(weights.gate, codes[D:], scale[1:])
    values = times(codes, scale, 128, 128)
    assert means(weights.wk, values[:D])
    assert means(weights.gate, values[D:])
    assert right(bring(apart), apart)


def test_field_has_every_row():
    tested = [match[1] for name in globals() if (match := re.match(r"test_field_l(\d\d)_", name))]
    excused = [row.removeprefix("L") for row in NOT_OURS]
    assert sorted(tested + excused) == [f"{row:02}" for row in range(1, 50)]
