"""Options of a run: one namespace for the YAML file, the command line and ``--set``."""

from itertools import pairwise

import pytest
from peft import get_peft_model
from tuners.families import build

from loretta.errors import InputError
from loretta.options import read_yaml, with_lists
from loretta.plan import plan_model
from loretta.studies.compare import comparison
from loretta.training.config import ALIASES, GROUPS, RunConfig, read_config
from loretta.training.methods import METHODS, find_method, peft_config, refuse_unknown_options
from loretta.tuners.rep import LorettaRepConfig

BASE = {"model": "m", "data": "d"}


@pytest.mark.parametrize("key", ["output", "budget", "data_dir", "validation"])
def test_an_empty_word_is_no_value(key, tmp_path):
    (tmp_path / "run.yaml").write_text(f"{key}: ''\n")
    for given in ((tmp_path / "run.yaml", BASE), (None, BASE, [f"{key}=''"]), (None, BASE | {key: ""})):
        with pytest.raises(InputError, match=f"run options: {key} given and empty"):
            read_config(*given)
    (tmp_path / "run.yaml").write_text(f"{key}:\n")  # not given
    assert read_config(tmp_path / "run.yaml", BASE) == RunConfig(**BASE)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("epochs", "5", 5.0),
        ("epoch", "5", 5.0),
        ("lr", "5e-3", 5e-3),
        ("sample", "train=100,test=5", {"train": 100, "test": 5}),
        ("sample", "{train: 100, test: 5}", {"train": 100, "test": 5}),
        ("tensor_rank", "8", 8),
        ("lora_alpha", "1e-05", 1e-5),
        ("lora_alpha", "+2.5E3", 2500.0),
        ("target_modules", "1e", "1e"),
        ("method_args.tensor_rank", "8", 8),
        ("target_modules", "query,value", "query,value"),
        ("method_args", "{tensor_rank: 8}", {"tensor_rank": 8}),
    ],
)
def test_a_file_and_set_say_the_same(key, text, value, tmp_path):
    (tmp_path / "run.yaml").write_text(f"{key}: {text}\n")
    from_file = read_config(tmp_path / "run.yaml", BASE)
    assert from_file == read_config(None, BASE, [f"{key}={text}"])
    name = ALIASES.get(key, key)
    found = from_file.method_args if name == "method_args" else getattr(from_file, name, None)
    assert (from_file.method_args[name.rpartition(".")[2]] if found is None else found) == value


def test_what_comes_later_wins_and_options_of_the_method_add_up(tmp_path):
    (tmp_path / "run.yaml").write_text("lr: 0.1\nr: 16\ntensor_rank: 2\nmethod_args: {lora_alpha: 4}\n")
    config = read_config(tmp_path / "run.yaml", {**BASE, "learning_rate": 0.2}, ["tensor_rank=3", "lora_alpha=5"])
    assert config.learning_rate == 0.2
    assert config.method_args == {"r": 16, "tensor_rank": 3, "lora_alpha": 5}


def test_home_is_found_in_a_file_of_options_as_a_shell_finds_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("model: ~/base\ndata: cola\noutput: ~/runs/a~b\n")
    config = read_config(tmp_path / "run.yaml", {"start_from": "~/first"})
    assert [config.model, config.output] == [str(tmp_path / "base"), str(tmp_path / "runs" / "a~b")]
    assert config.start_from == str(tmp_path / "first")
    assert RunConfig(model="org/~name", data="cola").model == "org/~name"


def test_a_file_with_two_names_of_one_option_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("lr: 0.1\nlearning_rate: 0.2\n")
    with pytest.raises(InputError, match=r"has both 'lr' and 'learning_rate', which are one"):
        read_config(tmp_path / "run.yaml", BASE)


@pytest.mark.parametrize("text", ["train", "train=many", "trial=5", "train=0"])
def test_a_bad_sample_is_named(text):
    with pytest.raises(InputError, match=r"run options: sample"):
        read_config(None, {**BASE, "sample": text})


