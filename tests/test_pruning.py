"""Width pruning: the supernet is the model, importance is what its formula says, sub-models are prefixes of it."""

import numpy as np
import paddle
import pytest

import dynabert
from common import UserError, batching, modeling
from common.objectives import Classification


@pytest.fixture
def features(workspace):
    return [
        f._replace(label=i % 4)
        for i, f in enumerate(
            [
                batching.Feature(ids, [0] * len(ids), None)
                for ids in np.split(np.random.default_rng(0).integers(5, 200, 240), np.arange(10, 240, 10))
                for ids in [[2, *ids.tolist(), 3]]
            ]
        )
    ]


@pytest.fixture(params=["ppminilm", "bert", "ernie", "roberta"])
def model(request):
    """Each family, untrained but far from its start, so that heads and neurons differ."""
    paddle.seed(7)
    cls = modeling.model_class(request.param)
    model = cls(
        cls.config_class(
            vocab_size=220,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_labels=4,
            intermediate_size=36,
            hidden_act="gelu",
            max_position_embeddings=64,
            pad_token_id=0,
        )
    )
    for p in model.parameters():
        if p.ndim == 2:
            p.set_value(p * 8)
        else:
            p.set_value(p + paddle.randn(p.shape) * 0.1)
    model.eval()
    return model


def described(model_type, architecture, labels):
    """What dynabert reads of a stage record."""
    return {"model": {"model_type": model_type, "architecture": architecture}, "labels": list(range(labels))}


def test_supernet_at_full_width_is_the_model(model, features):
    expected = modeling.predict(model, features)
    supernet = dynabert.make_supernet(model, [0.5])
    assert np.array_equal(modeling.predict(supernet, features), expected)
    dynabert.set_width(supernet, 0.5)
    assert np.abs(modeling.predict(supernet, features) - expected).max() > 1e-3
    dynabert.set_width(supernet, 1.0)
    assert np.array_equal(modeling.predict(supernet, features), expected)


def test_reordering_changes_nothing(model, features):
    expected = modeling.predict(model, features)
    heads, neurons = dynabert.importance(model, batching.batches(features, 8), Classification())
    dynabert.reorder(model, heads, neurons)
    assert np.abs(modeling.predict(model, features) - expected).max() < 1e-5
    again = dynabert.importance(model, batching.batches(features, 8), Classification())
    for before, after in zip((heads, neurons), again):
        assert np.allclose(-np.sort(-before), after, rtol=1e-3, atol=1e-6)  # sorted, and still the same importances


def test_every_width_is_a_prefix(model, features):
    """A sub-model of ordinary narrow layers, its weights cut by hand, equals the supernet at that width."""
    architecture = modeling.architecture_of(model)
    model_type = model.base_model_prefix
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    supernet = dynabert.make_supernet(model, [0.5])
    for kept in range(1, 7):
        width = kept / 6
        dynabert.set_width(supernet, width)
        sub_model = dynabert.build_sub_model(described(model_type, architecture, 4), width)
        sub_model.set_state_dict(dynabert.slice_state(weights, width, 6))
        attention = dynabert.layers_of(sub_model)[0].self_attn
        assert attention.q_proj.weight.shape == [24, 4 * kept] and attention.out_proj.weight.shape == [4 * kept, 24]
        assert dynabert.layers_of(sub_model)[1].linear2.weight.shape == [6 * kept, 24]
        assert np.abs(modeling.predict(sub_model, features) - modeling.predict(supernet, features)).max() < 1e-5


def test_importance_against_finite_differences(model, features):
    """The loss is differentiated by hand: a head's gate scales its rows of out_proj, a neuron's weights scale together."""
    batches = list(batching.batches(features, 8))
    heads, neurons = dynabert.importance(model, batches, Classification())
    layer = dynabert.layers_of(model)[0]

    def losses():
        return np.array(
            [
                float(
                    paddle.nn.functional.cross_entropy(
                        model(paddle.to_tensor(b.input_ids), paddle.to_tensor(b.token_type_ids)).astype("float64"),
                        paddle.to_tensor(b.labels),
                    )
                )
                for b in batches
            ]
        )

    def derivative(parameter, rows, step=2e-2):
        """Of each batch's loss by a factor on a part of the parameter, at factor 1."""
        original, found = parameter.numpy(), []
        for sign in (1, -1):
            changed = original.copy()
            changed[rows] *= 1 + sign * step
            parameter.set_value(changed)
            found.append(losses())
        parameter.set_value(original)
        return (found[0] - found[1]) / (2 * step)

    for head in (0, 5):
        expected = np.abs(derivative(layer.self_attn.out_proj.weight, np.s_[4 * head : 4 * head + 4])).sum()
        assert heads[0, head] == pytest.approx(expected, rel=0.05, abs=2e-4)
    for neuron in (0, 17):
        incoming = derivative(layer.linear1.weight, np.s_[:, neuron]) + derivative(layer.linear1.bias, np.s_[neuron])
        expected = np.abs(incoming).sum() + np.abs(derivative(layer.linear2.weight, np.s_[neuron])).sum()
        assert neurons[0, neuron] == pytest.approx(expected, rel=0.05, abs=2e-4)


