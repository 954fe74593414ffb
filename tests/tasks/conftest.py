import datasets
import pytest

from loretta.errors import InputError


@pytest.fixture(scope="session")
def refused():
    """Call something that must be refused in one sentence that has all the given pieces; returns the sentence."""

    def check(call, *pieces):
        with pytest.raises(InputError) as caught:
            call()
        message = str(caught.value)
        assert "\n" not in message
        assert ". " not in message.replace("...", ""), f"more than one sentence: {message}"
        missing = [piece for piece in pieces if piece not in message]
        assert not missing, f"{missing} not in: {message}"
        return message

    return check


@pytest.fixture
def hub(monkeypatch):
    """Let the Hub answer with the rows of two splits, or raise; returns the list of what it is asked for."""

    def answer(*splits, error=None):
        asked = []

        def load_dataset(*args, split):
            asked.append((*args, split))
            if error is not None:
                raise error
            return [datasets.Dataset.from_list(rows) for rows in splits]

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return answer


@pytest.fixture(
    params=[ConnectionError("Couldn't reach it\nat all"), datasets.exceptions.DatasetNotFoundError("no such")],
    ids=["unreachable", "without it"],
)
def why_no_hub(request, hub):
    """The first line of what the Hub raises, whatever it is asked for."""
    hub(error=request.param)
    return str(request.param).split("\n")[0]
