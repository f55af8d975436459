"""4-bit and consolidated checkpoints, built here from their public definitions, one nibble at a time.

AWQ: AutoAWQ, `WQLinear_GEMM.from_linear` and `dequantize_gemm`. GPTQ: AutoGPTQ, `qlinear_cuda_old.py` (`pack`
stores zeros - 1, `forward` adds 1 to the nibble). Consolidated: mistral-inference and transformers'
conversion of it.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from models import tokenizer_model, write_hf
from safetensors.torch import load_file, save_file

from duoserve.checkpoint import formats
from duoserve.checkpoint import convert, ensure_packed, open_source, to_hf
from duoserve.errors import UserError
from duoserve.packed import PackedModel
from duoserve.quant import dequantize, group_size
from duoserve.quantize import quantize

SHAPE = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_local_experts=3, head_dim=64)
ATTENTION, EXPERTS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("w1", "w2", "w3")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True,
       "modules_to_not_convert": ["gate"]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": False}
GATE = "model.layers.0.block_sparse_moe.gate"
W1, O = "model.layers.0.block_sparse_moe.experts.1.w1", "model.layers.0.self_attn.o_proj"


def words(nibbles):
    """Eight arrays of nibbles, the lowest first -> int32."""
    word = np.zeros(nibbles[0].shape, np.uint32)
    for i, nibble in enumerate(nibbles):
        word |= nibble.astype(np.uint32) << np.uint32(4 * i)
    return torch.from_numpy(word.view(np.int32))


def write_quantised(path, config, modules=ATTENTION + EXPERTS, extra=True, **shape):
    """A random model with `modules` in 4 bits. Returns its tensors, and each quantised weight in fp16."""
    state = write_hf(path, dtype=torch.float16, **SHAPE | shape)
    rng, true, awq = np.random.RandomState(5), {}, config["quant_method"] == "awq"
    for name in [name for name in state if name.split(".")[-2] in modules]:
        out, columns = state.pop(name).shape
        group = columns if config["group_size"] == -1 else config["group_size"]
        groups, module = columns // group, name.removesuffix(".weight")
        q = rng.randint(0, 16, (columns, out))
        z = np.full((groups, out), 8) if config.get("sym") else rng.randint(0, 16, (groups, out))
        s = (rng.randn(groups, out) / 100).astype(np.float16)
        s[0, :4] = 6e-8, 1e-5, 65504, -0.0                          # subnormal, and some products beyond fp16
        zeros = z
        if not awq and config.get("checkpoint_format") != "gptq_v2":
            z = z + 1 if not config.get("sym") else z               # what a nibble 15 stands for is 16
            zeros = z - 1
        order = AWQ_ORDER if awq else range(8)
        qweight = [q[:, i::8] for i in order] if awq else [q[i::8] for i in range(8)]
        state |= {f"{module}.qweight": words(qweight),
                  f"{module}.qzeros": words([zeros[:, i::8] for i in order]),
                  f"{module}.scales": torch.from_numpy(s)}
        if extra and not awq:                                       # as AutoGPTQ writes them
            state[f"{module}.g_idx"] = torch.arange(columns, dtype=torch.int32) // group
            state[f"{module}.bias"] = torch.zeros(out, dtype=torch.float16)
        with np.errstate(over="ignore"):
            weight = (q - np.repeat(z, group, 0)).astype(np.float16) * np.repeat(s, group, 0)
        assert weight.dtype == np.float16
        true[name] = torch.from_numpy(weight.T.copy())
    save_file(state, path / "model.safetensors")
    configure(path, config)
    return state, true


def configure(path, config):
    raw = json.loads((path / "config.json").read_text()) | {"quantization_config": config}
    (path / "config.json").write_text(json.dumps(raw))


def there_and_back(path, group=128):
    """Convert path/src; what `to_hf` makes of it."""
    convert(path / "src", path / "packed", group)
    to_hf(path / "packed", path / "back")
    return {name: w for file in (path / "back").glob("*.safetensors") for name, w in load_file(file).items()}


def refused(path, *said):
    with pytest.raises(UserError) as error:
        convert(path / "src", path / "out")
    message = str(error.value)
    assert not [word for word in said if word not in message] and "\n" not in message, message
    assert not (path / "out").exists()


def same(a, b):
    """Bit for bit, signs of zero included."""
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize("config, ours", [
    (AWQ, 128), (AWQ, 32), (AWQ | {"group_size": 64, "version": "GEMM"}, 128),
    (AWQ | {"group_size": 32}, 128),
    (GPTQ, 128), (GPTQ, 64), (GPTQ | {"group_size": 64}, 128), (GPTQ | {"group_size": 32}, 64),
    (GPTQ | {"group_size": -1}, 128), (GPTQ | {"group_size": -1}, 32), (GPTQ | {"sym": True}, 128),
    (GPTQ | {"checkpoint_format": "gptq"}, 128), (GPTQ | {"checkpoint_format": "gptq_v2"}, 128),
    (GPTQ | {"checkpoint_format": "gptq_v2", "group_size": -1, "desc_act": None}, 128)])
def test_four_bits_are_repacked_without_changing_one(tmp_path, config, ours):
    state, true = write_quantised(tmp_path / "src", config)
    back = there_and_back(tmp_path, ours)
    assert len(true) == 4 + 3 * 3
    for name, weight in back.items():
        assert same(weight.half(), true[name] if name in true else state[name]), name
    theirs = config["group_size"] if config["group_size"] > 0 else 128
    assert PackedModel(tmp_path / "packed").manifest["group_size"] == min(theirs, ours)
    written = json.loads((tmp_path / "back/config.json").read_text())
    assert "quantization_config" not in written and written["hidden_size"] == 128
    assert ensure_packed(tmp_path / "src", tmp_path).name.startswith("src-")


def test_what_a_checkpoint_leaves_in_16_bits_is_quantised_as_always(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK", 1000)                     # several blocks of rows, even here
    state, true = write_quantised(tmp_path / "src", AWQ | {"group_size": 64}, EXPERTS + ("v_proj",))
    back = there_and_back(tmp_path)
    for name in back:
        if name in true:
            assert same(back[name].half(), true[name]), name
        elif name.split(".")[-2] in ATTENTION:
            w = state[name]
            assert torch.equal(back[name], dequantize(*quantize(w, group_size(w.shape[1], 64)))), name


def test_without_the_extras_and_in_shards_it_is_the_same(tmp_path):
    state, _ = write_quantised(tmp_path / "a/src", GPTQ)
    write_quantised(tmp_path / "b/src", GPTQ, extra=False)
    (tmp_path / "b/src/model.safetensors").unlink()
    names, where = sorted(name for name in state if not name.endswith((".bias", ".g_idx"))), {}
    for i in (0, 1):                                    # a matrix's three tensors in different files
        save_file({name: state[name] for name in names[i::2]}, tmp_path / f"b/src/part-{i}.safetensors")
        where |= dict.fromkeys(names[i::2], f"part-{i}.safetensors")
    (tmp_path / "b/src/model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    a, b = there_and_back(tmp_path / "a"), there_and_back(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


OTHER_PACKINGS = [
    ({"quant_method": "bitsandbytes"}, "'bitsandbytes'"), ({"quant_method": "fp8"}, "'fp8'"),
    ({"quant_method": "compressed-tensors", "bits": 4}, "'compressed-tensors'"), ({"bits": 4}, "None"),
    ("x", "'x'"),
    (AWQ | {"bits": 8}, "bits 8"), (AWQ | {"version": "gemv"}, "version 'gemv'"),
    (AWQ | {"version": "marlin"}, "version 'marlin'"), (AWQ | {"version": "exllama"}, "version 'exllama'"),
    (AWQ | {"zero_point": False}, "zero_point False"), (AWQ | {"group_size": 16}, "group_size 16"),
    (GPTQ | {"bits": 3}, "bits 3"), (GPTQ | {"bits": [4]}, "bits [4]"),
    (GPTQ | {"desc_act": True}, "desc_act True"),
    (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    (GPTQ | {"is_marlin_format": True}, "is_marlin_format True"),
    (GPTQ | {"group_size": 96}, "group_size 96"),
    (GPTQ | {"group_size": 0}, "group_size 0"), (GPTQ | {"group_size": "128"}, "group_size '128'"),
    (GPTQ | {"group_size": True}, "group_size True")]


def test_other_packings_are_refused_by_name(tmp_path):
    write_quantised(tmp_path / "src", GPTQ)
    for config, said in OTHER_PACKINGS:
        configure(tmp_path / "src", config)
        refused(tmp_path, "config.json", "quantization_config", said, "16-bit model")


def changed(name, change):
    return lambda state: state | {name: change(state[name])}


@pytest.mark.parametrize("config, change, said", [
    (AWQ, changed(f"{W1}.qweight", lambda t: t[:-1]), (f"{W1}.qweight", "[127, 32]", "[128, 32]")),
    (GPTQ, changed(f"{W1}.qweight", lambda t: t.T.contiguous()), (f"{W1}.qweight", "[256, 16]", "[16, 256]")),
    (GPTQ, changed(f"{O}.qzeros", lambda t: t.repeat(2, 1)), (f"{O}.qzeros", "[4, 16]", "[2, 16]")),
    (AWQ, changed(f"{O}.scales", lambda t: t[:, :-8].clone()), (f"{O}.scales", "[2, 120]")),
    (AWQ, changed(f"{O}.scales", lambda t: t.bfloat16()), (f"{O}.scales", "bfloat16", "float16 is expected")),
    (GPTQ, changed(f"{W1}.qweight", lambda t: t.short()), (f"{W1}.qweight", "int16", "int32 is expected")),
    (AWQ, lambda s: {n: t for n, t in s.items() if n != f"{W1}.qzeros"}, (f"{W1}.qzeros", "missing")),
    (AWQ, lambda s: {n: t for n, t in s.items() if n != f"{W1}.qweight"}, (f"{W1}.weight", "missing")),
    (GPTQ, changed(f"{O}.g_idx", lambda t: t.flip(0)), (f"{O}.g_idx", "desc_act", "16-bit")),
    (GPTQ, changed(f"{O}.g_idx", lambda t: t[:-1].clone()), (f"{O}.g_idx", "[255]")),
    (GPTQ, changed(f"{W1}.bias", lambda t: t + 1), (f"{W1}.bias", "no biases")),
    (AWQ, lambda s: s | {f"{GATE}.qweight": s.pop(f"{GATE}.weight")},
     (f"{GATE}.weight", "qweight", "16 bits")),
    (AWQ, lambda s: s | {"lm_head.qweight": s.pop("lm_head.weight")}, ("lm_head.qweight", "16 bits")),
    (AWQ, lambda s: s | {f"{W1}.weight": torch.ones(256, 128)}, (f"{W1}.weight", "no place"))])
def test_each_tensor_is_checked_before_the_first_is_converted(tmp_path, config, change, said):
    state, _ = write_quantised(tmp_path / "src", config)
    save_file(change(dict(state)), tmp_path / "src/model.safetensors")
    refused(tmp_path, "model.safetensors: ", *said)


def test_groups_that_do_not_fit_scales_that_are_no_numbers_and_a_lost_config(tmp_path):
    state, _ = write_quantised(tmp_path / "src", GPTQ | {"group_size": 64})
    configure(tmp_path / "src", GPTQ | {"group_size": 128})         # not what the files hold
    refused(tmp_path, "qzeros", "[2, 32]", "[1, 32]")
    configure(tmp_path / "src", GPTQ | {"group_size": 256})
    refused(tmp_path, "q_proj", "256 by 128", "group_size 256")
    configure(tmp_path / "src", None)
    refused(tmp_path, "q_proj.weight", "qweight", "no quantization_config")
    configure(tmp_path / "src", GPTQ | {"group_size": 64})
    state[f"{W1}.scales"][0, 0] = float("nan")
    save_file(state, tmp_path / "src/model.safetensors")
    with pytest.raises(UserError, match=f"model.safetensors: {W1}.scales holds"):
        convert(tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()


# Mistral's own layout

PARAMS = {"dim": 128, "n_layers": 2, "head_dim": 24, "hidden_dim": 96, "n_heads": 4, "n_kv_heads": 2,
          "norm_eps": 1e-5, "vocab_size": 320, "rope_theta": 10000.0,
          "moe": {"num_experts_per_tok": 2, "num_experts": 3}}


def interleaved(w, head_dim):
    """Half-split rows (x0 of each pair, then x1 of each) -> neighbours (x0, x1, x0, x1, ...)."""
    out = torch.empty_like(w)
    for head in range(0, len(w), head_dim):
        for j in range(head_dim // 2):
            out[head + 2 * j], out[head + 2 * j + 1] = w[head + j], w[head + j + head_dim // 2]
    return out


def write_consolidated(path, layout, params=PARAMS):
    """One random model as path/hf, Hugging Face's layout, and path/src, Mistral's; the latter's tensors."""
    hf = write_hf(path / "hf", hidden_size=128, intermediate_size=96, num_hidden_layers=2,
                  num_local_experts=3, head_dim=24)
    state = {"tok_embeddings.weight": hf["model.embed_tokens.weight"], "norm.weight": hf["model.norm.weight"],
             "output.weight": hf["lm_head.weight"]}
    for i in range(2):
        old, new = f"model.layers.{i}.", f"layers.{i}."
        moe = f"{new}block_sparse_moe." if layout == "stacked" else f"{new}feed_forward."
        state |= {f"{new}attention.wq.weight": interleaved(hf[f"{old}self_attn.q_proj.weight"], 24),
                  f"{new}attention.wk.weight": interleaved(hf[f"{old}self_attn.k_proj.weight"], 24),
                  f"{new}attention.wv.weight": hf[f"{old}self_attn.v_proj.weight"],
                  f"{new}attention.wo.weight": hf[f"{old}self_attn.o_proj.weight"],
                  f"{new}attention_norm.weight": hf[f"{old}input_layernorm.weight"],
                  f"{new}ffn_norm.weight": hf[f"{old}post_attention_layernorm.weight"],
                  f"{moe}gate.weight": hf[f"{old}block_sparse_moe.gate.weight"]}
        for w in EXPERTS:
            each = [hf[f"{old}block_sparse_moe.experts.{e}.{w}.weight"] for e in range(3)]
            if layout == "stacked":
                state[f"{moe}{w}"] = torch.cat([part.T if w == "w2" else part for part in each])
            else:
                state |= {f"{moe}experts.{e}.{w}.weight": part for e, part in enumerate(each)}
    (path / "src").mkdir()
    (path / "src/params.json").write_text(json.dumps(params))
    (path / "src/tokenizer.model").write_bytes(tokenizer_model())
    save_file({name: w.contiguous() for name, w in state.items()}, path / "src/consolidated.safetensors")
    return state


