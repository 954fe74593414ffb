"""The way of a finished adapter to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from loretta.errors import InputError
from loretta.wording import one_line, quoted


def check_hub(name: str) -> None:
    """Before the training: that the name is one of a repository, and that somebody is logged in.

    Raises InputError otherwise.
    """
    try:
        validate_repo_id(name)
        HfApi().whoami()
    except HFValidationError as error:
        raise InputError(f"push_to_hub {quoted(name)} is no Hub id: {one_line(error)}") from None
    except Exception as error:  # of the Hub, the network, the client that huggingface_hub happens to use
        raise InputError(
            f"push_to_hub {quoted(name)}: the Hub does not know who this is ({one_line(error)}): run `hf auth login`, "
            "or leave it out and upload adapter/ later"
        ) from None


def push(folder: Path, name: str) -> str:
    """Upload a folder as the repository ``name``, which is made private where it is new; returns its address.

    Raises InputError where that fails; the run itself is finished by then.
    """
    api = HfApi()
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Adapter trained with LoRETTA")
    except Exception as error:
        raise InputError(
            f"the run is finished, and '{folder}' cannot be uploaded as {quoted(name)} ({one_line(error)}): try again "
            f"with hf upload {name} {folder}"
        ) from None
    return str(address)
