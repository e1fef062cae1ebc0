"""Where networks run: on the GPU that a job has, or on the CPU.

Code that makes tensors leaves their device to torch's default, which a stage sets once. What comes from
NumPy is taken over by ``torch.as_tensor``, which follows the default, and what goes there by
``numpy(force=True)``. So nothing else asks for a device.
"""

from __future__ import annotations

import torch

from flowtilt.seeding import seed_of


def take_device() -> torch.device:
    """Make the GPU torch's default device, if there is one, and return the default.

    Without a GPU nothing is set: a default device makes every call of torch a little slower.
    """
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
    return torch.get_default_device()


def check_gpus(wanted: int) -> None:
    """Refuse a job that was to have GPUs which torch does not see.

    Raises:
        ValueError: naming the key.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted > found:
        raise ValueError(
            f"key gpu: the job was to have {wanted}, and torch sees {found}; run it where there are as many, "
            "install a torch that is built for them, or set gpu: 0, which takes much longer"
        )


def seeded(seed: int) -> torch.Generator:
    """A generator on the default device. A GPU has another sequence than a CPU of the same seed."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def generator_of(*parts: str | float) -> torch.Generator:
    """A generator on the default device whose seed follows from some names and numbers."""
    return seeded(seed_of(*parts))
