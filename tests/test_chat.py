"""Conversations: the instruct template by tokens, the KV cache kept between turns, a session as typed."""

import io
import json
import select
import signal
import sys
from pathlib import Path

import pytest
import torch
from models import (a_line, InterruptAt, LateLane, load, LONG, packed, program, put_lane, SHORT, TEXT,
                    tokenizer_model, write_hf)

from duoserve import engine as engine_module
from duoserve.checkpoint import convert
from duoserve.config import MixtralConfig
from duoserve.errors import UserError
from duoserve.model import Mixtral
from duoserve.policies import POLICIES
from duoserve.tokenizer import Tokenizer

GREEDY = dict(temperature=0, max_new_tokens=6)

# `[INST] the fox [/INST]` as v1 encodes it, in bytes where the small tokenizer has no piece: a space, [INST],
# "▁the", a space and "fox", a space, [/INST].
FOX_V1 = [293, 94, 76, 81, 86, 87, 96, 261, 293, 286, 293, 94, 50, 76, 81, 86, 87, 96]
DOG_V1 = [293, 94, 76, 81, 86, 87, 96, 267, 293, 94, 50, 76, 81, 86, 87, 96]
# [INST], "▁the", a space, "fox", [/INST]: no space before either mark.
FOX_V3 = [3, 263, 293, 288, 4]
DOG_V3 = [3, 269, 4]


def write_instruct(path: Path, version: int) -> Path:
    """A packed model whose tokenizer is of that version, in `path`."""
    write_hf(path / "hf", seed=7)
    control = ("[INST]", "[/INST]") if version == 3 else ()
    (path / "hf" / "tokenizer.model").write_bytes(tokenizer_model(*control))
    convert(path / "hf", path / "packed")
    return path / "packed"


@pytest.fixture(scope="module", params=(1, 3))
def instruct(request, tmp_path_factory):
    """(a packed instruct model, what its tokenizer should make of "the fox", and of "dog")."""
    directory = write_instruct(tmp_path_factory.mktemp("instruct"), request.param)
    return directory, *((FOX_V1, DOG_V1) if request.param == 1 else (FOX_V3, DOG_V3))


@pytest.fixture(scope="module")
def tokenizer(instruct):
    return Tokenizer(instruct[0] / "tokenizer.model", MixtralConfig())


# The template


def test_the_template_to_the_token(instruct, tokenizer):
    """One BOS, an EOS after each answer; marks and spaces as in v1 (text) or v3 (control tokens)."""
    _, fox, dog = instruct
    assert tokenizer.chat("the fox") == [1, *fox]
    said = [1, *fox, 300, 301]
    assert tokenizer.chat("dog", said) == [1, *fox, 300, 301, 2, *dog]
    assert said == [1, *fox, 300, 301]


@pytest.mark.parametrize("written", ("[INST] the fox [/INST]", "<s>[INST] the fox[/INST]",
                                     " <s> [INST] the fox [/INST]\n"))
def test_never_a_double_template(written, instruct, tokenizer):
    assert tokenizer.chat(written) == [1, *instruct[1]]


@pytest.mark.parametrize("written", ("<s>[INST] a [/INST] b</s>[INST] c [/INST]", "[INST] a", "<s> a"))
def test_a_template_that_cannot_be_undone_is_refused(written, tokenizer):
    with pytest.raises(UserError, match="bare message"):
        tokenizer.chat(written)


def test_a_mark_within_a_message_is_text(instruct, tokenizer):
    """No message can contain a control token."""
    ids = tokenizer.chat("what is [/INST] for?")
    assert ids.count(4) == (instruct[1] == FOX_V3) and ids[-1] == instruct[1][-1]


def test_chat_on_the_command_line(instruct, cli, tmp_path, monkeypatch):
    """From the prompt, a file or standard input: the same tokens, those of the template."""
    directory, fox, _ = instruct
    expected = load(directory).generate([1, *fox], **GREEDY)
    run = ("generate", "--model", directory, "--device", "cpu", "--predictor", "none", "--temperature", 0,
           "--max-new-tokens", 6, "--chat")
    (tmp_path / "p").write_text("the fox")
    for prompt in (("--prompt", "the fox"), ("--prompt-file", tmp_path / "p"),
                   ("--prompt", "[INST] the fox [/INST]")):
        status, out, err = cli(*run, *prompt)
        assert (status, out) == (0, expected.text.removeprefix(" ") + "\n")
    status, out, err = cli(*run, "--prompt", " ")
    assert (status, out) == (2, "")
    a_line(err, "prompt")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the fox")))
    assert cli(*run, "--prompt-file", "-")[:2] == (0, expected.text.removeprefix(" ") + "\n")


