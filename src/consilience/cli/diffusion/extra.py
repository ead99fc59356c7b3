"""What the commands need before they begin."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from consilience.errors import InputError

if TYPE_CHECKING:
    from consilience.diffusion.pipeline import ImagePipeline

NEEDED = ("torch", "diffusers", "accelerate", "sklearn")
MOST_STEPS = 10_000
"""Evaluations per image; each has its coefficients worked out before the first."""
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
"""What torch's errors of no kind of their own say: on the CPU, on Windows, and on Apple's GPUs."""


@contextmanager
def extra() -> Iterator[None]:
    """Run with the extra's packages, and turn what they say into lines for a person.

    Raises InputError where one is missing, and in place of a ValueError, of the FloatingPointError of a training, or of
    memory that was not to be had.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise InputError(f"needs {', '.join(missing)}: pip install 'consilience[diffusion]'")
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        except (ValueError, FloatingPointError) as error:
            raise InputError(str(error)) from error
        except (MemoryError, RuntimeError) as error:
            if not _of_memory(error):
                raise
            raise InputError(
                "there was no memory for this: make --batch, --width, --count or the images smaller, or --accumulate "
                f"larger ({str(error).splitlines()[0]})"
            ) from error
        finally:
            for text in dict.fromkeys(str(one.message) for one in heard if issubclass(one.category, UserWarning)):
                print(f"warning: {text}", file=sys.stderr)


def _of_memory(error: Exception) -> bool:
    """Whether memory ran out; torch has a kind of error for it on some devices alone."""
    import torch

    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or any(words in str(error) for words in NO_MEMORY)


def check_steps(steps: int) -> None:
    """Raise InputError for a number of evaluations that no sampling takes."""
    if not 1 <= steps <= MOST_STEPS:
        raise InputError(f"steps {steps}: must be at least 1 and at most {MOST_STEPS}")


def load(folder: Path | None, evaluations: int, few: bool = False) -> tuple[ImagePipeline, str]:
    """The model of a folder, or the shipped one, on the fastest device; and its name.

    The shipped one is the teacher, or with ``few``, for so few evaluations, the student.
    """
    import torch

    from consilience.diffusion.digits import FEW, shipped
    from consilience.diffusion.pipeline import load as read

    own = shipped(evaluations if few else FEW + 1)
    place = own if folder is None else folder
    pipe = read(place)
    pipe.network.to("cuda" if torch.cuda.is_available() else "cpu")
    name = f"the digits {own.name}" if folder is None else str(folder)
    return pipe, name
