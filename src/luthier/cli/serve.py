"""`luthier serve`: an OpenAI-compatible API before a run or a model."""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from luthier.cli.hand_over import As, Engine, Rank, Replace, There, Tolerance, Url, hand_over, hands_over
from luthier.cli.options import DRAFTED, DraftModel, Drafts, Json, require_no_lost_run
from luthier.cli.show import print_json
from luthier.core.child import WAIT_POLICY
from luthier.core.errors import RecipeError, RefusedError
from luthier.core.imports import uncollected
from luthier.core.optional import require

if TYPE_CHECKING:
    from luthier.server.opening import Wanted
    from luthier.server.settings import Settings

LOCAL = ("127.0.0.1", "localhost", "::1")


Name = Annotated[str, typer.Argument(metavar="RUN|MODEL", help="Run directory, model folder, hub id, or seedling.")]
Port = Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="Port; 0 takes a free one.")]
On = Annotated[str | None, typer.Option(metavar="DIR", help="Adapter folder (PEFT format) to put on a model.")]
Below = Annotated[Path | None, typer.Option(metavar="DIR", help="Folder below which clients may load adapters.")]
State = Annotated[Path, typer.Option(metavar="DIR", help="Where uploaded files and fine-tunes go.")]
Listen = Annotated[str, typer.Option(metavar="HOST", help="Address to listen at; beyond this machine it needs TLS.")]
Chain = Annotated[Path | None, typer.Option(metavar="FILE", help="TLS certificate (PEM).")]
Key = Annotated[Path | None, typer.Option(metavar="FILE", help="Its key (PEM).")]
Insecure = Annotated[bool, typer.Option("--insecure-http", help="Listen beyond this machine without TLS.")]
Hosts = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="Another name that clients call this host; repeatable.")
]
Waiting = Annotated[int, typer.Option(min=0, metavar="N", help="Answers that may wait; then 429.")]
Longest = Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")]
Kept = Annotated[
    int | None, typer.Option(min=16, metavar="N", help="Tokens whose keys are kept; empty goes by memory.")
]
Drain = Annotated[float, typer.Option(min=0, metavar="SECONDS", help="How long answers may take when it ends.")]
Access = Annotated[bool, typer.Option("--access-log", help="Write a line for each request.")]
Packed = Annotated[str, typer.Option("--quantizer", metavar="NAME", help="Pack the weights: int8, nf4, ...")]
Precise = Annotated[str, typer.Option(metavar="NAME", help="auto, float32 or bfloat16.")]


def serve(
    ctx: typer.Context,
    name: Name,
    port: Port = 8000,
    adapter: On = None,
    adapters: Below = None,
    state: State = Path("runs/served"),
    listen: Listen = LOCAL[0],
    tls_cert: Chain = None,
    tls_key: Key = None,
    insecure_http: Insecure = False,
    host_name: Hosts = None,
    waiting: Waiting = 256,
    max_new_tokens: Longest = 4096,
    cache_tokens: Kept = None,
    drafts: Drafts = 0,
    draft_model: DraftModel = None,
    drain: Drain = 30.0,
    access_log: Access = False,
    quantizer: Packed = "none",
    precision: Precise = "auto",
    engine: Engine = None,
    url: Url = "",
    as_name: As = "",
    path: There = "",
    max_rank: Rank = 16,
    tolerance: Tolerance = 0.05,
    replace: Replace = False,
    json: Json = False,
) -> None:
    """Serve a run or a model over HTTP, as programs written for OpenAI's API expect it.

    The token is LUTHIER_TOKEN, or is made and printed once. With --engine and --url it is handed over to an engine that
    runs already: its adapter is loaded there, and the engine's log-probabilities are compared with ours.

    \b
    Examples:
      luthier serve runs/2026-11-20-my-first --port 8000
      luthier serve runs/2026-11-20-my-first --engine vllm --url http://127.0.0.1:8000
    """
    require_no_lost_run(name)
    if hands_over(ctx):
        hand_over(ctx.params)
        return
    # Before torch is loaded: threads that spin while they wait would keep those that speak HTTP from the cores.
    os.environ.setdefault(WAIT_POLICY, "passive")
    ahead = _Ahead(drafts or DRAFTED * bool(draft_model), draft_model)
    wanted = _wanted(name, adapter, precision, quantizer=quantizer, tokens=cache_tokens, waiting=waiting, ahead=ahead)
    if adapters is not None and not adapters.is_dir():
        raise RecipeError(f"--adapters {adapters} is no folder", do="make it, or name another one")
    certified = _certified(listen, tls_cert, tls_key, insecure=insecure_http)
    token, made = _token()
    with uncollected():
        from luthier.server.settings import Limits, Settings

    settings = Settings(token=token, port=port, listen=listen, names=_names(listen, host_name or []), adapters=adapters,
                        state=state, limits=Limits(new_tokens=max_new_tokens), drain_seconds=drain)  # fmt: skip
    with _logged(access=access_log):
        _serve(wanted, settings, certified, told=token if made else "", json=json)


class _Ahead(NamedTuple):
    """How far texts are looked ahead, and by which model."""

    drafts: int
    model: str | None


