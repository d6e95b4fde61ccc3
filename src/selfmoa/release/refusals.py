"""Why something is not handed out."""

from __future__ import annotations

from selfmoa.errors import SelfmoaError


class NotForRelease(SelfmoaError):  # noqa: N818 - here and below: the sentence, not the suffix
    """A run, a policy or a folder must not be handed out as it is."""

    exit_code = 9

    def __init__(self, path: object, seen: str, remedy: str) -> None:
        super().__init__(f"{path} is not handed out: {seen}; {remedy}.")


class OtherBase(SelfmoaError):  # noqa: N818
    """The base model at hand is not the one that the adapter was trained on."""

    exit_code = 6

    def __init__(self, base: object, seen: str, adapter: object) -> None:
        super().__init__(
            f"{base} is not the base that {adapter} was trained on: {seen}; get the model and "
            "revision that its receipt names."
        )


class HubRefused(SelfmoaError):  # noqa: N818
    """A model hub could not be reached, or took nothing."""

    exit_code = 11

    def __init__(self, repo: str, seen: str, remedy: str) -> None:
        super().__init__(f"nothing was pushed to {repo}: {seen}; {remedy}.")
