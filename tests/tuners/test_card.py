"""The model card tells the truth about the adapter beside it, and leaves alone what others wrote."""

import contextlib
import re
import shutil
from collections import Counter
from pathlib import Path

import huggingface_hub.hf_api
import huggingface_hub.repocard
import pytest
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig
from tolerances import assert_near
from transformers import Trainer, TrainingArguments
from tuners.families import build, logits
from tuners.wrapped import config_for, every_method, own_trains, trained, wrap

from loretta import InputError, PeftModel, export_lora, get_peft_model
from loretta.plan import read_plan, trainable_by_kind
from loretta.tuners.card import write_card

ADAPTER_FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def saved(folder: Path, family: str = "llama", method: str = "rep", task: str | None = None, **options) -> PeftModel:
    model, _ = wrap(family, method, task, **options)
    model.save_pretrained(str(folder))
    return model


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def rows(card: ModelCard, heading: str) -> list[list[str]]:
    """The cells of the table whose first column is ``heading``."""
    table = re.search(rf"^\| {heading} .*\n\|[-|]+\n((?:\|.*\n)+)", card.text, re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table[1].splitlines()] if table else []


def number(words: str) -> int:
    return int(words.split()[0].replace(",", ""))


@every_method
@pytest.mark.parametrize(
    ("family", "task", "options"),
    [
        ("llama", "CAUSAL_LM", {}),
        ("gpt2", "CAUSAL_LM", {"bias": "all"}),
        ("bert", "SEQ_CLS", {"init_weights": "denoised"}),
        ("bert", "SEQ_CLS", {"train_head": "frozen"}),
        ("roberta", "SEQ_CLS", {"train_head": "dense"}),
        ("modernbert", "SEQ_CLS", {"train_norms": False}),
        ("llama", "CAUSAL_LM", {"modules_to_save": ["lm_head"]}),
        ("llama", "CAUSAL_LM", {"train_norms": False, "train_head": "frozen", "modules_to_save": ["norm", "lm_head"]}),
    ],
    ids=lambda value: " ".join(map(str, value.values())) or "defaults" if isinstance(value, dict) else value,
)
def test_the_numbers_are_those_of_the_model(family, task, options, method, tmp_path):
    model = saved(tmp_path, family, method, task, **options)
    written = {kind: (number(words), what) for kind, words, what in rows(card_of(tmp_path), "in the file")}
    total, _ = written.pop("together")
    assert total == sum(count for count, _ in written.values())
    counts = trainable_by_kind(model)
    names = {"cores": "cores of the trains", "biases": "biases", "norms": "layer norms"}
    names["head"] = "head and other modules saved whole"
    for kind, name in names.items():
        count, what = written.get(name, (0, "all"))
        assert counts[kind] == (0 if what == "none" else count), name
    file = tmp_path / "adapter_model.safetensors"
    assert f"({file.stat().st_size:,} bytes)" in card_of(tmp_path).text


def test_modules_that_a_user_lists_are_trained_beside_a_frozen_head(tmp_path):
    saved(
        tmp_path,
        "modernbert",
        "rep",
        "SEQ_CLS",
        train_norms=False,
        train_head="frozen",
        modules_to_save=["tok_embeddings"],
    )
    said = {kind: what for kind, _, what in rows(card_of(tmp_path), "in the file")}
    assert said["head and other modules saved whole"] == "none of the head, and all of the others"


def test_the_sides_of_a_shared_train_are_those_of_the_model(tmp_path):
    saved(tmp_path, "llama", "shared", tensor_rank=2, target_modules=["q_proj", "v_proj", "up_proj"],
          shapes={"2x48": [8, 12]})  # fmt: skip
    sides = {name: shapes for name, _, *shapes in rows(card_of(tmp_path), "modules")}
    assert sides == {"`q_proj`": ["32 x 2", "2 x 32"], "`up_proj`": ["32 x 2", "1·8·2, 2·12·1"],
                     "`v_proj`": ["32 x 2", "2 x 16"]}  # fmt: skip
    assert "two 2 x 2 cores" in card_of(tmp_path).text