def test_importance_ignores_mode_and_old_gradients(model, features):
    expected = dynabert.importance(model, batching.batches(features, 8), Classification())
    model.train()
    model(paddle.to_tensor(batching.collate(features, [0]).input_ids)).sum().backward()
    found = dynabert.importance(model, batching.batches(features, 8), Classification())
    assert all(np.allclose(a, b, rtol=1e-5) for a, b in zip(expected, found))
    halves = [
        dynabert.importance(model, batching.batches(part, 8), Classification()) for part in (features[:8], features[8:])
    ]
    for whole, first, second in zip(expected, *halves):
        assert np.allclose(whole, first + second, rtol=1e-4, atol=1e-7)  # nothing is carried from batch to batch


def test_distillation_loss_against_numpy():
    rng = np.random.default_rng(1)
    student, teacher = rng.normal(size=(2, 3, 4, 5, 6)).astype("float32")
    student_logits, teacher_logits = rng.normal(size=(2, 4, 3)).astype("float32")
    softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)  # noqa: E731
    expected = 0.1 * sum(((s - t) ** 2).mean() for s, t in zip(student, teacher))
    expected += 2.0 * -(softmax(teacher_logits) * np.log(softmax(student_logits))).sum(-1).mean()
    tensors = [[paddle.to_tensor(x) for x in states] for states in (student, teacher)]
    soft = Classification().soft_loss(paddle.to_tensor(student_logits), paddle.to_tensor(teacher_logits))
    found = dynabert.LAMBDA_HIDDEN * dynabert.hidden_loss(*tensors) + 2.0 * soft
    assert float(found) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("width", [0.7, 0.0, 1.2, -0.75, 0.335])
def test_widths_without_whole_heads_are_refused(width):
    with pytest.raises(UserError, match="these do: 0.083333, 0.16667, 0.25, .*0.75, .*1$"):
        dynabert.check_width(width, 12, 3072)


def test_widths_without_whole_neurons_are_refused():
    with pytest.raises(UserError, match="these do: 0.5, 1$"):
        dynabert.check_width(0.25, 4, 6)
    assert dynabert.check_width(0.6667, 12, 3072) == 8


@pytest.mark.parametrize("model_type, name, width, params, flops", [
    ("ppminilm", "ppminilm-6l-768h", 1.0, 59.75, 5.44), ("ppminilm", "ppminilm-6l-768h", 0.75, 49.13, 4.08),
    ("bert", "bert-base-chinese", 1.0, 102.28, 10.87),
])  # fmt: skip
def test_published_sizes(model_type, name, width, params, flops):
    """Millions of parameters with TNEWS's 15 labels, and billions of multiply-adds at 128 tokens."""
    cls = modeling.model_class(model_type)
    architecture = {**modeling.ARCHITECTURE, **cls.pretrained_init_configuration[name]}
    found = dynabert.count_width(described(model_type, architecture, 15), width)
    assert (round(found[0] / 1e6, 2), round(found[1] / 1e9, 2)) == (params, flops)


def test_ernie_keeps_its_task_embeddings():
    cls = modeling.model_class("ernie")
    config = {"vocab_size": 50, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "num_labels": 3,
                  "max_position_embeddings": 16, "pad_token_id": 0, "use_task_id": True, "task_type_vocab_size": 5}  # fmt: skip
    model = cls(cls.config_class(**config))
    sub_model = dynabert.build_sub_model(described("ernie", modeling.architecture_of(model), 3), 1.0)
    assert sorted(sub_model.state_dict()) == sorted(model.state_dict())
    assert sub_model.ernie.embeddings.task_type_embeddings.weight.shape == [5, 12]
