"""The recipes of the synthetic tasks: each learns its task, and beside each stands a baseline that provably cannot.

A baseline sees a window of w tokens. That it sees no more is checked bit by bit; what anybody who sees no more can reach
at best is computed from the test side (`attnzoo.data.sequences.bounds`, proofs there).
"""

from dataclasses import dataclass

import pytest
import torch

from attnzoo import compose
from attnzoo.data.sequences import load_sequences
from attnzoo.data.sequences.bounds import counted, recall_accuracy, regression_error
from attnzoo.train import prepare, train

TASKS = {"recall": 5, "induction": 1, "in_context_regression": 1, "task_switching": 1}
"""Recipe to the window of its baseline, `<recipe>_local`: 1 + layers × (width - 1)."""


def data_of(recipe: str):
    """The data that a recipe is trained on."""
    return load_sequences(prepare(recipe)[1].data)


def changed(inputs: torch.Tensor, at: int, vocab: int | None) -> torch.Tensor:
    """The same sequences with something else at a position."""
    other = inputs.clone()
    other[:, at] = (other[:, at] + 1) % vocab if vocab else other[:, at] + 1
    return other


def sees(model: torch.nn.Module, inputs: torch.Tensor, vocab: int | None, query: int) -> list[int]:
    """How far back the positions lie on which the output at `query` depends."""
    with torch.no_grad():
        before = model(inputs)[:, query]
        outputs = [model(changed(inputs, at, vocab))[:, query] for at in range(inputs.shape[1])]
    return [query - at for at, after in enumerate(outputs) if not torch.equal(before, after)]


@pytest.mark.parametrize(("recipe", "window"), TASKS.items())
def test_the_baseline_sees_its_window_and_the_recipe_all(recipe, window):
    data = data_of(recipe)
    inputs, _ = data.test.batch(torch.arange(4))
    inputs = inputs.double() if data.width else inputs
    query = inputs.shape[1] - 1
    torch.manual_seed(0)
    baseline, whole = compose(f"{recipe}_local").double().eval(), compose(recipe).double().eval()
    assert max(sees(baseline, inputs, data.vocab, query)) == window - 1
    assert min(sees(baseline, inputs, data.vocab, query)) == 0  # nothing that is to come
    assert max(sees(whole, inputs, data.vocab, query)) == query


@dataclass
class Reached:
    """What a run reached in its last epoch."""

    accuracy: float
    loss: float


def reach(recipe: str, folder, **changes) -> Reached:
    """Train a recipe as it stands."""
    loaded, settings = prepare(recipe, [f"train.{key}={value}" for key, value in changes.items()])
    last = train(loaded, settings, folder).log()[-1]
    return Reached(last["test_accuracy"], last["test_loss"])


@pytest.mark.slow
def test_recall_is_learnt_and_not_by_its_baseline(tmp_path):
    inputs, targets = data_of("recall").test.batch(torch.arange(2000))
    most = recall_accuracy(inputs, targets, TASKS["recall"], 64)
    assert reach("recall", tmp_path / "whole").accuracy > 0.99
    local = reach("recall_local", tmp_path / "local", epochs=2)
    assert most < 0.15 and local.accuracy < most + 0.05  # by chance above: 5e-5, Hoeffding


@pytest.mark.slow
def test_induction_is_learnt_and_not_by_its_baseline(tmp_path):
    inputs, targets = data_of("induction").test.batch(torch.arange(2000))
    _, least = counted(inputs, targets, TASKS["induction"])
    assert least > 1.0 and reach("induction_local", tmp_path / "local", epochs=2).loss >= least
    whole = reach("induction", tmp_path / "whole")
    assert 0.56 < whole.loss < 0.65  # nobody is below 0.566, but for chance


@pytest.mark.slow
def test_regression_in_context_is_learnt_and_not_by_its_baseline(tmp_path):
    inputs, _ = data_of("in_context_regression").test.batch(torch.arange(2000))
    least = regression_error(inputs, TASKS["in_context_regression"], 0.0)
    local = reach("in_context_regression_local", tmp_path / "local", epochs=2)
    assert least > 4.5 and local.loss > 0.8 * least  # by chance below: 6e-7, Laurent and Massart
    assert reach("in_context_regression", tmp_path / "whole").accuracy > 0.95


@pytest.mark.slow
def test_task_switching_is_learnt_and_not_by_its_baseline(tmp_path):
    data = data_of("task_switching")
    inputs, targets = data.test.batch(torch.arange(len(data.test)))
    most, least = counted(inputs, targets, TASKS["task_switching"])
    local = reach("task_switching_local", tmp_path / "local", epochs=2)
    assert most < 0.35 and local.accuracy <= most and local.loss >= least
    assert reach("task_switching", tmp_path / "whole").accuracy > 0.98


@pytest.mark.slow
def test_a_function_is_fitted_by_one_layer(tmp_path):
    assert reach("function_fitting", tmp_path).accuracy > 0.97
