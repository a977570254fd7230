"""What weights are the same: a digest of them."""

import torch
import xxhash

from preftune.models import sharding


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of all weights, names and dtypes: the identity of a model, wherever it came from."""
    return weights_digest(model.state_dict()).hexdigest()


def weights_digest(state: dict[str, torch.Tensor]) -> xxhash.xxh3_128:
    """The hash so far of these tensors, bit for bit, with their names, dtypes and shapes, in the order of the names.

    Those that are sharded are gathered one by one, for which every rank must call this.
    """
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(state.items()):
        with sharding.gathered([tensor]):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            weight = sharding.whole_tensor(tensor)
            digest.update(weight.reshape(-1).contiguous().view(torch.uint8).cpu().numpy())
    return digest
