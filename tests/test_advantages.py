"""Advantages: the arithmetic by hand, equal to stock TRL's for every setting, and another one named in a recipe."""

import itertools
from collections import defaultdict, deque

import pytest
import torch
from trl import GRPOTrainer

from open_r1.base.errors import Mistake, UserCodeError
from open_r1.trainer.advantages import checked, choose_advantage, group_advantages, leave_one_out, spread
from open_r1.trainer.metrics import reward_figures
from open_r1.trainer.recorder import Rollout, Rows
from support import make_trainer, read_jsonl, vowel_share

trls_step = GRPOTrainer._generate_and_score_completions
NAN = float("nan")
WEIGHTS = torch.tensor([1.0, 0.5])
REWARDS = {  # (B, F), two groups of four
    "plain": [[1, 1], [0, 1], [0, 0], [1, 0], [0, 1], [0, 0], [1, 1], [1, 1]],
    "a group without signal": [[1, 1]] * 4 + [[1, 0], [0, 0], [0, 1], [0.25, 0]],
    "a function says nothing of some": [[1, NAN], [0, 1], [NAN, 0], [1, 0], [0, NAN], [0, 0], [1, 1], [1, NAN]],
    "nobody says anything of some": [[NAN, NAN], [0, 1], [NAN, 0], [1, 0], [NAN, NAN], [NAN, NAN], [1, 1], [1, 0]],
    "one of a group alone has a reward": [[NAN, NAN]] * 3 + [[1, NAN], [0, 1], [1, 0], [1, 1], [0, 0]],
}
SETTINGS = [*itertools.product(("group", "batch", "none"), ("sum_then_normalize", "normalize_then_sum"))]


def stock(trainer, rewards, scale_rewards, aggregation, monkeypatch):
    """What stock TRL makes of these rewards: its own body, with the tokens written here."""
    size = len(rewards)
    prompts = [[{"role": "user", "content": [{"type": "text", "text": "?"}]}]] * size
    sampled = ([[65]] * size, [[66, 67]] * size, None, ["x"] * size, None, {}, None, [])
    settings = {
        "scale_rewards": scale_rewards,
        "multi_objective_aggregation": aggregation,
        "reward_weights": WEIGHTS,
        "reward_func_names": ["a", "b"],
        "reward_funcs": [None, None],
        "_logs": defaultdict(lambda: deque(maxlen=100), rewards=defaultdict(list)),
        "_generate": lambda prompts: sampled,
        "_calculate_rewards": lambda *args: rewards,
    }
    for name, value in settings.items():
        monkeypatch.setattr(trainer, name, value)
    trainer._metrics["train"].clear()
    output = trls_step(trainer, [{"prompt": prompt} for prompt in prompts])
    return output["advantages"], trainer._metrics["train"]


@pytest.fixture(scope="module")
def trainer(tiny_model, examples_json, tmp_path_factory):
    trainer = make_trainer(tiny_model, examples_json, tmp_path_factory.mktemp("run"), vowel_share, beta=0.0)
    trainer.model.train()
    return trainer


@pytest.mark.parametrize("case", REWARDS)
@pytest.mark.parametrize("scale_rewards, aggregation", SETTINGS)
def test_advantages_and_what_is_logged_of_rewards_are_stock_trls(
    case, scale_rewards, aggregation, trainer, monkeypatch
):
    rewards = torch.tensor(REWARDS[case], dtype=torch.float)
    expected, metrics = stock(trainer, rewards, scale_rewards, aggregation, monkeypatch)
    assert trainer.num_generations == 4
    settings = {"scale_rewards": scale_rewards, "aggregation": aggregation}
    torch.testing.assert_close(group_advantages(rewards, WEIGHTS, 4, **settings), expected)
    figures = reward_figures(rewards, WEIGHTS, ["a", "b"], spread(rewards, WEIGHTS, 4, **settings))
    assert set(figures) <= set(metrics)
    for name, value in figures.items():
        assert [value] == pytest.approx(metrics[name], nan_ok=True), name


def test_the_formula_by_hand():
    rewards = torch.tensor([[1.0], [0.0], [0.0], [1.0], [3.0], [3.0], [3.0], [3.0]])
    std = (1 / 3) ** 0.5
    expected = [0.5 / (std + 1e-4), -0.5 / (std + 1e-4), -0.5 / (std + 1e-4), 0.5 / (std + 1e-4), 0, 0, 0, 0]
    assert group_advantages(rewards, torch.ones(1), 4).tolist() == pytest.approx(expected)
    alone = leave_one_out(torch.tensor([[1.0], [0.0], [0.0], [0.0], [NAN], [2.0], [1.0], [NAN]]), torch.ones(1), 4)
    assert alone.tolist() == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3, 0, 1, -1, 0])