@pytest.mark.parametrize(
    ("key", "guess"), [("epochss", "epochs"), ("batchsize", "batch_size"), ("tensor_rnk", "tensor_rank")]
)
def test_what_is_neither_of_the_run_nor_of_the_method_is_refused_with_the_nearest_of_both(key, guess):
    with pytest.raises(InputError, match=rf"unknown option '{key}'.*did you mean '{guess}'"):
        refuse_unknown_options("rep", read_config(None, BASE, [f"{key}=3"]).method_args)


def test_words_with_commas_are_a_list_where_the_method_takes_one():
    model, _ = build("llama")
    config = peft_config("rep", model, "CAUSAL_LM", {"target_modules": "query, value", "layers_to_transform": "0,1"})
    assert config.target_modules == {"query", "value"}
    assert config.layers_to_transform == [0, 1]
    single = with_lists({"target_modules": "query", "train_scales": "values", "modules_to_save": "score"}, type(config))
    assert single == {"target_modules": ["query"], "train_scales": ["values"], "modules_to_save": ["score"]}
    for word in ("all-linear", "model.layers"):
        assert with_lists({"target_modules": word}, type(config)) == {"target_modules": word}
    expression = r".*layers\.\d{1,2}\.(q|v)_proj"
    given = {"target_modules": expression, "bias": "a,b", "shapes": {}, "init_weights": True}
    assert with_lists(given, LorettaRepConfig) == given


@pytest.mark.parametrize(
    ("method", "option", "words"),
    [
        ("rep", {"task_type": "CAUSAL_LM"}, "task_type: a run sets that itself"),
        ("lora", {"peft_type": "IA3"}, "peft_type: a run sets that itself"),
        ("lora", {"inference_mode": True}, "inference_mode: a run sets that itself"),
        ("rep", {"label_names": ["a", "b"]}, "label_names: a run sets that itself"),
        ("lora", {"use_dora": "maybe"}, "use_dora='maybe' is not true or false"),
        ("lora", {"r": 2.5}, "r=2.5 is not a whole number"),
        ("lora", {"rank_pattern": [1]}, r"rank_pattern=\[1\] is not a mapping"),
        ("lora", {"modules_to_save": 3}, "modules_to_save=3 is not a list of text"),
        ("peft:vera", {"r": "abc"}, "r='abc' is not a whole number"),
        ("lora", {"modules_to_save": "lm_haed"}, "no module 'lm_haed' .did you mean 'lm_head'"),
        ("rep", {"modules_to_save": ["embeds"]}, "no module 'embeds'"),
        ("rep", {"exclude_modules": "v_prj"}, "no module 'v_prj' .did you mean 'v_proj'"),
        ("shared", {"exclude_modules": ".*v_prj"}, "no module '.*v_prj'"),
        ("lora", {"exclude_modules": ["v_prj", "up_prj"]}, "no module 'up_prj' .did you mean 'up_proj'"),
        ("lora", {"rank_pattern": {"v_prj": 2}}, "rank_pattern: the model has no module 'v_prj'"),
        ("lora", {"alpha_pattern": {r"0\.v_prj": 2}}, "alpha_pattern: the model has no module"),
        ("lora", {"target_parameters": ["experts.w"]}, "target_parameters: the model has no parameter 'experts.w'"),
        ("prefix", {"encoder_hidden_size": 8}, "prefix_projection=True alone: give that too"),
        ("prompt", {"prompt_tuning_init_text": "a b"}, "prompt_tuning_init=TEXT alone: give that too"),
        ("p-tuning", {"encoder_dropout": 0.5}, "encoder_reparameterization_type=LSTM alone: give that too"),
        ("lora", {"alpha_pattern": {"q_proj": 0}}, "scales the adapter to nothing"),
        ("rep", {"alpha_pattern": {"q_proj": 0}}, "alpha"),
        ("lora", {"target_modules": ".*(q_proj"}, "is no regular expression"),
        ("lora", {"rank_pattern": {"(": 2}}, "is no regular expression"),
        ("lora", {"runtime_config": {}}, "runtime_config={} is not a LoraRuntimeConfig"),
        ("lora", {"layer_replication": [[0, "a"]]}, r"is not a list of .a whole number, a whole number. or null"),
        ("rep", {"layers_pattern": "layers"}, "layers_to_transform"),
    ],
)
def test_an_option_of_the_wrong_type_or_without_effect_is_refused(method, option, words):
    """PEFT takes use_dora="maybe" for true, and passes over modules that are not there."""
    with pytest.raises(InputError, match=words):
        peft_config(method, build("llama")[0], "CAUSAL_LM", option)


