"""Errors a caller can act on; every message says what is wrong, where, and what to do."""


class ConsilienceError(Exception):
    """Base of the errors raised on purpose; the command line prints its message and exits with 2."""


class InputError(ConsilienceError):
    """Bad input: a file, a field, a flag or a specification."""


class EndpointError(ConsilienceError):
    """The endpoint refused the whole run (no authority, no such model, a parameter the user set).

    ``refused`` is the refusal itself (`consilience.text.transport.Refused`), where there was a reply.
    """

    refused: Exception | None = None


class BudgetSpent(ConsilienceError):
    """The next call could pass the cap of the run, so it was not started; ``limit`` names the cap."""

    def __init__(self, limit: str, message: str) -> None:
        super().__init__(message)
        self.limit = limit


class SourceExhausted(ConsilienceError):
    """A finite source (a record) holds no draw at the asked index."""


class SandboxUnavailable(ConsilienceError):
    """This system cannot confine generated code, so it was not run."""
