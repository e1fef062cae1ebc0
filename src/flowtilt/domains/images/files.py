"""Names of the files of a run's pictures, for stages that write them and figures that read them."""

from __future__ import annotations


def picture_name(prompt: int, number: int) -> str:
    """File of a picture: that of its prompt's position, and its number among the prompt's."""
    return f"prompt{prompt:03d}_{number:04d}.png"
