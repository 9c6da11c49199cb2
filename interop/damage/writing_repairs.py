"""Who repairs a damaged image (``pynbd check -r all``): the judgement of one case.

1. The outcome is NOT_CHECKED (one line, and nothing was changed), LEFT (there are corruptions that
   nobody can mend), LEAKS or CLEAN, as the exit status says; RAW where it is not known to be qcow2.
2. There are no more corruptions than before, all that could be read reads as before, and another
   repair changes nothing of what is clean.
3. What has no corruptions then can be written to, and has none afterwards. COPIED flags that
   contradict a refcount are some here: they are left where a table is something else, too, which a
   write in it would damage.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from interop.checking import pynbd_check
from interop.damage.generator import Case
from interop.damage.images import sound
from interop.damage.watching import named_files, state
from interop.damage.workers import Judge
from interop.damage.writing import Seen, Writing
from interop.damage.writing_model import Model


class Outcome(StrEnum):
    CLEAN = "clean"
    NOT_CHECKED = "not checked"
    LEFT = "left"
    LEAKS = "leaks"
    RAW = "raw"


_BY_STATUS = dict(zip((0, 1, 2, 3, 63), Outcome, strict=True))


def make_judge(folder: Path) -> Judge:
    """A judge for a process of `interop.damage.workers`."""
    repairing = Repairing(folder)
    return lambda _, case: repairing.repair(case)


class Repairing(Writing):
    """Judges one case after the other, in this process."""

    def _warm_up(self) -> None:
        super()._warm_up()
        pynbd_check(sound("plain").place(self._folder), "-r", "all")

    def repair(self, case: Case) -> tuple[Outcome, str]:
        """The outcome, and what was left. An exception is a defect."""
        path, allowed = self.placed(case)
        before, files = self.seen(path), state(self._folder)
        with self.watched(allowed):
            said = pynbd_check(path, "-r", "all")
        outcome = _BY_STATUS[said.status]
        now = state(self._folder)
        unchanged = outcome in (Outcome.NOT_CHECKED, Outcome.RAW) and said.report is None
        for name in files.keys() | now.keys():
            if unchanged or name != path.name:
                assert now.get(name) == files.get(name), f"{name} was changed"
        if unchanged:
            return outcome, ""
        repaired = self._check_repaired(path, before)
        if outcome is Outcome.CLEAN:
            again = path.read_bytes()
            assert pynbd_check(path, "-r", "all").status == 0
            assert path.read_bytes() == again, "another repair changes it"
        left = repaired.metadata.corruptions, repaired.metadata.flags
        if not any(left) and repaired.guest:
            self._check_written(case, path, repaired)
        return outcome, f"{left[0]} corruptions, {left[1]} flags"

    def _check_repaired(self, path: Path, before: Seen) -> Seen:
        after = self.seen(path)
        was, now = before.metadata.corruptions, after.metadata.corruptions
        assert was is None or (now is not None and now <= was), f"{was} corruptions, {now} now"
        for then, there in (before.guest, after.guest), (before.snapshot, after.snapshot):
            if then is not None:
                assert there is not None, "it cannot be opened any more"
                _, changed = Model(then).differences(there)
                assert not len(changed), f"guest offset {changed[0]:#x} reads other bytes"
        return after

    def _check_written(self, case: Case, path: Path, repaired: Seen) -> None:
        assert repaired.guest is not None
        model = Model(repaired.guest)
        with self.watched(named_files(path)):
            outcome, said = self._run_of(case, path, model)
        worse = self.worse(path, repaired, model, strictly=True)
        assert not worse, f"written after the repair ({outcome} {said}): {worse}"
