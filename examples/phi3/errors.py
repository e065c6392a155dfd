"""What can go wrong for a reason that the person at the keyboard can mend."""


class UserError(Exception):
    """Shown as one message without a traceback; the message says what to do."""


class Diverged(Exception):
    """The loss or its gradient is no longer a finite number."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for quoting it inside another one."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
