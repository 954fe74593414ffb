"""Hugging Face Hub: save the adapter with its model card, read the card, upload the folder.

Without --repo it only says what would be uploaded. `model.push_to_hub(repo)` uploads the same adapter, but lays a card
of placeholders over ours when the repository is new; the card of an earlier upload as below stays.
"""

from huggingface_hub import HfApi, ModelCard
from tiny import options
from transformers import AutoModelForCausalLM

from loretta import LorettaRepConfig, get_peft_model

given = options(__doc__, "llama", repo="upload to this repository, such as YOU/my-adapter")
model = get_peft_model(AutoModelForCausalLM.from_pretrained(given.model), LorettaRepConfig(task_type="CAUSAL_LM"))
# ... train it ...
folder = given.output / "adapter"
model.save_pretrained(folder)

card = ModelCard.load(folder / "README.md")
assert card.data.library_name == "peft"
assert {"loretta", "tensor-train"} <= set(card.data.tags)
assert "import loretta" in card.text
# your own words go anywhere outside the marked part, and stay there at the next save
card.text += "\n## Intended use\n\nPraise of films.\n"
card.save(folder / "README.md")
model.save_pretrained(folder)
assert "Praise of films." in ModelCard.load(folder / "README.md").text

files = sorted(path.name for path in folder.iterdir())
if given.repo:
    api = HfApi()
    api.create_repo(given.repo, exist_ok=True)
    print(api.upload_folder(repo_id=given.repo, folder_path=folder).commit_url)
else:
    print(f"would upload {', '.join(files)} of {folder}; give --repo to do it")
