"""What batches hold, in host memory too: the fast path lays rows out there, and waits for no device.

The collator's tensors travel beside the batch in a box that is no mapping and no tensor, so that whatever moves batches
to a device leaves it where it is.
"""

from collections.abc import Callable

import torch

BOX = "host_copy"
IGNORED = -100  # the label of a token that is not scored, as in PyTorch's cross-entropy


class Box:
    """A batch as its collator made it."""

    def __init__(self, batch: dict):
        self.batch = batch


class Boxed:
    """A collator's batches, each with its box."""

    def __init__(self, collate: Callable[[list], dict]):
        self.collate = collate

    def __call__(self, examples: list) -> dict:
        batch = self.collate(examples)
        return {**batch, BOX: Box(batch)}


class Host:
    """The tensors of the batch at hand and, by their identity, their copies in host memory."""

    def __init__(self) -> None:
        self.moved: dict[str, torch.Tensor] = {}
        self.kept: dict[str, torch.Tensor] = {}
        self.proved: set[str] = set()

    def keep(self, moved: dict, kept: dict) -> None:
        """Remember the batch `moved`, whose tensors in host memory are those of `kept`."""
        self.moved = {name: each for name, each in moved.items() if isinstance(each, torch.Tensor)}
        self.kept = {name: kept[name] for name in self.moved if kept[name].device.type == "cpu"}

    @torch.compiler.disable
    def copy(self, given: dict) -> dict:
        """The tensors of `given` in host memory, from the copies where they are known, else asked of the device.

        Labels that TRL makes of a batch's ids and its completion mask are made again of their copies, as soon as they
        have once been TRL's.
        """
        tensors = {name: each for name, each in given.items() if isinstance(each, torch.Tensor)}
        names = {name: next((each for each in self.kept if self.moved[each] is it), "") for name, it in tensors.items()}
        copies = {name: self.kept[known] for name, known in names.items() if known}
        ids = names.get("input_ids", "")
        mask = ids.replace("input_ids", "completion_mask")
        if "labels" in tensors.keys() - copies.keys() and ids and mask in self.kept:
            labels = self.kept[ids].masked_fill(self.kept[mask] == 0, IGNORED)
            if ids in self.proved or torch.equal(labels, tensors["labels"].cpu()):
                self.proved.add(ids)
                copies["labels"] = labels
        return {name: copies[name] if name in copies else each.cpu() for name, each in tensors.items()}


@torch.compiler.disable
def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of host memory on `device`; nobody waits for it."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
