"""`calotype serve`: the codec as an HTTP service with a web page."""

from __future__ import annotations

import ipaddress
import math
import socket

import click

from calotype.cli.console import Settings
from calotype.cli.options import common_options, processors, size
from calotype.errors import CalotypeError, InputError


@click.command(short_help="Serve the codec over HTTP, with a web page.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=lambda: min(processors(), 4),
    show_default="one a processor, 4 at most",
    help="Requests that are worked on at a time.",
)
@click.option(
    "--queue", type=click.IntRange(0), default=32, show_default=True, help="Requests that may wait; more get a 503."
)
@click.option(
    "--max-body", type=size, metavar="SIZE", default="64M", show_default=True, help="Largest body of a request."
)
@click.option(
    "--max-pixels", type=size, metavar="SIZE", default="64M", show_default=True, help="Largest picture, in pixels."
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=60,
    show_default=True,
    help="Seconds that a request may wait and be worked on.",
)
@click.option(
    "--transfer-timeout",
    type=click.FloatRange(0, min_open=True),
    default=60,
    show_default=True,
    help="Seconds that a client may take to send a request, and to take the answer.",
)
@click.option(
    "--token",
    envvar="CALOTYPE_TOKEN",
    show_envvar=True,
    help="Bearer token that requests must carry. The environment hides it from other users' lists of processes.",
)
@common_options
@click.pass_obj
def serve(
    settings: Settings,
    *,
    host: str,
    port: int,
    workers: int,
    queue: int,
    max_body: int,
    max_pixels: int,
    timeout: float,
    transfer_timeout: float,
    token: str | None,
) -> None:
    """Serve the codec over HTTP: a web page at /, the interface described at /openapi.json.

    It can be reached from this machine only unless --host says otherwise. Ctrl-C stops it when the requests under way
    are done. Needs the extra `serve`.
    """
    try:
        import uvicorn
        from pydantic import SecretStr

        from calotype.service import Settings as ServiceSettings
        from calotype.service import create_app
    except ModuleNotFoundError as error:
        raise CalotypeError(f"the service needs {error.name}: pip install 'calotype[serve]'") from error
    import torch

    app = create_app(
        ServiceSettings(
            device=settings.device,
            workers=workers,
            queue=queue,
            max_body=max_body,
            max_pixels=max_pixels,
            timeout=timeout,
            transfer_timeout=transfer_timeout,
            token=None if token is None else SecretStr(token),
        )
    )
    listener = _listen(host, port)
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        log_level="info" if settings.verbose else "warning",
        server_header=False,
        timeout_graceful_shutdown=math.ceil(timeout + transfer_timeout),
    )
    # Torch would use every processor for every request.
    torch.set_num_threads(max(1, processors() // workers))
    if not settings.quiet:
        shown = f"[{host}]" if ":" in host else host
        click.echo(f"Calotype is at http://{shown}:{listener.getsockname()[1]}/ (Ctrl-C stops it)")
    if token is None and not _is_local(listener):
        click.echo("calotype: anyone who reaches this address can use the service: set a --token", err=True)
    # The server has ended in order by the time that the interrupt comes up here.
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        return


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises InputError for an address that is taken or not of this machine."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot listen at {host} port {port} ({reason}): choose another --host or --port") from error


def _is_local(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback
