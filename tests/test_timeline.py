"""The lanes of a run: the trace is true to the run and to its format, the picture is readable."""

import json
import re
import sys
from collections import Counter
from xml.etree import ElementTree

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

import generate
from duoserve import Engine, timeline
from duoserve.errors import run_main
from duoserve.link import Transfer

SHORT, LONG = [1, 42, 77, 200, 33], [1, *(7 * i % 300 + 10 for i in range(69))]


def blocks(trace: dict, lane: int) -> list[dict]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X" and event["tid"] == lane]


def moved(key, spans, *, asked=0.0, predicted=False, used=False) -> Transfer:
    return Transfer(key, 100, asked, predicted, sent=sum(n for *_, n in spans), used=used, spans=spans)


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
    assert all(sum(n for *_, n in t.spans) == t.sent for t in engine.cache.log)
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
    guess = moved((2, 5), [(1.0, 1.2, 40), (1.2, 1.4, 40), (1.9, 1.9, 10)], predicted=True)
    demand = moved((1, 3), [(1.4, 1.9, 100)], asked=1.3, used=True)
    prefill = moved((0, 0), [(0.0, 0.5, 100)], used=True)
    later = moved((0, 1), [(0.5, 0.6, 40), (0.7, 0.8, 20)], asked=0.5, predicted=True)
    guess.asked = 0.9
    steps = [("attention", 0, 0.0, 0.1), ("expert 0", 0, 0.5, 0.6), ("attention", 0, 1.1, 1.2)]
    link = blocks(timeline.trace([prefill, later, guess, demand], steps, kept=[later], decode=0.5), 2)
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


def picture(*runs: dict, title: str = "a title") -> str:
    return timeline.picture(dict(zip(("duo", "on-demand"), (run["traceEvents"] for run in runs))), title)


def readable(svg: str) -> None:
    """All that is written is large enough, within the picture, and nowhere over anything else that is."""
    areas = []
    for element in ElementTree.fromstring(svg).iter():
        if element.tag.endswith("text"):
            size, x, y = (float(element.attrib[name]) for name in ("font-size", "x", "y"))
            width = 0.6 * size * len(element.text)
            x -= width * ["start", "middle", "end"].index(element.attrib["text-anchor"]) / 2
            assert size >= 10 and 0 <= x <= timeline.WIDTH - width, element.text
            areas.append((x, x + width, y - 0.75 * size, y, element.text))
    for i, (left, right, top, bottom, words) in enumerate(areas):
        for other in areas[i + 1:]:
            beside, apart = right <= other[0] or other[1] <= left, bottom <= other[2] or other[3] <= top
            assert beside or apart, (words, other)


def test_the_picture_names_both_lanes_and_phases(run, tmp_path):
    engine, path = run[0], tmp_path / "timeline.svg"
    timeline.save(engine, path)
    words, boxes = drawing(path.read_text())
    readable(path.read_text())
    assert f"{engine.policy}: {engine.packed.directory.name}, link 0.02 GB/s (simulated)" in words
    assert words.count("compute") == words.count("link") == 2 and "host" not in words
    assert any(word.startswith(f"{engine.policy}: prefill") for word in words)
    assert any(word.startswith(f"{engine.policy}: decode") for word in words)
    for b in boxes:
        assert float(b["width"]) > 0 and 0 <= float(b["x"]) <= timeline.WIDTH - float(b["width"])


def test_a_stall_is_as_long_as_the_wait():
    steps = [("attention", 0, 0.0, 1.0), ("expert 3", 0, 5.0, 6.0), ("expert 4", 0, 9.0, 10.0)]
    transfers = [moved((0, 3), [(0.5, 4.0, 100)], used=True),
                 moved((0, 4), [(4.0, 5.5, 100)], used=True)]
    words, boxes = drawing(picture(timeline.trace(transfers, steps)))
    pixel = (timeline.RIGHT - timeline.LEFT) / 10
    stall, = (b for b in boxes
              if (b["fill"], b["height"]) == (timeline.COLOURS["awaiting link"], str(timeline.ROW)))
    # From when nothing else was left to compute, until the expert was there.
    assert float(stall["x"]) == pytest.approx(timeline.LEFT + pixel, abs=0.1)
    assert float(stall["width"]) == pytest.approx(3 * pixel, abs=0.1)
    assert "10000 ms: computing 30%, awaiting link 30%; at work: link 50%" in words


def test_a_wait_for_the_host_follows_that_for_the_link():
    steps = [("attention", 0, 0.0, 1.0), ("expert 3", 0, 3.0, 4.0), ("attention", 1, 8.0, 10.0)]
    transfers, hosted = [moved((0, 3), [(0.5, 3.0, 100)], used=True)], [((0, 4), 1.0, 7.0)]
    words, boxes = drawing(picture(timeline.trace(transfers, steps, hosted=hosted)))
    pixel = (timeline.RIGHT - timeline.LEFT) / 10
    stall, = (b for b in boxes
              if (b["fill"], b["height"]) == (timeline.COLOURS["awaiting host"], str(timeline.ROW)))
    assert float(stall["x"]) == pytest.approx(timeline.LEFT + 4 * pixel, abs=0.1)
    assert float(stall["width"]) == pytest.approx(3 * pixel, abs=0.1)
    assert "10000 ms: computing 40%, awaiting link 20%, host 30%; at work: link 25%, host 60%" in words


