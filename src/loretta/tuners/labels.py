"""The label names that an adapter carries, and the classifier that answers with them."""

from torch import nn

from loretta.tuners.config import LorettaConfig
from loretta.tuners.task_types import is_final_layer


def name_labels(model: nn.Module, config: LorettaConfig) -> None:
    """Give the model's config the label names of an adapter, and the final layer that is still random their number.

    Without a model whose config has labels, or names in the adapter's, nothing happens.
    """
    names, labels = config.label_names, getattr(getattr(model, "config", None), "id2label", None)
    if not names or labels is None or config.task_type != "SEQ_CLS":
        return
    if len(labels) != len(names):
        # an adapter that is loaded brings the rows; beside a trained final layer it would not fit, which it says itself
        for path, module in list(model.named_modules()):
            if (
                is_final_layer(f"{path}.weight")
                and isinstance(module, nn.Linear)
                and module.out_features == len(labels)
            ):
                wider = nn.Linear(module.in_features, len(names), module.bias is not None)
                model.set_submodule(path, wider.to(module.weight.device, module.weight.dtype))
        setattr(model, "num_labels", len(names))  # noqa: B010
    model.config.id2label = dict(enumerate(names))  # type: ignore[union-attr]
    model.config.label2id = {name: k for k, name in enumerate(names)}  # type: ignore[union-attr]
