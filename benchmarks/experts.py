"""Rep on the experts of a small mixture against PEFT's LoRA on the same parameters: counts, step times, losses.

A Qwen3-MoE of four layers and eight experts is trained from nothing on one text until it writes that text's language;
then every form is put on the experts alone and trained on another text. The rate is chosen with the first seed on one
part of the texts held out, and the loss is that of the other part. Prints rows, and writes them to JSON one by one.

    python benchmarks/experts.py --tokenizer FOLDER --base stories.jsonl.gz --tuned wiki.jsonl.gz \\
        --out benchmarks/results/experts.json
"""

import argparse
import copy
import gzip
import json
import statistics
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from timing import WARM_UP, about
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from loretta import LorettaRepConfig

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
FORMS = {
    "rep r=1, rank 4": LorettaRepConfig.compact,
    "rep r=8, rank 5": LorettaRepConfig,
    "rep r=8, rank 16": lambda **options: LorettaRepConfig(tensor_rank=16, lora_alpha=32, **options),
    "LoRA r=1": lambda **options: LoraConfig(r=1, lora_alpha=2, **options),
    "LoRA r=8": lambda **options: LoraConfig(r=8, lora_alpha=16, **options),
}
RATES = (3e-3, 1e-2, 3e-2)
HELD_OUT = 64  # blocks to choose the rate on, and as many to report


def blocks(file: Path, tokenizer: object, length: int) -> Tensor:
    """The texts of a JSONL file, one after the other, in rows of ``length`` tokens."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def train(model: nn.Module, rows: Tensor, *, rate: float, steps: int, batch: int, seed: int) -> None:
    """AdamW over random rows, with a linear decay."""
    generator = torch.Generator().manual_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    model.train()
    for _ in range(steps):
        ids = rows[torch.randint(len(rows), (batch,), generator=generator)]
        model(input_ids=ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def loss(model: nn.Module, rows: Tensor) -> float:
    """Mean cross-entropy of a token, in nats."""
    model.eval()
    return statistics.mean(model(input_ids=part, labels=part).loss.item() for part in rows.split(16))


def adapted(base: nn.Module, form: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    norms = {} if "LoRA" in form else {"train_norms": False}
    config = FORMS[form](target_modules=[], target_parameters=EXPERTS, task_type="CAUSAL_LM", **norms)
    return get_peft_model(copy.deepcopy(base), config)


def step_times(base: nn.Module, rows: Tensor, rounds: int) -> dict[str, float]:
    """Milliseconds of the processor for a step of each form, median over rounds in which all take turns.

    The floor trains one norm. What other programs do on the machine is not in the time of this process.
    """
    models = {form: adapted(base, form, seed=0) for form in FORMS}
    models["frozen, one norm trained"] = floor = copy.deepcopy(base)
    floor.requires_grad_(False)
    floor.model.layers[0].input_layernorm.weight.requires_grad_(True)
    times: dict[str, list[float]] = {form: [] for form in models}
    for number in range(WARM_UP + rounds):
        for form, model in models.items() if number % 2 else reversed(models.items()):
            begin = time.process_time()
            model(input_ids=rows, labels=rows).loss.backward()
            model.zero_grad()
            if number >= WARM_UP:
                times[form].append(1e3 * (time.process_time() - begin))
    return {form: statistics.median(found) for form, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer of few words")
    parser.add_argument(
        "--base", type=Path, required=True, help="texts that the mixture is trained on first, .jsonl.gz"
    )
    parser.add_argument("--tuned", type=Path, required=True, help="texts that the adapters are trained on, .jsonl.gz")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--times", action="store_true", help="measure the steps alone, anew, for the file that is there"
    )
    given = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=128, moe_intermediate_size=128, intermediate_size=128,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=8,
        num_experts_per_tok=2, tie_word_embeddings=True, output_router_logits=True, router_aux_loss_coef=0.01,
        max_position_embeddings=given.length,
    )  # fmt: skip
    torch.manual_seed(0)
    base = Qwen3MoeForCausalLM(config)
    first, then = (blocks(file, tokenizer, given.length) for file in (given.base, given.tuned))
    last = then[-given.batch :]
    if given.times:
        report = {**json.loads(given.out.read_text()), "ms": step_times(base, last, given.rounds)}
        given.out.write_text(json.dumps(report, indent=1) + "\n")
        return
    begin = time.perf_counter()
    train(base, first[2 * HELD_OUT :], rate=2e-3, steps=given.base_steps, batch=given.batch, seed=0)
    base.config.output_router_logits = False  # the loss of the adapters is that of the words alone
    report = {
        **about("cpu", "float32"),
        "parameters": sum(parameter.numel() for parameter in base.parameters()),
        "base_steps": given.base_steps,
        "base_seconds": time.perf_counter() - begin,
        "steps": given.steps,
        "base_loss": {
            name: loss(base, rows[HELD_OUT : 2 * HELD_OUT]) for name, rows in (("first", first), ("tuned", then))
        },
        "ms": {},
        "rows": [],
    }
    print(f"base: {report['parameters']:,} parameters, loss {report['base_loss']}", flush=True)

    def write() -> None:
        given.out.write_text(json.dumps(report, indent=1) + "\n")

    report["ms"] = step_times(base, last, given.rounds)
    write()

    def measure(form: str, rate: float, seed: int) -> dict:
        model = adapted(base, form, seed)
        train(model, then[2 * HELD_OUT :], rate=rate, steps=given.steps, batch=given.batch, seed=seed)
        row = {
            "form": form,
            "rate": rate,
            "seed": seed,
            "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
            "chosen_on": loss(model, then[:HELD_OUT]),
            "loss": loss(model, then[HELD_OUT : 2 * HELD_OUT]),
        }
        report["rows"].append(row)
        write()
        print(row, flush=True)
        return row

    for form in FORMS:
        best = min((measure(form, rate, 0) for rate in RATES), key=lambda row: row["chosen_on"])
        for seed in range(1, given.seeds):
            measure(form, best["rate"], seed)


if __name__ == "__main__":
    main()
