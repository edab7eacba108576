from math import isnan, nan

import pytest
import torch
from torch import nn

from suture.core.head import Head
from suture.errors import CheckpointError, ConfigError, DataError
from suture.evaluation import Accuracy, Row, Scorer, TaskInputs, evaluate, evaluate_row

IDENTITY = nn.Identity()
# Four logits rows; the right answers are 0, 1, 1, 2: three of four are found.
LOGITS = torch.tensor([[3.0, 1, 0], [0, 2, 1], [5, 4, 0], [0, 0, 1]])
SCORES = TaskInputs("scores", LOGITS, torch.tensor([0, 1, 1, 2]))
PRETRAINED = Row("pretrained", {"a": 0.5, "b": 0.2})
EXPERTS = Row("experts", {"a": 0.9, "b": 0.8})
MODEL = Row("model", {"a": 0.7, "b": 0.5})


def known_only(task):
    """A model that has the answer of one task's inputs and says class 0 to all others."""
    return lambda inputs: inputs if inputs.shape[-1] == task else torch.zeros(len(inputs), 5)


def two_tasks():
    return {
        "two": TaskInputs("two", torch.eye(2), torch.tensor([0, 1])),
        "four": TaskInputs("four", torch.eye(4), torch.arange(4)),
    }


def test_accuracy_is_the_share_of_largest_logits_at_the_label():
    assert evaluate(IDENTITY, SCORES) == Accuracy(0.75, 4)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_the_batch_size_does_not_change_the_accuracy(batch_size):
    assert evaluate(IDENTITY, SCORES, batch_size=batch_size) == Accuracy(0.75, 4)


def test_a_head_turns_features_into_logits_by_cosine():
    features = torch.tensor([[10.0, 9.0], [0.0, 0.1]])
    head = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    expected = 2 * torch.tensor([[(6 + 7.2) / 181**0.5, 9 / 181**0.5], [0.8, 1.0]])
    zero_shot = Head(head, scale=2.0, normalised=True)
    torch.testing.assert_close(zero_shot(features), expected)
    task = TaskInputs("angles", features, torch.tensor([0, 1]), zero_shot)
    assert evaluate(IDENTITY, task) == Accuracy(1.0, 2)


def test_the_scale_of_features_does_not_matter_where_there_is_a_head():
    generator = torch.Generator().manual_seed(0)
    inputs, head = torch.randn(50, 8, generator=generator), torch.randn(5, 8, generator=generator)
    task = TaskInputs("random", inputs, torch.arange(50) % 5, Head(head, normalised=True))
    assert evaluate(IDENTITY, task) == evaluate(lambda x: 100 * x, task)


def test_a_linear_head_has_a_bias_and_takes_features_as_they_are():
    linear = nn.Linear(4, 3)
    features = torch.randn(5, 4)
    assert torch.equal(Head(linear.weight, linear.bias)(features), linear(features))
    twice = Head(linear.weight, linear.bias, scale=2.0, before=nn.Tanh())
    torch.testing.assert_close(twice(features), linear(2 * features.tanh()))


def test_the_cosine_head_has_the_bits_of_its_formula():
    features, head = torch.randn(50, 8), torch.randn(5, 8)
    expected = 3.7 * nn.functional.normalize(features, dim=-1) @ head.T
    assert torch.equal(Head(head, scale=3.7, normalised=True)(features), expected)


def test_inputs_that_are_a_mapping_are_keyword_arguments():
    inputs = {"ids": LOGITS, "mask": torch.tensor([[1.0], [1], [1], [0]])}
    task = TaskInputs("scores", inputs, torch.tensor([0, 1, 1, 2]))
    model = lambda ids, mask: ids * mask
    assert evaluate(model, task, batch_size=3) == Accuracy(0.5, 4)
    assert evaluate(model, task.first(2)) == Accuracy(1.0, 2)


def test_a_module_is_evaluated_without_dropout_and_left_as_it_was():
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(3))
    model[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, SCORES)
    assert [m.training for m in model.modules()] == [True, False, True]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name])


def test_progress_counts_every_input_once():
    counted = []

    class Bar:
        def __init__(self, description, total):
            self.total = (description, total)

        def __enter__(self):
            counted.append(self.total)
            return counted.append

        def __exit__(self, *_):
            pass

    evaluate(IDENTITY, SCORES, batch_size=3, track=Bar, name="average")
    assert counted == [("average: scores", 4), 3, 1]