def _wanted(
    name: str, adapter: str | None, precision: str, *, quantizer: str, tokens: int | None, waiting: int, ahead: _Ahead
) -> Wanted:
    """What is served. Raises MissingError without the extra that serves."""
    if precision not in ("auto", "float32", "bfloat16"):
        raise RecipeError(f"precision is {precision!r}", allowed="auto, float32 or bfloat16")
    for module in ("fastapi", "uvicorn", "python_multipart"):
        require(module, extra="serve", purpose="luthier serve")
    with uncollected():
        from luthier.server.opening import Wanted

    kept: Literal["auto", "float32", "bfloat16"] = precision  # type: ignore[assignment]  # checked above
    return Wanted(name=name, adapter=adapter, precision=kept, quantizer=quantizer, tokens=tokens, waiting=waiting,
                  drafts=ahead.drafts, draft_model=ahead.model)  # fmt: skip


def _serve(wanted: Wanted, settings: Settings, certified: tuple[Path, Path] | None, *, told: str, json: bool) -> None:
    with uncollected():
        from luthier.model.spoken import is_told
        from luthier.server.listen import Certificate, listen
        from luthier.server.opening import open_serving

    sys.stderr.write(f"loading {wanted.name} ...\n")
    serving = open_serving(wanted, settings)
    if precision := is_told(serving.opened.model.notices):
        sys.stderr.write(f"{precision} (--precision float32 for the other)\n")
    certificate = Certificate(*certified) if certified is not None else None
    place = f"http{'s' if certificate else ''}://{_shown(settings.listen)}"
    code = listen(
        serving,
        certificate=certificate,
        ready=lambda port: (_print if json else _tell)(f"{place}:{port}", serving.names.all, told),
    )
    if code:
        raise typer.Exit(code)


def _names(listen: str, more: Sequence[str]) -> tuple[str, ...]:
    """What clients may call this host."""
    names = (*LOCAL, _shown(listen).lower(), *(each.lower() for each in more))
    return tuple(dict.fromkeys("[::1]" if name == "::1" else name for name in names))


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _tell(url: str, names: Sequence[str], token: str) -> None:
    """Where it is, what it serves, and how to ask; a token that was made is told once."""
    asked = {"model": names[-1], "messages": [{"role": "user", "content": "Hello"}]}
    lines = [
        f"serving {', '.join(names)} at {url}",
        *([f"token (told once; set LUTHIER_TOKEN to choose it): {token}"] if token else []),
        f'curl {url}/v1/chat/completions -H "Authorization: Bearer $LUTHIER_TOKEN" -H "Content-Type: application/json" '
        f"-d '{dumps(asked)}'",
    ]
    sys.stderr.write("\n".join(lines) + "\n")
    sys.stderr.flush()


def _print(url: str, names: Sequence[str], token: str) -> None:
    """The same for a program; the token is there when it was made."""
    print_json({"url": url, "models": list(names), **({"token": token} if token else {})})
    sys.stdout.flush()


def _token() -> tuple[str, bool]:
    """The token, and whether it was made here."""
    given = os.environ.get("LUTHIER_TOKEN", "")
    if given and (len(given) < 8 or not given.isascii() or any(sign.isspace() for sign in given)):
        raise RecipeError(f"LUTHIER_TOKEN has {len(given)} characters", allowed="8 and more, ASCII, no white space",
                          do="leave it empty to have one made")  # fmt: skip
    return given or secrets.token_urlsafe(32), not given


def _certified(host: str, chain: Path | None, key: Path | None, *, insecure: bool) -> tuple[Path, Path] | None:
    """The files of TLS where there are any. Raises RefusedError for an open address without them."""
    if (chain is None) != (key is None):
        raise RecipeError(f"--tls-cert is {chain} and --tls-key is {key}", allowed="both or none")
    if chain is not None and key is not None:
        # Not at the top: every other command would wait for it.
        import ssl

        for path in (chain, key):
            if not path.is_file():
                raise RecipeError(f"{path} is no file", allowed="PEM files for --tls-cert and --tls-key")
        try:
            # A key with a password would be asked for here, where nobody may be.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(chain, key, password=lambda: "")
        except ssl.SSLError as failure:
            raise RecipeError(
                f"{chain} and {key} are no certificate and its key: {failure.reason or failure}",
                allowed="PEM files, the key without a password",
            ) from None
        return chain, key
    if host not in LOCAL and not insecure:
        raise RefusedError(
            f"--listen {host} is reached from beyond this machine, and tokens and texts would travel in the clear",
            allowed="TLS, or an explicit --insecure-http",
            do="add --tls-cert FILE --tls-key FILE, or --insecure-http where the network is trusted",
        )
    return None


@contextmanager
def _logged(*, access: bool) -> Iterator[None]:
    """Errors of the server on stderr, and requests where they are wanted, until the server has ended."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    loggers = [logging.getLogger(name) for name in ("luthier.server", "luthier.access", "uvicorn.error")]
    for logger in loggers:
        logger.setLevel(logging.INFO if access and logger.name == "luthier.access" else logging.ERROR)
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
