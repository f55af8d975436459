"""The predictor sees at run time exactly what it was trained on, and what it learns is worth having."""

from pathlib import Path

import numpy as np
import pytest
import torch

from duoserve import training
from duoserve.bench.replay import synthetic_traces
from duoserve.config import MixtralConfig
from duoserve.errors import UserError
from duoserve.history import History, Routing
from duoserve.predictor import DISCOUNT, Forecast, Predictor, sigmoid, worth
from duoserve.trace import read_traces
from duoserve.training import (Samples, blend, predicted_logits, logits, mean_recall, measure_affinity,
                               recall, train, worths)

CONFIG = MixtralConfig(num_hidden_layers=4, num_local_experts=8, num_experts_per_tok=2)


def made_up(sequences, new):
    return synthetic_traces(CONFIG, persistence=0.6, recall=0.7, sequences=sequences, prompt=16, new=new)


@pytest.fixture(scope="module")
def traces():
    return made_up(12, 48)


@pytest.fixture(scope="module")
def predictor(traces):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "LEAST_STEPS", 120)         # enough for what is asked of it here
        return Predictor(train(traces[:9], 2), measure_affinity(traces[:9], 2), "model")


def tensors(weights):
    return tuple(map(torch.from_numpy, weights))


def routing(trace, rows, layer):
    ids, last = trace.top(2)[rows, layer], rows.stop - 1
    ahead = trace.lookahead[last, layer + 1].tolist() if layer + 1 < trace.logits.shape[1] else None
    return Routing(np.bincount(ids.ravel(), minlength=8).tolist(), ids[-1].tolist(), [],
                   trace.logits[last, layer].tolist(), ahead)


def test_run_time_features_are_those_of_training(traces, predictor):
    """In every state, even the last, where no lookahead is known; and so are the answers."""
    trace = traces[0]
    samples, weights = Samples.of([trace], 2), tensors(predictor.weights)
    expected, use, _ = samples.at(torch.arange(len(samples.now)))
    answers = sigmoid(logits(weights, expected).numpy())
    history = History(4, 8)
    seen = []

    class Spy(Predictor):
        def __call__(self, state, hints):
            seen.append(hints)
            return super().__call__(state, hints)

    forecast = Forecast(history, Spy(predictor.weights, predictor.affinity, "model"), 2)
    for layer in range(4):
        history.observe(layer, routing(trace, slice(0, trace.prompt), layer))
    for i, t in enumerate(range(trace.prompt, len(trace.logits))):
        for state in range(5):
            estimate = forecast.estimate(state, trace.lookahead[t, state].tolist() if state < 4 else None)
            np.testing.assert_allclose(seen.pop(), expected[state, i], atol=1e-5)
            np.testing.assert_allclose(estimate, answers[state, i], atol=1e-4)
            for layer in range(4):      # its next choice: for this token, or for the next if it has passed
                t_next = t + (layer < state)
                if t_next < len(trace.logits):
                    next_use = use[state, i, layer].nonzero()[:, 0].tolist()
                    assert next_use == sorted(trace.top(2)[t_next, layer])
            if state < 4:
                history.observe(state, routing(trace, slice(t, t + 1), state))


def test_worth_is_the_discount_of_the_next_use():
    use = np.zeros((400, 1, 4), np.float32)
    use[::2, 0, 0] = use[1::2, 0, 1] = use[3, 0, 2] = 1
    value = worths(use)[:, 0]
    assert value[0, 0] == 1 and value[1, 0] == value[0, 1] == np.float32(DISCOUNT)
    np.testing.assert_allclose(value[:4, 2], DISCOUNT ** np.arange(3, -1, -1.0), rtol=1e-6)
    assert value[4:, 2].max() < 0.05 and worth(1.0, 0.1) == 1 and worth(0.0, 1.0) == DISCOUNT
    # A use at random, with a chance at first and a rate from then on: as often as `worth` says.
    rng = np.random.RandomState(0)
    first, later = rng.rand(20000) < 0.5, rng.geometric(0.2, 20000)
    assert abs(np.where(first, 1, DISCOUNT ** later).mean() - worth(0.5, 0.2)) < 0.01


