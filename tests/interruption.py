"""A long run that is stopped from outside, by its callback."""

from collections.abc import Callable


class Stopped(Exception):
    pass


def stop_after(count: int) -> Callable[[str], None]:
    """A callback that stops the run when this many files are written."""
    files: list[str] = []

    def callback(file: str) -> None:
        files.append(file)
        if len(files) == count:
            raise Stopped

    return callback
