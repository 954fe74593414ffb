"""The model card of a saved adapter: what was trained, on what, with what result, and how to load it.

PEFT writes a README.md of placeholders beside an adapter. :func:`write_card` makes a card of it that is read off the
saved files alone, and keeps what a person or another tool has written there.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import safe_open

from loretta import tt
from loretta.files import write_whole
from loretta.tuners.task_types import base_class, count_labels
from loretta.version import __version__
from loretta.wording import printable

if TYPE_CHECKING:
    from jinja2 import Template

    from loretta.record import RunRecord  # pydantic is not to be imported with every `import loretta`

README = "README.md"
TAGS = ("loretta", "tensor-train")
# the options that repeat a run
_SETTINGS = ("learning_rate", "head_learning_rate", "epochs", "batch_size", "max_length", "schedule", "limit", "seed")
_PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification"}
_OURS = re.compile(r"<!-- loretta ([0-9a-f]{12})[^>]*-->\n(.*?)\n<!-- end of loretta -->", re.DOTALL)
# frozen starts that are subtracted, dense layers beside them, and copies that bias="all" makes PEFT save a second time
_NOT_TRAINED = re.compile(
    r"\.(loretta_((rep|adp)_start_(down|up)|shared_start_train)|start|original_module|modules_to_save)\.|\.base_(weight|bias)$"
)
_TRAIN = re.compile(r"\.loretta_((rep|adp)_(down|up)|shared_train)\.")
_NORM = re.compile(r"\.loretta_(rep|adp|shared)_norm_[^.]+(\.values)?$")
_SCALE = re.compile(r"\.loretta_(rep|adp|shared)_scale_(in|out)\.")
_SIGNATURE = re.compile(r"(?P<count>\d+) (?P<module>\S+) ((?P<experts>\d+)\*)?(?P<in>\d+) x (?P<out>\d+)")
# heads that are frozen, wholly or in part: they are saved because the base model lacks their random start
_FROZEN_HEADS = {"frozen": "none", "tensorized_only": "its trains and their biases"}

Shapes = Mapping[str, tuple[int, ...]]


def write_card(folder: Path, run: "RunRecord | None" = None, *, learning_rate: float | None = None) -> None:
    """Describe the LoRETTA adapter saved in ``folder`` in its README.md; ``run`` adds the data and the results.

    An existing README loses only PEFT's placeholders. The description stands between two marks, and is written anew as
    long as nobody has edited it. ``learning_rate`` is that of ``run``, whose options name none where it was the
    method's default.

    Raises FileNotFoundError when the folder holds no adapter.
    """
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    readme = folder / README
    card = ModelCard.load(readme) if readme.exists() else ModelCard.from_template(ModelCardData())
    base = config["base_model_name_or_path"] or None
    _describe(card, config, base)
    settings = {} if run is None else {**run.config, "learning_rate": learning_rate}
    ours = _render(config, base, folder, run=run, settings={name: settings.get(name) for name in _SETTINGS})
    card.text = _insert(card.text, ours, title=f"LoRETTA adapter of {_harmless(_short(base) or 'a base model')}")
    write_whole(readme, str(card))


def leave_out_local_base(folder: Path) -> None:
    """Name no base that is a local folder in the card of another method's adapter, which PEFT wrote."""
    if (folder / README).is_file():
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        card = ModelCard.load(folder / README)
        _name_base(card, config["base_model_name_or_path"] or None)
        write_whole(folder / README, str(card))


def _describe(card: ModelCard, config: Mapping[str, Any], base: str | None) -> None:
    card.data["library_name"] = "peft"
    card.data["tags"] = [*(card.data.get("tags") or []), *TAGS]
    _name_base(card, base)
    if not card.data.get("pipeline_tag") and config["task_type"] in _PIPELINES:
        card.data["pipeline_tag"] = _PIPELINES[config["task_type"]]