def test_an_expression_of_a_peft_method_has_to_end(monkeypatch):
    monkeypatch.setattr("loretta.tuners.schema.TIME_FOR_EXPRESSIONS", 0.3)
    with pytest.raises(InputError, match=r"exclude_modules: the expression .* takes more than 0 seconds"):
        peft_config("lora", build("llama")[0], "CAUSAL_LM", {"exclude_modules": r"(([a-z0-9_.]+)+)+!"})


def test_layers_are_repeated_by_pairs_of_numbers():
    """A list of YAML has no tuples, and each was refused."""
    model = get_peft_model(
        build("llama")[0], peft_config("lora", build("llama")[0], "CAUSAL_LM", {"layer_replication": [[0, 2], [1, 2]]})
    )
    assert len(model.get_base_model().model.layers) == 3


@pytest.mark.parametrize("method", ["lora", "rep", "adp", "shared"])
@pytest.mark.parametrize("given", [["o_proj", "dense_h_to_4h"], r".*(o_proj|dense_h_to_4h)"])
def test_modules_are_excluded_of_those_that_the_model_has(method, given):
    """A list or an expression may serve several families, as one of targets may."""
    model, _ = build("llama")
    options = {"target_modules": ["o_proj", "down_proj"], "exclude_modules": given}
    names = get_peft_model(model, peft_config(method, model, "CAUSAL_LM", options)).targeted_module_names
    assert {name.rpartition(".")[2] for name in names} == {"down_proj"}


@pytest.mark.parametrize("method", ["lora", "rep"])
def test_a_word_alone_is_the_end_of_a_name(method):
    model, _ = build("llama")
    given = {"target_modules": "all-linear", "exclude_modules": "v_proj", "lora_alpha": 0.5}
    model = get_peft_model(model, peft_config(method, model, "CAUSAL_LM", given))
    adapted = {name.rpartition(".")[2] for name in model.targeted_module_names}
    assert adapted == {"q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("key", ["batch_size", "eval_batch_size", "max_length", "max_steps", "epochs"])
def test_a_number_that_overflows_is_refused(key):
    """Loaders, tokenizers and clocks raised OverflowError, some of them behind the first step."""
    with pytest.raises(InputError, match=rf"{key}=1.* must be below"):
        read_config(None, BASE, [f"{key}={10**25}"])


@pytest.mark.parametrize("key", ["epochs", "seed", "limit", "learning_rate"])
def test_true_is_no_number(key):
    """Pydantic takes it for 1: one row of the data, seed 1."""
    with pytest.raises(InputError, match=f"{key}=True must be a number"):
        read_config(None, BASE, [f"{key}=true"])
    assert read_config(None, BASE, ["cpu=yes"]).cpu


GIVEN = ["[1]", "-1", "{a: 1}", "x y", "1.5", "0", ".nan", ".inf", "null", "true"]


def _refusal(key: str, given: str) -> str | None:
    try:
        read_config(None, BASE, [f"{key}={given}"])
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("key", RunConfig.model_fields)
def test_a_wrong_value_is_told_in_our_words(key):
    """Pydantic's own speak of inputs that should be valid, and of parsing."""
    told = [words for given in GIVEN if (words := _refusal(key, given)) is not None]
    assert told or key in ("budget", "adaptive_ranks")  # options of the method, which reads them
    assert all(words.startswith(f"run options: {key}=") and " must " in words for words in told)
    assert "input" not in " ".join(told)


@pytest.mark.parametrize(
    "given", ["train", "train=x", "train=0", "tset=3", "train=1,train=2", "train=3,,test=4", "train=1.5", "=3", "[1]"]
)
def test_a_wrong_sample_is_refused_once(given):
    with pytest.raises(InputError, match=r"^run options: sample=[^;]* must say how many .* write train=100,test=50$"):
        read_config(None, {**BASE, "sample": given})
    assert read_config(None, {**BASE, "sample": "train=3, test=4"}).sample == {"train": 3, "test": 4}


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"ft"}))
def test_every_method_has_types_that_can_be_read(method):
    """Words for target_modules are a list for each method that takes modules. A type that cannot be read raises."""
    config = find_method(method).config
    expected = "a,b" if "target_modules" not in config.__dataclass_fields__ else ["a", "b"]
    assert with_lists({"target_modules": "a,b"}, config) == {"target_modules": expected}


