"""Log lines of torchao and bitsandbytes, kept back until a layer is quantised.

``import peft`` imports both packages wherever they are installed: transformers.quantizers imports torchao and
peft.helpers imports bitsandbytes, and no option of either turns it off. Each then says which of its kernels this
machine lacks. That concerns quantised layers alone, so the lines below wait for the first of them; every other line
of these loggers passes.
"""

import logging

# logger -> how the message begins, before its arguments are put in
_LINES = {
    "torchao": ("Failed to load ", "Skipping import of cpp extensions"),
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
    "torch.utils._pytree": ("%s is an Enum subclass",),
}


class _Held(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def filter(self, record: logging.LogRecord) -> bool:
        if not str(record.msg).startswith(_LINES[record.name]) or not _is_of_a_quantizer(record):
            return True
        self.records.append(record)
        return False


def _is_of_a_quantizer(record: logging.LogRecord) -> bool:
    # torch warns of anyone's Enum: only those that torchao registers are its own business
    named = [arg for arg in record.args or () if isinstance(arg, type)] if isinstance(record.args, tuple) else []
    return all(cls.__module__.partition(".")[0] == "torchao" for cls in named)


_held = _Held()


def hold() -> None:
    """Keep the lines back from now on. Call it before the first import of PEFT or transformers."""
    for name in _LINES:
        logging.getLogger(name).addFilter(_held)


def show() -> None:
    """Print the lines that were kept back, and keep back no more. A second call does nothing."""
    for name in _LINES:
        logging.getLogger(name).removeFilter(_held)
    while _held.records:
        record = _held.records.pop(0)
        logging.getLogger(record.name).handle(record)
