"""Files and folders that recipes and arguments name are found from anywhere, and recorded so that they stay found."""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
import yaml

from open_r1 import grpo, sft
from open_r1.base.errors import REPO_ROOT
from open_r1.settings.recipes import PATHS, find_setting, merge_recipes, read_files, read_recipe

KINDS = {kind for command in (grpo.COMMAND, sft.COMMAND) for kind in command.arguments}
# What has "path", "file" or "folder" in its name or type's help and is looked up nowhere: written to, or a name alone.
NO_PATHS = {
    *("output_dir", "save_total_limit", "hub_model_id", "skip_memory_metrics", "do_train", "do_eval", "do_predict"),
    *("dataset_config", "dataset_train_split", "dataset_test_split", "shared_prefix", "task"),
    *("pad_token", "use_dora", "loss_type"),
}


def test_every_setting_that_may_be_a_path_is_looked_up():
    """A new version's setting fails here, and is put into one of both lists."""
    words = re.compile(r"\b(?:path|file|folder|directory)\b|_(?:path|file|dir|folder)$", re.IGNORECASE)
    fields = [field for kind in KINDS for field in dataclasses.fields(kind)]
    found = {f.name for f in fields if words.search(f"{f.name} {(f.metadata or {}).get('help', '')}")}
    assert found - NO_PATHS <= set(PATHS) <= {field.name for field in fields}


@pytest.fixture
def places(tmp_path, monkeypatch) -> dict[str, Path]:
    """A folder of recipes, a current folder and one that plays the repository; each has its own of everything."""
    found = {name: tmp_path / name for name in ("recipes", "here", "repository")}
    for folder in found.values():
        (folder / "model").mkdir(parents=True)
        (folder / "base").mkdir()
        for name in ("rows.json", "mine.jinja", "zero.json"):
            (folder / name).write_text("{}")
    monkeypatch.setattr("open_r1.settings.recipes.REPO_ROOT", found["repository"])
    monkeypatch.chdir(found["here"])
    return found


@pytest.mark.parametrize(
    "setting, name",
    [
        ("model_name_or_path", "model"),
        ("dataset_name", "rows.json"),
        ("eval_dataset_name", "./rows.json"),
        ("chat_template", "mine.jinja"),
        ("deepspeed", "zero.json"),
        ("resume_from_checkpoint", "../recipes/model"),
    ],
)
def test_a_recipes_paths_are_seen_from_its_file_then_from_here_then_from_the_repository(places, setting, name):
    recipe = places["recipes"] / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({setting: name}))
    for folder in ("recipes", "here", "repository"):
        expected = os.path.normpath(places[folder] / name)
        assert merge_recipes([str(recipe)]) == {setting: expected}
        leaf = places[folder] / name
        leaf.rmdir() if leaf.is_dir() else leaf.unlink()
        if ".." in name:  # one place for all three
            break
    assert merge_recipes([str(recipe)]) == {setting: name}  # a name on the Hub, or a mistake that is told as it is


def test_an_overlays_paths_are_seen_from_the_overlay(places):
    (places["recipes"] / "overlay.yaml").write_text("dataset_name: rows.json")
    (places["here"] / "recipe.yaml").write_text("dataset_name: rows.json\nmodel_name_or_path: model\n")
    merged = merge_recipes(["recipe.yaml", "../recipes/overlay.yaml"])
    assert merged["dataset_name"] == str(places["recipes"] / "rows.json")
    assert merged["model_name_or_path"] == str(places["here"] / "model")


def test_the_files_that_a_recipe_changes_are_found_like_its_paths(places):
    (places["recipes"] / "recipe.yaml").write_text("base: [below.yaml, shipped.yaml]")
    (places["here"] / "below.yaml").write_text("beta: 0")
    (places["repository"] / "shipped.yaml").write_text("model_name_or_path: model")
    files = read_files(["../recipes/recipe.yaml"])
    assert [path.name for path, _ in files] == ["below.yaml", "shipped.yaml", "recipe.yaml"]
    assert files[1][1] == {"model_name_or_path": str(places["repository"] / "model")}


@pytest.mark.parametrize(
    "setting, value",
    [
        ("chat_template", "base"),  # a folder of that name is no template: it is this project's
        ("model_name_or_path", "Qwen/Qwen2-VL-2B"),
        ("model_name_or_path", "rows.json"),  # a file is no model; told as it was written
        ("resume_from_checkpoint", "auto"),
        ("dataset_name", "no" * 3000),
        ("dataset_name", "a\0b"),
        ("deepspeed", {"zero_optimization": {"stage": 2}}),
        ("run_name", "model"),  # no path
    ],
)
def test_what_leads_to_nothing_stays_as_it_is(places, setting, value):
    assert find_setting(setting, value, places["recipes"]) == value


def test_arguments_are_seen_from_here_then_from_the_repository(places):
    arguments = ["--dataset_name", "rows.json", "--output_dir", "out", "--use_cpu", "true", "--bf16", "false"]
    arguments += ["--model_name_or_path", "model", "--chat_template", "base", "--reward_funcs", "accuracy"]
    (places["here"] / "model").rmdir()
    script_args, _, model_args = read_recipe(grpo.COMMAND.arguments, arguments)
    assert script_args.dataset_name == str(places["here"] / "rows.json") and script_args.chat_template == "base"
    assert model_args.model_name_or_path == str(places["repository"] / "model")


def test_shipped_recipes_mean_the_same_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = merge_recipes(["configs/tiny/grpo.yaml"])
    assert settings["model_name_or_path"] == str(REPO_ROOT / "configs/tiny/base")
    assert settings["chat_template"] == "base"
    assert settings["dataset_name"].endswith("src/data/SAT/SAT_train_15000.json")  # absolute once it is prepared


def test_a_recipe_names_its_data_and_output_where_nobody_else_does(tmp_path):
    (tmp_path / "recipe.yaml").write_text("dataset_name: rows.json\noutput_dir: /from/the/recipe\nuse_cpu: true\n")
    (tmp_path / "rows.json").write_text(json.dumps([]))
    arguments = ["--config", "configs/grpo_sat.yaml", "--bf16", "false", "--use_cpu", "true"]
    script_args, args, _ = read_recipe(grpo.COMMAND.arguments, arguments)
    assert args.output_dir == str(REPO_ROOT / "outputs/grpo_sat")
    script_args, args, _ = read_recipe(grpo.COMMAND.arguments, [*arguments, "--config", str(tmp_path / "recipe.yaml")])
    assert (script_args.dataset_name, args.output_dir) == (str(tmp_path / "rows.json"), "/from/the/recipe")
