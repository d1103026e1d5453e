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
from collections.abc import Iterator
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
        if not script or wish.code not in (None, 0):
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
    things: list[Any] = []
    while True:
        asked = receive(channel)
        if asked["do"] == "end":
            _flush()
            return
        try:
            answer = _called(asked, module, things)
        except SystemExit as wish:
            _leave(wish)
        except BorderError as failure:
            answer = {"error": str(failure), "raised": "TypeError", "crosses": False}
        except BaseException as failure:
            answer = description(failure)
        send(channel, {"is": "answer"} | answer)


def _called(asked: dict[str, Any], module: types.ModuleType, things: list[Any]) -> dict[str, Any]:
    arguments = [_received(tree, things) for tree in asked["arguments"]]
    keywords = {name: _received(tree, things) for name, tree in asked["keywords"].items()}
    if asked.get("of") is None:
        function = _found(asked["function"], module)
    else:
        function = getattr(things[asked["of"]], asked["function"])
        if asked["how"] == "get":
            return {"is": "callable"} if callable(function) else _kept(function, things)
    value = function(*arguments, **keywords)
    if not asked["watch"]:
        return {"value": packable(value)}
    # A function that changes what it was given: the caller's own must change too.
    changed: dict[str, Any] = {}
    for number, (argument, before) in enumerate(zip(arguments, asked["arguments"], strict=True)):
        if isinstance(argument, (list, dict, set, bytearray)) and not _is_thing(before):
            after = packable(argument)
            changed |= {str(number): after} if after != before else {}
    return {"changed": changed, **_kept(value, things)}


def _received(tree: Any, things: list[Any]) -> Any:
    return things[tree["of"]] if _is_thing(tree) else unpack_parsed(tree)


def _is_thing(tree: Any) -> bool:
    return isinstance(tree, dict) and tree.get("!") == "thing"


def _kept(value: Any, things: list[Any]) -> dict[str, Any]:
    """A value that is plain data; anything else stays here and gets a number. Iterators too: they may have no end."""
    try:
        if not isinstance(value, Iterator):
            return {"is": "value", "value": packable(value)}
    except BorderError:
        pass
    things.append(value)
    return {"is": "thing", "value": len(things) - 1}


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
