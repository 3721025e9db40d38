"""A real MCP server, and a container of archipelago's interface around it; run as a program by the tests.

    python tool_server.py stdio                 tools over standard input and output
    python tool_server.py serve PORT MODE       the container; MODE: fine, stale (old files), sick, broken (snapshots)
    python tool_server.py start MODE            start a container, print its address, leave
    python tool_server.py stop URL              remove it
"""

import io
import os
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from typing import Any

FILES: dict[str, bytes] = {}
SEEN: list[Any] = []


def make_tools() -> Any:
    """The server with its tools."""
    from mcp.server import MCPServer
    from mcp.types import ToolAnnotations

    server = MCPServer("office", log_level="CRITICAL")

    @server.tool(annotations=ToolAnnotations(read_only_hint=True))
    def filesystem_server_read_file(path: str) -> str:
        """Read a file."""
        return FILES[f"filesystem/{path}"].decode()

    @server.tool()
    def filesystem_server_write_file(path: str, content: str) -> str:
        """Write a file."""
        FILES[f"filesystem/{path}"] = content.encode()
        return f"{len(FILES)} files"

    @server.tool()
    def filesystem_server_delete_file(path: str) -> str:
        """Delete a file."""
        del FILES[f"filesystem/{path}"]
        return "deleted"

    @server.tool(structured_output=False)
    def big(n: int) -> str:
        """Say very much."""
        return "x" * n

    @server.tool()
    def clock() -> str:
        """Never the same."""
        return str(time.monotonic_ns())

    @server.tool()
    async def slow(s: float) -> str:
        """Take a while."""
        import asyncio

        await asyncio.sleep(s)
        return "at last"

    @server.tool(structured_output=False)
    def picture() -> list[Any]:
        """Text and a picture."""
        from mcp.types import ImageContent, TextContent

        return [TextContent(type="text", text="see"), ImageContent(type="image", data="AAAA", mime_type="image/png")]

    @server.tool()
    def die() -> str:
        """End the server at once."""
        print("out of paper", file=sys.stderr, flush=True)
        os._exit(3)

    return server


def make_container(mode: str) -> Any:
    """The container's application: the gateway under /mcp/ and the rest of its interface."""
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response

    server = make_tools()
    if mode == "stale":
        FILES["filesystem/of-yesterday.txt"] = b"old"
    tries = [0]

    @server.custom_route("/health", ["GET"])
    async def health(request: Request) -> Response:
        tries[0] += 1
        return JSONResponse({"status": "ok"}, 503 if mode == "sick" or tries[0] < 2 else 200)

    @server.custom_route("/apps", ["POST"])
    async def apps(request: Request) -> Response:
        SEEN.append(await request.json())
        return JSONResponse({"apps": list(SEEN[-1]["mcpServers"])})

    @server.custom_route("/data/populate", ["POST"])
    async def populate(request: Request) -> Response:
        subsystem = request.query_params["subsystem"]
        form = await request.form()
        upload: Any = form["archive"]
        with tarfile.open(fileobj=io.BytesIO(await upload.read())) as archive:
            names = [member.name for member in archive if member.isreg()]
            FILES.update({f"{subsystem}/{name}": archive.extractfile(name).read() for name in names})  # type: ignore
        return JSONResponse({"objects_added": len(names), "subsystem": subsystem, "extracted_bytes": 1})

    @server.custom_route("/data/snapshot", ["POST"])
    async def snapshot(request: Request) -> Response:
        await request.json()
        if mode == "broken" and len(SEEN):
            return Response(b"no tar")
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            for name, data in FILES.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return Response(buffer.getvalue(), media_type="application/gzip")

    @server.custom_route("/die", ["POST"])
    async def stop(request: Request) -> Response:
        os._exit(0)

    return server


def start(mode: str) -> None:
    """Start a container in the background and print its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    subprocess.Popen([sys.executable, __file__, "serve", str(port), mode], stdin=subprocess.DEVNULL,
                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    print("starting")
    print(f"http://127.0.0.1:{port}")


def stop(url: str) -> None:
    """Remove a container."""
    try:
        urllib.request.urlopen(urllib.request.Request(f"{url}/die", method="POST"), timeout=10)
    except (OSError, urllib.error.URLError):
        return


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["stdio"]:
            make_tools().run("stdio")
        case ["serve", port, mode]:
            make_container(mode).run("streamable-http", host="127.0.0.1", port=int(port), streamable_http_path="/mcp/")
        case ["start", mode]:
            start(mode)
        case ["stop", url]:
            stop(url)