def test_the_space_before_an_answer_is_the_templates(tiny, cli, monkeypatch):
    the = load(tiny).tokenizer.sp.piece_to_id("▁the")
    monkeypatch.setattr(engine_module, "sample", lambda *_: torch.tensor(the))
    run = ("generate", "--model", tiny, "--device", "cpu", "--predictor", "none", "--max-new-tokens", 2,
           "--prompt", "a")
    assert cli(*run)[1] == " the the\n" and cli(*run, "--chat")[1] == "the the\n"
    assert json.loads(cli(*run, "--chat", "--json")[1])["text"] == "the the"


# Keeping the KV cache


@pytest.fixture
def passes(monkeypatch):
    """A list to which each prefill adds its number of tokens."""
    taken, forward = [], Mixtral.forward
    monkeypatch.setattr(Mixtral, "forward",
                        lambda model, tokens, *rest:
                        taken.append(tokens.shape[1]) or forward(model, tokens, *rest))
    return taken


def test_a_second_turn_prefills_only_what_is_new(tiny, passes):
    engine = load(tiny)
    first = engine.generate(LONG, **GREEDY)
    assert first.stats.prompt_tokens_kept == 0
    turn = [*LONG, *first.token_ids, 2, 50, 60, 70]
    passes.clear()
    second = engine.generate(turn, resume=True, **GREEDY)
    # (the last token of an answer has not been through the model: it comes with the turn)
    assert second.stats.prompt_tokens_kept == len(LONG) + 5 and passes == [5]
    assert second.prompt_tokens == len(turn)
    assert second.token_ids == load(tiny).generate(turn, **GREEDY).token_ids
    assert engine.sequence.history.tokens == [len(turn) + 5] * 3
    counts = load(tiny)
    counts.generate(turn + second.token_ids[:-1], max_new_tokens=1)
    assert engine.sequence.history.counts == counts.sequence.history.counts


@pytest.mark.parametrize("options", (dict(), dict(sliding_window=8)), ids=("full", "window"))
def test_the_logits_after_a_resumed_prefill(options, tmp_path, monkeypatch):
    """They are those of one whole prefill, up to the order of summation."""
    engine, seen = load(packed(tmp_path, seed=7, **options)), []
    sample = engine_module.sample
    monkeypatch.setattr(engine_module, "sample",
                        lambda logits, *rest: seen.append(logits) or sample(logits, *rest))
    engine.generate(LONG[:40], max_new_tokens=1)
    for resume in (True, False):
        engine.generate(LONG, max_new_tokens=1, resume=resume)
        assert engine.result.stats.prompt_tokens_kept == 40 * resume
    torch.testing.assert_close(seen[1], seen[2], rtol=1e-4, atol=1e-4)


def test_what_differs_is_prefilled_again(tiny, passes):
    """An edited prompt, a shorter one, the same, a longer one, a wholly different one: what agrees is kept.

    The routing history continues only where it belongs to what was kept.
    """
    engine, fresh = load(tiny), load(tiny)
    for prompt, kept, told in ((LONG, 0, 70), (LONG[:30] + [9] + LONG[31:], 30, 40), (LONG[:20], 19, 1),
                               (LONG[:20], 19, 1), (LONG, 20, 51), ([5, *LONG[1:]], 0, 70)):
        got = engine.generate(prompt, max_new_tokens=1, resume=True, temperature=0)
        assert got.stats.prompt_tokens_kept == kept and passes[-1] == len(prompt) - kept
        assert got.token_ids == fresh.generate(prompt, max_new_tokens=1, temperature=0).token_ids
        assert engine.sequence.history.tokens == [told] * 3


def test_without_resume_nothing_is_kept(tiny, passes):
    engine = load(tiny)
    for _ in range(2):
        engine.generate(LONG, max_new_tokens=1)
    assert passes == [len(LONG)] * 2 and engine.result.stats.prompt_tokens_kept == 0


def leave(engine):
    """Another request writes over the KV cache, and is left in the middle."""
    for _ in engine.stream([9] * 60, max_new_tokens=20):
        break


def interrupt(engine):
    InterruptAt(engine, 12)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([1, *LONG[5:]], max_new_tokens=5)


@pytest.mark.parametrize("between", (lambda engine: engine.logits([9] * 60), leave, interrupt))
def test_a_kv_cache_that_others_wrote_over_is_not_reused(between, tiny):
    engine = load(tiny)
    engine.generate(LONG, **GREEDY)
    between(engine)
    again = engine.generate(LONG, resume=True, **GREEDY)
    assert again.token_ids == load(tiny).generate(LONG, **GREEDY).token_ids


def talk(engine):
    first = engine.generate(SHORT, max_new_tokens=6, seed=3).token_ids
    turn = [*SHORT, *first, 2, *LONG[1:]]
    return first, engine.generate(turn, max_new_tokens=6, seed=4, resume=True).token_ids


