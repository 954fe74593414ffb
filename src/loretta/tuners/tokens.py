"""The rows of single tokens that an adapter trains of an embedding (``trainable_token_indices``): PEFT's own layers."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils.other import (
    AuxiliaryTrainingWrapper,
    TrainableTokensWrapper,
    _get_input_embeddings_name,
    _get_module_names_tied_with_embedding,
)
from torch import Tensor, nn

from loretta.errors import InputError
from loretta.tuners.adapted import rename_in
from loretta.tuners.changes import Change
from loretta.tuners.config import LorettaConfig
from loretta.tuners.layer import brought_here, is_offloaded
from loretta.tuners.norms import named_whole
from loretta.wording import nearest


class RowsByAdapter(nn.ParameterDict):
    """The rows of every adapter, each within a :class:`Change`, which says why."""

    def __getitem__(self, key: str) -> nn.Parameter:
        return cast(Change, super().__getitem__(key)).values

    def __setitem__(self, key: str, value: Tensor) -> None:
        super().__setitem__(key, Change(value))


class TokenRows(TrainableTokensLayer):
    """PEFT's layer, beside adapters that train no rows here: PEFT's own looks for rows of all that it is told of."""

    other_param_names = (*TrainableTokensLayer.other_param_names, "known")  # type: ignore[assignment]
    known: dict[str, None]  # as of every AdaptedModule

    def held_of(self, adapter_names: Iterable[str]) -> list[str]:
        """Those of some adapters that train rows here."""
        return [name for name in dict.fromkeys(adapter_names) if name in self.token_indices]

    def forward_adapters(self, x: Tensor, active_adapters: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        # while something is merged PEFT passes over the names, but without any it would undo the merge
        names = self.merged_adapters or self.held_of(active_adapters)
        return super().forward_adapters(x, names, *args, **kwargs)

    def get_merged_weights(self, active_adapters: Sequence[str]) -> Tensor:
        if any(map(is_offloaded, self.modules())):  # PEFT reads weights past the calls that accelerate brings them for
            raise InputError(
                "rows of tokens do not compute where accelerate has offloaded them or their embedding: keep the "
                "embedding on a device, or leave trainable_token_indices out"
            )
        silent = self.disable_adapters or self.merged
        return super().get_merged_weights([] if silent else self.held_of(active_adapters))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        asked = self.active_adapters if adapter_names is None else adapter_names
        if new := [name for name in self.held_of(asked) if name not in self.merged_adapters]:
            self.merged_adapters = self.held_of(self.merged_adapters)
            super().merge(safe_merge, new)

    def unmerge(self) -> None:
        self.merged_adapters = self.held_of(self.merged_adapters)
        if self.merged:
            super().unmerge()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        self.unmerge()  # as all layers do, of which PEFT does not take this for one
        super().set_adapter(adapter_names, inference_mode=inference_mode)


class TokenWrapper(TrainableTokensWrapper):
    """PEFT's wrapper of a module with rows for tokens. Adapters that train none here have nothing here to be saved."""

    token_adapter: TokenRows

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        places = super().adapter_state_dict_load_map(adapter_name) if adapter_name in self._adapters else {}
        return {name: f"{place}.values" for name, place in places.items()}

    def adapter_state_dict(  # type: ignore[override]
        self, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        # under PEFT's own name, as every adapter's file has it
        rows = {name: value for name, value in state_dict.items() if name.endswith(f".{adapter_name}.values")}
        named = {name.removesuffix(".values"): value for name, value in brought_here(self, rows).items()}
        return super().adapter_state_dict(adapter_name, named) if adapter_name in self._adapters else {}

    @property
    def active_adapters(self) -> list[str]:
        """Those with rows here: transformers switches the layer within, past the wrapper."""
        return self.token_adapter.held_of(self.token_adapter.active_adapters)

    @property
    def active_adapter(self) -> list[str]:
        return self.active_adapters

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """As PEFT's, for any number of active adapters; the next ones may have rows where this one has none."""
        active = [name for name in self.token_adapter.held_of(new_active_adapters or ()) if name != adapter_name]
        if active != self.active_adapters:  # otherwise what trains stays as it is, too
            self.set_adapter(active)
        self.token_adapter.delete_adapter(adapter_name)
        self._adapters.discard(adapter_name)

    def rename_adapter(self, old: str, new: str) -> None:
        """Give one adapter's rows another name. A tied layer has the dictionaries of the one that it is tied to."""
        rename_in(self.token_adapter, old, new)
        self._adapters = {new if name == old else name for name in self._adapters}


def adopt_tokens(model: nn.Module) -> None:
    """Have the wrappers that PEFT has put around embeddings do as all layers here."""
    for wrapper in model.modules():
        if isinstance(wrapper, TrainableTokensWrapper) and not isinstance(wrapper, TokenWrapper):
            # in place, for PEFT decides where they go and which of them are tied
            wrapper.__class__, wrapper.token_adapter.__class__ = TokenWrapper, TokenRows
            wrapper.token_adapter.known = {}  # type: ignore[assignment]
            delta = wrapper.token_adapter.trainable_tokens_delta
            if not isinstance(delta, RowsByAdapter):  # tied layers share one
                rows = dict(delta)
                delta.clear()
                delta.__class__ = RowsByAdapter
                for name, values in rows.items():
                    delta[name] = values


def has_rows(module: nn.Module, adapter_name: str) -> bool:
    """Whether one adapter trains rows of this module."""
    return isinstance(module, TrainableTokensWrapper) and adapter_name in module._get_available_adapters()


def rows_of_tokens(model: nn.Module, config: LorettaConfig) -> dict[str, int]:
    """How many numbers an adapter trains of each module that holds a row for each token, by name.

    An output layer that is tied to the input embeddings has none of its own: it computes with theirs.

    Raises InputError where no module has the name that is given, for rows that it does not have, and for modules that
    PEFT's layer would not compute as they do, or that the adapter also changes in another way.
    """
    given = config.trainable_token_indices
    if config.ensure_weight_tying:
        _check_tied(model, config)
    if given is None:
        return {}
    inputs = _inputs(model)
    if not isinstance(given, dict):
        given = {inputs or "embed_tokens": given}
    modules = dict(model.named_modules(remove_duplicate=False))
    asked: dict[str, list[int]] = {}
    for end, indices in given.items():
        asked |= dict.fromkeys(_ending(modules, end), indices)
    sizes = {name: _size(name, modules[name], indices) for name, indices in asked.items()}
    tied: list[str] = []
    ties = BaseTuner.get_model_config(model).get("tie_word_embeddings")
    if ties and inputs in asked:
        names = _tied_names(model)
        apart = [name for name in names if asked.get(name, asked[inputs]) != asked[inputs]]
        if apart and config.ensure_weight_tying:
            raise InputError(
                f"ensure_weight_tying: trainable_token_indices has other rows for '{inputs}' than for '{apart[0]}', "
                "which is tied to it: give the same"
            )
        # PEFT ties none of them where one has other rows
        tied = [name for name in names if name in modules and not apart]
        sizes |= {name: _size(name, modules[name], ()) for name in tied}
    for name in sizes:
        _check_ties_agree(name, modules[name], is_tied=name in tied)
        for option, does in (("modules_to_save", named_whole), ("target_modules", _targeted)):
            if does([name], config):
                raise InputError(
                    f"trainable_token_indices trains rows of '{name}', and {option} names it too: leave it out of one "
                    "of them"
                )
    if ties and inputs not in asked and isinstance(modules.get(inputs or ""), TrainableTokensWrapper):
        raise InputError(  # PEFT looks up the rows of this adapter there, to tie other layers to them
            f"trainable_token_indices has no rows of '{inputs}', of which another adapter of the model has some: name "
            "rows of it too, or put the adapters on models of their own"
        )
    return sizes


def _inputs(model: nn.Module) -> str | None:
    try:
        return _get_input_embeddings_name(model)
    except NotImplementedError:  # it reads no tokens, but images or sounds
        return None


def _tied_names(model: nn.Module) -> list[str]:
    # PEFT's name of a tied layer is that of the layer within, once another adapter trains its rows
    return [name.removesuffix(".token_adapter.base_layer") for name in _get_module_names_tied_with_embedding(model)]


def _check_tied(model: nn.Module, config: LorettaConfig) -> None:
    """Refuse to adapt or copy tied modules whose copies would not be tied, where that is asked for."""
    names = _tied_names(model)
    names = [*names, _inputs(model) or ""] if names else []
    if changed := [*named_whole(names, config), *_targeted(names, config)]:
        raise InputError(
            f"ensure_weight_tying ties rows of tokens, and not what modules_to_save and target_modules make of "
            f"'{changed[0]}': leave it out, or give trainable_token_indices instead"
        )


def _check_ties_agree(name: str, module: nn.Module, *, is_tied: bool) -> None:
    """Refuse rows of its own for a layer that follows the embeddings' rows of another adapter, and the reverse.

    PEFT's layer does one of the two for all adapters: some would compute with the rows of another layer, or with none.
    """
    if isinstance(module, TrainableTokensWrapper) and bool(module.token_adapter.tied_adapter) != is_tied:
        other = sorted(module._get_available_adapters())[0]
        raise InputError(
            f"trainable_token_indices: '{name}' would follow the rows of the embeddings that it is tied to for one of "
            f"this adapter and {other!r}, and have rows of its own for the other: give both the same modules, or put "
            "them on models of their own"
        )


def _ending(modules: dict[str, nn.Module], end: str) -> list[str]:
    names = [name for name in modules if name and name.endswith(end)]
    if not names:
        there = {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, nn.Embedding)}
        guess = nearest(end.rpartition(".")[2], there)
        raise InputError(f"trainable_token_indices: nothing in this model is called {end!r}{guess}")
    return names


