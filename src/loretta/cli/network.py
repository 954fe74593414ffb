"""Whether the Hub can be reached. Where it cannot, libraries retry again and again, half a minute each time."""

import os
import queue
import socket
import threading
import urllib.request
from urllib.parse import SplitResult, urlsplit

OFFLINE = "HF_HUB_OFFLINE"
PATIENCE = 3.0  # seconds


def go_offline_without_network() -> None:
    """Where the Hub is out of reach, tell libraries that are imported later to use only what is on this machine.

    Nothing happens where the user has set this already, or where the way to the Hub leads through a proxy.
    """
    if OFFLINE in os.environ or urllib.request.getproxies():
        return
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    reached: queue.Queue[bool] = queue.Queue()
    # in a thread, because looking up a name has no timeout
    threading.Thread(target=lambda: reached.put(_answers(address)), daemon=True).start()
    try:
        is_there = reached.get(timeout=PATIENCE)
    except queue.Empty:
        is_there = False
    if not is_there:
        os.environ[OFFLINE] = "1"


def _answers(address: SplitResult) -> bool:
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((str(address.hostname), port), timeout=PATIENCE).close()
    except (OSError, ValueError):
        return False
    return True