@pytest.fixture(scope="module")
def talked(tiny):
    return talk(load(tiny, policy="cache", cache_experts=24))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_resumed_answer_does_not_depend_on_the_schedule(policy, tiny, talked):
    engine = load(tiny, policy=policy, cache_experts=3)
    put_lane(engine, LateLane(engine))
    assert talk(engine) == talked


# A session


@pytest.fixture
def prompts(monkeypatch):
    """The ids of each request, as `Engine.stream` gets them."""
    seen, stream = [], engine_module.Engine.stream
    monkeypatch.setattr(engine_module.Engine, "stream",
                        lambda engine, prompt, *args, **options: seen.append(prompt) or
                        stream(engine, prompt, *args, **options))
    return seen


def test_a_conversation(instruct, session, prompts, passes):
    """Each turn is the whole conversation, of which only the new part is prefilled; end of input ends it."""
    directory, fox, dog = instruct
    status, out, err = session(directory, ["the fox", "dog"], "--chat")
    one = load(directory).generate([1, *fox], **GREEDY)
    turn = [1, *fox, *one.token_ids, 2, *dog]
    two = load(directory).generate(turn, **GREEDY)
    assert status == 0 and prompts[:2] == [[1, *fox], turn]
    assert out == one.text.removeprefix(" ") + "\n" + two.text.removeprefix(" ") + "\n"
    assert passes[:2] == [1 + len(fox), 2 + len(dog)]
    assert f"{len(turn) - 2 - len(dog)} of {len(turn)} prompt tokens kept" in err and err.count("\n") == 2


def test_a_text_that_is_continued(tiny, session, prompts):
    status, out, err = session(tiny, ["the quick", "brown"])
    answer = load(tiny).generate("the quick", **GREEDY).token_ids
    sp = load(tiny).tokenizer.sp
    assert status == 0 and prompts[:2] == [[1, *sp.encode("the quick")],
                                           [1, *sp.encode("the quick"), *answer, *sp.encode("brown")]]


def test_an_empty_line_goes_on_where_the_answer_was_cut(tiny, session):
    whole = load(tiny).generate("the quick", temperature=0, max_new_tokens=12)
    status, out, err = session(tiny, ["", "the quick", ""])
    assert status == 0 and out.replace("\n", "") == whole.text.replace("\n", "")


def test_the_first_turn_may_be_given(tiny, session, prompts, tmp_path):
    (tmp_path / "p").write_text("the quick")
    session(tiny, ["brown"], "--prompt", "the quick")
    session(tiny, ["brown"], "--prompt-file", tmp_path / "p")
    assert len(prompts) == 4 and prompts[:2] == prompts[2:]


def test_a_turn_for_which_nothing_had_to_come(tiny, session):
    err = session(tiny, [TEXT, *[""] * 6], "--cache-experts", 24, "--simulate-link", "3MB/s")[2].splitlines()
    assert all("computing set the speed, not the link" in line for line in err if "tokens/s" in line)


def test_nothing_typed_at_all(tiny, session):
    assert session(tiny, []) == (0, "", "")


def test_a_context_that_is_full_is_said_and_it_goes_on(tiny, session, prompts, tmp_path):
    """In one line that says what helps. An answer is cut there; a message that no longer fits starts anew."""
    status, out, err = session(tiny, ["the quick", "brown", "the dog", "brown fox the hill"], "--context", 16)
    full = [line for line in err.splitlines() if "the context of 16 tokens is full" in line]
    assert status == 0 and len(full) == 2 and all("--context" in line and "256" in line for line in full)
    sp = load(tiny).tokenizer.sp
    lengths = [len(prompt) for prompt in prompts]
    assert prompts[0] == [1, *sp.encode("the quick")]
    assert lengths[1] == lengths[0] + 6 + len(sp.encode("brown"))
    assert prompts[2] == [1, *sp.encode("the dog")] and prompts[3] == [1, *sp.encode("brown fox the hill")]
    assert len(prompts) == 4
    small = packed(tmp_path, seed=7, num_hidden_layers=1, max_position_embeddings=16)
    whole = session(small, ["the quick"], "--context", 16, "--max-new-tokens", 300)
    assert whole[0] == 0 and "this model takes no more" in whole[2]


def test_a_mistake_in_one_turn_is_a_line_and_the_next_may_come(tiny, session, prompts):
    bad = [b"fox " * 300, b"caf\xe9"]
    for line, word in zip(bad, ("--context", "UTF-8")):
        prompts.clear()
        status, out, err = session(tiny, b"the quick\n" + line + b"\nbrown\n")
        wrong = [line for line in err.splitlines() if line.startswith("error: ")]
        assert status == 0 and len(wrong) == 1 and word in wrong[0]
        assert prompts[-1][-1:] == load(tiny).tokenizer.encode("brown")[-1:]


