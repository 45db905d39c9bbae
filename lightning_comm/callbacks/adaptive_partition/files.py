"""The files of a partitioned run, which rank 0 writes: the journal and a page to look at."""

import logging
import time
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_comm.formats.adaptive_partition import PartitionJournal
from lightning_comm.formats.profile import next_run, run_folder
from lightning_comm.reports.adaptive_partition.page import partition_page
from lightning_comm.reports.adaptive_partition.text import summary

_log = logging.getLogger(__name__)
_SAVE_EVERY_S = 10.0


class PartitionFiles:
    """Writes ``journal.json`` and ``partition.html`` on rank 0. A full disk does not end training.

    Args:
        above: The folder in which each run makes its own.
        writes: Whether this rank writes.

    """

    def __init__(self, above: Path, *, writes: bool) -> None:
        self._writes = writes
        self.folder: Path | None = None
        self._saved_s = time.monotonic()
        self._failed = False
        if self._writes:
            try:
                self.folder = run_folder(above, next_run(above))
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                self._give_up(error)

    @property
    def is_due(self) -> bool:
        """Whether it is time to write the journal again."""
        return self._writes and time.monotonic() - self._saved_s > _SAVE_EVERY_S

    def save(self, journal: PartitionJournal) -> None:
        """Write the journal."""
        if not self._writes or self.folder is None or self._failed:
            return
        self._saved_s = time.monotonic()
        try:
            journal.save(self.folder / "journal.json")
        except OSError as error:
            self._give_up(error)

    def finish(self, journal: PartitionJournal) -> None:
        """Write both files, and log the results and where the files are."""
        if not self._writes:
            return
        self.save(journal)
        if journal.windows or journal.mode != "fixed":
            rank_zero_info(summary(journal))
        if self.folder is None or self._failed:
            return
        try:
            (self.folder / "partition.html").write_text(partition_page(journal), encoding="utf-8")
        except OSError as error:
            self._give_up(error)
            return
        rank_zero_info(f"AdaptivePartition: the journal, for `replay`, and a page are in {self.folder}")

    def _give_up(self, error: OSError) -> None:
        self._failed = True
        _log.warning("AdaptivePartition: the journal cannot be written, and training goes on: %s", error)
