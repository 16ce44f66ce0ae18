"""Questions in two orders of their options: what is asked, side by side in a rollout, and what consistency earns."""

import json
import re
from types import SimpleNamespace

import pytest
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader

from open_r1.base.prompts import sat_question
from open_r1.doctor.data import prompt_lengths
from open_r1.doctor.survey import Survey
from open_r1.models.loading import load_model, load_processor
from open_r1.rewards import accuracy_reward, order_consistency_reward
from open_r1.running.data import ROTATION_OF, DataArguments, in_two_orders, load_dataset, load_datasets_from_args
from open_r1.tasks.examples import read_examples
from open_r1.trainer.sampling import EpochSampler, PromptSamplingMixin
from open_r1.trainer.trainer import Qwen2VLGRPOTrainer
from support import Scripted, make_config, read_jsonl, write_examples

ASKED = "Will it be to my left or right?"


def example(options, solution="left", text=None):
    text = sat_question(ASKED, options or ["none"]) if text is None else text
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
    return {"prompt": prompt, "images": ["a.png"], "solution": solution, "options": options, "mine": 1}


@pytest.mark.parametrize(
    "options, rotated",
    [(["left", "up, down", "right"], ["up, down", "right", "left"]), (["left", "left side"], ["left side", "left"])],
)
def test_a_question_in_two_orders(options, rotated):
    row = example(options)
    assert in_two_orders(row, 7) == [{**row, ROTATION_OF: 7}, {**example(rotated), ROTATION_OF: 7}]
    assert row == example(options)


@pytest.mark.parametrize(
    "row",
    [
        example(["left"]),
        example(["left", "right"], solution=None),
        example(["left", "right"], text="Where? (A) left (B) right"),
    ],
)
def test_a_question_that_lists_no_options_has_no_other_order(row):
    with pytest.raises(ValueError, match=r"^rotate_options: needs a question that lists its options, 'a, b or c'"):
        in_two_orders(row, 0)


def test_pairs_are_asked_side_by_side(tmp_path):
    """Shuffled as pairs, by seed and epoch alone; every row of an epoch once, both halves of a pair in one process."""
    settings = {"mini_repeat_count": 4, "batch_size": 4, "seed": 3}
    orders = []
    for epoch in (0, 1, 0):
        sampler = EpochSampler(range(10), together=2, **settings)
        sampler.set_epoch(epoch)
        rows = list(sampler)
        assert len(rows) == len(sampler) == 2 * 4 * 4  # 10 rows are two batches of 4, and a rest
        assert len(set(rows)) == 8 and all(rows.count(row) == 4 for row in rows)
        for start in range(0, len(rows), 8):
            assert rows[start : start + 8] == [row for row in (rows[start], rows[start] + 1) for _ in range(4)]
            assert rows[start] % 2 == 0
        orders.append(rows)
    assert orders[0] == orders[2] != orders[1]
    assert len(list(EpochSampler(range(10), repeat_count=3, together=2, **settings))) == 3 * 32


@pytest.mark.parametrize("processes, index", [(1, 0), (2, 0), (2, 1)])
def test_an_epoch_that_is_resumed_in_its_middle_keeps_its_order(processes, index):
    """accelerate wraps the batches of several processes, and a resume wraps them once more."""

    class Trainer:
        def get_train_dataloader(self) -> DataLoader:
            sampler = EpochSampler(range(16), mini_repeat_count=1, batch_size=4, seed=3)
            loader = DataLoader(range(16), sampler=sampler, batch_size=2)
            return prepare_data_loader(loader, num_processes=processes, process_index=index, put_on_device=False)

    Ours = type("Ours", (PromptSamplingMixin, Trainer), {})

    def batches(epoch: int, skipped: int = 0) -> list[list[int]]:
        loader = Ours().get_train_dataloader()
        loader = skip_first_batches(loader, skipped) if skipped else loader
        loader.set_epoch(epoch)
        return [batch.tolist() for batch in loader]

    assert batches(1) != batches(0)
    assert batches(1, skipped=2) == batches(1)[2:]


