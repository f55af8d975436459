"""Both lanes of a run: the trace is true to the run and to its format, the picture is readable."""

import json
import re
import sys
from collections import Counter
from xml.etree import ElementTree

import pytest

import generate
from duoserve import Engine, timeline
from duoserve.errors import run_main
from duoserve.link import Transfer

SHORT, LONG = [1, 42, 77, 200, 33], [1, *(7 * i % 300 + 10 for i in range(69))]


def blocks(trace: dict, lane: int) -> list[dict]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X" and event["tid"] == lane]


def moved(key, spans, sent, *, asked=0.0, predicted=False, used=False) -> Transfer:
    return Transfer(key, 100, asked, False, predicted, sent=sent, used=used, spans=spans)


@pytest.fixture(scope="module",
                params=[("duo", SHORT), ("duo", LONG), ("on-demand", SHORT), ("layer-prefetch", SHORT)],
                ids=lambda param: f"{param[0]}-{len(param[1])}")
def run(request, tiny, tmp_path_factory):
    """A recorded run on a slow link -> (engine, its result, the trace as read back from the file)."""
    policy, prompt = request.param
    engine = Engine.from_pretrained(tiny, device="cpu", policy=policy, predictor="none", cache_experts=7,
                                    simulate_link="20MB/s")
    engine.cache.empty()
    timeline.watch(engine)
    result = engine.generate(prompt, max_new_tokens=8, temperature=0)
    path = tmp_path_factory.mktemp("run") / "timeline.json"
    timeline.save(engine, path)
    return engine, result, json.loads(path.read_text())


def test_it_is_a_chrome_trace(run):
    trace = run[2]
    assert {(e["name"], e["tid"], e["args"]["name"]) for e in trace["traceEvents"] if e["ph"] == "M"} == {
        ("process_name", 0, "duoserve"), ("thread_name", 1, "compute"), ("thread_name", 2, "link")}
    assert {e["ph"] for e in trace["traceEvents"]} == {"M", "X"}
    assert {e["pid"] for e in trace["traceEvents"]} == {1}
    events = blocks(trace, 1) + blocks(trace, 2)
    assert all(e["ts"] >= 0 and e["dur"] >= 0 for e in events) and min(e["ts"] for e in events) == 0
    for lane in (1, 2):                     # in order, and never two at a time
        ordered = blocks(trace, lane)
        assert all(b["ts"] >= a["ts"] + a["dur"] - 1e-3 for a, b in zip(ordered, ordered[1:]))


def test_every_layer_is_there(run):
    engine, result, trace = run
    layers, visits = engine.config.num_hidden_layers, []
    for e in blocks(trace, 1):
        if e["args"]["kind"] == "attention":
            visits.append((e["args"]["layer"], []))
        else:
            assert e["args"]["kind"] == "expert" and e["args"]["layer"] == visits[-1][0]
            visits[-1][1].append(e["args"]["expert"])
    assert [layer for layer, _ in visits] == list(range(layers)) * len(result.token_ids)
    assert all(len(set(experts)) == len(experts) == 2 for _, experts in visits[layers:])


def test_it_agrees_with_the_counts(run):
    engine, result, trace = run
    stats, size, nbytes = result.stats, engine.packed.layout.nbytes, Counter()
    for e in blocks(trace, 2):
        assert e["args"]["kind"] in ("demand", "prefetch", "prefill")
        assert e["args"]["use"] in ("used", "wasted", "kept")
        nbytes[e["args"]["kind"]] += e["args"]["bytes"]
    assert sum(nbytes.values()) == stats.bytes_moved
    assert nbytes["demand"] == stats.misses * size
    guesses = [t for t in engine.cache.log if t.predicted and t.asked >= engine.cache.since]
    assert len(guesses) == stats.prefetched and sum(t.used for t in guesses) == stats.prefetched_used
    assert nbytes["prefetch"] == sum(t.sent for t in guesses)
    lost = sum(e["args"]["bytes"] for e in blocks(trace, 2)
               if e["args"]["kind"] == "prefetch" and e["args"]["use"] == "wasted")
    assert lost == pytest.approx(engine.cache.counts.wasted * size)