def test_of_a_long_run_a_part_is_drawn():
    t, steps, transfers = 0.0, [], []
    for step in range(20):
        for layer in range(32):
            steps.append(("attention", layer, t, t + 0.3e-3))
            for e in range(2 if step else 8):
                asked, t = t, t + 3.7e-3
                # None touches the next.
                spans = [(asked + i * 1e-4, asked + i * 1e-4 + 2e-5, 100) for i in range(12)]
                transfers.append(moved((layer, e), spans, asked=asked, used=True))
                steps.append((f"expert {e}", layer, t, t + 0.2e-3))
    words, boxes = drawing(picture(timeline.trace(transfers, steps)))
    assert len(boxes) < 500 and "layer 2" in words


def test_the_picture_says_no_more_than_there_is():
    """Visits and tokens of decode, labels no wider than their boxes, and in the legend only what is drawn."""
    steps, t = [], 0.0
    for _ in range(5):
        for layer in range(11):
            for name, length in (("attention", 0.4), ("expert 0", 0.5), ("expert 7", 0.3)):
                steps.append((name, layer, t, t + length))
                t += length
    words, boxes = drawing(picture(timeline.trace([], steps)))
    assert {"duo: prefill, 11 of 11 layers", "duo: decode, 33 layer visits", "token 4"} <= {*words}
    assert "token 1" not in words and "token 5" not in words
    assert [name for name in timeline.COLOURS if name in words] == ["attention", "expert", "idle"]

    for share, shown in ((0.03, 0), (0.045, 20)):
        steps = [(f"expert {e}", 10, share * e, share * (e + 1)) for e in range(20)]
        steps = [("attention", 0, 0.0, 0.0), *steps, ("attention", 10, share * 20, 1.0)]
        svg = picture(timeline.trace([], steps))
        labels = re.findall(r'font-size="(\d+)"[^>]*>(10\.\d+)<', svg)
        width = share * (timeline.RIGHT - timeline.LEFT)
        assert len(labels) == shown
        assert all(2 + 0.6 * int(size) * len(label) <= width for size, label in labels)


def passes(length: float, count: int = 4, layers: int = 3) -> dict:
    """A run that takes so many seconds for each attention, and half of that for an expert."""
    steps, t = [], 0.0
    for layer in [*range(layers)] * count:
        steps += [("attention", layer, t, t + length), ("expert 1", layer, t + length, t + 1.5 * length)]
        t += 1.5 * length
    return timeline.trace([], steps)


def test_two_runs_are_drawn_at_one_scale_with_their_tokens_marked():
    svg = picture(passes(0.02), passes(0.05, count=9))
    words, boxes = drawing(svg)
    readable(svg)
    # The same visits, though one run goes on; what takes 2.5 times as long is 2.5 times as wide.
    assert [word for word in words if "layer visits" in word or "layers" in word] == [
        "duo: prefill, 3 of 3 layers", "on-demand: prefill, 3 of 3 layers",
        "duo: decode, 9 layer visits", "on-demand: decode, 9 layer visits"]
    rows = {}
    for b in boxes[1:]:
        if b["height"] == str(timeline.ROW) and b["fill"] == timeline.COLOURS["attention"]:
            rows.setdefault(float(b["y"]), []).append((float(b["x"]), float(b["width"])))
    quick, slow, quick_tokens, slow_tokens = (rows[y] for y in sorted(rows))
    for fast, other in ((quick, slow), (quick_tokens, slow_tokens)):
        assert len(fast) == len(other)
        assert other[0][1] == pytest.approx(2.5 * fast[0][1], abs=0.2)
        assert other[-1][0] + 1.5 * other[-1][1] == pytest.approx(timeline.RIGHT, abs=0.3)
    # Where layer 0 of each token begins there is a line, and its number.
    assert [word for word in words if word.startswith("token")] == [f"token {n}" for n in (2, 3, 4)] * 2
    lines = [float(b["x"]) for b in boxes if b["width"] == "1.0" and float(b["height"]) > 2 * timeline.ROW]
    assert lines == [row[i][0] for row in (quick_tokens, slow_tokens) for i in (0, 3, 6)]


def test_names_are_written_as_they_are():
    svg = timeline.picture({"a&b<c>.py": passes(1.0)["traceEvents"]}, "a&b<c>.py: " + "long " * 20)
    assert "a&b<c>.py: decode, 9 layer visits" in drawing(svg)[0]
    readable(svg)


@pytest.mark.parametrize("steps", [[], [("attention", 0, 2.0, 2.5)],
                                   [("attention", 0, 2.0, 2.0), ("expert 1", 0, 2.0, 2.0)]])