def packed_tensors(path):
    return {(file.name, name): w
            for file in sorted(path.glob("*.safetensors")) for name, w in load_file(file).items()}


@pytest.mark.parametrize("layout", ["per expert", "stacked", "three files"])
def test_consolidated_gives_the_same_bytes_as_hugging_faces(tmp_path, layout):
    state = write_consolidated(tmp_path, layout)
    if layout == "three files":
        (tmp_path / "src/consolidated.safetensors").unlink()
        for i in range(3):
            part = {name: w.contiguous() for name, w in list(state.items())[i::3]}
            save_file(part, tmp_path / f"src/consolidated.{i:02d}.safetensors")
        (tmp_path / "src/tokenizer.model").rename(tmp_path / "src/tokenizer.model.v3")
    (tmp_path / "src/consolidated.00.pt").write_bytes(b"not looked at")
    convert(tmp_path / "hf", tmp_path / "expected")
    convert(tmp_path / "src", tmp_path / "packed")
    expected, packed = packed_tensors(tmp_path / "expected"), packed_tensors(tmp_path / "packed")
    assert expected.keys() == packed.keys()
    assert all(torch.equal(expected[name].view(torch.uint8), packed[name].view(torch.uint8))
               for name in packed)
    assert (tmp_path / "packed/tokenizer.model").read_bytes() == tokenizer_model()
    a, b = (PackedModel(tmp_path / name).config for name in ("expected", "packed"))
    assert a == type(a)(**vars(b) | {"max_position_embeddings": 256}) and b.max_position_embeddings == 32768
    to_hf(tmp_path / "packed", tmp_path / "back")


