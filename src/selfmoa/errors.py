"""The error tree. Each class composes its own sentence: where, what was seen, what to do.

Exit codes: 0 done, 2 usage, then one a class below. The two halves matter to a script: codes
under 10 ask for a changed command or recipe; codes from 10 on ask for the same command again,
once the machine around it has changed (room, rights, a package, another process).
"""

from __future__ import annotations

import errno
from difflib import get_close_matches
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterable

PLAIN_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your disk quota is used up",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the disk reports an input/output error",
    errno.ELOOP: "it is a symbolic link",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EMFILE: "too many files are open",
    errno.ENOTDIR: "a part of the path is not a folder",
    errno.EEXIST: "a part of the path is not a folder",
    errno.EISDIR: "it is a folder",
}


def plain_reason(error: OSError) -> str:
    """Return what the operating system said, in words a user can act on."""
    known = PLAIN_REASONS.get(error.errno or 0)
    return known or (error.strerror or str(error) or "unknown reason").lower()


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ". Did you mean 'x'?" for the nearest known word, or "." if none is near."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f". Did you mean '{near[0]}'?" if near else "."


class SelfmoaError(Exception):
    """A condition a user can act on; printed as one sentence without a traceback.

    `is_fatal` says that nothing else can be asked either: it ends what is under way.
    """

    exit_code = 1
    is_fatal = False


class RecipeError(SelfmoaError):
    """The recipe or an override cannot be used as it stands."""

    exit_code = 3

    def __init__(self, where: str, problem: str) -> None:
        self.where = where
        super().__init__(f"{where}: {problem}")


class MissingFile(SelfmoaError):  # noqa: N818 - here and below: the sentence, not the suffix
    """A file or folder that the user named is not there."""

    exit_code = 4

    def __init__(self, path: object, purpose: str, remedy: str) -> None:
        super().__init__(f"{purpose} '{path}' does not exist; {remedy}.")


class NotARun(SelfmoaError):  # noqa: N818
    """A folder that was meant to hold a run holds something else."""

    exit_code = 4

    def __init__(self, path: object, seen: str) -> None:
        super().__init__(
            f"{path} is not a run: it has no run.json but holds {seen}; give --dir a new or empty "
            "folder, or that of a run."
        )


class BadInput(SelfmoaError):  # noqa: N818
    """A row of a data file cannot be read."""

    exit_code = 5

    def __init__(self, path: object, row: int, problem: str) -> None:
        self.row, self.problem = row, problem
        super().__init__(f"{path}, row {row}: {problem}")


class TooFewLabels(SelfmoaError):  # noqa: N818
    """A file of labelled responses has too few of one label to learn or to tell anything."""

    exit_code = 5

    def __init__(self, path: object, n_safe: int, n_unsafe: int, needed: int) -> None:
        super().__init__(
            f"{path} has {n_safe} safe and {n_unsafe} unsafe responses; at least {needed} of each "
            "are needed, and a few hundred in all are better: label more."
        )


class Absent:
    """Stands for a value that is not there at all, which is not the same as None."""

    def __repr__(self) -> str:
        return "(absent)"


class RunChanged(SelfmoaError):  # noqa: N818
    """A run folder holds work, sealed or begun, of another recipe, input or version."""

    exit_code = 6

    def __init__(self, run: object, key: str, old: object, new: object, stage: str) -> None:
        self.key, self.old, self.new = key, old, new
        super().__init__(
            f"{run} was made with {key}={_brief(old)}, now it is {key}={_brief(new)}: use another "
            f"folder (--dir), or redo the work from there with --redo {stage}."
        )


class RunDamaged(SelfmoaError):  # noqa: N818
    """A sealed file is missing or not what was sealed."""

    exit_code = 7

    def __init__(self, path: object, problem: str, stage: str) -> None:
        super().__init__(f"{path} {problem}; make it again with --redo {stage}.")


class UnknownPlugin(SelfmoaError):  # noqa: N818
    """A recipe names a plug-in that nobody registered."""

    exit_code = 8

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        super().__init__(
            f"there is no {kind} '{name}'{did_you_mean(name, known)} "
            f"Known: {', '.join(known) or '(none)'}"
        )


class Quarantined(SelfmoaError):  # noqa: N818
    """An un-aligned intermediate policy was asked for outside its run."""

    exit_code = 9

    def __init__(self, path: object) -> None:
        super().__init__(
            f"{path} is a reset policy: its safety was removed on purpose, so it can be neither "
            "exported nor published; use the final policy of the run."
        )


class RunBusy(SelfmoaError):  # noqa: N818
    """Another process works on this run."""

    exit_code = 10

    def __init__(self, run: object, owner: str) -> None:
        super().__init__(
            f"{run} is in use by {owner}: wait for it, stop it, or give this run another --dir."
        )


class CannotWrite(SelfmoaError):  # noqa: N818
    """The disk or the folder refuses a write. What is sealed stays."""

    exit_code = 11

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(
            f"cannot write {path}: {reason}. Nothing finished is lost; make room or choose "
            "another --dir, then run the same command again."
        )

    @classmethod
    def because(cls, path: object, error: OSError) -> Self:
        """Build the error from what the operating system said."""
        return cls(path, plain_reason(error))


