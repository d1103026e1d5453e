"""A candidate: source that is run, functions that are called. Its process is locked up already.

Idea: nothing that is said here is believed. The host knows what it asked and how long it took; an answer is a value
that the program claims, whoever wrote it into the channel.
Protocol: `compiled`, then `ready` or `raised`, then one answer for each question, until the host says `end`.
"""

from __future__ import annotations

import atexit
import builtins
import linecache
import os
import re
import sys
import threading
import traceback
import types
from typing import Any, Final

from luthier.sandbox.guest.frames import receive, send
from luthier.sandbox.guest.values import BorderError, packable, unpack_parsed

PLACE: Final = re.compile(r"([A-Za-z_]\w*)(\(\))?((?:\.[A-Za-z_]\w*)*)")
_SHOWN: Final = 500
_EXITED: Final = 0


def serve(channel: int) -> None:
    """Run one program and answer the questions about it; ends the process."""
    asked = receive(channel)
    for name, text in asked["files"].items():
        _write(name, text)
    script = asked["script"]
    owner = os.getpid()
    module = types.ModuleType("__main__" if script else "candidate")
    sys.modules[module.__name__] = module
    sys.argv = ["program.py"]
    linecache.cache["program.py"] = (len(asked["source"]), None, asked["source"].splitlines(True), "program.py")
    try:
        code = compile(asked["source"], "program.py", "exec", dont_inherit=True)
    except BaseException as failure:
        _tell(channel, failure, "uncompiled")
        return
    send(channel, {"is": "compiled"})
    try:
        exec(code, module.__dict__)
        if script:
            _wait_for_threads()
    except SystemExit as wish:
        _leave(wish)
    except BaseException as failure:
        _tell(channel if os.getpid() == owner else None, failure, "raised")
        return
    if os.getpid() != owner:
        return  # a process that the program forked, and that came to the end of the program
    send(channel, {"is": "ready"})
    _answer(channel, module)


def description(failure: BaseException) -> dict[str, str]:
    """An exception as text, with the builtin exception that it is one of."""
    kinds = [kind.__name__ for kind in type(failure).__mro__ if kind.__module__ == "builtins"]
    try:
        words = str(failure)
    except Exception:
        words = "(it has no words)"
    return {"error": f"{type(failure).__name__}: {words}"[:_SHOWN], "raised": kinds[0] if kinds else "Exception"}


def _answer(channel: int, module: types.ModuleType) -> None:
    while True:
        asked = receive(channel)
        if asked["do"] == "end":
            _flush()
            return
        try:
            answer = _called(asked, module)
        except SystemExit as wish:
            _leave(wish)
        except BorderError as failure:
            answer = {"error": str(failure), "raised": "TypeError", "crosses": False}
        except BaseException as failure:
            answer = description(failure)
        send(channel, {"is": "answer", **answer})


def _called(asked: dict[str, Any], module: types.ModuleType) -> dict[str, Any]:
    arguments = [unpack_parsed(tree) for tree in asked["arguments"]]
    keywords = {name: unpack_parsed(tree) for name, tree in asked["keywords"].items()}
    value = _found(asked["function"], module)(*arguments, **keywords)
    answer = {"value": packable(value)}
    if asked["watch"]:
        # A function that changes what it was given: the caller's own must change too.
        after = {str(number): packable(argument) for number, argument in enumerate(arguments)
                 if isinstance(argument, (list, dict, set, bytearray))}  # fmt: skip
        answer["changed"] = {number: tree for number, tree in after.items() if tree != asked["arguments"][int(number)]}
    return answer


def _found(place: str, module: types.ModuleType) -> Any:
    found = PLACE.fullmatch(place)
    if found is None:
        raise NameError(f"{place!r} is no name")
    name, fresh, rest = found.groups()
    if name not in module.__dict__:
        raise NameError(f"name {name!r} is not defined")
    thing = module.__dict__[name]
    if fresh:
        thing = thing()
    for attribute in filter(None, rest.split(".")):
        thing = getattr(thing, attribute)
    return thing


def _write(name: str, text: str) -> None:
    if os.path.dirname(name):
        os.makedirs(os.path.dirname(name), exist_ok=True)
    with open(name, "w", encoding="utf-8") as file:
        file.write(text)


def _tell(channel: int | None, failure: BaseException, what: str) -> None:
    """Say how the program ended, and to standard error what Python would have said."""
    try:
        # Without our own line, which comes first.
        where = failure.__traceback__
        traceback.print_exception(type(failure), failure, where.tb_next if where else None)
        _flush()
    finally:
        if channel is not None:
            send(channel, {"is": what, **description(failure)})


def _leave(wish: SystemExit) -> None:
    """End as Python would for `sys.exit`."""
    code = wish.code
    if code is not None and not isinstance(code, int):
        builtins.print(code, file=sys.stderr)
    _flush()
    os._exit(_EXITED if code is None else int(code) & 0xFF if isinstance(code, int) else 1)


def _wait_for_threads() -> None:
    """What Python does at the end of a script."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            continue  # the program closed it