def test_a_blend_is_a_mixture_of_logits(traces, predictor, monkeypatch):
    monkeypatch.setattr(training, "LEAST_STEPS", 30)
    samples = Samples.of(traces[:2], 2)
    net, plain = training.fit(samples)
    hints = samples.at(torch.arange(40))[0]
    mixed, a, b = (logits(w, hints) for w in (blend(net, plain, 0.3, 0.9), net, plain))
    for state in range(5):
        for layer in range(4):
            share = 0.3 if layer == state % 4 else 0.9
            expected = share * a[state, :, layer] + (1 - share) * b[state, :, layer]
            torch.testing.assert_close(mixed[state, :, layer], expected, atol=1e-4, rtol=0)
    # Of the layer that comes next the plain one says what the lookahead says, in the same order.
    assert (mean_recall(predicted_logits(plain, samples), samples.now[:, 0], 2)
            == mean_recall(samples.ahead, samples.now[:, 0], 2)).all()


def test_a_chance_is_what_it_says_it_is(traces, predictor):
    """The scheduler fetches what is likelier than not, so the chances must be calibrated."""
    samples = Samples.of(traces[9:], 2)
    z, truth = predicted_logits(tensors(predictor.weights), samples), samples.now[:, 0]
    for kind in (z > 1, (0 < z) & (z < 1), z < 0):
        assert kind.sum() > 100 and abs(truth[kind].mean() - z[kind].sigmoid().mean()) < 0.05


@pytest.mark.parametrize("kind", ("made up", "the demo's"))
def test_a_little_data_does_no_harm(kind, monkeypatch):
    """On unseen sequences: neither for the next layer nor for the next visits of the others."""
    monkeypatch.setattr(training, "LEAST_STEPS", 100)
    if kind == "made up":                   # six sequences of 24 tokens, and nothing but persistence to learn
        few, *others = (part := made_up(36, 24))[:6], *part[6:]
    else:
        few, *others = (part := read_traces(Path(__file__).with_name("traces")))[:8], *part[8:]
    samples, weights = Samples.of(others, 2), tensors(train(few, 2))
    truth = samples.now[:, 0]
    ahead, full = (mean_recall(z, truth, 2).mean()
                   for z in (samples.ahead, predicted_logits(weights, samples)))
    assert full > ahead + (-0.002 if kind == "made up" else 0.005)
    hints, use, _ = samples.at(samples.known())
    last = mean_recall(hints[-1, :, 0], use[-1], 2).mean()          # the last token's experts once more
    assert recall(weights, samples, 2)[1].mean() > last - 0.01


def test_training_is_reproducible_and_survives_the_disk(traces, predictor, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "LEAST_STEPS", 30)
    for name in "ab":
        Predictor(train(traces[:3], 2), predictor.affinity, "model").save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    predictor.save(tmp_path / "a")
    read = Predictor.read(tmp_path / "a", "model", 4, 8)
    hints = np.linspace(-1, 1, 96, dtype=np.float32).reshape(3, 4, 8)
    assert (read(2, hints) == predictor(2, hints)).all() and (read.affinity == predictor.affinity).all()


def test_a_predictor_of_another_model_or_shape_is_refused(predictor, tmp_path):
    path = tmp_path / "predictor.safetensors"
    predictor.save(path)
    for model, layers, word in (("other", 4, "of model model"), ("model", 5, "shapes")):
        with pytest.raises(UserError, match=word) as error:
            Predictor.read(path, model, layers, 8)
        assert str(path) in str(error.value)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match="damaged"):
        Predictor.read(path, "model", 4, 8)


def test_lookahead_alone_ranks_by_the_lookahead():
    history = History(4, 8)
    estimate = Forecast(history, None, 2).estimate(1, [0.0, 3.0, 1.0, -1.0, 2.0, 0.5, -2.0, 0.1])
    chances = estimate[1].tolist()
    assert sorted(range(8), key=lambda e: -chances[e])[:2] == [1, 4]
    assert sum(c > 0.5 for c in chances) == 2 and torch.from_numpy(estimate).isfinite().all()
