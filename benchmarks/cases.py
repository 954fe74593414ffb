"""The models, methods and sizes that are measured, built in one place."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    RobertaConfig,
)

from loretta import LorettaAdpConfig, LorettaRepConfig, LorettaSharedConfig
from loretta.tuners.targets import ADP_TARGETS


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model by its configuration; its weights are random. Sizes are (batch, tokens)."""

    config: Callable[[], object]
    sizes: tuple[tuple[int, int], ...]
    task_type: str = "CAUSAL_LM"


def _llama(
    layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocabulary: int, *, positions: int = 2048
) -> LlamaConfig:
    return LlamaConfig(
        max_position_embeddings=positions,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        use_cache=False,
    )


SHAPES = {
    "llama-70b": Shape(config=lambda: _llama(80, 8192, 28672, 64, 8, 128256, positions=8192), sizes=((1, 2048),)),
    "llama-7b": Shape(
        config=lambda: _llama(32, 4096, 11008, 32, 32, 32000), sizes=((1, 256), (2, 512), (8, 512), (2, 2048))
    ),
    "llama-1b": Shape(
        config=lambda: _llama(16, 2048, 8192, 32, 8, 128256), sizes=((1, 256), (2, 512), (8, 512), (2, 2048))
    ),
    "roberta-base": Shape(
        config=lambda: RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1),
        sizes=((16, 128), (32, 128)),
        task_type="SEQ_CLS",
    ),
    "minilm": Shape(
        config=lambda: BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=30522
        ),
        sizes=((16, 64), (32, 128)),
        task_type="SEQ_CLS",
    ),
    "stories260k": Shape(config=lambda: _llama(5, 64, 172, 8, 4, 512), sizes=((16, 64), (32, 128))),
    # for trying the scripts where there is no GPU
    "tiny": Shape(config=lambda: _llama(2, 64, 128, 4, 2, 256), sizes=((1, 16), (2, 32))),
    "tiny-bert": Shape(
        config=lambda: BertConfig(
            hidden_size=64, num_hidden_layers=12, num_attention_heads=4, intermediate_size=128, vocab_size=256
        ),
        sizes=((2, 8), (8, 32)),
        task_type="SEQ_CLS",
    ),
}

# rep and adp without norms: what LoRA is compared with; "norms" are LoRETTA's defaults
METHODS: dict[str, Callable[[str], PeftConfig]] = {
    "lora q,v": lambda task: LoraConfig(r=8, task_type=task),
    "lora all-linear": lambda task: LoraConfig(r=8, task_type=task, target_modules="all-linear"),
    "rep q,v": lambda task: LorettaRepConfig(task_type=task, train_norms=False),
    "adp": lambda task: LorettaAdpConfig(task_type=task, train_norms=False),
    "adp mlp": lambda task: LorettaAdpConfig(task_type=task, train_norms=False, placement="mlp"),
    "rep q,v norms": lambda task: LorettaRepConfig(task_type=task),
    "adp norms": lambda task: LorettaAdpConfig(task_type=task),
    "compact": lambda task: LorettaRepConfig.compact(task_type=task, train_norms=False),
    "shared": lambda task: LorettaSharedConfig(task_type=task, train_norms=False),
}

BOUND = "bound"


class Added(nn.Module):
    """A layer whose output gets a trained vector: the least that an adapter can do."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.vector = nn.Parameter(torch.zeros_like(base_layer.weight[:, 0], dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.vector.to(x.dtype)


class Bound(nn.Module):
    """``base`` with :class:`Added` in all places of adp, and a head that trains."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        ends = tuple(ADP_TARGETS[base.config.model_type])
        self.places = [name for name, _ in base.named_modules() if name.endswith(ends)]
        for place in self.places:
            base.set_submodule(place, Added(base.get_submodule(place)))
        if hasattr(base, "classifier"):
            base.classifier.requires_grad_(True)

    def forward(self, **inputs: Tensor) -> object:
        return self.base(**inputs)

    def unload(self) -> None:
        for place in self.places:
            self.base.set_submodule(place, self.base.get_submodule(place).base_layer)
        self.base.requires_grad_(False)


def build_base(shape: str, *, device: str, dtype: torch.dtype, layers: int | None = None) -> nn.Module:
    """A frozen base model with random weights; ``layers`` replaces the shape's number of layers."""
    config = SHAPES[shape].config()
    if layers is not None:
        config.num_hidden_layers = layers  # type: ignore[attr-defined]
    auto = AutoModelForCausalLM if SHAPES[shape].task_type == "CAUSAL_LM" else AutoModelForSequenceClassification
    return _frozen(auto, config, device, dtype)


def build_llama(*, layers: int, width: int, device: str, dtype: torch.dtype) -> nn.Module:
    """A frozen LLaMA of any depth and width (a multiple of 128) with random weights and a small vocabulary."""
    config = _llama(layers, width, 11 * width // 4, width // 128, width // 128, 8192)
    return _frozen(AutoModelForCausalLM, config, device, dtype)


def _frozen(auto: type, config: object, device: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        model = auto.from_config(config, dtype=dtype)
    return model.requires_grad_(False).train()


def wrap(base: nn.Module, method: str, shape: str) -> nn.Module:
    """``base`` with one of :data:`METHODS`, or with the bound of them."""
    if method == BOUND:
        return Bound(base).train()
    return perturbed(base, METHODS[method](SHAPES[shape].task_type))


def perturbed(base: nn.Module, config: PeftConfig) -> nn.Module:
    """``base`` with an adapter whose last factors are not zero, as in the middle of a training."""
    torch.manual_seed(1)
    model = get_peft_model(base, config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1e-3 * torch.randn_like(parameter))
    return model


def inputs(base: nn.Module, batch: int, tokens: int) -> dict[str, Tensor]:
    """Embeddings that ask for a gradient, so that every method and the floor do the whole backward pass."""
    config, embedding = base.config, base.get_input_embeddings().weight
    generator = torch.Generator(embedding.device).manual_seed(2)
    ids = torch.randint(5, config.vocab_size, (batch, tokens), generator=generator, device=embedding.device)
    labels = ids if hasattr(base, "lm_head") and "CausalLM" in type(base).__name__ else ids[:, 0] % 2
    return {"inputs_embeds": embedding[ids].detach().requires_grad_(), "labels": labels}
