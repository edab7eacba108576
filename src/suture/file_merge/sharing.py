"""One pass over the whole model for all processes of a merge: each block of tensors is counted once."""

import io
from collections.abc import Callable, Sequence

import numpy as np

from suture.file_merge.workspace import WorkingFolder
from suture.merging.streams import Tally
from suture.merging.task_vectors import RowStream, TaskVectors

_BLOCKS = 16  # whatever the number of processes, which may change


class SharedStream(RowStream):
    """All rows of a model. What is counted over them is counted block by block, by whichever process comes first.

    Counts of integers do not depend on who counts, nor in what order, so every process gets the same totals, and they
    are those of one process. A process that dies leaves its block to the others.
    """

    def __init__(self, vectors: TaskVectors, operand: str, folder: WorkingFolder):
        super().__init__(vectors, vectors.names, operand)
        self.folder, self.rounds = folder, 0
        size = lambda name: vectors.base.specs[name].numel
        in_order = sorted(vectors.names, key=lambda name: (-size(name), name))
        self.blocks = [in_order[i::_BLOCKS] for i in range(_BLOCKS)]

    def tally(self, function: Tally, totals: Sequence[np.ndarray]) -> None:
        """`RowStream.tally`, shared."""
        self.rounds += 1
        blocks = {f"count-{self.rounds}-{i}.npz": names for i, names in enumerate(self.blocks)}

        def count(name: str) -> bytes:
            for total in totals:
                total[:] = 0
            RowStream(self.vectors, blocks[name], self.operand).tally(function, totals)
            buffer = io.BytesIO()
            np.savez_compressed(buffer, *totals)
            return buffer.getvalue()

        self.folder.once(list(blocks), count)
        counts = [self._load(name, count) for name in blocks]
        for i, total in enumerate(totals):
            total[:] = sum(block[i] for block in counts)

    def _load(self, name: str, count: Callable[[str], bytes]) -> list[np.ndarray]:
        """One block's counts. A file that cannot be read is set aside, and its block counted anew."""
        (path,) = self.folder.once([name], count)
        try:
            with np.load(path) as arrays:
                return [arrays[key] for key in arrays]
        except Exception:  # a damaged file fails in many ways
            self.folder.set_aside(path)
            return self._load(name, count)
