"""Other methods of PEFT beside ours: cells of forms.py, whose tasks, rates, seeds and heads they share.

Each method is as published for encoders of width 768 on the queries and values, with what depends on the width scaled
to 384 for MiniLM. PEFT computes them; a population trains all rates and seeds of one at once.

    python benchmarks/forms.py --model FOLDER --data-dir FOLDER --out benchmarks/results/peers.json \
        --order best:cola,mrpc,stsb,rte

``best`` and ``more_peers`` are those of a model of width 384, ``wide`` those of one of width 768. ``--order
peer_rates:stsb`` before it tries six rates of each, two seeds of them; the best one on the held-out rows is from then
on the middle of the method's grid in that file, for what is published is of other models.
"""

from collections.abc import Sequence
from typing import Any

from groups import GROUPS
from methods import METHODS, Method

# of BERT, MPNet and LLaMA; few of these methods can be told to leave out a linear layer of the head
QUERIES, VALUES = ["query", "attn.q", "q_proj"], ["value", "attn.v", "v_proj"]
OTHERS = ["key", "attn.k", "attn.o", "intermediate.dense", "output.dense"]
OTHERS += ["k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALL = QUERIES + VALUES + OTHERS
SLOW_BANK = {"vblora_vector_bank": 0.1}
SIZES = (10_000, 20_000)


def peer(name: str, method: str, middle: float, targets: Sequence[str] = QUERIES + VALUES, **options: Any) -> Method:
    more = {"factors": options.pop("factors", {}), "like": options.pop("like", ""), "middle": middle}
    options = {"target_modules": list(targets), **options}
    return Method(name=name, family="PEFT", method=f"peft:{method}", options=options, **more)


def prompted(name: str, method: str, middle: float, **options: Any) -> Method:
    """A method of virtual tokens before the text, as many as ``loretta train`` gives it."""
    return Method(name=name, family="PEFT", method=method, options=options, middle=middle)


PEERS = [
    # VeRA: Table 2 trains RoBERTa-base at rank 1024; the small one has PEFT's default
    peer("VeRA r=256", "vera", 2e-2, r=256),
    # FourierFT: 1,000 coefficients of each matrix and a scale of 150, PEFT's default
    peer("FourierFT n=1000", "fourierft", 4e-2, n_frequency=1000, scaling=150.0),
    # Uni-LoRA: 23,040 numbers for rank 4 on RoBERTa-base, which are 15.6 % of the numbers of those matrices
    peer("Uni-LoRA d=5760", "unilora", 1e-2, r=4, theta_d_length=5760),
    # VB-LoRA: 90 vectors of a third of the width, 2 of them in a part of a matrix of rank 4; they learn at a tenth of
    # the rate of the logits that choose them
    peer("VB-LoRA h=90, b=128", "vblora", 6e-2, r=4, num_vectors=90, vector_length=128, topk=2, factors=SLOW_BANK),
    # TinyLoRA: so many numbers that its rank of 16 is used up, as LoRA-XS does; 1.5e-3 was far too high for it
    # (results/peers_tinylora.json)
    peer("TinyLoRA r=16, u=256", "tinylora", 3e-4, ALL, r=16, u=256),
    peer("WaveFT n=1000", "waveft", 5e-3, n_frequency=1000),
    peer("RoAd", "road", 5e-3, ALL, variant="road_1"),
    peer("VeRA r=1024", "vera", 2e-2, r=1024),
    peer("Uni-LoRA d=23040", "unilora", 1e-2, r=4, theta_d_length=23_040),
    # TinyLoRA: PEFT's default, the paper's rank
    peer("TinyLoRA r=2, u=64", "tinylora", 3e-4, ALL, r=2, u=64),
    # the biases of the values alone
    peer("BEFT", "beft", 3e-3, VALUES),
    prompted("prefix 20", "prefix", 1e-2),
    prompted("prompt 20", "prompt", 1e-2),
    prompted("p-tuning 20", "p-tuning", 3e-3, encoder_hidden_size=128),
    # for width 768
    peer(
        "VB-LoRA h=90, b=256",
        "vblora",
        6e-2,
        r=4,
        num_vectors=90,
        vector_length=256,
        topk=2,
        factors=SLOW_BANK,
        like="VB-LoRA h=90, b=128",
    ),
    # the best of them on MiniLM, within 5,000 numbers
    peer("Uni-LoRA d=5000", "unilora", 1e-2, r=4, theta_d_length=5000, like="Uni-LoRA d=5760"),
    # and for the other sizes of the bar
    *(peer(f"Uni-LoRA d={d}", "unilora", 1e-2, r=4, theta_d_length=d, like="Uni-LoRA d=5760") for d in SIZES),
    # for width 576, whose keys and values have 192
    peer("VB-LoRA h=90, b=192", "vblora", 6e-2, r=4, num_vectors=90, vector_length=192, topk=2, factors=SLOW_BANK),
]
PEER_GROUPS = {
    "best": [method.name for method in PEERS[:5]],
    "more_peers": [method.name for method in PEERS[5:-5]],
    "sizes": [f"Uni-LoRA d={d}" for d in (5000, *SIZES)],
    "table_1_minilm": ["VeRA r=256", "FourierFT n=1000", "VB-LoRA h=90, b=128", "Uni-LoRA d=5000"],
    "table_1_mpnet": ["VeRA r=256", "FourierFT n=1000", "VB-LoRA h=90, b=256", "Uni-LoRA d=5000"],
    "peer_rates": [method.name for method in PEERS[:5]],
    "peer_rates_576": ["VB-LoRA h=90, b=192"],
    "wide": [
        method.name
        for method in PEERS
        if not method.name.endswith(("d=5760", "d=5000", "d=10000", "d=20000", "b=128", "b=192"))
    ],
}


METHODS |= {method.name: method for method in PEERS}
GROUPS |= PEER_GROUPS