def test_the_order_of_rows_is_that_of_each_rope():
    """Mistral rotates neighbours as complex numbers (rope.py), Hugging Face halves; the scores must agree."""
    rng, A = np.random.RandomState(0), 24
    wq, wk, x = rng.randn(A, 16), rng.randn(A, 16), rng.randn(2, 16)
    angles = np.outer((3, 11), 10000.0 ** (-np.arange(0, A, 2) / A))

    def neighbours(w):
        y = (x @ w.T).reshape(2, -1, 2)
        return ((y[..., 0] + 1j * y[..., 1]) * np.exp(1j * angles)).view(np.float64).reshape(2, A)

    def halves(w):
        y, cos, sin = x @ w.T, np.cos(angles), np.sin(angles)
        y0, y1 = y[:, :A // 2], y[:, A // 2:]
        return np.concatenate((y0 * cos - y1 * sin, y1 * cos + y0 * sin), 1)

    mixed = [interleaved(torch.from_numpy(w), A).numpy() for w in (wq, wk)]
    scores = neighbours(mixed[0])[0] @ neighbours(mixed[1])[1]
    assert np.isclose(scores, halves(wq)[0] @ halves(wk)[1])


def test_what_params_json_says(tmp_path):
    write_consolidated(tmp_path, "stacked", {key: PARAMS[key] for key in PARAMS if key != "rope_theta"}
                       | {"sliding_window": "64", "max_seq_len": 512})
    config = open_source(tmp_path / "src").config
    assert (config.rope_theta, config.sliding_window, config.max_position_embeddings) == (1e6, 64, 512)
    assert config.num_experts_per_tok == 2 and config.num_local_experts == 3


@pytest.mark.parametrize("text, said", [
    ("{", "not a Mixtral's"), ("[]", "not a Mixtral's"),
    (json.dumps(PARAMS | {"moe": None}), "not a Mixtral's"),
    (json.dumps({key: PARAMS[key] for key in PARAMS if key != "moe"}), "'moe'"),
    (json.dumps({key: PARAMS[key] for key in PARAMS if key != "n_layers"}), "no n_layers"),
    (json.dumps(PARAMS | {"moe": {"num_experts": 3}}), "no num_experts_per_tok"),
    (json.dumps(PARAMS | {"n_heads": None}), "no n_heads"),
    (json.dumps(PARAMS | {"dim": "128"}), "hidden_size"),
    (json.dumps(PARAMS | {"sliding_window": "9" * 5000}), "not a Mixtral's"),
    (json.dumps(PARAMS | {"n_layers": 1}), "no place"),
    (json.dumps(PARAMS | {"hidden_dim": 64}),
     "experts.0.w1.weight has shape [96, 128], by params.json [64, 128]")])
def test_params_that_are_damaged_or_of_another_model(tmp_path, text, said):
    write_consolidated(tmp_path, "per expert")
    (tmp_path / "src/params.json").write_text(text)
    refused(tmp_path, "params.json", said)


def test_consolidated_files_that_cannot_be_used(tmp_path):
    state, src = write_consolidated(tmp_path, "stacked"), tmp_path / "src"
    state = {name: w.contiguous() for name, w in state.items()}
    w1 = "layers.1.block_sparse_moe.w1"
    save_file(state | {w1: state[w1][:-1].clone()}, src / "consolidated.safetensors")
    refused(tmp_path, "consolidated.safetensors", w1, "[287, 128]", "[288, 128]")
    save_file(state | {w1: state[w1].to(torch.int8)}, src / "consolidated.safetensors")
    refused(tmp_path, "consolidated.safetensors", "layers.1.feed_forward.experts.0.w1.weight", "int8")
    save_file({name: w for name, w in state.items() if name != w1}, src / "consolidated.safetensors")
    refused(tmp_path, "layers.1.feed_forward.experts.0.w1.weight", "missing")
    save_file({name: w for name, w in state.items() if "wk" not in name}, src / "consolidated.safetensors")
    refused(tmp_path, "layers.0.attention.wk.weight", "missing")
    save_file(state, src / "consolidated.safetensors")
    save_file({"norm.weight": state["norm.weight"]}, src / "consolidated.01.safetensors")
    refused(tmp_path, "norm.weight", "consolidated.01.safetensors", "several GPUs")
    (src / "consolidated.01.safetensors").unlink()
    (src / "tokenizer.model").rename(src / "tekken.json")
    refused(tmp_path, "no tokenizer.model", "only tekken.json")
    (src / "params.json").unlink()
    refused(tmp_path, "params.json", "get it too")


@pytest.mark.parametrize("name, said", [("consolidated.00.pt", "nothing is ever unpickled"),
                                        ("pytorch_model.bin", "nothing is ever unpickled"),
                                        ("mixtral-8x7b.Q4_K_M.gguf", "16-bit model")])
def test_files_of_other_kinds_alone(tmp_path, name, said):
    Path(tmp_path / "src").mkdir()
    (tmp_path / "src" / name).write_bytes(b"x")
    refused(tmp_path, name, said)