@pytest.mark.parametrize("returned", [torch.zeros(3), torch.full((4,), NAN), [0.0] * 4, None])
def test_what_is_no_advantage_is_one_line(returned):
    advantage = checked(lambda rewards, weights, group_size: returned, "mine:own")
    with pytest.raises(Mistake, match=r"^advantage: mine:own returned .*; expected a tensor of 4 finite numbers$"):
        advantage(torch.zeros(4, 1), torch.ones(1), 4)


def test_what_an_advantage_raises_names_it():
    for advantage, message in (
        (lambda rewards: rewards, r"TypeError: .*takes 1 positional argument but 3 were given$"),
        (lambda rewards, weights, group_size: [][group_size], r"IndexError: .* \(.*test_advantages\.py, line \d+\)$"),
    ):
        with pytest.raises(UserCodeError, match=rf"^advantage: mine:own raised {message}"):
            checked(advantage, "mine:own")(torch.zeros(4, 1), torch.ones(1), 4)


def test_another_advantage_reaches_loss_trajectories_and_refills(tiny_model, examples_json, tmp_path, monkeypatch):
    """One function in a file of the user's and one line of a recipe."""
    (tmp_path / "mine.py").write_text("def own(rewards, weights, group_size):\n    return rewards[:, 0].round()\n")
    monkeypatch.chdir(tmp_path)
    settings = {"max_steps": 1, "min_signal_groups": 0.1, "max_refills": 1, "remove_unused_columns": False}
    output = tmp_path / "out"
    trainer = make_trainer(tiny_model, examples_json, output, vowel_share, advantage="mine:own", **settings)
    learned, loss = [], trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: learned.extend(inputs["advantages"].tolist()) or loss(model, inputs)
    trainer.train()
    rows = read_jsonl(output / "trajectories/train.jsonl")
    assert [row["advantage"] for row in rows] == [round(row["rewards"]["vowel_share"]) for row in rows]
    assert learned and set(learned) <= {row["advantage"] for row in rows}


def test_an_unknown_advantage_names_those_there_are():
    with pytest.raises(Mistake, match=r"^advantage: unknown advantage 'rloo' \(known: leave_one_out; your own: "):
        choose_advantage("rloo", "group", "sum_then_normalize")


# --- what corrects for an engine that samples from something else ----------------------------------------------


def sample(trainer):
    """Eight completions of two prompts, with what an engine says of their tokens; one of these it could not score."""
    torch.manual_seed(0)
    contents = ([{"type": "text", "text": text}] for text in ("Where?", "How many of them?"))
    prompts = [[{"role": "user", "content": content}] for content in contents for _ in range(4)]
    found = trainer._roll_out(prompts, trainer)
    ids = found["completion_ids"]
    said = [[-1.0 - 0.1 * token for token in range(len(row))] for row in ids]
    said[0][0] = None
    texts = [[{"role": "assistant", "content": text}] for text in trainer.processing_class.batch_decode(ids)]
    extra = {name: found[name] for name in ("encoded", "is_broken")}
    return [{"prompt": prompt} for prompt in prompts], (found["prompt_ids"], ids, None, texts, said, extra, None, [])


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("bounds, masks_cut", [((None, 3.0), False), ((0.5, 2.0), True)])
def test_a_step_with_an_engine_is_stock_trls(mode, bounds, masks_cut, trainer, monkeypatch):
    """What the loss gets and what is logged, of the same completions and log-probabilities of an engine."""
    rows, sampled = sample(trainer)
    settings = {"use_vllm": True, "vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": mode}
    settings |= dict(
        zip(("vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max"), bounds, strict=True)
    )
    for name, value in {**settings, "mask_truncated_completions": masks_cut, "_generate": lambda _: sampled}.items():
        monkeypatch.setattr(trainer, name, value)
    outputs, metrics = [], []
    for take in (trainer._take_step, lambda rollout: trls_step(trainer, Rows(rows, rollout))):
        trainer._metrics["train"].clear()
        outputs.append(take(Rollout(rows, 0, [False] * 8)))
        metrics.append({n: v for n, v in trainer._metrics["train"].items() if not n.startswith(("time/", "packing/"))})
    ours, stock = outputs
    assert {"old_per_token_logps", "importance_sampling_ratio", "sampling_per_token_logps"} < set(stock) <= set(ours)
    for name in stock:
        torch.testing.assert_close(ours[name], stock[name], equal_nan=True, atol=1e-5, rtol=1e-4)
    assert metrics[0].keys() == metrics[1].keys() and "sampling/importance_sampling_ratio/mean" in metrics[0]
    for name, values in metrics[0].items():
        assert values == pytest.approx(metrics[1][name], abs=1e-5, rel=1e-4), name
