"""torch's walk over the modules of a model, without a generator within each generator.

PEFT and transformers walk over a model dozens of times for each adapter: of the tests of tuners/ it was a seventh.
"""

from collections.abc import Iterator

from torch import nn

of_torch = nn.Module.named_modules


def named_modules(
    self: nn.Module, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """As ``torch.nn.Module.named_modules``, in its order and as late: what changes on the way is seen."""
    memo = set() if memo is None else memo
    if self in memo:
        return
    if remove_duplicate:
        memo.add(self)
    yield prefix, self
    below = [(prefix, iter(self._modules.items()))]
    while below:
        prefix, children = below[-1]
        for name, child in children:
            if child is None:
                continue
            path = f"{prefix}.{name}" if prefix else name
            if type(child).named_modules is not nn.Module.named_modules:  # its own, as PEFT's layers of experts have
                yield from child.named_modules(memo, path, remove_duplicate)
                continue
            if child in memo:
                continue
            if remove_duplicate:
                memo.add(child)
            yield path, child
            if child._modules:
                below.append((path, iter(child._modules.items())))
                break
        else:
            below.pop()