@pytest.mark.parametrize("at", (1, 3, 9))
def test_ctrl_c_stops_the_answer_and_not_the_program(at, tiny, session, prompts, monkeypatch):
    """The part already written stays in the conversation; a message without any answer does not."""
    calls, sample = [], engine_module.sample

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return sample(*arguments)
    monkeypatch.setattr(engine_module, "sample", interrupted)
    status, out, err = session(tiny, ["the quick", "brown", "dog"], "--chat")
    assert status == 0 and err.count("(interrupted)") == 1 and len(prompts) == 3 and "Traceback" not in err
    tokenizer = load(tiny).tokenizer
    answer = load(tiny).generate(prompts[0], **GREEDY).token_ids
    if at == 1:
        assert prompts[1] == tokenizer.chat("brown")
    elif at == 3:
        assert prompts[1] == tokenizer.chat("brown", [*prompts[0], *answer[:2]])
    else:
        assert prompts[1] == tokenizer.chat("brown", [*prompts[0], *answer])
        assert prompts[2][:len(prompts[1])] == prompts[1]
    assert prompts[2] == tokenizer.chat("dog", prompts[2][:-len(tokenizer.chat("dog"))])


@pytest.mark.parametrize("flag", ("--json", "--timeline", "--prompt-file"))
def test_what_does_not_go_with_a_conversation(flag, tiny, cli):
    value = {"--json": (), "--timeline": ("t.json",), "--prompt-file": ("-",)}[flag]
    status, out, err = cli("generate", "--model", tiny, "--interactive", flag, *value)
    assert (status, out) == (2, "")
    a_line(err, flag, "--interactive")


def test_traces_of_a_conversation(tiny, session, tmp_path):
    """One for each answer; the earlier turns are its prompt, with their routing."""
    from duoserve.trace import read_traces
    assert session(tiny, ["the quick", "brown"], "--trace-dir", tmp_path / "t")[0] == 0
    short, long = sorted(read_traces(tmp_path / "t"), key=lambda trace: trace.prompt)
    assert [len(trace.logits) - trace.prompt for trace in (short, long)] == [5, 5]
    assert (long.logits[:len(short.logits)] == short.logits).all() and (long.logits != 0).any((1, 2)).all()


def interrupted_until(word: bytes, run) -> bool:
    """Ctrl-C, and once more whenever nothing is said for a while: Python does not see one that comes as it
    begins to wait for a line."""
    said, quiet = b"", 0
    while word not in said and quiet < 20:
        run.send_signal(signal.SIGINT)
        while word not in said and select.select([run.stderr], [], [], 2)[0] and (new := run.stderr.read1()):
            said += new
        quiet += 1
    return word in said


def test_ctrl_c_and_ctrl_d_for_real(tiny):
    """SIGINT while it answers, again while it waits, then another turn, then the end of the input."""
    run = program("generate.py", "--model", tiny, "--device", "cpu", "--predictor", "none",
                  "--max-new-tokens", 250, "--interactive", "--simulate-link", "1MB/s")
    try:
        run.stdin.write(b"the\n")
        run.stdin.flush()
        assert run.stdout.read(1)
        assert interrupted_until(b"(interrupted)", run)
        assert interrupted_until(b"Ctrl-D", run)
        run.stdin.write(b"quick\n")
        run.stdin.flush()
        assert run.stdout.read(20)
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 0 and b"prompt tokens kept" in err and b"Traceback" not in err


def test_a_message_too_long_by_itself_leaves_the_conversation(tiny, session, prompts):
    """It is refused in one line; what was said before is still there for the next."""
    status, out, err = session(tiny, ["the fox", "the quick brown fox " * 40, "dog"], "--context", 40)
    assert status == 0 and err.count("error: ") == 1 and "--context 40" in err and "anew" not in err
    assert prompts[-1][:len(prompts[0])] == prompts[0] and len(prompts[-1]) > len(prompts[0]) + 6


def test_a_conversation_needs_both_streams(tiny, cli, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    status, out, err = cli("generate", "--model", tiny, "--interactive")
    assert (status, out) == (2, "")
    a_line(err, "--interactive")


def test_an_answer_that_ends_at_once_leaves_a_trace_of_its_prompt(tiny, cli, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_module, "sample", lambda *_: torch.tensor(2))         # EOS
    status, out, err = cli("generate", "--model", tiny, "--device", "cpu", "--prompt", "the fox",
                           "--trace-dir", tmp_path)
    assert status == 0 and len(list(tmp_path.glob("*.safetensors"))) == 1