def test_an_expert_is_computed_after_its_transfer(run):
    engine, _, trace = run
    size, waiting, here = engine.packed.layout.nbytes, Counter(), set()
    events = [(e["ts"], True, e) for e in blocks(trace, 1)]
    events += [(e["ts"] + e["dur"], False, e) for e in blocks(trace, 2)]
    for _, computed, e in sorted(events, key=lambda event: (round(event[0], 2), event[1])):
        key = e["args"]["layer"], e["args"].get("expert")
        if e["args"]["kind"] == "expert":
            assert key in here
        elif not computed and e["args"]["use"] != "wasted":
            waiting[key] += e["args"]["bytes"]
            if waiting[key] % size == 0:
                here.add(key)


def test_pieces_join_only_where_nothing_lies_between():
    guess = moved((2, 5), [(1.0, 1.2), (1.2, 1.4), (1.9, 1.9)], 90, predicted=True)
    demand = moved((1, 3), [(1.4, 1.9)], 100, asked=1.3, used=True)
    prefill = moved((0, 0), [(0.0, 0.5)], 100, used=True)
    later = moved((0, 1), [(0.5, 0.6), (0.7, 0.8)], 60, asked=0.5, predicted=True)
    guess.asked = 0.9
    steps = [("attention", 0, 0.0, 0.1), ("expert 0", 0, 0.5, 0.6), ("attention", 0, 1.1, 1.2)]
    link = blocks(timeline.trace([prefill, later, guess, demand], steps, 40, kept=[later], decode=0.5), 2)
    assert [(e["name"], e["args"]["use"], e["args"]["bytes"]) for e in link] == [
        ("prefill 0.0", "used", 100), ("prefetch 0.1", "kept", 40), ("prefetch 0.1", "kept", 20),
        ("prefetch 2.5", "wasted", 80), ("demand 1.3", "used", 100), ("prefetch 2.5", "wasted", 10)]
    assert [e["ts"] for e in link] == pytest.approx([0.0, 5e5, 7e5, 1e6, 1.4e6, 1.9e6])


def drawing(svg: str) -> tuple[list[str], list[dict]]:
    """-> what is written in it, and its boxes."""
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and len(svg) < 200_000
    tags = {element.tag.split("}")[1] for element in root.iter()}
    # No script, no font, nothing that is loaded from elsewhere.
    assert tags <= {"svg", "pattern", "path", "rect", "title", "text"}
    return ([element.text for element in root.iter() if element.tag.endswith("text")],
            [element.attrib for element in root.iter() if element.tag.endswith("rect")])


def test_the_picture_names_both_lanes_and_phases(run, tmp_path):
    timeline.save(run[0], tmp_path / "timeline.svg")
    words, boxes = drawing((tmp_path / "timeline.svg").read_text())
    assert words.count("compute") == words.count("link") == 2
    assert any(word.startswith("Prefill") for word in words)
    assert any(word.startswith("Decode") for word in words)
    for b in boxes:
        assert float(b["width"]) > 0 and 0 <= float(b["x"]) <= timeline.WIDTH - float(b["width"])


def test_a_stall_is_as_long_as_the_wait():
    steps = [("attention", 0, 0.0, 1.0), ("expert 3", 0, 5.0, 6.0), ("expert 4", 0, 9.0, 10.0)]
    transfers = [moved((0, 3), [(0.5, 4.0)], 100, used=True), moved((0, 4), [(4.0, 5.5)], 100, used=True)]
    words, boxes = drawing(timeline.picture(timeline.trace(transfers, steps, 20)["traceEvents"]))
    pixel = (timeline.RIGHT - timeline.LEFT) / 10
    stall, = (b for b in boxes
              if (b["fill"], b["height"]) == (timeline.COLOURS["waiting for link"], str(timeline.ROW)))
    # From when nothing else was left to compute, until the expert was there.
    assert float(stall["x"]) == pytest.approx(timeline.LEFT + pixel, abs=0.1)
    assert float(stall["width"]) == pytest.approx(3 * pixel, abs=0.1)
    assert "computing 30% of the time, waiting for the link 30%; the link at work 50%" in words


def test_of_a_long_run_a_part_is_drawn():
    t, steps, transfers = 0.0, [], []
    for step in range(20):
        for layer in range(32):
            steps.append(("attention", layer, t, t + 0.3e-3))
            for e in range(2 if step else 8):
                asked, t = t, t + 3.7e-3
                # None touches the next.
                spans = [(asked + i * 1e-4, asked + i * 1e-4 + 2e-5) for i in range(12)]
                transfers.append(moved((layer, e), spans, 1200, asked=asked, used=True))
                steps.append((f"expert {e}", layer, t, t + 0.2e-3))
    words, boxes = drawing(timeline.picture(timeline.trace(transfers, steps, 100)["traceEvents"]))
    assert len(boxes) < 500 and "layer 2" in words