def test_every_option_has_a_group_and_a_description():
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(set(RunConfig.model_fields) - {"method_args"})
    for name, field in RunConfig.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
    assert set(ALIASES.values()) <= set(RunConfig.model_fields)
    assert not set(ALIASES) & {
        field for method in METHODS.values() if method.config for field in method.config.__dataclass_fields__
    }


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghij")),
        "a: &a [*a]",
        f"epochs: {'9' * 5000}",
        "epochs: 2001-99-99",
        "[" * 20_000,
    ],
    ids=["aliases of aliases", "an alias of itself", "5,000 digits", "a 99th month", "lists in lists"],
)
def test_yaml_that_is_a_trap_is_refused_at_once(text, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(InputError, match="is not YAML") as error:
        read_config(tmp_path / "run.yaml", {}, [])
    assert len(str(error.value)) < 1_000


@pytest.mark.parametrize(
    "text", ["model: a\nepochs: 3\nepochs: 30\n", "model: a\nmethod_args: {r: 1, bias: none, r: 2}\n"]
)
def test_a_key_that_is_given_twice_is_refused(text, tmp_path):
    """PyYAML takes the last one without a word."""
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(InputError, match=r"the key '(epochs|r)' is given twice"):
        read_config(tmp_path / "run.yaml", {}, [])


def test_a_merged_key_may_be_given_again():
    assert read_yaml("a: &a {r: 1}\nb: &b {<<: *a, r: 2}\nc: {<<: *b, r: 3}\n")["c"] == {"r": 3}


def test_aliases_of_a_few_values_are_fine(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "model: &name m\ndata: *name\ntarget_modules: &modules [a, b]\nother: *modules\n"
    )
    config = read_config(tmp_path / "run.yaml", {}, [])
    assert config.data == "m"
    assert config.method_args["other"] == ["a", "b"]


def test_a_budget_is_an_option_of_the_method_and_alone_it_chooses_the_method():
    alone = RunConfig(model="m", data="d", budget="50k")
    assert (alone.method, alone.method_args, alone.folder.name) == ("auto", {"budget": "50k"}, "d-auto-s0")
    assert RunConfig(**alone.model_dump()) == alone
    assert read_config(None, {"model": "m", "data": "d"}, ["budget=50k"]) == alone
    beside = RunConfig(model="m", data="d", method="rep", method_args={"r": 4}, budget="50k")
    assert (beside.method, beside.method_args) == ("rep", {"r": 4, "budget": "50k"})


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("my/reviews.csv", "reviews"),
        ("a.csv,b.csv", "a-b"),
        ("x/a.csv, y/b.csv", "a-b"),
        ("a.csv,b.csv,c.csv,d.csv,e.csv", "a-b-c-and-2-more"),
        ("my/a.CSV.gz", "a"),
        ("my/reviews.v2/", "reviews.v2"),
        ("my/reviews/*.csv", "reviews"),
        ("my/part-*.jsonl", "part"),
        ("org/words:v1.2", "words-v1.2"),
        ("org/words-2.0", "words-2.0"),
        ("*.csv", "data"),
        ("mrpc", "mrpc"),
    ],
)
def test_a_run_and_a_comparison_are_called_as_their_data(data, name):
    """They were called as what stands before the last dot: "a.csv-b", "a.csv" and "words-v1"."""
    assert str(RunConfig(model="m", data=data).folder) == f"runs/{name}-compact-s0"
    study = comparison(data, ["lora", "ia3"], seeds=1, settings={})
    assert (study.title, study.tasks) == (f"Which method for {name}", (name,))