def _name_base(card: ModelCard, base: str | None) -> None:
    """In the metadata. One that is a local folder is left out: the Hub refuses a card that names it."""
    tags, base_tag = {*(card.data.get("tags") or [])}, f"base_model:adapter:{base or ''}"
    if _can_be_on_hub(base):
        card.data["base_model"] = base
        tags.add(base_tag)
    elif card.data.get("base_model") in (base, ""):
        card.data.pop("base_model")
        tags.discard(base_tag)
    card.data["tags"] = sorted(tags)


def _can_be_on_hub(base: str | None) -> bool:
    if not base or Path(base).exists():
        return False
    try:
        validate_repo_id(base)
    except HFValidationError:
        return False
    return True


def _short(base: str | None) -> str | None:
    """The name of the base model in a text that others read: of a local folder its last part."""
    return base if base is None or _can_be_on_hub(base) else Path(base).name


def _harmless(value: object) -> object:
    """A value as Markdown shows it as it is: no tag, no link, no end of a code span, no line of its own."""
    if value is None or isinstance(value, int | float) or not str(value):  # str() also refuses what is undefined
        return value
    text = printable(value).replace("<", "&lt;").replace(">", "&gt;").replace("`", "'")
    return re.sub(r"\](?=[(\[:])", "&#93;", text)


def _render(config: Mapping[str, Any], base: str | None, folder: Path, **about_run: Any) -> str:
    shapes = saved_shapes(folder)
    return (
        _template()
        .render(
            config=config,
            method=config["peft_type"].removeprefix("LORETTA_").lower(),
            base=_short(base),
            dense=config.get("dense", False),
            loader=_loader(config, base, shapes),
            kinds=_kinds(config, shapes),
            trains=_trains(config),
            weights_bytes=_weights(folder).stat().st_size,
            version=__version__,
            **about_run,
        )
        .strip()
    )


@cache
def _template() -> "Template":
    from jinja2 import Environment, StrictUndefined  # only here: `import loretta` stays light

    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, finalize=_harmless)
    return environment.from_string(resources.files("loretta.tuners").joinpath("card.md.j2").read_text(encoding="utf-8"))


def _insert(text: str, ours: str, title: str) -> str:
    """``text`` with our part in it: in the place of an older one that nobody edited, of placeholders, or at the end."""
    text = "\n".join(text.strip().splitlines())
    marked = f"<!-- loretta {_digest(ours)}: written at every save, unless edited -->\n{ours}\n<!-- end of loretta -->"
    if older := _OURS.search(text):
        if _digest(older[2]) == older[1]:
            text = text[: older.start()] + marked + text[older.end() :]
    elif _lines_of(text) == _lines_of(_placeholders()):
        versions = [line for line in text.splitlines() if line.startswith("- PEFT ")]
        text = "\n\n".join([f"# {title}", marked, *(["### Framework versions", *versions] if versions else [])])
    else:
        text = f"{text}\n\n{marked}"
    return f"\n{text}\n"


@cache
def _placeholders() -> str:
    return ModelCard.from_template(ModelCardData()).text


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:12]


def _lines_of(text: str) -> list[str]:
    """The lines with something in them, but for the versions that PEFT appends."""
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and line != "### Framework versions" and not line.startswith("- PEFT ")]


def _weights(folder: Path) -> Path:
    safe = folder / SAFETENSORS_WEIGHTS_NAME
    return safe if safe.exists() else folder / WEIGHTS_NAME


