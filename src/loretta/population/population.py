"""A population: P adapters of one kind on one frozen base, as one model."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.ia3 import IA3Layer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.vblora import VBLoRALayer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from loretta.errors import InputError
from loretta.memory import is_out_of_memory
from loretta.population.attention import PackedAttention
from loretta.population.casts import OneCast
from loretta.population.members import MemberLinear, MemberNorm, Members, MemberScale, MemberVBLoRA
from loretta.population.sites import ADAPTER, blocks_of, is_train, names_of, part_of, site_of, sites_of, tensors_of
from loretta.population.trains import MemberAdp, MemberRep, MemberTrains, SharedGroup, TrainGroup
from loretta.tuners.contraction import Contraction
from loretta.tuners.layer import LorettaLayer
from loretta.tuners.norms import TrainedNorm
from loretta.tuners.rep.layer import RepLinear
from loretta.tuners.rescaled import TrainedScale
from loretta.tuners.shared.layer import SharedLinear
from loretta.wording import one_line

# relative errors of logits; a module that is left out makes them differ by a tenth or more
_ALIKE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_ALONE = "this method cannot be trained in a population: train its runs one by one"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Start:
    """The values from which a member starts, as a run alone would, where they differ from those of the others.

    Members of one seed share theirs.
    """

    values: Mapping[str, Tensor]  # of trained tensors, and of frozen ones that are random
    scales: Mapping[str, float]  # adapted module -> factor on its effect
    config: PeftConfig

    @classmethod
    @torch.no_grad()
    def of(cls, model: PeftModel, other: PeftModel) -> "Start":
        """The start of ``model`` where it differs from that of ``other``, a model of the same modules."""
        theirs, mine = tensors_of(other), tensors_of(model)
        if theirs.keys() != mine.keys() or any(theirs[name].shape != mine[name].shape for name in mine):
            raise InputError("the members of a population train different parameters: train them one by one")
        values = {
            name: tensor.detach().clone()
            for name, tensor in mine.items()
            if tensor.requires_grad or not torch.equal(tensor, theirs[name].to(tensor.device))
        }
        layers = [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
        found = {name: getattr(layer, "scaling", None) for name, layer in layers}
        scales = {name: float(scaling[ADAPTER]) for name, scaling in found.items() if scaling and ADAPTER in scaling}
        return cls(values=values, scales=scales, config=model.peft_config[ADAPTER])


class Population(nn.Module):
    """P members on one base. A call takes the rows of all members, grouped by member, and returns their logits.

    All trained numbers lie in one matrix, ``values`` (P, N), with a row for each member, and their gradients in
    another. So clipping, updating, keeping and saving take one operation each, however many modules there are. The
    population replaces the modules of the one wrapped ``model``; :meth:`released` puts them back.
    """

    # by the number of members, what replaces torch's functions during a pass on a GPU
    modes_on_gpu: tuple[Callable[[int], TorchFunctionMode], ...] = (PackedAttention, lambda _: OneCast())

    def __init__(self, model: PeftModel, starts: Sequence[Start]) -> None:
        super().__init__()
        self.model, self.starts, self.size = model, tuple(starts), len(starts)
        Contraction.detach(model.get_base_model())
        parameters = tensors_of(model)
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        if len(dtypes := {parameters[name].dtype for name in trained}) != 1:
            raise InputError(f"a population trains numbers of one kind, and this method has {len(dtypes)} of them")
        device, dtype = parameters[trained[0]].device, parameters[trained[0]].dtype
        self.modes = self.modes_on_gpu if device.type == "cuda" else ()
        blocks = blocks_of(model, trained)
        order = [name for block in blocks for name in block]
        sizes = [parameters[name].numel() for name in order]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        self.slices = {name: slice(end - size, end) for name, size, end in zip(order, sizes, ends, strict=True)}
        self.shapes = {name: parameters[name].shape for name in order}
        # one copy to the device for all tensors: a copy for each would wait for the GPU each time
        rows = {start: torch.cat([start.values[name].flatten() for name in order]) for start in set(starts)}
        self.values = torch.stack([rows[start] for start in starts]).to(device, dtype)
        self.gradient = torch.zeros_like(self.values)
        stacked = {block: self._parameter(block) for block in blocks}
        differing = dict.fromkeys(name for start in starts for name in start.values if name not in self.slices)
        frozen = {
            name: torch.stack([start.values.get(name, parameters[name]).to(parameters[name]) for start in starts])
            for name in differing
        }
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []  # parent, name there, the ordinary module
        self.frozen = {name: tensor.detach() for name, tensor in frozen.items()}
        self.groups = self._install(stacked)
        self._prompts(of_members=True)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.stacks = [stack.requires_grad_(True) for stack in stacked.values()]
        self._gradients = [self._view(self.gradient, block) for block in blocks]

    @property
    def width(self) -> int:
        """Size of the base's hidden states, which embeddings may be smaller than."""
        config: Any = self.model.get_base_model().config
        embedded = self.model.get_input_embeddings().weight.shape[1]
        return int(getattr(config.get_text_config(), "hidden_size", embedded))

    @property
    def layers(self) -> int | None:
        """How deep the base is; None where its config has several depths, as BLT's and Perceiver's."""
        config: Any = self.model.get_base_model().config
        return getattr(config.get_text_config(), "num_hidden_layers", None)

    @property
    def vocabulary(self) -> int:
        """How many logits each token has in a language model."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    def _parameter(self, block: tuple[str, ...]) -> nn.Parameter:
        """(P, ...), or for trains (P, M, ...): a view of :attr:`values`."""
        return nn.Parameter(self._view(self.values, block))

    def _view(self, matrix: Tensor, block: tuple[str, ...]) -> Tensor:
        where = slice(self.slices[block[0]].start, self.slices[block[-1]].stop)
        shape = tuple(self.shapes[block[0]])
        return matrix[:, where].unflatten(1, (len(block), *shape) if is_train(block[0]) else shape or (1,))

    def _install(self, stacked: Mapping[tuple[str, ...], nn.Parameter]) -> list[TrainGroup]:
        """Replace the modules of one adapter by modules for all members."""
        groups: list[TrainGroup] = []
        tensors, names = tensors_of(self.model), names_of(self.model)
        of_site: dict[str, dict[str, Tensor]] = defaultdict(dict)
        of_trains: dict[tuple[str, ...], dict[str, Tensor]] = defaultdict(dict)
        for block, value in stacked.items():
            if is_train(block[0]):
                sites = tuple(site_of(self.model, name) for name in block)
                of_trains[sites][part_of(block[0])] = value
            else:
                for site, inner in sites_of(self.model, names[block[0]]):
                    of_site[site][inner] = value
        for name, frozen in self.frozen.items():
            if not is_train(name):
                for site, inner in sites_of(self.model, names[name]):
                    of_site[site][inner] = frozen
        for sites, parts in of_trains.items():
            for part in ("start_down", "start_up", "start_train"):
                prefixes = [cast(LorettaLayer, self.model.get_submodule(site)).prefix for site in sites]
                starts = [f"{at}.{pre}{part}.{ADAPTER}.values" for at, pre in zip(sites, prefixes, strict=True)]
                if starts[0] in tensors:
                    stacks = [self.frozen.get(name, tensors[name].expand(self.size, -1)) for name in starts]
                    parts[part] = torch.stack(stacks, dim=1).detach()
            groups.append(self._install_trains(sites, parts))
        # inner modules first: an outer module then calls the replaced ones
        for site in sorted(of_site, key=lambda site: -site.count(".")):
            self._replace(site, self._members(site, of_site[site]))
        return groups

    def _install_trains(self, sites: Sequence[str], parts: dict[str, Tensor]) -> TrainGroup:
        first = self.model.get_submodule(sites[0])
        if isinstance(first, SharedLinear):
            layers = [(name, module) for name, module in self.model.named_modules() if isinstance(module, SharedLinear)]
            sites = [name for name, layer in layers if layer.holders.get(ADAPTER) is first]
        scales = [[start.scales[site] for start in self.starts] for site in sites]
        made: list[MemberTrains] = []
        for site in sites:
            layer: Any = self.model.get_submodule(site)
            made.append((MemberRep if isinstance(layer, RepLinear) else MemberAdp)(layer, ADAPTER, self.size))
            self._replace(site, made[-1])
        group = SharedGroup if isinstance(first, SharedLinear) else TrainGroup
        return group(made, parts, self.values.new_tensor(scales))

    def _members(self, site: str, values: dict[str, Tensor]) -> Members:
        module = self.model.get_submodule(site)
        layer = site.rpartition(".lora_B.")[0]
        scales = [start.scales.get(layer or site, 1.0) for start in self.starts]
        if len(set(scales)) > 1 and not layer:
            raise InputError(f"the members differ in the scale of '{site}': train them one by one")
        if type(module) is nn.Linear and values.keys() <= {"weight", "bias"}:
            # the shared layer scales the effect of all as it would that of the first
            ratios = self.values.new_tensor([scale / scales[0] for scale in scales])
            return MemberLinear(module, values, None if len(set(scales)) == 1 else ratios)
        norm = module.base_layer if isinstance(module, TrainedNorm) else module
        in_base = any(name.startswith("base_layer.") for name in values)
        if type(norm) is nn.LayerNorm and norm.weight is not None and norm.bias is not None and not in_base:
            return MemberNorm(module, values)
        if isinstance(module, TrainedScale) or (isinstance(module, IA3Layer) and len(values) == 1):
            return MemberScale(module, values)
        return (MemberVBLoRA if isinstance(module, VBLoRALayer) else Members)(module, values)

    def _replace(self, site: str, by: Members) -> None:
        old = self.model.get_submodule(site)
        for parent in list(self.model.modules()):
            for name, child in list(parent._modules.items()):
                if child is old and parent is not by:
                    parent._modules[name] = by
                    self._replaced.append((parent, name, old))

    def forward(self, **inputs: Tensor) -> Any:
        """The model's output for rows that are grouped by member."""
        for group in self.groups:
            group.hand_over()
        # PEFT makes the mask of a prompt on the default device; a recorded step cannot copy from the CPU
        prompted = self.values.device if self.model.active_peft_config.is_prompt_learning else nullcontext()
        try:
            with prompted, ExitStack() as stack:
                for mode in self.modes:
                    stack.enter_context(mode(self.size))
                return self.model(**inputs)
        finally:
            for group in self.groups:
                group.take_back()

    def _prompts(self, *, of_members: bool) -> None:
        """Have the model take prompts from :meth:`get_prompt`, or make the one prompt of a run by itself again."""
        model: Any = self.model
        config = model.active_peft_config
        if config.is_prompt_learning:
            model.prompt_tokens[ADAPTER] = model.prompt_tokens[ADAPTER].to(self.values.device)
        if config.is_prompt_learning and config.peft_type != PeftType.PREFIX_TUNING:  # PEFT makes a prefix for each row
            if of_members:
                model.get_prompt = self.get_prompt
            else:
                del model.get_prompt

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None) -> Tensor:
        """(P * b, tokens, width): the prompt of each row's member."""
        model: Any = self.model
        encoder, tokens = model.prompt_encoder[ADAPTER], model.prompt_tokens[ADAPTER]
        prompts = encoder(tokens.expand(self.size, -1))
        return prompts.repeat_interleave(batch_size // self.size, 0)

    def backward(self, losses: Tensor, *, add: bool = False) -> None:
        """Write the gradients of the members' ``losses`` (P) into :attr:`gradient`, or add them to it."""
        # the sum has the gradients of all: no number of one member reaches the loss of another
        found = torch.autograd.grad(losses.sum(), self.stacks)
        (torch._foreach_add_ if add else torch._foreach_copy_)(self._gradients, list(found))

    @torch.no_grad()
    def check(self, rows: Mapping[str, Tensor]) -> None:
        """Compare the first and the last member, both changed at random, with the ordinary model.

        Without this check a module whose weights are read without calling it, or a method that looks across rows,
        would compute wrong numbers and raise no error. ``rows`` are a batch, grouped by member.

        Raises InputError where the method cannot be trained in a population.
        """
        before, training = self.values.clone(), self.model.training
        noise = torch.randn(self.values.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        self.values.add_(0.05 * noise.to(self.values))
        try:
            try:
                for mode in (True, False):  # some methods compute differently in training
                    self.model.train(mode)
                    with torch.enable_grad():
                        together = self(**rows).logits.unflatten(0, (self.size, -1))
                        self.backward(together.float().flatten(1).sum(1))
            except Exception as reason:
                if is_out_of_memory(reason):
                    raise  # says nothing of the method
                raise InputError(f"{_ALONE} ({one_line(reason, 160)})") from reason
            for k in {0, self.size - 1}:
                with self.released(k) as model, torch.no_grad():
                    alone = model(**{name: x.unflatten(0, (self.size, -1))[k] for name, x in rows.items()}).logits
                error = float((together[k].double() - alone.double()).norm() / alone.double().norm())
                if not error <= _ALIKE[alone.dtype]:
                    raise InputError(f"{_ALONE} (its logits differ from those of the run alone by {error:.1e})")
        finally:
            self.values.copy_(before)
            self.model.train(training)

    def values_of(self, member: int, values: Tensor | None = None) -> dict[str, Tensor]:
        """The trained parameters of one member by their ordinary names, from :attr:`values` or others (P, N)."""
        row = (self.values if values is None else values)[member]
        return {name: row[where].view(self.shapes[name]) for name, where in self.slices.items()}

    @torch.no_grad()
    def take(self, member: int, parameters: Sequence[nn.Parameter], values: Tensor) -> list[str]:
        """Copy parameters of the released model into a member's row of ``values``. Returns their names."""
        rewritten = {id(parameter) for parameter in parameters}
        found = {name: tensor for name, tensor in tensors_of(self.model).items() if id(tensor) in rewritten}
        for name, tensor in found.items():
            values[member, self.slices[name]] = tensor.flatten()
        return list(found)

    @contextmanager
    @torch.no_grad()
    def released(self, member: int, values: Tensor | None = None) -> Iterator[PeftModel]:
        """Until the block ends, the ordinary model with one member's values, to be saved or called as any other."""
        inside: list[tuple[nn.Module, str, nn.Module | None]] = [
            (parent, name, parent._modules[name]) for parent, name, _ in self._replaced
        ]
        for parent, name, module in reversed(self._replaced):
            parent._modules[name] = module
        self._prompts(of_members=False)
        start, trained = self.starts[member], self.values_of(member, values)
        model: Any = self.model
        config = model.peft_config[ADAPTER]
        tensors = tensors_of(self.model)
        try:
            for name, value in (*trained.items(), *((name, stack[member]) for name, stack in self.frozen.items())):
                tensors[name].copy_(value.view(tensors[name].shape))
            for name, scale in start.scales.items():
                layer: Any = self.model.get_submodule(name)
                layer.scaling[ADAPTER] = scale
            for name in trained:
                tensors[name].requires_grad_(True)
            model.peft_config[ADAPTER] = start.config
            with torch.enable_grad():
                yield self.model
        finally:
            for name in trained:
                tensors[name].requires_grad_(False)
            model.peft_config[ADAPTER] = config
            for parent, name, members in inside:
                parent._modules[name] = members
            self._prompts(of_members=True)