def test_a_run_that_hardly_began_is_drawn_too(steps):
    trace = timeline.trace([moved((0, 1), [(2.0, 2.0, 100)])], steps)
    assert len(blocks(trace, 2)) == 1
    drawing(picture(trace))
    drawing(picture(timeline.trace([], [])))


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
    # Who has had enough of the first run waits for no second.
    assert ask(monkeypatch, tiny, tmp_path / "t.svg", "--simulate-link", "20MB/s") == 130
    assert "on-demand" not in capsys.readouterr().err + (tmp_path / "t.svg").read_text()


def test_the_picture_shows_the_policy_beside_on_demand(monkeypatch, capsys, tiny, tmp_path):
    """The answer and its numbers are the first run's, and the user is told of the second."""
    path = tmp_path / "t.svg"
    link = "--simulate-link", "10MB/s", "--simulate-host", "10MB/s", "--max-new-tokens", "9", "--json"
    assert ask(monkeypatch, tiny, path, *link) == 0
    out, said = capsys.readouterr()
    answer, (words, _) = json.loads(out), drawing(path.read_text())
    assert answer["stats"]["policy"] == "duo" and answer["new_tokens"] == 9
    assert said.count("\n") == 1 and "on-demand" in said
    readable(path.read_text())
    assert words[0] == f"duo beside on-demand: {tiny.name}, link 0.01 GB/s, host 0.01 GB/s (simulated)"
    assert words.count("host") == 4 and words.count("token 4") == 2
    for name in ("duo", "on-demand"):
        assert {f"{name}: prefill, 3 of 3 layers", f"{name}: decode, 9 layer visits"} <= {*words}


@pytest.mark.parametrize("name, more", [
    ("t.json", ("--simulate-link", "20MB/s")), ("t.svg", ()),
    ("t.svg", ("--simulate-link", "20MB/s", "--policy", "on-demand"))])
def test_where_there_is_nothing_to_compare_it_runs_once(monkeypatch, capsys, tiny, tmp_path, name, more):
    def stream(self, *arguments, **options):
        runs.append(self.policy)
        return once(self, *arguments, **options)

    runs, once = [], Engine.stream
    monkeypatch.setattr(Engine, "stream", stream)
    assert ask(monkeypatch, tiny, tmp_path / name, "--json", *more) == 0
    assert runs == ["on-demand" if "on-demand" in more else "duo"] and not capsys.readouterr().err
    assert "beside" not in (tmp_path / name).read_text()


def test_ctrl_c_in_the_second_run_leaves_a_picture_of_the_first(monkeypatch, capsys, tiny, tmp_path):
    def stream(self, *arguments, **options):
        pieces = all_of_it(self, *arguments, **options)
        if self.policy == "on-demand":
            yield next(pieces)
            raise KeyboardInterrupt
        return (yield from pieces)

    all_of_it = Engine.stream
    monkeypatch.setattr(Engine, "stream", stream)
    assert ask(monkeypatch, tiny, tmp_path / "t.svg", "--json", "--simulate-link", "20MB/s") == 0
    assert json.loads(capsys.readouterr().out)["finish_reason"] == "length"
    words = drawing((tmp_path / "t.svg").read_text())[0]
    assert any(word.startswith("duo: decode") for word in words) and "on-demand" not in " ".join(words)
    assert [path.name for path in tmp_path.iterdir()] == ["t.svg"]


def test_a_prompt_finds_everything_run_once(tiny):
    """Else the first layer would be drawn several times as long as the others."""
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.add(str(function))
            return function(*args, **(kwargs or {}))

    with Seen() as loading:
        loading.names = set()
        engine = Engine.from_pretrained(tiny, device="cpu", predictor="none")
    with Seen() as request:
        request.names = set()
        engine.generate(SHORT, max_new_tokens=1)
    heavy = {name for name in request.names if "mm" in name or "attention" in name or "linear" in name}
    assert heavy and heavy <= loading.names


def test_nothing_is_kept_unless_asked(tiny):
    engine = Engine.from_pretrained(tiny, device="cpu", predictor="none")
    engine.generate(SHORT, max_new_tokens=2)
    assert engine.cache.log is None and engine.source.spans is None


def test_no_expert_is_drawn_faster_than_the_link(tiny, tmp_path):
    """Whatever the sizes of its pieces are: prefill's, decode's, and what an expert that is divided needs."""
    engine = Engine.from_pretrained(tiny, device="cpu", predictor="none", cache_experts=7,
                                    simulate_link="20MB/s", simulate_host="20MB/s")
    size = engine.cache.expert_bytes
    engine.cache.lane.chunks = size // 6, size // 16
    engine.cache.empty()
    timeline.watch(engine)
    engine.generate(SHORT, max_new_tokens=8, temperature=0)
    timeline.save(engine, tmp_path / "run.json")
    link = blocks(json.loads((tmp_path / "run.json").read_text()), 2)
    assert engine.cache.counts.split and len({n for t in engine.cache.log for *_, n in t.spans}) > 3
    assert all(0 < e["args"]["bytes"] <= 20.1 * e["dur"] + 1 for e in link)         # dur is in us
