"""The predictor sees at run time exactly what it was trained on, and what it learns is worth having."""

import numpy as np
import pytest
import torch

from duoserve.bench import synthetic_traces
from duoserve.config import MixtralConfig
from duoserve.errors import UserError
from duoserve.history import History, Routing
from duoserve.predictor import NETS, Forecast, Predictor, mean_recall, measure_affinity, trace_features, train_nets

CONFIG = MixtralConfig(num_hidden_layers=4, num_local_experts=8, num_experts_per_tok=2)


@pytest.fixture(scope="module")
def traces():
    return synthetic_traces(CONFIG, persistence=0.6, recall=0.7, sequences=12, prompt=16, new=48)


@pytest.fixture(scope="module")
def predictor(traces):
    affinity = measure_affinity(traces[:9], 2)
    x, y = (np.concatenate(part) for part in zip(*(trace_features(t, 2, affinity) for t in traces[:9])))
    return Predictor(train_nets(x, y), affinity, "model")


def routing(trace, rows, layer):
    ids, last = trace.top(2)[rows, layer], rows.stop - 1
    ahead = trace.lookahead[last, layer + 1].tolist() if layer + 1 < trace.logits.shape[1] else None
    return Routing(np.bincount(ids.ravel(), minlength=8).tolist(), ids[-1].tolist(), [],
                   trace.logits[last, layer].tolist(), ahead)


def test_run_time_features_are_those_of_training(traces, predictor):
    trace = traces[0]
    expected, _ = trace_features(trace, 2, predictor.affinity)
    history = History(4, 8)
    seen = {}

    class Spy(Predictor):
        def __call__(self, net, layer, x):
            seen[net, layer] = x
            return super().__call__(net, layer, x)

    forecast = Forecast(history, Spy(predictor.weights, predictor.affinity, "model"), 2)
    for layer in range(4):
        history.observe(layer, routing(trace, slice(0, trace.prompt), layer))
    for i, t in enumerate(range(trace.prompt, len(trace.logits))):
        for layer in range(4):
            forecast.next_visit(layer)
            forecast.next_layer(layer, trace.lookahead[t, layer].tolist())
            np.testing.assert_allclose(seen["full", layer], expected[i, layer], atol=1e-5)
            np.testing.assert_allclose(seen["next", layer], expected[i, layer, -24:], atol=1e-5)
            history.observe(layer, routing(trace, slice(t, t + 1), layer))


def test_a_little_data_does_no_harm(traces, predictor):
    x, chosen = (np.concatenate(part) for part in zip(*(trace_features(t, 2, predictor.affinity) for t in traces[9:])))
    recall = {net: mean_recall(predictor.scores(net, x), chosen, 2).mean() for net in NETS}
    lookahead = mean_recall(x[..., :8], chosen, 2).mean()
    assert recall["full"] > recall["history"] > 0.4 and recall["full"] > 0.95 * lookahead


def test_training_is_reproducible_and_survives_the_disk(traces, predictor, tmp_path):
    affinity = measure_affinity(traces[:9], 2)
    x, y = (np.concatenate(part) for part in zip(*(trace_features(t, 2, affinity) for t in traces[:9])))
    again = Predictor(train_nets(x, y), affinity, "model")
    for path, p in ((tmp_path / "a", predictor), (tmp_path / "b", again)):
        p.save(path)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    read = Predictor.read(tmp_path / "a", "model", 4, 8)
    features = np.linspace(-1, 1, 48, dtype=np.float32)
    assert read("full", 2, features) == predictor("full", 2, features)


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
    chances = Forecast(history, None, 2).next_layer(1, [0.0, 3.0, 1.0, -1.0, 2.0, 0.5, -2.0, 0.1])
    assert sorted(range(8), key=lambda e: -chances[e])[:2] == [1, 4]
    assert sum(c > 0.5 for c in chances) == 2 and torch.tensor(chances).isfinite().all()
