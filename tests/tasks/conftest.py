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
