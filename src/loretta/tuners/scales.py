"""The factor on the effect of each adapter of a layer: a number, and the same as a tensor."""

from collections import UserDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loretta.tuners import calls


class Scales(UserDict[str, float]):
    """The factor on the effect of each adapter: a number, and the same as a tensor.

    Recordings (compiled or CUDA graphs) read the tensor. It is filled in place, so that another number needs no other
    recording. The tensors of equal layers are elements of one (:meth:`join`), which is one input of a recording.
    """

    def __init__(self) -> None:
        self._start(torch.device("cpu"))
        super().__init__()

    def _start(self, device: torch.device) -> None:
        self.device = device
        self.tensors: dict[str, Tensor] = {}
        self.joint: dict[str, tuple[Tensor, int]] = {}  # of which tensor each is an element, and which one

    def __getstate__(self) -> dict[str, Any]:
        return {"data": self.data, "device": self.device}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # elements of one tensor would be copied apart
        self._start(state["device"])
        self.data = {}
        self.update(state["data"])

    def __setitem__(self, name: str, value: float) -> None:
        super().__setitem__(name, value)
        if name in self.tensors:
            self.tensors[name].fill_(value)
        else:
            self.tensors[name] = _tensor(value, self.device)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        del self.tensors[name]
        self.joint.pop(name, None)

    def move(self, device: torch.device) -> None:
        """Have the tensors on a device (not on meta, which holds no number)."""
        if device.type != "meta" and device != self.device:
            self._start(device)
            self.update(self.data)

    def of(self, name: str, like: Tensor) -> float | Tensor:
        """The factor of one adapter, as what has to be multiplied with ``like`` now."""
        return self.tensors[name].to(like.device, like.dtype) if calls.is_recorded() else self[name]

    @staticmethod
    def join(scales: "Sequence[Scales]", name: str) -> Tensor:
        """The factors of one adapter on equal layers, all on one device, as one tensor. It stays as long as they do."""
        known = scales[0].joint.get(name)
        if known is not None and len(known[0]) == len(scales):
            places = [each.joint.get(name, (None, 0)) for each in scales]
            if all(tensor is known[0] and place == k for k, (tensor, place) in enumerate(places)):
                return known[0]
        joint = _tensor([each[name] for each in scales], scales[0].device)
        for k, each in enumerate(scales):
            each.tensors[name], each.joint[name] = joint[k], (joint, k)
        return joint


def _tensor(value: float | list[float], device: torch.device) -> Tensor:
    dtype = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
    with torch.inference_mode(False):  # a call with gradients may use it later
        return torch.tensor(value, dtype=dtype, device=device)
