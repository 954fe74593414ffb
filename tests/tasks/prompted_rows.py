"""A row of every prompted task, with the fields of the Hub."""

PASSAGE = "Bo scored in Rome.\n@highlight\nAda coached Bo\n@highlight\nBo is from Pisa"

ROWS = {
    "boolq": {"passage": "Ice is water.", "question": "is ice water", "label": 1},
    "cb": {"premise": "I think it rained.", "hypothesis": "it rained", "label": 2},
    "wsc": {"text": "Ann told Eve that She won.", "span1_text": "Ann", "span2_text": "She", "label": 1},
    "copa": {
        "premise": "The cup broke.",
        "choice1": "I dropped it.",
        "choice2": "The tea was hot.",
        "question": "cause",
        "label": 0,
    },
    "record": {
        "passage": PASSAGE,
        "query": "@placeholder praised him",
        "entities": ["Ada", "Bo", "Pisa"],
        "answers": ["Bo", "Ada"],
    },
    "squad": {
        "title": "Bees",
        "context": "Bees dance.",
        "question": " Who dances? ",
        "answers": {"text": ["Bees", "bees", "Bees"], "answer_start": [0, 0, 0]},
    },
    "drop": {
        "passage": "Ray ran 3 yards and Lee 4.",
        "question": "Who ran? ",
        "answers_spans": {"spans": ["Ray", "Lee"], "types": ["span", "span"]},
    },
    "sst2": {"sentence": "a quiet joy ", "label": 0},
    "rte": {"sentence1": "Ann sings.", "sentence2": "Ann is loud.", "label": 1},
}