def test_the_picture_says_no_more_than_there_is():
    """Visits and tokens of decode, labels no wider than their boxes, and in the legend only what is drawn."""
    steps, t = [], 0.0
    for _ in range(5):
        for layer in range(11):
            for name, length in (("attention", 0.4), ("expert 0", 0.5), ("expert 7", 0.3)):
                steps.append((name, layer, t, t + length))
                t += length
    words, boxes = drawing(timeline.picture(timeline.trace([], steps, 1)["traceEvents"]))
    assert "Prefill, all tokens at once: 11 layers" in words
    assert "Decode, token after token: 33 layer visits, 3 tokens" in words
    assert [name for name in timeline.COLOURS if name in words] == ["attention", "expert", "idle"]

    for share, shown in ((0.02, 0), (0.03, 25)):
        steps = [(f"expert {e}", 10, share * e, share * (e + 1)) for e in range(25)]
        steps = [("attention", 0, 0.0, 0.0), *steps, ("attention", 10, share * 25, 1.0)]
        svg = timeline.picture(timeline.trace([], steps, 1)["traceEvents"])
        labels = re.findall(r'font-size="(\d+)"[^>]*>(10\.\d+)<', svg)
        width = share * (timeline.RIGHT - timeline.LEFT)
        assert len(labels) == shown
        assert all(2 + 0.6 * int(size) * len(label) <= width for size, label in labels)


@pytest.mark.parametrize("steps", [[], [("attention", 0, 2.0, 2.5)],
                                   [("attention", 0, 2.0, 2.0), ("expert 1", 0, 2.0, 2.0)]])
def test_a_run_that_hardly_began_is_drawn_too(steps):
    trace = timeline.trace([moved((0, 1), [(2.0, 2.0)], 100)], steps, 100)
    assert len(blocks(trace, 2)) == 1
    drawing(timeline.picture(trace["traceEvents"]))
    drawing(timeline.picture(timeline.trace([], [], 1)["traceEvents"]))


def ask(monkeypatch, tiny, path, *more) -> int:
    monkeypatch.setattr(sys, "argv", [
        "generate.py", "--model", str(tiny), "--device", "cpu", "--predictor", "none",
        "--prompt", "the dog", "--max-new-tokens", "4", "--timeline", str(path), *more])
    with pytest.raises(SystemExit) as end:
        run_main(generate.main)
    return end.value.code


@pytest.mark.parametrize("path, mend", [("t.png", ".json"), ("t", ".svg"), ("no/such/t.svg", "writable"),
                                        ("a.json/t.svg", "writable"), ("there.svg", "writable")])
def test_a_bad_path_is_an_error_before_anything_is_loaded(monkeypatch, capsys, tmp_path, path, mend):
    (tmp_path / "a.json").write_text("")
    (tmp_path / "there.svg").mkdir()
    assert ask(monkeypatch, tmp_path / "no model", tmp_path / path) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --timeline") and path in error and mend in error
    assert error.count("\n") == 1


def test_an_interrupted_run_is_written_too(monkeypatch, capsys, tiny, tmp_path):
    def stream(self, *arguments, **options):
        pieces = all_of_it(self, *arguments, **options)
        yield next(pieces)
        try:
            raise KeyboardInterrupt
        finally:
            pieces.close()

    all_of_it = Engine.stream
    monkeypatch.setattr(Engine, "stream", stream)
    assert ask(monkeypatch, tiny, tmp_path / "t.json", "--json") == 130
    answer = json.loads(capsys.readouterr().out)
    trace = json.loads((tmp_path / "t.json").read_text())
    assert answer["finish_reason"] == "interrupted" and blocks(trace, 1)
    assert sum(e["args"]["bytes"] for e in blocks(trace, 2)) == answer["stats"]["bytes_moved"]
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]


def test_nothing_is_kept_unless_asked(tiny):
    engine = Engine.from_pretrained(tiny, device="cpu", predictor="none")
    engine.generate(SHORT, max_new_tokens=2)
    assert engine.cache.log is None and engine.source.spans is None
