"""What shows how far a training is."""

from __future__ import annotations


class Bar:
    """A progress bar over updates that shows the loss."""

    def __init__(self, total: int, label: str) -> None:
        from tqdm import tqdm

        from flowtilt.parallel import processes

        disable = None if processes().leads else True
        self._bar = tqdm(total=total, desc=label, unit="update", mininterval=1.0, disable=disable)

    def __call__(self, row: dict[str, float]) -> None:
        self._bar.set_postfix(loss=f"{row['loss']:.3g}", refresh=False)
        self._bar.update()
