"""Which modules of a family are its classification head, and the names of what trains in them."""

from torch import nn
from tuners.wrapped import trainable


def cores(name: str, *, bias: bool = True) -> set[str]:
    return {f"{name}.cores.values"} | ({f"{name}.bias"} if bias else set())


def dense(name: str, *, bias: bool = True) -> set[str]:
    return {f"{name}.weight"} | ({f"{name}.bias"} if bias else set())


# family -> (hidden layer, has a bias), (final layer, has a bias); "copy" stands where PEFT puts the adapter's copy
HEADS = {
    "bert": (("bert.pooler.dense.{copy}", True), ("classifier.{copy}", True)),
    "roberta": (("classifier.{copy}.dense", True), ("classifier.{copy}.out_proj", True)),
    "deberta": (("pooler.dense.{copy}", True), ("classifier.{copy}", True)),
    "deberta-v2": (("pooler.dense.{copy}", True), ("classifier.{copy}", True)),
    "electra": (("classifier.{copy}.dense", True), ("classifier.{copy}.out_proj", True)),
    "modernbert": (("head.dense.{copy}", False), ("classifier.{copy}", True)),
    "bart": (("classification_head.{copy}.dense", True), ("classification_head.{copy}.out_proj", True)),
    "t5": (("classification_head.{copy}.dense", True), ("classification_head.{copy}.out_proj", True)),
    "llama": (None, ("score.{copy}", False)),
    "gpt2": (None, ("score.{copy}", False)),
}


WITH_HIDDEN = [family for family, (hidden, _) in HEADS.items() if hidden]


def trained_head(model: nn.Module, method: str) -> set[str]:
    return {name.removeprefix("base_model.model.") for name in trainable(model) if f".loretta_{method}_" not in name}


HOW = ("tensorized", "tensorized_only", "dense", "frozen")
