"""On a GPU: the same tokens whatever moves when, and nothing extra crosses the link. Skipped without one."""

import random
import time
from functools import partial
from itertools import cycle

import numpy as np
import pytest
import torch

from duoserve import Engine, loading, quant, scheduler
from duoserve.cache import WHOLE
from duoserve.options import SamplingParams
from duoserve.policies import POLICIES
from duoserve.sampling import sample
from duoserve.errors import UserError
from duoserve.experts import ExpertSlots
from duoserve.packed import PackedModel
from duoserve.quant import PackedLinear, compiled as fused, exact_gemv
from models import on_a_gpu, packed
from products import CASES, an_expert, matrices, of_several, rows, same

pytestmark = on_a_gpu
PROMPT = [1, *range(40, 70)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return packed(tmp_path_factory.mktemp("cuda"), max_position_embeddings=1024)


@pytest.fixture(params=(False, True), ids=("eager", "graphs"), autouse=True)
def compiled(request):
    """Everything below holds with plain kernels, and with compiled ones replayed from CUDA graphs."""
    global COMPILE
    COMPILE = request.param
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield request.param


@pytest.fixture(autouse=True)
def as_if_large(monkeypatch):
    """Predict although transfers are short here, so that slots are reloaded while others are computed; and
    compile what a large model runs."""
    monkeypatch.setattr(scheduler, "THOUGHT", 0.0)
    monkeypatch.setattr(quant, "SMALL_MATRIX", 0)


def engine(directory, **options):
    return Engine.from_pretrained(directory, device="cuda",
                                  **{"compile": COMPILE, "predictor": "none", **options})


def ready(e):
    """An engine whose host computes."""
    assert e.host.ready.wait(180) and e.host.trouble() is None, e.host.trouble()
    return e


def tokens(e, temperature=0.8):
    return e.generate(PROMPT, max_new_tokens=24, temperature=temperature).token_ids


def greedy(e):
    """None where the logits are not finite: some engines here are broken on purpose."""
    try:
        return tokens(e, temperature=0)
    except UserError as error:
        assert "not finite" in str(error)
        return None


def test_same_tokens_for_every_policy_and_cache_size(directory):
    runs = {(p, n): tokens(engine(directory, policy=p, cache_experts=n))
            for p in POLICIES for n in (2, 5, 24)}
    assert len({tuple(run) for run in runs.values()}) == 1


def test_a_small_model_gives_the_same_tokens_however_many_slots_there_are(directory, monkeypatch):
    monkeypatch.setattr(quant, "SMALL_MATRIX", 2**22)
    assert len({tuple(tokens(engine(directory, cache_experts=n))) for n in (2, 5, 24)}) == 1


@pytest.mark.parametrize("dtype", ("float32", "float16"))
def test_same_tokens_in_every_dtype(directory, dtype):
    """Also where what is there is computed in one launch, and the rest one by one."""
    runs = [tokens(engine(directory, cache_experts=n, dtype=dtype)) for n in (2, 5, 11, 24)]
    assert runs.count(runs[0]) == 4


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_same_tokens_wherever_an_expert_is_computed(directory, compiled, dtype, monkeypatch):
    """Any that the device has not launched is computed on the host, or not, at random."""
    expected, rng = tokens(engine(directory, cache_experts=24, dtype=dtype)), random.Random(1)
    e = engine(directory, cache_experts=5, dtype=dtype, host_threads=2)
    assert (e.host is not None) == compiled
    if compiled:
        ready(e)
        monkeypatch.setattr(scheduler.ExpertScheduler, "for_host",
                            lambda self, keys: {key: WHOLE for key in keys if rng.random() < 0.5}
                            | {key: rng.randint(1, WHOLE) for key in keys[:1]})
        for _ in range(3):
            assert tokens(e) == expected
        e.host.wait_for = lambda word, number: False                # as where the driver has no such wait
        assert tokens(e) == expected and e.result.stats.host_experts > 0


def test_the_device_waits_for_an_answer_of_the_host(directory, compiled, monkeypatch):
    """Nobody else does; and the wait is what makes it right."""
    if not compiled:
        pytest.skip("an eager engine has no host")
    expected, make = tokens(engine(directory, cache_experts=24), 0), loading.compiled_experts

    def late(*arguments):
        compute = make(*arguments)
        return lambda *job: time.sleep(2e-3) or compute(*job)
    monkeypatch.setattr(loading, "compiled_experts", late)
    monkeypatch.setattr(scheduler.ExpertScheduler, "for_host",
                        lambda self, keys: dict.fromkeys(keys[:1], WHOLE))
    e = ready(engine(directory, cache_experts=5, host_threads=2))
    waits, wait_for = [], e.host.wait_for
    nan = torch.full((300, e.config.hidden_size), torch.nan, dtype=torch.bfloat16, device="cpu")
    poisoned = lambda: cycle(nan.clone().pin_memory().unbind())
    e.host.wait_for = lambda *word: waits.append(wait_for(*word)) or waits[-1]
    e.host.rows = poisoned()
    assert greedy(e) == expected and all(waits) and len(waits) > 40
    e.host.rows = poisoned()
    e.host.wait_for = lambda *word: True
    assert greedy(e) != expected


def test_a_host_that_fails_or_is_interrupted_leaves_a_gpu_that_works(directory, compiled, monkeypatch):
    if not compiled:
        pytest.skip("an eager engine has no host")
    monkeypatch.setattr(scheduler.ExpertScheduler, "for_host",
                        lambda self, keys: dict.fromkeys(keys[:1], WHOLE))
    make, fails = loading.compiled_experts, []

    def failing(*arguments):
        compute = make(*arguments)
        return lambda *job: {}["no expert"] if fails else compute(*job)
    monkeypatch.setattr(loading, "compiled_experts", failing)
    e = ready(engine(directory, cache_experts=5, host_threads=2))
    expected, submit, left = tokens(e), e.host.submit, [20]

    def interrupted(experts):
        submit(experts)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    def broken(experts):
        fails.append(True)
        submit(experts)
    for wrong, error in ((interrupted, KeyboardInterrupt), (broken, UserError)):
        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(e.host, "submit", wrong)
            tokens(e)
        fails.clear()
        assert tokens(e) == expected


def test_pinned_memory_that_the_device_cannot_reach_gives_the_same_tokens(directory, monkeypatch):
    expected = tokens(engine(directory))
    monkeypatch.setattr("duoserve.link.on_device", lambda *_: None)
    e = engine(directory)
    assert not e.step.capturing and tokens(e) == expected


def test_a_simulated_link_gives_the_same_tokens(directory):
    e = engine(directory, cache_experts=5, simulate_link="100MB/s")
    assert tokens(e) == tokens(engine(directory, cache_experts=24))


def test_nothing_is_compiled_after_loading(directory, compiled):
    e = engine(directory, context=700)
    assert e.step.capturing == compiled
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (1, 2, 9, 31, 600):
            e.generate([1, *(i % 300 for i in range(n - 1))], max_new_tokens=4)
        e.logits([1, *range(40)])


def test_slots_poisoned_when_they_are_reloaded(directory):
    """Whoever reads a slot before its load is complete, or after its eviction, reads NaN."""
    expected = tokens(engine(directory, cache_experts=4))
    e = engine(directory, cache_experts=4)
    send, slots = e.cache.lane.send, e.slots_memory

    def poison(transfer, nbytes):
        lane = e.cache.lane
        if transfer.sent == 0:
            with torch.cuda.stream(lane.stream):
                fetches, use = lane.last_use[transfer.slot]
                if fetches >= lane.known:
                    lane.stream.wait_event(use)
                slots[transfer.slot].fill_(0xFF)
        send(transfer, nbytes)
    e.cache.lane.send = poison
    assert tokens(e) == expected


@torch.inference_mode()
def test_a_last_chunk_withheld_shows(directory):
    expected, e = greedy(engine(directory, cache_experts=3)), engine(directory, cache_experts=3)
    copy = e.cache.lane.copy
    e.cache.lane.copy = lambda transfer, start, stop: stop < transfer.size and copy(transfer, start, stop)
    e.slots_memory.fill_(0xFF)
    assert greedy(e) != expected


def test_close_to_the_cpu(directory):
    gpu = engine(directory, dtype="float32").logits(PROMPT)
    cpu = Engine.from_pretrained(directory, device="cpu", predictor="none").logits(PROMPT)
    assert (gpu - cpu).abs().max() < 1e-3


def test_experts_are_pinned_and_released(directory):
    e = engine(directory)
    assert e.store.pinned and e.store.blocks[0, 0].is_pinned()
    e.store.close()
    assert not e.store.blocks[0, 0].is_pinned()


class Slow:
    """Makes one of the lane's streams run late: whoever does not wait for it reads or writes too early."""

    def __init__(self, e, copies: int = 0, computes: int = 0):
        lane = e.cache.lane
        send, wait = lane.send, lane.wait

        def slow_send(transfer, nbytes):
            with torch.cuda.stream(lane.stream):
                torch.cuda._sleep(copies)
            send(transfer, nbytes)

        def slow_wait(transfer):
            wait(transfer)
            torch.cuda._sleep(computes)     # the slot is read late, long after the host has moved on
        lane.send, lane.wait = slow_send, slow_wait


@pytest.mark.parametrize("delays", ({"copies": 20_000_000}, {"computes": 20_000_000}))        # 11 ms
def test_both_event_waits_matter(directory, delays, monkeypatch):
    expected = greedy(engine(directory, cache_experts=3))
    slow = engine(directory, cache_experts=3)
    Slow(slow, **delays)
    assert greedy(slow) == expected
    broken = engine(directory, cache_experts=3)
    if "copies" in delays:
        monkeypatch.setattr(broken.cache.lane, "wait", lambda transfer: None)
    else:
        monkeypatch.setattr(broken.cache.lane, "used", lambda slots: None)
    Slow(broken, **delays)
    assert greedy(broken) != expected


def test_one_read_a_layer_and_nothing_else(directory):
    e = engine(directory)
    e.generate(PROMPT, max_new_tokens=2)
    token = torch.tensor([5], device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            e._decode(token, len(PROMPT) + 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_with_all_experts_there_a_token_is_enqueued_before_anything_is_read(directory, compiled):
    e, seen = engine(directory, cache_experts=24), []
    e.generate(PROMPT, max_new_tokens=2)
    lane, ((keys, layers),) = e.cache.lane, e.step.layers.items()
    e.step.layers, read = {keys: [lambda run=run: (seen.append("layer"), run()) for run in layers]}, lane.read
    lane.read = lambda fetched: seen.append("read") or read(fetched)
    with torch.inference_mode():
        e._decode(torch.tensor([5], device="cuda"), len(PROMPT) + 1)
    apart = ["read", "layer"] * 3 + ["read"]
    assert seen == (["layer"] * 3 + ["read"] * 4 if compiled else apart)


def test_no_allocation_growth(directory):
    e = engine(directory, context=1024)
    e.generate(PROMPT, max_new_tokens=20)
    before = torch.cuda.memory_reserved()
    e.generate(PROMPT, max_new_tokens=500)
    assert torch.cuda.memory_reserved() == before


def test_registration_that_fails_goes_on_through_a_staging_ring(directory, monkeypatch, capsys):
    expected = tokens(engine(directory))
    runtime = torch.cuda.cudart()

    class Refusing:
        def __getattr__(self, name):
            return (lambda *a: 1) if name == "cudaHostRegister" else getattr(runtime, name)
    monkeypatch.setattr(torch.cuda, "cudart", Refusing)
    e = engine(directory)
    assert not e.store.pinned and "pinned buffer" in capsys.readouterr().err
    assert tokens(e) == expected


@pytest.mark.parametrize("policy", ("duo", "layer-prefetch", "cache"))
def test_experts_on_the_disk_change_nothing(directory, policy):
    """Half in pinned memory and copied directly, half read into the staging ring; then all of them read."""
    expected = tokens(engine(directory, policy=policy))
    for kept in ("50%", "1B"):
        e = engine(directory, policy=policy, cache_experts=4, host_memory=kept)
        assert e.store.crc and e.store.pinned == (kept == "50%")
        assert tokens(e) == expected


def test_sampling_uses_nothing_that_is_not_deterministic():
    logits, generator = torch.randn(32000, device="cuda"), torch.Generator("cuda")
    torch.use_deterministic_algorithms(True)
    try:
        drawn = {sample(logits, SamplingParams(top_k=50, top_p=0.9), generator.manual_seed(5)).item()
                 for _ in range(20)}
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(drawn) == 1


def test_the_lane_reads_as_many_numbers_as_there_are(directory):
    numbers = torch.arange(9000, device="cuda", dtype=torch.float32)
    lane = engine(directory).cache.lane
    assert lane.read(lane.fetch(numbers)).tolist() == list(range(9000))


@pytest.mark.parametrize("group, dtype", CASES)
def test_one_row_has_the_bits_of_the_cpu(group, dtype, compiled):
    run = fused(exact_gemv) if compiled else exact_gemv
    for weights, w in matrices(64, 7 * group, group).items():
        on_gpu = [tensor.cuda() for tensor in w]
        for name, x in rows(7 * group, group, dtype).items():
            assert same(run(x.cuda(), *on_gpu).cpu(), exact_gemv(x, *w)), (weights, name)
            x[0, 9] = torch.inf
            assert run(x.cuda(), *on_gpu).isnan().all(), (weights, name)


@pytest.mark.parametrize("group, dtype", CASES)
def test_an_expert_of_one_row_has_the_bits_of_the_cpu(group, dtype, compiled):
    """Matrix by matrix, and as a decode step runs it: whole, one of several."""
    shape = {"hidden": 2 * group, "ffn": 9 * group}
    cpu, gpu = an_expert(group, **shape), an_expert(group, compile=compiled, **shape).cuda()
    for name, x in rows(2 * group, group, dtype).items():
        expected = cpu(x)
        assert same(gpu(x.cuda()).cpu(), expected), name
        assert same(of_several(gpu, x.cuda(), compiled).cpu(), expected), name


def test_slots_beyond_what_32_bits_count(directory, compiled):
    """One row and several, with an expert that lies more than 2^31 words into the slots' memory."""
    packed_model = PackedModel(directory)
    c, layout = packed_model.config, packed_model.layout
    slots = 2**33 // layout.nbytes + 3
    if slots * layout.nbytes > torch.cuda.mem_get_info()[0] - 2**30:
        pytest.skip("needs 10 GB on the GPU")
    linear = partial(PackedLinear, largest_group=packed_model.largest_group, compile=compiled)
    with torch.inference_mode():
        memory = torch.empty(slots, layout.nbytes, dtype=torch.uint8, device="cuda")
        for slot in (1, slots - 1):
            block = np.empty(layout.nbytes, np.uint8)
            packed_model.read_expert(0, slot % 2, block)
            memory[slot] = torch.from_numpy(block).cuda()
        far = ExpertSlots(c, layout, memory, linear, compiled)
        near = ExpertSlots(c, layout, memory[[0, 1, slots - 1]].clone(), linear, compiled)
        for slot, same_slot in ((1, 1), (slots - 1, 2)):
            for x in (torch.randn(n, c.hidden_size, device="cuda").bfloat16() for n in (1, 5)):
                assert torch.equal(far[slot](x), near[same_slot](x))
        at, x, out = torch.tensor([slots - 1, 1], device="cuda"), torch.randn(1, c.hidden_size).cuda(), []
        for several, at in ((far, at), (near, torch.tensor([2, 1], device="cuda"))):
            out.append(torch.zeros(2, c.hidden_size, dtype=torch.bfloat16, device="cuda"))
            several.run(at, x.bfloat16(), out[-1])
        assert torch.equal(*out) and out[0].abs().sum() > 0


@pytest.mark.parametrize("rows_, columns", [(28672, 4096), (4096, 14336), (6144, 4096)])
def test_one_row_has_the_bits_of_the_cpu_at_real_shapes(rows_, columns, compiled):
    w, run = matrices(rows_, columns, 128)["plain"], fused(exact_gemv) if compiled else exact_gemv
    for name in ("gaussian", "of all sizes"):
        x = rows(columns, 128, torch.bfloat16)[name]
        assert same(run(x.cuda(), *(tensor.cuda() for tensor in w)).cpu(), exact_gemv(x, *w)), name
