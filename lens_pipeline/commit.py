"""Which code this is."""

from pathlib import Path

from lens_pipeline.settings import Settings


def code_commit() -> str | None:
    """The commit that LENS_GIT_COMMIT names, else that of the checkout that this runs from, with
    `-dirty` where files of it have changed since; None where it is no checkout."""
    if stated := Settings.load().git_commit:
        return stated
    try:
        import git
    except ImportError:  # where the program itself is not installed
        return None
    here = Path(__file__).resolve().parents[1]
    try:
        checkout = git.Repo(here)  # which is not in somebody else's checkout
        commit = checkout.head.commit.hexsha
        return f"{commit}-dirty" if checkout.is_dirty() else str(commit)
    except (git.GitError, ValueError):  # another user's checkout; one without a commit
        return None