def test_questions_of_a_mixture_have_numbers_of_their_own(tiny_model, tmp_path):
    """Also behind rows that are left out, in any set: a pair is two neighbours, and their number is theirs alone."""
    for name, count in (("one", 4), ("two", 3)):
        data = write_examples(tmp_path / name, count)
        records = json.loads(data.read_text())
        records[1]["messages"][0]["content"] = "<image>" + sat_question("So? " * 400, records[1]["options"])
        data.write_text(json.dumps(records))
    (tmp_path / "m.yaml").write_text("datasets: [{path: one/examples.json}, {path: two/examples.json}]")
    processor = load_processor(tiny_model, chat_template="base")
    rows = load_dataset(tmp_path / "m.yaml", processor, 1024, rotate_options=True)
    assert rows[ROTATION_OF] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    for one, other in zip(rows.select(range(0, 10, 2)), rows.select(range(1, 10, 2)), strict=True):
        assert one["images"] == other["images"] and one["options"] == other["options"][::-1]


def test_what_is_held_out_is_asked_in_one_order(tiny_model, tmp_path):
    arguments = DataArguments(
        str(write_examples(tmp_path / "one", 4)), eval_dataset_name=str(write_examples(tmp_path / "two", 3))
    )
    processor = load_processor(tiny_model, chat_template="base")
    train, held_out = load_datasets_from_args(arguments, processor, {}, rotate_options=True)
    assert (len(train), len(held_out)) == (8, 3) and ROTATION_OF not in held_out.column_names
    asked = [row["prompt"] for row in read_examples(tmp_path / "two/examples.json")]
    assert held_out["prompt"] == asked


def test_the_doctor_counts_questions_and_not_their_orders(tiny_model, tmp_path):
    run = SimpleNamespace(processor=load_processor(tiny_model, chat_template="base"), template_kwargs={})
    run.script_args = SimpleNamespace(max_prompt_length=1024)
    run.rows = load_dataset(write_examples(tmp_path, 4), run.processor, 1024, rotate_options=True)
    run.train_set = Survey(rows=5)
    (finding,) = prompt_lengths(run)
    assert finding.what.startswith("1 of 5 rows left out (20.0%); 4 others have ")


@pytest.mark.parametrize("choose, consistency", [(lambda options: options[0], 0.0), (min, 1.0)])
def test_a_run_pays_for_what_does_not_depend_on_the_order(tiny_model, tmp_path, choose, consistency):
    """A policy that names the first option, and one that names the same in any order."""
    processor = load_processor(tiny_model, chat_template="base", max_pixels=12544)
    data = load_dataset(write_examples(tmp_path), processor, rotate_options=True)
    assert len(data) == 16 and data[ROTATION_OF] == [row // 2 for row in range(16)]
    assert data[0]["options"] == data[1]["options"][::-1] and data[0]["solution"] == data[1]["solution"]
    held_out = load_dataset(write_examples(tmp_path), processor)
    trainer = Qwen2VLGRPOTrainer(
        model=load_model(tiny_model, dtype="float32"),
        reward_funcs=[accuracy_reward, order_consistency_reward],
        args=make_config(tmp_path / "out", max_completion_length=200, eval_strategy="steps", eval_steps=2),
        train_dataset=data,
        eval_dataset=held_out,
        processing_class=processor,
    )

    def complete(prompts):
        completions = []
        for prompt in map(processor.decode, prompts):
            options = re.findall(r"options: (\w+) or (\w+)", prompt)[-1]
            completions.append(f"So.</think><answer>{choose(options)}</answer>")
        return [[*processor.tokenizer(text)["input_ids"], processor.tokenizer.eos_token_id] for text in completions]

    trainer.backend = Scripted(trainer.backend, complete)
    trainer.train()
    rows = read_jsonl(tmp_path / "out/trajectories/train.jsonl")
    assert len(rows) == 2 * 8 and {row["rewards"]["order_consistency_reward"] for row in rows} == {consistency}
    for start in range(0, 16, 8):
        one, other = rows[start]["options"], rows[start + 4]["options"]
        assert one == other[::-1] and rows[start]["images"] == rows[start + 4]["images"]
    held_out = read_jsonl(tmp_path / "out/trajectories/eval.jsonl")
    assert held_out and {row["rewards"]["order_consistency_reward"] for row in held_out} == {None}