def test_an_empty_task_is_refused():
    with pytest.raises(DataError, match="Task 'none' has no inputs"):
        evaluate(IDENTITY, TaskInputs("none", torch.zeros(0, 3), torch.zeros(0).long()))


def test_labels_beyond_the_logits_are_refused():
    with pytest.raises(DataError, match="labels up to 3 but the model only knows 3 classes"):
        evaluate(IDENTITY, TaskInputs("scores", LOGITS, torch.tensor([0, 1, 2, 3])))


def test_a_model_that_gives_nan_is_refused():
    with pytest.raises(CheckpointError, match="output on task 'scores' is not finite"):
        evaluate(lambda x: x * nan, SCORES)


def test_a_batch_size_of_zero_is_refused():
    with pytest.raises(ConfigError, match="batch_size=0"):
        evaluate(IDENTITY, SCORES, batch_size=0)


def test_a_row_has_one_accuracy_and_one_sample_count_for_each_task():
    row = evaluate_row("model", known_only(4), two_tasks())
    assert row == Row("model", {"two": 0.5, "four": 1.0}, {"two": 2, "four": 4})


def test_a_row_may_use_another_model_for_each_task():
    row = evaluate_row("repaired", {"two": known_only(2), "four": known_only(4)}, two_tasks())
    assert row.accuracies == {"two": 1.0, "four": 1.0}


def test_experts_are_evaluated_on_their_own_task_only():
    asked = []

    def expert(task):
        asked.append(task)
        return known_only({"two": 2, "four": 4}[task])

    row = Scorer().experts(expert, two_tasks())
    assert asked == ["two", "four"]
    assert row.accuracies == {"two": 1.0, "four": 1.0}


def test_the_expert_matrix_has_every_expert_on_every_task():
    rows = Scorer().matrix(lambda task: known_only({"two": 2, "four": 4}[task]), two_tasks())
    assert [(row.name, dict(row.accuracies)) for row in rows] == [
        ("two", {"two": 1.0, "four": 0.25}),
        ("four", {"two": 0.5, "four": 1.0}),
    ]


def test_the_mean_counts_tasks_and_not_inputs():
    assert Row("model", {"a": 0.4, "b": 0.8}, {"a": 1000, "b": 10}).mean == pytest.approx(0.6)


def test_the_normalised_mean_averages_the_ratios_to_the_experts():
    assert MODEL.normalised_mean(EXPERTS) == pytest.approx((0.7 / 0.9 + 0.5 / 0.8) / 2)
    assert EXPERTS.normalised_mean(EXPERTS) == 1


def test_the_gap_closed_is_computed_from_the_means_and_for_each_task():
    assert MODEL.gap_closed(PRETRAINED, EXPERTS) == pytest.approx((0.6 - 0.35) / (0.85 - 0.35))
    assert MODEL.gaps_closed(PRETRAINED, EXPERTS) == pytest.approx({"a": 0.5, "b": 0.5})
    assert PRETRAINED.gap_closed(PRETRAINED, EXPERTS) == 0
    assert EXPERTS.gap_closed(PRETRAINED, EXPERTS) == 1


def test_a_model_below_the_pretrained_one_has_a_negative_gap():
    assert Row("model", {"a": 0.1, "b": 0.2}).gap_closed(PRETRAINED, EXPERTS) == pytest.approx(-0.4)


def test_where_there_is_no_gap_the_gap_closed_is_nan():
    same = Row("experts", {"a": 0.5, "b": 0.8})
    gaps = MODEL.gaps_closed(PRETRAINED, same)
    assert isnan(gaps["a"])
    assert gaps["b"] == pytest.approx(0.5)
    assert MODEL.gap_closed(PRETRAINED, same) == pytest.approx((0.6 - 0.35) / (0.65 - 0.35))
    assert isnan(MODEL.gap_closed(PRETRAINED, PRETRAINED))


def test_an_expert_that_has_nothing_right_leaves_the_normalised_mean_undefined():
    assert isnan(MODEL.normalised_mean(Row("experts", {"a": 0.0, "b": 0.8})))


def test_a_task_without_an_expert_is_not_left_out_quietly():
    lacking = Row("experts", {"a": 0.9})
    assert isnan(MODEL.normalised_mean(lacking))
    assert isnan(MODEL.gap_closed(PRETRAINED, lacking))
    assert MODEL.gaps_closed(PRETRAINED, lacking)["a"] == pytest.approx(0.5)