@pytest.mark.parametrize("policy", ["method", "full", "frozen"])
@pytest.mark.parametrize("method", ["auto", "rep", "adp", "shared"])
def test_what_a_run_trains_is_within_its_budget_whatever_becomes_of_the_head(method, policy):
    model = build("bert")[0]
    config = peft_config(method, model, "SEQ_CLS", {"budget": "4k"}, policy)
    assert "4,000 parameters" in config.why
    assert 2000 < plan_model(model, config).trainable <= 4000
    assert config.train_head == {"method": "tensorized", "full": "dense", "frozen": "frozen"}[policy]


def test_a_budget_is_for_the_methods_of_loretta():
    model = build("bert")[0]
    with pytest.raises(InputError, match=r"budget: for the methods of LoRETTA .* and not for 'lora'"):
        peft_config("lora", model, "SEQ_CLS", {"budget": "4k"})


def test_options_come_from_file_then_command_line_then_set(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: sst2\nepochs: 5\nseed: 3\nmethod_args: {tensor_rank: 4, r: 16}\n")
    config = read_config(path, {"seed": 4, "model": None}, ["learning_rate=5e-3", "tensor_rank=8", "epochs=7"])
    assert (config.model, config.epochs, config.seed, config.learning_rate) == ("m", 7, 4, 5e-3)
    assert config.method_args == {"tensor_rank": 8, "r": 16}
    assert str(config.folder) == "runs/sst2-compact-s4"


@pytest.mark.parametrize(
    ("options", "sets", "words"),
    [
        ({}, [], ["model is missing: give --model", "data is missing: give --data"]),
        ({"model": "m", "data": "d", "epochs": -1}, ["seed=x"], ["epochs=-1", "seed='x'"]),
        ({"model": "m", "data": "d"}, ["epochs"], ["--set 'epochs' is not of the form key=value"]),
        ({"model": "m", "data": "d"}, ["schedule=zigzag"], ["schedule='zigzag'"]),
    ],
)
def test_every_mistake_in_the_options_is_named_at_once(options, sets, words):
    with pytest.raises(InputError) as caught:
        read_config(None, options, sets)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "word"), [("- a\n", "holds no keys"), ("a: [", "is not YAML")])
def test_a_bad_config_file_is_one_sentence(content, word, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=word) as caught:
        read_config(path, {"model": "m", "data": "d"})
    assert "\n" not in str(caught.value)


def test_unknown_methods_and_options_name_the_nearest():
    with pytest.raises(InputError, match=r"unknown method 'rpe' \(did you mean 'rep'"):
        find_method("rpe")
    with pytest.raises(InputError, match=r"unknown option 'tensor_rnak'.*did you mean 'tensor_rank'"):
        peft_config("rep", None, "SEQ_CLS", {"tensor_rnak": 3})
    assert METHODS["rep"].learning_rate > 0


def test_numbers_in_yaml_are_read_as_people_write_them(tmp_path):
    assert read_yaml("[010, -08, 1_000, 5e-3, 1:30, 0x1F]") == [10, -8, 1000, 0.005, "1:30", "0x1F"]
    (tmp_path / "run.yaml").write_text("model: m\ndata: d\nseed: 010\n")
    assert read_config(tmp_path / "run.yaml", {}, ["batch_size=08"]).model_dump(include={"seed", "batch_size"}) == {
        "seed": 10, "batch_size": 8,
    }  # fmt: skip
    with pytest.raises(InputError, match="max_steps='1:30'"):
        read_config(tmp_path / "run.yaml", {}, ["max_steps=1:30"])
