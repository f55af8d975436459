"""Everything that a request needs, made ready: taken from the device once, the largest first; compiled; and
on a GPU captured, while threads read the experts."""

import os
from contextlib import ExitStack
from functools import partial

import torch

from .cache import BLOCKS, WHOLE, GPUExpertCache
from .errors import UserError, format_bytes, note, parse_amount
from .experts import ExpertSlots, StreamedExperts
from .host import Host
from .hostcode import compiled_experts, on_threads
from .link import PCIE, CudaLane, chunk_sizes
from .machine import can_compile, enough_memory, set_threads, uncollected, usable_cpus
from .memory import MemoryPlan, choose_kept, plan_memory
from .model import Mixtral, padded
from .options import EngineOptions, check_context
from .packed import PackedModel
from .predictor import open_predictor
from .quant import PackedLinear, gemv
from .scheduler import THOUGHT
from .simulated import SimulatedHost, SimulatedLane, WallClock
from .step import DecodeStep
from .store import ExpertStore, most_used

HOST_WAIT = 10                              # seconds that loading waits for the host to be ready
HOST_HELPS = 2.5                            # how many times as long as the link the host may take for one and
                                            # help (bench/README.md)


class LoadedModel:
    """A model in its place: on the device `model` without its experts, `slots_memory` for some of those, the
    KV cache `kv`, and the compiled `step`; on the host the `store`; between them `cache`, its lane, and the
    `host`, if that computes, too."""

    def __init__(self, packed: PackedModel, options: EngineOptions, progress=None,
                 store: ExpertStore | None = None):
        """As `Engine`."""
        self.packed, self.config, self.options, self.policy = packed, packed.config, options, options.policy
        self.device, self.dtype = options.device, options.dtype
        self.host: Host | SimulatedHost | None = None
        self.host_unused: str | None = None
        c, device, cuda = packed.config, self.device, self.device.type == "cuda"
        set_threads(options.threads or (1 if cuda else None), c)
        if cuda:                            # events are recorded on the current device's streams
            torch.cuda.set_device(device)
            # For the whole process: cuDNN's attention makes a plan for each new length of a prompt, 50 ms.
            torch.backends.cuda.enable_cudnn_sdp(False)
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")        # 8 MiB, not Hopper's 32
            os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "8192")                # (in KiB)
        if options.context is not None:
            check_context(options.context, c.max_position_embeddings)
        self.context = options.context or min(c.max_position_embeddings, 4096)
        with ExitStack() as loading, enough_memory(), uncollected():
            wanted = cuda if options.compile is None else options.compile
            self.compiled = wanted and can_compile(device)
            self.plan = self._make_plan()
            self.tokenizer = packed.tokenizer()
            own = packed.directory / "predictor.safetensors"
            self.predictor = open_predictor(options.predictor, own, packed.fingerprint, c)
            if self.predictor is None and options.predictor != "none" and self.policy == "duo":
                note(f"no {own}; predicting by lookahead alone (train_predictor.py makes one)")
            with torch.inference_mode():    # (tensors of both modes would have each product compiled twice)
                self.store = self._open_store(progress, loading) if store is None else store
                self._load()
                self._warm_up()
                self.host = self._make_host()
                self.fill_slots()
                self._await_host()

    def _make_plan(self) -> MemoryPlan:
        options, total, cuda = self.options, len(self.config.expert_keys), self.device.type == "cuda"
        wanted, budget = options.cache_experts, options.budget(self.packed.nbytes)
        if wanted is not None and wanted > total:
            note(f"--cache-experts {wanted} is more than the model's {total} experts; using {total}")
            wanted = total
        if wanted is None and options.gpu_memory is None and not cuda:
            wanted = max(2, total // 4)
        plan = plan_memory(self.packed, self.dtype, self.context, self.compiled, cuda, budget, wanted)
        if cuda and plan.total > (free := torch.cuda.mem_get_info(self.device)[0]):
            raise UserError(f"--gpu-memory: {format_bytes(plan.total)} are planned and "
                            f"{format_bytes(free)} are free on {self.device}; ask for less (--gpu-memory, "
                            "--cache-experts or --context)")
        return plan

    def _warm_up(self) -> None:
        """Run once what a request runs."""

    def _open_store(self, progress, loading: ExitStack) -> ExpertStore:
        """Begin to read the experts that the host's memory is to hold. However loading ends, that ends."""
        packed, wanted, cuda = self.packed, self.options.host_memory, self.device.type == "cuda"
        nbytes = None if wanted is None else parse_amount(wanted, packed.nbytes, "--host-memory")
        popularity, beside = self.predictor and self.predictor.popularity(), 0 if cuda else self.plan.total
        kept = choose_kept(packed, nbytes, popularity, beside)
        if wanted is not None:
            total = len(self.config.expert_keys)
            rest = "; the others are read from the disk" if len(kept) < total else ""
            note(f"{len(kept)} of {total} experts are kept in memory{rest}")
        bar = progress(len(kept) * packed.layout.nbytes, "loading") if progress else None
        if bar:
            loading.callback(bar.close)
        store = ExpertStore(packed, kept, pin=cuda, progress=bar)
        loading.callback(store.stop)
        return store

    def _load(self) -> None:
        """Take all that the device will hold, once, the largest first; compile."""
        c, packed, device, dtype = self.config, self.packed, self.device, self.dtype
        shape = c.num_hidden_layers, 2, c.num_key_value_heads, padded(self.context), c.head_dim
        self.slots_memory = torch.empty(self.plan.slots, self.plan.expert, dtype=torch.uint8, device=device)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.linear = partial(PackedLinear, largest_group=packed.largest_group, compile=self.compiled)
        with torch.device("meta"):
            self.model = self._make_model(self.linear)
        self.slots = slots = ExpertSlots(c, packed.layout, self.slots_memory, self.linear, self.compiled)
        state = {name: tensor.to(device, dtype if packed.shapes[name][0] == "16" else None)
                 for name, tensor in packed.resident().items()}
        if c.tie_word_embeddings:
            state["head.weight"] = state["embed.weight"]
        self.model.load_state_dict(state, assign=True)
        self.model.requires_grad_(False)
        self.step = DecodeStep(self.model, slots, self.kv, self.compiled)
        if self.step.capturing:             # what a prompt unpacks lies at fixed addresses too
            attention = [m for m in self.model.modules() if isinstance(m, PackedLinear)]
            matrices = [*attention, *slots.matrices]
            largest = max(2 * m.q.shape[-1] * m.parts()[0].stop for m in matrices)
            workspace = torch.empty(largest, dtype=dtype, device=device)
            for matrix in matrices:
                matrix.workspace = workspace
            for module in (*attention, slots):
                module.capture(self.step.capture)
            torch.cuda.empty_cache()        # (what the captures' trial runs took)
        self.store.wait()
        self.cache = GPUExpertCache(self.plan.slots, self.plan.expert, self._lane())
        self.source = StreamedExperts(c, slots, self.cache)

    def _make_model(self, linear) -> Mixtral:
        return Mixtral(self.config, linear)

    def _lane(self) -> CudaLane | SimulatedLane:
        slots, store, nbytes = self.slots_memory, self.store, self.plan.expert
        if self.device.type == "cuda" and not self.options.simulate_link:
            return CudaLane(slots, chunk_sizes(nbytes, PCIE), store)

        def copy(transfer, start, stop):
            start, stop = store.where(transfer.key, start, stop)
            store.fetch(transfer.key, start, slots[transfer.slot, start:stop])

        rate = self.options.simulate_link or 0
        larger, _ = chunk_sizes(nbytes, rate)       # (there handing over a chunk costs nothing)
        return SimulatedLane(WallClock(), rate, larger, copy)

    def _make_host(self) -> Host | SimulatedHost | None:
        """What computes missing experts beside the link, if anything may. (It is not ready yet.)"""
        options, c, packed, store, dtype = self.options, self.config, self.packed, self.store, self.dtype
        layout, linear, compiled = packed.layout, self.linear, self.compiled
        cuda, threads = self.device.type == "cuda", options.host_threads
        if threads == "auto":               # (a shorter transfer is over before anybody has thought)
            worth = cuda and layout.nbytes / PCIE > THOUGHT
            threads = usable_cpus() - 1 if worth else int(bool(options.simulate_host))
        if not threads:
            return None
        if not store.blocks:
            self.host_unused = "all experts are on the disk"
        elif cuda and (not compiled or dtype == torch.float32):
            self.host_unused = "only compiled code in a 16-bit dtype has the GPU's bits"
        elif cuda and not self.step.capturing:
            self.host_unused = "the GPU cannot reach its pinned memory"
        if self.host_unused:
            return None
        keys = list(store.blocks)

        def prepare():                      # (it knows the store, but not the engine: that must be let go)
            x = torch.zeros(1, c.hidden_size, dtype=dtype, device="cpu")          # as in decode: of inference
            if cuda:
                compute, counts = compiled_experts(layout, store.blocks, dtype), {threads, -(-threads // 2)}
            else:
                slots = ExpertSlots(c, layout, store.stacked, linear, compiled)
                index, counts = {key: i for i, key in enumerate(keys)}, {torch.get_num_threads()}

                def compute(key, blocks, x, out):
                    if blocks < WHOLE:
                        slots.first_rows(index[key], blocks, x, out)
                    else:
                        out.copy_(slots[index[key]](x)[0])
            compute(keys[0], WHOLE, x, torch.empty_like(x[0]))      # (compiles)
            return compute, lambda: on_threads(compute, keys, x, torch.empty_like(given), counts)

        given = self.step.given
        block = c.hidden_size // 2 * len(given) // BLOCKS           # its bytes
        host = Host(c.hidden_size, dtype, cuda, store.blocks.keys(), prepare, block, given,
                    self.cache.pump, self.cache.lane.wait_for)
        if not options.simulate_host:
            return host
        return SimulatedHost(self.cache.lane.clock, layout.nbytes / options.simulate_host, block, host)

    def _await_host(self) -> None:
        """Until the host is ready, but not for long: it takes a minute to compile for the first time. Then
        the link is kept at work, as what an expert takes on the host is measured."""
        if self.host is None:
            return
        if not self.host.compiled.wait(HOST_WAIT):
            note("the host's own code is being compiled, once: a minute or so; until then it computes no "
                 "experts, and a prompt may have to wait for some seconds")
            return
        while not self.host.ready.wait(0 if self.device.type == "cuda" else None):
            self.cache.empty()
            self.cache.fill(list(self.store.blocks))                # (never from the disk)
        self.fill_slots()

    def _decoding_host(self) -> Host | SimulatedHost | None:
        """The host, if it is ready and worth its while on this machine, or if it was asked for. Where it will
        compute nothing, `host_unused` says why."""
        host, options = self.host, self.options
        if host is None:
            return None
        link_s, self.host_unused = self.cache.transfer_s(), host.trouble()
        if self.host_unused:
            return None
        if link_s <= THOUGHT:               # (nor will the scheduler ask it)
            self.host_unused = "an expert crosses the link faster than that could be decided"
        if options.host_threads != "auto" or options.simulate_host or host.seconds() <= HOST_HELPS * link_s:
            return host
        each, link = 1e3 * host.seconds(), 1e3 * link_s
        self.host_unused = f"an expert takes {each:.1f} ms there, {link:.1f} over the link"
        return None

    @torch.inference_mode()
    def fill_slots(self) -> None:
        """Between requests: in the slots what the predictor's traces used most (or else, layer by layer)."""
        self.cache.fill(most_used(self.config.expert_keys, self.predictor and self.predictor.popularity()))

    def peak_bytes(self) -> int:
        """The most device memory ever held: reserved by torch on CUDA, by the plan on the CPU."""
        return torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else self.plan.total


def same_bits(matrix: PackedLinear, dtype: torch.dtype) -> bool:
    """Has one row in 16 bits the bits on the matrix's device that it has on the host? (With some rows of the
    matrix, as each is computed by itself.)"""
    rows, columns = len(matrix.q), 2 * matrix.q.shape[-1]
    x, some = torch.linspace(-1, 1, columns, dtype=dtype, device="cpu")[None], max(1, rows // 64)
    there = gemv(x, *(tensor[::some].cpu() for tensor in (matrix.q, matrix.scale, matrix.zero)))
    here = matrix(x.to(matrix.q.device))[:, ::some].cpu()
    return torch.allclose(here, there, rtol=0, atol=0, equal_nan=True)
