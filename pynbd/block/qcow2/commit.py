"""The order of writes: what of an image is on stable storage before what.

Guest data goes to the file at once. Metadata is changed in memory, and a commit writes it: at
FLUSH and FUA, when much has gathered, and when the image is closed. Between two barriers the host
may bring writes to the disk in any order, and a crash may keep any of them; so whatever needs an
order has a barrier (fdatasync) in between, and a `Rule` says why. At any crash the image is one
that opens, with leaked clusters at most, and what a completed commit covered is there.

One commit, from what is in memory when it begins::

    guest data is in the files already
    write   new L2 tables, new refcount blocks and tables, changed refcount blocks
    barrier REFERENCED                                (and the data file)
    write   refcount table entries of new blocks, or the header's place of a new table
    barrier COUNTED                                   (only if there were any)
    write   L2 entries, L1 entries, bitmap table entries: the links
    barrier FREED
    freed clusters are punched and given back, those that no request pins any more

What is linked, counted or freed while a commit runs belongs to the next one. After a commit that
failed everything is as it was before, and the next one tries again.

With lazy refcounts the dirty bit is set first, and changed refcount blocks wait for the end; they
may be written before at any time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from enum import Enum

from pynbd.block.engine import Buffer, HostFile
from pynbd.block.pins import Pins
from pynbd.block.qcow2.cache import PAGE, Table
from pynbd.block.qcow2.format import Incompatible
from pynbd.block.qcow2.header_fields import HeaderFields

HostRange = tuple[int, int]  # host offset and length, in bytes, of whole clusters

# Changed tables in memory: a commit copies their pages in one step of the loop.
MAX_CHANGED_PAGES = (4 << 20) // PAGE
# Ranges that were freed: to punch each of them takes a while, and flushes wait for it.
MAX_FREED = 1 << 12
# With lazy refcounts, blocks that wait for the end.
MAX_LAZY_BLOCKS = 64


class Rule(Enum):
    """Why there is a barrier: what has to be on stable storage first, and before what."""

    REFERENCED = "what a link names, its bytes and its refcount, before the link"
    COUNTED = "a new refcount block or table before what names it, and that before any link"
    FREED = "the end of a reference before its cluster is punched, counted down or used again"
    DIRTY = "the dirty bit before the first link whose refcounts are not written"
    CLEAN = "all refcounts before the dirty bit goes"
    IN_USE = "a bitmap's in-use flag before the first change of guest data"
    STORED = "a bitmap's bits before its in-use flag goes"
    AUTOCLEAR = "the end of unknown autoclear bits before anything else is changed"
    CORRUPT = "the corrupt bit before anybody is told"


class _Taken:
    """What one commit writes of some tables, as it was when the commit began."""

    def __init__(self, changed: dict[Table, None]) -> None:
        self.pages = {table: frozenset(table.pages) for table in changed}
        self.pieces = [piece for table in changed for piece in table.take_pages()]
        changed.clear()

    def give_back(self, changed: dict[Table, None]) -> None:
        """None of it is known to be written."""
        for table, pages in self.pages.items():
            table.pages |= pages
            changed[table] = None


class Commits:
    """What was changed of one image, and its commits.

    ``data_file``: the external one, if there is one. ``most_tables``: bytes of changed tables, each
    of which is in memory as a whole if one page of it was changed. ``release``, to be set before
    the first commit, takes freed clusters that nobody uses any more.
    """

    release: Callable[[Sequence[HostRange]], Awaitable[None]]

    def __init__(
        self,
        file: HostFile,
        data_file: HostFile | None,
        fields: HeaderFields,
        pins: Pins,
        *,
        lazy_refcounts: bool,
        most_tables: int,
    ) -> None:
        self._file = file
        self._data_file = data_file
        self._fields = fields
        self._pins = pins
        self._lazy = lazy_refcounts
        # So many tables are never too much, and need not be counted.
        self._few_tables = MAX_CHANGED_PAGES * PAGE // max(1 << fields.cluster_bits, PAGE) - 1
        self._many_tables = most_tables >> fields.cluster_bits
        # Changed tables, by what names them and what they name.
        self._new_tables: dict[Table, None] = {}
        self._new_blocks: dict[Table, None] = {}
        self._blocks: dict[Table, None] = {}
        self._refcount_table: dict[Table, None] = {}
        self._links: dict[Table, None] = {}
        self._moved: Table | None = None
        self._freed: list[HostRange] = []
        self._unused: list[tuple[int, list[HostRange]]] = []  # freed, by age (`Pins`)
        self._one_at_a_time = asyncio.Lock()
        self._begun = self._succeeded = 0

    # Changes

    def add_table(self, table: Table) -> None:
        """A new L2 table, that nothing on disk names yet."""
        table.changed_as_a_whole()
        self._new_tables[table] = None

    def link(self, table: Table, first: int, last: int) -> None:
        """Entries [first, last) of an L1, L2 or bitmap table were changed."""
        table.changed(first, last)
        if table not in self._new_tables:
            self._links[table] = None

    def add_block(self, block: Table, refcount_table: Table, index: int) -> None:
        """A new refcount block, which the refcount table names at ``index``."""
        block.changed_as_a_whole()
        self._new_blocks[block] = None
        refcount_table.changed(index, index + 1)
        if refcount_table not in self._new_blocks:
            self._refcount_table[refcount_table] = None

    def count(self, block: Table, first: int, last: int) -> None:
        """Entries [first, last) of a refcount block were changed."""
        block.changed(first, last)
        if block not in self._new_blocks:
            self._blocks[block] = None

    def move_refcount_table(self, table: Table) -> None:
        """A new refcount table, with all that the present one has, takes its place."""
        table.changed_as_a_whole()
        self._new_blocks[table] = None
        self._refcount_table.clear()
        self._moved = table

    def free(self, ranges: Iterable[HostRange]) -> None:
        """One reference less to each of these clusters, in memory."""
        self._freed += ranges

    @property
    def much(self) -> bool:
        """Whether a commit is due, because so much has gathered."""
        if len(self._freed) > MAX_FREED:
            return True
        tables = len(self._links) + len(self._new_tables)
        if tables <= self._few_tables:
            return False
        if tables > self._many_tables:
            return True
        pages = sum(len(table.pages) for table in (*self._links, *self._new_tables))
        return pages > MAX_CHANGED_PAGES

    @property
    def pending(self) -> bool:
        """Whether anything was changed that is not on stable storage, as far as is known."""
        return self._one_at_a_time.locked() or self._changed

    @property
    def _changed(self) -> bool:
        return bool(
            self._new_tables
            or self._new_blocks
            or self._blocks
            or self._refcount_table
            or self._links
            or self._freed
        )

    # Commits

    async def commit(self) -> None:
        """What was written and changed before is on stable storage afterwards. ``OSError`` if not.

        Who comes while a commit runs shares the next one with all who wait.
        """
        asked_after = self._begun
        async with self._one_at_a_time:
            if self._succeeded > asked_after:
                return
            self._begun += 1
            number = self._begun
            await self._commit()
            self._succeeded = number
            await self._give_back_unused()

    async def finish(self) -> None:
        """The last commits: nothing is left to be given back, and every refcount is on disk."""
        self._lazy, was_lazy = False, self._lazy
        await self.commit()
        while self._changed:
            await self.commit()
        if was_lazy and Incompatible.DIRTY in self._fields.incompatible:
            # Rule.CLEAN: every refcount is on disk since the last of these commits.
            await self._fields.set_incompatible(Incompatible.DIRTY, on=False)
            await self._file.flush()

    async def _commit(self) -> None:
        if self._lazy and self._changed:
            await self._mark_dirty()
        new_tables, new_blocks = _Taken(self._new_tables), _Taken(self._new_blocks)
        wait = self._lazy and len(self._blocks) <= MAX_LAZY_BLOCKS
        blocks = _Taken({} if wait else self._blocks)
        refcount_table, links = _Taken(self._refcount_table), _Taken(self._links)
        moved, self._moved = self._moved, None
        freed, self._freed = self._freed, []
        age = self._pins.end_age() if freed else 0
        stable = False  # whether the new tables and blocks are
        try:
            await self._write(new_tables.pieces + new_blocks.pieces + blocks.pieces)
            if self._data_file:
                await self._data_file.flush()
            if links.pieces or refcount_table.pieces or moved:
                await self.barrier(Rule.REFERENCED)
                stable = True
            if refcount_table.pieces or moved:
                await self._write(refcount_table.pieces)
                if moved:
                    await self._fields.place_refcount_table(moved.host_offset, moved.length)
                await self.barrier(Rule.COUNTED)
            await self._write(links.pieces)
            await self.barrier(Rule.FREED)
        except BaseException:
            # New ones that are stable may be named on disk by now: they are as all others.
            new_tables.give_back(self._links if stable else self._new_tables)
            new_blocks.give_back(self._blocks if stable else self._new_blocks)
            for changed, new in (
                (self._links, self._new_tables),
                (self._blocks, self._new_blocks),
                (self._refcount_table, self._new_blocks),
            ):
                for table in changed.keys() & new.keys():
                    del changed[table]
            if stable and moved:
                self._blocks.pop(moved, None)
                self._refcount_table[moved] = None
            blocks.give_back(self._blocks)
            refcount_table.give_back(self._refcount_table)
            links.give_back(self._links)
            self._moved = self._moved or moved
            self._freed = freed + self._freed
            raise
        if freed:
            self._unused.append((age, freed))

    async def _write(self, pieces: Sequence[tuple[Buffer, int]]) -> None:
        if not pieces:
            return
        errors = await self._file.write_batch(pieces)
        for error in filter(None, errors):
            raise error

    async def _give_back_unused(self) -> None:
        """Give back the freed clusters that no request pins any more; the others wait."""
        while self._unused and self._pins.gone(self._unused[0][0]):
            _, ranges = self._unused.pop(0)
            await self.release(ranges)

    async def _mark_dirty(self) -> None:
        if Incompatible.DIRTY not in self._fields.incompatible:
            await self._fields.set_incompatible(Incompatible.DIRTY, on=True)
            await self.barrier(Rule.DIRTY)

    async def barrier(self, rule: Rule) -> None:
        """What was written to the image before is on stable storage, before what comes next.

        ``rule`` is for those who read, and for the mutations that switch one off.
        """
        await self._file.flush()