@own_trains
@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_the_trains_are_those_of_the_model(family, method, tmp_path):
    model = saved(tmp_path, family, method, tensor_rank=2)
    expected = Counter(
        (f"`{p.name.rpartition('.')[2]}`", *("; ".join(map(str, shape.cores)) for shape in (p.down, p.up)))
        for p in read_plan(model).placements
    )
    found = {}
    for name, count, *shapes in rows(card_of(tmp_path), "modules"):
        cores = ([tuple(map(int, core.split("·"))) for core in shape.split(", ")] for shape in shapes)
        found[name, *("; ".join(map(str, shape)) for shape in cores)] = int(count)
    assert found == expected


@pytest.mark.parametrize(
    ("family", "method", "task", "base"),
    [
        ("llama", "rep", "CAUSAL_LM", {}),
        ("llama", "shared", "CAUSAL_LM", {}),
        ("t5", "adp", "SEQ_2_SEQ_LM", {}),
        ("roberta", "adp", "SEQ_CLS", {"num_labels": 3}),
        ("llama", "rep", "SEQ_CLS", {"num_labels": 5}),
        ("bart", "rep", "SEQ_CLS", {"num_labels": 4}),
        ("gpt2", "adp", None, {}),
    ],
)
def test_its_program_loads_the_adapter(family, method, task, base, tmp_path, monkeypatch):
    model, inputs = build(family, task, **base)
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    wrapped = trained(with_adapter(model, method, task)).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    load, *merge = re.findall(r"```python\n(.*?)```", card_of(tmp_path / "adapter").text, re.DOTALL)
    names: dict = {}
    exec(load.replace("path/to/this/folder", str(tmp_path / "adapter")), names)
    assert isinstance(names["model"], PeftModel)
    assert_near("logits", logits(names["model"].eval(), inputs), logits(wrapped, inputs))
    assert len(merge) == (method != "adp")
    for program in merge:
        exec(program, names)
        assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("method", ["rep", "shared"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"train_norms": False},
        {"train_norms": False, "train_scales": ["mlp"]},
        {"train_norms": False, "modules_to_save": ["norm"]},
        {"train_norms": False, "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_it_promises_a_lora_where_one_can_be_written(options, method, tmp_path):
    model = saved(tmp_path, "llama", method, "CAUSAL_LM", **options)
    with contextlib.suppress(InputError):
        export_lora(model, tmp_path / "lora")
    written = (tmp_path / "lora").exists()
    text = card_of(tmp_path).text
    assert ("export --to lora" in text, "export --to merged" in text) == (written, not written)


def with_adapter(model, method: str, task: str | None) -> PeftModel:
    return get_peft_model(model, config_for(method, task_type=task))


def saved_with_base(folder: Path, name: str) -> ModelCard:
    """The card of an adapter of a model that was loaded from ``name``."""
    model, _ = build("llama")
    model.config._name_or_path = model.name_or_path = name
    # False: PEFT would look for the base model to compare vocabularies
    with_adapter(model, "rep", "CAUSAL_LM").save_pretrained(folder, save_embedding_layers=False)
    return card_of(folder)


def test_metadata(tmp_path):
    card = saved_with_base(tmp_path, "someone/some-model")
    assert card.data.library_name == "peft"
    assert card.data.base_model == "someone/some-model"
    assert {"loretta", "tensor-train", "base_model:adapter:someone/some-model"} <= set(card.data.tags)
    assert card.data.pipeline_tag == "text-generation"
    assert card.text.lstrip().startswith("# LoRETTA adapter of someone/some-model\n")
    assert 'from_pretrained("someone/some-model")' in card.text


def test_dense_adapters_are_not_called_trains(tmp_path):
    model, _ = wrap("llama", "adp", dense=True)
    model.save_pretrained(tmp_path)
    described = (tmp_path / "README.md").read_text(encoding="utf-8").split("## What was trained")[1]
    assert "| `o_proj` | 2 | 32 x 64 | 64 x 32 |" in described
    assert "| matrices of the adapters | 16,384 | all |" in described
    assert not re.search(r"rank|train down|cores", described)


@pytest.mark.parametrize("is_absolute", [True, False])
def test_the_path_of_a_local_base_is_no_metadata(is_absolute, tmp_path, monkeypatch):
    """The Hub refuses a card whose base_model is not the name of a model there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-base").mkdir()
    card = saved_with_base(tmp_path / "adapter", str(tmp_path / "my-base") if is_absolute else "my-base")
    assert card.data.base_model is None
    assert not any("my-base" in tag for tag in card.data.tags)
    assert card.text.lstrip().startswith("# LoRETTA adapter of my-base\n")


def test_no_placeholder_is_left(tmp_path):
    saved(tmp_path)
    text = card_of(tmp_path).text
    assert "Needed" not in text
    assert "- PEFT " in text


def test_saving_again_changes_nothing(tmp_path):
    model = saved(tmp_path, "bert", "adp")
    before = (tmp_path / "README.md").read_bytes()
    model.save_pretrained(str(tmp_path))
    assert (tmp_path / "README.md").read_bytes() == before


def test_words_around_the_description_stay_and_the_description_follows_the_adapter(tmp_path):
    saved(tmp_path, tensor_rank=3)
    card = card_of(tmp_path)
    card.data["license"] = "mit"
    card.text = card.text.replace("# LoRETTA adapter of", "# My film critic on") + "\n## Limits\n\nOnly films.\n"
    card.save(tmp_path / "README.md")
    saved(tmp_path, tensor_rank=2)
    after = card_of(tmp_path)
    assert after.data.license == "mit"
    assert after.text.lstrip().startswith("# My film critic on")
    assert after.text.rstrip().endswith("## Limits\n\nOnly films.")
    assert "inner rank 2" in after.text
    assert "inner rank 3" not in after.text


def test_a_description_that_someone_edited_stays(tmp_path):
    saved(tmp_path, tensor_rank=3)
    card = card_of(tmp_path)
    card.text = card.text.replace("## What was trained", "## What I trained, and why")
    card.save(tmp_path / "README.md")
    saved(tmp_path, tensor_rank=2)
    after = card_of(tmp_path).text
    assert "## What I trained, and why" in after
    assert "inner rank 3" in after
    assert after.count("<!-- end of loretta -->") == 1


def test_the_card_of_another_tool_is_kept(tmp_path):
    """As TRL does: it writes its own card into the folder before the adapter is saved."""
    theirs = "# Model Card for critic\n\nThis model was trained with a tool.\n\n## Quick start\n\n```python\nx = 1\n```"
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n---\n\n{theirs}\n", encoding="utf-8")
    saved(tmp_path)
    card = card_of(tmp_path)
    assert card.text.lstrip().startswith(theirs)
    assert "## Load it" in card.text
    assert card.data.license == "mit"


def test_a_card_with_windows_line_ends_is_recognised(tmp_path):
    saved(tmp_path, tensor_rank=3)
    readme = tmp_path / "README.md"
    before = readme.read_bytes()
    readme.write_bytes(before.replace(b"\n", b"\r\n"))
    write_card(tmp_path)
    assert readme.read_bytes().replace(b"\r\n", b"\n") == before


def test_a_named_adapter_has_its_own_card(tmp_path):
    model = saved(tmp_path)
    model.add_adapter("other", config_for("rep", task_type="CAUSAL_LM", tensor_rank=2))
    model.save_pretrained(str(tmp_path))
    assert "inner rank 3" in card_of(tmp_path).text
    assert "inner rank 2" in card_of(tmp_path / "other").text
    assert card_of(tmp_path / "other").data.library_name == "peft"


def test_the_old_file_format_is_described_too(tmp_path):
    model, _ = wrap("llama", "rep")
    model.save_pretrained(str(tmp_path / "old"), safe_serialization=False)
    model.save_pretrained(str(tmp_path / "new"))
    old, new = (rows(card_of(tmp_path / name), "in the file")[:-1] for name in ("old", "new"))
    assert old == new != []


def test_without_weights_there_is_no_card(tmp_path):
    """A config by itself, and transformers' own adapters, which it saves after their config."""
    config_for("rep").save_pretrained(str(tmp_path / "config"))
    model, _ = build("llama")
    model.add_adapter(config_for("rep", task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.rglob("README.md"))
    with pytest.raises(FileNotFoundError):
        write_card(tmp_path / "config")


class LocalHub:
    """Folders in place of the Hub's repositories, for the calls that an upload makes."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        monkeypatch.setattr(HfApi, "create_repo", self._create_repo)
        monkeypatch.setattr(HfApi, "create_commit", self._create_commit)
        # uploads in one commit, without asking the Hub how to send each file
        monkeypatch.setattr(huggingface_hub.hf_api, "is_xet_available", lambda: False)
        monkeypatch.setattr(HfApi, "_validate_yaml", lambda *args, **kwargs: None)
        monkeypatch.setattr(huggingface_hub.repocard, "hf_hub_download", self._download)

    def files(self, repo: str) -> list[str]:
        return sorted(path.name for path in (self.root / repo).iterdir())

    def _create_repo(self, repo_id: str, **kwargs):
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return type("RepoUrl", (), {"repo_id": repo_id})

    def _create_commit(self, repo_id: str, operations, **kwargs):
        for operation in operations:
            shutil.copy(operation.path_or_fileobj, self.root / repo_id / operation.path_in_repo)
        return type("CommitInfo", (), {"commit_url": repo_id, "pr_url": None})

    def _download(self, repo_id: str, filename: str, **kwargs) -> str:
        if not (self.root / repo_id / filename).is_file():
            raise EntryNotFoundError(f"no {filename} in {repo_id}")
        return str(self.root / repo_id / filename)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> LocalHub:
    return LocalHub(tmp_path / "hub", monkeypatch)


@every_method
def test_an_uploaded_folder_is_the_adapter_with_its_card(method, hub, tmp_path):
    model, inputs = wrap("roberta", method)
    trained(model).save_pretrained(str(tmp_path / "adapter"))
    HfApi().create_repo(repo_id="me/critic")
    HfApi().upload_folder(repo_id="me/critic", folder_path=tmp_path / "adapter")
    assert hub.files("me/critic") == ADAPTER_FILES
    assert "import loretta" in ModelCard.load("me/critic").text
    loaded = PeftModel.from_pretrained(build("roberta")[0], str(hub.root / "me/critic")).eval()
    assert_near("logits", logits(loaded, inputs), logits(model.eval(), inputs))


def test_push_to_hub_uploads_the_adapter_and_keeps_a_card_that_is_there(hub, tmp_path):
    model, inputs = wrap("llama", "rep")
    trained(model).push_to_hub("me/critic")
    assert hub.files("me/critic") == ADAPTER_FILES
    loaded = PeftModel.from_pretrained(build("llama")[0], str(hub.root / "me/critic")).eval()
    assert_near("logits", logits(loaded, inputs), logits(model.eval(), inputs))
    # what the docs warn of: transformers lays its own card over the one that was saved ...
    assert "import loretta" not in ModelCard.load("me/critic").text
    # ... unless the repository has one
    model.save_pretrained(str(tmp_path / "adapter"))
    ModelCard.load(tmp_path / "adapter" / "README.md").save(hub.root / "me/critic/README.md")
    model.push_to_hub("me/critic")
    assert "import loretta" in ModelCard.load("me/critic").text


@pytest.mark.parametrize("method", ["rep", "lora"])
def test_a_trainers_card_has_our_part_beside_its_own(method, hub, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM") if method == "lora" else config_for(method, task_type="CAUSAL_LM")
    model = get_peft_model(build("llama")[0], config)
    arguments = TrainingArguments(str(tmp_path / "run"), hub_model_id="me/critic", report_to=[], use_cpu=True)
    Trainer(model, arguments).push_to_hub()
    card, ours = ModelCard.load("me/critic"), method == "rep"
    assert "### Training hyperparameters" in card.text
    assert card.text.count("import loretta") == ours
    assert ("loretta" in card.data.tags) == ours


def test_trls_card_has_our_tag(hub, tmp_path):
    from trl.trainer.base_trainer import _BaseTrainer

    model, _ = wrap("llama", "rep")
    arguments = TrainingArguments(str(tmp_path / "run"), hub_model_id="me/critic", report_to=[], use_cpu=True)
    _BaseTrainer(model, arguments).push_to_hub()
    card = ModelCard.load("me/critic")
    assert "TRL" in card.text
    assert "loretta" in card.data.tags


def test_a_damaged_file_that_lies_in_the_folder_stops_no_saving(tmp_path):
    model, _ = wrap("llama", "rep")
    model.save_pretrained(str(tmp_path))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"cut off")
    model.save_pretrained(str(tmp_path))
    assert "import loretta" in card_of(tmp_path).text


def test_the_placeholders_are_recognised():
    """What the replacing of PEFT's card rests on: it is huggingface_hub's template."""
    assert ModelCard.from_template(ModelCardData()).text.count("[More Information Needed]") > 20