class StageFailed(SelfmoaError):  # noqa: N818
    """A stage has nothing sensible to hand on."""

    exit_code = 12

    def __init__(self, stage: str, round_: int, seen: str, remedy: str) -> None:
        super().__init__(f"{stage} of round {round_}: {seen}; {remedy}.")


class MissingExtra(SelfmoaError):  # noqa: N818
    """A plug-in needs a package that is not installed."""

    exit_code = 13

    def __init__(self, kind: str, name: str, package: str, requirement: str) -> None:
        super().__init__(
            f"{kind} '{name}' needs the package '{package}', which is not installed; run: "
            f"pip install '{requirement}'"
        )


class BrokenPlugin(SelfmoaError):  # noqa: N818
    """A plug-in is registered but cannot be used: a clash of names, or code that does not load."""

    exit_code = 14

    def __init__(self, kind: str, name: str, problem: str) -> None:
        super().__init__(
            f"{kind} '{name}' {problem}; update or uninstall the package that provides it."
        )


class CannotRead(SelfmoaError):  # noqa: N818
    """The disk refuses a read, or the file may not be read."""

    exit_code = 15

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(
            f"cannot read {path}: {reason}. Mend that, then run the same command again."
        )


class NewerRun(SelfmoaError):  # noqa: N818
    """A run was written by a later version of the program."""

    exit_code = 16

    def __init__(self, run: object, seen: object, known: int) -> None:
        super().__init__(
            f"{run} has schema_version {seen}, this selfmoa knows up to {known}; update it with: "
            "pip install -U selfmoa"
        )


class TrainingStopped(SelfmoaError):  # noqa: N818
    """Going on with this training could not give a policy worth having. Nothing was written."""

    exit_code = 18

    def __init__(self, seen: str, remedy: str) -> None:
        super().__init__(f"training stopped: {seen}; {remedy}. No policy was written.")

    @classmethod
    def not_finite(cls, step: int, names: list[str], what: str = "loss") -> Self:
        """Build the error for losses or gradients that are NaN or infinite."""
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        return cls(
            f"the {what} is not finite at step {step}, for {', '.join(names[:5])}{more}",
            "look at those rows, or lower train.lr",
        )

    @classmethod
    def wrong_reference(cls, gap: float) -> Self:
        """Build the error for a policy that should start as its reference and does not."""
        return cls(
            f"the policy starts {gap:.4f} nats away from its reference, and they should be equal",
            "give both from the same folder, and look for dropout or noise in the model's code",
        )

    @classmethod
    def nothing_to_train(cls, step: int, names: list[str]) -> Self:
        """Build the error for a batch without a token that is trained on."""
        return cls(
            f"no token is trained on at step {step} ({', '.join(names[:5])})",
            "look at those rows and at the chat template",
        )


class LeakFound(SelfmoaError):  # noqa: N818
    """Prompts that are held out for evaluation were trained on. Its figures would flatter."""

    exit_code = 19

    def __init__(self, n: int, heldout: str, training: str, why: str) -> None:
        how = "has the seed" if why == "same seed" else f"is a {why}"
        super().__init__(
            f"{n} held-out prompts were trained on: {heldout} {how} of {training}; take them out "
            "of either side, then run the same command again."
        )


class EndpointError(SelfmoaError):
    """An endpoint gave no usable answer.

    `is_transient` says that another try may help.
    """

    exit_code = 20
    is_transient = False

    def __init__(self, url: str, seen: str, remedy: str) -> None:
        self.url, self.seen = url, seen
        super().__init__(f"endpoint {url}: {seen}; {remedy}.")


class OutputTaken(SelfmoaError):  # noqa: N818
    """Something would be written where something else lies."""

    exit_code = 4

    def __init__(self, path: object, seen: str, remedy: str = "a new or empty folder") -> None:
        super().__init__(f"{path} {seen}; give --out {remedy}.")


class NotAJudge(SelfmoaError):  # noqa: N818
    """A folder that was meant to hold a fitted judge holds something else, or a damaged one."""

    exit_code = 4

    def __init__(self, folder: object, seen: str) -> None:
        super().__init__(
            f"{folder} is no fitted judge: {seen}; make one with selfmoa judges fit FILE --out DIR."
        )


class UnusableTokenizer(SelfmoaError):  # noqa: N818
    """The model's tokenizer lacks what conversations need."""

    exit_code = 4

    def __init__(self, name: object, problem: str, remedy: str) -> None:
        super().__init__(f"the tokenizer '{name}' {problem}; {remedy}.")


class TrainingChanged(SelfmoaError):  # noqa: N818
    """A training would go on from checkpoints of another one."""

    exit_code = 6

    def __init__(self, folder: object, key: str, old: object, new: object) -> None:
        self.key, self.old, self.new = key, old, new
        super().__init__(
            f"the checkpoints in {folder} were made with {key}={_brief(old)}, now it is "
            f"{key}={_brief(new)}: train into another folder, or delete them to start anew."
        )


class Interrupted(SelfmoaError):  # noqa: N818
    """Ctrl-C or SIGTERM."""

    exit_code = 130

    def __init__(self, run: object) -> None:
        super().__init__(f"stopped; run the same command again to go on with {run}.")


def _brief(value: object) -> str:
    """Return the value as text, cut where a sentence would become unreadable."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."
