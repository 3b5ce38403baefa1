"""Work that one of several processes may refuse, such as reading files of its host: then all refuse it."""

from collections.abc import Callable
from typing import TypeVar

import jax

from dsv4_jax.errors import ProblemsError
from sharding.agreement import collected

Result = TypeVar("Result")


def refused_together(work: Callable[[], Result]) -> Result:
    """What `work` returns, once it has succeeded in every process. With one process it is simply called.

    With several, every process must call this in the same place; `work` itself may contain no collective.

    Raises:
        ProblemsError: if it raised one in any process; of the same class as this process's own, if that
            is one of them. It has the problems of all processes, with their numbers where they differ.
        Exception: whatever else `work` raised in this process; the others get a ProblemsError that names it.
    """
    if jax.process_count() == 1:
        return work()
    refusal: ProblemsError | None = None
    fault: Exception | None = None
    try:
        result = work()
    except ProblemsError as raised:
        refusal = raised
    except Exception as raised:  # told to the others, and raised again below
        fault = raised
    own = list(refusal.problems) if refusal else [f"{type(fault).__name__}: {fault}"] if fault else []
    everyone = collected([refusal.what if refusal else "", *own])
    if fault is not None:
        raise fault
    problems = [problems for _, *problems in everyone]
    if not any(problems):
        return result
    if all(each == problems[0] for each in problems):
        said = problems[0]
    else:
        said = [f"process {number}: {problem}" for number, each in enumerate(problems) for problem in each]
    if refusal is not None:
        raise type(refusal)(refusal.what, said) from refusal
    what = next((what for what, *_ in everyone if what), "another process failed")
    raise ProblemsError(what, said)