def _targeted(names: Iterable[str], config: LorettaConfig) -> list[str]:
    is_given = config.target_modules is not None  # no default names embeddings or output layers
    return [name for name in names if is_given and check_target_module_exists(config, name)]


def _size(name: str, module: nn.Module, indices: Sequence[int]) -> int:
    """How many numbers rows of a module have. Raises InputError for rows that it lacks, and for other modules."""
    base: Any = module.original_module if isinstance(module, TrainableTokensWrapper) else module
    if isinstance(base, AuxiliaryTrainingWrapper | BaseTunerLayer):
        others = ", ".join(map(repr, sorted(base._get_available_adapters())))
        raise InputError(
            f"trainable_token_indices trains rows of '{name}', which the adapter {others} changes too: leave one of "
            "them out, or put the adapters on models of their own"
        )
    if is_offloaded(base):
        raise InputError(
            f"rows of '{name}' cannot be trained, which accelerate has offloaded: offload after the adapter is on the "
            "model, or leave trainable_token_indices out"
        )
    if not _computes_alike(base):
        bias = " with a bias" if getattr(base, "bias", None) is not None else ""
        raise InputError(
            f"rows of '{name}' cannot be trained, a {type(base).__name__}{bias}: PEFT trains those of embeddings, and "
            "of linear layers without a bias that are tied to them; leave trainable_token_indices out, or load the "
            "base model with tie_word_embeddings=False"
        )
    rows, width = base.weight.shape
    if lost := [index for index in indices if index >= rows]:
        raise InputError(
            f"trainable_token_indices: '{name}' has rows 0 to {rows - 1}, and none for {lost}: resize the embeddings "
            "first (resize_token_embeddings)"
        )
    return len(indices) * width


def _computes_alike(base: Any) -> bool:
    """Whether PEFT's layer computes what a module does: it looks rows up, and perhaps scales them, or multiplies."""
    if [name for name, _ in base.named_parameters()] != ["weight"]:  # another one, or the bias of an output layer
        return False
    if type(base) is nn.Linear or type(base).forward is nn.Embedding.forward:
        return True
    ids = torch.arange(min(len(base.weight), 8), device=base.weight.device)[None]
    try:
        with torch.no_grad():
            layer = TrainableTokensWrapper(base, "rows", token_indices=[0])
            # of a plan, and where PEFT loads what was made once, there are no numbers yet
            return any(p.is_meta for p in layer.parameters()) or torch.equal(layer(ids), base(ids))
    except Exception:  # no embedding, or one that wants other inputs
        return False