def saved_shapes(folder: Path) -> Shapes:
    """The shapes of an adapter's tensors by their keys, without reading the tensors."""
    weights = _weights(folder)
    if weights.suffix == ".safetensors":
        with safe_open(weights, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - not a dict
    tensors = torch.load(weights, map_location="meta", weights_only=True)
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _loader(config: Mapping[str, Any], base: str | None, shapes: Shapes) -> Mapping[str, str] | None:
    """The lines that import and make the base model; None where its name or its class is not known."""
    name = base_class(config)
    if base is None or name is None:
        return None
    arguments = [json.dumps(base)]
    labels = count_labels(shapes) if config["task_type"] in ("SEQ_CLS", "TOKEN_CLS") else 0
    if labels:
        arguments.append(f"num_labels={labels}")
    if config["revision"]:
        arguments.append(f"revision={json.dumps(config['revision'])}")
    return {"name": name, "arguments": ", ".join(arguments)}


def _kinds(config: Mapping[str, Any], shapes: Shapes) -> list[tuple[str, int, str]]:
    """(kind, scalars in the file, what of them is trained), without kinds that do not occur."""
    counts, cores = Counter[str](), "matrices of the adapters" if config.get("dense") else "cores of the trains"
    for key, shape in shapes.items():
        counts[cores if _TRAIN.search(key) else _kind(key, shapes)] += math.prod(shape)
    norms, whole = "layer norms", "head and other modules saved whole"
    trained = {
        "starting values and copies": "none",
        # what is random of the base's head is saved though it is frozen
        norms: "all" if config["train_norms"] else _beside_a_frozen_head("none", norms, config, shapes),
        whole: _beside_a_frozen_head(_FROZEN_HEADS.get(config["train_head"], "all"), whole, config, shapes),
    }
    kinds = (cores, "biases", norms, "scales", "rows of tokens", whole, "starting values and copies")
    return [(kind, counts[kind], trained.get(kind, "all")) for kind in kinds if counts[kind]]


def _beside_a_frozen_head(of_head: str, kind: str, config: Mapping[str, Any], shapes: Shapes) -> str:
    """What is trained of one kind: ``of_head`` of the head, and all of the modules that a user had trained whole."""
    head = tuple(f".{name}." for name in config.get("head_origins") or ())
    keys = [key for key in shapes if not _TRAIN.search(key) and _kind(key, shapes) == kind]
    others = [key for key in keys if config.get("head_origins") is not None and not any(n in f".{key}" for n in head)]
    if of_head == "all" or not others:
        return of_head
    return "all" if others == keys else f"{of_head} of the head, and all of the others"


def _kind(key: str, shapes: Shapes) -> str:
    module, _, name = key.rpartition(".")
    if name == "trainable_tokens_delta":
        return "rows of tokens"
    if _NORM.search(key):
        return "layer norms"
    if _SCALE.search(key):
        return "scales"
    # beside a trained norm no bias of its base trains, and bias="all" saves it still
    of_norm = module.removesuffix(".base_layer") + ".loretta_{}_norm_bias.values"
    if _NOT_TRAINED.search(key) or any(of_norm.format(method) in shapes for method in ("rep", "adp", "shared")):
        return "starting values and copies"
    beside = [other for other in shapes if other.startswith(f"{module}.") and other != key]
    if module.endswith(".loretta_adp_bias") or (name == "bias" and not beside):
        return "biases"
    is_norm = len(shapes.get(f"{module}.weight", ())) == 1
    return "layer norms" if is_norm else "head and other modules saved whole"


def _trains(config: Mapping[str, Any]) -> list[tuple[str, int, str, str]]:
    """(ending of the modules' names, how many, train or matrix down to the inner size, and up) for each size."""
    shared = config["peft_type"] == "LORETTA_SHARED"
    inner = config["tensor_rank"] if shared else config["r"] if "r" in config else config["bottleneck_size"]
    rows = []
    for kind in _SIGNATURE.finditer(config["base_signature"] or ""):
        sizes = (int(kind["in"]), inner, int(kind["experts"] or 0)), (inner, int(kind["out"]), 0)
        down, up = (
            f"{rows_in} x {columns}"
            if config.get("dense") or (shared and f"{rows_in}x{columns}" not in config["shapes"])
            else _train(config, rows_in, columns, experts)
            for rows_in, columns, experts in sizes
        )
        rows.append((kind["module"], int(kind["count"]), down, up))
    return rows


def _train(config: Mapping[str, Any], rows_in: int, columns: int, experts: int) -> str:
    """The cores of one train, each by the ranks on either side of its mode: ``1·8·5, 5·4·5, 5·8·1``."""
    rank, modes_per_side = config["tensor_rank"], config.get("modes_per_side")
    shape = tt.plan_shape(rows_in, columns, rank=rank, overrides=config["shapes"], modes_per_side=modes_per_side)
    shape = tt.stacked(shape, experts, rank) if experts else shape
    return ", ".join(f"{left}·{mode}·{right}" for left, mode, right in shape.cores)
